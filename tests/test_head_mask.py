"""Head masks: every class and implementation against weights multiplied by hand, against weights cut out of stock."""

import importlib.util
import re
import shutil

import pytest
import torch
import transformers
from parity import draw_encoder
from reference import assert_gradients_near, assert_near, assert_outputs_near, gradients_of, real_outputs, weighted_sum
from tiny import BATCH, LENGTH, MODELS, VARIANTS, VISION, name_of, widen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hf_custom import (
    CustomBlip2Config,
    CustomBlip2ForConditionalGeneration,
    CustomBlip2QFormerConfig,
    CustomBlip2QFormerModel,
    CustomBlip2VisionConfig,
    CustomBlip2VisionForImageClassification,
    CustomBlip2VisionModel,
)
from hf_custom.attention import layer_head_masks, mask_heads

ROWS = {row.name: row for row in MODELS + VARIANTS}
CAUSAL_LM, BERT_CAUSAL_LM = ROWS["CustomGPT2ForCausalLM"], ROWS["CustomBertForCausalLM"]
BASE, ENCODER = ROWS["CustomGPT2Model"], ROWS["CustomBertModel"]
WITH_IMAGES = ROWS["CustomBertForMaskedLM-with-images"]
QFORMER = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "encoder_hidden_size": 24,
    "use_qformer_text_input": True,
}
TOWER = {**VISION, "num_hidden_layers": 3, "num_labels": 3}
HEADS = 4

each_model = pytest.mark.parametrize("row", ROWS.values(), ids=name_of)
each_writer = pytest.mark.parametrize("row", [CAUSAL_LM, BERT_CAUSAL_LM], ids=name_of)
each_body = pytest.mark.parametrize("row", [BASE, ENCODER], ids=name_of)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash_attn is not installed")


def attend_by_weights(module, query, key, value, attention_mask, scaling, position_bias=None, **kwargs):
    """Attention whose weights are multiplied after the softmax, by what the test has put on the module."""
    scores = query @ key.transpose(-1, -2) * scaling
    for bias in (position_bias, attention_mask):
        scores = scores if bias is None else scores + bias
    weights = scores.softmax(-1) * getattr(module, "factors", 1.0)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("by_weights", attend_by_weights)
AttentionMaskInterface.register("by_weights", eager_mask)


def layers_of(model):
    """(number of the layer, module) of every module that attends, but for those of a vision tower inside."""
    for name, module in model.named_modules():
        layer = re.search(r"\b(?:h|layer|layers)\.(\d+)\.(?:attn|crossattention|attention|self_attn)(?:\.\w+)?$", name)
        if layer and hasattr(module, "scaling") and not ("bert" in type(model).__name__.lower() and "vision" in name):
            yield int(layer.group(1)), module


def by_weights(model, factors):
    """`model` with weights multiplied by `factors`, (L, ...) that broadcast to (L, B, H, T, S)."""
    model.set_attn_implementation("by_weights")
    modules = list(layers_of(model))
    assert {layer for layer, _ in modules} == set(range(len(factors)))
    for layer, module in modules:
        module.factors = factors[layer]
    return model


def draw(num_layers, num_heads=HEADS):
    """Factors (L, H) of which some are zero and some negative, with a gradient."""
    factors = torch.randn(num_layers, num_heads)
    factors[0, 1] = factors[-1, 0] = 0.0
    return factors.requires_grad_()


def spread(head_mask):
    """(L, H) as (L, 1, H, 1, 1)."""
    return head_mask[:, None, :, None, None]


def with_gradients(model, outputs, head_mask):
    """Gradients of a number that depends on all outputs, by parameter and of the mask."""
    gradients = gradients_of(model, weighted_sum(outputs))
    gradients["head_mask"], head_mask.grad = head_mask.grad, None
    return gradients


