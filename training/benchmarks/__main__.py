"""Measure ours beside stock Transformers, in one run, on one machine.

Each contender is a process of its own with the same weights and the same ids. They take turns, after a round that
warms up; the median of the rounds counts, and the spread is shown. No ratio is printed unless the outputs agree.

Examples:
  # training steps of GPT-2 124M on real-length text
  python -m training.benchmarks train

  # on your own text, a smaller model, more rounds
  python -m training.benchmarks train --preset gpt2-mini --data my_texts/ --rounds 9

  # masked language modelling with BERT-base, and its states of sentences
  python -m training.benchmarks mlm
  python -m training.benchmarks sentences

  # the two stages of BLIP-2, with a ViT-g as its tower
  python -m training.benchmarks pretrain
  python -m training.benchmarks caption

  # an encoder-decoder, beside Marian
  python -m training.benchmarks translate

  # generation, hidden states, the loss alone
  python -m training.benchmarks decode
  python -m training.benchmarks encode
  python -m training.benchmarks loss

  # time and memory against the share of padding and against the length, with a picture
  python -m training.benchmarks train --sweep

  # everything that a GPU has to say, within ten minutes
  bash training/benchmarks/gpu.sh
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hf_custom.presets import PRESETS, preset_config
from training.args import user_errors
from training.benchmarks.contenders import Comparison, Setting, comparisons, sweeps
from training.benchmarks.measure import machine
from training.benchmarks.report import plot_sweeps, table, write
from training.benchmarks.texts import batches, draw_documents, full_documents, shorten

# Preset by benchmark, whose family it measures.
NAMES = {
    "train": "gpt2",
    "encode": "gpt2",
    "decode": "gpt2",
    "loss": "gpt2",
    "mlm": "bert-base",
    "sentences": "bert-base",
    "pretrain": "blip2-vit-g",
    "caption": "blip2-vit-g",
    "translate": "transformer-base",
}
# Stock configuration and class, and the kind of tokenizer, by family.
FAMILIES = {
    "custom_gpt2": (GPT2Config, GPT2LMHeadModel, "bpe"),
    "custom_bert": (BertConfig, BertForMaskedLM, "wordpiece"),
    # Their contenders draw the weights themselves.
    "custom_blip2": (None, None, "wordpiece"),
    "custom_transformer": (None, None, "ended-bpe"),
}
# Largest difference between contenders, relative to the largest value: of float32, and of products in bfloat16.
TOLERANCES = {False: 1e-4, True: 3e-2}


class Contender:
    """A worker process and what it measured."""

    def __init__(self, setting: Setting, spec: dict):
        self.setting, self.rounds, self.memory, self.error = setting, [], {}, None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._send(json.dumps(spec))

    def _send(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> dict:
        """The worker's answer; when it has died, none, and `error` says of what."""
        if self.error is None:
            try:
                self._send(command)
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if line:
                return json.loads(line)
            self.error = (self.process.stderr.read().strip().splitlines() or ["died without a word"])[-1]
        return {}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.stderr.close()
        self.process.wait()


