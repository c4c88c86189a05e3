"""Attention as the specification states it, and what is done around the host's fast implementations of it.

Every block asks the host's `ALL_ATTENTION_FUNCTIONS` for the function of `config._attn_implementation` and falls back
to `eager_attention_forward` below, which the others are tested against.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    upcast: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(query · keyᵀ · scaling + mask) · value (Vaswani et al. 2017, equation 1).

    Args:
        query: (B, H, T, K); `key` and `value`: (B, H, S, K).
        attention_mask: additive, broadcast to (B, H, T, S), as the host builds it for `eager`.
        scaling: factor of the scores, `K ** -0.5` when `None`.
        upcast: compute scores and softmax in float32, autocast off.

    Returns:
        The output (B, T, H, K) and the attention weights (B, H, T, S), in the type of `value`.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if upcast:
        query, key = query.float(), key.float()
    with torch.autocast(query.device.type, enabled=False) if upcast else nullcontext():
        attn_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
        if attention_mask is not None:
            attn_weights = attn_weights + (_mask_in_float32(attention_mask) if upcast else attention_mask)
        attn_weights = attn_weights.softmax(dim=-1)
    attn_weights = attn_weights.to(value.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2)
    return attn_output, attn_weights


def _mask_in_float32(attention_mask: torch.Tensor) -> torch.Tensor:
    """An additive mask in float32, whose lowest number no score reaches, as scores in float32 reach float16's."""
    is_masked = attention_mask == torch.finfo(attention_mask.dtype).min
    return attention_mask.float().masked_fill(is_masked, torch.finfo(torch.float32).min)


def upcast_attention(attention_interface: Callable, attn_implementation: str) -> Callable:
    """The same attention with scores and softmax in float32, whatever the implementation.

    The flash kernels hold both in float32 already and take no float32 input, so they are returned as they are.
    """
    if attention_interface is eager_attention_forward:
        return partial(eager_attention_forward, upcast=True)
    if "flash" in attn_implementation:
        return attention_interface

    def attend_in_float32(module, query, key, value, attention_mask, **kwargs):
        if isinstance(attention_mask, torch.Tensor) and attention_mask.is_floating_point():
            attention_mask = _mask_in_float32(attention_mask)
        with torch.autocast(query.device.type, enabled=False):
            attn_output, attn_weights = attention_interface(
                module, query.float(), key.float(), value.float(), attention_mask, **kwargs
            )
        return attn_output.to(value.dtype), attn_weights

    return attend_in_float32


__all__ = ["eager_attention_forward", "upcast_attention"]
