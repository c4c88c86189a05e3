"""Layers that the models share."""

import difflib

import torch
from torch import nn
from transformers import pytorch_utils
from transformers.activations import ACT2FN

from .matmul import affine


class Conv1D(pytorch_utils.Conv1D):
    """Affine map with its weight stored (in, out), as OpenAI's GPT and GPT-2 store it: (..., nx) -> (..., nf).

    A subclass of the host's, so that PEFT and the quantizers know it.

    Args:
        nf: number of output features.
        nx: number of input features.
        is_residual_projection: the output joins the residual stream, so the weight starts smaller by the square root
            of the number of residual layers (Radford et al. 2019, section 2.3).
    """

    def __init__(self, nf: int, nx: int, is_residual_projection: bool = False):
        super().__init__(nf, nx)
        self.is_residual_projection = is_residual_projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return affine(x.reshape(-1, self.nx), self.weight, self.bias).view(*x.shape[:-1], self.nf)


def get_activation(name: str, field: str) -> nn.Module:
    """The host's activation of that name; `gelu_new` (Hendrycks and Gimpel 2016, tanh form) as torch's one kernel.

    Raises:
        ValueError: naming the configuration's `field`, for a name that the host does not know.
    """
    if name not in ACT2FN:
        close = difflib.get_close_matches(name, list(ACT2FN), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(ACT2FN))}."
        raise ValueError(f"`{field}` {name!r} is unknown.{hint}")
    return ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]


__all__ = ["Conv1D", "get_activation"]