def assert_same(row, model, inputs, head_mask, factors=None, **asked):
    """Outputs and gradients with `head_mask` and with the weights multiplied."""
    outputs = real_outputs(model, inputs, head_mask=head_mask, **asked)
    gradients = with_gradients(model, outputs, head_mask)
    by_weights(model, spread(head_mask) if factors is None else factors(head_mask))
    expected = real_outputs(model, inputs, **asked)
    assert_outputs_near(outputs, expected)
    assert_gradients_near(gradients, with_gradients(model, expected, head_mask))
    assert gradients["head_mask"].abs().min() > 0


# --- Every class, on every implementation ---

WAYS = [("eager", None), ("eager", "left"), ("sdpa", None), ("sdpa", "left"), ("sdpa", "right"), ("varlen", "right")]


@pytest.mark.parametrize("attn_implementation, padding", WAYS)
@each_model
def test_masked_heads_match_masked_weights_and_grad(row, attn_implementation, padding):
    model = row.build(attn_implementation=attn_implementation)
    asked = {"output_hidden_states": True, "output_attentions": attn_implementation == "eager"}
    assert_same(row, model, row.indexed_inputs(padding), draw(model.config.num_hidden_layers), **asked)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query", "rope"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_masked_heads_match_masked_weights_with_positions_in_the_scores(kind, padding):
    model = ENCODER.build(position_embedding_type=kind)
    assert_same(ENCODER, model, ENCODER.inputs(padding=padding), draw(2))


@pytest.mark.parametrize("attn_implementation, padding", WAYS)
@each_writer
def test_attention_over_an_encoder_has_the_same_mask(row, attn_implementation, padding):
    model = row.build(add_cross_attention=True, attn_implementation=attn_implementation)
    inputs = row.inputs(padding=padding) | draw_encoder(BATCH, 32)
    asked = {"output_attentions": attn_implementation == "eager"}
    assert_same(row, model, inputs, draw(model.config.num_hidden_layers), **asked)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.draw_labels(1, LENGTH)], ids=name_of)
def test_importance_of_heads_is_gradient_of_loss(row, padding):
    """Of the loss in training, whose logits are never in memory."""
    model, inputs, labels = row.build().train(), row.indexed_inputs(padding), row.draw_labels(BATCH, LENGTH)
    is_padding = inputs["attention_mask"] == 0
    for name, values in labels.items():
        labels[name] = values.masked_fill(is_padding, -100) if values.shape == is_padding.shape else values
    head_mask = torch.ones(model.config.num_hidden_layers, HEADS, requires_grad=True)

    def importance(**given):
        loss = sum(value for name, value in model(**inputs, **labels, **given).items() if "loss" in name)
        return torch.autograd.grad(loss, head_mask)[0]

    found = importance(head_mask=head_mask)
    by_weights(model, spread(head_mask))
    assert found.abs().min() > 0
    assert_near(found, importance(), scale_floor=0.0)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("row", [CAUSAL_LM, ENCODER], ids=name_of)
def test_gradient_of_mask_is_that_of_finite_differences(row, padding):
    model, inputs = row.build().double(), row.inputs(padding=padding)
    outputs = lambda head_mask: weighted_sum(real_outputs(model, inputs, head_mask=head_mask))  # noqa: E731
    head_mask = draw(model.config.num_hidden_layers).detach().double().requires_grad_()
    assert torch.autograd.gradcheck(outputs, head_mask, eps=1e-6, rtol=1e-6, atol=1e-6)


@needs_compiler
@torch.no_grad()
def test_flex_attention_masks_heads():
    model, inputs = CAUSAL_LM.build(attn_implementation="flex_attention"), CAUSAL_LM.inputs(padding="left")
    head_mask = draw(3).detach()
    outputs = real_outputs(model, inputs, head_mask=head_mask)
    assert_outputs_near(outputs, real_outputs(by_weights(model, spread(head_mask)), inputs))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", pytest.param("flash_attention_2", marks=needs_flash)])
def test_kernels_in_half_precision_mask_heads(attn_implementation, padding):
    model = CAUSAL_LM.build(attn_implementation=attn_implementation).cuda().bfloat16()
    inputs = {name: tensor.cuda() for name, tensor in CAUSAL_LM.inputs(padding=padding).items()}
    head_mask = draw(3).detach()
    outputs = real_outputs(model, inputs, head_mask=head_mask)
    expected = real_outputs(by_weights(model.float(), spread(head_mask).cuda()), inputs)
    assert_outputs_near(outputs, expected, 4 * torch.finfo(torch.bfloat16).eps)


