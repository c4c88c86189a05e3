"""What a second process brings: the training step of one process beside that of two, and how much of it is exchange.

All contenders train the same model on the same rows through `CustomTrainer`, each run in processes of its own, with one
thread or one GPU a process. They take turns, after a round that warms up; the median over the first process's steps
counts, each timed from its beginning to the next one's.

weak     two processes, each with as many rows a step as the one: efficiency is `seconds of one / seconds of two`.
strong   two processes, each with half of them: efficiency is `seconds of one / (2 * seconds of two)`.

The share of a step that the exchange of gradients takes is `1 - silent / exchanging`: the same two processes on the
same rows once more, with a communication hook in DistributedDataParallel that gives every bucket back as it is. What
overlaps with the backward pass costs nothing and is not in the share; the wait for the slower process is, and so is
what the exchange takes from the computation beside it. Some sums of a few numbers a step (of tokens, of the guards) are
made in both.

Nothing is printed unless after the last step of a run the weights of two processes are those of one with the joint
rows: within a ten-thousandth of the way that training took them.

Examples:
  python -m training.benchmarks.scaling
  python -m training.benchmarks.scaling --preset gpt2-mini --rounds 5

  # on two GPUs
  python -m training.benchmarks.scaling --device cuda --batch_size 16 --length 1024
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments, set_seed

from hf_custom import CustomGPT2ForCausalLM
from hf_custom.presets import preset_config
from training.benchmarks.measure import machine
from training.benchmarks.trainer import Clock
from training.trainer import CustomTrainer

RESULTS, ROOT = Path(__file__).parent / "results", Path(__file__).parents[2]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Adam divides a gradient by its own size, and so makes full steps of what is rounding alone; not above this size.
EPSILON = 1e-3
TOLERANCE = 1e-4
LIMIT = 1800


@dataclass(frozen=True)
class Contender:
    """How a step's rows are divided.

    Attributes:
        rows: of a step in all, in multiples of `--batch_size`.
        is_silent: whether gradients stay where they are.
    """

    processes: int
    rows: int
    is_silent: bool = False


CONTENDERS = {
    "one": Contender(1, 1),
    "weak": Contender(2, 2),
    "weak, silent": Contender(2, 2, is_silent=True),
    "strong": Contender(2, 1),
    "strong, silent": Contender(2, 1, is_silent=True),
}
# Trains on two processes' rows alone, to compare weights with.
JOINT = Contender(1, 2)


class Silence(TrainerCallback):
    """Keeps the processes of a trainer from exchanging gradients."""

    def __init__(self, trainer: CustomTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.model_wrapped
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(f"gradients of a {type(model).__name__} are not exchanged by DistributedDataParallel.")
        model.register_comm_hook(None, _keep)


def _keep(_, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook that gives a bucket of gradients back as it is."""
    gradients = bucket.buffer()
    done = torch.futures.Future(devices=[gradients.device] if gradients.is_cuda else [])
    done.set_result(gradients)
    return done


