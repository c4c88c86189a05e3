"""Heads, positions, activation and Conv1D against the naive versions, values and gradients."""

import pytest
import torch
from reference import assert_near, gelu_new, rotate, sinusoids
from transformers import pytorch_utils

from hf_custom.layers import Conv1D, get_activation
from hf_custom.ops import (
    apply_rotary,
    last_attended,
    merge_heads,
    positions_from_mask,
    rotary_positions,
    sinusoidal_positions,
    split_heads,
)

# Masks by row: full, right-padded, left-padded, both, with a hole, empty.
MASK = torch.tensor(
    [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
)


def draw_positions(batch=2, length=7, highest=3000):
    return torch.randint(0, highest, (batch, length))


def test_split_heads_gives_each_head_its_slice():
    states = torch.randn(2, 5, 12)
    heads = split_heads(states, 4)
    assert heads.shape == (2, 3, 5, 4)
    for head in range(3):
        assert torch.equal(heads[:, head], states[..., 4 * head : 4 * head + 4])


def test_merge_heads_undoes_split_heads():
    states = torch.randn(2, 5, 12)
    assert torch.equal(merge_heads(split_heads(states, 4).transpose(1, 2)), states)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32], ids=str)
def test_positions_from_mask_counts_attended_tokens(dtype):
    positions = positions_from_mask(MASK.to(dtype))
    for row, mask in enumerate(MASK):
        count = 0
        for column, is_attended in enumerate(mask):
            if is_attended:
                assert positions[row, column] == count
                count += 1
            # What padding gets is never used, but it must index the table of positions.
            assert positions[row, column] >= 0


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32], ids=str)
def test_last_attended_finds_rightmost_token(dtype):
    assert last_attended(MASK.to(dtype)).tolist() == [4, 2, 4, 3, 4, 0]


@pytest.mark.parametrize("size", [2, 6, 10])
def test_sinusoidal_positions_match_naive(size):
    position_ids = draw_positions()
    # Angles reach the thousands, where float32 resolves 2e-4.
    assert_near(sinusoidal_positions(position_ids, size), sinusoids(position_ids, size), 5e-4)
    small = position_ids % 10
    assert_near(sinusoidal_positions(small, size), sinusoids(small, size), 1e-6)


@pytest.mark.parametrize("size, theta", [(2, 10_000.0), (6, 10_000.0), (10, 500.0)])
def test_apply_rotary_matches_naive_and_grad(size, theta):
    position_ids = draw_positions(highest=10)
    states = torch.randn(2, 3, 7, size, requires_grad=True)
    weights = torch.randn(2, 3, 7, size)
    actual = apply_rotary(states, *rotary_positions(position_ids, size, theta))
    expected = rotate(states, position_ids, theta)
    assert_near(actual, expected, 1e-6)
    (gradient,) = torch.autograd.grad((actual * weights).sum(), states)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), states)
    assert_near(gradient, expected_gradient, 1e-6)


def test_rotary_scores_depend_on_relative_position_only():
    query, key = torch.randn(2, 1, 1, 1, 8)
    query, key = query.expand(1, 1, 9, 8), key.expand(1, 1, 9, 8)

    def scores(offset):
        angles = rotary_positions(torch.arange(9)[None] + offset, 8, 10_000.0)
        return (apply_rotary(query, *angles) @ apply_rotary(key, *angles).transpose(-1, -2))[0, 0]

    first = scores(0)
    assert_near(scores(20), first, 1e-5)
    for distance in range(-8, 9):
        diagonal = first.diagonal(distance)
        assert_near(diagonal, diagonal[:1].expand_as(diagonal), 1e-5)
    assert not torch.allclose(first[0], first[0, :1].expand(9), atol=1e-2)


def test_rotary_keeps_norms_and_position_zero():
    states = torch.randn(2, 3, 7, 8)
    position_ids = draw_positions()
    rotated = apply_rotary(states, *rotary_positions(position_ids, 8, 10_000.0))
    assert_near(rotated.norm(dim=-1), states.norm(dim=-1), 1e-6)
    still = apply_rotary(states, *rotary_positions(torch.zeros_like(position_ids), 8, 10_000.0))
    assert torch.equal(still, states)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_apply_rotary_rounds_once_in_low_precision(dtype):
    position_ids = draw_positions(highest=10)
    states = torch.randn(2, 3, 7, 8).to(dtype)
    actual = apply_rotary(states, *rotary_positions(position_ids, 8, 10_000.0))
    assert actual.dtype == dtype
    expected = rotate(states, position_ids, 10_000.0)
    # Half a unit in the last place, and a rounding of float32 where two terms cancel.
    assert ((actual - expected).abs() <= 0.51 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_gelu_new_matches_published_formula_and_grad(dtype, tolerance):
    x = torch.linspace(-6, 6, 401, dtype=dtype, requires_grad=True)
    actual, expected = get_activation("gelu_new", "activation_function")(x), gelu_new(x)
    assert_near(actual, expected, tolerance)
    (gradient,) = torch.autograd.grad(actual.sum(), x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    assert_near(gradient, expected_gradient, tolerance)


def test_gelu_new_is_not_exact_gelu():
    x = torch.linspace(-3, 3, 101)
    new, exact = (get_activation(name, "activation_function")(x) for name in ("gelu_new", "gelu"))
    assert (new - exact).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7)])
def test_conv1d_is_affine_map_with_grad(shape):
    layer = Conv1D(5, 7)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(shape, requires_grad=True)
    expected = x.double() @ layer.weight.double() + layer.bias.double()
    actual = layer(x)
    assert_near(actual, expected, 1e-6)
    leaves = [x, layer.weight, layer.bias]
    gradients = torch.autograd.grad(actual.square().sum(), leaves)
    expected_gradients = torch.autograd.grad(expected.square().sum(), leaves)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_near(gradient, expected_gradient, 1e-6)


def test_conv1d_accepts_non_contiguous_input():
    layer = Conv1D(5, 7)
    x = torch.randn(3, 7, 2).transpose(1, 2)
    assert not x.is_contiguous()
    assert_near(layer(x), layer(x.contiguous()), 1e-7)


def test_conv1d_is_known_to_host():
    # PEFT and the quantizers look for this class.
    assert isinstance(Conv1D(5, 7), pytorch_utils.Conv1D)
    assert Conv1D(5, 7).weight.shape == (7, 5)
