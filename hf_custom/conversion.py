"""From the formats in which GPT-2 models, ELMo and vocabularies were published to folders of this package.

Read are OpenAI's release of GPT-2 (a TensorFlow checkpoint, without TensorFlow), the `ckpt.pt` of nanoGPT, the rank
files of tiktoken and, by `elmo_weights`, the weights of ELMo. Everything that a file says of itself (offsets, sizes,
shapes, names) is checked before memory is taken for it, and nothing in it is executed.
"""

import base64
import binascii
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from .configuration_base import SIZE_LIMITS
from .configuration_gpt2 import CustomGPT2Config
from .elmo_weights import convert_elmo, is_elmo
from .folders import read_bytes, read_json, whole_folder
from .modeling_gpt2 import CustomGPT2ForCausalLM
from .tensor_bundle import TensorBundle

AnyPath = str | Path
END_OF_TEXT = "<|endoftext|>"

# One row a tensor: our name, OpenAI's, and the axes in our layout, in which a projection is (in, out).
# V tokens, P positions, D width.
MODEL_TENSORS = (
    ("wte.weight", "wte", "V D"),
    ("wpe.weight", "wpe", "P D"),
    ("ln_f.weight", "ln_f/g", "D"),
    ("ln_f.bias", "ln_f/b", "D"),
)
BLOCK_TENSORS = (
    ("ln_1.weight", "ln_1/g", "D"),
    ("ln_1.bias", "ln_1/b", "D"),
    ("attn.c_attn.weight", "attn/c_attn/w", "D 3D"),
    ("attn.c_attn.bias", "attn/c_attn/b", "3D"),
    ("attn.c_proj.weight", "attn/c_proj/w", "D D"),
    ("attn.c_proj.bias", "attn/c_proj/b", "D"),
    ("ln_2.weight", "ln_2/g", "D"),
    ("ln_2.bias", "ln_2/b", "D"),
    ("mlp.c_fc.weight", "mlp/c_fc/w", "D 4D"),
    ("mlp.c_fc.bias", "mlp/c_fc/b", "4D"),
    ("mlp.c_proj.weight", "mlp/c_proj/w", "4D D"),
    ("mlp.c_proj.bias", "mlp/c_proj/b", "D"),
)

# Our fields by the names that the two formats have for them.
_SAME = {name: name for name in ("n_embd", "n_head", "n_layer")}
OPENAI_SIZES = {"n_vocab": "vocab_size", "n_ctx": "n_positions", **_SAME}
NANOGPT_SIZES = {"vocab_size": "vocab_size", "block_size": "n_positions", **_SAME}
# GPT-2's vocabulary as it is, and as nanoGPT pads it.
GPT2_VOCAB_SIZES, GPT2_END_OF_TEXT = (50257, 50304), 50256

MAX_TEXT_BYTES = 2**26
# o200k_base, the largest vocabulary that tiktoken has, takes 3.6 MB and its longest token 128 bytes.
MAX_RANK_FILE_BYTES, MAX_TOKEN_BYTES = 2**26, 1024
_RANK_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,8})")


@dataclass(frozen=True)
class Encoding:
    """How tiktoken splits text before it merges bytes, and what it adds to the ranks.

    Attributes:
        pattern: of the pieces of text, in the syntax of Oniguruma, where `\\z` is what `$` is to tiktoken.
        special_tokens: number by name.
        num_ranks: lines of the published file.
    """

    pattern: str
    special_tokens: dict[str, int]
    num_ranks: int


_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER, _SUFFIX = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    r"(?i:'(?:[sdmt]|ll|ve|re))?",
)
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENCODINGS = {
    "r50k_base": Encoding(_GPT2_PATTERN, {END_OF_TEXT: 50256}, 50256),
    # Its ranks go on behind the special token.
    "p50k_base": Encoding(_GPT2_PATTERN, {END_OF_TEXT: 50256}, 50280),
    "cl100k_base": Encoding(
        _CL100K_PATTERN,
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        100256,
    ),
    "o200k_base": Encoding(_O200K_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}, 199998),
}


