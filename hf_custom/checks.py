"""Refusal of bad tensors before any work, with the argument, the row and the remedy in the message.

Shapes are checked everywhere. Values are checked on the CPU only: on an accelerator reading them would stall every
step, and under `torch.compile` it would break the graph.
"""

import torch


def _can_read(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and tensor.numel() > 0


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


def check_inputs(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, vocab_size: int) -> None:
    """Exactly one of ids (..., T) and embeddings (B, T, D) is given, and the ids name rows of the vocabulary."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is None:
        return
    if input_ids.is_floating_point():
        raise TypeError(f"`input_ids` has dtype {input_ids.dtype}; pass integers, or real values as `inputs_embeds`.")
    if _can_read(input_ids) and (found := _first_row_outside(input_ids, 0, vocab_size)):
        row, value = found
        raise ValueError(
            f"`input_ids` holds {value} in row {row}, outside the vocabulary of {vocab_size} entries. "
            "Use the tokenizer this model was trained with, or `model.resize_token_embeddings(len(tokenizer))`."
        )


def check_attention_mask(attention_mask, batch_size: int, length: int, past_key_values=None) -> None:
    """A 2-D mask (B, S) has a row a sequence and a column a token, cached ones first, or one a slot of a static cache."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return
    past_length = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    capacity = past_key_values.get_max_length() if past_key_values is not None else -1
    needed = (batch_size, past_length + length)
    if attention_mask.shape[0] != batch_size or attention_mask.shape[1] not in (needed[1], capacity):
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)} but {needed} is needed: one row a sequence, one "
            f"column a token, the {past_length} cached tokens included. Pass the mask that the tokenizer returned."
        )


def check_positions(position_ids: torch.Tensor, num_positions: int, field: str) -> None:
    """Positions (B, T) index a table of `num_positions` rows."""
    if _can_read(position_ids) and (found := _first_row_outside(position_ids, 0, num_positions)):
        row, value = found
        raise ValueError(
            f"row {row} needs position {value} but `{field}` is {num_positions}: the sequence, cached tokens included, "
            f"is longer than the model's positions. Truncate it to {num_positions} tokens, or train with a larger "
            f"`{field}` or `position_embedding_type='rope'`."
        )


def check_labels(labels: torch.Tensor, shape: tuple[int, ...], num_classes: int, name: str, classes: str) -> None:
    """Integer labels have `shape` and lie in [0, `num_classes`) or are -100; `classes` names the field that says so."""
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"`{name}` has shape {tuple(labels.shape)} but {tuple(shape)} is needed, one label a position of the output."
        )
    if labels.is_floating_point():
        raise TypeError(f"`{name}` has dtype {labels.dtype} but class indices are integers: use `.long()`.")
    if _can_read(labels) and (found := _first_row_outside(labels, 0, num_classes, ignore_index=-100)):
        row, value = found
        raise ValueError(
            f"`{name}` holds {value} in row {row}, but `{classes}` is {num_classes}: labels lie between 0 and "
            f"{num_classes - 1}, or are -100 to be ignored. Correct the label or `{classes}`."
        )
