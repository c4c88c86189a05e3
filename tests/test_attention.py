"""Attention: the eager specification against naive loops, every other implementation against eager."""

import copy
import importlib.util
import shutil

import pytest
import reference
import torch
from reference import assert_gradients_near, assert_near, assert_outputs_near, gradients_of, real_outputs, weighted_sum
from tiny import MODELS, OPTIONS, name_of

from hf_custom.attention import eager_attention_forward, upcast_attention

PADDINGS = [None, "left", "right"]
HALVES = [torch.float16, torch.bfloat16]
BASE_MODEL, CAUSAL_LM = MODELS[:2]
# The host compiles flex attention even on the CPU, where it has no backward pass.
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention needs a C++ compiler")
needs_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash_attn is not installed")

# Query and key lengths: a whole sequence, a chunk after cached tokens, one token after cached tokens, one token.
LENGTHS = [(7, 7), (3, 8), (1, 9), (1, 1)]
# Real keys by row, of at most nine: all, the first ones, the last ones.
PADDED = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 3 + [1] * 6]).bool()


def draw_states(query_length, key_length, batch=1, dtype=torch.float32, scale=1.0):
    """Queries (B, H, T, K), keys and values (B, H, S, K) of two heads of size six."""
    lengths = (query_length, key_length, key_length)
    return [(scale * torch.randn(batch, 2, length, 6)).to(dtype).requires_grad_() for length in lengths]


def additive(allowed, dtype=torch.float32):
    """The mask (B, 1, T, S) that the host makes of permissions (B, T, S)."""
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_eager_matches_naive_and_grad(dtype, tolerance, lengths, scaling):
    states = draw_states(*lengths, batch=len(PADDED), dtype=dtype)
    allowed = reference.allowed_keys(lengths[0], PADDED[:, : lengths[1]])
    is_real = allowed.any(-1)  # A query of padding may see nothing: nothing is said of its output.
    output, weights = eager_attention_forward(torch.nn.Module(), *states, additive(allowed, dtype), scaling=scaling)
    expected, expected_weights = reference.attention(*states, allowed, 6**-0.5 if scaling is None else scaling)
    output, expected = output[is_real], expected[is_real]
    assert_near(output, expected, tolerance)
    assert_near(weights.transpose(1, 2)[is_real], expected_weights.transpose(1, 2)[is_real], tolerance)
    gradients = torch.autograd.grad(weighted_sum({"": output}), states)
    expected_gradients = torch.autograd.grad(weighted_sum({"": expected}), states)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_near(gradient, expected_gradient, tolerance)