def convert(
    source: AnyPath,
    folder: AnyPath,
    *,
    n_head: int | None = None,
    tokenizer: AnyPath | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a model or a vocabulary, recognised by its content, and return the folder written.

    Args:
        source: a folder with OpenAI's checkpoint, one with `encoder.json` and `vocab.bpe` alone, nanoGPT's `ckpt.pt` or
            a folder that holds it, a rank file of tiktoken, or a folder with ELMo's options and weights.
        folder: where the result shall stand; it appears whole or not at all.
        n_head: number of attention heads, for a checkpoint that does not say it: the weights do not tell.
        tokenizer: of a model, saved beside it: a rank file, or a folder with a tokenizer; of an ELMo, its vocabulary.
        overwrite: replace what stands in `folder`.

    Raises:
        ValueError: for a source of no known format or one that contradicts itself.
        OSError: for a file that is missing, or a `folder` that is there already.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist. Name a folder or a file.")
    for fmt in FORMATS:
        if fmt.recognises(source):
            break
    else:
        raise ValueError(
            f"{source} is of no known format. Looked for: {'; '.join(fmt.signs for fmt in FORMATS)}. "
            "Name the folder or file that holds one of them."
        )
    if fmt.is_model:
        return fmt.convert(source, folder, n_head=n_head, tokenizer=tokenizer, overwrite=overwrite)
    if n_head is not None or tokenizer is not None:
        raise ValueError(f"{source} is a vocabulary without a model. Leave `n_head` and `tokenizer` out.")
    return fmt.convert(source, folder, overwrite=overwrite)


def convert_openai(
    source: AnyPath, folder: AnyPath, *, n_head: int | None = None, tokenizer: AnyPath | None = None, overwrite=False
) -> Path:
    """Convert a folder of OpenAI's GPT-2 release (`model.ckpt.*`, `hparams.json`, `encoder.json`, `vocab.bpe`).

    The `.meta` file is not read. Without `hparams.json` sizes are those of the tensors and `n_head` must be given;
    `tokenizer` stands for `encoder.json` and `vocab.bpe`, as in `convert`.
    """
    source = Path(source)
    _keep_source(source, folder)
    bundle = TensorBundle(_checkpoint_prefix(source))
    shapes = {name: entry.shape for name, entry in bundle.entries.items()}
    declared = {}
    if n_head is None or (source / "hparams.json").is_file():
        declared = _read_hparams(source / "hparams.json")
    sizes = _sizes(declared, shapes, ("model/wte", "model/wpe"), r"model/h(\d+)/", n_head, bundle.index)
    text = _load_tokenizer(tokenizer) if tokenizer is not None else openai_tokenizer(source)
    config = _config(sizes, text, activation_function="gelu_new")
    rows = [(ours, f"model/{theirs}", shape, _openai_shape(ours, shape)) for ours, theirs, shape in _tensors(config)]
    _check_shapes({theirs: stored for _, theirs, _, stored in rows}, shapes, bundle.index)
    for _, theirs, _, _ in rows:
        if not bundle.entries[theirs].dtype.is_floating_point:
            raise ValueError(f"{theirs} in {bundle.index} holds integers. Name the checkpoint of a model.")

    def read():
        return {ours: bundle.read(theirs).view(shape) for ours, theirs, shape, _ in rows}

    return _save(folder, config, read, text, overwrite)


def openai_tokenizer(source: str | Path) -> GPT2Tokenizer:
    """The tokenizer of a folder with `encoder.json` (number by token) and `vocab.bpe` (a merge a line, best first).

    Raises:
        OSError: when one of them is missing.
        ValueError: when a byte, a part of a merge or the end of text has no number.
    """
    source = Path(source)
    for name in ("encoder.json", "vocab.bpe"):
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"{source} has no {name}. Copy it there, or name another vocabulary by `tokenizer`."
            )
    encoder = read_json(source / "encoder.json", MAX_TEXT_BYTES)
    numbers = list(encoder.values())
    _check_numbers(numbers, source / "encoder.json")
    for token in (END_OF_TEXT, *bytes_to_unicode().values()):
        if token not in encoder:
            raise ValueError(f"{source / 'encoder.json'} has no number for {token!r}. Copy the complete file.")
    merges = []
    for number, line in enumerate(_read_text(source / "vocab.bpe").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or any(token not in encoder for token in (*pair, "".join(pair))):
            raise ValueError(
                f"line {number} of {source / 'vocab.bpe'} is not a merge of two tokens of encoder.json into a third. "
                "Copy both files from one release."
            )
        merges.append(pair)
    return GPT2Tokenizer(vocab=encoder, merges=merges)


def _checkpoint_prefix(source):
    """The path of a checkpoint's files without their endings, by the file `checkpoint` or as the only one there."""
    if (source / "checkpoint").is_file():
        match = re.search(r'^model_checkpoint_path: "([^"\n]+)"', _read_text(source / "checkpoint"), re.MULTILINE)
        if match is None:
            raise ValueError(f"{source / 'checkpoint'} names no `model_checkpoint_path`. Copy it again, or remove it.")
        # The name alone: the folder is that of the machine which wrote it.
        return source / re.split(r"[/\\]", match.group(1))[-1]
    found = sorted(source.glob("*.index"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{source} has no file `checkpoint`, and {len(found)} files *.index instead of one to choose. "
            "Copy the checkpoint completely."
        )
    return found[0].with_suffix("")


def _read_hparams(file):
    """Our sizes from OpenAI's hyperparameters."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist. Copy it there, or give the number of heads as `n_head`.")
    hparams = read_json(file, MAX_TEXT_BYTES)
    missing = [name for name in OPENAI_SIZES if name not in hparams]
    if missing:
        raise ValueError(f"{file} has no {missing[0]!r}. Copy it from the release.")
    return {ours: _integer(hparams[theirs], theirs, file) for theirs, ours in OPENAI_SIZES.items()}


def _openai_shape(ours, shape):
    """OpenAI stores projections as the weights (1, in, out) of a convolution over positions."""
    return (1, *shape) if ours.startswith("h.") and len(shape) == 2 else shape


def convert_nanogpt(
    source: str | Path,
    folder: str | Path,
    *,
    n_head: int | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    activation_function: str = "gelu",
) -> Path:
    """Convert nanoGPT's `ckpt.pt`, or the folder that holds it.

    The vocabulary keeps its size, 50304 where nanoGPT padded GPT-2's 50257 tokens: the rows from 50257 on stand for no
    token, and training has taught the model not to choose them. Norms and projections without biases get zeros.

    Args:
        activation_function: nanoGPT computes the exact GELU; its first versions, before June 2023, the one of
            GPT-2, `gelu_new`, which a checkpoint does not tell.

    The other arguments are those of `convert`.
    """
    source = Path(source) / "ckpt.pt" if Path(source).is_dir() else Path(source)
    _keep_source(source, folder)
    checkpoint = _load_pickle(source)
    arguments = checkpoint.get("model_args", {})
    if not isinstance(arguments, dict):
        raise ValueError(f"`model_args` in {source} is no dictionary. Save it as nanoGPT's train.py does.")
    state = _nanogpt_state(checkpoint["model"], source)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    declared = {
        ours: _integer(arguments[theirs], theirs, source)
        for theirs, ours in NANOGPT_SIZES.items()
        if theirs in arguments
    }
    tables = ("transformer.wte.weight", "transformer.wpe.weight")
    sizes = _sizes(declared, shapes, tables, r"transformer\.h\.(\d+)\.", n_head, source)
    text = None if tokenizer is None else _load_tokenizer(tokenizer)
    head = state.get("lm_head.weight")
    is_tied = head is None or (head.shape == state[tables[0]].shape and torch.equal(head, state[tables[0]]))
    dropout = arguments.get("dropout", 0.0)
    if not isinstance(dropout, float | int):
        raise ValueError(f"`dropout` in {source} is {dropout!r} but must be a number. Correct it.")
    fields = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, "tie_word_embeddings": is_tied}
    config = _config(sizes, text, activation_function=activation_function, **fields)

    rows = [(ours, f"transformer.{ours}", shape) for ours, _, shape in _tensors(config)]
    without_bias = arguments.get("bias", True) is False
    # A linear layer of torch stores its weight (out, in).
    expected = {theirs: shape[::-1] if ours.startswith("h.") else shape for ours, theirs, shape in rows}
    expected = {name: shape for name, shape in expected.items() if not (without_bias and name.endswith(".bias"))}
    if head is not None:
        expected["lm_head.weight"] = expected[tables[0]]
    _check_shapes(expected, shapes, source)

    def read():
        found = {}
        for ours, theirs, shape in rows:
            tensor = state[theirs] if theirs in expected else state[tables[0]].new_zeros(shape)
            found[ours] = tensor.t() if ours.startswith("h.") and tensor.ndim == 2 else tensor
        return found if is_tied else {**found, "lm_head.weight": head}

    return _save(folder, config, read, text, overwrite)


def _load_pickle(source):
    """The dictionary in a file of `torch.save`, of which only tensors and plain values are read, as they are needed."""
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist. Name the ckpt.pt that nanoGPT's train.py wrote.")
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{source} holds more than tensors and plain values, so it was not read: code in it could have run. "
            "Where you trust it, load it there and save `model` and `model_args` alone by `torch.save`."
        ) from error
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{source} is damaged or not a file of `torch.save` ({error}). Copy it again.") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(
            f"{source} has no state dict under `model`, as nanoGPT's checkpoints have. "
            "Save it as {'model': state_dict, 'model_args': {...}}."
        )
    return checkpoint


def _nanogpt_state(state, source):
    """Tensors by name, without the prefix that `torch.compile` leaves and without causal masks."""
    found = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name!r} in {source} is not a tensor under a name. Save a plain state dict.")
        name = name.removeprefix("_orig_mod.")
        if re.search(r"\.attn\.(masked_)?bias$", name):
            continue
        if tensor.layout is not torch.strided or not tensor.is_floating_point() or tensor.device.type != "cpu":
            raise ValueError(f"{name} in {source} is not a dense tensor of floating-point numbers. Save it as one.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} in {source} has the shape {tuple(tensor.shape)}, larger than its memory. Save its `clone()`."
            )
        found[name] = tensor
        first, dtype = next((name, tensor.dtype) for name, tensor in found.items())
        if tensor.dtype != dtype:
            raise ValueError(f"{name} in {source} is {tensor.dtype} but {first} is {dtype}. Save all in one type.")
    return found


def _sizes(declared, shapes, tables, block, n_head, source):
    """The configuration's sizes: those declared, the others from the shapes, the number of heads from `n_head`."""
    if n_head is not None and declared.get("n_head", n_head) != n_head:
        raise ValueError(f"{source} was made with {declared['n_head']} heads but `n_head` is {n_head}. Leave it out.")
    if n_head is None and "n_head" not in declared:
        raise ValueError(f"{source} does not say the number of attention heads. Give it as `n_head`.")
    for name in tables:
        if len(shapes.get(name, ())) != 2:
            found = f"has the shape {shapes[name]}" if name in shapes else "is missing"
            raise ValueError(f"{name} {found} in {source}, which is no GPT-2 then. Name a checkpoint of one.")
    layers = [int(match.group(1)) for name in shapes if (match := re.match(block, name))]
    (vocab_size, width), (positions, _) = (shapes[name] for name in tables)
    derived = {
        "vocab_size": vocab_size,
        "n_positions": positions,
        "n_embd": width,
        "n_layer": 1 + max(layers, default=0),
        "n_head": n_head,
    }
    return {**derived, **declared}


def _config(sizes, tokenizer, **fields):
    """The configuration, with the tokenizer's end of text or, without one, GPT-2's where the vocabulary is GPT-2's."""
    if tokenizer is None:
        end = GPT2_END_OF_TEXT if sizes["vocab_size"] in GPT2_VOCAB_SIZES else None
        start = end
    else:
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        highest = max(tokenizer.get_vocab().values(), default=0)
        if highest >= sizes["vocab_size"]:
            raise ValueError(
                f"the tokenizer numbers its tokens up to {highest} but the model has {sizes['vocab_size']}. "
                "Name the tokenizer that the model was trained with."
            )
        tokenizer.model_max_length = sizes["n_positions"]
    return CustomGPT2Config(**sizes, bos_token_id=start, eos_token_id=end, **fields)


def _tensors(config) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Our name, OpenAI's and the shape of every tensor."""
    width = config.n_embd
    axes = {"V": config.vocab_size, "P": config.n_positions, "D": width, "3D": 3 * width, "4D": 4 * width}
    rows = list(MODEL_TENSORS)
    for layer in range(config.n_layer):
        rows += [(f"h.{layer}.{ours}", f"h{layer}/{theirs}", shape) for ours, theirs, shape in BLOCK_TENSORS]
    for ours, theirs, shape in rows:
        yield ours, theirs, tuple(axes[axis] for axis in shape.split())


def _check_shapes(expected, found, source):
    """Refuse a tensor that is missing, left over or of another shape than the sizes give it."""
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(
                f"{source} has no tensor {name}, which a model of its sizes has. Copy it again, or correct the sizes."
            )
        if found[name] != shape:
            raise ValueError(
                f"{name} in {source} has the shape {found[name]}, but the sizes declared give {shape}. "
                "Use sizes and weights of one model."
            )
    for name in found:
        if name not in expected:
            raise ValueError(
                f"{source} has a tensor {name}, which a GPT-2 of its sizes does not. Remove it, or correct the sizes."
            )


def _keep_source(source, folder):
    """Refuse to write where the source would be replaced."""
    source, folder = source.resolve(), Path(folder).resolve()
    if source == folder or folder in source.parents:
        raise ValueError(f"writing {folder} would replace the source in it. Name another folder.")


def _save(folder, config, read: Callable[[], dict[str, torch.Tensor]], tokenizer, overwrite):
    with whole_folder(folder, overwrite) as draft:
        with torch.device("meta"):
            model = CustomGPT2ForCausalLM(config)
        tensors = read()
        head = tensors.pop("lm_head.weight", tensors["wte.weight"])
        state = {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        model.load_state_dict({**state, "lm_head.weight": head.contiguous()}, assign=True)
        model.tie_weights()
        model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
    return Path(folder)


def _save_tokenizer(folder, tokenizer, overwrite):
    with whole_folder(folder, overwrite) as draft:
        tokenizer.save_pretrained(draft)
    return Path(folder)


def _load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a rank file of tiktoken or in a folder, OpenAI's or the host's."""
    path = Path(path)
    if path.is_file():
        return tiktoken_tokenizer(path)
    if not path.is_dir():
        raise FileNotFoundError(f"`tokenizer` is {path}, which does not exist. Name a rank file or a folder.")
    if _has(path, "encoder.json", "vocab.bpe"):
        return openai_tokenizer(path)
    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(f"`tokenizer` is {path}, which holds none. Name the folder with its tokenizer.json.")
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def convert_tiktoken(
    source: str | Path,
    folder: str | Path,
    *,
    encoding: str | None = None,
    special_tokens: dict[str, int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the tokenizer of a rank file as a folder; arguments as for `tiktoken_tokenizer`."""
    _keep_source(Path(source), folder)
    return _save_tokenizer(folder, tiktoken_tokenizer(source, encoding, special_tokens), overwrite)


def tiktoken_tokenizer(
    file: AnyPath, encoding: str | None = None, special_tokens: dict[str, int] | None = None
) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a rank file: a token in base64, a space and its number, a line each.

    Numbers are kept, special tokens' too, so there may be some without a token: `len` of the tokenizer is then smaller
    than the rows that a model needs. It encodes as tiktoken 0.14 does. They could differ where two
    overlapping pairs make the same token, of which tiktoken takes the left one; no trained vocabulary was seen to.

    Args:
        encoding: a key of `ENCODINGS`, how text is split; else the one that the file is named after, else `r50k_base`.
        special_tokens: number by name. Left out, those of the encoding when the file has as many ranks as were
            published, else the same names numbered behind the last rank.

    Raises:
        ValueError: for a line that cannot be read, a byte without a rank, a number given twice, or a file named after
            an encoding that does not have as many ranks.
    """
    file = Path(file)
    ranks = _read_ranks(file)
    name = encoding if encoding is not None else file.name.removesuffix(".tiktoken")
    if encoding is not None and encoding not in ENCODINGS:
        raise ValueError(f"`encoding` is {encoding!r} but must be one of {', '.join(map(repr, ENCODINGS))}.")
    rule = ENCODINGS.get(name, ENCODINGS["r50k_base"])
    if encoding is None and name in ENCODINGS and len(ranks) != rule.num_ranks:
        raise ValueError(
            f"{file} has {len(ranks)} ranks but {name} has {rule.num_ranks}. "
            "Copy it again or, if it is another vocabulary, say how it splits text by `encoding`."
        )
    if special_tokens is None:
        special_tokens = rule.special_tokens
        if len(ranks) != rule.num_ranks:
            special_tokens = {token: max(ranks.values()) + 1 + i for i, token in enumerate(special_tokens)}
    if not all(isinstance(token, str) and token for token in special_tokens):
        raise ValueError("`special_tokens` has a name that is empty or no text. Correct it.")
    _check_numbers([*ranks.values(), *special_tokens.values()], file)
    end = END_OF_TEXT if END_OF_TEXT in special_tokens else None
    return PreTrainedTokenizerFast(
        tokenizer_object=_RankConverter(ranks, rule.pattern, special_tokens).converted(),
        bos_token=end,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )


class _RankConverter(TikTokenConverter):
    """The host's converter with ranks that are read already, because what reads them there, tiktoken's own loader,
    keeps a copy by path and gives it again when the file has changed; and with special tokens under their numbers,
    where the host counts on from the last rank."""

    def __init__(self, ranks, pattern, special_tokens):
        super().__init__(pattern=pattern, extra_special_tokens=special_tokens)
        self.ranks, self.special_tokens = ranks, special_tokens

    def load_tiktoken_bpe(self, _):
        return self.ranks

    def extract_vocab_merges_from_model(self, _):
        vocab, merges = super().extract_vocab_merges_from_model(None)
        for token in self.special_tokens:
            if token in vocab:
                raise ValueError(f"the special token {token!r} stands for a rank already. Name it otherwise.")
        return {**vocab, **self.special_tokens}, merges


def _read_ranks(file):
    """Rank by token."""
    ranks = {}
    for number, line in enumerate(read_bytes(file, MAX_RANK_FILE_BYTES).splitlines(), start=1):
        if not line:
            continue
        match = _RANK_LINE.fullmatch(line)
        try:
            token = base64.b64decode(match.group(1), validate=True) if match else b""
        except binascii.Error:
            token = b""
        if not 0 < len(token) <= MAX_TOKEN_BYTES or token in ranks:
            raise ValueError(
                f"line {number} of {file} is not a new token in base64, a space and its rank. Copy the file again."
            )
        ranks[token] = int(match.group(2))
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise ValueError(f"{file} has no rank for the byte {byte}, so it cannot encode all text. Copy it again.")
    return ranks


def _check_numbers(numbers, file):
    """Refuse numbers of tokens that are none, too high for any vocabulary, or given twice."""
    for number in numbers:
        if type(number) is not int or not 0 <= number < SIZE_LIMITS["vocab_size"]:
            raise ValueError(f"{file} or the special tokens have the number {number!r} for a token. Correct it.")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"two tokens of {file} and the special tokens have one number. Number them apart.")


def _read_text(file):
    try:
        return read_bytes(file, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}). Copy it again.") from error


def _integer(value, name, file):
    if type(value) is not int:
        raise ValueError(f"{name!r} in {file} is {value!r} but must be an integer. Correct it.")
    return value


def _has(source, *names):
    return all((source / name).is_file() for name in names)


def _starts_as_ranks(source):
    """Whether the first line of a file is one of a rank file."""
    with source.open("rb") as file:
        return _RANK_LINE.fullmatch(file.readline(4 * MAX_TOKEN_BYTES).rstrip(b"\r\n")) is not None


def _starts_as_zip(source):
    with source.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


@dataclass(frozen=True)
class Format:
    """A row of what `convert` knows: how it looks in words, how it is recognised, and what converts it."""

    signs: str
    recognises: Callable[[Path], bool]
    convert: Callable[..., Path]
    is_model: bool


def _convert_openai_vocabulary(source, folder, *, overwrite=False):
    _keep_source(Path(source), folder)
    return _save_tokenizer(folder, openai_tokenizer(source), overwrite)


FORMATS = (
    Format(
        "a folder with `options.json` and `lm_weights.hdf5` (bilm-tf, as ELMo was published)",
        is_elmo,
        convert_elmo,
        is_model=True,
    ),
    Format(
        "a folder with `checkpoint` or `*.index` (TensorFlow, as OpenAI published GPT-2)",
        lambda source: source.is_dir() and (_has(source, "checkpoint") or any(source.glob("*.index"))),
        convert_openai,
        is_model=True,
    ),
    Format(
        "a zip file of `torch.save`, or a folder with `ckpt.pt` (nanoGPT)",
        lambda source: _has(source, "ckpt.pt") if source.is_dir() else _starts_as_zip(source),
        convert_nanogpt,
        is_model=True,
    ),
    Format(
        "a folder with `encoder.json` and `vocab.bpe` (OpenAI's vocabulary)",
        lambda source: source.is_dir() and _has(source, "encoder.json", "vocab.bpe"),
        _convert_openai_vocabulary,
        is_model=False,
    ),
    Format(
        "a file of lines of base64, a space and a number (tiktoken)",
        lambda source: source.is_file() and _starts_as_ranks(source),
        convert_tiktoken,
        is_model=False,
    ),
)

__all__ = [
    "ENCODINGS",
    "Encoding",
    "convert",
    "convert_nanogpt",
    "convert_openai",
    "convert_tiktoken",
    "openai_tokenizer",
    "tiktoken_tokenizer",
]