# --- Forms of the mask ---


@pytest.mark.parametrize("attn_implementation, padding", WAYS)
@each_body
def test_stock_forms_reach_rows_and_queries(row, attn_implementation, padding):
    model = row.build(attn_implementation=attn_implementation)
    layers = model.config.num_hidden_layers
    shapes = [(layers, 1, HEADS, 1, 1), (1, BATCH, HEADS, 1, 1), (layers, BATCH, 1, LENGTH, 1), (1, 1, 1, LENGTH, 1)]
    shapes.append((layers, BATCH, HEADS, LENGTH, 1))
    for shape in shapes:
        model.set_attn_implementation(attn_implementation)
        factors = torch.randn(shape, requires_grad=True)
        inputs, expand = row.inputs(padding=padding), lambda mask: mask.expand(layers, -1, -1, -1, -1)
        outputs = real_outputs(model, inputs, head_mask=factors)
        (gradient,) = torch.autograd.grad(weighted_sum(outputs), factors)
        expected = real_outputs(by_weights(model, expand(factors)), inputs)
        (expected_gradient,) = torch.autograd.grad(weighted_sum(expected), factors)
        assert_outputs_near(outputs, expected)
        assert_near(gradient, expected_gradient, scale_floor=0.0)


def test_one_row_of_factors_is_of_all_layers():
    model, inputs, head_mask = BASE.build(), BASE.inputs(), torch.randn(HEADS)
    expected = model(**inputs, head_mask=head_mask.expand(3, HEADS)).last_hidden_state
    assert torch.equal(model(**inputs, head_mask=head_mask).last_hidden_state, expected)


@each_model
def test_mask_of_ones_changes_nothing(row):
    model, inputs = row.build(), row.indexed_inputs("left")
    ones = torch.ones(model.config.num_hidden_layers, HEADS)
    for head_mask in (ones, ones.bool(), ones.long(), ones.double()):
        actual, expected = real_outputs(model, inputs, head_mask=head_mask), real_outputs(model, inputs)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_body
def test_mask_takes_type_of_states(row, dtype):
    model, inputs, head_mask = row.build(), row.inputs(padding="left"), draw(row.build().config.num_hidden_layers)
    with torch.autocast("cpu", dtype=dtype):
        assert model(**inputs).last_hidden_state.dtype == model(**inputs, head_mask=head_mask).last_hidden_state.dtype
    states = model.to(dtype)(**inputs, head_mask=head_mask).last_hidden_state
    assert states.dtype == dtype
    weighted_sum({"": states.float()}).backward()
    assert head_mask.grad.dtype == torch.float32 and head_mask.grad.abs().min() > 0


# --- Packed documents ---


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@each_body
def test_packed_documents_are_masked_as_alone(row, attn_implementation):
    model, ids, lengths = row.build(attn_implementation=attn_implementation), row.inputs(1)["input_ids"], (4, 1, 6)
    head_mask = draw(model.config.num_hidden_layers)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = {"": model(input_ids=ids, position_ids=position_ids, head_mask=head_mask).last_hidden_state}
    gradients = with_gradients(model, packed, head_mask)
    documents = [model(input_ids=part, head_mask=head_mask).last_hidden_state for part in ids.split(lengths, dim=1)]
    expected = {"": torch.cat(documents, dim=1)}
    assert_outputs_near(packed, expected)
    assert_gradients_near(gradients, with_gradients(model, expected, head_mask))


# --- Against stock with the heads cut out ---


def cut(projection, head_mask, is_conv1d):
    """Zero what `projection` reads of the heads to drop."""
    rows = projection.weight if is_conv1d else projection.weight.t()
    rows.view(len(head_mask), -1, rows.shape[-1]).mul_(head_mask[:, None, None])