def disagreement(path: str, other: str, tolerance: float) -> str | None:
    """What differs between two proofs, in words, or `None`."""
    mine, theirs = torch.load(path), torch.load(other)
    for name, expected in theirs.items():
        if mine[name].shape != expected.shape:
            return f"{name}: {tuple(mine[name].shape)} is not {tuple(expected.shape)}"
        if not expected.is_floating_point():
            if not torch.equal(mine[name], expected):
                return f"{name} differ from place {int((mine[name] != expected).nonzero()[0, -1])} on"
            continue
        error = ((mine[name] - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            return f"{name} off by {error:.1e}, allowed {tolerance:.0e}"
    return None


def draw(comparison: Comparison, data: str | None, vocab_size: int, kind: str) -> list[list[int]]:
    """The documents of a comparison, by a tokenizer of `kind`."""
    shape = comparison.shape
    count = shape["batch_size"] * shape["batches"]
    if "length" in shape:
        documents = full_documents(data, vocab_size, count, shape["length"], kind=kind)
        return shorten(documents, shape.get("padding", 0))
    are_sentences = shape.get("sentences", False)
    return draw_documents(data, vocab_size, count, shape["max_length"], kind=kind, are_sentences=are_sentences)


def run(comparison: Comparison, name: str, args: argparse.Namespace, folder: Path, config: dict) -> dict:
    """Measure a comparison: its contenders take turns, `args.rounds` times."""
    spec = {"workload": name, "device": args.device, "preset": args.preset, **comparison.shape}
    spec["checkpoint"] = str(folder / "model")
    facts = {}
    if name == "loss":
        spec["vocab_size"] = config["vocab_size"]
        facts["tokens"] = spec["rows"]
    else:
        documents = draw(comparison, args.data, config["vocab_size"], config["tokenizer"])
        (folder / "documents.json").write_text(json.dumps(documents))
        spec["documents"] = str(folder / "documents.json")
        made = batches(documents, spec["batch_size"])
        places = sum(batch["input_ids"].numel() for batch in made)
        real = sum(map(len, documents))
        facts = {"tokens": len(documents) * spec["new_tokens"] if name == "decode" else real}
        if name in ("pretrain", "caption"):
            facts["tokens"] = len(documents)
        facts["padding"] = 1 - real / places
        facts["batch"] = [list(batch["input_ids"].shape) for batch in made]
    settings = (*comparison.stock, comparison.ours)
    contenders = []
    try:
        for index, setting in enumerate(settings):
            own = {"setting": setting.spec(), "proofs": str(folder / f"proof-{index}")}
            contenders.append(Contender(setting, {**spec, **own}))
        proofs = [contender.ask("proof") for contender in contenders]
        steps = tqdm(total=len(contenders) * (args.rounds + 2), desc=comparison.title, leave=False)
        for turn in range(args.rounds + 1):
            for contender in contenders:
                elapsed = contender.ask("round").get("seconds")
                # The first round warms up.
                if turn and elapsed is not None:
                    contender.rounds.append(elapsed)
                steps.update()
        for contender in contenders:
            contender.memory = contender.ask("memory")
            steps.update()
        steps.close()
        rows = []
        for contender, proof in zip(contenders, proofs, strict=True):
            reason = contender.error
            if reason is None and contender is not contenders[-1] and proofs[-1]:
                reason = disagreement(proof["path"], proofs[-1]["path"], TOLERANCES[contender.setting.bf16])
            rows.append(_row(contender, facts, reason))
    finally:
        for contender in contenders:
            contender.close()
    return {"title": comparison.title, **facts, "shape": comparison.shape, "contenders": rows}


def _row(contender, facts, reason):
    row = {"name": contender.setting.name, "bf16": contender.setting.bf16, "disagreement": reason}
    if contender.rounds:
        median = statistics.median(contender.rounds)
        row |= {
            "seconds": median,
            "spread": (max(contender.rounds) - min(contender.rounds)) / median,
            "rounds": contender.rounds,
            "tokens_per_second": facts["tokens"] / median,
            "peak_memory": contender.memory.get("peak"),
            "process_memory": contender.memory.get("process"),
        }
    return row


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", help="size of the model (default: gpt2, 124M, or bert-base, 110M)")
    parser.add_argument("--data", help="folder of .txt files to take lengths and ids from; else the embedded corpus")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, at least 5")
    parser.add_argument("--only", help="measure the rows whose title contains this")
    parser.add_argument("--sweep", action="store_true", help="train only: against padding and length, with a picture")
    parser.add_argument(
        "--output", default=str(Path(__file__).parent / "results"), help="folder for JSON, table, picture"
    )
    args = parser.parse_args(argv)
    if args.rounds < 5:
        raise ValueError(f"--rounds is {args.rounds}, but a median of fewer than 5 says little. Pass 5 or more.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda but torch sees no GPU. Install a CUDA build of torch, or pass --device cpu.")
    default = NAMES[args.name]
    args.preset = args.preset or default
    family = [name for name, (config_class, _) in PRESETS.items() if config_class is PRESETS[default][0]]
    if args.preset not in family:
        raise ValueError(f"--preset {args.preset!r} is unknown to {args.name}. Use one of {', '.join(family)}.")
    if args.sweep and args.name != "train":
        raise ValueError("--sweep draws training. Write `python -m training.benchmarks train --sweep`.")
    return args


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        args = parse(argv)
        preset = preset_config(args.preset)
        groups = sweeps(args.device) if args.sweep else {"": comparisons(args.name, args.device)}
        rows = [(group, row) for group, members in groups.items() for row in members if (args.only or "") in row.title]
        if not rows:
            raise ValueError(f"no row's title contains {args.only!r}.")
    # The folder's name alone: what lies above it is of this machine.
    texts = Path(args.data).resolve().name if args.data else "the embedded corpus"
    result = {"name": args.name, "preset": args.preset, "texts": texts, "machine": machine(args.device)}
    config_class, model_class, tokenizer = FAMILIES[preset.model_type]
    text_config = preset.get_text_config()
    result["config"] = {
        "n_layer": text_config.num_hidden_layers,
        "n_embd": text_config.hidden_size,
        "vocab_size": text_config.vocab_size,
        "n_positions": text_config.max_position_embeddings,
        "tokenizer": tokenizer,
    }
    with tempfile.TemporaryDirectory() as folder:
        if model_class is not None:
            known = config_class()
            fields = {key: value for key, value in preset.to_diff_dict().items() if hasattr(known, key)}
            torch.manual_seed(0)
            model_class(config_class(**fields)).save_pretrained(Path(folder) / "model")
        result["rows"] = []
        for group, comparison in rows:
            row = {"group": group, **run(comparison, args.name, args, Path(folder), result["config"])}
            result["rows"].append(row)
            print(table({**result, "rows": [row]}), flush=True)
    name = f"{args.name}{'-sweep' if args.sweep else ''}-{args.preset}-{args.device}"
    write(result, Path(args.output), name)
    if args.sweep:
        plot_sweeps(result, Path(args.output) / f"{name}.png")
    print(f"written: {name}.json, {name}.md" + (f", {name}.png" if args.sweep else ""))
    if any(contender["disagreement"] for row in result["rows"] for contender in row["contenders"]):
        sys.exit("error: some contenders' outputs disagree or did not run; see the table.")


if __name__ == "__main__":
    main()
