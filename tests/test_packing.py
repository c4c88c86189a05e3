"""Batches without padding: tokens in and out against naive loops, whole models against the ordinary path."""

import pytest
import reference
import torch
from reference import (
    assert_gradients_near,
    assert_near,
    assert_outputs_near,
    gradients_of,
    real_outputs,
    weighted_sum,
)
from tiny import BATCH, LENGTH, MODELS, VARIANTS, VOCAB, name_of
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hf_custom import CustomBertConfig, CustomGPT2Config
from hf_custom.packing import find_packing, unpadding

ROWS = {row.name: row for row in MODELS + VARIANTS}
CAUSAL_LM, QUESTION = ROWS["CustomGPT2ForCausalLM"], ROWS["CustomGPT2ForQuestionAnswering"]
BERT_CAUSAL_LM, MASKED_LM = ROWS["CustomBertForCausalLM"], ROWS["CustomBertForMaskedLM"]
GENERATIVE = [CAUSAL_LM, BERT_CAUSAL_LM]
# A question's loss is a softmax over all positions, padding among them, of which GPT-2's head says nothing.
LABELLED = [row for row in ROWS.values() if row.draw_labels(1, LENGTH) and row is not QUESTION]
each_model = pytest.mark.parametrize("row", ROWS.values(), ids=name_of)
each_writer = pytest.mark.parametrize("row", GENERATIVE, ids=name_of)

# --- Tokens in and out ---

MASKS = {
    "right": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]],
    "left": [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]],
    "masked rows": [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    "one row": [[0, 1, 1, 0]],
    "rows of one token": [[1], [0], [1]],
}
each_mask = pytest.mark.parametrize("mask", [torch.tensor(mask) for mask in MASKS.values()], ids=MASKS)
each_mask_type = pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)


@each_mask_type
@each_mask
def test_unpadding_equals_naive(mask, dtype):
    mask = mask.to(dtype)
    packing, places = find_packing(mask, None, tuple(mask.shape)), reference.real_places(mask)
    lengths = [sum(b == row for b, _ in places) for row in range(len(mask))]
    lengths = [length for length in lengths if length]
    assert packing.shape == tuple(mask.shape)
    assert packing.indices.tolist() == [b * mask.shape[1] + t for b, t in places]
    assert packing.cu_seq_lens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packing.cu_seq_lens.dtype == torch.int32
    assert packing.max_length == max(lengths)
    for batch in (torch.randn(*mask.shape, 2, 3), torch.randint(0, 9, mask.shape), torch.randn(1, mask.shape[1], 2)):
        expected = torch.stack([batch[b % len(batch), t] for b, t in places])[None]
        assert torch.equal(packing.unpad(batch), expected)


@each_mask
def test_repad_is_inverse_of_unpad_with_zeros_at_padding(mask):
    packing, batch = unpadding(mask), torch.randn(*mask.shape, 5)
    padded, places = packing.repad(packing.unpad(batch)), reference.real_places(mask)
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            expected = batch[b, t] if (b, t) in places else torch.zeros(5)
            assert torch.equal(padded[b, t], expected)
    tokens = torch.randn(1, len(places), 5)
    assert torch.equal(packing.unpad(packing.repad(tokens)), tokens)


@each_mask
def test_unpad_and_repad_give_each_token_its_gradient(mask):
    packing, places = unpadding(mask), reference.real_places(mask)
    batch = torch.randn(*mask.shape, 5, requires_grad=True)
    tokens = packing.unpad(batch)
    weights = torch.randn_like(tokens)
    (gradient,) = torch.autograd.grad(tokens, batch, weights)
    expected = torch.zeros_like(batch)
    for i, (b, t) in enumerate(places):
        expected[b, t] = weights[0, i]
    assert torch.equal(gradient, expected)
    tokens = torch.randn(1, len(places), 5, requires_grad=True)
    weights = torch.randn_like(batch)
    (gradient,) = torch.autograd.grad(packing.repad(tokens), tokens, weights)
    assert torch.equal(gradient[0], torch.stack([weights[b, t] for b, t in places]))


@each_mask_type
@pytest.mark.parametrize("fill", [0, 1])
def test_mask_of_one_kind_has_no_packing(fill, dtype):
    assert unpadding(torch.full((3, 4), fill, dtype=dtype)) is None


def test_unpad_of_nothing_is_nothing():
    assert unpadding(torch.tensor([[0, 1]])).unpad(None) is None


# --- Whole models, against the ordinary path ---


PADDINGS = ("left", "right", "holes", "one row", "one token", "masked row")


