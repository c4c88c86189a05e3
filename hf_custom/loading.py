"""Repositories of others, opened without trust: their code is never run, and nothing is read before it was checked."""

from importlib import import_module
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from .checks import check_shard_names
from .export import STOCK_CLASSES
from .folders import read_json
from .registry import FAMILIES

# What is fetched of a repository: no code, no pickles.
CONFIG_FILES = ("*.json",)
READER_FILES = (*CONFIG_FILES, "merges.txt", "vocab.txt", "*.jinja")
WEIGHT_FILES = ("*.safetensors",)
PICKLES = (".bin", ".ckpt", ".h5", ".msgpack", ".pickle", ".pkl", ".pt", ".pth")


def fetch(name_or_folder: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The folder itself, or what may be read of a repository of the Hub, in the host's cache."""
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    if Path(name_or_folder).exists() or str(name_or_folder).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name_or_folder} is no folder. Name a model's folder or a repository of the Hub.")
    patterns = [*READER_FILES, *(WEIGHT_FILES if weights else ())]
    return Path(snapshot_download(str(name_or_folder), revision=revision, allow_patterns=patterns))


def config_class_of(model_type: str | None) -> type[PreTrainedConfig]:
    """The configuration class for a `model_type`, ours or stock's, from the closed list of this package."""
    known = {name: row[0] for row in FAMILIES for name in (row[0].model_type, *row[0].stock_model_types)}
    if model_type not in known:
        raise ValueError(
            f"`model_type` is {model_type!r}, which is none of {', '.join(known)}. "
            "Use the Auto classes of transformers for other models."
        )
    return known[model_type]


def load_config(name_or_folder: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a folder or repository, ours or stock's, as one of this package; its sizes are bounded.

    Raises:
        OSError, ValueError: when there is none, its type is not of this package, or a value is out of range.
    """
    folder = fetch(name_or_folder, revision, weights=False)
    config_class = config_class_of(read_json(folder / "config.json").get("model_type"))
    return config_class.from_pretrained(folder)


def check_safetensors(file: Path) -> None:
    """Refuse a file whose header does not describe it; its numbers are not read."""
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}. Fetch it again.") from None


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder that the host would load, checked: names, presence, headers.

    Raises:
        ValueError: for shards outside the folder, weights as pickles alone, or a file that is no safetensors.
        FileNotFoundError: when a file is missing.
    """
    folder = Path(folder)
    check_shard_names(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    else:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} holds its weights as pickles alone ({', '.join(pickles)}), which may run code when read. "
                "Ask for safetensors, or convert them where you trust them: `from_pretrained`, then `save_pretrained`."
            )
        raise FileNotFoundError(f"{folder} has no model.safetensors. Name a folder that a model was saved to.")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, but {index.name} names it. Fetch the folder again.")
        check_safetensors(file)
    return files


def stored_tensors(folder: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor in a folder's weights, from the headers alone."""
    found = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def find_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of this package that a configuration's `architectures` names, ours or stock's; without a name the one
    without a head.

    Raises:
        ValueError: for a class that has no counterpart here.
    """
    package = import_module(__package__)
    members = {name: getattr(package, name) for name in package.__all__}
    classes = {
        name: value
        for name, value in members.items()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.config_class is type(config)
    }
    architecture = (config.architectures or [config.auto_classes["AutoModel"].split(".")[1]])[0]
    ours = {stock: own for own, stock in STOCK_CLASSES.items()}.get(architecture, architecture)
    if ours not in classes:
        raise ValueError(
            f"`architectures` names {architecture!r}, but the classes here are {', '.join(sorted(classes))}."
        )
    return classes[ours]


def load_model(
    name_or_folder: str | Path,
    *,
    model_class: type[PreTrainedModel] | None = None,
    revision: str | None = None,
    allow_missing: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """A model of this package from a folder or repository, ours or stock's, with all of its weights.

    Unlike `from_pretrained` it never runs the repository's code, never reads a pickle, and a weight that is missing is
    an error, not a warning.

    Args:
        model_class: class to load; else the one that was saved.
        allow_missing: let weights that are not there start fresh, as a new head has to.
        kwargs: of `from_pretrained` (`dtype`, `attn_implementation`, ...).

    Raises:
        OSError, ValueError: with the file or the weights, and the remedy, before memory is taken.
    """
    folder = fetch(name_or_folder, revision)
    config = load_config(folder)
    model_class = model_class or find_model_class(config)
    stored = sum(torch.Size(shape).numel() for shape, _ in stored_tensors(folder).values())
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in model_class(config).parameters())
    if needed > 2 * stored and not allow_missing:
        raise ValueError(
            f"the configuration in {folder} describes {needed:,} parameters but its files hold {stored:,}. "
            "They do not belong together: fetch the folder again."
        )
    model, report = model_class.from_pretrained(
        folder, config=config, use_safetensors=True, output_loading_info=True, **kwargs
    )
    missing = sorted(report["missing_keys"])
    if missing and not allow_missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of {model_class.__name__}, the first of them `{missing[0]}`. "
            "Load the class that was saved, or pass `allow_missing=True` to let them start fresh."
        )
    return model


__all__ = ["find_model_class", "load_config", "load_model", "weight_files"]
