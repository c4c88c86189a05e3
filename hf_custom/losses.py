"""Losses as pure functions of tensors.

Each divides by `num_items_in_batch` when the caller counted the items of all accumulated micro-batches, and by its own
count otherwise, so that accumulation over k steps gives the gradient of the large batch.
"""

import torch
from torch import nn


def sequence_classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Loss of a classifier of whole sequences.

    Args:
        logits: (B, L) for L labels.
        labels: (B,) class indices, or -100, for `single_label_classification`; (B,) or (B, L) reals for `regression`;
            (B, L) zeros and ones for `multi_label_classification`.
        num_items_in_batch: number of elements of `labels` that count, over all accumulated micro-batches.
    """
    reduction = "mean" if num_items_in_batch is None else "sum"
    if problem_type == "regression":
        loss = nn.functional.mse_loss(logits.view(labels.shape), labels.to(logits.dtype), reduction=reduction)
    elif problem_type == "multi_label_classification":
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction=reduction)
    else:
        loss = nn.functional.cross_entropy(logits.float(), labels.view(-1), reduction=reduction)
    return loss if num_items_in_batch is None else loss / torch.as_tensor(num_items_in_batch, device=loss.device)


__all__ = ["sequence_classification_loss"]