def padded_inputs(row, padding):
    """Inputs with padding, the mask shaped as the ids, and the last real position of each sequence where needed."""
    batch = 1 if padding == "one row" else BATCH
    inputs = row.inputs(batch=batch)
    input_ids = inputs["input_ids"]
    rows, columns = input_ids.view(-1, LENGTH).shape[0], torch.arange(LENGTH)
    lengths = torch.tensor([[LENGTH - 2 * (index + 1) % (LENGTH - 1)] for index in range(rows)])
    mask = columns >= LENGTH - lengths
    if padding == "right":
        mask = columns < lengths
    elif padding == "holes":
        mask = (3 * columns + 2 * torch.arange(rows)[:, None]) % 4 != 0
    elif padding == "one token":
        mask[1] = columns == 4
    elif padding == "masked row":
        mask[1] = False
    mask = mask.view_as(input_ids).long()
    inputs |= {"input_ids": input_ids.masked_fill(mask == 0, VOCAB - 1), "attention_mask": mask}
    if row.index_argument is not None:
        inputs[row.index_argument] = (mask * torch.arange(LENGTH)).argmax(-1)
    return inputs


def real_labels(row, inputs):
    """Labels, of which those of tokens stand at real ones only."""
    labels = row.draw_labels(*[inputs["attention_mask"].shape[i] for i in (0, -1)])
    if "labels" in labels and labels["labels"].shape == inputs["attention_mask"].shape:
        labels["labels"] = labels["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    return labels


# Outputs of sequences, not of tokens. What they read in a row without a token is left open.
OF_SEQUENCES = ("mc_logits", "pooler_output", "seq_relationship_logits")


def compared(row, model, inputs, **kwargs):
    outputs = real_outputs(model, inputs, output_hidden_states=True, **kwargs)
    has_tokens = inputs["attention_mask"].any(-1)
    has_tokens = has_tokens if row.num_choices is None else has_tokens.all(-1)
    labels = row.draw_labels(1, LENGTH).get("labels")
    of_sequences = (*OF_SEQUENCES, "logits") if labels is not None and labels.ndim == 1 else OF_SEQUENCES
    return {name: output[has_tokens] if name in of_sequences else output for name, output in outputs.items()}


# Options that have a part in what is packed.
PACKED_OPTIONS = (
    "position_embedding_type",
    "reorder_and_upcast_attn",
    "scale_attn_by_inverse_layer_idx",
    "chunk_size_feed_forward",
    "classifier_hidden_size",
    "tie_word_embeddings",
)
OPTIONS = [
    pytest.param(row, option, id=f"{row.name}-{name_of(option)}")
    for row in ROWS.values()
    for option in row.options
    if all(name in PACKED_OPTIONS for name in option)
]


def build(row, **option):
    """For training. BERT in float64: a gradient of its norms is a small difference of large terms."""
    model = row.build(**option).train()
    return model.double() if row.config_class is CustomBertConfig else model


def ordinary_path(row):
    """Arguments that keep a batch from the unpadded path: a cache or weights of attention are asked for."""
    return {"use_cache": True} if row.has_cache else {"output_attentions": True}


def assert_same_as_ordinary(row, model, inputs, packings, **kwargs):
    """Outputs at real tokens and gradients of the unpadded path, of eager, and of the ordinary path of sdpa."""
    found = {}
    paths = (("", "sdpa", {"use_cache": False}), ("eager", "eager", {"use_cache": False}))
    for path, implementation, arguments in (*paths, ("ordinary", "sdpa", ordinary_path(row))):
        model.set_attn_implementation(implementation)
        outputs = compared(row, model, inputs, **arguments, **kwargs)
        found[path] = outputs, gradients_of(model, weighted_sum(outputs))
    assert [packing is not None for packing in packings[-3:]] == [True, False, False]
    for path in ("eager", "ordinary"):
        assert_outputs_near(found[""][0], found[path][0])
        assert_gradients_near(found[""][1], found[path][1])


@pytest.mark.parametrize(
    "row, option, padding",
    [
        pytest.param(*case.values, padding, id=f"{case.id}-{padding}")
        for case in OPTIONS
        # Which tokens are left out is the same to every option: its part in what is packed shows in two of the masks.
        for padding in (PADDINGS if case.values[1] == {} else ("left", "holes"))
    ],
)
def test_unpadded_equals_ordinary_and_grad(row, option, padding, packings):
    model, inputs = build(row, **option), padded_inputs(row, padding)
    assert_same_as_ordinary(row, model, inputs, packings)


@pytest.mark.parametrize("padding", ["left", "holes", "masked row"])
@each_model
def test_unpadded_types_and_embeddings_equal_ordinary(row, padding, packings):
    model, inputs = build(row), padded_inputs(row, padding)
    mask = inputs["attention_mask"]
    inputs["token_type_ids"] = torch.randint(0, getattr(model.config, "type_vocab_size", VOCAB), mask.shape)
    assert_same_as_ordinary(row, model, inputs, packings)
    ids = inputs.pop("input_ids")
    if row.num_choices is None:
        inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
        assert_same_as_ordinary(row, model, inputs, packings)


@pytest.mark.parametrize("padding", PADDINGS)
@each_model
def test_unpadded_states_are_zero_at_padding(row, padding, packings):
    model, inputs = row.build(), padded_inputs(row, padding)
    inputs.pop(row.index_argument, None)
    base = getattr(model, model.base_model_prefix, model)
    if row.config_class is CustomBertConfig and row.num_choices is not None:
        inputs = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
    is_padding = torch.nn.functional.pad(inputs["attention_mask"] == 0, (0, row.num_patches))
    outputs = base(**inputs, use_cache=False, output_hidden_states=True)
    assert packings[-1] is not None
    assert outputs.last_hidden_state.shape == (*is_padding.shape, model.config.hidden_size)
    assert not outputs.last_hidden_state[is_padding].any()
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    for states in outputs.hidden_states:
        assert not states.view(*is_padding.shape, -1)[is_padding].any() and states.any()


@pytest.mark.parametrize("padding", PADDINGS[:-1])
@pytest.mark.parametrize("row", LABELLED, ids=name_of)
def test_unpadded_loss_equals_ordinary_and_grad(row, padding, packings):
    model, inputs = row.build().train(), padded_inputs(row, padding)
    labels = real_labels(row, inputs)
    found = []
    for kwargs in ({}, ordinary_path(row)):
        outputs = model(**inputs, **labels, **kwargs)
        loss = outputs.loss if outputs.get("mc_loss") is None else outputs.loss + outputs.mc_loss
        found.append((loss, gradients_of(model, loss)))
    assert packings[0] is not None and packings[1] is None
    assert_near(found[0][0], found[1][0], 1e-6, scale_floor=0.0)
    assert_gradients_near(found[0][1], found[1][1])


@pytest.mark.parametrize("padding", ["left", "holes", "masked row"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@each_writer
def test_label_after_padding_is_not_predicted(row, implementation, padding):
    model, inputs = row.build(attn_implementation=implementation).train(), padded_inputs(row, padding)
    mask, labels = inputs["attention_mask"], real_labels(row, inputs)["labels"]
    loss = model(**inputs, labels=labels).loss
    logits = model.eval()(**inputs).logits
    expected = labels.clone()
    expected[:, 1:][mask[:, :-1] == 0] = -100
    assert (expected != labels).any()
    assert_near(loss, reference.next_token_loss(logits, expected), 1e-6, scale_floor=0.0)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["ForMaskedLM", "ForMaskedLM-with-images", "ForPreTraining"])
def test_masked_token_at_padding_is_not_predicted(name, implementation, padding):
    row = ROWS[f"CustomBert{name}"]
    model, inputs = row.build(attn_implementation=implementation), padded_inputs(row, padding)
    labels, is_padding = inputs["input_ids"], inputs["attention_mask"] == 0
    assert is_padding.any()
    outputs = model(**inputs, labels=labels)
    logits = outputs["prediction_logits" if name == "ForPreTraining" else "logits"]
    expected = reference.cross_entropy(logits[~is_padding], labels[~is_padding])
    for losses in (outputs, model.train()(**inputs, labels=labels)):
        assert_near(losses.loss, expected, 1e-6, scale_floor=0.0)


@pytest.mark.parametrize("encoder_padding", [None, "right", "holes", "masked row"])
@pytest.mark.parametrize("padding", ["left", "right", "masked row"])
@each_writer
def test_unpadded_cross_attention_equals_ordinary(row, padding, encoder_padding, packings):
    model = row.build(add_cross_attention=True, num_hidden_layers=2).train()
    inputs = padded_inputs(row, padding)
    inputs["encoder_hidden_states"] = torch.randn(BATCH, 5, model.config.hidden_size)
    if encoder_padding is not None:
        masks = {
            "right": [[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
            "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [1] * 5],
            "masked row": [[1] * 5, [0] * 5, [0, 0, 1, 1, 0]],
        }
        inputs["encoder_attention_mask"] = torch.tensor(masks[encoder_padding])
        if encoder_padding == "masked row":
            # What a row without a single state of the encoder reads is said by the unpadded path alone: nothing.
            inputs["attention_mask"][1] = 0
    assert_same_as_ordinary(row, model, inputs, packings)


# --- Which path ---


def with_cache(model, inputs):
    cache = model(inputs["input_ids"][:, :5], attention_mask=inputs["attention_mask"][:, :5], use_cache=True)
    return model(
        inputs["input_ids"][:, 5:], attention_mask=inputs["attention_mask"], past_key_values=cache.past_key_values
    )


ORDINARY = {
    "attentions": lambda model, inputs: (
        model.set_attn_implementation("eager") or model(**inputs, output_attentions=True, labels=inputs["input_ids"])
    ),
    "attentions of sdpa": lambda model, inputs: model(**inputs, output_attentions=True, labels=inputs["input_ids"]),
    "cache asked for": lambda model, inputs: model(**inputs, use_cache=True, labels=inputs["input_ids"]),
    "cache by default": lambda model, inputs: model(**inputs),
    "cache given": with_cache,
    "generate": lambda model, inputs: model.generate(**inputs, max_new_tokens=3, do_sample=False),
    "mask of 4 dimensions": lambda model, inputs: model(
        inputs["input_ids"], attention_mask=torch.ones(BATCH, 1, LENGTH, LENGTH).bool().tril(), use_cache=False
    ),
    "no padding": lambda model, inputs: model(inputs["input_ids"], use_cache=False),
}


@pytest.mark.parametrize("call", ORDINARY.values(), ids=ORDINARY)
@each_writer
def test_ordinary_path_is_taken(row, call, packings):
    call(row.build(), padded_inputs(row, "left"))
    assert packings and all(packing is None for packing in packings)


def test_cache_by_place_takes_ordinary_path(packings):
    inputs = padded_inputs(CAUSAL_LM, "left")
    CAUSAL_LM.build()(inputs.pop("input_ids"), None, **inputs)
    assert packings == [None]


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("row", LABELLED, ids=name_of)
def test_labels_take_unpadded_path(row, is_training, packings):
    model, inputs = row.build(use_cache=True).train(is_training), padded_inputs(row, "left")
    shapes = []
    layers = model.transformer.h if row.config_class is CustomGPT2Config else model.bert.encoder.layer
    layers[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))
    outputs = model(**inputs, **real_labels(row, inputs))
    total = int(inputs["attention_mask"].sum()) + BATCH * row.num_patches
    assert packings[-1] is not None and shapes == [(1, total)]
    assert outputs.get("past_key_values") is None


# --- Dropout and cost ---


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("row", [*LABELLED, QUESTION], ids=name_of)
def test_seed_repeats_dropout_exactly(row, padding):
    model = row.build(**dict.fromkeys(row.config_class.probabilities, 0.1)).train()
    inputs = padded_inputs(row, padding) if padding else row.inputs()
    labels = real_labels(row, inputs)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs = model(**inputs, **labels)
        loss = outputs.loss if outputs.get("mc_loss") is None else outputs.loss + outputs.mc_loss
        found.append({"loss": loss.detach(), **gradients_of(model, loss)})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["loss"], found[2]["loss"])


# torch counts its GPU kernels' operations and leaves out the CPU's.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *args, out_shape=None, **kwargs: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *args, out_shape=None, **kwargs: 2.5 * sdpa_flop_count(query, key, value)
    ),
}


