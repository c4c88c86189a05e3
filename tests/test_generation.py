"""Caches, padding, packing and `generate`: the same numbers and tokens however they are computed."""

import re
import shutil
from itertools import product

import pytest
import torch
from reference import assert_near, assert_outputs_near, real_outputs
from tiny import BATCH, LENGTH, MODELS, VARIANTS, VOCAB, name_of
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, set_seed

ROWS = MODELS + VARIANTS
GENERATIVE = [row for row in MODELS if row.is_generative]
BERT_CAUSAL_LM = GENERATIVE[-1]
IMPLEMENTATIONS = ["eager", "sdpa"]
# Lengths of the chunks that a sequence of `LENGTH` tokens is read in.
CHUNKS = {"tokens": [1] * LENGTH, "prompt-tokens": [4] + [1] * (LENGTH - 4), "chunks": [3, 5, 1, 2]}

NEW_TOKENS = 10
STRATEGIES = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.9},
    "beam": {"num_beams": 4},
}


# Sinusoids take the way of learned vectors, and of the relative positions one has all that the other has.
ALIKE = [(BERT_CAUSAL_LM, {"position_embedding_type": name}) for name in ("sinusoidal", "relative_key")]


def cases(rows, *options, left_out=()):
    """Each row with each kind of positions, and with `options`."""
    found = [(row, option) for row in rows for option in [*row.positions, *options] if (row, option) not in left_out]
    return [pytest.param(row, option, id=f"{row.name}-{name_of(option)}") for row, option in found]


each_position = pytest.mark.parametrize("row, option", cases(GENERATIVE))
each_decoding = pytest.mark.parametrize("row, option", cases(GENERATIVE, left_out=ALIKE))
each_position_of_all = pytest.mark.parametrize("row, option", cases(ROWS))
each_model = pytest.mark.parametrize("row", GENERATIVE, ids=name_of)
each_implementation = pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)


def tensors_of(outputs):
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def build_writer(row, option, **kwargs):
    """A model that never ends; untied, since tied wide weights mostly repeat the last token."""
    return row.build(**{"eos_token_id": None, "tie_word_embeddings": False, **option, **kwargs})


def generate(model, inputs, **kwargs):
    set_seed(1)
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW_TOKENS, **kwargs})


def make_cache(is_static, config):
    # Room to spare: what is not yet written must not be read.
    cache = StaticCache(config=config, max_cache_len=LENGTH + 5) if is_static else DynamicCache(config=config)
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if config.add_cross_attention else cache


def read_in_chunks(model, inputs, chunks, cache, **kwargs):
    """Logits (B, T, V) of a sequence read piece by piece into a cache."""
    logits, end = [], 0
    for length in chunks:
        start, end = end, end + length
        outputs = model(
            inputs["input_ids"][:, start:end],
            attention_mask=inputs["attention_mask"][:, :end],
            past_key_values=cache,
            use_cache=True,
            **kwargs,
        )
        assert outputs.logits.shape[1] == length
        assert cache.get_seq_length() == end
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def assert_cached_equals_uncached(model, inputs, chunks, is_static, **kwargs):
    expected = model(**inputs, use_cache=False, **kwargs).logits
    logits = read_in_chunks(model, inputs, chunks, make_cache(is_static, model.config), **kwargs)
    is_real = inputs["attention_mask"].bool()
    assert_near(logits[is_real], expected[is_real])


# --- Caches ---


@pytest.mark.parametrize("chunks, padding", [("tokens", "left"), ("prompt-tokens", None), ("chunks", "left")])
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@each_implementation
@each_position
@torch.no_grad()
def test_cached_logits_equal_uncached(row, option, attn_implementation, is_static, chunks, padding):
    model = row.build(**option, attn_implementation=attn_implementation)
    assert_cached_equals_uncached(model, row.inputs(padding=padding), CHUNKS[chunks], is_static)


@pytest.mark.parametrize("chunks", [CHUNKS["prompt-tokens"], CHUNKS["chunks"]], ids=["prompt-tokens", "chunks"])
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@each_implementation
@each_model
@torch.no_grad()
def test_cached_cross_attention_equals_uncached(row, attn_implementation, is_static, chunks):
    model = row.build(add_cross_attention=True, attn_implementation=attn_implementation)
    encoder_mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 4 + [1]])
    encoder = {
        "encoder_hidden_states": torch.randn(BATCH, 5, model.config.hidden_size),
        "encoder_attention_mask": encoder_mask,
    }
    assert_cached_equals_uncached(model, row.inputs(padding="left"), chunks, is_static, **encoder)


