"""Results as JSON, as a Markdown table and as a picture."""

import json
from pathlib import Path

from training.benchmarks.texts import MASKED_SHARE
from training.plots import plt

HEADER = (
    "contender",
    "seconds",
    "spread",
    "useful tokens (or pairs)/s",
    "share of the machine",
    "peak memory",
    "ours is",
    "memory",
)
# Results in the README, in their order.
SHOWN = (
    ("train", "gpt2"),
    ("encode", "gpt2"),
    ("decode", "gpt2"),
    ("loss", "gpt2"),
    ("mlm", "bert-base"),
    ("sentences", "bert-base"),
    ("pretrain", "blip2-vit-g"),
    ("caption", "blip2-vit-g"),
    ("translate", "transformer-base"),
)


def flops_per_token(config: dict, length: float, is_masked: bool = False, has_head: bool = True) -> float:
    """Of a training step, backward pass included: 6 a weight of the blocks and the head, and attention's pairs.

    Args:
        is_masked: a token sees those after it as well, and the head reads the masked ones alone.
    """
    width = config["n_embd"]
    head = config["vocab_size"] * width
    if is_masked:
        head = MASKED_SHARE * (head + width**2)
    weights = 12 * config["n_layer"] * width**2 + (head if has_head else 0)
    return 6 * weights + (12 if is_masked else 6) * config["n_layer"] * width * length


def share_of_machine(result: dict, row: dict, contender: dict) -> str:
    """Useful work as a share of the measured rate: of products for training, of memory for generation."""
    if result["name"] in ("pretrain", "caption", "translate"):
        return ""
    config, machine = result["config"], result["machine"]
    rate = machine["matrix_flops"]["bfloat16" if contender["bf16"] else "float32"]
    tokens = contender["tokens_per_second"]
    if result["name"] == "decode":
        weights = 12 * config["n_layer"] * config["n_embd"] ** 2 + config["vocab_size"] * config["n_embd"]
        steps = tokens / row["shape"]["batch_size"]
        return f"{4 * weights * steps / machine['bandwidth']:.0%} of bandwidth"
    if result["name"] == "loss":
        return f"{tokens * 6 * config['vocab_size'] * row['shape']['width'] / rate:.0%} of products"
    length = row["tokens"] / sum(batch[0] for batch in row["batch"])
    is_masked = result["name"] in ("mlm", "sentences")
    is_training = result["name"] in ("train", "mlm")
    flops = flops_per_token(config, length, is_masked, has_head=is_training) / (1 if is_training else 3)
    return f"{tokens * flops / rate:.0%} of products"


def table(result: dict) -> str:
    """A Markdown table a row of the result. Where outputs disagree the reason stands in place of the ratio."""
    lines = []
    for row in result["rows"]:
        title = " ".join(filter(None, (row["group"], row["title"])))
        padding = f", {row['padding']:.0%} padding" if row.get("padding") else ""
        lines += ["", f"**{result['name']}, {result['preset']}: {title}{padding}**", ""]
        lines += ["| " + " | ".join(HEADER) + " |", "| " + " | ".join("---" for _ in HEADER) + " |"]
        ours = row["contenders"][-1]
        for contender in row["contenders"]:
            cells = [contender["name"], *[""] * 7]
            if "seconds" in contender:
                cells[1:6] = (
                    f"{contender['seconds']:.3f}",
                    f"{contender['spread']:.0%}",
                    f"{contender['tokens_per_second']:,.{0 if contender['tokens_per_second'] >= 10 else 2}f}",
                    share_of_machine(result, row, contender),
                    f"{contender['peak_memory'] / 1e9:.2f} GB",
                )
            if contender["disagreement"]:
                cells[6] = f"no ratio: {contender['disagreement']}"
            elif contender is not ours and "seconds" in contender and "seconds" in ours:
                cells[6] = f"{contender['seconds'] / ours['seconds']:.2f} x as fast"
                cells[7] = f"{ours['peak_memory'] / contender['peak_memory']:.2f} of it"
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(folder: Path, device: str) -> str:
    """The results of a device in one table, as the README shows it."""
    lines = ["| work | against | faster | memory |", "| --- | --- | --- | --- |"]
    for name, preset in SHOWN:
        path = folder / f"{name}-{preset}-{device}.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            ours = row["contenders"][-1]
            padding = f", {row['padding']:.0%} padding" if row.get("padding") else ""
            for contender in row["contenders"][:-1]:
                if contender["disagreement"] is None:
                    ratio, memory = (contender[key] / ours[key] for key in ("seconds", "peak_memory"))
                    work = f"{preset} {name}: {row['title']}{padding}"
                    lines.append(f"| {work} | {contender['name']} | {ratio:.2f} x | {1 / memory:.2f} |")
    return "\n".join(lines)


def write(result: dict, folder: Path, name: str) -> None:
    """`name`.json and `name`.md in `folder`, each complete or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = result["machine"]
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in machine["matrix_flops"].items())
    head = (
        f"# {name}\n\n{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}. Measured limits: products {rates}; memory {machine['bandwidth'] / 1e9:.0f} GB/s. "
        f"Lengths and ids from {result['texts']}. Peak memory is what the process took beyond its imports.\n"
    )
    for suffix, text in (("json", json.dumps(result, indent=1) + "\n"), ("md", head + table(result) + "\n")):
        draft = folder / f".{name}.{suffix}"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / f"{name}.{suffix}")


def plot_sweeps(result: dict, path: Path) -> None:
    """Time and peak memory of each contender against what each sweep varies."""
    groups = list(dict.fromkeys(row["group"] for row in result["rows"]))
    figure, axes = plt.subplots(2, len(groups), figsize=(5 * len(groups), 7), layout="constrained", squeeze=False)
    for column, group in enumerate(groups):
        rows = [row for row in result["rows"] if row["group"] == group]
        titles = [row["title"] for row in rows]
        for index, contender in enumerate(rows[0]["contenders"]):
            for line, (key, scale, label) in enumerate(
                (("seconds", 1, "seconds a step"), ("peak_memory", 1e-9, "peak memory (GB)"))
            ):
                values = [row["contenders"][index].get(key) for row in rows]
                values = [float("nan") if value is None else value * scale for value in values]
                axes[line, column].plot(titles, values, "o-", label=contender["name"])
                axes[line, column].set(xlabel=group, ylabel=label)
                axes[line, column].grid(alpha=0.3)
    for each in axes.flat:
        each.set_ylim(0, None)
    axes[0, 0].legend()
    figure.suptitle(f"{result['preset']}: one training step on {result['machine']['device']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
