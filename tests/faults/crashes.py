"""Runs that are ended from outside: killed, out of room, asked to stop, or with a process lost (faults 1-5, 16-22)."""

import re
import resource
import shutil
import signal
import time
from pathlib import Path

import torch

from .lab import PREEMPTED, SAVE_STEPS, STEPS, Lab, checkpoints, expect
from .processes import Run, Sabotage, at_update, die, hang, signal_self

# Files of the smoke model: weights of about 190 KB, an optimizer of twice that.
FULL_DISKS = {"weights": 60_000, "optimizer": 300_000}
DDP_TIMEOUT = 10
SKEW = 0.5
STEP_SECONDS = 0.2


def slowly(sabotage: Sabotage) -> Sabotage:
    """Steps that last, so that there is a time between two of them."""

    def slowed(rank: int) -> None:
        for number in range(1, STEPS + 1):
            at_update(number, lambda _: time.sleep(STEP_SECONDS))
        sabotage(rank)

    return slowed


def killed_in_step(lab: Lab) -> str:
    """Right after a save and right before the next; that one with steps that last longer than a checkpoint takes."""
    words = []
    for step, pace in ((5, lambda sabotage: sabotage), (6, slowly)):
        folder = lab.folder()
        first = lab.run(folder, sabotage=pace(lambda rank, step=step: at_update(step, die)))
        expect(first.code == -signal.SIGKILL, f"was not killed: {first.last_line}")
        words.append(f"in step {step}: {lab.resumed(folder, first.steps)}")
    return "; ".join(words)


def around_optimizer_file(number: int, before=None, after=None) -> None:
    """Do something at the `number`-th save of an optimizer in this process."""
    plain, files = torch.save, []

    def save(obj, f, *args, **kwargs):
        name = Path(f).name if isinstance(f, str | Path) else ""
        files.append(name)
        is_it = name == "optimizer.pt" and files.count(name) == number
        if is_it and before is not None:
            before(f)
        result = plain(obj, f, *args, **kwargs)
        if is_it and after is not None:
            after(f)
        return result

    torch.save = save


def _killed_while_saving(lab: Lab, **moment) -> str:
    folder = lab.folder()
    first = lab.run(folder, sabotage=lambda rank: around_optimizer_file(2, **moment))
    expect(first.code == -signal.SIGKILL, f"was not killed: {first.last_line}")
    return lab.resumed(folder, first.steps)


def killed_after_weights(lab: Lab) -> str:
    def die_beside_weights(file) -> None:
        if (Path(file).parent / "model.safetensors").is_file():
            die()

    return _killed_while_saving(lab, before=die_beside_weights)


def killed_after_optimizer(lab: Lab) -> str:
    return _killed_while_saving(lab, after=die)


def die_in_removal() -> None:
    """Remove one file of the first checkpoint that is to be removed, and end."""
    plain = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        weights = list(Path(path).rglob("model.safetensors")) if Path(path).is_dir() else []
        if weights:
            weights[0].unlink()
            die()
        return plain(path, *args, **kwargs)

    shutil.rmtree = rmtree


def killed_in_rotation(lab: Lab) -> str:
    folder = lab.folder()
    first = lab.run(folder, "--save_total_limit", "1", sabotage=lambda rank: die_in_removal())
    expect(first.code == -signal.SIGKILL, f"was not killed: {first.last_line}")
    return lab.resumed(folder, first.steps, "--save_total_limit", "1")


