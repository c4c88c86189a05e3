"""Dropout: the share of what is dropped, and attention with dropout against float64 under the same masks."""

import math

import pytest
import reference
import torch
from reference import assert_near

from hf_custom import attention
from hf_custom.attention import QUERY_BLOCK, fused_attention
from hf_custom.dropout import STEPS, Dropout, keep_mask

# --- Masks ---

COUNT = 2**18


def assert_share(mask, p):
    """Within five standard deviations of a fair draw."""
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs((~mask).double().mean().item() - p) <= 5 * deviation


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
def test_mask_drops_its_share_in_every_lane(p):
    mask, scale = keep_mask((COUNT,), p)
    rounded = round(p * STEPS) / STEPS
    assert abs(scale * (1 - rounded) - 1) < 1e-15
    assert_share(mask, rounded)
    # Four entries share a draw of 64 bits: the highest of them has the sign.
    for lane in range(4):
        assert_share(mask[lane::4], rounded)


def test_lanes_are_independent():
    dropped = ~keep_mask((COUNT,), 0.5)[0].view(-1, 4)
    for lane in range(4):
        for other in range(lane):
            assert_share(~(dropped[:, lane] & dropped[:, other]), 0.25)
        assert_share(~(dropped[1:, lane] & dropped[:-1, lane]), 0.25)


@pytest.mark.parametrize(
    ("p", "is_kept", "scale"), [(0.0, True, 1.0), (1e-9, True, 1.0), (1.0, False, STEPS), (1 - 1e-9, False, STEPS)]
)
def test_mask_of_an_extreme_chance(p, is_kept, scale):
    mask, found = keep_mask((1000,), p)
    assert mask.dtype == torch.bool and mask.all() == is_kept and mask.any() == is_kept
    assert found == scale


@pytest.mark.parametrize("p", [1 / STEPS, 1 - 1 / STEPS])
def test_rarest_and_most_frequent_drop(p):
    mask, scale = keep_mask((2**22,), p)
    assert 0 < mask.sum() < mask.numel()
    assert_share(mask, p)
    assert scale == 1 / (1 - p)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 4), (0,), (4, 0, 2)], ids=str)
def test_mask_has_any_shape_and_repeats_with_the_seed(shape):
    torch.manual_seed(3)
    mask, _ = keep_mask(shape, 0.5)
    torch.manual_seed(3)
    assert mask.shape == shape and torch.equal(keep_mask(shape, 0.5)[0], mask)


def test_masks_differ_from_draw_to_draw_and_seed_to_seed():
    torch.manual_seed(3)
    first, second = keep_mask((1000,), 0.5)[0], keep_mask((1000,), 0.5)[0]
    torch.manual_seed(4)
    third = keep_mask((1000,), 0.5)[0]
    for one, other in ((first, second), (first, third), (second, third)):
        assert 0.3 < (one == other).float().mean() < 0.7


# --- The layer ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_layer_applies_mask_and_scale_and_grad(p, dtype):
    layer, x = Dropout(p), torch.randn(33, 65).to(dtype).requires_grad_()
    torch.manual_seed(5)
    output = layer(x)
    torch.manual_seed(5)
    mask, scale = keep_mask(x.shape, p)
    assert output.dtype == dtype and torch.equal(output == 0, ~mask)
    eps = torch.finfo(dtype).eps
    assert_near(output, x.double() * mask * scale, eps)
    upstream = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(output, x, upstream)
    assert gradient.dtype == dtype
    assert_near(gradient, upstream.double() * mask * scale, eps)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_layer_keeps_the_mean(p):
    output = Dropout(p)(torch.ones(COUNT))
    assert abs(output.double().mean() - 1) <= 5 * math.sqrt(p / (1 - p) / COUNT)


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0)], ids=["eval", "no chance"])
def test_layer_that_drops_nothing_is_the_identity(layer):
    x = torch.randn(5, 7)
    state = torch.get_rng_state()
    assert torch.equal(layer(x), x) and torch.equal(torch.get_rng_state(), state)


def test_layer_that_drops_everything_gives_zeros():
    x = torch.randn(5, 7, requires_grad=True)
    output = Dropout(1.0)(x)
    assert torch.equal(output, torch.zeros(5, 7))
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.zeros(5, 7))


# --- Attention ---


def draw_states(query_length, key_length, batch=3, dtype=torch.float32):
    lengths = (query_length, key_length, key_length)
    return [torch.randn(batch, 2, length, 6).to(dtype).requires_grad_() for length in lengths]


