"""BLIP-2's Q-Former: its attention modes against naive loops, the unpadded path, cached queries, what it returns."""

import pytest
import reference
import torch
from reference import assert_gradients_near, assert_near, assert_outputs_near, weighted_sum
from tiny import name_of, widen
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from hf_custom import CustomBlip2QFormerConfig, CustomBlip2QFormerModel
from hf_custom.modeling_blip2_qformer import CustomBlip2TextEmbeddings, TextPacking

FIELDS = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "encoder_hidden_size": 24,
    "use_qformer_text_input": True,
}
# Rows, queries of each, tokens of its text, states of its image.
BATCH, QUERIES, LENGTH, STATES = 3, 3, 5, 4
MODES = ("bidirectional", "unimodal", "multimodal_causal")
MASKS = {
    "none": [[1, 1, 1, 1, 1]] * 3,
    "left": [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]],
}
PADDED = ("left", "right", "holes")
each_mode = pytest.mark.parametrize("mode", MODES)
each_implementation = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])


def build(attn_implementation="sdpa", **fields):
    """The model with wide weights. In float64: a gradient of its norms is a small difference of large terms."""
    config = CustomBlip2QFormerConfig(**{**FIELDS, **fields})
    return widen(CustomBlip2QFormerModel._from_config(config, attn_implementation=attn_implementation)).double()


def draw(num_queries=QUERIES, length=LENGTH, batch=BATCH):
    """Embeddings (B, Q + T, D) of queries and text, and states (B, S, D') of an image, both with gradients."""
    shapes = ((batch, num_queries + length, FIELDS["hidden_size"]), (batch, STATES, FIELDS["encoder_hidden_size"]))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def behind_queries(mask, num_queries=QUERIES):
    """A mask (B, T) of texts as one of queries and texts."""
    return torch.nn.functional.pad(torch.as_tensor(mask), (num_queries, 0), value=1)


def gradients(model, objective, *inputs):
    """Gradients by the name of the parameter, and those of the inputs by their place, as far as they are reached."""
    leaves = dict(model.named_parameters()) | {str(place): tensor for place, tensor in enumerate(inputs)}
    found = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def assert_same(model, actual, expected, *inputs):
    """Outputs by name and the gradients of a number that depends on all their entries."""
    assert_outputs_near(actual, expected)
    actual, expected = (gradients(model, weighted_sum(outputs), *inputs) for outputs in (actual, expected))
    assert_gradients_near(actual, expected)
    return expected


# --- The arithmetic, a layer after another (Li et al. 2023, section 3.1 and figure 2) ---


def allowed_keys(mode, num_queries, mask):
    """(B, Q + T, Q + T) of booleans: what queries and texts with `mask` (B, T) see of each other."""
    length = num_queries + mask.shape[1]
    allowed = torch.zeros(len(mask), length, length, dtype=torch.bool)
    for b in range(len(mask)):
        for t in range(length):
            for s in range(length):
                is_query, is_queried = t < num_queries, s < num_queries
                is_real = is_queried or mask[b, s - num_queries] == 1
                is_seen = {
                    "bidirectional": True,
                    "unimodal": is_query == is_queried,
                    "multimodal_causal": is_queried or (not is_query and s <= t),
                }[mode]
                allowed[b, t, s] = is_real and is_seen
    return allowed


