"""Products of activations with a weight matrix, each on the fastest of torch's kernels for it on a CPU in float32.

torch sends a float32 product on a CPU to MKL, which on many processors reaches half of what oneDNN does, and runs a
product of one row on one core. A convolution with a 1x1 kernel is the same product and goes to oneDNN; splitting the
weight into a batch of matrices brings all cores to one row. Everything else, devices, types, autocast, takes torch's
own way. The sums are float32 in every case and differ by rounding alone.

Shape letters of this file: N rows, I inputs, O outputs.
"""

from functools import lru_cache

import torch
from torch import nn

from .ops import is_traced

HAS_ONEDNN = torch.backends.mkldnn.is_available()
# Of oneDNN: below, torch itself turns a 1x1 convolution away from it.
FEWEST_ROWS, FEWEST_ENTRIES = 32, 20_480
# Of the split of few rows: below, the weight is in the cache and a second core gains nothing.
MOST_ROWS_TO_SPLIT, SMALLEST_WEIGHT_TO_SPLIT = 8, 2**18
# A kernel of one cell has no holes to dilate; naming some keeps oneDNN in use on a single thread as well.
ONE_CELL = {"dilation": 2}


def _is_ours(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product may take another way than torch's own."""
    return (
        # Too small for either way, which is the cheapest to see.
        (x.numel() > FEWEST_ENTRIES or weight.numel() >= SMALLEST_WEIGHT_TO_SPLIT)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def _use_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        len(x) >= FEWEST_ROWS
        and x.numel() > FEWEST_ENTRIES
        and min(weight.shape) >= FEWEST_ROWS
        and HAS_ONEDNN
        and weight.is_contiguous()
    )


def _split_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    is_training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (
        len(x) <= MOST_ROWS_TO_SPLIT
        and weight.numel() >= SMALLEST_WEIGHT_TO_SPLIT
        and weight.is_contiguous()
        and not is_training
        and not is_traced()
    )


def _as_image(x: torch.Tensor) -> torch.Tensor:
    """(N, I) as one channels-last image of I channels and N x 1 cells, without a copy."""
    return x.contiguous().view(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _as_matrix(image: torch.Tensor) -> torch.Tensor:
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _onednn_times(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (N, I) · weight (I, O) by oneDNN: a transposed convolution stores its weight in this order."""
    return _as_matrix(nn.functional.conv_transpose2d(_as_image(x), weight[..., None, None], bias, **ONE_CELL))


def _onednn_times_transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (N, I) · weight (O, I)ᵀ by oneDNN."""
    return _as_matrix(nn.functional.conv2d(_as_image(x), weight[..., None, None], bias, **ONE_CELL))


class _Product(torch.autograd.Function):
    """x · weight + bias with the weight (I, O), or `is_transposed` (O, I): all three products of training by oneDNN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, is_transposed):
        return (_onednn_times_transposed if is_transposed else _onednn_times)(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.is_transposed = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x:
            grad_x = (_onednn_times if ctx.is_transposed else _onednn_times_transposed)(grad_output, weight)
        if needs_weight:
            rows, columns = (grad_output, x) if ctx.is_transposed else (x, grad_output)
            grad_weight = _onednn_times(rows.t(), columns.contiguous())
        return grad_x, grad_weight, grad_output.sum(0) if needs_bias else None, None


def times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (N, I) · weight (I, O), without a gradient of its own."""
    if _is_ours(x, weight) and _use_onednn(x, weight):
        return _onednn_times(x, weight)
    return torch.mm(x, weight)


def times_transposed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (N, I) · weight (O, I)ᵀ, without a gradient of its own."""
    if _is_ours(x, weight) and _use_onednn(x, weight):
        return _onednn_times_transposed(x, weight)
    return torch.mm(x, weight.t())


def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x (N, I) · weight (I, O) + bias (O,), the map of a Conv1D: (N, O)."""
    if _is_ours(x, weight):
        if _use_onednn(x, weight):
            return _Product.apply(x, weight, bias, False)
        if _split_rows(x, weight):
            return _affine_of_few_rows(x, weight, bias)
    return torch.addmm(bias, x, weight)


def _affine_of_few_rows(x, weight, bias):
    """Each thread sums over its share of the inputs."""
    parts = torch.get_num_threads()
    if parts == 1 or weight.shape[0] % parts:
        return torch.addmm(bias, x, weight)
    if len(x) == 1:
        # A sum of the weight's rows, which `embedding_bag` takes at the speed of memory.
        rows, starts = _row_numbers(len(weight), parts)
        sums = nn.functional.embedding_bag(rows, weight, starts, per_sample_weights=x.reshape(-1), mode="sum")
        return sums.sum(0, keepdim=True).add_(bias)
    sums = torch.bmm(x.view(len(x), parts, -1).transpose(0, 1), weight.view(parts, -1, weight.shape[1]))
    return sums.sum(0) + bias


@lru_cache(maxsize=32)
def _row_numbers(count, parts):
    return torch.arange(count), torch.arange(0, count, count // parts)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (N, I) · weight (O, I)ᵀ + bias (O,), the map of `nn.Linear`: (N, O)."""
    if _is_ours(x, weight):
        if _use_onednn(x, weight):
            return _Product.apply(x, weight, bias, True)
        if _split_rows(x, weight):
            return _linear_of_few_rows(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def _linear_of_few_rows(x, weight, bias):
    """Each thread computes its share of the outputs; what does not divide is computed after them."""
    parts = 16
    even = len(weight) // parts * parts
    blocks = weight[:even].view(parts, -1, weight.shape[1])
    output = torch.bmm(blocks, x.t().expand(parts, -1, -1)).view(even, -1)
    if even < len(weight):
        output = torch.cat((output, weight[even:] @ x.t()))
    output = output.t()
    return output if bias is None else output + bias


def has_hooks(module: nn.Module) -> bool:
    """Whether someone listens to the module's calls."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` is the map of an `nn.Linear` and nothing else: no wrapper, hook or sharded weight."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not has_hooks(module)
        and type(module.weight) in (torch.Tensor, nn.Parameter)
        and module.weight.shape == (module.out_features, module.in_features)
    )


def project(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)` of (..., I), by `linear` where that is the same: (..., O)."""
    if not is_plain_linear(module):
        return module(x)
    return linear(x.reshape(-1, x.shape[-1]), module.weight, module.bias).view(*x.shape[:-1], module.out_features)


__all__ = ["affine", "has_hooks", "is_plain_linear", "linear", "project", "times", "times_transposed"]
