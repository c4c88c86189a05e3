"""Refusal of bad tensors and bad folders before any work, with argument, row or file and the remedy in the message.

Shapes are checked everywhere. Values are checked on the CPU only: on an accelerator reading them would stall every
step, and under `torch.compile` it would break the graph.
"""

import json
from pathlib import Path

import torch

from .ops import is_traced


def _can_read(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not is_traced() and tensor.numel() > 0


def _first_row_outside(tensor: torch.Tensor, low: int, high: int, ignore_index: int | None = None):
    """Row and value of the first entry that is neither in [low, high) nor `ignore_index`, or `None`."""
    smallest, largest = (int(bound) for bound in torch.aminmax(tensor))
    if smallest >= low and largest < high:
        return None
    outside = (tensor < low) | (tensor >= high)
    if ignore_index is not None:
        outside &= tensor != ignore_index
    if not outside.any():
        return None
    index = outside.nonzero()[0]
    return int(index[0]), int(tensor[tuple(index)])


def input_shape(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> tuple[int, ...]:
    """Shape (..., T) of the input, of which exactly one form is given: ids (..., T) or embeddings (..., T, D)."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of `input_ids` and `inputs_embeds`.")
    name, shape = ("input_ids", input_ids.shape) if input_ids is not None else ("inputs_embeds", inputs_embeds.shape)
    if 0 in shape:
        raise ValueError(f"`{name}` has shape {tuple(shape)}, without a token. Leave out empty batches and texts.")
    return tuple(shape) if input_ids is not None else tuple(shape[:-1])


def check_ids(ids: torch.Tensor, vocab_size: int, name: str) -> None:
    """Ids name rows of the vocabulary."""
    if ids.is_floating_point():
        raise TypeError(f"`{name}` has dtype {ids.dtype}; ids are integers. Pass real values as `inputs_embeds`.")
    if _can_read(ids) and (found := _first_row_outside(ids, 0, vocab_size)):
        row, value = found
        raise ValueError(
            f"`{name}` holds {value} in row {row}, outside the vocabulary of {vocab_size} entries. "
            "Use the tokenizer this model was trained with, or `model.resize_token_embeddings(len(tokenizer))`."
        )


def check_token_types(token_type_ids: torch.Tensor, num_types: int) -> None:
    """Segments (B, T) have a row in their table."""
    if _can_read(token_type_ids) and (found := _first_row_outside(token_type_ids, 0, num_types)):
        row, value = found
        raise ValueError(
            f"`token_type_ids` holds {value} in row {row}, but `type_vocab_size` is {num_types}: segments are numbered "
            f"from 0 to {num_types - 1}. Use the tokenizer this model was trained with, or leave them out."
        )


def check_pixels(pixel_values: torch.Tensor, patch_shape: tuple[int, int], image_shape: tuple[int, int] | None) -> None:
    """Images (B, 3, height, width) of real numbers, cut into whole patches; of `image_shape` where it is given."""
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != 4 or shape[1] != 3:
        channels = f", {shape[-3]} channels" if pixel_values.ndim > 3 else ""
        raise ValueError(
            f"`pixel_values` has shape {shape}{channels}, but (batch, 3, height, width) is needed. "
            "Convert each image to RGB and use the image processor that belongs to the model."
        )
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"`pixel_values` has dtype {pixel_values.dtype} but the model reads normalised real numbers. "
            "Use the image processor that belongs to it."
        )
    size = shape[-2:]
    if any(side % patch for side, patch in zip(size, patch_shape, strict=True)) or 0 in shape:
        raise ValueError(
            f"`pixel_values` has shape {shape}, but patches of {patch_shape[0]} x {patch_shape[1]} pixels must divide "
            "height and width. Resize the images."
        )
    if image_shape is not None and size != image_shape:
        raise ValueError(
            f"`pixel_values` are {size[0]} x {size[1]} pixels but the model was made for {image_shape[0]} x "
            f"{image_shape[1]}. Resize them, or pass `interpolate_pos_encoding=True`."
        )


def check_image_tokens(is_image: torch.Tensor, num_images: int, num_queries: int) -> None:
    """A text (B, T) has as many places for images as `num_images` images of `num_queries` queries each fill."""
    if not _can_read(is_image):
        return
    counts = is_image.sum(-1)
    if int(counts.sum()) == num_images * num_queries:
        return
    wrong = (counts % num_queries).nonzero()
    row = int(wrong[0]) if len(wrong) else int(counts.argmin())
    raise ValueError(
        f"row {row} of `input_ids` has {int(counts[row])} image tokens and all rows have {int(counts.sum())}, but "
        f"{num_images} images of {num_queries} queries need {num_images * num_queries}. Use a processor whose "
        "`num_query_tokens` is that of the model, and one image for each place."
    )


def check_attention_mask(attention_mask, batch_size: int, length: int, past_key_values=None) -> None:
    """A 2-D mask has a row a sequence and a column a token, cached ones first, or a column a slot of a static cache.

    Ready masks of 4 dimensions, and what is no tensor, are the host's business.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim == 4:
        return
    past_length = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    capacity = past_key_values.get_max_length() if past_key_values is not None else -1
    needed = (batch_size, past_length + length)
    if tuple(attention_mask.shape) not in (needed, (batch_size, capacity)):
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)} but {needed} is needed: one row a sequence, one "
            f"column a token, the {past_length} cached tokens included. Pass the mask that the tokenizer returned."
        )
    if attention_mask.dtype != torch.bool and _can_read(attention_mask):
        is_other = (attention_mask != 0) & (attention_mask != 1)
        if is_other.any():
            index = is_other.nonzero()[0]
            raise ValueError(
                f"`attention_mask` holds {float(attention_mask[tuple(index)]):g} in row {int(index[0])}, but a mask of "
                "2 dimensions is 1 for a token and 0 for padding. Additive masks have 4: (B, 1, T, S)."
            )