class Naive:
    """The Q-Former with a model's weights, without its modules."""

    def __init__(self, model):
        self.weights, self.config = dict(model.named_parameters()), model.config

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].t() + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.config.layer_norm_eps).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, name, x, states, allowed):
        shape = (self.config.num_attention_heads, -1)
        parts = (("query", x), ("key", states), ("value", states))
        heads = [self.linear(f"{name}.attention.{part}", y).unflatten(-1, shape).transpose(1, 2) for part, y in parts]
        output, weights = reference.attention(*heads, allowed, heads[0].shape[-1] ** -0.5)
        output = self.linear(f"{name}.output.dense", output.flatten(2))
        return self.norm(f"{name}.output.LayerNorm", output + x), weights

    def feed_forward(self, name, kind, x):
        y = self.linear(f"{name}.intermediate{kind}.dense", x)
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        return self.norm(f"{name}.output{kind}.LayerNorm", self.linear(f"{name}.output{kind}.dense", y) + x)

    def __call__(self, embeds, num_queries, allowed, image=None, image_mask=None):
        """States after the embeddings and after each layer, attention weights, those over the image."""
        x = self.norm("layernorm", embeds)
        found = {"hidden_states": [x], "attentions": [], "cross_attentions": []}
        for index in range(self.config.num_hidden_layers):
            name = f"encoder.layer.{index}"
            x, weights = self.attend(f"{name}.attention", x, x, allowed)
            found["attentions"].append(weights)
            queries, text = x[:, :num_queries], x[:, num_queries:]
            if num_queries and index % self.config.cross_attention_frequency == 0:
                mask = torch.ones(image.shape[:2]) if image_mask is None else image_mask
                seen = reference.allowed_keys(num_queries, mask, is_causal=False)
                queries, weights = self.attend(f"{name}.crossattention", queries, image, seen)
                found["cross_attentions"].append(weights)
            parts = [self.feed_forward(name, "_query", queries)] if num_queries else []
            parts += [self.feed_forward(name, "", text)] if text.shape[1] else []
            x = torch.cat(parts, dim=1)
            found["hidden_states"].append(x)
        return found


def all_states(outputs, mask):
    """The states of all layers at the real places of `mask`, and the last."""
    states = {f"hidden_states.{i}": states[mask.bool()] for i, states in enumerate(outputs["hidden_states"])}
    return states | {"last": outputs["hidden_states"][-1][mask.bool()]}


def assert_matches_naive(model, mode, mask, num_queries=QUERIES, image_mask=None):
    mask = torch.as_tensor(mask)
    (embeds, image), joined = draw(num_queries, mask.shape[1]), behind_queries(mask, num_queries)
    outputs = model(
        embeds,
        num_queries,
        joined,
        image if num_queries else None,
        image_mask,
        attention_mode=mode,
        output_hidden_states=True,
    )
    expected = Naive(model)(embeds, num_queries, allowed_keys(mode, num_queries, mask), image, image_mask)
    found = all_states(outputs, joined)
    assert torch.equal(found["last"], outputs.last_hidden_state[joined.bool()])
    reached = assert_same(model, found, all_states(expected, joined), embeds, image)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])
    return reached


@pytest.mark.parametrize("padding", ["none", "holes"])
@each_mode
@each_implementation
def test_modes_match_naive_and_grad(attn_implementation, mode, padding):
    model = build(attn_implementation)
    reached = assert_matches_naive(model, mode, MASKS[padding])
    assert reached.keys() == dict(model.named_parameters()).keys() | {"0", "1"}


@each_mode
def test_row_without_text_matches_naive_and_grad(mode):
    assert_matches_naive(build(), mode, [[1, 1], [0, 0], [1, 0]])


@pytest.mark.parametrize("attn_implementation, mode", [("sdpa", mode) for mode in MODES] + [("eager", MODES[2])])
def test_text_alone_matches_naive_and_grad(attn_implementation, mode):
    assert_matches_naive(build(attn_implementation), mode, MASKS["right"], num_queries=0)


@each_mode
def test_queries_alone_match_naive_and_grad(mode):
    model = build(use_qformer_text_input=False)
    reached = assert_matches_naive(model, mode, torch.ones(BATCH, 0, dtype=torch.long))
    assert reached.keys() == dict(model.named_parameters()).keys() | {"0", "1"}


OPTIONS = [
    {"cross_attention_frequency": 1},
    {"cross_attention_frequency": 3},
    {"chunk_size_feed_forward": 2},
    {"layer_norm_eps": 0.1},
]


@pytest.mark.parametrize("option", OPTIONS, ids=name_of)
def test_options_match_naive_and_grad(option):
    model = build(**option)
    reached = assert_matches_naive(model, "bidirectional", MASKS["right"])
    assert reached.keys() == dict(model.named_parameters()).keys() | {"0", "1"}