@each_model
@torch.no_grad()
def test_cross_attention_projects_encoder_once(row):
    model = row.build(add_cross_attention=True)
    calls = []
    for name, module in model.named_modules():
        if re.search(r"\.crossattention\.(c_attn|self\.key)$", name):
            module.register_forward_hook(lambda *args: calls.append(1))
    states = torch.randn(BATCH, 5, model.config.hidden_size)
    cache = make_cache(False, model.config)
    read_in_chunks(model, row.inputs(), CHUNKS["chunks"], cache, encoder_hidden_states=states)
    assert len(calls) == model.config.num_hidden_layers


@each_position
@torch.no_grad()
def test_cache_is_made_when_asked(row, option):
    model, inputs = row.build(**option), row.inputs()
    ids = inputs["input_ids"]
    expected = model(ids).logits
    outputs = model(ids[:, :-1], use_cache=True)
    assert outputs.past_key_values.get_seq_length() == LENGTH - 1
    assert_near(model(ids[:, -1:], past_key_values=outputs.past_key_values).logits, expected[:, -1:])
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@each_model
@torch.no_grad()
def test_compiled_decoding_equals_eager(row):
    model, ids = row.build(num_hidden_layers=1), row.inputs()["input_ids"]
    expected = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    start = LENGTH - 4
    model(ids[:, :start], past_key_values=cache, use_cache=True)
    torch._dynamo.reset()
    decode = torch.compile(model, fullgraph=True)
    for step in range(start, LENGTH):
        logits = decode(ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits
        assert_near(logits, expected[:, step : step + 1], name=f"step {step}")


# --- Padding, packing, long sequences ---


@pytest.mark.parametrize("padding", [None, "left", "right"])
@each_position_of_all
@torch.no_grad()
def test_row_of_batch_equals_row_alone(row, option, padding):
    """Of eager; the suite over all options has the same of sdpa."""
    model = row.build(**option, attn_implementation="eager")
    inputs = row.indexed_inputs(padding)
    mask = inputs["attention_mask"].bool()
    together = tensors_of(model(**inputs))
    for index in product(*map(range, mask.shape[:-1])):
        is_real = mask[index]
        for name, alone in tensors_of(model(**row.alone(inputs, index))).items():
            found = together[name][index]
            found = found[is_real] if together[name].shape[: mask.ndim] == mask.shape else found
            assert_near(found, alone[(0,) * len(index)], name=name)


@pytest.mark.parametrize(("attn_implementation", "padding"), [("eager", "left"), ("sdpa", "left"), ("sdpa", "right")])
@each_position_of_all
@torch.no_grad()
def test_masked_tokens_have_no_influence(row, option, attn_implementation, padding):
    # A classifier with a `pad_token_id` finds the end of a sequence by it, as in stock; here the mask alone tells.
    model = row.build(**option, attn_implementation=attn_implementation, pad_token_id=None)
    inputs = row.indexed_inputs(padding)
    expected = real_outputs(model, inputs)
    is_padding = inputs["attention_mask"] == 0
    inputs["input_ids"][is_padding] = torch.randint(0, VOCAB, (int(is_padding.sum()),))
    assert_outputs_near(real_outputs(model, inputs), expected, tolerance=0.0)


DOCUMENTS = [[4, 1, 6], [9, 2]]


@pytest.mark.parametrize("use_cache", [None, False])
@each_implementation
@each_position
@torch.no_grad()
def test_packed_documents_equal_separate_ones(row, option, attn_implementation, use_cache):
    model = row.build(**option, attn_implementation=attn_implementation)
    ids = row.inputs(batch=2)["input_ids"]
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in DOCUMENTS])
    packed = model(ids, position_ids=position_ids, use_cache=use_cache).logits
    for index, lengths in enumerate(DOCUMENTS):
        documents = zip(ids[index].split(lengths), packed[index].split(lengths), strict=True)
        for document, logits in documents:
            assert_near(logits, model(document[None]).logits[0])


@pytest.mark.parametrize("position_embedding_type", ["sinusoidal", "rope"])
@each_model
@torch.no_grad()
def test_sequence_may_exceed_n_positions(row, position_embedding_type):
    option = {"position_embedding_type": position_embedding_type}
    model, inputs = build_writer(row, option, max_position_embeddings=5), row.inputs(padding="left")
    longer = build_writer(row, option)
    longer.load_state_dict(model.state_dict())
    assert_near(model(**inputs).logits, longer(**inputs).logits)
    assert_cached_equals_uncached(model, inputs, CHUNKS["chunks"], is_static=False)
    assert generate(model, inputs).shape == (BATCH, LENGTH + NEW_TOKENS)


@pytest.mark.parametrize("kept", [0, 1, 4, LENGTH, torch.tensor([0, 5, 2])], ids=str)
@each_model
@torch.no_grad()
def test_logits_to_keep_equals_slicing(row, kept):
    model, inputs = row.build(), row.inputs(padding="left")
    logits = model(**inputs).logits
    expected = logits[:, kept] if isinstance(kept, torch.Tensor) else logits[:, -kept:]
    assert_near(model(**inputs, logits_to_keep=kept).logits, expected)