def key_mask(key_length):
    """Keys of three rows: all, the first ones, the last ones."""
    columns = torch.arange(key_length)
    rows = [columns >= 0, columns < key_length - key_length // 3, columns >= key_length // 2]
    return torch.stack(rows)[:, None, None]


def full_mask(query_length, key_length):
    return torch.rand(3, 1, query_length, key_length) < 0.6


# Queries, keys, causal, mask; a block is 64 queries.
CASES = {
    "causal": (70, 70, True, None),
    "causal in whole blocks": (128, 128, True, None),
    "causal of one token": (1, 1, True, None),
    "causal with keys masked": (70, 70, True, key_mask(70)),
    "full": (70, 70, False, None),
    "more keys": (5, 90, False, None),
    "fewer keys": (130, 9, False, None),
    "keys masked": (70, 41, False, key_mask(41)),
    "pairs masked": (70, 41, False, "pairs"),
    "causal with pairs masked": (66, 66, True, "pairs"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def prepare(case, dtype=torch.float32):
    """States, mask, whether causal, and the permissions (B, 1, T, S)."""
    query_length, key_length, is_causal, mask = case
    mask = full_mask(query_length, key_length) if isinstance(mask, str) else mask
    allowed = torch.ones(3, 1, query_length, key_length, dtype=torch.bool)
    allowed = allowed if mask is None else allowed & mask
    allowed = allowed.tril() if is_causal else allowed
    return draw_states(query_length, key_length, dtype=dtype), mask, is_causal, allowed


def replayed_masks(seed, query, key, is_causal, p):
    """The masks that a call with this seed draws, block by block, as one (B, H, T, S), and their scale."""
    torch.manual_seed(seed)
    kept, scale = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool), 1.0
    for start in range(0, query.shape[2], QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, query.shape[2])
        seen = end if is_causal else key.shape[2]
        kept[:, :, start:end, :seen], scale = keep_mask((*query.shape[:2], end - start, seen), p)
    return kept, scale


def dropped_attention(query, key, value, allowed, kept, scale, scaling):
    """softmax(query · keyᵀ · scaling) · kept · scale · value in float64; zeros for a query without keys."""
    query, key, value = query.double(), key.double(), value.double()
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~allowed, -1e300)
    weights = scores.softmax(-1) * allowed.any(-1, keepdim=True)
    return (weights * kept * scale) @ value


def test_naive_dropped_attention_is_the_reference():
    states, _, _, allowed = prepare((5, 7, False, "pairs"))
    found = dropped_attention(*states, allowed, torch.ones(3, 2, 5, 7), 1.0, 0.3)
    assert_near(found.transpose(1, 2), reference.attention(*states, allowed[:, 0], 0.3)[0], 1e-14)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
@each_case
def test_attention_equals_float64_under_the_same_mask_and_grad(case, dropout, scaling):
    states, mask, is_causal, allowed = prepare(case)
    torch.manual_seed(7)
    output = fused_attention(*states, mask, dropout, is_causal, scaling)
    kept, scale = replayed_masks(7, *states[:2], is_causal, dropout)
    expected = dropped_attention(*states, allowed, kept, scale, 6**-0.5 if scaling is None else scaling)
    assert_near(output, expected, 2e-6)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, states, upstream)
    expected = torch.autograd.grad(expected, states, upstream.double())
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert_near(gradient, expected_gradient, 2e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@each_case
def test_attention_of_bfloat16_equals_naive_and_grad(case, dropout):
    """Products of bfloat16 round scores, weights and results, a few times half a unit in the last place each."""
    states, mask, is_causal, allowed = prepare(case, torch.bfloat16)
    torch.manual_seed(7)
    output = fused_attention(*states, mask, dropout, is_causal)
    assert "BlockAttention" in str(output.grad_fn) and output.dtype == torch.bfloat16
    kept, scale = torch.ones(*states[0].shape[:3], states[1].shape[2]), 1.0
    if dropout:
        kept, scale = replayed_masks(7, *states[:2], is_causal, dropout)
    expected = dropped_attention(*states, allowed, kept, scale, 6**-0.5)
    eps = torch.finfo(torch.bfloat16).eps
    assert_near(output, expected, 2 * eps)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, states, upstream)
    expected = torch.autograd.grad(expected, states, upstream.double())
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert_near(gradient, expected_gradient, 2 * eps)


@pytest.mark.parametrize("mask", ["keys", "pairs"])
def test_query_without_keys_gets_zeros_and_finite_gradients(mask):
    states = draw_states(70, 70)
    allowed = torch.ones(3, 1, 1 if mask == "keys" else 70, 70, dtype=torch.bool)
    allowed[1] = False
    output = fused_attention(*states, allowed, 0.3)
    assert torch.equal(output[1], torch.zeros(2, 70, 6)) and output[0].any()
    gradients = torch.autograd.grad(output, states, torch.randn_like(output))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not any(gradient[1].any() for gradient in gradients)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@torch.no_grad()
def test_attention_has_the_mean_of_no_dropout(is_causal):
    states, runs = draw_states(70, 70, batch=1), 600
    expected = fused_attention(*states, is_causal=is_causal)
    outputs = torch.stack([fused_attention(*states, None, 0.2, is_causal) for _ in range(runs)]).double()
    errors = (outputs.mean(0) - expected).abs() / (outputs.std(0) / math.sqrt(runs) + 1e-9)
    # 840 entries, of which a fair draw leaves none beyond six deviations.
    assert errors.max() < 6 and outputs.std(0).min() > 0


def test_attention_repeats_with_the_seed_and_leaves_inputs_alone():
    states = [state.detach() for state in draw_states(70, 70)]
    before = [state.clone() for state in states]
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(fused_attention(*states, key_mask(70), 0.2))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert all(torch.equal(state, old) for state, old in zip(states, before, strict=True))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_size_of_blocks_does_not_matter_without_a_drop(is_causal, monkeypatch):
    """A chance that rounds to none goes through the blocks."""
    states, expected = draw_states(23, 23), None
    for block in (64, 23, 22, 5, 1):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        output = fused_attention(*states, None, 1e-9, is_causal)
        gradients = torch.autograd.grad(output, states, torch.ones_like(output))
        if expected is None:
            plain = fused_attention(*states, is_causal=is_causal)
            expected = plain, *torch.autograd.grad(plain, states, torch.ones_like(output))
        for found, tensor in zip((output, *gradients), expected, strict=True):
            assert_near(found, tensor, 2e-6)