def full_disk(lab: Lab) -> str:
    words = []
    for kind, size in FULL_DISKS.items():
        folder = lab.folder()

        def fill(_, size=size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        first = lab.run(folder, sabotage=lambda rank, fill=fill: at_update(4, fill))
        expect(first.code not in (0, None), f"{kind}: went on without room")
        kept = [path.name for path in checkpoints(folder)]
        expect(kept == ["checkpoint-2"], f"{kind}: left {kept}")
        said = re.search("not saved|No space left|disk", first.last_line)
        expect(bool(said), f"{kind}: ended without saying that nothing was saved: {first.last_line}")
        words.append(f"{kind}: {lab.resumed(folder, first.steps)}")
    return "said, the older one kept; " + "; ".join(words)


def _asked_to_stop(lab: Lab, number: signal.Signals, *flags: str) -> str:
    """Between two saves, so that what is saved was saved on request."""
    folder = lab.folder()
    first = lab.run(folder, *flags, sabotage=lambda rank: at_update(3, signal_self(number)))
    return f"{number.name}: {_saved_on_request(lab, folder, first, *flags)}"


def _saved_on_request(lab: Lab, folder: Path, first: Run, *flags: str, count: int = 1) -> str:
    expect(
        first.codes == [PREEMPTED] * count, f"exit status {first.codes} where {PREEMPTED} says it: {first.last_line}"
    )
    found = checkpoints(folder)
    newest = found[-1].name if found else "nothing"
    expect(newest == f"checkpoint-{first.steps}", f"{newest} was saved after {first.steps} steps")
    return lab.resumed(folder, first.steps, *flags, most_again=0, count=count)


def sigterm(lab: Lab) -> str:
    return "; ".join(_asked_to_stop(lab, number) for number in (signal.SIGTERM, signal.SIGINT))


def sigterm_just_in_time(lab: Lab) -> str:
    return _asked_to_stop(lab, signal.SIGTERM, "--enable_jit_checkpoint")


def sigusr1(lab: Lab) -> str:
    return _asked_to_stop(lab, signal.SIGUSR1)


def skewed_signals(lab: Lab) -> str:
    words = []
    for first_rank in (0, 1):
        folder = lab.folder()

        def sabotage(rank: int, first_rank=first_rank) -> None:
            at_update(3, signal_self(signal.SIGTERM, after=0.0 if rank == first_rank else SKEW))

        first = lab.run(folder, count=2, sabotage=slowly(sabotage))
        words.append(f"process {first_rank} first: {_saved_on_request(lab, folder, first, count=2)}")
    return "; ".join(words)


def _all_end(run: Run, lost: int, limit: float) -> None:
    """Whoever is left ends by itself, in time, and says who was lost."""
    left = next(rank for rank in range(len(run.codes)) if rank != lost)
    expect(run.codes[lost] != 0, f"process {lost} was not lost")
    expect(run.codes[left] is not None, f"process {left} still waited after {limit:.0f} s")
    expect(run.codes[left] != 0, f"process {left} ended as if nothing had been")
    named = re.search(rf"(rank|process)\W*{lost}\b", run.text[left], re.IGNORECASE)
    expect(bool(named), f"process {left} ended, but does not name process {lost}: {run.last_line_of(left)}")


def _one_of_two_lost(lab: Lab, how, limit: float) -> str:
    """Either of two processes; the first is the one that the other finds the group by."""
    flags, words = ("--ddp_timeout", str(DDP_TIMEOUT)), []
    for lost in (1, 0):
        folder = lab.folder()

        def sabotage(rank: int, lost=lost) -> None:
            if rank == lost:
                at_update(5, how)

        first = lab.run(folder, *flags, count=2, sabotage=sabotage, limit=limit, may_hang=True)
        _all_end(first, lost, limit)
        resumed = lab.resumed(folder, 4, *flags, count=2)
        words.append(f"process {lost}: ended in {first.seconds:.0f} s, named; {resumed}")
    return "; ".join(words)


def rank_dies(lab: Lab) -> str:
    return _one_of_two_lost(lab, die, 60.0)


def rank_hangs(lab: Lab) -> str:
    """The one that hangs may end by itself; if it does not, the harness ends it, as a launcher would."""
    return _one_of_two_lost(lab, hang, DDP_TIMEOUT + 20.0)


def other_number_of_processes(lab: Lab) -> str:
    folder = lab.interrupted()
    run = lab.run(folder, "--resume", count=2)
    words = lab.refused(run, "process", "--force_resume")
    forced = lab.run(folder, "--resume", "--force_resume", count=2)
    expect(forced.codes == [0, 0] and forced.steps == SAVE_STEPS, f"--force_resume fails: {forced.last_line}")
    return words
