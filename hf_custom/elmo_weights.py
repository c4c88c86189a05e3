"""Reader of published weights of ELMo: an options file in JSON and weights in HDF5, as bilm-tf writes them.

Every name and shape that the options give is checked before a tensor is read. HDF5 is read by h5py, which is imported
when it is needed.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .configuration_elmo import NUM_CHARACTERS, CustomElmoConfig
from .folders import read_json, whole_folder
from .modeling_elmo import CustomElmoModel
from .tokenization_elmo import CustomElmoTokenizer, read_vocabulary

OPTIONS_FILE = "options.json"
MAX_OPTIONS_BYTES = 2**20
# What bilm-tf's LSTM adds to the gate that forgets, and its order of the gates by ours: i, f, g, o.
FORGET_BIAS, GATES = 1.0, (0, 2, 1, 3)

LSTM_OPTIONS = {"dim": "cell_size", "projection_dim": "projection_size", "n_layers": "num_hidden_layers"}
OPTIONAL_LSTM_OPTIONS = {
    "use_skip_connections": ("use_skip_connections", False),
    "cell_clip": ("cell_clip", None),
    "proj_clip": ("proj_clip", None),
}


def is_elmo(source: Path) -> bool:
    """Whether a folder looks like published weights of ELMo."""
    return source.is_dir() and _options_file(source) is not None and _weights_file(source) is not None


def _only(source, pattern):
    found = sorted(source.glob(pattern))
    return found[0] if len(found) == 1 else None


def _options_file(source):
    return source / OPTIONS_FILE if (source / OPTIONS_FILE).is_file() else _only(source, "*options.json")


def _weights_file(source):
    return source / "lm_weights.hdf5" if (source / "lm_weights.hdf5").is_file() else _only(source, "*weights.hdf5")


def convert_elmo(
    source: str | Path,
    folder: str | Path,
    *,
    n_head: int | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a folder with `options.json` and `lm_weights.hdf5` (or one `*options.json` and one `*weights.hdf5`).

    Args:
        n_head: must be left out; ELMo has no attention.
        tokenizer: the vocabulary file, a word a line; else the only `vocab*.txt` of the folder. Weights that read
            characters need none.

    Raises:
        ImportError: when h5py is not installed.
        ValueError: for options, weights and a vocabulary that contradict each other.
        OSError: for a file that is missing, or a `folder` that is there already.
    """
    source, folder = Path(source), Path(folder)
    if n_head is not None:
        raise ValueError(f"{source} holds an ELMo, which has no attention. Leave `n_head` out.")
    if source.resolve() == folder.resolve() or folder.resolve() in source.resolve().parents:
        raise ValueError(f"writing {folder} would replace the source in it. Name another folder.")
    vocabulary = _only(source, "vocab*.txt") if tokenizer is None else Path(tokenizer)
    words = None if vocabulary is None else read_vocabulary(vocabulary)
    weights = _weights_file(source)
    fields = read_options(_options_file(source))
    with _open(weights) as file:
        config = _config(fields, file, weights, words, vocabulary)
        expected = {name: shape for _, name, shape, _ in tensors_of(config)}
        _check(expected, file, weights)
        state = {}
        for ours, name, _, change in tensors_of(config):
            state[ours] = change(torch.from_numpy(file[name][...]).float()).contiguous()
    with torch.device("meta"):
        model = CustomElmoModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias_hh_l0"):
            state[name] = torch.zeros(parameter.shape)
    state |= {"scalar_mix.weights": torch.zeros(config.num_hidden_layers + 1), "scalar_mix.gamma": torch.ones(())}
    model.load_state_dict(state, assign=True)
    with whole_folder(folder, overwrite) as draft:
        model.save_pretrained(draft)
        _tokenizer(config, words, vocabulary).save_pretrained(draft)
    return folder


def _open(weights):
    try:
        import h5py
    except ImportError:
        raise ImportError("weights in HDF5 are read by h5py, which is not installed. Run `pip install h5py`.") from None
    try:
        return h5py.File(weights, "r")
    except OSError as error:
        raise OSError(f"{weights} is damaged or not a file of HDF5 ({error}). Copy it again.") from error


def _part(options, name, source):
    part = options.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"{source} has no table `{name}`. Use the options file that belongs to the weights.")
    return part


def _value(part, name, source):
    if name not in part:
        raise ValueError(f"{source} does not say `{name}`. Use the options file that belongs to the weights.")
    return part[name]


def read_options(source: Path) -> dict:
    """Fields of `CustomElmoConfig` from an options file."""
    options = read_json(source, MAX_OPTIONS_BYTES)
    lstm = _part(options, "lstm", source)
    fields = {ours: _value(lstm, theirs, source) for theirs, ours in LSTM_OPTIONS.items()}
    fields |= {ours: lstm.get(theirs, default) for theirs, (ours, default) in OPTIONAL_LSTM_OPTIONS.items()}
    fields |= {"bidirectional": options.get("bidirectional", True), "lstm_dropout": options.get("dropout", 0.1)}
    if "n_tokens_vocab" in options:
        fields["vocab_size"] = options["n_tokens_vocab"]
    if "char_cnn" not in options:
        return {**fields, "input_type": "words"}
    characters = _part(options, "char_cnn", source)
    count = _value(characters, "n_characters", source)
    if count not in (NUM_CHARACTERS, NUM_CHARACTERS - 1):
        raise ValueError(
            f"`n_characters` in {source} is {count!r}, but words are read as {NUM_CHARACTERS} characters: bytes, five "
            "signs and padding. Use weights that were trained by bilm-tf."
        )
    return {
        **fields,
        "input_type": "characters",
        "character_embedding_size": _value(_part(characters, "embedding", source), "dim", source),
        "filters": _value(characters, "filters", source),
        "num_highway_layers": characters.get("n_highway", 0),
        "max_characters_per_token": characters.get("max_characters_per_token", 50),
        "char_cnn_activation": _value(characters, "activation", source),
    }