@each_model
@torch.no_grad()
def test_logits_to_keep_may_differ_by_row(row):
    model, inputs = row.build(), row.inputs()
    logits = model(**inputs).logits
    kept = torch.tensor([[0, 5], [2, 1], [LENGTH - 1, 3]])
    expected = torch.stack([logits[i, positions] for i, positions in enumerate(kept)])
    assert_near(model(**inputs, logits_to_keep=kept).logits, expected)
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 2] = mask[2, 1:4] = True
    assert_near(model(**inputs, logits_to_keep=mask).logits, torch.cat((logits[0, 2:3], logits[2, 1:4])))


@pytest.mark.parametrize("padding", ["left", "right"])
@each_model
@torch.no_grad()
def test_loss_is_the_same_whichever_logits_are_computed(row, padding):
    """And whatever labels stand at padding."""
    model, inputs = row.build(), row.inputs(padding=padding)
    labels = inputs["input_ids"]
    expected = model(**inputs, labels=labels, return_logits=False)
    assert expected.logits is None
    kept = model(**inputs, labels=labels, logits_to_keep=2)
    assert kept.logits.shape[:2] == (BATCH, 2)
    assert_near(kept.loss, expected.loss)
    assert_near(model(**inputs, labels=labels).loss, expected.loss)


# --- generate ---


def with_encoder(inputs, model):
    states = torch.randn(BATCH, 5, model.config.hidden_size)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 4 + [1]])
    return {**inputs, "encoder_hidden_states": states, "encoder_attention_mask": mask}


@pytest.mark.parametrize(
    "strategy, padding",
    [("greedy", None), *((strategy, "left") for strategy in STRATEGIES)],
)
@pytest.mark.parametrize("row, option", cases(GENERATIVE, {"add_cross_attention": True}, left_out=ALIKE))
def test_generate_is_same_with_any_cache(row, option, strategy, padding):
    model, inputs, strategy = build_writer(row, option), row.inputs(padding=padding), STRATEGIES[strategy]
    if model.config.add_cross_attention:
        inputs = with_encoder(inputs, model)
    expected = generate(model, inputs, use_cache=False, **strategy)
    assert expected.shape == (BATCH, LENGTH + NEW_TOKENS)
    assert torch.equal(generate(model, inputs, use_cache=True, **strategy), expected)
    assert torch.equal(generate(model, inputs, cache_implementation="static", **strategy), expected)


@pytest.mark.parametrize("strategy", [STRATEGIES["greedy"], STRATEGIES["beam"]], ids=["greedy", "beam"])
@each_implementation
@each_decoding
def test_left_padded_batch_generates_as_rows_alone(row, option, attn_implementation, strategy):
    model = build_writer(row, option, attn_implementation=attn_implementation)
    inputs = row.inputs(padding="left")
    tokens = generate(model, inputs, **strategy)
    for index, mask in enumerate(inputs["attention_mask"].bool()):
        alone = generate(model, {"input_ids": inputs["input_ids"][index][mask][None]}, **strategy)
        assert torch.equal(tokens[index, LENGTH:], alone[0, mask.sum() :])


@each_decoding
def test_prompt_lookup_generates_as_greedy(row, option):
    model = build_writer(row, option)
    inputs = {"input_ids": row.inputs(batch=1, length=5)["input_ids"].repeat(1, 3)}
    expected = generate(model, inputs)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("is_good", [True, False], ids=["good-assistant", "bad-assistant"])
@each_decoding
def test_assisted_decoding_generates_as_greedy(row, option, is_good):
    model, inputs = build_writer(row, option), row.inputs(batch=1)
    # One layer proposes tokens that are mostly refused; all of them, tokens that are mostly taken.
    assistant = build_writer(row, option, num_hidden_layers=model.config.num_hidden_layers if is_good else 1)
    assistant.load_state_dict(model.state_dict(), strict=is_good)
    assert torch.equal(generate(model, inputs, assistant_model=assistant), generate(model, inputs))


@pytest.mark.parametrize(("strategy", "padding"), [("greedy", None), ("sample", "left"), ("beam", "left")])
@each_decoding
def test_generate_from_embeddings_equals_from_ids(row, option, strategy, padding):
    model, inputs, strategy = build_writer(row, option), row.inputs(padding=padding), STRATEGIES[strategy]
    expected = generate(model, inputs, **strategy)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    tokens = generate(model, {**inputs, "inputs_embeds": embeddings}, **strategy)
    assert torch.equal(tokens, expected[:, LENGTH:])
