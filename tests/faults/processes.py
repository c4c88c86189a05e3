"""Runs of a script in processes that are forked from this one, so that each costs a run and not an import.

A forked process has its own memory, signals and exit status: it can be killed, and whatever is patched in it ends with
it. This process itself must start no thread and compute nothing with torch.
"""

import functools
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# What a fault does inside a process before the script's `main`; called with the number of the process.
Sabotage = Callable[[int], None]
_FORK = multiprocessing.get_context("fork")
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        codes: exit status of each process, minus the signal's number where one killed it; `None` where the process had
            to be ended from here.
        text: what each process printed, errors included.
        steps: updates that the first process made.
        seconds: until the last process had ended.
    """

    codes: list[int | None]
    text: list[str]
    steps: int
    seconds: float

    @property
    def code(self) -> int | None:
        return self.codes[0]

    @property
    def is_hung(self) -> bool:
        return None in self.codes

    @property
    def all_text(self) -> str:
        return "\n".join(self.text)

    @property
    def last_line(self) -> str:
        """What the first process that failed, or the first, said last."""
        return self.last_line_of(next((rank for rank, code in enumerate(self.codes) if code), 0))

    def last_line_of(self, rank: int) -> str:
        """The last line that names an error, or the last."""
        lines = [line.strip() for line in self.text[rank].splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("error:")]
        return (errors or lines or ["no output"])[-1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def count_updates(log: Path) -> None:
    """Add a byte to a file after each update of this process. One without a gradient is none."""
    plain = torch.optim.AdamW.step

    @functools.wraps(plain)
    def step(self, *args, **kwargs):
        result = plain(self, *args, **kwargs)
        if any(weight.grad is not None for group in self.param_groups for weight in group["params"]):
            with log.open("ab") as stream:
                stream.write(b".")
        return result

    torch.optim.AdamW.step = step


def at_update(number: int, action: Callable[[torch.optim.Optimizer], None]) -> None:
    """Do something in the midst of a step of this process: gradients are there, weights are not changed yet.

    Args:
        number: of the step, from 1.
    """
    plain, calls = torch.optim.AdamW.step, itertools.count(1)

    @functools.wraps(plain)
    def step(self, *args, **kwargs):
        if next(calls) == number:
            action(self)
        return plain(self, *args, **kwargs)

    torch.optim.AdamW.step = step


def die(*_) -> None:
    """End this process as kill -9 does: nothing is flushed, nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang(*_) -> None:
    """Stay, whatever signal comes but the last one."""
    while True:
        time.sleep(3600)


def signal_self(number: signal.Signals, after: float = 0.0) -> Callable[..., None]:
    """Send this process a signal now, or some seconds later while it goes on."""

    def send(*_) -> None:
        if after:
            timer = threading.Timer(after, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        else:
            os.kill(os.getpid(), number)

    return send


def _enter(
    rank: int, count: int, port: int, log: Path, updates: Path, sabotage: Sabotage | None, main: Callable, argv
) -> None:
    """The life of a forked process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # Those of the system, and those of Python, which need not be the same.
    for stream in {1, 2, sys.stdout.fileno(), sys.stderr.fileno()}:
        os.dup2(descriptor, stream)
    if count > 1:
        # What torchrun sets.
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if rank == 0:
        count_updates(updates)
    if sabotage is not None:
        sabotage(rank)
    main(list(argv))


def run_script(
    main: Callable[[list[str]], None],
    argv: list[str],
    logs: Path,
    count: int = 1,
    sabotage: Sabotage | None = None,
    limit: float = 60.0,
) -> Run:
    """Run a script's `main` in `count` processes until all have ended.

    Args:
        logs: an empty folder for what they print.
        limit: seconds after which the processes that are left are ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port, updates, start = free_port(), logs / "updates", time.perf_counter()
    processes = [
        _FORK.Process(target=_enter, args=(rank, count, port, logs / f"{rank}.txt", updates, sabotage, main, argv))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and time.perf_counter() - start < limit:
        time.sleep(POLL_SECONDS)
    codes = [process.exitcode for process in processes]
    seconds = time.perf_counter() - start
    for process in processes:
        process.kill()
        process.join()
    return Run(
        codes,
        [(logs / f"{rank}.txt").read_text(encoding="utf-8", errors="replace") for rank in range(count)],
        updates.stat().st_size if updates.exists() else 0,
        seconds,
    )
