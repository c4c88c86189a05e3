"""The main job from nothing to a published model, in minutes on two processor cores and without a network.

Trains a byte-level BPE tokenizer and a GPT-2 of a few million parameters on Python's language reference, measures it
on held-out text beside a bigram model and the `xz` compressor, saves it with its code, card and loss curve, reloads it
in a process that cannot import this package, and lets it write.

Examples:
  python -m training.quickstart
  python -m training.quickstart --output_dir runs/rope --config_overrides position_embedding_type=rope
  python -m training.quickstart training/recipes/clm_smoke.yaml

The exit status is 1 when the model does not beat both baselines.
"""

import json
import sys
import time
from pathlib import Path

import torch

from hf_custom.cards import CardRecord
from hf_custom.hub import check_runs_alone, save_model_folder
from training.args import DataArguments, ModelArguments, RunArguments, parse_arguments, read_recipe, user_errors
from training.data import token_stream
from training.metrics import BigramModel, TextScore, xz_bits_per_byte
from training.plots import plot_loss_curve
from training.run_clm import DEFAULTS, Run, prepare
from training.runs import train

RECIPE = Path(__file__).parent / "recipes" / "clm_mini.yaml"
NAME = "gpt2-mini"
PROMPT = 'The "for" statement is used to'


def measure(run: Run) -> tuple[dict[str, dict[str, float]], TextScore]:
    """Rows of held-out numbers, the model's first, and the bigram model's score."""
    train_ids = token_stream(run.texts["train"], run.tokenizer, run.data.text_column)
    model = run.score()
    bigram = BigramModel(train_ids, run.model.config.vocab_size).score(run.held_out_ids, model.bytes)
    rows = {
        NAME: {"perplexity": model.perplexity, "bits per byte": model.bits_per_byte},
        "bigram model, same tokenizer": {"perplexity": bigram.perplexity, "bits per byte": bigram.bits_per_byte},
        "xz of the held-out text": {"bits per byte": xz_bits_per_byte(run.held_out_text)},
    }
    return rows, bigram


@torch.no_grad()
def write_sample(run: Run, prompt: str = PROMPT, max_new_tokens: int = 80) -> str:
    """Text that the model writes, by sampling from the fifty likeliest tokens."""
    torch.manual_seed(run.trainer.args.seed)
    inputs = run.tokenizer(prompt, return_tensors="pt").to(run.model.device)
    ids = run.model.eval().generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=True, top_k=50, temperature=0.8, use_cache=True
    )
    return run.tokenizer.decode(ids[0], skip_special_tokens=True)


def format_table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'held-out text':32}{'perplexity':>12}{'bits per byte':>16}"]
    for system, row in rows.items():
        perplexity = f"{row['perplexity']:.1f}" if "perplexity" in row else ""
        lines.append(f"{system:32}{perplexity:>12}{row['bits per byte']:>16.3f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    with user_errors():
        defaults = {**DEFAULTS, **read_recipe(str(RECIPE)), "output_dir": "runs/quickstart"}
        arguments = parse_arguments((ModelArguments, DataArguments, RunArguments), argv, __doc__, **defaults)
        if arguments[1].streaming:
            raise ValueError("the quickstart counts its whole text. Stream with training.run_clm instead.")
        run = prepare(*arguments)
    blocks = len(run.trainer.train_dataset)
    print(f"{run.model.num_parameters():,} parameters, {blocks} blocks of {run.data.block_size} tokens")
    train(run.trainer)

    rows, bigram = measure(run)
    output_dir = Path(run.trainer.args.output_dir)
    curve, metrics_file = output_dir / "loss_curve.png", output_dir / "metrics.json"
    plot_loss_curve(run.trainer.state.log_history, curve, NAME, {"bigram model": bigram.nats / bigram.tokens})
    metrics_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sample = write_sample(run)
    record = CardRecord(
        NAME,
        run.data.description,
        metrics=rows,
        training=run.trainer.shown_arguments(block_size=run.data.block_size),
        curve=curve.name,
        sample=sample,
    )
    folder = save_model_folder(output_dir / "model", run.model, run.tokenizer, record, (curve, metrics_file))
    check_runs_alone(folder, run.model, run.held_out_ids[None, : run.data.block_size])

    print(f"\n{sample}\n\n{format_table(rows)}\n")
    print(f"model, code and card: {folder}  (reloaded where hf_custom cannot be imported: equal logits)")
    print(f"loss curve: {curve}   {time.perf_counter() - start:.0f} s in all")
    own, *baselines = (row["bits per byte"] for row in rows.values())
    if own >= min(baselines):
        print(f"the model did NOT beat both baselines: {own:.3f} against {min(baselines):.3f} bits per byte")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
