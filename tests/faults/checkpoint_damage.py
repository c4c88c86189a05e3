"""Checkpoints that are broken, missing or made to do harm, found by the run that resumes (faults 6-15, 23, 40)."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from .lab import STEPS, WEIGHTS, Lab, Lost, expect, seal_again, weights_hash, write_rows

NEWEST = "checkpoint-4"
# Done to the newest checkpoint.
Damage = Callable[[Path], None]


def truncate(name: str) -> Damage:
    return lambda checkpoint: os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)


def remove(name: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).unlink()


def flip_bit(name: str) -> Damage:
    """In the middle of the file, where the numbers are."""

    def flip(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return flip


def fill_with_nan(checkpoint: Path) -> None:
    """As a run would have saved it: the manifest agrees."""
    content = (checkpoint / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    count = (len(content) - 8 - length) // 4
    (checkpoint / WEIGHTS).write_bytes(content[: 8 + length] + struct.pack("<f", float("nan")) * count)
    seal_again(checkpoint)


def falls_back(*damages: tuple[Damage, str]) -> Callable[[Lab], str]:
    """A fault that damages the newest checkpoint, once for each of `damages`.

    Args:
        damages: what to do, and what the output must name.
    """

    def inject(lab: Lab) -> str:
        words = []
        for damage, name in damages:
            folder = lab.interrupted()
            damage(folder / NEWEST)
            words.append(lab.resumed(folder, 4, says=(NEWEST, name)))
        return f"fell back, said; {'; '.join(words)}"

    return inject


def empty_checkpoint(lab: Lab) -> str:
    folder = lab.interrupted()
    (folder / "checkpoint-6").mkdir()
    return "skipped, said; " + lab.resumed(folder, 4, says=("checkpoint-6", NEWEST), most_again=0)


def no_checkpoint(lab: Lab) -> str:
    return "started fresh, said; " + lab.resumed(lab.folder(), 0, says=("no checkpoint",))


def changed_data(lab: Lab) -> str:
    folder = lab.interrupted()
    changed = write_rows(folder.parent / "text.jsonl", [*lab.rows[:-1], {"text": lab.rows[0]["text"]}])
    words = lab.refused(lab.run(folder, "--resume", "--files", changed), "data", "--force_resume")
    forced = lab.run(folder, "--resume", "--files", changed, "--force_resume")
    expect(forced.code == 0 and forced.steps == 2, f"--force_resume fails: {forced.last_line}")
    return words


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def trap_in(name: str, as_archive: bool = True):
    """A pickle that runs code in place of a file of the checkpoint, as torch's archive or bare."""

    def set_trap(checkpoint: Path, marker: Path) -> None:
        if as_archive:
            torch.save(Trap(marker), checkpoint / name)
        else:
            (checkpoint / name).write_bytes(pickle.dumps(Trap(marker)))

    return set_trap


def _other_weights(checkpoint: Path) -> Path:
    """Weights outside of the folder, which would be noticed in the result."""
    outside = checkpoint.parent / "outside.safetensors"
    content = (checkpoint / WEIGHTS).read_bytes()
    outside.write_bytes(content[:-400] + bytes(400))
    return outside


def shard_outside(checkpoint: Path, marker: Path) -> None:
    outside = _other_weights(checkpoint)
    content = (checkpoint / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    names = json.loads(content[8 : 8 + length]).keys() - {"__metadata__"}
    index = {"metadata": {}, "weight_map": {name: f"../{outside.name}" for name in sorted(names)}}
    (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (checkpoint / WEIGHTS).unlink()


def link_outside(checkpoint: Path, marker: Path) -> None:
    outside = _other_weights(checkpoint)
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / WEIGHTS).symlink_to(Path("..") / outside.name)


def bomb(checkpoint: Path, marker: Path) -> None:
    """An optimizer whose numbers take a thousand times the file's size in memory."""
    numbers = io.BytesIO()
    torch.save({"state": {}, "numbers": torch.zeros(2**24)}, numbers)
    with zipfile.ZipFile(numbers) as plain, zipfile.ZipFile(checkpoint / "optimizer.pt", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED, 9)


def claim(checkpoint: Path, marker: Path) -> None:
    """An optimizer whose table of contents claims a tebibyte."""
    file = checkpoint / "optimizer.pt"
    copy = io.BytesIO(file.read_bytes())
    with zipfile.ZipFile(copy) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        new.filelist[-1].file_size = new.filelist[-1].compress_size = 2**40


# By name: what is done to the newest checkpoint, whose manifest then agrees.
HOSTILE = {
    "optimizer archive": trap_in("optimizer.pt"),
    "optimizer pickle": trap_in("optimizer.pt", as_archive=False),
    "scheduler": trap_in("scheduler.pt"),
    "random state": trap_in("rng_state.pth"),
    "arguments": trap_in("training_args.bin"),
    "../ shard": shard_outside,
    "link": link_outside,
    "bomb": bomb,
    "claim": claim,
}


def _attack(lab: Lab, name: str, *, named: bool) -> None:
    """Resume from a hostile checkpoint, chosen or `named`.

    Raises:
        Lost: when it does anything but end as the uninterrupted run or be refused.
    """
    folder = lab.interrupted()
    marker = folder.parent / "executed"
    HOSTILE[name](folder / NEWEST, marker)
    seal_again(folder / NEWEST)
    how = ["--resume_from_checkpoint", folder / NEWEST] if named else ["--resume"]
    run = lab.run(folder, *how)
    expect(not marker.exists(), f"{name}: code in the checkpoint was executed")
    if run.code == 0:
        again = 4 + run.steps - STEPS
        expect(weights_hash(folder) == lab.straight(), f"{name}: resumed to other weights, in silence")
        expect(again == 0 or NEWEST in run.all_text, f"{name}: fell back without saying so")
    else:
        expect(run.steps == 0, f"{name}: ended after {run.steps} steps: {run.last_line}")
        expect(NEWEST in run.last_line or "weights_only" in run.all_text, f"{name}: unclear end: {run.last_line}")


def hostile_checkpoint(lab: Lab) -> str:
    failures = []
    for name in HOSTILE:
        for named in (False, True) if name in ("optimizer archive", "link") else (False,):
            try:
                _attack(lab, name, named=named)
            except Lost as loss:
                failures.append(str(loss))
    expect(not failures, "; ".join(failures))
    return f"refused, nothing executed: {', '.join(HOSTILE)}"
