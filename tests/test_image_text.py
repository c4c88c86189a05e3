"""BERT with image patches behind its text: against text models that read the joined embeddings; heads and refusals."""

import json

import pytest
import torch
from reference import (
    assert_gradients_near,
    assert_near,
    assert_outputs_near,
    gradients_of,
    weighted_sum,
)
from tiny import BATCH, BERT, BERT_WITH_IMAGES, LABELS, VISION, VOCAB, widen
from transformers import AutoModelForVisualQuestionAnswering, BertConfig, BertModel, Blip2VisionConfig
from transformers.models.bert.modeling_bert import BertForMaskedLM

from hf_custom import (
    CustomBertConfig,
    CustomBertForCausalLM,
    CustomBertForImageTextRetrieval,
    CustomBertForMaskedLM,
    CustomBertForQuestionAnswering,
    CustomBertForSequenceClassification,
    CustomBertForTokenClassification,
    CustomBertForVisualQuestionAnswering,
    CustomBertModel,
    CustomBlip2VisionConfig,
)
from hf_custom.ops import sinusoidal_positions

LENGTH, PATCHES = 6, 7
WITHOUT_TOWER = {**VISION, "num_hidden_layers": 0}
MASKS = {
    "none": None,
    "left": [[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]],
    "right": [[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    "holes": [[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 1, 1]],
    "one token": [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]],
}
# Position of the first patch of each row.
BEHIND = {"none": [6, 6, 6], "left": [6, 4, 2], "right": [6, 3, 5], "holes": [6, 4, 4], "one token": [1, 1, 1]}
KINDS = ["absolute", "sinusoidal", "rope", "relative_key", "relative_key_query"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_padding = pytest.mark.parametrize("padding", MASKS)
each_implementation = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])


def build(model_class=CustomBertModel, attn_implementation="sdpa", **fields):
    """The model with wide weights, in evaluation mode."""
    config = CustomBertConfig(**{**BERT_WITH_IMAGES, **fields})
    return widen(model_class._from_config(config, attn_implementation=attn_implementation)).eval()


def images(batch=BATCH, height=8, width=12):
    return torch.randn(batch, 3, height, width)


def draw_inputs(padding="none"):
    """Ids, segments, images and, for some paddings, a mask."""
    shape = (BATCH, LENGTH)
    inputs = {"input_ids": torch.randint(0, VOCAB - 2, shape), "token_type_ids": torch.randint(0, 3, shape)}
    if MASKS[padding] is not None:
        inputs["attention_mask"] = torch.tensor(MASKS[padding])
    return {**inputs, "pixel_values": images()}


def without_images(model):
    """A text model, eager, that shares the parameters it has in common with `model`."""
    config = CustomBertConfig.from_dict({**model.config.to_dict(), "vision_config": None})
    twin = CustomBertModel._from_config(config, attn_implementation="eager").eval()
    for name, _ in list(twin.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(owner), attribute, model.get_parameter(name))
    return twin


def positions_of(padding):
    """Of text and patches, (B, T + P): columns from the first real token of a row; patches behind the last."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long) if MASKS[padding] is None else torch.tensor(MASKS[padding])
    rows = []
    for b in range(BATCH):
        first = mask[b].tolist().index(1)
        text = [max(0, t - first) for t in range(LENGTH)]
        rows.append(text + [BEHIND[padding][b] + p for p in range(PATCHES)])
    return mask, torch.tensor(rows)


def expected_outputs(model, inputs, padding):
    """What a text model gives for the text's embeddings and the projected patches, each with its modality."""
    twin, embeddings = without_images(model), model.embeddings
    mask, position_ids = positions_of(padding)
    modalities = embeddings.modality_type_embeddings.weight
    patches = model.vision_projection(model.vision_model(inputs["pixel_values"]).last_hidden_state) + modalities[1]
    # The text model adds positions and segments, of which patches have none.
    behind = position_ids[:, LENGTH:]
    if model.config.position_embedding_type == "absolute":
        patches = patches - embeddings.position_embeddings(behind)
    elif model.config.position_embedding_type == "sinusoidal":
        patches = patches - sinusoidal_positions(behind, model.config.hidden_size)
    patches = patches - embeddings.token_type_embeddings.weight[0]
    text = embeddings.word_embeddings(inputs["input_ids"]) + modalities[0]
    ones = torch.ones(BATCH, PATCHES, dtype=torch.long)
    segments = inputs.get("token_type_ids", torch.zeros(BATCH, LENGTH, dtype=torch.long))
    return mask, twin(
        inputs_embeds=torch.cat((text, patches), dim=1),
        token_type_ids=torch.cat((segments, 0 * ones), dim=1),
        attention_mask=torch.cat((mask, ones), dim=1),
        position_ids=position_ids,
        output_hidden_states=True,
    )