@pytest.mark.parametrize("attn_implementation, padding", WAYS)
@torch.no_grad()
def test_matches_stock_gpt2_without_those_heads(attn_implementation, padding):
    model, inputs = CAUSAL_LM.build(attn_implementation=attn_implementation), CAUSAL_LM.inputs(padding=padding)
    head_mask = (torch.rand(3, HEADS) > 0.5).float()
    stock = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CAUSAL_LM.fields)).eval()
    stock.load_state_dict(model.state_dict())
    for block, factors in zip(stock.transformer.h, head_mask, strict=True):
        cut(block.attn.c_proj, factors, is_conv1d=True)
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = stock(**inputs, position_ids=position_ids).logits
    is_real = inputs["attention_mask"].bool()
    assert_near(model(**inputs, head_mask=head_mask).logits[is_real], expected[is_real])


@pytest.mark.parametrize("attn_implementation, padding", [way for way in WAYS if way[1] != "left"])
@torch.no_grad()
def test_matches_stock_bert_without_those_heads(attn_implementation, padding):
    model, inputs = ENCODER.build(attn_implementation=attn_implementation), ENCODER.inputs(padding=padding)
    head_mask = (torch.rand(2, HEADS) > 0.5).float()
    stock = transformers.BertModel(transformers.BertConfig(**ENCODER.fields)).eval()
    stock.load_state_dict(model.state_dict())
    for layer, factors in zip(stock.encoder.layer, head_mask, strict=True):
        cut(layer.attention.output.dense, factors, is_conv1d=False)
    is_real = inputs["attention_mask"].bool()
    outputs, expected = model(**inputs, head_mask=head_mask), stock(**inputs)
    assert_near(outputs.last_hidden_state[is_real], expected.last_hidden_state[is_real])
    assert_near(outputs.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_matches_stock_tower_without_those_heads(attn_implementation):
    fields = {name: value for name, value in TOWER.items() if name != "num_labels"} | {"image_size": 12}
    config = CustomBlip2VisionConfig(**fields)
    model = widen(CustomBlip2VisionModel._from_config(config, attn_implementation=attn_implementation)).eval()
    stock = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**fields)).eval()
    stock.load_state_dict(model.state_dict())
    head_mask, pixel_values = (torch.rand(3, 2) > 0.5).float(), torch.randn(BATCH, 3, 12, 12)
    for layer, factors in zip(stock.encoder.layers, head_mask, strict=True):
        cut(layer.self_attn.projection, factors, is_conv1d=False)
    outputs, expected = model(pixel_values, head_mask=head_mask), stock(pixel_values)
    assert_near(outputs.last_hidden_state, expected.last_hidden_state)


# --- Images, queries, and the model of both ---


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_class", [CustomBlip2VisionModel, CustomBlip2VisionForImageClassification])
def test_tower_masks_heads(model_class, attn_implementation):
    model = model_class._from_config(CustomBlip2VisionConfig(**TOWER), attn_implementation=attn_implementation)
    widen(model).double().eval()
    pixel_values, head_mask = torch.randn(BATCH, 3, 8, 12).double(), draw(3, 2)
    asked = {"output_hidden_states": True, "output_attentions": attn_implementation == "eager", "return_dict": True}

    def run(**given):
        found = model(pixel_values, **asked, **given)
        states = enumerate((*found.hidden_states, *(found.attentions or ()), *found.to_tuple()[:1]))
        return {str(place): tensor for place, tensor in states if tensor is not None}

    outputs = run(head_mask=head_mask)
    gradients = with_gradients(model, outputs, head_mask)
    expected = (by_weights(model, spread(head_mask)), run())[1]
    assert_outputs_near(outputs, expected)
    assert_gradients_near(gradients, with_gradients(model, expected, head_mask))
    rows = torch.randn(3, BATCH, 2, 1, 1).double()
    model.set_attn_implementation(attn_implementation)
    outputs = run(head_mask=rows)
    assert_outputs_near(outputs, (by_weights(model, rows), run())[1])


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["bidirectional", "unimodal", "multimodal_causal"])
def test_queries_and_text_are_masked_alike(mode, attn_implementation):
    config = CustomBlip2QFormerConfig(**QFORMER)
    model = widen(CustomBlip2QFormerModel._from_config(config, attn_implementation=attn_implementation)).double()
    mask = torch.tensor([[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1, 1]])
    inputs = {
        "query_embeds": torch.randn(BATCH, 8, 32).double(),
        "query_length": 3,
        "attention_mask": mask,
        "encoder_hidden_states": torch.randn(BATCH, 4, 24).double(),
        "attention_mode": mode,
    }
    head_mask = draw(3)

    def run(**given):
        return {"": model(**inputs, **given).last_hidden_state[mask.bool()]}

    outputs = run(head_mask=head_mask)
    gradients = with_gradients(model, outputs, head_mask)
    expected = (by_weights(model, spread(head_mask)), run())[1]
    assert_outputs_near(outputs, expected)
    assert_gradients_near(gradients, with_gradients(model, expected, head_mask))