@each_implementation
def test_padding_of_the_image_matches_naive_and_grad(attn_implementation):
    """Of an image mask, next to a text with padding, computed or not."""
    image_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    for mode in ("bidirectional", "multimodal_causal"):
        assert_matches_naive(build(attn_implementation), mode, MASKS["left"], image_mask=image_mask)


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
def test_positions_are_counted_from_the_first_real_token(padding):
    config = CustomBlip2QFormerConfig(**FIELDS)
    embeddings, mask = widen(CustomBlip2TextEmbeddings(config)), torch.tensor(MASKS[padding])
    ids, queries = torch.randint(1, FIELDS["vocab_size"], (BATCH, LENGTH)), torch.randn(BATCH, QUERIES, 32)
    found = embeddings(ids, query_embeds=queries, attention_mask=mask)
    assert torch.equal(found[:, :QUERIES], queries)
    for b, t in reference.real_places(mask):
        position = t - mask[b].tolist().index(1)
        expected = embeddings.word_embeddings.weight[ids[b, t]] + embeddings.position_embeddings.weight[position]
        assert torch.equal(found[b, QUERIES + t], expected)


# --- Who sees whom ---


def changed_by(model, mode, place):
    """(Q + T,): which states another embedding at `place` changes."""
    embeds, image = (tensor.detach() for tensor in draw(batch=1))
    other = embeds.clone()
    other[0, place] += 1.0
    first, second = (model(x, QUERIES, None, image, attention_mode=mode).last_hidden_state[0] for x in (embeds, other))
    return (first != second).any(-1).tolist()


@each_implementation
def test_text_of_causal_mode_sees_its_past_and_the_queries(attn_implementation):
    model = build(attn_implementation)
    for t in range(LENGTH):
        expected = [False] * (QUERIES + t) + [True] * (LENGTH - t)
        assert changed_by(model, "multimodal_causal", QUERIES + t) == expected
    for query in range(QUERIES):
        assert all(changed_by(model, "multimodal_causal", query))


@each_implementation
def test_text_and_queries_of_unimodal_mode_do_not_touch(attn_implementation):
    model = build(attn_implementation)
    of_queries = [True] * QUERIES + [False] * LENGTH
    for place in range(QUERIES + LENGTH):
        is_query = place < QUERIES
        assert changed_by(model, "unimodal", place) == [is_query == other for other in of_queries]
    assert all(changed_by(model, "bidirectional", 0)) and all(changed_by(model, "bidirectional", QUERIES + LENGTH - 1))


# --- Without padding ---


