"""BERT with each kind of position against a naive float64 BERT; relative positions on every path of attention."""

import copy
import json
import shutil

import pytest
import reference
import torch
from reference import (
    assert_gradients_near,
    assert_near,
    assert_outputs_near,
    gradients_of,
    weighted_sum,
)
from safetensors.torch import save_file
from tiny import widen
from transformers import BertConfig, BertForMaskedLM, DynamicCache, StaticCache, set_seed
from transformers.models.bert.modeling_bert import BertModel

from hf_custom import CustomBertConfig, CustomBertForMaskedLM, CustomBertModel, attention
from hf_custom.ops import relative_position_scores

FIELDS = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "rope_theta": 50.0,
}
RELATIVE = ["relative_key", "relative_key_query"]
KINDS = [*RELATIVE, "sinusoidal", "rope", "absolute"]
LENGTH = 7
MASKS = {
    "none": None,
    "left": [[1] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "right": [[1] * 7, [1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 1, 1, 1]],
}
# Lengths of the documents of each row.
DOCUMENTS = [[3, 1, 3], [2, 5], [7]]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_relative_kind = pytest.mark.parametrize("kind", RELATIVE)
each_kind_in_attention = pytest.mark.parametrize("kind", [*RELATIVE, "rope"])
each_padding = pytest.mark.parametrize("padding", MASKS)
each_implementation = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
# The host compiles flex attention even on the CPU.
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention needs a C++ compiler")


def build(kind, attn_implementation="sdpa", model_class=CustomBertModel, **fields):
    """The model with wide weights, in evaluation mode."""
    config = CustomBertConfig(**{**FIELDS, "position_embedding_type": kind, **fields})
    return widen(model_class._from_config(config, attn_implementation=attn_implementation)).eval()


def draw_ids(batch=3, length=LENGTH):
    return torch.randint(1, FIELDS["vocab_size"], (batch, length))


def mask_of(padding):
    return torch.ones(3, LENGTH, dtype=torch.long) if MASKS[padding] is None else torch.tensor(MASKS[padding])


def positions_of(mask):
    """Columns, counted from the first real token of each row."""
    positions = torch.zeros_like(mask)
    for b in range(len(mask)):
        first = mask[b].tolist().index(1)
        for t in range(first, mask.shape[1]):
            positions[b, t] = t - first
    return positions


def split(states, heads):
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def naive_states(model, input_ids, position_ids, allowed):
    """Hidden states of a BERT in float64, the embeddings first: attention is a loop over queries and keys."""
    config, embeddings = model.config, model.embeddings
    kind, heads = config.position_embedding_type, config.num_attention_heads
    scaling = (config.hidden_size // heads) ** -0.5
    x = embeddings.word_embeddings.weight[input_ids] + embeddings.token_type_embeddings.weight[0]
    if kind == "absolute":
        x = x + embeddings.position_embeddings.weight[position_ids]
    elif kind == "sinusoidal":
        x = x + reference.sinusoids(position_ids, config.hidden_size)
    states = [embeddings.LayerNorm(x)]
    for layer in model.encoder.layer:
        x, attention = states[-1], layer.attention.self
        query, key, value = (split(part(x), heads) for part in (attention.query, attention.key, attention.value))
        bias = None
        if kind == "rope":
            query, key = (reference.rotate(part, position_ids, config.rope_theta) for part in (query, key))
        elif kind in RELATIVE:
            distances, has_key_term = attention.distance_embedding.weight, kind == "relative_key_query"
            bias = reference.relative_scores(query, key, position_ids, position_ids, distances, has_key_term, scaling)
        output, _ = reference.attention(query, key, value, allowed, scaling, bias)
        x = layer.attention.output.LayerNorm(layer.attention.output.dense(output.flatten(2)) + x)
        inner = torch.nn.functional.gelu(layer.intermediate.dense(x))
        states.append(layer.output.LayerNorm(layer.output.dense(inner) + x))
    return states


def in_float64(model):
    return copy.deepcopy(model).double()


def real(states, is_real):
    return {f"hidden_states.{i}": state[is_real] for i, state in enumerate(states)}


def assert_agrees(model, states, is_real, exact, expected):
    """Hidden states at real positions, and the gradient of every parameter that they depend on."""
    outputs, expected = real(states, is_real), real(expected, is_real)
    assert_outputs_near(outputs, expected)
    gradients, expected = gradients_of(model, weighted_sum(outputs)), gradients_of(exact, weighted_sum(expected))
    assert_gradients_near(gradients, expected)
    return gradients


@pytest.fixture
def packed_calls(monkeypatch):
    """One entry a layer that attends to packed sequences."""
    calls, attend = [], attention._attend_in_buckets
    monkeypatch.setattr(attention, "_attend_in_buckets", lambda *args: calls.append(1) or attend(*args))
    return calls


# --- The formula ---


@pytest.mark.parametrize("has_key_term", [False, True], ids=["key", "key_query"])
@pytest.mark.parametrize("lengths", [(5, 5), (2, 6), (1, 4), (1, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_scores_equal_naive_and_grad(dtype, tolerance, lengths, has_key_term):
    query, key = (torch.randn(2, 3, length, 4, dtype=dtype, requires_grad=True) for length in lengths)
    distances = torch.randn(2 * 9 - 1, 4, dtype=dtype, requires_grad=True)
    # Some are farther apart than the table reaches.
    positions = [torch.randint(0, 12, (2, length)) for length in lengths]
    arguments = (query, key, *positions, distances, has_key_term, 0.3)
    scores, expected = relative_position_scores(*arguments), reference.relative_scores(*arguments)
    assert scores.dtype == dtype
    assert_near(scores, expected, tolerance)
    leaves = (query, key, distances) if has_key_term else (query, distances)
    gradients = torch.autograd.grad(weighted_sum({"": scores}), leaves)
    expected = torch.autograd.grad(weighted_sum({"": expected}), leaves)
    for gradient, exact in zip(gradients, expected, strict=True):
        assert_near(gradient, exact, tolerance)


# --- Through the model ---


# Learned and sinusoidal positions are added to the embeddings: attention has nothing to do with them.
@pytest.mark.parametrize(
    "kind, attn_implementation, padding",
    [
        *(
            (kind, implementation, padding)
            for kind in KINDS[:2]
            for implementation in ("eager", "sdpa")
            for padding in MASKS
        ),
        *((kind, "sdpa", padding) for kind in KINDS[2:] for padding in ("left", "holes")),
        ("rope", "eager", "holes"),
    ],
)
def test_encoder_equals_naive_and_grad(kind, attn_implementation, padding, packed_calls):
    model, input_ids, mask = build(kind, attn_implementation), draw_ids(), mask_of(padding)
    exact, is_real = in_float64(model), mask.bool()
    given = None if padding == "none" else mask
    states = model(input_ids, attention_mask=given, output_hidden_states=True).hidden_states
    allowed = reference.allowed_keys(LENGTH, mask, is_causal=False)
    expected = naive_states(exact, input_ids, positions_of(mask), allowed)
    gradients = assert_agrees(model, states, is_real, exact, expected)
    is_packed = attn_implementation == "sdpa" and padding != "none"
    assert len(packed_calls) == 2 * is_packed
    assert any("distance_embedding" in name for name in gradients) == (kind in RELATIVE)
    if is_packed:
        assert not any(state[~is_real].any() for state in states)


@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
@each_implementation
@each_kind_in_attention
def test_packed_documents_equal_naive_and_grad(kind, attn_implementation, is_decoder, packed_calls):
    model = build(kind, attn_implementation, is_decoder=is_decoder, use_cache=False)
    exact, input_ids = in_float64(model), draw_ids()
    documents = [[i for i, length in enumerate(row) for _ in range(length)] for row in DOCUMENTS]
    position_ids = torch.tensor([[t for length in row for t in range(length)] for row in DOCUMENTS])
    states = model(input_ids, position_ids=position_ids, output_hidden_states=True).hidden_states
    allowed = reference.allowed_keys(LENGTH, torch.ones(3, LENGTH), is_causal=is_decoder)
    for b, row in enumerate(documents):
        for t in range(LENGTH):
            for s in range(LENGTH):
                allowed[b, t, s] &= row[t] == row[s]
    expected = naive_states(exact, input_ids, position_ids, allowed)
    assert_agrees(model, states, torch.ones(3, LENGTH).bool(), exact, expected)
    assert len(packed_calls) == 2 * (attn_implementation == "sdpa")


@pytest.mark.parametrize(("attn_implementation", "padding"), [("eager", "left"), ("sdpa", "left"), ("sdpa", "none")])
@each_kind_in_attention
def test_decoder_equals_naive_and_grad(kind, attn_implementation, padding):
    model = build(kind, attn_implementation, is_decoder=True, use_cache=False)
    exact, input_ids, mask = in_float64(model), draw_ids(), mask_of(padding)
    states = model(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = naive_states(exact, input_ids, positions_of(mask), reference.allowed_keys(LENGTH, mask))
    assert_agrees(model, states, mask.bool(), exact, expected)


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache], ids=["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@each_implementation
@each_kind
@torch.no_grad()
def test_decoder_with_cache_equals_without(kind, attn_implementation, padding, make_cache):
    model = build(kind, attn_implementation, is_decoder=True)
    input_ids, mask = draw_ids(), mask_of(padding)
    expected = model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    options = {"max_cache_len": 8} if make_cache is StaticCache else {}
    past_key_values, end, found = make_cache(config=model.config, **options), 0, []
    for tokens in input_ids.split([4, 1, 2], dim=1):
        end += tokens.shape[1]
        outputs = model(tokens, attention_mask=mask[:, :end], past_key_values=past_key_values, use_cache=True)
        found.append(outputs.last_hidden_state)
    assert_near(torch.cat(found, dim=1)[mask.bool()], expected[mask.bool()])


@each_implementation
@each_relative_kind
@torch.no_grad()
def test_padding_before_the_cached_tokens_takes_no_position(kind, attn_implementation):
    """Ten columns for eight positions: those of the rows begin where their padding ends."""
    model, input_ids = build(kind, attn_implementation, is_decoder=True), draw_ids(length=10)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[:, :2], mask[1, :5] = 0, 0
    past = model(input_ids[:, :9], attention_mask=mask[:, :9], use_cache=True).past_key_values
    last = model(input_ids[:, 9:], attention_mask=mask, past_key_values=past).last_hidden_state[:, 0]
    for row, first in enumerate((2, 5, 2)):
        alone = model(input_ids[row : row + 1, first:], use_cache=False).last_hidden_state[:, -1]
        assert_near(last[row : row + 1], alone)


@each_implementation
@each_relative_kind
@torch.no_grad()
def test_cross_attention_has_no_distances(kind, attn_implementation):
    """The states of an encoder are a set to a layer that has no relative positions over them."""
    model = build(kind, attn_implementation, is_decoder=True, add_cross_attention=True)
    assert not any("crossattention" in name and "distance" in name for name in model.state_dict())
    input_ids, states = draw_ids(), torch.randn(3, 5, 16)
    expected = model(input_ids, encoder_hidden_states=states).last_hidden_state
    assert_near(model(input_ids, encoder_hidden_states=states.flip(1)).last_hidden_state, expected)


@needs_compiler
@each_relative_kind
@torch.no_grad()
def test_flex_matches_eager(kind):
    model, input_ids, mask = build(kind, "eager"), draw_ids(), mask_of("left")
    expected = model(input_ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("flex_attention")
    states = model(input_ids, attention_mask=mask).last_hidden_state
    assert_near(states[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
@each_kind
def test_flash_is_refused_for_relative_positions_alone(kind, name):
    model = build(kind)
    model.config._attn_implementation_internal = name
    with pytest.raises(Exception) as caught:
        model(draw_ids())
    is_refused = type(caught.value) is ValueError and "`attn_implementation='sdpa'`" in str(caught.value)
    assert is_refused == (kind in RELATIVE)
    assert not is_refused or (repr(kind) in str(caught.value) and repr(name) in str(caught.value))


@each_padding
@each_implementation
@each_relative_kind
def test_seed_repeats_dropout(kind, attn_implementation, padding):
    model = build(kind, attn_implementation, attention_probs_dropout_prob=0.3)
    input_ids, mask = draw_ids(), mask_of(padding)
    expected = model(input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
    found = []
    for seed in (1, 1, 2):
        set_seed(seed)
        states = model.train()(input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
        found.append((states, gradients_of(model, weighted_sum({"": states}))))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())
    assert not torch.allclose(found[0][0], found[2][0], atol=1e-3)
    assert not torch.allclose(found[0][0], expected, atol=1e-3)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_implementation
@each_relative_kind
def test_half_precision_is_near_float32(kind, attn_implementation, dtype, padding):
    half = build(kind, attn_implementation).to(dtype)
    single, input_ids, mask = copy.deepcopy(half).float(), draw_ids(), mask_of(padding)
    outputs = [model(input_ids, attention_mask=mask).last_hidden_state[mask.bool()] for model in (half, single)]
    assert outputs[0].dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_near(outputs[0], outputs[1].detach(), 8 * eps)
    gradients = [
        gradients_of(model, weighted_sum({"": states})) for model, states in zip((half, single), outputs, strict=True)
    ]
    error = sum((gradients[0][name].float() - exact).square().sum() for name, exact in gradients[1].items())
    assert error.sqrt() < 16 * eps * sum(exact.square().sum() for exact in gradients[1].values()).sqrt()


@pytest.mark.parametrize("kind", ["relative_key_query", "rope", "absolute"])
def test_compiled_model_gives_the_same_in_one_graph(kind):
    model, input_ids = build(kind), draw_ids()
    expected = model(input_ids).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_near(compiled(input_ids).last_hidden_state, expected)


# --- Saved folders ---


def old_folder(folder, stock, kind):
    """A folder as Transformers 4 wrote it: a table in each layer beside the one of positions that nobody reads."""
    state = {name: tensor.clone() for name, tensor in stock.state_dict().items() if "decoder.weight" not in name}
    prefix = "bert." if isinstance(stock, BertForMaskedLM) else ""
    tables = {
        f"{prefix}encoder.layer.{i}.attention.self.distance_embedding.weight": torch.randn(15, 8) for i in range(2)
    }
    buffer = {f"{prefix}embeddings.position_ids": torch.arange(8)[None]}
    save_file({**state, **tables, **buffer}, folder / "model.safetensors", {"format": "pt"})
    stored = {**stock.config.to_dict(), "position_embedding_type": kind}
    (folder / "config.json").write_text(json.dumps(stored))
    return tables


@pytest.mark.parametrize(
    ("stock_class", "model_class"),
    [(BertModel, CustomBertModel), (BertForMaskedLM, CustomBertForMaskedLM)],
    ids=["model", "masked"],
)
@each_relative_kind
def test_old_checkpoint_loads_its_tables_in_silence(kind, stock_class, model_class, tmp_path, caplog):
    fields = {name: value for name, value in FIELDS.items() if name != "rope_theta"}
    stock = widen(stock_class(BertConfig(**fields)))
    tables = old_folder(tmp_path, stock, kind)
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not caplog.records
    assert model.config.position_embedding_type == kind
    state = model.state_dict()
    assert all(torch.equal(state[name], table) for name, table in tables.items())
    assert not any("position_embeddings" in name for name in state)
    assert model(draw_ids())[0].isfinite().all()


@each_relative_kind
def test_saved_model_keeps_its_tables(kind, tmp_path):
    model, input_ids = build(kind), draw_ids()
    model.save_pretrained(tmp_path)
    loaded, report = CustomBertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(loaded(input_ids).last_hidden_state, model(input_ids).last_hidden_state)
