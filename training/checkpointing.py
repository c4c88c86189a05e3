"""Checkpoints that are whole or not there, and are known to be so.

A checkpoint is written to a folder aside, flushed to the disk and given a manifest with the size and the SHA-256 of
every file; one rename puts it in place when the next step's loss has shown that its weights are sound. What is resumed
is the newest that agrees with its manifest; older ones are the fall-back, and the oldest goes only when a newer one
stands. The manifest also says what the run was: resuming it with other data, another number of processes or another
batch size would not be the same run, and is refused.

Each function is usable alone; `CustomTrainer` calls them.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_custom.checks import check_shard_names
from training.archives import check_archive
from training.fingerprints import data_fingerprint
from training.sharding import check_shards

MANIFEST = "manifest.json"
FORMAT = 1
# Beside the checkpoints: what is being written, and what is being removed.
SAVING, REMOVING = ".saving", ".removing"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_BLOCK = 2**22
# What torch writes as a zip archive of numbers and a pickle of their names.
_ARCHIVES = (".pt", ".pth", ".bin")


class CheckpointError(ValueError):
    """A checkpoint that must not be resumed, and why."""


class NotSavedError(OSError):
    """A checkpoint that could not be written; those before it are whole."""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders that are named as checkpoints, oldest step first."""
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: str | Path, step: int, run: dict[str, object]) -> None:
    """Flush a checkpoint's files and write its manifest, the last of them.

    Args:
        run: what must be the same when it is resumed, as `describe_run` gives it.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        _flush(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    content = {"format": FORMAT, "step": step, "run": run, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _flush(folder / MANIFEST)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _flush(path)


def put_in_place(draft: str | Path, final: str | Path) -> None:
    """Rename a sealed folder to its name, over an older one of that name, and flush."""
    draft, final = Path(draft), Path(final)
    if final.exists():
        remove(final)
    draft.rename(final)
    _flush(final.parent)


def remove(folder: str | Path) -> None:
    """Delete a checkpoint; one that is deleted half is none."""
    folder = Path(folder)
    aside = folder.parent / REMOVING
    aside.mkdir(exist_ok=True)
    shutil.rmtree(aside / folder.name, ignore_errors=True)
    folder.rename(aside / folder.name)
    shutil.rmtree(aside)


def clean(output_dir: str | Path) -> None:
    """Delete what an earlier process left half-written or half-deleted."""
    for name in (SAVING, REMOVING):
        shutil.rmtree(Path(output_dir) / name, ignore_errors=True)


def rotate(output_dir: str | Path, limit: int | None, protected: tuple[str | None, ...] = ()) -> None:
    """Delete the oldest sealed checkpoints beyond `limit`. The newest, and those `protected`, stay.

    Folders without a manifest are not counted: this program did not write them.
    """
    if not limit or limit < 1:
        return
    sealed = [path for path in checkpoints(output_dir) if (path / MANIFEST).is_file()]
    kept = {Path(path).name for path in protected if path} | {path.name for path in sealed[-1:]}
    others = [path for path in sealed if path.name not in kept]
    for path in others[: max(0, len(sealed) - max(limit, len(kept)))]:
        remove(path)


def read_manifest(folder: str | Path) -> dict:
    """A checkpoint's manifest, of the expected form.

    Raises:
        CheckpointError: when it is missing or is none.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise CheckpointError(f"has no {MANIFEST}, so it was not finished or not written by this program")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        return {"step": int(content["step"]), "run": dict(content["run"]), "files": files}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"has a broken {MANIFEST}") from None


def verify(folder: str | Path) -> dict:
    """Check a checkpoint against its manifest, and that nothing in it can harm who loads it.

    Every file is there, of its size and its SHA-256; none is a link or lies elsewhere; an archive of torch is stored
    plainly, so that it cannot grow; what FSDP saved in parts is data and no code; all weights are finite.

    Returns:
        The manifest.

    Raises:
        CheckpointError: with the file and what is wrong.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    if links:
        raise CheckpointError(f"holds a link, {links[0].name}")
    for name, (size, digest) in manifest["files"].items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"names {name!r}, outside its folder")
        if not path.is_file():
            raise CheckpointError(f"lacks {name}")
        if path.stat().st_size != size:
            raise CheckpointError(f"has {path.stat().st_size:,} bytes of {name} where {size:,} were written")
        if _sha256(path) != digest:
            raise CheckpointError(f"has another {name} than was written")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in paths:
        if path.relative_to(folder).as_posix() not in manifest["files"]:
            raise CheckpointError(f"holds {path.name}, which was not written with it")
    try:
        check_shard_names(folder)
        for path in paths:
            if path.suffix in _ARCHIVES:
                check_archive(path, path.name)
            elif path.suffix == ".safetensors":
                _check_finite(path)
        check_shards(folder)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return manifest


def _check_finite(file: Path) -> None:
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise CheckpointError(f"has numbers in {name} that are not finite")
    except SafetensorError as error:
        raise CheckpointError(f"has a broken {file.name}: {error}") from None


def newest_verified(output_dir: str | Path) -> tuple[Path | None, list[tuple[str, str]]]:
    """The newest checkpoint that is whole, or `None`; and the newer ones that are not, with the reason."""
    skipped = []
    for folder in reversed(checkpoints(output_dir)):
        try:
            verify(folder)
            return folder, skipped
        except CheckpointError as error:
            skipped.append((folder.name, str(error)))
    return None, skipped


def describe_run(args, dataset) -> dict[str, object]:
    """What a resumed run must share with the one that it goes on from."""
    return {
        "data": data_fingerprint(dataset),
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed,
        "data_seed": args.data_seed,
    }


def check_same_run(folder: str | Path, manifest: dict, run: dict[str, object]) -> None:
    """Refuse to go on from the checkpoint of another run.

    Raises:
        CheckpointError: naming the first thing that differs.
    """
    for name, value in run.items():
        if manifest["run"].get(name) != value:
            what = "the training data" if name == "data" else f"`{name}`"
            values = "" if name == "data" else f": {manifest['run'].get(name)} then, {value} now"
            raise CheckpointError(
                f"{folder} is of another run, because {what} changed{values}. Run it as it was, or pass --force_resume "
                "to go on all the same, with other batches than the straight run would see."
            )


class Sealer:
    """Does what a written checkpoint still needs while training goes on: hashing and flushing take as long as writing.

    One piece of work after another, in their order; what fails is raised by the next `wait`.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seal")
        self._jobs: list[Future] = []

    def start(self, work: Callable[[], None]) -> Future:
        """Have it done after what was started before."""
        self._jobs.append(self._pool.submit(work))
        return self._jobs[-1]

    def wait(self) -> None:
        """Until nothing is left to do.

        Raises:
            Exception: what the first work that failed raised.
        """
        jobs, self._jobs = self._jobs, []
        wait(jobs)
        for job in jobs:
            job.result()


__all__ = [
    "CheckpointError",
    "NotSavedError",
    "Sealer",
    "check_same_run",
    "checkpoints",
    "clean",
    "describe_run",
    "newest_verified",
    "put_in_place",
    "read_manifest",
    "remove",
    "rotate",
    "seal",
    "verify",
]
