"""Dropout (Srivastava et al. 2014), with a CPU's random numbers drawn four at a time.

torch draws one number an entry on one core, which costs a CPU more than the layer that is dropped. Here one draw of 64
bits decides on four entries, 16 bits each; the probability is rounded to 1 / 65,536 and the scale is that of the
rounded one. The numbers come from torch's generator, so that a seed repeats them. Other devices take torch's own way.
"""

import torch
from torch import nn

from .ops import is_traced

STEPS = 2**16


def keep_mask(shape: tuple[int, ...], p: float) -> tuple[torch.Tensor, float]:
    """A boolean mask on the CPU, false with probability `p`, and the factor that keeps the mean."""
    threshold = round(p * STEPS)
    count = torch.Size(shape).numel()
    # From the lowest integer on: `random_()` alone leaves the sign bit empty.
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    mask = (bits >= threshold - STEPS // 2) if threshold < STEPS else torch.zeros(count, dtype=torch.bool)
    return mask.view(shape), STEPS / max(STEPS - threshold, 1)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        mask, ctx.scale = keep_mask(x.shape, p)
        ctx.save_for_backward(mask)
        return torch.mul(x, mask).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad_output):
        (mask,) = ctx.saved_tensors
        return torch.mul(grad_output, mask) * ctx.scale, None


class Dropout(nn.Dropout):
    """`nn.Dropout` with `keep_mask` on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0 or input.device.type != "cpu" or is_traced():
            return super().forward(input)
        return _Dropout.apply(input, self.p)


__all__ = ["Dropout", "keep_mask"]