@pytest.fixture
def packings(monkeypatch):
    """What each question for a packing was answered."""
    answers, find = [], CustomBlip2QFormerModel._find_packing

    def spy(*args, **kwargs):
        answers.append(find(*args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(CustomBlip2QFormerModel, "_find_packing", spy)
    return answers


def of_joint(model, embeds, image, mask, **options):
    return model(embeds, QUERIES, behind_queries(mask), image, output_hidden_states=True, **options)


def of_text(model, embeds, image, mask, **options):
    return model(embeds[:, QUERIES:], 0, mask, output_hidden_states=True, **options)


def of_cached(model, embeds, image, mask, **options):
    """The text behind queries of an earlier call."""
    queries = model(embeds[:, :QUERIES], encoder_hidden_states=image, use_cache=True)
    mask = None if mask is None else behind_queries(mask)
    options = {"attention_mode": "multimodal_causal", "output_hidden_states": True, **options}
    return model(embeds[:, QUERIES:], 0, mask, past_key_values=queries.past_key_values, **options)


CALLS = {"queries and text": of_joint, "text alone": of_text, "text behind cached queries": of_cached}


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_unpadded_equals_eager_and_grad(call, padding, packings):
    mask, (embeds, image), model = torch.tensor(MASKS[padding]), draw(), build()
    joined = behind_queries(mask) if call is of_joint else mask
    outputs = call(model, embeds, image, mask)
    assert isinstance(packings[-1], TextPacking)
    for states in (outputs.last_hidden_state, *outputs.hidden_states):
        assert not states[joined == 0].any()
    found = all_states(outputs, joined)
    reached = gradients(model, weighted_sum(found), embeds, image)
    model.set_attn_implementation("eager")
    expected = all_states(call(model, embeds, image, mask), joined)
    assert packings[-1] is None
    assert_outputs_near(found, expected)
    assert_gradients_near(reached, gradients(model, weighted_sum(expected), embeds, image))


ORDINARY = {
    "attention weights asked for": lambda *args: of_joint(*args, output_attentions=True),
    "a cache asked for": lambda *args: of_joint(*args, use_cache=True),
    "modes apart": lambda *args: of_joint(*args, attention_mode="unimodal"),
    "causal and joint": lambda *args: of_joint(*args, attention_mode="multimodal_causal"),
    "causal text alone": lambda *args: of_text(*args, attention_mode="multimodal_causal"),
    "no padding": lambda model, embeds, image, mask: of_joint(model, embeds, image, torch.ones_like(mask)),
    "a query masked": lambda model, embeds, image, mask: model(embeds, QUERIES, 1 - behind_queries(1 - mask), image),
}


@pytest.mark.parametrize("call", ORDINARY.values(), ids=ORDINARY)
@torch.no_grad()
def test_ordinary_path_is_taken(call, packings):
    embeds, image = draw()
    outputs = call(build(), embeds, image, torch.tensor(MASKS["right"]))
    assert not any(packings) and outputs.last_hidden_state.isfinite().all()


def operations(model, mask):
    """Multiplications and additions of a step, forward and backward."""
    embeds, image = draw(length=mask.shape[1], batch=len(mask))
    with FlopCounterMode(display=False) as counter:
        weighted_sum({"": model(embeds, QUERIES, behind_queries(mask), image).last_hidden_state}).backward()
    return sum(counter.get_flop_counts()["Global"].values())


def test_padding_of_a_text_costs_no_operations():
    model, mask = build(), torch.zeros(4, 64, dtype=torch.long)
    mask[:, -16:] = 1
    of_queries = operations(model, mask[:, :0])
    padded, full, alone = (operations(model, m) - of_queries for m in (mask, torch.ones_like(mask), mask[:, -16:]))
    assert padded <= 0.25 * full
    assert abs(padded - alone) <= 0.01 * alone


# --- Cached queries, and images projected once ---


@pytest.mark.parametrize("padding", ["none", "not passed", "left", "holes"])
@each_implementation
def test_text_behind_cached_queries_equals_joint_call_and_grad(attn_implementation, padding):
    model, (embeds, image) = build(attn_implementation).train(), draw()
    mask = torch.tensor(MASKS.get(padding, MASKS["none"]))
    joined = behind_queries(mask)
    cached = of_cached(model, embeds, image, None if padding == "not passed" else mask).last_hidden_state
    queries = model(embeds[:, :QUERIES], encoder_hidden_states=image).last_hidden_state
    found = {"": torch.cat((queries, cached), dim=1)[joined.bool()]}
    joint = model(embeds, QUERIES, joined, image, attention_mode="multimodal_causal").last_hidden_state
    assert_same(model, found, {"": joint[joined.bool()]}, embeds, image)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_cached_queries_are_read_and_stay_as_they_are(attn_implementation, packings):
    """Several texts go on from one cache, with padding left out or not, whether they ask for a cache or not."""
    model, (embeds, image) = build(attn_implementation).eval(), draw()
    cache = model(embeds[:, :QUERIES], encoder_hidden_states=image, use_cache=True).past_key_values
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for padding, options in (("none", {}), ("right", {}), ("none", {"use_cache": True}), ("left", {})):
        text, mask = torch.randn_like(embeds[:, QUERIES:]), behind_queries(MASKS[padding])
        call = {"attention_mode": "multimodal_causal", **options}
        found = model(text, 0, mask, past_key_values=cache, **call).last_hidden_state
        assert (packings[-1] is not None) == (attn_implementation == "sdpa" and padding != "none")
        joint = torch.cat((embeds[:, :QUERIES], text), dim=1)
        expected = model(joint, QUERIES, mask, image, attention_mode="multimodal_causal").last_hidden_state
        is_real = mask[:, QUERIES:].bool()
        assert_near(found[is_real], expected[:, QUERIES:][is_real], name=padding)
        assert cache.get_seq_length() == QUERIES
        for layer, (key, value) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, key) and torch.equal(layer.values, value)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_changes_nothing_and_grad(mode, use_reentrant):
    """In particular the gradients of the image, which reach it through keys and values of several layers."""
    model, (embeds, image), mask = build().train(), draw(), torch.tensor(MASKS["right"])
    options = {"attention_mode": mode, "image_key_values": None}
    found = []
    for _ in range(2):
        options["image_key_values"] = model.image_key_values(image)
        states = of_joint(model, embeds, None, mask, **options).last_hidden_state[behind_queries(mask).bool()]
        model.zero_grad()
        embeds.grad = image.grad = None
        weighted_sum({"": states}).backward()
        reached = {name: weight.grad for name, weight in model.named_parameters()}
        found.append((states, reached | {"embeds": embeds.grad, "image": image.grad}))
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_near(found[1][0], found[0][0])
    assert_gradients_near(found[1][1], found[0][1])


def test_cache_is_not_kept_while_checkpointing():
    model, (embeds, image) = build(), draw(length=0)
    model.gradient_checkpointing_enable()
    assert model.eval()(embeds, encoder_hidden_states=image, use_cache=True).past_key_values is not None
    assert model.train()(embeds, encoder_hidden_states=image, use_cache=True).past_key_values is None


def test_image_projected_once_serves_several_calls_and_grad():
    model, (embeds, image), mask = build(), draw(), torch.tensor(MASKS["left"])
    key_values = model.image_key_values(image)
    assert list(key_values) == [0, 2]
    found, expected = {}, {}
    for mode in MODES:
        options = {"attention_mode": mode}
        found[mode] = of_joint(model, embeds, None, mask, **options, image_key_values=key_values).last_hidden_state
        expected[mode] = of_joint(model, embeds, image, mask, **options).last_hidden_state
        assert torch.equal(found[mode], expected[mode])
    assert_same(model, found, expected, embeds, image)


def test_half_precision_of_the_image_meets_float32_of_the_queries():
    model, (embeds, image) = build().float(), draw(length=0)
    found = model(embeds.bfloat16(), encoder_hidden_states=image.bfloat16()).last_hidden_state
    assert found.dtype == torch.float32
    expected = model(embeds.bfloat16().float(), encoder_hidden_states=image.bfloat16().float()).last_hidden_state
    assert torch.equal(found, expected)


# --- What is returned, against stock and against the loops ---


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize("length", [0, LENGTH], ids=["queries", "queries and text"])
def test_records_match_stock(length, frequency):
    """But for `attentions`, where stock counts those over the image among those over queries and text."""
    ours = build("eager", cross_attention_frequency=frequency)
    declared = Blip2QFormerConfig().to_dict().keys() - {"model_type", "transformers_version", "architectures"}
    fields = {name: value for name, value in ours.config.to_dict().items() if name in declared}
    stock = Blip2QFormerModel._from_config(Blip2QFormerConfig(**fields), attn_implementation="eager").double().eval()
    stock.load_state_dict(ours.state_dict(), strict=True)
    (embeds, image), asked = draw(length=length), {"output_hidden_states": True, "output_attentions": True}
    mask = behind_queries(torch.tensor(MASKS["right"])[:, :length])
    outputs, expected = (model.eval()(embeds, QUERIES, mask, image, **asked) for model in (ours, stock))
    assert_near(outputs.last_hidden_state, expected.last_hidden_state)
    for name in ("hidden_states", "cross_attentions"):
        assert len(outputs[name]) == len(expected[name])
        for found, wanted in zip(outputs[name], expected[name], strict=True):
            assert_near(found, wanted, name=name)
    assert len(outputs.cross_attentions) == len(range(0, 3, frequency))
    naive = Naive(ours)(embeds, QUERIES, allowed_keys("bidirectional", QUERIES, mask[:, QUERIES:]), image)
    assert len(outputs.attentions) == 3
    for found, wanted in zip(outputs.attentions, naive["attentions"], strict=True):
        assert found.shape == (BATCH, 2, QUERIES + length, QUERIES + length)
        assert_near(found, wanted)
    both = (*outputs.attentions, *outputs.cross_attentions)
    assert sorted(tuple(maps.shape) for maps in expected.attentions) == sorted(tuple(maps.shape) for maps in both)


def test_tuple_has_the_order_of_stock():
    """States, the first of them, what was asked for."""
    model, (embeds, image) = build().eval(), draw(length=0)
    asked = {"encoder_hidden_states": image, "output_hidden_states": True}
    outputs, found = model(embeds, **asked), model(embeds, **asked, return_dict=False)
    assert torch.equal(found[0], outputs.last_hidden_state) and torch.equal(found[1], outputs.pooler_output)
    assert len(found) == 3 and all(map(torch.equal, found[2], outputs.hidden_states))
