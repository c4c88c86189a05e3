"""Torch's archives, looked at before torch reads them: stored plainly, so that they cannot grow, and data alone."""

import io
import pickle
import zipfile
from pathlib import Path

import torch


def check_archive(content: Path | io.BytesIO, name: str) -> None:
    """Refuse what is no archive of torch, or one that would be larger in memory than it is.

    Raises:
        ValueError: with the name and what is wrong.
    """
    if not zipfile.is_zipfile(content):
        raise ValueError(f"holds {name}, which is no archive of torch")
    with zipfile.ZipFile(content) as archive:
        entries = archive.infolist()
    size = content.stat().st_size if isinstance(content, Path) else content.getbuffer().nbytes
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > size
    ):
        raise ValueError(f"holds {name}, which would grow when it is read")


def load_data(content: Path | io.BytesIO, name: str):
    """What an archive holds, where that is tensors, numbers, text and containers of them.

    Raises:
        ValueError: with the name, where it holds anything else; nothing of it is executed.
    """
    check_archive(content, name)
    if isinstance(content, io.BytesIO):
        content.seek(0)
    try:
        return torch.load(content, map_location="cpu", weights_only=True, mmap=isinstance(content, Path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"holds {name}, in which there is more than data: {reason[-1]}") from None
