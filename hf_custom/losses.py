"""Losses as pure functions of tensors.

Each divides by `num_items_in_batch` when the caller counted the items of all accumulated micro-batches, and by its own
count otherwise, so that accumulation over k steps gives the gradient of the large batch.
"""

from itertools import pairwise

import torch
from torch import nn

from .matmul import is_plain_linear, project, times, times_transposed
from .ops import is_traced, keep_positions, padding_of

# Rows of hidden states whose logits are in memory together, by default. A CPU works from its cache, and in half
# precision adds to the float32 gradient as long as it multiplies, so that it should do so less often. An accelerator
# needs large products; 4,096 rows of 50,257 float32 logits are 0.8 GB.
CHUNK_SIZE_OF_CPU = 256
CHUNK_SIZE_OF_CPU_IN_HALF = 512
CHUNK_SIZE_OF_ACCELERATORS = 4096
# Columns of a chunk that a CPU computes at a time: fresh memory beyond some tens of megabytes costs more than the sums.
VOCABULARY_BLOCK_OF_CPU = 2048


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


def next_token_labels(
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """For each position (..., T) the token to predict there: the label after it; none at the end and at padding.

    Padding has no context to predict from. What stock makes of it differs from one attention implementation to the
    next.

    Args:
        attention_mask: (..., S) of zeros and ones, whose last T columns are those of `labels`; its leading axes may be
            one. Another is not read.
        shift_labels: labels (..., T) that are shifted already, as the host passes them under sequence parallelism.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    is_padding = padding_of(attention_mask, labels.shape)
    if is_padding is None:
        return shift_labels
    return shift_labels.masked_fill(is_padding.to(shift_labels.device), ignore_index)


def logits_and_loss(
    model: nn.Module,
    head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.LongTensor | None,
    vocab_size: int,
    logits_to_keep: int | torch.Tensor = 0,
    return_logits: bool | None = None,
    shift_labels: torch.LongTensor | None = None,
    parts: tuple[nn.Module, nn.Module] | None = None,
    **kwargs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What a language model's `head` makes of its states, each of the two `None` where it is not wanted.

    Training with labels computes no logits, unless `return_logits` or a loss that the user has set asks for them.

    Args:
        model: whose `loss_function`, mode and `loss_chunk_size` hold.
        hidden_states: (..., T, D).
        labels: (..., T), -100 where nothing is to be predicted.
        logits_to_keep: compute logits for the last so many positions only (0: all), or for those indices.
        shift_labels: the labels moved to the positions that predict them, where `labels` are not there already.
        parts: the two modules of which `head` consists, where it is more than a projection: the first is called on
            labelled rows alone while the loss is computed without logits.
        kwargs: of the loss: `num_items_in_batch`, `label_smoothing`, `z_loss`.

    Returns:
        logits (..., T or fewer, V) and the loss, a scalar.
    """
    if return_logits is None:
        return_logits = labels is None or not model.training
    logits = project(head, keep_positions(hidden_states, logits_to_keep)) if return_logits else None
    if labels is None:
        return logits, None
    labels = labels.to(hidden_states.device)
    has_all = logits is not None and logits.shape[:-1] == labels.shape
    is_plain = not (kwargs.get("label_smoothing") or kwargs.get("z_loss"))
    if hasattr(model, "_loss_function") or (has_all and is_plain):
        # A loss that the user has set reads logits; and logits at hand are not computed again.
        logits = project(head, hidden_states) if logits is None else logits
        named = {} if shift_labels is None else {"shift_labels": shift_labels}
        return logits, model.loss_function(logits, labels, vocab_size=vocab_size, **named, **kwargs)
    rows, targets = hidden_states.flatten(end_dim=-2), (labels if shift_labels is None else shift_labels).flatten()
    if parts is not None:
        transform, head = parts
        if not is_traced():
            labelled = (targets != -100).nonzero().squeeze(-1)
            rows, targets = rows.index_select(0, labelled), targets[labelled]
        rows = transform(rows)
    return logits, linear_cross_entropy(rows, head, targets, chunk_size=model.config.loss_chunk_size, **kwargs)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **kwargs,
) -> torch.Tensor:
    """Cross-entropy of the logits `head(hidden_states)` without holding them: O(chunk_size · V) memory.

    Only labelled rows are projected, chunk by chunk; each chunk's gradient is taken while its logits are there, so that
    nothing is computed twice. Sums are float32 whatever the types of states and weight.

    Args:
        hidden_states: (N, D).
        head: the projection to V classes, any module. A plain `nn.Linear` takes the path described; another one (LoRA,
            quantized, sharded) is called on each chunk, twice.
        labels: (N,) class indices; `ignore_index` for rows that do not count.
        num_items_in_batch: divisor of the sum; the number of labelled rows when `None`.
        chunk_size: rows whose logits are in memory together; chosen by device when `None`.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7).
        z_loss: weight of the squared log-partition function (Chowdhery et al. 2022, "PaLM", section 5).

    Returns:
        A float32 scalar; NaN when no row is labelled and no count was given, as `cross_entropy`.
    """
    if chunk_size is None:
        chunk_size = CHUNK_SIZE_OF_ACCELERATORS
        if hidden_states.device.type == "cpu":
            is_full = _compute_dtype(hidden_states) == torch.float32
            chunk_size = CHUNK_SIZE_OF_CPU if is_full else CHUNK_SIZE_OF_CPU_IN_HALF
    if chunk_size <= 0:
        raise ValueError(f"`chunk_size` is {chunk_size} but at least one row is computed at a time. Use 256, say.")
    labels = labels.to(hidden_states.device)
    if not is_traced():
        labelled = (labels != ignore_index).nonzero().squeeze(-1)
        if len(labelled) < len(labels):
            hidden_states, labels = hidden_states.index_select(0, labelled), labels[labelled]
    options = (chunk_size, ignore_index, label_smoothing, z_loss)
    if is_plain_linear(head) and not is_traced():
        total = _LinearCrossEntropy.apply(hidden_states, head.weight, head.bias, labels, *options)
    else:
        total = _cross_entropy_by_calls(hidden_states, head, labels, *options)
    if num_items_in_batch is None:
        return total / (labels != ignore_index).sum()
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