def blip2(text):
    texts = {"custom_gpt2": BASE.fields, "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32}}
    text_config = {**texts[text], "model_type": text, "num_hidden_layers": 3, "num_attention_heads": HEADS}
    parts = {"vision_config": TOWER, "qformer_config": {**QFORMER, "use_qformer_text_input": False}}
    config = CustomBlip2Config(**parts, text_config=text_config, num_query_tokens=2, image_token_index=7)
    return widen(CustomBlip2ForConditionalGeneration(config)).eval()


@torch.no_grad()
def test_language_model_of_blip2_masks_heads():
    model, head_mask = blip2("custom_gpt2"), draw(3).detach()
    ids = torch.tensor([[7, 7, 5, 6, 8], [7, 7, 9, 4, 98]])
    inputs = {"pixel_values": torch.randn(2, 3, 8, 12), "input_ids": ids, "attention_mask": (ids != 98).long()}
    logits = model(**inputs, head_mask=head_mask).logits
    loss = model.train()(**inputs, labels=ids, head_mask=head_mask).loss
    tokens = model.eval().generate(**inputs, head_mask=head_mask, num_beams=2, max_new_tokens=5)
    by_weights(model.language_model, spread(head_mask))
    is_real = inputs["attention_mask"].bool()
    assert_near(logits[is_real], model(**inputs).logits[is_real])
    assert_near(loss, model.train()(**inputs, labels=ids).loss)
    assert torch.equal(tokens, model.eval().generate(**inputs, num_beams=2, max_new_tokens=5))


def test_language_model_that_masks_no_heads_is_named():
    with pytest.raises(ValueError, match="`head_mask` is for the language model, but OPTForCausalLM would not read it"):
        blip2("opt")(torch.randn(1, 3, 8, 12), torch.tensor([[7, 7, 5]]), head_mask=torch.ones(3, HEADS))


# --- Cache, generation, checkpointing, compilation ---


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@each_writer
@torch.no_grad()
def test_cached_steps_are_masked_as_whole_sequence(row, attn_implementation):
    model, ids = row.build(attn_implementation=attn_implementation), row.inputs()["input_ids"]
    head_mask = draw(model.config.num_hidden_layers)
    expected = model(input_ids=ids, head_mask=head_mask).logits
    cache, steps = None, []
    for part in ids.split((4, 1, 1, 5), dim=1):
        outputs = model(input_ids=part, past_key_values=cache, use_cache=True, head_mask=head_mask)
        cache = outputs.past_key_values
        steps.append(outputs.logits)
    assert_near(torch.cat(steps, dim=1), expected)


DECODING = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("decoding", DECODING.values(), ids=DECODING)
@each_writer
def test_generate_takes_head_mask(row, decoding):
    model, inputs = row.build(), row.inputs(padding="left")
    head_mask = draw(model.config.num_hidden_layers).detach()
    found = []
    for given in ({"head_mask": head_mask}, {"head_mask": spread(head_mask).expand(-1, BATCH, -1, 1, 1)}, {}):
        if not given:
            by_weights(model, spread(head_mask))
        transformers.set_seed(1)
        found.append(model.generate(**inputs, **given, **decoding, max_new_tokens=12))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    by_weights(model, torch.ones(model.config.num_hidden_layers))
    transformers.set_seed(1)
    assert not torch.equal(model.generate(**inputs, **decoding, max_new_tokens=12), found[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("row", [CAUSAL_LM, WITH_IMAGES], ids=name_of)
def test_checkpointing_gives_same_gradient_of_mask(row, padding, use_reentrant):
    model, inputs, labels = row.build().train(), row.inputs(padding=padding), row.draw_labels(BATCH, LENGTH)
    head_mask, found = draw(model.config.num_hidden_layers), []
    for is_checkpointing in (False, True):
        if is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        gradients = gradients_of(model, model(**inputs, **labels, head_mask=head_mask).loss)
        found.append(gradients | {"head_mask": head_mask.grad})
        head_mask.grad = None
    assert_gradients_near(found[1], found[0])


@each_body
def test_compiled_model_masks_heads_in_one_graph(row):
    model, inputs = row.build(), row.inputs()
    head_mask = draw(model.config.num_hidden_layers)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs, expected = (real_outputs(either, inputs, head_mask=head_mask) for either in (compiled, model))
    assert_outputs_near(outputs, expected)
    assert_gradients_near(*(with_gradients(model, found, head_mask) for found in (outputs, expected)))


# --- Refusals ---

WRONG = {
    "heads": (torch.ones(3, 5), ValueError, r"shape \(3, 5\) but \(4,\) or \(3, 4\) is needed.*`num_attention_heads`"),
    "layers": (torch.ones(2, 4), ValueError, r"shape \(2, 4\).*`num_hidden_layers`.*torch.ones\(3, 4\)"),
    "rows": (torch.ones(3, 2, 4, 1, 1), ValueError, r"five axes that broadcast to \(3, 3, 4, 11, 1\)"),
    "keys": (torch.ones(3, 1, 4, 1, 11), ValueError, r"five axes that broadcast to \(3, 3, 4, 11, 1\)"),
    "axes": (torch.ones(3, 1, 4), ValueError, r"shape \(3, 1, 4\)"),
    "complex": (torch.ones(4, dtype=torch.complex64), TypeError, r"`head_mask` is torch.complex64.*real numbers"),
    "list": ([1, 1, 0, 1], TypeError, r"`head_mask` is list.*torch.ones\(3, 4\)"),
}


@pytest.mark.parametrize("head_mask, error, message", WRONG.values(), ids=WRONG)
def test_wrong_mask_is_refused_before_any_work(head_mask, error, message):
    model = CAUSAL_LM.build()
    model.transformer.wte.register_forward_pre_hook(lambda *args: pytest.fail("has begun"))
    with pytest.raises(error, match=message):
        model(**CAUSAL_LM.inputs(), head_mask=head_mask)


def test_wrong_mask_of_other_parts_is_refused():
    tower = CustomBlip2VisionModel(CustomBlip2VisionConfig(**TOWER))
    with pytest.raises(ValueError, match=r"\(3, 2\) is needed"):
        tower(torch.randn(1, 3, 8, 12), head_mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"\(2, 4\) is needed"):
        ENCODER.build()(**ENCODER.inputs(), head_mask=torch.ones(4, 2))


@each_body
def test_layers_taken_out_take_their_masks_with_them(row):
    """As when a model is made shallower by hand."""
    model = row.build()
    layers = model.h if row is BASE else model.encoder.layer
    del layers[-1]
    assert layer_head_masks(None, layers, model.config) == (None,) * len(layers)
    model(**row.inputs(), head_mask=torch.ones(len(layers), HEADS))


def test_heads_of_other_processes_are_named():
    (factors,) = layer_head_masks(torch.ones(1, HEADS), [None], BASE.config())
    with pytest.raises(ValueError, match="4 heads, of which this process computes 2.*without tensor parallelism"):
        mask_heads(torch.ones(1, 5, 2, 8), None, factors)
