"""Learning from pairs of images and texts: who belongs to whom in a batch, over all processes.

The world size is never asked for by a model: these functions gather what they compare, with gradients, so that the mean
of the processes' losses is the loss of their joint batch.
"""

import torch
from torch import distributed, nn


def world_size() -> int:
    """Number of processes that train together; 1 where none were started."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return distributed.get_rank() if world_size() > 1 else 0


class _GatherRows(torch.autograd.Function):
    """The rows of all processes; backward, each has the sum of what all of them found for its own."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.batch = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad_output):
        total = grad_output.contiguous().clone()
        distributed.all_reduce(total)
        return total[rank() * ctx.batch :][: ctx.batch]


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The rows (B, ...) of all processes in the order of their ranks, (world · B, ...), with gradients to each.

    All processes pass the same shape.
    """
    return tensor if world_size() == 1 else _GatherRows.apply(tensor.contiguous())


def mean_over_processes(count: torch.Tensor) -> torch.Tensor:
    """The mean of a number over all processes: dividing sums by it makes the mean of their losses the joint one."""
    if world_size() == 1:
        return count
    count = count.clone().float()
    distributed.all_reduce(count)
    return count / world_size()


def same_text(input_ids: torch.Tensor, all_ids: torch.Tensor) -> torch.Tensor:
    """Which of the texts (B', T) each text (B, T) repeats, as booleans (B, B'); padding has one id everywhere."""
    return (input_ids[:, None] == all_ids[None]).all(-1)


def contrastive_logits(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Similarity of images (B, Q, E), of which the best query counts, and texts (B', E): (B, B').

    Li et al. 2023, "BLIP-2", section 3.2, image-text contrastive learning.
    """
    return torch.einsum("bqe,ce->bcq", image_embeds, text_embeds).amax(-1)


def contrastive_loss(logits: torch.Tensor, is_positive: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of the logits (B, B') with the positives of each row sharing its target evenly.

    Args:
        is_positive: (B, B') booleans, at least one a row.
        label_smoothing: share of the target spread evenly over all.
    """
    targets = is_positive / is_positive.sum(-1, keepdim=True)
    return nn.functional.cross_entropy(logits.float(), targets.float(), label_smoothing=label_smoothing)


@torch.no_grad()
def draw_hard_negatives(logits: torch.Tensor, is_positive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One wrong partner for each row, drawn with the probability softmax(logits) among the wrong ones.

    Li et al. 2021, "Align before Fuse" (ALBEF), section 3.2. The noise is drawn for the rows of all processes, so that
    processes with the same random state draw what one process would for the joint batch.

    Args:
        logits: (B, B'), with B' = world · B.
        is_positive: (B, B'), the partners that are right.

    Returns:
        The columns (B,), and whether a row has any wrong partner, (B,) booleans.
    """
    batch, total = logits.shape
    noise = torch.empty((total, total), device=logits.device).exponential_()[rank() * batch :][:batch]
    # The largest of log-weight minus log of exponential noise is a draw by the weights.
    scores = (logits.float() - noise.clamp(min=1e-30).log()).masked_fill(is_positive, float("-inf"))
    return scores.argmax(-1), ~is_positive.all(-1)


__all__ = [
    "contrastive_logits",
    "contrastive_loss",
    "draw_hard_negatives",
    "gather_rows",
    "mean_over_processes",
    "rank",
    "same_text",
    "world_size",
]