def check_head_mask(
    head_mask: torch.Tensor, num_layers: int, num_heads: int, shape: tuple[int, int], name: str = "head_mask"
) -> None:
    """Factors of heads are real, one a head or one a head of each layer, or have stock's five axes.

    Args:
        shape: (B, T) of the queries, which five axes may tell apart.
        name: of the argument.
    """
    remedy = f"Start from `torch.ones({num_layers}, {num_heads})` and set the heads to drop to 0."
    if not isinstance(head_mask, torch.Tensor) or head_mask.is_complex():
        found = head_mask.dtype if isinstance(head_mask, torch.Tensor) else type(head_mask).__name__
        raise TypeError(f"`{name}` is {found}, but a tensor of real numbers is needed: a factor a head. {remedy}")
    found, axes = tuple(head_mask.shape), (num_layers, shape[0], num_heads, shape[1], 1)
    is_broadcast = len(found) == 5 and all(size in (1, whole) for size, whole in zip(found, axes, strict=True))
    if found not in ((num_heads,), (num_layers, num_heads)) and not is_broadcast:
        raise ValueError(
            f"`{name}` has shape {found} but {(num_heads,)} or {(num_layers, num_heads)} is needed, a factor for "
            "each of the `num_attention_heads` heads in each of the `num_hidden_layers` layers, or five axes that "
            f"broadcast to {axes}. {remedy}"
        )


def check_encoder(encoder_hidden_states: torch.Tensor, encoder_attention_mask, has_cross_attention: bool) -> None:
    """Encoder states (B, S, D) go to a model that reads them, and a 2-D mask of theirs is (B, S)."""
    if not has_cross_attention:
        raise ValueError(
            "`encoder_hidden_states` was passed to a model without cross-attention. "
            "Build it with `add_cross_attention=True` in the configuration."
        )
    if isinstance(encoder_attention_mask, torch.Tensor) and encoder_attention_mask.ndim < 4:
        needed = tuple(encoder_hidden_states.shape[:2])
        if tuple(encoder_attention_mask.shape) != needed:
            raise ValueError(
                f"`encoder_attention_mask` has shape {tuple(encoder_attention_mask.shape)} but {needed} is needed: one "
                "column a state of the encoder. Pass the mask that the encoder was given."
            )