def at_real_places(outputs, mask):
    is_real = torch.cat((mask, torch.ones(BATCH, PATCHES, dtype=torch.long)), dim=1).bool()
    states = {f"hidden_states.{i}": state[is_real] for i, state in enumerate(outputs.hidden_states)}
    return {**states, "last": outputs.last_hidden_state[is_real], "pooled": outputs.pooler_output}


STREAMS = [pytest.param(kind, VISION, id=f"{kind}-tower") for kind in KINDS]
# What the tower makes of an image is the same to all kinds.
STREAMS += [pytest.param("absolute", WITHOUT_TOWER, id="absolute-patches alone")]


@each_padding
@each_implementation
@pytest.mark.parametrize(("kind", "vision_config"), STREAMS)
def test_stream_of_text_and_patches_equals_a_text_model_and_grad(kind, attn_implementation, padding, vision_config):
    model = build(attn_implementation=attn_implementation, position_embedding_type=kind, vision_config=vision_config)
    inputs = draw_inputs(padding)
    outputs = model(**inputs, output_hidden_states=True)
    assert outputs.last_hidden_state.shape == (BATCH, LENGTH + PATCHES, 32)
    mask, expected = expected_outputs(model, inputs, padding)
    found, expected = at_real_places(outputs, mask), at_real_places(expected, mask)
    assert_outputs_near(found, expected)
    gradients, expected = (gradients_of(model, weighted_sum(values)) for values in (found, expected))
    assert_gradients_near(gradients, expected)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    if attn_implementation == "sdpa" and padding != "none":
        assert not any(state[:, :LENGTH][mask == 0].any() for state in outputs.hidden_states)


@pytest.mark.parametrize(
    ("attn_implementation", "padding"), [*(("sdpa", padding) for padding in MASKS), ("eager", "left")]
)
@each_kind
def test_text_alone_is_read_as_by_a_text_model(kind, attn_implementation, padding):
    model = build(attn_implementation=attn_implementation, position_embedding_type=kind)
    inputs = draw_inputs(padding)
    del inputs["pixel_values"]
    mask = torch.tensor(MASKS[padding]) if MASKS[padding] else torch.ones(BATCH, LENGTH)
    outputs, twin = model(**inputs), without_images(model)
    text = model.embeddings.word_embeddings(inputs.pop("input_ids"))
    expected = twin(inputs_embeds=text + model.embeddings.modality_type_embeddings.weight[0], **inputs)
    assert outputs.last_hidden_state.shape == (BATCH, LENGTH, 32)
    assert_near(outputs.last_hidden_state[mask.bool()], expected.last_hidden_state[mask.bool()])
    assert_near(outputs.pooler_output, expected.pooler_output)


@each_implementation
def test_embeddings_are_read_as_ids(attn_implementation):
    model, inputs = build(attn_implementation=attn_implementation), draw_inputs("left")
    expected = model(**inputs).last_hidden_state
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert_near(model(**inputs).last_hidden_state, expected)


@each_kind
def test_positions_may_be_given(kind):
    model, inputs = build(position_embedding_type=kind), draw_inputs()
    expected = model(**inputs).last_hidden_state
    given = torch.arange(LENGTH)[None]
    assert torch.equal(model(**inputs, position_ids=given).last_hidden_state, expected)
    shifted = model(**inputs, position_ids=given + 20).last_hidden_state
    # Kinds that turn or compare see the same differences; the others another position.
    is_same = torch.allclose(shifted, expected, atol=1e-4)
    assert is_same == (kind not in ("absolute", "sinusoidal"))


def test_absolute_positions_are_those_of_the_text_alone():
    """A text as long as the table of positions leaves room for patches, which have places of their own."""
    model = build(max_position_embeddings=LENGTH)
    assert model(**draw_inputs()).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="`max_position_embeddings` is 6"):
        model(torch.zeros(1, LENGTH + 1, dtype=torch.long), pixel_values=images(1))