def _config(fields, file, weights, words, vocabulary):
    """The configuration, with the size of the vocabulary that options, weights and vocabulary file agree about."""
    counts = {"the options": fields.get("vocab_size"), str(vocabulary): None if words is None else len(words)}
    if fields["input_type"] == "words" and "embedding" in file:
        counts[str(weights)] = file["embedding"].shape[0]
    known = {name: count for name, count in counts.items() if count is not None}
    if len(set(known.values())) > 1:
        said = ", ".join(f"{count} by {name}" for name, count in known.items())
        raise ValueError(
            f"the vocabulary and the weights disagree about the number of words: {said}. Use the vocabulary file that "
            "the model was trained with."
        )
    vocab_size = next(iter(known.values()), 1)
    numbers = {word: number for number, word in enumerate(words or [])}
    ids = {"bos_token_id": numbers.get("<S>"), "eos_token_id": numbers.get("</S>")}
    return CustomElmoConfig(**{**fields, "vocab_size": vocab_size, **ids})


def tensors_of(config: CustomElmoConfig) -> Iterator[tuple[str, str, tuple[int, ...], Callable]]:
    """Our name, theirs, their shape of every tensor, and what makes ours of it."""
    width, cell = config.direction_size, config.cell_size
    if config.input_type == "words":
        yield "embeddings.weight", "embedding", (config.vocab_size, width), torch.clone
    else:
        yield from _character_tensors(config)
    for direction, name in enumerate(("forward_lstm", "backward_lstm")[: 2 if config.bidirectional else 1]):
        for layer in range(config.num_hidden_layers):
            ours = f"{name}.layers.{layer}.lstm"
            theirs = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            # Of the input and the last output together, (in, out).
            yield f"{ours}.weight_ih_l0", f"{theirs}/W_0", (2 * width, 4 * cell), lambda w: _gates(w[:width].t())
            yield f"{ours}.weight_hh_l0", f"{theirs}/W_0", (2 * width, 4 * cell), lambda w: _gates(w[width:].t())
            yield f"{ours}.bias_ih_l0", f"{theirs}/B", (4 * cell,), _biases
            if config.projection_size is not None:
                yield f"{ours}.weight_hr_l0", f"{theirs}/W_P_0", (cell, width), torch.t


def _character_tensors(config):
    size, total = config.character_embedding_size, sum(count for _, count in config.filters)
    prefix = "embeddings"
    # The weights have no row for the place where there is no word.
    shape = (NUM_CHARACTERS - 1, size)
    yield f"{prefix}.character_embeddings.weight", "char_embed", shape, _with_empty_row
    for index, (window, count) in enumerate(config.filters):
        ours = f"{prefix}.convolutions.{index}"
        yield f"{ours}.weight", f"CNN/W_cnn_{index}", (1, window, size, count), lambda w: w[0].permute(2, 1, 0)
        yield f"{ours}.bias", f"CNN/b_cnn_{index}", (count,), torch.clone
    for index in range(config.num_highway_layers):
        for part in ("carry", "transform"):
            ours, theirs = f"{prefix}.highways.{index}.{part}", f"CNN_high_{index}"
            yield f"{ours}.weight", f"{theirs}/W_{part}", (total, total), torch.t
            yield f"{ours}.bias", f"{theirs}/b_{part}", (total,), torch.clone
    yield f"{prefix}.projection.weight", "CNN_proj/W_proj", (total, config.direction_size), torch.t
    yield f"{prefix}.projection.bias", "CNN_proj/b_proj", (config.direction_size,), torch.clone


def _with_empty_row(weight: torch.Tensor) -> torch.Tensor:
    """A row of zeros before the others."""
    return torch.cat((torch.zeros_like(weight[:1]), weight))


def _gates(weight):
    """Rows (4H, ...) in our order of the gates."""
    parts = weight.chunk(4)
    return torch.cat([parts[index] for index in GATES])


def _biases(bias):
    i, f, g, o = _gates(bias).chunk(4)
    return torch.cat((i, f + FORGET_BIAS, g, o))


def _check(expected, file, weights):
    """Refuse a tensor that is missing, left over or of another shape than the options give it."""
    found = {}
    file.visititems(lambda name, item: found.update({name: item.shape}) if hasattr(item, "shape") else None)
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{weights} has no tensor {name}, which its options call for. Use options of this model.")
        if found[name] != shape:
            raise ValueError(
                f"{name} in {weights} has the shape {found[name]}, but its options give {shape}. "
                "Use options and weights of one model."
            )
    for name in found:
        if name not in expected:
            raise ValueError(f"{weights} has a tensor {name}, which its options do not call for. Use its own options.")


def _tokenizer(config, words, vocabulary):
    options = {"input_type": config.input_type, "max_characters_per_token": config.max_characters_per_token}
    if words is not None:
        options["vocab_file"] = str(vocabulary)
        if config.input_type == "words":
            known = set(words)
            for name, token in (("bos", "<S>"), ("eos", "</S>"), ("unk", "<UNK>")):
                options[f"{name}_token"] = token if token in known else None
            # No row of the embeddings is to spare for padding, which is not read.
            options["pad_token"] = options["eos_token"]
    return CustomElmoTokenizer(**options)


__all__ = ["convert_elmo", "is_elmo", "read_options", "tensors_of"]