def check_positions(
    position_ids: torch.Tensor, num_positions: int, field: str, other: str = " or `position_embedding_type='rope'`"
) -> None:
    """Positions (B, T) index a table of `num_positions` rows; `other`: what else a model may be trained with."""
    if _can_read(position_ids) and (found := _first_row_outside(position_ids, 0, num_positions)):
        row, value = found
        raise ValueError(
            f"row {row} needs position {value} but `{field}` is {num_positions}: the sequence, cached tokens included, "
            f"is longer than the model's positions. Truncate it to {num_positions} tokens, or train with a larger "
            f"`{field}`{other}."
        )


def check_labels(labels: torch.Tensor, shape: tuple[int, ...], num_classes: int, name: str, classes: str) -> None:
    """Integer labels have `shape` and lie in [0, `num_classes`) or are -100; `classes` names the field that says so."""
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"`{name}` has shape {tuple(labels.shape)} but {tuple(shape)} is needed, a label for each output."
        )
    if labels.is_floating_point():
        raise TypeError(f"`{name}` has dtype {labels.dtype} but class indices are integers: use `.long()`.")
    if _can_read(labels) and (found := _first_row_outside(labels, 0, num_classes, ignore_index=-100)):
        row, value = found
        raise ValueError(
            f"`{name}` holds {value} in row {row}, but `{classes}` is {num_classes}: labels lie between 0 and "
            f"{num_classes - 1}, or are -100 to be ignored. Correct the label or `{classes}`."
        )


def check_sequence_labels(labels: torch.Tensor, batch_size: int, config) -> None:
    """Labels of whole sequences suit `config.problem_type`, found as stock finds it and kept for the pipelines.

    Args:
        labels: (B,) class indices, or reals (B,) or (B, L) for regression, or zeros and ones (B, L).
    """
    num_labels = config.num_labels
    if config.problem_type is None:
        if num_labels == 1:
            config.problem_type = "regression"
        elif not labels.is_floating_point():
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    if config.problem_type == "single_label_classification":
        check_labels(labels.view(-1), (batch_size,), num_labels, "labels", "num_labels")
        return
    if labels.numel() != batch_size * num_labels:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)} but {config.problem_type} with `num_labels` {num_labels} needs "
            f"({batch_size}, {num_labels}). Correct the labels or `num_labels`."
        )
    if config.problem_type == "multi_label_classification":
        check_probabilities(labels, "labels")


def check_probabilities(labels: torch.Tensor, name: str) -> None:
    """Targets of independent labels lie between 0 and 1."""
    if _can_read(labels) and (outside := (labels < 0) | (labels > 1)).any():
        index = outside.nonzero()[0]
        raise ValueError(
            f"`{name}` holds {float(labels[tuple(index)]):g} in row {int(index[0])}, but the target of a label lies "
            "between 0 and 1. For class indices set `problem_type='single_label_classification'`."
        )


def check_answer_positions(positions: torch.Tensor, batch_size: int, name: str) -> None:
    """Token indices of an answer, (B,) or (B, 1), from 0; those beyond the sequence are ignored by the loss."""
    if tuple(positions.shape) not in ((batch_size,), (batch_size, 1)):
        raise ValueError(f"`{name}` has shape {tuple(positions.shape)} but {(batch_size,)} is needed: one a sequence.")
    if positions.is_floating_point():
        raise TypeError(f"`{name}` has dtype {positions.dtype} but token indices are integers: use `.long()`.")
    if _can_read(positions) and (positions < 0).any():
        row = int((positions < 0).nonzero()[0, 0])
        raise ValueError(
            f"`{name}` holds {int(positions.flatten()[row])} in row {row}. Use 0, the first token, for no answer, or a "
            "position beyond the sequence for a row to ignore."
        )


def check_shard_names(folder: str | Path) -> None:
    """The files among which an index of weights spreads them lie in its own folder."""
    for index in sorted(Path(folder).glob("*.index.json")):
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no `weight_map` from names to files. Fetch the folder again.")
        for weight, name in weight_map.items():
            if Path(name).name != name or "\\" in name:
                raise ValueError(
                    f"`weight_map` in {index} looks for {weight!r} in {name!r}, outside its folder. Do not load what "
                    "comes from a stranger; in a folder of your own correct the name."
                )


class OwnShardsOnly:
    """Mixin of the models: `from_pretrained` reads no weights outside the folder it is given (of the Hub's files, the
    host sees to that)."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        if pretrained_model_name_or_path is not None:
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if folder.is_dir():
                check_shard_names(folder)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
