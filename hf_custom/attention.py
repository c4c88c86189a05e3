"""Attention as the specification states it, and what is done around the host's fast implementations of it.

Every block asks the host's `ALL_ATTENTION_FUNCTIONS` for the function of `config._attn_implementation` and falls back
to `eager_attention_forward` below, which the others are tested against.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .checks import check_head_mask
from .dropout import keep_mask
from .ops import is_traced
from .packing import Buckets, Packing

# Queries whose scores are in memory together, where a CPU does not take torch's own kernel.
QUERY_BLOCK = 64
# Arguments that hold factors of heads: of the one stack, or of the encoder; of the decoder; of that over the encoder.
HEAD_MASKS = ("head_mask", "decoder_head_mask", "cross_attn_head_mask")
# What the host knows `varlen_attention_forward` by.
_NAME = "varlen" if __name__ == "hf_custom.attention" else f"varlen.{__name__}"


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    upcast: bool = False,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(query · keyᵀ · scaling + mask) · value (Vaswani et al. 2017, equation 1).

    Args:
        query: (B, H, T, K); `key` and `value`: (B, H, S, K).
        attention_mask: additive, broadcast to (B, H, T, S), as the host builds it for `eager`.
        scaling: factor of the scores, `K ** -0.5` when `None`.
        upcast: compute scores and softmax in float32, autocast off.
        position_bias: added to the scores, (B, H, T, S).

    Returns:
        The output (B, T, H, K) and the attention weights (B, H, T, S), in the type of `value`.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if upcast:
        query, key = query.float(), key.float()
    with torch.autocast(query.device.type, enabled=False) if upcast else nullcontext():
        attn_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
        if position_bias is not None:
            attn_weights = attn_weights + position_bias
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


def implementation_for(attn_implementation: str) -> str:
    """The implementation to ask the host for: `varlen`, which does all that `sdpa` does, in its place."""
    return _NAME if attn_implementation in ("sdpa", "varlen") else attn_implementation


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    buckets: Callable[[], Buckets] | None = None,
    position_bias: torch.Tensor | Callable | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of sequences packed into one row, each to itself or to its own keys, and to no other.

    On CUDA in half precision torch's `varlen_attn`; else one kernel call for each group of sequences of similar length.
    Without lengths it is the host's `sdpa`, and with dropout or in bfloat16 on a CPU a faster one.

    Args:
        query: (1, H, total, K); `key` and `value`: (1, H, total of the keys, K).
        cu_seq_lens_q, cu_seq_lens_k: (N + 1,), where the queries and the keys of N sequences begin, and the totals. In
            the causal case the last keys of a sequence are those of its queries; as many precede them in each.
        max_length_q, max_length_k: of the longest sequence.
        buckets: gives the groups, shared by all layers of a call.
        position_bias: added to the scores, (1, H, T, S); of packed sequences the function that gives it for a group,
            from queries and keys (count, H, length, K) and the positions of both, (count, length).
        position_ids: (1, total), for that function.

    Returns:
        The output (1, total, H, K), and no weights. A sequence without keys gets zeros.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is None:
        has_boolean_mask = attention_mask is not None and attention_mask.dtype == torch.bool
        is_square = attention_mask is None and (query.shape[2] == key.shape[2] or not is_causal)
        is_plain = position_bias is None and (has_boolean_mask or is_square)
        if is_plain and _takes_blocks(query, attention_mask, dropout):
            is_causal = is_causal and not has_boolean_mask
            output = fused_attention(query, key, value, attention_mask, dropout, is_causal, scaling)
            return output.transpose(1, 2).contiguous(), None
        kwargs |= {"is_causal": is_causal, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout and position_bias is None:
        window = (-1, 0) if is_causal else (-1, -1)
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        output = varlen_attn(query, key, value, *lengths, scale=scaling, window_size=window)
    else:
        groups = buckets() if buckets is not None else Buckets.of(cu_seq_lens_q, cu_seq_lens_k)
        bias = None if position_bias is None else (position_bias, position_ids.squeeze(0))
        output = _attend_in_buckets(query, key, value, groups, scaling, dropout, is_causal, bias)
    return output.unsqueeze(0), None


def _attend_in_buckets(query, key, value, buckets, scaling, dropout, is_causal, bias):
    """(total, H, K) queries over (total of the keys, H, K), group by group; `bias`: a function, and the positions."""
    query = buckets.queries.to_places(query)
    key, value = buckets.keys.to_places(key), buckets.keys.to_places(value)
    groups = buckets.split(query, key, value)
    if bias is not None:
        position_bias, positions = bias
        (positions,) = buckets.split(buckets.queries.to_places(positions))
    outputs = []
    for index, (bucket, *states) in enumerate(zip(buckets.buckets, *groups, strict=True)):
        query, key, value = (rows.transpose(1, 2) for rows in states)
        # Without a mask in the causal case: what is padded to the right of a sequence is in the future of all of it.
        mask = None if is_causal else bucket.key_mask
        prefix = bucket.key_length - bucket.query_length
        if bias is not None:
            scores = position_bias(query, key, positions[index], positions[index])
            mask = _as_mask(scores, bucket.key_mask, is_causal)
        elif is_causal and prefix:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(prefix)
            mask = mask[None, None]
        output = fused_attention(query, key, value, mask, dropout, is_causal and mask is None, scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return buckets.queries.to_tokens(torch.cat(outputs) if len(outputs) > 1 else outputs[0])


def _as_mask(bias, key_mask, is_causal):
    """A bias (B, H, T, S) as the additive mask that also hides padding or what is to come."""
    if is_causal:
        key_mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    return bias if key_mask is None else bias.masked_fill(~key_mask, torch.finfo(bias.dtype).min)


class _BlockAttention(torch.autograd.Function):
    """Attention on a CPU a block of queries at a time, for what torch's own kernel does not do or does slowly.

    That kernel has no dropout and falls back to whole matrices of scores, future keys included, of which three are kept
    for the backward pass; and in bfloat16 its backward pass takes several times as long as these products. Here a
    block's scores are computed up to its last key and again in the backward pass; what is kept is the mask of dropout,
    a byte for each score. Scores and weights have the type of the inputs, float32 for float16; sums are float32.
    """

    @staticmethod
    def forward(ctx, query, key, value, attention_mask, dropout, is_causal, scaling):
        dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
        query, key, value = (states.to(dtype).contiguous() for states in (query * scaling, key, value))
        # Queries may be without a key, whose weights would be NaN.
        has_empty = attention_mask is not None and (is_causal or not bool(attention_mask.any(-1).all()))
        ctx.options = (attention_mask, has_empty, is_causal)
        output = torch.empty_like(query)
        ctx.scale, ctx.scaling, masks = 1.0, scaling, []
        for block, keys in _blocks(query.shape[2], key.shape[2], is_causal):
            weights = _block_weights(query, key, block, keys, *ctx.options)
            if dropout:
                mask, ctx.scale = keep_mask(weights.shape, dropout)
                masks.append(mask)
                weights.mul_(mask)
            output[:, :, block] = torch.matmul(weights, value[:, :, keys])
        ctx.save_for_backward(query, key, value, *masks)
        return output.mul_(ctx.scale) if dropout else output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        query, key, value, *masks = ctx.saved_tensors
        dtype, is_causal = query.dtype, ctx.options[-1]
        grad_output = grad_output.to(dtype).contiguous()
        grad_output = grad_output * ctx.scale if masks else grad_output
        sums = torch.promote_types(dtype, torch.float32)
        grad_key, grad_value = (torch.zeros(states.shape, dtype=sums) for states in (key, value))
        grad_query = torch.empty_like(query)
        blocks = _blocks(query.shape[2], key.shape[2], is_causal)
        for index, (block, keys) in enumerate(blocks):
            weights = _block_weights(query, key, block, keys, *ctx.options)
            grad = grad_output[:, :, block]
            kept = weights * masks[index] if masks else weights
            grad_value[:, :, keys] += torch.matmul(kept.transpose(-1, -2), grad)
            grad_weights = torch.matmul(grad, value[:, :, keys].transpose(-1, -2))
            if masks:
                grad_weights.mul_(masks[index])
            # Through the softmax: weights · (gradient - its mean under the weights).
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, dtype)
            grad_query[:, :, block] = torch.matmul(grad_scores, key[:, :, keys])
            grad_key[:, :, keys] += torch.matmul(grad_scores.transpose(-1, -2), query[:, :, block])
        return grad_query.mul_(ctx.scaling), grad_key.to(dtype), grad_value.to(dtype), None, None, None, None


def _blocks(query_length, key_length, is_causal):
    """Slices of the queries, and of the keys that some query of theirs may see."""
    for start in range(0, query_length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, query_length)
        yield slice(start, end), slice(0, end if is_causal else key_length)


def _block_weights(query, key, block, keys, attention_mask, has_empty, is_causal):
    """Attention weights of a block of scaled queries, zeros for a query without keys."""
    scores = torch.matmul(query[:, :, block], key[:, :, keys].transpose(-1, -2))
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(scores.shape[-1] - scores.shape[-2] + 1)
        scores.masked_fill_(future, float("-inf"))
    if attention_mask is not None:
        rows = block if attention_mask.shape[2] > 1 else slice(None)
        scores.masked_fill_(~attention_mask[:, :, rows, keys], float("-inf"))
    weights = scores.softmax(-1)
    return weights.nan_to_num_(0.0) if has_empty else weights


def _takes_blocks(query, attention_mask, dropout):
    """Whether `_BlockAttention` is the better way."""
    is_boolean = attention_mask is None or attention_mask.dtype == torch.bool
    is_slow = dropout or query.dtype == torch.bfloat16
    return bool(is_slow) and is_boolean and query.device.type == "cpu" and not is_traced()


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scaling: float | None = None,
) -> torch.Tensor:
    """torch's `scaled_dot_product_attention`, and another way where it is slow on a CPU: (B, H, T, K).

    Args:
        query: (B, H, T, K); `key` and `value`: (B, H, S, K).
        attention_mask: booleans, true where a query attends, (B, 1, T or 1, S); or reals to add to the scores; or none.
        is_causal: for T = S.
    """
    if _takes_blocks(query, attention_mask, dropout):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = _BlockAttention.apply(query, key, value, attention_mask, dropout, is_causal, scaling)
        return output.to(value.dtype)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=is_causal, scale=scaling
    )


# --- Heads switched off ---


def layer_head_masks(
    head_mask: torch.Tensor | None,
    layers: nn.ModuleList,
    config,
    shape=(1, 1),
    packing: Packing | None = None,
    name: str = "head_mask",
) -> tuple[torch.Tensor | None, ...]:
    """What each layer multiplies its heads by, (B or 1, T or 1, H, 1); `None` for each without `head_mask`.

    Args:
        head_mask: (H,) for all layers or (L, H): 1 keeps a head, 0 drops it, other reals scale it. Or stock's five axes
            (L, B, H, T, 1), each of them 1 where it makes no difference.
        layers: L of them, of H heads each as `config` says.
        shape: (B, T) of the queries; (1, 1) where a mask cannot tell them apart.
        packing: of that batch, if the layers compute it packed.
        name: of the argument that holds it, for errors.
    """
    num_layers, num_heads = len(layers), config.num_attention_heads
    if head_mask is None:
        return (None,) * num_layers
    check_head_mask(head_mask, num_layers, num_heads, shape, name)
    if head_mask.ndim < 5:
        head_mask = head_mask.expand(num_layers, num_heads)[:, None, :, None, None]
    masks = head_mask.expand(num_layers, -1, num_heads, -1, -1).transpose(2, 3)  # (L, B or 1, T or 1, H, 1)
    if packing is None or tuple(masks.shape[1:3]) == (1, 1):
        return masks.unbind()
    return tuple(packing.unpad(mask.expand(*shape, -1, -1)) for mask in masks)


def mask_heads(
    attn_output: torch.Tensor, attn_weights: torch.Tensor | None, head_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention's output (B, T, H, K) and its weights (B, H, T, S), if any, times the heads' factors.

    The output of a head is linear in its weights, so this is what multiplying these after the softmax gives, with any
    kernel. A factor's gradient is the importance of its head (Michel et al. 2019, "Are Sixteen Heads Really Better than
    One?", equation 3, before the absolute value and the mean).

    Args:
        head_mask: (B or 1, T or 1, H, 1), of `layer_head_masks`.
    """
    if head_mask is None:
        return attn_output, attn_weights
    if head_mask.shape[2] != attn_output.shape[2]:
        raise ValueError(
            f"`head_mask` is of {head_mask.shape[2]} heads, of which this process computes {attn_output.shape[2]}. "
            "Load the model without tensor parallelism to mask heads."
        )
    # Flex attention returns the scores' log-sums (B, H, T) in the place of weights.
    if attn_weights is not None and attn_weights.ndim == 4:
        attn_weights = attn_weights * head_mask.transpose(1, 2).to(attn_weights)
    return attn_output * head_mask.to(attn_output), attn_weights


class RepeatsNoHeads:
    """Mixin of the models that generate: several beams or samples repeat the rows of a batch, but not its layers, which
    come first in a head mask."""

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args, **kwargs):
        masks = {name: kwargs.pop(name) for name in HEAD_MASKS if kwargs.get(name) is not None}
        for name, head_mask in masks.items():
            if head_mask.ndim == 5 and head_mask.shape[1] > 1:
                masks[name] = head_mask.repeat_interleave(expand_size, dim=1)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        return input_ids, {**model_kwargs, **masks}


# In this file because a model on the Hub brings the files that it imports and runs no other code of the package. Such a
# copy, perhaps of another version, serves its own models and not those of the package: it has a name of its own.
for _name in {_NAME, *({"varlen"} - set(ALL_ATTENTION_FUNCTIONS.valid_keys()))}:
    AttentionInterface.register(_name, varlen_attention_forward)
    AttentionMaskInterface.register(_name, sdpa_mask)

__all__ = [
    "RepeatsNoHeads",
    "eager_attention_forward",
    "implementation_for",
    "layer_head_masks",
    "mask_heads",
    "upcast_attention",
    "varlen_attention_forward",
]