def test_eager_without_mask_attends_everywhere():
    states = draw_states(3, 5)
    allowed = reference.allowed_keys(3, torch.ones(1, 5), is_causal=False)
    output, _ = eager_attention_forward(torch.nn.Module(), *states, None)
    assert_near(output, reference.attention(*states, allowed, 6**-0.5)[0], 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("upcast", [False, True])
def test_eager_row_without_allowed_key_is_finite(upcast, dtype):
    allowed = torch.zeros(1, 3, 5, dtype=torch.bool)
    output, weights = eager_attention_forward(
        torch.nn.Module(), *draw_states(3, 5, dtype=dtype), additive(allowed, dtype), upcast=upcast
    )
    assert output.isfinite().all() and weights.isfinite().all()


def test_eager_drops_weights_in_training_only():
    states, module = draw_states(40, 40), torch.nn.Module()
    _, kept = eager_attention_forward(module.eval(), *states, None, dropout=0.25)
    _, dropped = eager_attention_forward(module.train(), *states, None, dropout=0.25)
    _, expected = eager_attention_forward(module.eval(), *states, None)
    assert torch.equal(kept, expected)
    is_dropped = dropped == 0
    assert 0.2 < is_dropped.float().mean() < 0.3
    assert_near(dropped[~is_dropped], expected[~is_dropped] / 0.75, 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_upcast_eager_rounds_weights_only(dtype, autocast):
    states = draw_states(7, 7, dtype=dtype, scale=3.0)
    allowed = reference.allowed_keys(7, torch.ones(1, 7))
    attend = upcast_attention(eager_attention_forward, "eager")
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        output, weights = attend(torch.nn.Module(), *states, additive(allowed, dtype), scaling=0.4)
    expected, expected_weights = reference.attention(*states, allowed, 0.4)
    assert output.dtype == weights.dtype == dtype
    # One rounding of the weights: half a unit in the last place. Then one of each product's sum.
    eps = torch.finfo(dtype).eps
    assert_near(weights, expected_weights, 0.51 * eps)
    assert_near(output, expected, 1.1 * eps)


# --- Implementations, through the models ---


def inputs_of(row, padding):
    inputs = row.inputs(padding=padding)
    if row.index_argument is not None:
        mask = inputs["attention_mask"]
        inputs[row.index_argument] = (mask * torch.arange(mask.shape[-1])).argmax(-1)
    return inputs


CASES = [
    pytest.param(row, option, id=f"{row.name}-{name_of(option)}")
    for row in MODELS
    for option in OPTIONS[row.config_class]
]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("row, option", CASES)
def test_sdpa_matches_eager_and_grad(row, option, padding):
    model, inputs = row.build(**option), inputs_of(row, padding)
    found = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs = real_outputs(model, inputs, output_hidden_states=True)
        found[implementation] = outputs, gradients_of(model, weighted_sum(outputs))
    assert_outputs_near(found["sdpa"][0], found["eager"][0])
    assert_gradients_near(found["sdpa"][1], found["eager"][1])


def overflowing(attn_implementation, dtype, **options):
    """A layer whose scores lie beyond what float16 holds."""
    model = BASE_MODEL.build(n_layer=1, attn_implementation=attn_implementation, **options)
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[:, : 2 * model.config.n_embd] *= 200
    return model.to(dtype)


def attend_in(model, inputs):
    """Queries, keys and values of the only layer, and its output before the last projection, by forward hooks."""
    layer, seen = model.h[0].attn, {}
    layer.c_attn.register_forward_hook(lambda module, args, output: seen.update(projections=output))
    layer.c_proj.register_forward_pre_hook(lambda module, args: seen.update(output=args[0]))
    with torch.no_grad():
        model(**inputs)
    heads = (model.config.n_head, model.config.n_embd // model.config.n_head)
    states = [part.unflatten(-1, heads).transpose(1, 2) for part in seen["projections"].chunk(3, dim=-1)]
    return states, seen["output"].unflatten(-1, heads)


def assert_upcast_attends_as_naive(attn_implementation, dtype, padding):
    model = overflowing(attn_implementation, dtype, reorder_and_upcast_attn=True)
    inputs = BASE_MODEL.inputs(padding=padding)
    mask = inputs["attention_mask"]
    states, output = attend_in(model, inputs)
    assert (states[0].float() @ states[1].float().transpose(-1, -2)).abs().max() * model.h[0].attn.scaling > 2**16
    expected, _ = reference.attention(*states, reference.allowed_keys(mask.shape[1], mask), model.h[0].attn.scaling)
    assert output.dtype == dtype
    # Half a unit in the last place for each of the two roundings, of the weights and of the output.
    assert_near(output[mask.bool()], expected[mask.bool()], 1.1 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_upcast_attends_beyond_range_of_half(attn_implementation, dtype, padding):
    assert_upcast_attends_as_naive(attn_implementation, dtype, padding)


def test_half_attention_overflows_without_upcast():
    _, output = attend_in(overflowing("eager", torch.float16), BASE_MODEL.inputs())
    assert not output.isfinite().all()


@needs_compiler
def test_upcast_flex_attends_beyond_range_of_half():
    assert_upcast_attends_as_naive("flex_attention", torch.float16, "left")


@needs_compiler
@pytest.mark.parametrize("option", [{}, {"reorder_and_upcast_attn": True}, {"position_embedding_type": "rope"}], ids=name_of)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_flex_matches_eager(padding, option):
    model, inputs = CAUSAL_LM.build(**option, attn_implementation="eager"), CAUSAL_LM.inputs(padding=padding)
    expected = real_outputs(model, inputs)
    model.set_attn_implementation("flex_attention")
    assert_outputs_near(real_outputs(model, inputs), expected)


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "attn_implementation, device",
    [
        ("eager", "cpu"),
        ("sdpa", "cpu"),
        pytest.param("sdpa", "cuda", marks=pytest.mark.gpu),
        pytest.param("flash_attention_2", "cuda", marks=[pytest.mark.gpu, needs_flash]),
    ],
)
def test_half_matches_float32_and_grad(attn_implementation, device, dtype, padding, upcast):
    half = CAUSAL_LM.build(reorder_and_upcast_attn=upcast).to(device, dtype)
    single = copy.deepcopy(half).float()
    half.set_attn_implementation(attn_implementation)
    single.set_attn_implementation("eager")
    inputs = {name: tensor.to(device) for name, tensor in CAUSAL_LM.inputs(padding=padding).items()}
    outputs, expected = real_outputs(half, inputs), real_outputs(single, inputs)
    # Some thirty roundings of half a unit in the last place, in both directions, add up to about three units; a
    # gradient has been through twice as many, and sums them over the tokens.
    eps = torch.finfo(dtype).eps
    assert_outputs_near(outputs, expected, 4 * eps)
    expected_gradients = gradients_of(single, weighted_sum(expected))
    assert_gradients_near(gradients_of(half, weighted_sum(outputs)), expected_gradients, 16 * eps)
