"""What a model is and what it needs, without loading its weights: parameters by layer, bytes by use, files by size."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from .attention import QUERY_BLOCK
from .configuration_base import SIZE_LIMITS
from .loading import fetch, find_model_class, load_config, stored_tensors
from .losses import CHUNK_SIZE_OF_ACCELERATORS, CHUNK_SIZE_OF_CPU, CHUNK_SIZE_OF_CPU_IN_HALF

# Share of the tokens that masked language modelling predicts (Devlin et al. 2019, section 3.1).
MASKED_SHARE = 0.15
# Classes of heads whose number is not that of labels, and heads with an output for each token, by the end of the name.
# A visual question is answered by a label.
CLASSES = {
    "ForNextSentencePrediction": 2,
    "BertForImageTextRetrieval": 2,
    "BertForQuestionAnswering": 2,
    "GPT2ForQuestionAnswering": 2,
    "ForMultipleChoice": 1,
}
NO_LOGITS = ("Model", "Blip2ForImageTextRetrieval", "Blip2ForPreTraining")
EACH_TOKEN = ("ForTokenClassification", "BertForQuestionAnswering", "GPT2ForQuestionAnswering")
# Not of the model but of the file that holds it.
HIDDEN_FIELDS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "transformers_version",
}
INFERENCE, FLOAT32, BFLOAT16 = "inference", "training in float32", "training with autocast to bfloat16"


@dataclass(frozen=True)
class Row:
    """Parameters of one name in all layers that have it with one shape.

    Attributes:
        name: with the numbers of the layers in place of a number, as in `h.0..11.ln_1.weight`.
        count: how many layers.
        shape: of one of them.
        parameters: of all of them.
        is_trainable: false for frozen ones.
        tied: other names of the same parameter.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    parameters: int
    is_trainable: bool
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one part in one use; `None` where no formula covers the model, for which `note` gives the reason."""

    use: str
    part: str
    bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class Stack:
    """Sizes of a stack of layers: how many, their width, that of the feed-forward layer, heads, width of the keys, and
    how many times the width the widest projection of the attention has."""

    layers: int
    width: int
    inner: int
    heads: int
    key_width: int
    fused: int


def _stack_of(config: PreTrainedConfig) -> Stack:
    width, heads = config.hidden_size, config.num_attention_heads
    if config.model_type == "custom_elmo":
        # Four gates a unit.
        return Stack(config.num_hidden_layers, config.direction_size, 4 * config.cell_size, heads, width, 1)
    if config.model_type == "t5":
        return Stack(config.num_decoder_layers, width, config.d_ff, heads, heads * config.d_kv, 1)
    # Each family has its name for the feed-forward layer's width: GPT-2's `None` means four times the width.
    inner = next(
        (value for name in ("intermediate_size", "ffn_dim", "n_inner") if (value := getattr(config, name, None))),
        4 * width,
    )
    fused = 3 if config.model_type in ("custom_gpt2", "gpt2", "custom_blip2_vision_model") else 1
    return Stack(config.num_hidden_layers, width, inner, heads, width, fused)


def build_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration of this package without memory for its weights, on the meta device.

    Its class is the one that `architectures` names, by our name or stock's; without, the family's model without a head.
    """
    with torch.device("meta"):
        return find_model_class(config)(config)


# --- Parameters ---


def parameter_table(model: PreTrainedModel) -> list[Row]:
    """Every parameter once, those of like layers in one row, in the order of the model. Works on the meta device."""
    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    groups: dict[tuple, list[tuple[int | None, list[str]]]] = {}
    for key, (name, *others) in names.items():
        parameter = parameters[key]
        before, number, after = _split_at_number(name)
        group = (before, after, number is None, tuple(parameter.shape), parameter.requires_grad)
        groups.setdefault(group, []).append((number, others))
    rows = []
    for (before, after, is_single, shape, is_trainable), members in groups.items():
        numbers = "" if is_single else _as_ranges([number for number, _ in members])
        tied = tuple(other for _, others in members for other in others)
        count = len(members)
        rows.append(Row(f"{before}{numbers}{after}", count, shape, count * prod(shape), is_trainable, tied))
    return rows


