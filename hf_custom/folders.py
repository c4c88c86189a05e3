"""A folder that appears whole or not at all, that of the templates, and files of bounded size."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In a model's folder, that of the tokenizer of targets which have a vocabulary of their own.
TARGET_TOKENIZER = "target_tokenizer"


@contextmanager
def whole_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, to be filled; at the end it takes that name, after an error it is gone.

    Args:
        folder: where the content shall stand; folders above it are made.
        overwrite: replace what stands there.

    Raises:
        FileExistsError: when something stands there and `overwrite` is false, before anything is written.
    """
    folder = Path(folder).absolute()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Name another one, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        os.chmod(draft, 0o755)
        if folder.is_dir():
            # Out of the way first: the moment without a folder is that of two renames, not of a deletion.
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            folder.rename(old / folder.name)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def find_templates() -> Path:
    """The folder `hub_cards` of templates and prose: in the package in a wheel, beside it in a checkout.

    Raises:
        FileNotFoundError: when the installation lacks it.
    """
    package = Path(__file__).parent
    for folder in (package / "hub_cards", package.parent / "hub_cards"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("the folder hub_cards is missing from the installation. Install the package again.")


def read_bytes(file: Path, limit: int) -> bytes:
    """The content of a file of bounded size."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist. Copy it there.")
    size = file.stat().st_size
    if size > limit:
        raise ValueError(f"{file} has {size:,} bytes, more than any such file ({limit:,}). Name the right one.")
    return file.read_bytes()


def read_json(file: Path, limit: int = 2**27) -> dict:
    """A JSON object of bounded size; a configuration with a name for each of a million labels has about 60 MB.

    Raises:
        FileNotFoundError, ValueError: when there is none, or something else is there.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}. Copy it there, or name a folder that has one.")
    encoded = read_bytes(file, limit)
    try:
        content = json.loads(encoded)
    # Brackets within brackets, a hundred thousand deep, are no `ValueError`.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}). Copy it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object. Copy it again.")
    return content


__all__ = ["TARGET_TOKENIZER", "find_templates", "read_bytes", "read_json", "whole_folder"]