def test_distances_to_patches_need_the_table():
    model = build(max_position_embeddings=LENGTH + PATCHES - 1, position_embedding_type="relative_key")
    with pytest.raises(ValueError, match=r"row 0 needs position 12 but `max_position_embeddings` is 12"):
        model(**draw_inputs())


@each_implementation
def test_image_is_read_by_its_own_text_and_padding_by_none(attn_implementation):
    model, inputs = build(attn_implementation=attn_implementation), draw_inputs("left")
    is_real = inputs["attention_mask"].bool()
    expected = model(**inputs)
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][1] += 1.0
    states = model(**changed).last_hidden_state
    difference = (states - expected.last_hidden_state).abs().amax(-1)
    assert (difference[1, :LENGTH][is_real[1]] > 1e-3).all() and (difference[1, LENGTH:] > 1e-3).all()
    assert not difference[[0, 2]].any()
    noise = {**inputs, "input_ids": torch.where(is_real, inputs["input_ids"], 5)}
    outputs = model(**noise)
    assert torch.equal(outputs.pooler_output, expected.pooler_output)
    assert torch.equal(outputs.last_hidden_state[:, LENGTH:], expected.last_hidden_state[:, LENGTH:])
    assert torch.equal(outputs.last_hidden_state[:, :LENGTH][is_real], expected.last_hidden_state[:, :LENGTH][is_real])