def _split_at_number(name):
    """A parameter's name before, at and after the first number in it, which is that of the layer."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name[: match.start()], int(match.group()), name[match.end() :]) if match else (name, None, "")


def _as_ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 4] -> "0..2,4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


# --- Memory ---


def memory_table(
    model: PreTrainedModel | PreTrainedConfig,
    *,
    batch_size: int = 1,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[MemoryRow]:
    """Bytes for inference and for training.

    Letters: B `batch_size`, T `length`, N = B · T tokens, L layers, D width, I width of the feed-forward layer,
    V vocabulary, P trainable parameters; s bytes of a number of `dtype`.

    Inference:
        weights: parameters and buffers, tied ones once, each times s; 4 for what the class keeps in float32.
        state of an LSTM: L · B · (D + units) · s, whatever T is.
        cache: 2 · L · B · T · D · s, keys and values of T tokens (Pope et al. 2022, "Efficiently Scaling Transformer
            Inference", section 2); of an encoder-decoder twice as many, of T tokens of the source too.
        logits: B · V · s of a language model that writes, one position a sequence; of another head its whole output.
        largest activation: N · max(3 · D, I) · s where one projection makes queries, keys and values, N · max(D, I) · s
            where three do. Texts are read at once, and attention holds no matrix of scores.

    Training:
        weights 4 bytes and gradients 4 · P; AdamW (Loshchilov and Hutter 2019) two moments of 4 bytes each and a step
            of 4 bytes a tensor.
        activations and copies: `activation_bytes`.
        logits of the loss: 4 · C · V for chunks of C tokens; the loss of a whole batch is computed in chunks.
        The sum is an upper bound: gradients come while activations go.

    Args:
        length: tokens of a sequence, that a language model's cache holds too; the longest that the model takes when
            `None`. Images have the length that their size gives.
        dtype: of the weights for inference. Training keeps them in float32.
        device: `cpu` or `cuda`, which differ in what dropout of attention keeps and in C.

    Raises:
        ValueError: for a batch or length below 1, a length beyond the model's positions, or another device.
    """
    model = model if isinstance(model, PreTrainedModel) else build_empty(model)
    config = model.config
    longest = _longest(config)
    length = longest if length is None else length
    _check_sizes(config, batch_size, length, device)
    if config.model_type == "custom_word2vec":
        return _word_vector_rows(model, batch_size * length, dtype)
    inference = _inference_rows(model, batch_size, length, dtype)
    rows = [*inference, MemoryRow(INFERENCE, "all", _sum(inference))]
    for use in (FLOAT32, BFLOAT16):
        part = _training_rows(model, use, batch_size, length, device)
        total = _sum(part)
        rows += [*part, MemoryRow(use, "all", total, "" if total is None else "upper bound")]
    return rows


def _text_of(config):
    """The part of a configuration that reads text."""
    return getattr(config, "text_config", None) or config


def _longest(config):
    """Tokens of the longest sequence that the model reads."""
    if hasattr(config, "grid"):
        return 1 + prod(config.grid)
    return getattr(_text_of(config), "max_position_embeddings", None) or 512


def _check_sizes(config, batch_size, length, device):
    for name, value in (("batch_size", batch_size), ("length", length)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r} but must be an integer of 1 or more.")
    text = _text_of(config)
    has_table = getattr(text, "position_embedding_type", "learned") in ("learned", "absolute")
    if has_table and length > _longest(config):
        raise ValueError(f"`length` is {length} but the model has {_longest(config)} positions. Ask for fewer tokens.")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device` is {device!r} but must be 'cpu' or 'cuda'.")


def _sum(rows: Iterable[MemoryRow]) -> int | None:
    """Of all rows; `None` when one is not known."""
    sizes = [row.bytes for row in rows]
    return None if None in sizes else sum(sizes)


def _inference_rows(model, batch_size, length, dtype):
    config, size = model.config, dtype.itemsize
    rows = [MemoryRow(INFERENCE, "weights", _weight_bytes(model, dtype))]
    text = _text_of(config)
    if model.can_generate() and (getattr(text, "is_decoder", False) or _is_decoder_only(text)):
        stack = _stack_of(text)
        cache = 2 * stack.layers * batch_size * length * stack.key_width * size
        rows.append(MemoryRow(INFERENCE, "cache of keys and values", cache, f"{length} tokens a sequence"))
    elif model.can_generate() and config.model_type == "custom_transformer":
        # Of the target, and of the source that every layer of the decoder attends to.
        cache = 2 * config.decoder_layers * batch_size * 2 * length * config.d_model * size
        rows.append(
            MemoryRow(INFERENCE, "cache of keys and values", cache, f"{length} tokens a source and as many a target")
        )
    elif model.can_generate() and config.model_type == "custom_elmo":
        state = batch_size * config.num_hidden_layers * (config.direction_size + config.cell_size) * size
        rows.append(MemoryRow(INFERENCE, "state", state, "after any number of tokens"))
    elif model.can_generate():
        rows.append(MemoryRow(INFERENCE, "cache of keys and values", None, "no formula for an encoder-decoder"))
    rows.append(MemoryRow(INFERENCE, "logits", _logits(model, batch_size, length) * size))
    widest = max(
        tokens * max(stack.fused * stack.width, stack.inner) * size
        for tokens, stack in _stacks(config, batch_size, length)
    )
    return [*rows, MemoryRow(INFERENCE, "largest activation", widest)]


def _word_vector_rows(model, tokens, dtype):
    """Of tables of vectors, which have no layers and are updated in place, without gradients."""
    weights, note = _weight_bytes(model, dtype), "updated in place, without gradients"
    activation = tokens * model.config.hidden_size * dtype.itemsize
    trained = _weight_bytes(model, torch.float32)
    return [
        MemoryRow(INFERENCE, "weights", weights),
        MemoryRow(INFERENCE, "largest activation", activation),
        MemoryRow(INFERENCE, "all", weights + activation),
        MemoryRow(FLOAT32, "weights", trained, note),
        MemoryRow(FLOAT32, "all", trained, "and some megabytes of updates"),
        MemoryRow(BFLOAT16, "all", None, "word2vec trains in float32"),
    ]


def _is_decoder_only(text):
    return text.model_type in ("custom_gpt2", "gpt2", "opt")


def _weight_bytes(model, dtype):
    """Parameters and buffers in `dtype`, in float32 where the class says so, which the host heeds for float16."""
    kept = (model._keep_in_fp32_modules or []) if dtype == torch.float16 else []
    pattern = "|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in kept)
    total = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    for name, parameter in model.named_parameters():
        is_kept = bool(pattern) and re.search(pattern, name) is not None
        total += parameter.numel() * (4 if is_kept else dtype.itemsize)
    return total


def _logits(model, batch_size, length):
    """Numbers in the output of the head."""
    output = model.get_output_embeddings()
    if output is not None:
        return batch_size * output.weight.shape[0] * (1 if model.can_generate() else length)
    name = type(model).__name__
    if name.endswith(NO_LOGITS):
        return 0
    classes = next((count for end, count in CLASSES.items() if name.endswith(end)), model.config.num_labels)
    each_token = name.endswith(EACH_TOKEN)
    return batch_size * classes * (length if each_token else 1)


def _stacks(config, batch_size, length):
    """The stacks of a model, each with the tokens that go through it."""
    parts = [getattr(config, name, None) for name in ("vision_config", "qformer_config", "text_config")]
    if config.model_type == "custom_transformer":
        width, tokens = config.d_model, batch_size * length
        decoder = Stack(config.decoder_layers, width, config.decoder_ffn_dim, config.decoder_attention_heads, width, 1)
        return [(tokens, _stack_of(config)), (tokens, decoder)]
    if not any(parts):
        return [(batch_size * length, _stack_of(config))]
    patches = 1 + prod(parts[0].grid)
    stacks = [(batch_size * patches, _stack_of(parts[0]))]
    if parts[1] is not None:
        stacks.append((batch_size * config.num_query_tokens, _stack_of(parts[1])))
    text = parts[2] or config
    # Patches join the text in the stream of a BERT, and queries are among the tokens of a BLIP-2's language model.
    return [*stacks, (batch_size * (length if parts[2] else length + patches), _stack_of(text))]


def _training_rows(model, use, batch_size, length, device):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    is_autocast = use == BFLOAT16
    activations, reason = activation_bytes(model, batch_size, length, is_autocast, device), ""
    if activations is None:
        reason = "no formula for this architecture"
    rows = [
        MemoryRow(use, "weights", _weight_bytes(model, torch.float32)),
        MemoryRow(use, "gradients", 4 * count),
        MemoryRow(use, "AdamW", 8 * count + 4 * len(trained), "two moments"),
        MemoryRow(use, "activations", activations, reason or f"{batch_size} x {length} tokens, none of padding"),
    ]
    if is_autocast and activations is not None:
        stack = _stack_of(model.config)
        copies = 2 * stack.layers * (4 * stack.width**2 + stack.width * stack.inner)
        rows.append(MemoryRow(use, "copies of weights", copies, "bfloat16"))
    output = model.get_output_embeddings()
    if output is not None and activations is not None:
        chunk = min(_chunk_size(model.config, is_autocast, device), _labelled(model, batch_size, length))
        rows.append(MemoryRow(use, "logits of the loss", 4 * chunk * output.weight.shape[0], f"{chunk} tokens at once"))
    return rows


def _chunk_size(config, is_autocast, device):
    if config.loss_chunk_size is not None:
        return config.loss_chunk_size
    on_cpu = CHUNK_SIZE_OF_CPU_IN_HALF if is_autocast else CHUNK_SIZE_OF_CPU
    return on_cpu if device == "cpu" else CHUNK_SIZE_OF_ACCELERATORS


def _labelled(model, batch_size, length):
    """Tokens with a label: all but the first of each sequence, or the masked ones; 0 without a language model."""
    if model.get_output_embeddings() is None:
        return 0
    is_causal = getattr(model.config, "is_decoder", False) or model.config.model_type == "custom_gpt2"
    return batch_size * (length - 1) if is_causal else round(MASKED_SHARE * batch_size * length)


def activation_bytes(
    model: PreTrainedModel,
    batch_size: int,
    length: int,
    is_autocast: bool = False,
    device: str = "cpu",
    is_unpadded: bool = False,
) -> int | None:
    """Bytes that a training step keeps for its backward pass, weights and inputs not counted.

    The count of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.1,
    for what is kept here. For one token and one layer, in numbers:

        2 · D   inputs of the two norms, on the residual stream
        6 · D   inputs of four projections where one makes queries, keys and values (GPT-2): two norms' outputs; the
                queries, keys and values; the attention's output
        I       input of the activation function, which is computed again for the second projection

    They keep 34 bytes · D and 5 · H · T in half precision with I = 4 · D; here scores are in no one's memory (Dao et
    al. 2022, "FlashAttention"), nor is the activation's output. In float32 all take 4 bytes. Autocast leaves the
    residual stream in float32 and takes 2 bytes for the rest; three projections (BERT) then cast their input three
    times, 2 · D more. A norm keeps mean and deviation, 8 bytes; attention a sum of exponentials, 4 · H. Rotary
    positions of GPT-2 keep the turned queries and keys beside the fused projection, 2 · D more; not where attention on
    a CPU makes copies, with dropout or in bfloat16.

    Dropout of states keeps a byte for each number, and of attention on a CPU a byte for each score computed; a CUDA
    kernel draws them again. Before or behind the layers one more norm's input, its mask of dropout where there is
    one; and for each labelled token the head's states and their gradient, which the chunked loss takes at once.

    Args:
        is_unpadded: the tokens are those of a batch whose padding was left out, in groups of similar length:
            attention's output is then kept in both orders, D more, and the last states once more.

    Returns:
        `None` for what the formula does not cover: BLIP-2, images, attention over an encoder, relative positions.
    """
    config = model.config
    if config.model_type not in ("custom_gpt2", "custom_bert"):
        return None
    if config.add_cross_attention or config.position_embedding_type.startswith("relative"):
        return None
    if getattr(config, "vision_config", None) is not None:
        return None
    is_gpt2 = config.model_type == "custom_gpt2"
    stack, size = _stack_of(config), 2 if is_autocast else 4
    attention_dropout = config.attn_pdrop if is_gpt2 else config.attention_probs_dropout_prob
    makes_copies = device == "cpu" and (is_autocast or attention_dropout > 0)
    more = stack.width * is_unpadded
    if is_gpt2:
        more += 2 * stack.width * (config.position_embedding_type == "rope" and not makes_copies)
    else:
        more += 2 * stack.width * is_autocast
    layer = 4 * 2 * stack.width + size * (6 * stack.width + stack.inner + more) + 2 * 8 + 4 * stack.heads
    embedding_dropout = config.embd_pdrop if is_gpt2 else config.hidden_dropout_prob
    layer_dropout = config.resid_pdrop if is_gpt2 else config.hidden_dropout_prob
    layer += 2 * stack.width * bool(layer_dropout)
    ends = 4 * stack.width * (1 + is_unpadded) + 8 + stack.width * bool(embedding_dropout)
    total = batch_size * length * (stack.layers * layer + ends)
    if attention_dropout and device == "cpu":
        is_causal = is_gpt2 or config.is_decoder
        total += stack.layers * batch_size * stack.heads * _scores(length, is_causal)
    # The states of a causal head are those of the last norm; a masked one has a layer of its own before the vocabulary.
    states = 4 if is_gpt2 else 4 * size
    return total + _labelled(model, batch_size, length) * (stack.width * (states + 4) + 8)


def _scores(length, is_causal):
    """Scores that attention computes block by block on a CPU, up to the last key of each block."""
    starts = range(0, length, QUERY_BLOCK)
    blocks = [(min(start + QUERY_BLOCK, length) - start, min(start + QUERY_BLOCK, length)) for start in starts]
    return sum(queries * (end if is_causal else length) for queries, end in blocks)


# --- Text ---


def inspect(
    name_or_folder: str | Path,
    revision: str | None = None,
    *,
    batch_size: int = 1,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> str:
    """Describe a model of the Hub or of a folder: configuration, parameters, memory, files. No weight is loaded.

    Args:
        name_or_folder: of a model of this package, or of a stock model of its families.
        batch_size, length, dtype, device: of `memory_table`.

    Raises:
        OSError: when there is no such model, or the folder has no config.json.
        ValueError: for a model of another family.
    """
    folder = fetch(name_or_folder, revision, weights=False)
    config = load_config(folder)
    model = build_empty(config)
    rows = parameter_table(model)
    memory = memory_table(model, batch_size=batch_size, length=length, dtype=dtype, device=device)
    sections = [
        f"{name_or_folder}: {type(model).__name__}",
        _section("Configuration (sizes, and what differs from the defaults)", describe_config(config)),
        _section("Parameters", _parameter_lines(rows)),
        _section(f"Memory, batch of {batch_size}, inference in {str(dtype).split('.')[1]}", _memory_lines(memory)),
    ]
    files = sorted(file for file in folder.iterdir() if file.is_file())
    lines = _align([(file.name, readable(file.stat().st_size)) for file in files])
    sections.append(_section("Files", [*lines, _stored_weights(folder)]))
    return "\n\n".join(sections)


def _stored_weights(folder):
    """How many numbers of which type the weights in a folder have, or why they cannot be read."""
    try:
        tensors = stored_tensors(folder).values()
    except (FileNotFoundError, ValueError) as error:
        # The rest can be said without them, and they may not have been fetched.
        return f"weights: {error}"
    numbers: dict[str, int] = {}
    for shape, kind in tensors:
        numbers[kind] = numbers.get(kind, 0) + prod(shape)
    return f"weights: {len(tensors)} tensors, " + ", ".join(f"{count:,} x {kind}" for kind, count in numbers.items())


def describe_config(config: PreTrainedConfig) -> list[str]:
    """Lines `field: value` of the sizes and of all fields that are not at their defaults; parts are indented."""
    defaults = type(config)()
    sizes = {config.attribute_map.get(name, name) for name in SIZE_LIMITS}
    parts = set(config.sub_configs)
    lines = [f"model_type: {config.model_type}"]
    default_values = defaults.to_dict()
    for name, value in config.to_dict().items():
        if name in HIDDEN_FIELDS or name in parts:
            continue
        if (name in sizes and value is not None) or value != default_values.get(name):
            lines.append(f"{name}: {value!r}")
    if config.num_labels != defaults.num_labels:
        lines.append(f"num_labels: {config.num_labels}")
    for name in sorted(parts):
        part = getattr(config, name)
        if part is not None:
            lines += [f"{name}:", *(f"  {line}" for line in describe_config(part))]
    return lines


def _parameter_lines(rows):
    cells = []
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        notes = [] if row.is_trainable else ["frozen"]
        notes += [f"tied to {name}" for name in row.tied]
        cells.append((row.name, f"{row.count} x ({shape})", f"{row.parameters:,}", ", ".join(notes)))
    total = sum(row.parameters for row in rows)
    trained = sum(row.parameters for row in rows if row.is_trainable)
    cells.append(("all", "", f"{total:,}", f"{trained:,} trainable"))
    return _align(cells)


def _memory_lines(rows):
    lines = []
    for use in (INFERENCE, FLOAT32, BFLOAT16):
        cells = [(f"  {row.part}", readable(row.bytes), row.note) for row in rows if row.use == use]
        lines += [use, *_align(cells)]
    return lines


def readable(count: int | None) -> str:
    """Bytes in the largest binary unit that leaves at least 1: 1536 -> "1.5 KiB"; `None` -> "unknown"."""
    if count is None:
        return "unknown"
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{count} bytes" if power == 0 else f"{count / 1024**power:.1f} {units[power]}"


def _align(cells: list[tuple[str, ...]]) -> list[str]:
    """Cells in columns of equal width."""
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _section(title, lines):
    return "\n".join([title, *(f"  {line}" for line in lines)])


__all__ = [
    "MemoryRow",
    "Row",
    "activation_bytes",
    "inspect",
    "memory_table",
    "parameter_table",
]