def operations_of_step(model, input_ids, attention_mask=None, labels=None):
    if labels is None:
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(input_ids, attention_mask=attention_mask, labels=labels).loss.backward()
    found = counter.get_flop_counts()["Global"]
    assert sum("attention" in str(name) for name in found) == 2
    return sum(found.values())


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("row", [CAUSAL_LM, MASKED_LM], ids=name_of)
def test_padding_costs_no_operations(row, padding):
    model = row.build(hidden_size=64, num_hidden_layers=2).train()
    batch, length, real = 16, 32, 8
    ids, mask = torch.randint(0, VOCAB, (batch, length)), torch.zeros(batch, length, dtype=torch.long)
    columns = slice(length - real, None) if padding == "left" else slice(0, real)
    mask[:, columns] = 1
    padded, full = operations_of_step(model, ids, mask), operations_of_step(model, ids)
    alone = operations_of_step(model, ids[:, columns])
    assert padded <= 0.3 * full
    assert abs(padded - alone) <= 0.02 * alone


@pytest.mark.parametrize("name", ["ForMaskedLM", "ForPreTraining"])
def test_masked_lm_head_computes_labelled_positions_alone(name):
    row = ROWS[f"CustomBert{name}"]
    model, ids = row.build().train(), row.inputs()["input_ids"]
    width, found = model.config.hidden_size, []
    for count in (1, 3, LENGTH):
        labels = ids.masked_fill(torch.arange(LENGTH) >= count, -100)
        found.append(operations_of_step(model, ids, labels=labels))
    # Forwards and to both gradients: the transform and the vocabulary's logits, two operations a weight.
    each = 3 * 2 * (width * width + width * VOCAB) * BATCH
    assert [operations - found[0] for operations in found] == [0, 2 * each, (LENGTH - 1) * each]