@each_implementation
def test_mask_hides_no_patch(attn_implementation):
    """A text without a token leaves the patches, which then count from 0, as in a stream of patches alone."""
    model, inputs = build(attn_implementation=attn_implementation, position_embedding_type="rope"), draw_inputs()
    inputs["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    inputs["attention_mask"][1] = 0
    states = model(**inputs).last_hidden_state
    patches = model.vision_projection(model.vision_model(inputs["pixel_values"][1:2]).last_hidden_state)
    patches = patches + model.embeddings.modality_type_embeddings.weight[1]
    patches = patches - model.embeddings.token_type_embeddings.weight[0]
    assert_near(states[1:2, LENGTH:], without_images(model)(inputs_embeds=patches).last_hidden_state)


@pytest.mark.parametrize("size", [(8, 12), (16, 8), (4, 20)], ids=str)
def test_images_of_another_size_are_interpolated_on_request(size):
    model, inputs = build(), {**draw_inputs("right"), "pixel_values": images(BATCH, *size)}
    states = model(**inputs, interpolate_pos_encoding=True).last_hidden_state
    count = 1 + size[0] // 4 * (size[1] // 4)
    assert states.shape == (BATCH, LENGTH + count, 32)
    patches = model.vision_model(inputs["pixel_values"], interpolate_pos_encoding=True).last_hidden_state
    seen = {}
    model.vision_projection.register_forward_hook(lambda module, args, output: seen.update(patches=args[0]))
    model(**inputs, interpolate_pos_encoding=True)
    assert torch.equal(seen["patches"], patches)


def test_compiled_model_gives_the_same_in_one_graph():
    model, inputs = build(), draw_inputs("left")
    expected = model(**inputs)
    outputs = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    is_real = inputs["attention_mask"].bool()
    assert_near(outputs.pooler_output, expected.pooler_output)
    assert_near(outputs.last_hidden_state[:, :LENGTH][is_real], expected.last_hidden_state[:, :LENGTH][is_real])
    assert_near(outputs.last_hidden_state[:, LENGTH:], expected.last_hidden_state[:, LENGTH:])


# --- Heads ---


def draw_classes(count):
    return lambda: {"labels": torch.randint(0, count, (BATCH,))}


def draw_masked():
    return {"labels": torch.randint(0, VOCAB, (BATCH, LENGTH))}


HEADS = {
    "answers": (CustomBertForVisualQuestionAnswering, draw_classes(LABELS)),
    "sequences": (CustomBertForSequenceClassification, draw_classes(LABELS)),
    "matching": (CustomBertForImageTextRetrieval, lambda: {"labels": torch.tensor([0, 0, 0])}),
    "masked": (CustomBertForMaskedLM, draw_masked),
}
each_head = pytest.mark.parametrize(("model_class", "draw_labels"), HEADS.values(), ids=HEADS)


def counted(labels, inputs):
    """Labels that the loss reads: those of tokens, where there are tokens."""
    if labels.ndim == 2 and "attention_mask" in inputs:
        return labels.masked_fill(inputs["attention_mask"] == 0, -100)
    return labels


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@each_head
def test_loss_is_the_cross_entropy_of_the_logits(model_class, draw_labels, padding):
    model, inputs, labels = build(model_class), draw_inputs(padding), draw_labels()
    outputs = model(**inputs, **labels)
    # Of a language model, the logits of the text alone.
    assert outputs.logits.shape[:-1] == labels["labels"].shape
    targets = counted(labels["labels"], inputs).flatten()
    expected = torch.nn.functional.cross_entropy(outputs.logits.double().flatten(0, -2), targets)
    assert_near(outputs.loss, expected, 1e-6, scale_floor=0.0)
    trained = model.train()(**inputs, **labels)
    assert_near(trained.loss, expected, 1e-6, scale_floor=0.0)
    assert_gradients_near(gradients_of(model, trained.loss), gradients_of(model, expected))


@each_head
def test_losses_of_micro_batches_add_up(model_class, draw_labels):
    model, inputs, labels = build(model_class).train(), draw_inputs("left"), draw_labels()
    whole = model(**inputs, **labels).loss
    expected = gradients_of(model, whole)
    items = (counted(labels["labels"], inputs) != -100).sum()
    parts = [
        model(**{name: value[rows] for name, value in {**inputs, **labels}.items()}, num_items_in_batch=items).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert_near(sum(parts), whole, 1e-6, scale_floor=0.0)
    assert_gradients_near(gradients_of(model, sum(parts)), expected)


@each_head
def test_head_reads_the_image(model_class, draw_labels):
    model, inputs = build(model_class), draw_inputs("right")
    expected = model(**inputs).logits
    assert (model(**{**inputs, "pixel_values": images()}).logits - expected).abs().max() > 1e-2
    del inputs["pixel_values"]
    assert (model(**inputs).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("model_class", [CustomBertForTokenClassification, CustomBertForQuestionAnswering])
def test_head_of_tokens_reads_text_positions_alone(model_class):
    model, inputs = build(model_class), draw_inputs("left")
    outputs = model(**inputs)
    assert outputs[0].shape[:2] == (BATCH, LENGTH)
    assert (model(**{**inputs, "pixel_values": images()})[0] - outputs[0]).abs().max() > 1e-2


def test_retrieval_ranks_the_texts_of_an_image():
    """As many texts as choices, each with the same image: what the model learns to tell apart."""
    model, inputs = build(CustomBertForImageTextRetrieval).train(), draw_inputs()
    inputs["pixel_values"] = inputs["pixel_values"][:1].expand(BATCH, -1, -1, -1)
    labels = torch.tensor([0, 1, 0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(15):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = model.eval()(**inputs).logits
    assert (logits[:, 1] - logits[:, 0]).argmax() == 1


# --- Refusals ---


def call(model_class=CustomBertModel, fields=None, **changes):
    def run():
        return build(model_class, **fields or {})(**{**draw_inputs(), **changes})

    return run


REFUSED = {
    "grey": (call(pixel_values=torch.zeros(3, 1, 8, 12)), ("`pixel_values`", "1 channels", "RGB")),
    "uncut": (
        call(pixel_values=torch.zeros(3, 3, 8, 14), interpolate_pos_encoding=True),
        ("`pixel_values` has shape (3, 3, 8, 14)", "patches of 4 x 4", "Resize"),
    ),
    "other size": (
        call(pixel_values=torch.zeros(3, 3, 12, 12)),
        ("12 x 12 pixels", "8 x 12", "`interpolate_pos_encoding=True`"),
    ),
    "fewer images": (call(pixel_values=images(2)), ("2 images but 3 texts", "one image a text")),
    "more images": (call(pixel_values=images(4)), ("4 images but 3 texts", "one image a text")),
    "text model": (
        call(fields={"vision_config": None}),
        ("`pixel_values` was passed to a model that reads text alone", "`vision_config`"),
    ),
    "ready mask": (
        call(attention_mask=torch.zeros(3, 1, LENGTH, LENGTH)),
        ("`attention_mask` has 4 dimensions", "covers the text alone", "tokenizer"),
    ),
    "mask of the stream": (
        call(attention_mask=torch.ones(3, LENGTH + PATCHES, dtype=torch.long)),
        ("`attention_mask` has shape (3, 13)", "(3, 6)", "tokenizer"),
    ),
    "decoder": (
        lambda: CustomBertConfig(**BERT_WITH_IMAGES, is_decoder=True),
        ("`vision_config`", "`is_decoder` is True", "Leave out one"),
    ),
}


@pytest.mark.parametrize(("run", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(run, words):
    with pytest.raises(ValueError) as caught:
        run()
    assert all(word in str(caught.value) for word in words), caught.value


def test_decoder_takes_no_images():
    with pytest.raises((TypeError, ValueError), match="pixel_values"):
        build(CustomBertForCausalLM, vision_config=None, is_decoder=True)(**draw_inputs())


# --- Saved folders ---

STOCK_FIELDS = {name: value for name, value in BERT.items() if name != "num_labels"}


@pytest.mark.parametrize(
    ("stock_class", "model_class", "head"),
    [
        (BertModel, CustomBertModel, set()),
        (BertForMaskedLM, CustomBertForMaskedLM, set()),
        (BertModel, CustomBertForVisualQuestionAnswering, {"classifier.weight", "classifier.bias"}),
        (BertModel, CustomBertForImageTextRetrieval, {"itm_head.weight", "itm_head.bias"}),
    ],
    ids=["model", "masked", "answers", "matching"],
)
def test_text_checkpoint_lacks_the_image_parts_alone(stock_class, model_class, head, tmp_path):
    stock = widen(stock_class(BertConfig(**STOCK_FIELDS))).eval()
    stock.save_pretrained(tmp_path)
    model, report = model_class.from_pretrained(tmp_path, vision_config=VISION, output_loading_info=True)
    of_images = ("vision_model.", "vision_projection.", "embeddings.modality_type_embeddings.")
    missing = {name for name in report["missing_keys"] if not name.removeprefix("bert.").startswith(of_images)}
    assert missing == head
    assert report["missing_keys"] > head and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.config.vision_config.to_dict()["hidden_size"] == VISION["hidden_size"]
    state = model.state_dict()
    for name, tensor in stock.base_model.state_dict().items():
        found = state[name if name in state else f"bert.{name}"]
        assert torch.equal(found, tensor), name
    assert all(tensor.isfinite().all() and tensor.abs().max() < 2 for tensor in state.values())
    assert model.eval()(**draw_inputs("left"))[0].isfinite().all()


@each_head
def test_saved_model_keeps_its_vision_config(model_class, draw_labels, tmp_path):
    model, inputs = build(model_class), draw_inputs("left")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    assert {name: stored[name] for name in VISION} == {**VISION, "image_size": list(VISION["image_size"])}
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded.config.vision_config) is CustomBlip2VisionConfig
    assert loaded.config.vision_config.grid == (2, 3)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_auto_class_gives_the_model_of_answers(tmp_path):
    build(CustomBertForVisualQuestionAnswering).save_pretrained(tmp_path)
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path)
    assert type(model) is CustomBertForVisualQuestionAnswering


@pytest.mark.parametrize(
    "given",
    [
        VISION,
        CustomBlip2VisionConfig(**VISION),
        {**VISION, "model_type": "blip_2_vision_model"},
        Blip2VisionConfig(**{**VISION, "image_size": 8}).to_dict(),
    ],
    ids=["fields", "configuration", "stock fields", "stock dictionary"],
)
def test_vision_config_may_be_given_as(given):
    config = CustomBertConfig(**{**BERT, "vision_config": given})
    assert type(config.vision_config) is CustomBlip2VisionConfig
    assert config.vision_config.model_type == "custom_blip2_vision_model"
    assert config.vision_config.hidden_size == VISION["hidden_size"]


def test_bad_vision_config_is_refused():
    with pytest.raises(ValueError, match=r"`patch_size` \(5\) does not divide `image_size`"):
        CustomBertConfig(**{**BERT, "vision_config": {**VISION, "patch_size": 5}})
    config = CustomBertConfig(**BERT_WITH_IMAGES)
    config.vision_config.patch_size = 5
    with pytest.raises(ValueError, match=r"`patch_size` \(5\) does not divide `image_size`"):
        CustomBertModel(config)