def work(spec: dict) -> None:
    """One process's part of a run; the first writes its seconds and its weights, before and after, to `folder`."""
    contender, folder, device = Contender(**spec["contender"]), Path(spec["folder"]), spec["device"]
    if device == "cpu":
        torch.set_num_threads(1)
    set_seed(0)
    model = CustomGPT2ForCausalLM(preset_config(spec["preset"], **NO_DROPOUT))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    # As many rows for all, so that all draw them in the same order.
    ids = torch.randint(0, model.config.vocab_size, (spec["steps"] * JOINT.rows * spec["batch_size"], spec["length"]))
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=spec["steps"],
        per_device_train_batch_size=contender.rows * spec["batch_size"] // contender.processes,
        learning_rate=1e-3,
        adam_epsilon=EPSILON,
        use_cpu=device == "cpu",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
    )
    clock = Clock()
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    trainer = CustomTrainer(model, args, train_dataset=rows, callbacks=[clock])
    if trainer.args.world_size != contender.processes:
        raise RuntimeError(f"the run has {trainer.args.world_size} processes, not {contender.processes}")
    if contender.is_silent:
        trainer.add_callback(Silence(trainer))
    trainer.train()
    if trainer.is_world_process_zero():
        if spec["has_proof"]:
            save_file(before, folder / "before.safetensors")
            after = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters()}
            save_file(after, folder / "after.safetensors")
        sent = sum(value.numel() * value.itemsize for value in before.values())
        (folder / "result.json").write_text(json.dumps({"steps": clock.seconds, "gradient_bytes": sent}))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def environment_of(rank: int, count: int, device: str) -> dict[str, str]:
    """That of one process of several; one alone has no group, and sees one GPU, for Trainer would take all it sees."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if device == "cpu":
        kept["OMP_NUM_THREADS"] = "1"
    elif count == 1:
        kept["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return kept | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})


def run(spec: dict) -> dict:
    """The result of a run, whose processes are started here as a launcher would.

    Raises:
        SystemExit: when a process fails, with what it said last.
    """
    folder, count = Path(spec["folder"]), spec["contender"]["processes"]
    folder.mkdir(parents=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "WORLD_SIZE": str(count)}
    processes = []
    for rank in range(count):
        environment = environment_of(rank, count, spec["device"]) | (place if count > 1 else {})
        command = [sys.executable, "-m", "training.benchmarks.scaling", "--worker", json.dumps(spec)]
        with (folder / f"{rank}.txt").open("wb") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    _wait(processes, folder)
    return json.loads((folder / "result.json").read_text())


def _wait(processes: list[subprocess.Popen], folder: Path) -> None:
    """Until all have ended well; the first that does not ends the others."""
    deadline = time.monotonic() + LIMIT
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        words = (folder / f"{failed[0]}.txt").read_text(errors="replace").strip().splitlines()[-5:]
        raise SystemExit(f"process {failed[0]} of {len(processes)} failed:\n" + "\n".join(words))


def distance(folder: Path, other: Path) -> float:
    """How far apart two runs end, as a share of the way that the second one went."""
    ends, expected, start = (
        load_file(path)
        for path in (folder / "after.safetensors", other / "after.safetensors", other / "before.safetensors")
    )
    apart = sum((ends[name].double() - value.double()).square().sum().item() for name, value in expected.items())
    way = sum((value.double() - start[name].double()).square().sum().item() for name, value in expected.items())
    return (apart / way) ** 0.5


def check_alike(folder: Path, names: dict[str, str]) -> dict[str, float]:
    """How far each run of `names` ends from the one that it is to end as.

    Raises:
        SystemExit: when one ends elsewhere.
    """
    found = {name: distance(folder / name, folder / other) for name, other in names.items()}
    if not all(value <= TOLERANCE for value in found.values()):
        raise SystemExit(f"two processes do not train as one: {found} of the way, where {TOLERANCE} may be")
    return found


def summarize(seconds: dict[str, list[float]], batch_size: int, length: int) -> dict:
    """Median step, tokens a second, efficiency and share of the exchange, by contender.

    Args:
        seconds: of the steps of each contender.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {}
    for name in ("one", "weak", "strong"):
        contender, step = CONTENDERS[name], medians[name]
        found[name] = {"step": step, "tokens_per_second": contender.rows * batch_size * length / step}
        if contender.processes > 1:
            rate = found[name]["tokens_per_second"] / found["one"]["tokens_per_second"]
            found[name]["efficiency"] = rate / contender.processes
            found[name]["exchange"] = 1 - medians[f"{name}, silent"] / step
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="gpt2", help="named size of a GPT-2 (%(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what the processes run on (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=4, help="runs of each, besides the first (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step of one process (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (%(default)s)")
    parser.add_argument("--output", default=str(RESULTS), help="folder for the JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.batch_size < 2 or args.batch_size % 2:
        parser.error(f"--batch_size is {args.batch_size} but two processes share it: give an even number.")
    if args.steps < 3 or args.rounds < 1:
        parser.error(
            "a median needs --steps of 3 or more, of which the first is not counted, and --rounds of 1 or more."
        )
    if args.device == "cuda" and torch.cuda.device_count() < 2 and not args.worker:
        parser.error(
            f"--device cuda needs two GPUs, but there are {torch.cuda.device_count()}. Measure with --device cpu."
        )
    return args


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Seconds of the steps by contender, how far two processes ended from one, and the bytes of the gradients."""
    shape = {name: getattr(args, name) for name in ("preset", "device", "steps", "batch_size", "length")}

    def go(name: str, contender: Contender, number: int) -> dict:
        place = folder / (name if number == 0 else f"{number} {name}")
        return run({**shape, "contender": vars(contender), "folder": str(place), "has_proof": number == 0})

    joint = go("joint", JOINT, 0)
    seconds, distances = {name: [] for name in CONTENDERS}, {}
    for number in range(args.rounds + 1):
        for name in CONTENDERS if number % 2 else reversed(CONTENDERS):
            result = go(name, CONTENDERS[name], number)
            if number:
                seconds[name] += result["steps"]
        if number == 0:
            distances = check_alike(folder, {"weak": "joint", "strong": "one"})
        print(f"round {number} of {args.rounds}", flush=True)
    return seconds, distances, joint["gradient_bytes"]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.worker:
        work(json.loads(args.worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds, distances, sent = measure(args, Path(folder))
    found = summarize(seconds, args.batch_size, args.length)
    content = {
        "machine": machine(args.device),
        "preset": args.preset,
        "batch_size": args.batch_size,
        "length": args.length,
        "threads_of_a_process": 1 if args.device == "cpu" else None,
        "gradient_bytes": sent,
        "distances": distances,
        "scaling": found,
        "seconds": seconds,
    }
    path = Path(args.output) / f"scaling-{args.preset}-{args.device}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, row in found.items():
        line = f"{name:6} step {row['step']:.3f} s, {row['tokens_per_second']:,.0f} tokens/s"
        if "efficiency" in row:
            line += f", efficiency {row['efficiency']:.1%}, exchange of gradients {row['exchange']:.1%} of the step"
        print(line)


if __name__ == "__main__":
    main()
