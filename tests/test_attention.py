"""Attention: the eager specification against naive loops, every other implementation against eager."""

import copy
import importlib.util
import shutil

import pytest
import reference
import torch
from reference import assert_gradients_near, assert_near, assert_outputs_near, gradients_of, real_outputs, weighted_sum
from tiny import MODELS, name_of
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_custom.attention import eager_attention_forward, upcast_attention

PADDINGS = [None, "left", "right"]
HALVES = [torch.float16, torch.bfloat16]
BASE_MODEL, CAUSAL_LM = MODELS[:2]
# The host compiles flex attention even on the CPU, where it has no backward pass.
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
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
@pytest.mark.parametrize("dtype", HALVES, ids=str)
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


def test_upcast_leaves_flash_kernels_alone():
    # They hold the scores in float32 anyway, and take no float32 input.
    assert upcast_attention(eager_attention_forward, "eager") is not eager_attention_forward
    for name in ("flash_attention_2", "flash_attention_3"):
        kernel = object()
        assert upcast_attention(kernel, name) is kernel


# --- Implementations, through the models ---


# Options that have a part in attention.
IN_ATTENTION = (
    "position_embedding_type",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
)
CASES = [
    pytest.param(row, option, id=f"{row.name}-{name_of(option)}")
    for row in MODELS
    for option in row.options
    if all(name in IN_ATTENTION for name in option)
]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("row, option", CASES)
def test_sdpa_matches_eager_and_grad(row, option, padding):
    model, inputs = row.build(**option), row.indexed_inputs(padding)
    found = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs = real_outputs(model, inputs, output_hidden_states=True)
        found[implementation] = outputs, gradients_of(model, weighted_sum(outputs))
    assert_outputs_near(found["sdpa"][0], found["eager"][0])
    assert_gradients_near(found["sdpa"][1], found["eager"][1])


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_rotary_positions_turn_queries_and_keys(padding):
    model = BASE_MODEL.build(
        n_layer=1, position_embedding_type="rope", rope_theta=500.0, attn_implementation="eager", n_positions=4
    )
    inputs = BASE_MODEL.inputs(padding=padding)
    (query, key, value), output = heads_of(model, inputs)
    mask = inputs["attention_mask"]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    query, key = (reference.rotate(states, position_ids, 500.0) for states in (query, key))
    allowed = reference.allowed_keys(mask.shape[1], mask)
    expected, _ = reference.attention(query, key, value, allowed, model.h[0].attn.scaling)
    assert_near(output[mask.bool()], expected[mask.bool()], 2e-6)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_sinusoidal_positions_are_added_to_embeddings(padding):
    model, inputs = BASE_MODEL.build(position_embedding_type="sinusoidal"), BASE_MODEL.inputs(padding=padding)
    states = model(**inputs, output_hidden_states=True).hidden_states[0]
    mask = inputs["attention_mask"]
    expected = model.wte(inputs["input_ids"]) + reference.sinusoids(mask.cumsum(-1) - 1, model.config.n_embd)
    assert_near(states[mask.bool()], expected[mask.bool()], 2e-6)


def sharpened(attn_implementation, dtype, **options):
    """One layer whose scores half precision cannot hold: beyond float16's range, or amid bfloat16's wide steps."""
    model = BASE_MODEL.build(n_layer=1, attn_implementation=attn_implementation, **options)
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[:, : 2 * model.config.n_embd] *= 200 if dtype == torch.float16 else 6
    return model.to(dtype)


def heads_of(model, inputs):
    """Queries, keys and values (B, H, T, K) of the only layer, and its output (B, T, H, K), by hooks."""
    layer, seen = model.h[0].attn, {}
    layer.c_attn.register_forward_hook(lambda module, args, output: seen.update(projections=output))
    layer.c_proj.register_forward_pre_hook(lambda module, args: seen.update(output=args[0]))
    with torch.no_grad():
        model(**inputs)
    heads = (model.config.n_head, model.config.n_embd // model.config.n_head)
    states = [part.unflatten(-1, heads).transpose(1, 2) for part in seen["projections"].chunk(3, dim=-1)]
    return states, seen["output"].unflatten(-1, heads)


def attention_error(model, inputs):
    """Largest difference of the layer's attention from the naive one, in roundings of its type."""
    (query, key, value), output = heads_of(model, inputs)
    mask = inputs["attention_mask"]
    allowed = reference.allowed_keys(mask.shape[1], mask)
    expected, _ = reference.attention(query, key, value, allowed, model.h[0].attn.scaling)
    difference = (output - expected)[mask.bool()].abs().max() / expected[mask.bool()].abs().max()
    return difference.item() / (0.5 * torch.finfo(output.dtype).eps)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_upcast_attends_as_naive_where_half_cannot(attn_implementation, dtype, padding):
    model = sharpened(attn_implementation, dtype, reorder_and_upcast_attn=True)
    inputs = BASE_MODEL.inputs(padding=padding)
    # Two roundings, of the weights and of the output.
    assert attention_error(model, inputs) <= 2.2
    plain = sharpened("eager", dtype, reorder_and_upcast_attn=False)
    assert not attention_error(plain, inputs) <= 4


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_upcast_hands_float32_to_any_implementation(dtype, upcast):
    seen = set()

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.update({query.dtype, key.dtype, value.dtype, torch.is_autocast_enabled("cpu")})
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model = BASE_MODEL.build(attn_implementation="spy", reorder_and_upcast_attn=upcast).to(dtype)
    inputs = BASE_MODEL.inputs(padding="left")
    with torch.autocast("cpu", dtype=dtype):
        assert model(**inputs).last_hidden_state.isfinite().all()
    assert seen == ({torch.float32, False} if upcast else {dtype, True})


@needs_compiler
def test_upcast_flex_attends_as_naive_where_half_cannot():
    model = sharpened("flex_attention", torch.float16, reorder_and_upcast_attn=True)
    assert attention_error(model, BASE_MODEL.inputs(padding="left")) <= 2.2


@needs_compiler
@pytest.mark.parametrize(
    "option", [{}, {"reorder_and_upcast_attn": True}, {"position_embedding_type": "rope"}], ids=name_of
)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_flex_matches_eager(padding, option):
    model, inputs = CAUSAL_LM.build(**option, attn_implementation="eager"), CAUSAL_LM.inputs(padding=padding)
    expected = real_outputs(model, inputs)
    model.set_attn_implementation("flex_attention")
    assert_outputs_near(real_outputs(model, inputs), expected)


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "attn_implementation, device",
    [
        ("eager", "cpu"),
        ("sdpa", "cpu"),
        pytest.param("sdpa", "cuda", marks=[pytest.mark.gpu, needs_gpu]),
        pytest.param("flash_attention_2", "cuda", marks=[pytest.mark.gpu, needs_gpu, needs_flash]),
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