def _row_losses(logits, labels, ignore_index, label_smoothing, z_loss):
    """Sum of the losses of a chunk from its logits (C, V), the specification of the class below."""
    loss = nn.functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * (labels != ignore_index)).sum()
    return loss


def _cross_entropy_by_calls(hidden_states, head, labels, chunk_size, *options):
    """The sum of the losses with `head` called on each chunk, and again in the backward pass."""

    def chunk_loss(rows, row_labels):
        return _row_losses(head(rows).float(), row_labels, *options)

    total = hidden_states.new_zeros((), dtype=torch.float32)
    for rows, row_labels in zip(hidden_states.split(chunk_size), labels.split(chunk_size), strict=True):
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            total = total + torch.utils.checkpoint.checkpoint(chunk_loss, rows, row_labels, use_reentrant=False)
        else:
            total = total + chunk_loss(rows, row_labels)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses, with the gradients taken on the way."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, *options):
        ctx.options = (_compute_dtype(hidden_states), *options)
        ctx.save_for_backward(hidden_states, weight, bias, labels)
        total, ctx.gradients = _sum_and_gradients(
            hidden_states, weight, bias, labels, *ctx.options, needs=ctx.needs_input_grad[:3]
        )
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        inputs = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # A second pass over a retained graph: the first one took the gradients with it.
            _, gradients = _sum_and_gradients(*inputs, *ctx.options, needs=ctx.needs_input_grad[:3])
        scaled = [
            None if gradient is None else gradient.mul_(grad_output).to(tensor.dtype)
            for gradient, tensor in zip(gradients, inputs[:3], strict=True)
        ]
        return (*scaled, *[None] * 5)


