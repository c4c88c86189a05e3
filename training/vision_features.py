"""States of a frozen vision tower, computed once and kept in a file that training reads instead of images."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from training.images import ImageTextCollator

STATES, KEYS = "states.npy", "keys.json"


def keys_of(tower: PreTrainedModel, collator: ImageTextCollator) -> dict[str, str]:
    """What the states are a function of, as a hash each: the tower's weights, the preprocessing and the images."""

    def digest(*parts: bytes) -> str:
        found = hashlib.sha256()
        for part in parts:
            found.update(part)
        return found.hexdigest()

    def content(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()

    weights = [content(tensor.flatten()) for _, tensor in sorted(tower.state_dict().items())]
    # The tower's own fields: the host's say how it was made and saved.
    own = {field.name for field in fields(tower.config)} - {field.name for field in fields(PreTrainedConfig)}
    design = json.dumps({name: getattr(tower.config, name) for name in sorted(own)})
    return {
        "weights of the vision tower": digest(design.encode(), *weights),
        "preprocessing": digest(content(collator.factor.flatten()), content(collator.offset.flatten())),
        "images": digest(str(tuple(collator.pixels.shape)).encode(), collator.pixels.numpy()),
    }


@torch.no_grad()
def compute_states(tower: PreTrainedModel, collator: ImageTextCollator, path: Path, batch_size: int) -> None:
    """Write the states (N, 1 + P, D) of the collator's N images as float32."""
    device, total = next(tower.parameters()).device, len(collator.pixels)
    was_training = tower.training
    tower.eval()
    states = None
    for start in tqdm(range(0, total, batch_size), desc="vision features", unit="batch"):
        rows = list(range(start, min(start + batch_size, total)))
        found = tower(collator.pixel_values(rows).to(device)).last_hidden_state.float().cpu().numpy()
        if states is None:
            states = np.lib.format.open_memmap(path, "w+", np.float32, (total, *found.shape[1:]))
        states[rows] = found
    states.flush()
    tower.train(was_training)


def vision_features(
    folder: str | Path, tower: PreTrainedModel, collator: ImageTextCollator, batch_size: int = 64
) -> np.ndarray:
    """The tower's states (N, 1 + P, D) for each of the collator's images, mapped from `folder` into memory.

    They are computed when the folder is not there, and appear whole or not at all.

    Raises:
        ValueError: when the folder holds states of other weights, preprocessing or images.
    """
    folder = Path(folder)
    keys = keys_of(tower, collator)
    if folder.exists():
        if not (folder / KEYS).exists():
            raise ValueError(f"{folder} is no folder of vision features. Name another with --features_dir.")
        kept = json.loads((folder / KEYS).read_text(encoding="utf-8"))
        stale = [name for name, key in keys.items() if kept.get(name) != key]
        if stale:
            raise ValueError(
                f"the vision features in {folder} are stale: they were computed from other {' and '.join(stale)}. "
                "Delete the folder or name another with --features_dir."
            )
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            compute_states(tower, collator, partial / STATES, batch_size)
            (partial / KEYS).write_text(json.dumps(keys, indent=1) + "\n", encoding="utf-8")
            os.chmod(partial, 0o755)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return np.load(folder / STATES, mmap_mode="r")
