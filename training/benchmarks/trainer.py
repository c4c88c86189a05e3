"""What the guards, the pre-emption and the manifest cost: `CustomTrainer` beside stock's, on the same model and rows.

The two take turns in one process, a short run each, after a round that warms up; medians count. A step is timed from
its beginning to the next one's, a save by what training waits for. Each run saves in the middle and at its end, where
no next step shows whether the weights are sound, so that the guard looks for itself, which is timed apart. Sealing
goes on while training does: the step beside it is timed apart as well, because hashing takes a core from it where all
are busy. Nothing is printed unless both end with the same weights.

Examples:
  python -m training.benchmarks.trainer
  python -m training.benchmarks.trainer --preset gpt2-mini --rounds 5
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_custom import CustomGPT2ForCausalLM
from hf_custom.presets import preset_config
from training import checkpointing
from training.benchmarks.measure import machine
from training.guards import DivergenceGuard
from training.trainer import CustomTrainer

RESULTS = Path(__file__).parent / "results"
CONTENDERS = {"stock": Trainer, "ours": CustomTrainer}


class Clock(TrainerCallback):
    """Seconds from the beginning of each step to that of the next, from the second on: the first sets things up."""

    def __init__(self):
        self.begun, self.seconds = None, []

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if state.global_step > 1:
            self.seconds.append(now - self.begun)
        self.begun = now


def timed(owner, name: str, seconds: list[float]) -> None:
    """Add the duration of every call of a method to a list."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        start = time.perf_counter()
        result = method(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, call)


def run(contender: str, preset: str, steps: int, batch_size: int, length: int, folder: Path) -> dict:
    """One short run: seconds of its steps, of its saves, and of the sealing; and its last weights' sum."""
    set_seed(0)
    model = CustomGPT2ForCausalLM(preset_config(preset))
    ids = torch.randint(0, model.config.vocab_size, (steps * batch_size, length))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=steps // 2,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-5,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )
    clock, saves, seals, checks = Clock(), [], [], []
    trainer = CONTENDERS[contender](model, args, train_dataset=rows, callbacks=[clock])
    timed(trainer, "_save_checkpoint", saves)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, DivergenceGuard):
            timed(callback, "check_update", checks)
    seal = checkpointing.seal
    if contender == "ours":
        import training.trainer as module

        module.seal = lambda *args: _timed_call(seal, seals, *args)
    try:
        trainer.train()
    finally:
        if contender == "ours":
            module.seal = seal
    total = sum(parameter.detach().double().sum().item() for parameter in model.parameters())
    middle = steps // 2
    # The check at the end of training finds that of the last save done.
    look = checks[:1]
    return {
        # Without the step that ends with a save and the one beside which it is sealed.
        "steps": clock.seconds[: middle - 2] + clock.seconds[middle:],
        "steps_beside_sealing": clock.seconds[middle - 1 : middle],
        "saves": [*saves[:-1], saves[-1] - sum(look)],
        "looks": look,
        "seals": seals,
        "weights": total,
    }


def _timed_call(function, seconds, *args):
    start = time.perf_counter()
    function(*args)
    seconds.append(time.perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.trainer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="gpt2", help="named size of the model (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each, besides the first (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run, an even number (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (%(default)s)")
    parser.add_argument("--output", default=str(RESULTS), help="folder for the JSON")
    args = parser.parse_args(argv)
    if args.steps < 6 or args.steps % 2:
        parser.error(f"--steps is {args.steps} but must be even and at least 6")
    kinds = ("steps", "steps_beside_sealing", "saves", "looks", "seals")
    found = {name: {kind: [] for kind in kinds} for name in CONTENDERS}
    for number in range(args.rounds + 1):
        ends = {}
        for name in CONTENDERS if number % 2 else reversed(CONTENDERS):
            with tempfile.TemporaryDirectory() as folder:
                result = run(name, args.preset, args.steps, args.batch_size, args.length, Path(folder))
            ends[name] = result.pop("weights")
            if number:
                for key, values in result.items():
                    found[name][key] += values
        if ends["stock"] != ends["ours"]:
            raise SystemExit(f"the two do not train alike: {ends}")
        print(f"round {number} of {args.rounds}", flush=True)
    medians = {
        name: {kind: statistics.median(values) for kind, values in seconds.items() if values}
        for name, seconds in found.items()
    }
    step, save = (medians["ours"][kind] / medians["stock"][kind] - 1 for kind in ("steps", "saves"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = {
        "machine": machine(device),
        "preset": args.preset,
        "batch_size": args.batch_size,
        "length": args.length,
        "medians": medians,
        "seconds": found,
        "overhead": {"step": step, "save": save},
    }
    path = Path(args.output) / f"trainer-{args.preset}-{device}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, row in medians.items():
        print(
            f"{name:6} step {row['steps']:.3f} s, after a save {row['steps_beside_sealing']:.3f} s; save "
            f"{row['saves']:.3f} s, the last one's look at the weights {row.get('looks', 0):.3f} s; sealing meanwhile "
            f"{row.get('seals', 0):.3f} s"
        )
    print(f"overhead: step {step:+.2%}, save {save:+.2%}")


if __name__ == "__main__":
    main()