def _compute_dtype(tensor):
    """The type of products: that of autocast, where it is on."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _sum_and_gradients(
    hidden_states, weight, bias, labels, dtype, chunk_size, ignore_index, label_smoothing, z_loss, needs
):
    """The sum of the losses and its gradients in float32 by (hidden_states, weight, bias), or `None`."""
    device, vocab_size = weight.device, len(weight)
    block = VOCABULARY_BLOCK_OF_CPU if device.type == "cpu" else vocab_size
    bounds = list(pairwise([*range(0, vocab_size, block), vocab_size]))
    weight = weight.detach().to(dtype)
    total = torch.zeros((), dtype=torch.float32, device=device)
    float32 = {"dtype": torch.float32, "device": device}
    grad_hidden = torch.zeros(hidden_states.shape, **float32) if needs[0] else None
    # Written by the first chunk; without any, nothing is labelled.
    grad_weight = (torch.empty if len(labels) else torch.zeros)(weight.shape, **float32) if needs[1] else None
    grad_bias = torch.zeros(vocab_size, **float32) if bias is not None and needs[2] else None

    for start in range(0, len(labels), chunk_size):
        chunk = slice(start, start + chunk_size)
        states, targets = hidden_states[chunk].detach().to(dtype), labels[chunk]
        counts = (targets != ignore_index).float()
        targets = targets.clamp(min=0)
        logits = []
        for first, last in bounds:
            part = times_transposed(states, weight[first:last]).float()
            logits.append(part if bias is None else part.add_(bias[first:last]))

        # log-sum-exp; the logits become their exponentials on the way.
        highest = torch.stack([part.amax(-1) for part in logits]).amax(0)
        target_logits, sums, mean_logits = highest.new_zeros(len(states)), 0.0, 0.0
        for (first, last), part in zip(bounds, logits, strict=True):
            columns, is_inside = _columns_of(targets, first, last)
            target_logits += part.gather(1, columns[:, None]).squeeze(1) * is_inside
            if label_smoothing:
                mean_logits = mean_logits + part.sum(-1) / vocab_size
            sums = sums + part.sub_(highest[:, None]).exp_().sum(-1)
        partition = sums.log() + highest
        losses = partition - (1 - label_smoothing) * target_logits - label_smoothing * mean_logits
        total += ((losses + z_loss * partition.square()) * counts).sum()
        if not any(needs):
            continue

        # d loss / d logit = softmax · (1 + 2 · z_loss · partition) - target distribution.
        scale = counts * (1 + 2 * z_loss * partition) / sums
        for (first, last), part in zip(bounds, logits, strict=True):
            columns, is_inside = _columns_of(targets, first, last)
            part.mul_(scale[:, None])
            if label_smoothing:
                part.sub_((label_smoothing / vocab_size * counts)[:, None])
            part.scatter_add_(1, columns[:, None], ((label_smoothing - 1) * counts * is_inside)[:, None])
            if grad_bias is not None:
                grad_bias[first:last] += part.sum(0)
            part = part.to(dtype)
            if needs[0]:
                grad_hidden[chunk] += times(part, weight[first:last])
            if needs[1]:
                rows, product = grad_weight[first:last], times(part.t(), states)
                rows.copy_(product) if start == 0 else rows.add_(product)
    return total, (grad_hidden, grad_weight, grad_bias)


def _columns_of(targets, first, last):
    """Column of each target in a block of the vocabulary, any where it is not inside, and whether it is."""
    is_inside = (targets >= first) & (targets < last)
    return (targets - first) * is_inside, is_inside


def negative_sampling_loss(
    positive: torch.Tensor, negative: torch.Tensor, negative_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """-Σ log σ(positive) - Σ weight · log σ(-negative) (Mikolov et al. 2013b, equation 4), over all entries.

    Args:
        positive: (P,) scores of words that were there.
        negative: (P, K) scores of noise.
        negative_weights: (P, K), how much each counts.
    """
    noise = nn.functional.logsigmoid(-negative)
    if negative_weights is not None:
        noise = noise * negative_weights
    return -nn.functional.logsigmoid(positive).sum() - noise.sum()


__all__ = [
    "linear_cross_entropy",
    "logits_and_loss",
    "negative_sampling_loss",
    "next_token_labels",
    "sequence_classification_loss",
]
