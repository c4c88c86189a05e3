"""FSDP2 on processors as on GPUs, and what its checkpoints hold, looked at before anything is loaded from them.

Accelerate shards where it finds accelerators, and on processors goes on as plain data parallelism without a word. Its
choice is one line (`AcceleratorState`, which asks for the kind of group and never for the device); all that comes after
works over gloo, so a run of two processes without a GPU is one of FSDP2.

A sharded checkpoint has a folder of `torch.distributed.checkpoint` for the model and one for the optimizer: files of
each process, in which tensors and values stand one after another, and `.metadata`, which says where. torch reads
`.metadata`, and the values, as pickles that may run any code. So they are read here first, by readers that know nothing
but what such a checkpoint is made of, and whatever else is in them is refused.
"""

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.fsdp import FSDPModule

from training.archives import load_data

METADATA = ".metadata"
# What Accelerate calls a state in parts, a file of each process, and a whole one, which the first gathers.
PARTS, WHOLE = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
SAVE_ERRORS = (CheckpointException,)
MODEL_FOLDER, MODEL_FILE = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"
# Of a checkpoint's table of contents: classes that hold data and nothing else.
_CLASSES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PureWindowsPath,
    ("torch", "Size"): torch.Size,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
} | {
    (dcp.__name__, name): getattr(dcp, name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}


def is_asked_for() -> bool:
    """Whether the launcher was told to shard (`accelerate launch` with `fsdp2.yaml`)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def sharded_on_processors() -> Iterator[None]:
    """Let an `Accelerator` that is made within shard also in a group of processors, where that was asked for.

    Not where there is a GPU beside them: torch would choose that one to divide the model on.
    """
    shared = PartialState._shared_state
    is_group = shared.get("distributed_type") == DistributedType.MULTI_CPU
    if not (is_asked_for() and is_group) or torch.accelerator.is_available():
        yield
        return
    # One of the kinds that `AcceleratorState` shards; it writes FSDP in its place.
    shared["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if shared["distributed_type"] == DistributedType.MULTI_GPU:
            shared["distributed_type"] = DistributedType.MULTI_CPU


@contextmanager
def of_own_class(model: torch.nn.Module) -> Iterator[None]:
    """Within, a model that FSDP2 shards is of the class that it was made of, whose code and name are to be saved.

    FSDP2 puts a class of its own, derived from torch's and the model's, in the place of the latter.
    """
    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = next(kind for kind in sharded.__mro__[1:] if not issubclass(kind, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded


def tied_names(model: torch.nn.Module, state_dict: dict) -> set[str]:
    """Those names of a state that only stand for another name's weight, as a saved model leaves them out."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for name, source in tied.items() if name in state_dict and source in state_dict}


class _Reader(pickle.Unpickler):
    """Reads a table of contents; anything but its classes is refused before it is made."""

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _CLASSES[module, name]


def check_shards(folder: str | Path) -> None:
    """Check every file of a checkpoint that FSDP wrote: nothing in it runs code, grows or lies elsewhere, and all
    weights are finite. Nothing is done where there is none.

    Raises:
        ValueError: with the file and what is wrong.
    """
    folder = Path(folder)
    for path in sorted(folder.rglob(METADATA)):
        _check_parts(path.parent)
    if (folder / MODEL_FILE).is_file():
        for key, tensor in load_data(folder / MODEL_FILE, MODEL_FILE).items():
            _check_finite(key, tensor)


def _check_parts(folder: Path) -> None:
    """The parts of one folder, model or optimizer, by its table of contents."""
    name = f"{folder.name}/{METADATA}"
    try:
        table = _Reader(io.BytesIO((folder / METADATA).read_bytes())).load()
        parts = [(index.fqn, Path(part.relative_path), part) for index, part in table.storage_data.items()]
        values = {key for key, kind in table.state_dict_metadata.items() if isinstance(kind, dcp.BytesStorageMetadata)}
    except (pickle.UnpicklingError, AttributeError, TypeError, ValueError, EOFError, LookupError) as error:
        raise ValueError(f"holds {name}, which is no table of contents of torch: {error}") from None
    for key, file, part in parts:
        if file.name != str(file) or file.name == "..":
            raise ValueError(f"names {str(file)!r} in {name}, outside its folder")
        if part.transform_descriptors or not (folder / file).is_file():
            raise ValueError(f"names {file} in {name}, which is not there as it was written")
        with (folder / file).open("rb") as stream:
            stream.seek(part.offset)
            content = io.BytesIO(stream.read(part.length))
        value = load_data(content, f"{folder.name}/{file}")
        if folder.name == MODEL_FOLDER and key not in values:
            _check_finite(key, value)


def _check_finite(key: str, value) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"has something other than a tensor in {key}")
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ValueError(f"has numbers in {key} that are not finite")


def kind_of_checkpoint(folder: str | Path) -> str | None:
    """How FSDP saved a checkpoint: `PARTS` or `WHOLE`; `None` for one that it did not save."""
    if (Path(folder) / MODEL_FOLDER).is_dir():
        return PARTS
    return WHOLE if (Path(folder) / MODEL_FILE).is_file() else None


def kind_of_run(accelerator: Accelerator) -> str | None:
    """How FSDP will save, `PARTS` or `WHOLE`; `None` for a run that it does not shard."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return None if plugin is None else plugin.state_dict_type.name


def check_same_kind(folder: str | Path, accelerator: Accelerator) -> None:
    """Refuse a checkpoint that a run cannot read, because one of them is sharded and the other is not, or otherwise.

    Raises:
        ValueError: with how to start the run that can.
    """
    found, own = kind_of_checkpoint(folder), kind_of_run(accelerator)
    if found != own:
        words = {None: "without FSDP", PARTS: f"by FSDP, as {PARTS}", WHOLE: f"by FSDP, as {WHOLE}"}
        remedy = f"with `fsdp_state_dict_type: {found}`" if found else "without FSDP (training/accelerate/ddp.yaml)"
        raise ValueError(
            f"{folder} was saved {words[found]}, but this run is one {words.get(own, own)}. Start it {remedy}."
        )
