"""The page that shows a model at work: its numbers are the model's, its texts are no markup, and mistakes are named."""

import importlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from sklearn.decomposition import PCA
from test_processing_blip2 import image, image_processor, make, word_tokenizer
from test_remote_code import QFORMER
from tiny import GPT2, MODELS, VARIANTS, VISION, VOCAB, tokenizer, widen
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import hf_custom
from hf_custom import cli, look, registry, stacks
from hf_custom.cards import CardRecord
from hf_custom.hub import save_model_folder
from hf_custom.look import PANELS, page_data, render_page
from hf_custom.stacks import FAMILIES, MAX_TOKENS, Request, open_image, readable_token

ROWS = {row.name: row for row in [*MODELS, *VARIANTS]}
TEXT = "what is it?"
TEXT_MODELS = [name for name in ROWS if name.startswith(("CustomGPT2", "CustomBert"))]


def ask(text=TEXT, picture=None, length=None, reader=None, processor=None):
    """A request and what reads it; several texts as a list."""
    texts = [text] if isinstance(text, str) else list(text)
    request = Request(texts, picture, length, processor, reader or tokenizer(), image_processor())
    if processor is not None:
        request.tokenizer, request.image_processor = processor.tokenizer, processor.image_processor
    return request


def build(name, **overrides):
    return ROWS[name].build(attn_implementation="eager", **overrides)


def panels_of(stack):
    """Data by the panel's heading."""
    return {panel["title"]: panel["data"] for panel in stack["panels"]}


def numbers(data):
    return torch.tensor(data["values"]) * data["unit"]


def close(data, expected):
    """Whether fixed-point numbers are these, but for their rounding."""
    torch.testing.assert_close(numbers(data), expected.float(), atol=0.51 * data["unit"], rtol=1e-5, check_dtype=False)


# --- Numbers ---


def test_every_family_has_a_row():
    assert {config_class.model_type for config_class, _ in registry.FAMILIES} <= set(FAMILIES)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_page_shows_what_the_model_computes(name):
    """Attention, hidden states and embeddings of every class that reads text, beside a plain call of it."""
    row, model = ROWS[name], build(name)
    has_image = "vision_config" in row.fields
    request = ask([TEXT, "no"] if row.num_choices else TEXT, image() if has_image else None)
    (stack,) = page_data(model, request)
    panels = panels_of(stack)
    inputs = (
        tokenizer()(TEXT, "no", return_tensors="pt") if "Choice" in name else tokenizer()(TEXT, return_tensors="pt")
    )
    inputs = {"input_ids": inputs["input_ids"]}
    length = inputs["input_ids"].shape[1]
    if has_image:
        inputs["pixel_values"] = image_processor()(image(), return_tensors="pt")["pixel_values"]
    if row.num_choices:
        inputs = {key: value.unsqueeze(0) for key, value in inputs.items()}
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    weights = torch.stack([layer[0] for layer in outputs.attentions])
    close(panels["Self-attention"], weights)
    shown = numbers(panels["Self-attention"])
    torch.testing.assert_close(shown.sum(-1), torch.ones(shown.shape[:-1]), atol=1e-4 * weights.shape[-1], rtol=0)
    for data, states in zip(panels["Hidden states"]["maps"], outputs.hidden_states, strict=True):
        close(data, states[0][:, :: data["step"]])
    is_causal = name.startswith("CustomGPT2") or row.fields.get("is_decoder", False)
    mask = torch.ones(weights.shape[-2:]).tril() if is_causal else torch.ones(weights.shape[-2:])
    assert panels["Mask"]["values"] == mask.long().tolist()
    words = next(data for data in panels["Embeddings"]["maps"] if data["name"] == "token embeddings")
    close(words, model.get_input_embeddings()(inputs["input_ids"].view(-1, length)[0]))
    assert panels["Tokens"]["ids"] == inputs["input_ids"].view(-1).tolist()


def test_lens_reads_every_layer_by_the_last_norm_and_the_head():
    model = build("CustomGPT2ForCausalLM")
    data = panels_of(page_data(model, ask())[0])["Logit lens"]
    inputs = tokenizer()(TEXT, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        early = [model.lm_head(model.transformer.ln_f(states)) for states in outputs.hidden_states[:-1]]
    expected = torch.stack([*early, outputs.logits])[:, 0].softmax(-1).flip(0).topk(5)
    close(data, expected.values)
    assert data["rows"] == ["layer 3", "layer 2", "layer 1", "embeddings"]
    reader = tokenizer()
    names = [[reader.convert_ids_to_tokens(place) for place in layer] for layer in expected.indices.tolist()]
    assert data["names"] == [[[readable_token(name, True) for name in place] for place in layer] for layer in names]


def test_lens_of_a_post_norm_model_is_the_head_alone():
    model = build("CustomBertForMaskedLM", vocab_size=len(word_tokenizer()), pad_token_id=0)
    inputs = word_tokenizer()("what is it?", return_tensors="pt")
    data = panels_of(page_data(model, ask(reader=word_tokenizer()))[0])["Logit lens"]
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        expected = torch.stack([model.cls.predictions(states)[0] for states in outputs.hidden_states])
    close(data, expected.softmax(-1).flip(0).topk(5).values)


def test_predictions_hold_all_logits():
    model = build("CustomGPT2ForCausalLM")
    data = panels_of(page_data(model, ask())[0])["Predicted tokens"]
    with torch.no_grad():
        logits = model(**tokenizer()(TEXT, return_tensors="pt")).logits[0]
    assert [shown["place"] for shown in data["places"]] == list(range(len(TEXT)))
    assert data["first"] == len(TEXT) - 1
    for shown in data["places"]:
        expected = logits[shown["place"]].sort(descending=True).values
        torch.testing.assert_close(torch.tensor(shown["logits"]), expected, rtol=1e-5, atol=1e-5)
    assert data["asks"] == "Behind which token"


def test_masked_token_is_what_is_predicted():
    reader = word_tokenizer()
    model = build("CustomBertForMaskedLM", vocab_size=len(reader), pad_token_id=0)
    (stack,) = page_data(model, ask("what [MASK] it?", reader=reader))
    data = panels_of(stack)["Predicted tokens"]
    place = reader("what [MASK] it?")["input_ids"].index(reader.mask_token_id)
    assert [shown["place"] for shown in data["places"]] == [place] and not stack["notes"]
    (stack,) = page_data(model, ask("what is it?", reader=reader))
    assert "No token is masked" in stack["notes"][0] and len(panels_of(stack)["Predicted tokens"]["places"]) > 1


def test_padding_is_masked():
    for name, is_causal in (("CustomGPT2ForCausalLM", True), ("CustomBertForMaskedLM", False)):
        panels = panels_of(page_data(build(name), ask("it is", length=8))[0])
        expected = torch.ones(8, 8).tril() if is_causal else torch.ones(8, 8)
        expected[:, 5:] = 0
        assert panels["Mask"]["values"] == expected.long().tolist()
        assert panels["Tokens"]["tokens"][5:] == ["<|pad|>"] * 3
        assert all(shown["place"] < 5 for shown in panels["Predicted tokens"]["places"])


CLASSES = {
    "CustomGPT2ForSequenceClassification": ("LABEL_0", "LABEL_1", "LABEL_2"),
    "CustomBertForSequenceClassification": ("LABEL_0", "LABEL_1", "LABEL_2"),
    "CustomBertForNextSentencePrediction": ("follows", "is another"),
    "CustomBertForVisualQuestionAnswering": ("LABEL_0", "LABEL_1", "LABEL_2"),
    "CustomBertForImageTextRetrieval": ("no match", "match"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_probabilities(name):
    model = build(name)
    picture = image() if "vision_config" in ROWS[name].fields else None
    (chart,) = panels_of(page_data(model, ask(picture=picture))[0])["The head’s answer"]["charts"]
    inputs = dict(tokenizer()(TEXT, return_tensors="pt"))
    if picture is not None:
        inputs["pixel_values"] = image_processor()(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(**inputs).logits[0].softmax(-1)
    assert tuple(chart["labels"]) == CLASSES[name]
    torch.testing.assert_close(torch.tensor(chart["values"]), expected)


def test_one_output_is_a_number():
    model = build("CustomBertForSequenceClassification", num_labels=1)
    (chart,) = panels_of(page_data(model, ask())[0])["The head’s answer"]["charts"]
    with torch.no_grad():
        value = model(**tokenizer()(TEXT, return_tensors="pt")).logits.item()
    assert chart["name"] == "value" and chart["values"] == [pytest.approx(value, abs=1e-6)]


def test_labels_that_exclude_none_have_probabilities_of_their_own():
    model = build("CustomGPT2ForSequenceClassification", problem_type="multi_label_classification")
    (chart,) = panels_of(page_data(model, ask())[0])["The head’s answer"]["charts"]
    with torch.no_grad():
        expected = model(**tokenizer()(TEXT, return_tensors="pt")).logits[0].sigmoid()
    torch.testing.assert_close(torch.tensor(chart["values"]), expected)


def test_choices_are_scored_beside_each_other():
    model = build("CustomBertForMultipleChoice")
    texts = ["what is it?", "a seven", "an eight or a nine"]
    (chart,) = panels_of(page_data(model, ask(texts))[0])["The head’s answer"]["charts"]
    reader = tokenizer()
    inputs = reader([texts[0]] * 2, texts[1:], return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        expected = model(**{key: value.unsqueeze(0) for key, value in inputs.items()}).logits[0].softmax(-1)
    assert chart["labels"] == texts[1:]
    torch.testing.assert_close(torch.tensor(chart["values"]), expected)


def test_tokens_have_classes_and_answers_have_ends():
    inputs = tokenizer()(TEXT, return_tensors="pt")
    for name in ("CustomGPT2ForTokenClassification", "CustomBertForTokenClassification"):
        model = build(name)
        data = panels_of(page_data(model, ask())[0])["The head’s answer, token by token"]
        with torch.no_grad():
            close(data, model(**inputs).logits[0].softmax(-1))
    for name in ("CustomGPT2ForQuestionAnswering", "CustomBertForQuestionAnswering"):
        model = build(name)
        data = panels_of(page_data(model, ask())[0])["The head’s answer, token by token"]
        with torch.no_grad():
            outputs = model(**inputs)
        close(data, torch.stack((outputs.start_logits[0].softmax(-1), outputs.end_logits[0].softmax(-1)), dim=-1))


POSITIONS = {
    ("CustomGPT2Model", "learned"): "position embeddings",
    ("CustomGPT2Model", "sinusoidal"): "position vectors, sines and cosines",
    ("CustomGPT2Model", "rope"): "cosines of the rotary angles",
    ("CustomBertModel", "absolute"): "position embeddings",
    ("CustomBertModel", "sinusoidal"): "position vectors, sines and cosines",
}


@pytest.mark.parametrize(("name", "kind"), POSITIONS)
def test_positions_are_shown_as_the_model_has_them(name, kind):
    model = build(name, position_embedding_type=kind)
    maps = {data["name"]: data for data in panels_of(page_data(model, ask())[0])["Embeddings"]["maps"]}
    data = maps[POSITIONS[name, kind]]
    assert data["rows"] == [str(position) for position in range(len(TEXT))]
    if POSITIONS[name, kind] == "position embeddings":
        table = model.wpe if name == "CustomGPT2Model" else model.embeddings.position_embeddings
        close(data, table.weight[: len(TEXT)])
    elif kind == "sinusoidal":
        angles = torch.arange(len(TEXT))[:, None] / 10_000 ** (torch.arange(0, 32, 2) / 32)
        close(data, torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1))


# --- Images ---


def vision(name, **fields):
    model_class = getattr(hf_custom, name)
    config = model_class.config_class(**VISION, **fields)
    return widen(model_class._from_config(config, attn_implementation="eager")).eval()


def blip2(name, **fields):
    model_class = getattr(hf_custom, name)
    processor = make(num_query_tokens=5 if "ForConditional" in name or name.endswith("Model") else None)
    config = hf_custom.CustomBlip2Config(
        vision_config=VISION,
        qformer_config={
            **QFORMER,
            "num_hidden_layers": 3,
            "use_qformer_text_input": True,
            "bos_token_id": 95,
            "vocab_size": VOCAB,
        },
        text_config=fields.get("text_config") or {**GPT2, "vocab_size": VOCAB + 1, "model_type": "custom_gpt2"},
        num_query_tokens=5,
        image_token_index=processor.image_token_id if processor.num_query_tokens else None,
    )
    return widen(model_class._from_config(config, attn_implementation="eager")).eval(), processor


def test_tower_shows_patches_and_their_attention():
    model = vision("CustomBlip2VisionForImageClassification", num_labels=3)
    panels = panels_of(page_data(model, ask([], image()))[0])
    pixels = image_processor()(image(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(pixels, output_attentions=True)
    data = panels["Self-attention"]
    close(data, outputs.attentions[0])
    assert data["rows"][:2] == ["[class]", "patch 1, 1"] and len(data["rows"]) == 7
    assert (data["picture"]["rows"], data["picture"]["columns"], data["picture"]["start"]) == (2, 3, 1)
    (chart,) = panels["The head’s answer"]["charts"]
    torch.testing.assert_close(torch.tensor(chart["values"]), outputs.logits[0].softmax(-1))
    assert "Mask" not in panels and "Patches" in panels


def test_picture_is_what_the_model_sees(tmp_path):
    """The pixels, with their normalisation undone."""
    import base64
    import io

    import numpy as np
    from PIL import Image

    request = ask([], image())
    picture = request.picture(request.pixels(), (2, 3), 1)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.source.split(",")[1]))))
    expected = image_processor()(image(), do_normalize=False, return_tensors="np")["pixel_values"][0] * 255
    assert np.abs(shown.transpose(2, 0, 1) - expected).max() <= 1


def test_text_and_patches_stand_in_one_stream():
    model = build("CustomBertForMaskedLM-with-images")
    data = panels_of(page_data(model, ask(picture=image()))[0])["Self-attention"]
    assert data["picture"]["start"] == len(TEXT) + 1
    assert data["rows"][len(TEXT)] == "[class]" and data["rows"][-1] == "patch 2, 3"


@pytest.mark.parametrize("name", ["CustomBlip2Model", "CustomBlip2ForConditionalGeneration"])
def test_whole_blip2_shows_all_its_parts(name):
    model, processor = blip2(name)
    tower, qformer, language = (panels_of(stack) for stack in page_data(model, ask("a", image(), processor=processor)))
    inputs = processor(images=image(), text="a", return_tensors="pt")
    record = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], **record)
        outputs = model(**inputs, **record)
    close(tower["Self-attention"], torch.stack(features.vision_outputs.attentions)[:, 0])
    close(qformer["Self-attention"], torch.stack(features.qformer_outputs.attentions)[:, 0])
    cross = [weights for weights in features.qformer_outputs.cross_attentions if weights is not None]
    close(qformer["Cross-attention"], torch.stack(cross)[:, 0])
    frequency = model.config.qformer_config.cross_attention_frequency
    assert qformer["Cross-attention"]["layers"] == [1 + frequency * index for index in range(len(cross))]
    close(language["Self-attention"], torch.stack(outputs.language_model_outputs.attentions)[:, 0])
    close(language["Hidden states"]["maps"][-1], outputs.language_model_outputs.hidden_states[-1][0])
    embeds = language["Embeddings"]["maps"][0]
    close(embeds, torch.cat((features.pooler_output[0], model.get_input_embeddings()(inputs["input_ids"][0, 5:]))))
    probabilities = outputs.logits[0].softmax(-1).topk(5).values
    close({**language["Logit lens"], "values": language["Logit lens"]["values"][0]}, probabilities)
    assert language["Tokens"]["tokens"] == [*(f"query {number}" for number in range(1, 6)), "a"]


SIZES = {"vocab_size": VOCAB + 1, "bos_token_id": 97, "eos_token_id": 97, "pad_token_id": 98}
STOCK = {
    "gpt2": {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        **SIZES,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
    },
    "t5": {
        **SIZES,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 98,
    },
}


@pytest.mark.parametrize("kind", STOCK)
def test_stock_language_models_are_shown(kind):
    model, processor = blip2("CustomBlip2ForConditionalGeneration", text_config={**STOCK[kind], "model_type": kind})
    _, _, *language = (panels_of(stack) for stack in page_data(model, ask("a", image(), processor=processor)))
    inputs = processor(images=image(), text="a", return_tensors="pt")
    with torch.no_grad():
        written = {"decoder_input_ids": torch.tensor([[98]])} if kind == "t5" else {}
        logits = model(**inputs, **written).logits[0, -1]
    shown = language[-1]["Predicted tokens"]["places"][-1]
    expected = logits.sort(descending=True).values
    torch.testing.assert_close(torch.tensor(shown["logits"]), expected, rtol=1e-5, atol=1e-5)
    assert len(language) == (2 if kind == "t5" else 1) and ("Logit lens" in language[0]) == (kind != "t5")
    if kind == "opt":
        # Its first two rows belong to no position.
        table = model.language_model.model.decoder.embed_positions.weight
        close(language[0]["Embeddings"]["maps"][1], table[2:8])


@pytest.mark.parametrize("name", ["CustomBlip2ForImageTextRetrieval", "CustomBlip2ForPreTraining"])
def test_first_stage_compares_matches_and_writes(name):
    model, processor = blip2(name)
    found = page_data(model, ask("a b", image(), processor=processor))
    assert len(found) == (3 if name.endswith("ForPreTraining") else 2)
    panels = panels_of(found[1])
    inputs = processor(images=image(), text="a b", return_tensors="pt")
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    matching, queries = panels["The head’s answer"]["charts"]
    with torch.no_grad():
        similarity = (model.get_image_features(pixels) @ model.get_text_features(ids)[0])[0]
        states = model.vision_model(pixels).last_hidden_state
        logits, _ = model._matching(ids, None, encoder_hidden_states=states)
    torch.testing.assert_close(torch.tensor(queries["values"]), similarity)
    torch.testing.assert_close(torch.tensor(matching["values"]), logits[0].softmax(-1))
    assert all(value == 1 for row in panels["Mask"]["values"] for value in row)
    if name.endswith("ForPreTraining"):
        writing = panels_of(found[2])
        mask = torch.ones(8, 8).tril()
        mask[:5, :5] = 1
        assert writing["Mask"]["values"] == mask.long().tolist()
        assert [shown["place"] for shown in writing["Predicted tokens"]["places"]] == [5, 6, 7]


def test_qformer_alone_says_that_it_saw_nothing():
    config = hf_custom.CustomBlip2QFormerConfig(**{**QFORMER, "encoder_hidden_size": 24})
    model = widen(hf_custom.CustomBlip2QFormerModel._from_config(config, attn_implementation="eager")).eval()
    (stack,) = page_data(model, ask([]))
    assert "drawn from a normal distribution" in stack["notes"][0]
    shown = numbers(panels_of(stack)["Cross-attention"])
    torch.testing.assert_close(shown.sum(-1), torch.ones(shown.shape[:-1]), atol=16e-4, rtol=0)


# --- Two sequences, and no attention ---

TRANSFORMER = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 97,
    "eos_token_id": 97,
    "pad_token_id": 98,
    "decoder_start_token_id": 97,
}


def transformer(name="CustomTransformerForSeq2SeqLM", **fields):
    config = hf_custom.CustomTransformerConfig(**{**TRANSFORMER, **fields})
    return widen(getattr(hf_custom, name)._from_config(config, attn_implementation="eager")).eval()


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_decoder_shows_both_stacks(norm_first):
    model = transformer(norm_first=norm_first)
    encoder, decoder = (panels_of(stack) for stack in page_data(model, ask(["it is", "what"])))
    reader = tokenizer()
    ids = reader("it is", return_tensors="pt")["input_ids"]
    written = torch.cat((torch.tensor([[97]]), reader("what", return_tensors="pt")["input_ids"]), dim=1)
    with torch.no_grad():
        outputs = model(ids, decoder_input_ids=written, output_attentions=True, output_hidden_states=True)
        norm = model.model.decoder.layer_norm if norm_first else torch.nn.Identity()
        early = [model.lm_head(norm(states))[0] for states in outputs.decoder_hidden_states[:-1]]
    close(encoder["Self-attention"], torch.stack(outputs.encoder_attentions)[:, 0])
    close(decoder["Self-attention"], torch.stack(outputs.decoder_attentions)[:, 0])
    close(decoder["Cross-attention"], torch.stack(outputs.cross_attentions)[:, 0])
    assert decoder["Cross-attention"]["columns"] == encoder["Tokens"]["tokens"] == ["i", "t", "␣", "i", "s"]
    assert decoder["Tokens"]["tokens"] == ["<|endoftext|>", "w", "h", "a", "t"]
    _, ended = page_data(model, ask(["it is", "what<|endoftext|>"]))
    assert panels_of(ended)["Tokens"] == decoder["Tokens"]
    assert decoder["Mask"]["values"] == torch.ones(5, 5).tril().long().tolist()
    close(decoder["Logit lens"], torch.stack([*early, outputs.logits[0]]).softmax(-1).flip(0).topk(5).values)
    tables = {data["name"]: data for data in encoder["Embeddings"]["maps"]}
    close(tables["token embeddings"], model.get_input_embeddings()(ids[0]))
    close(tables["position embeddings"], model.model.encoder.embed_positions.values()[:5])


def test_target_is_written_where_none_is_given():
    model = transformer()
    _, decoder = page_data(model, ask("it is"))
    ids = tokenizer()("it is", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=MAX_TOKENS - 1, do_sample=False, num_beams=1)[0].tolist()
    assert panels_of(decoder)["Tokens"]["ids"] == written[: -1 if written[-1] == 97 else None]
    assert "wrote the target itself" in decoder["notes"][0]
    with pytest.raises(ValueError, match="no head to write a target"):
        page_data(transformer("CustomTransformerModel"), ask("it is"))
    assert len(page_data(transformer("CustomTransformerModel"), ask(["it is", "a"]))) == 2


ELMO = {
    "vocab_size": VOCAB,
    "cell_size": 24,
    "projection_size": 8,
    "num_hidden_layers": 2,
    "filters": [[1, 4], [2, 4]],
    "num_highway_layers": 1,
    "character_embedding_size": 4,
    "max_characters_per_token": 10,
    "num_labels": 3,
    "pad_token_id": 0,
}


def elmo(name, **fields):
    config = hf_custom.CustomElmoConfig(**{**ELMO, **fields})
    return widen(getattr(hf_custom, name)(config)).eval()


def elmo_tokenizer():
    return hf_custom.CustomElmoTokenizer(max_characters_per_token=10)


def test_language_models_of_both_directions_are_shown():
    model = elmo("CustomElmoForPreTraining")
    inputs = elmo_tokenizer()("what is it ?", return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    found = page_data(model, ask("what is it ?", reader=elmo_tokenizer()))
    for number, (stack, logits) in enumerate(zip(found, (outputs.logits, outputs.backward_logits), strict=True)):
        panels = panels_of(stack)
        states = torch.stack(outputs.hidden_states)[:, 0, :, 8 * number : 8 * number + 8]
        assert len(panels["Hidden states"]["maps"]) == 3 and panels["Hidden states"]["maps"][0]["rows"][1] == "what"
        for data, layer in zip(panels["Hidden states"]["maps"], states, strict=True):
            close(data, layer)
        close(panels["Logit lens"], model.lm_head(states).softmax(-1).flip(0).topk(5).values)
        shown = panels["Predicted tokens"]["places"][0]
        expected = logits[0, shown["place"]].sort(descending=True).values
        torch.testing.assert_close(torch.tensor(shown["logits"]), expected, rtol=1e-5, atol=1e-5)
        assert "Self-attention" not in panels and "Mask" not in panels


def test_mix_of_the_layers_is_shown():
    model = elmo("CustomElmoForTokenClassification")
    (stack,) = page_data(model, ask("what is it ?", reader=elmo_tokenizer()))
    (chart,) = panels_of(stack)["The head’s answer"]["charts"]
    torch.testing.assert_close(torch.tensor(chart["values"]), model.elmo.scalar_mix.weights.softmax(0).detach())
    assert chart["labels"] == ["word vectors", "layer 1", "layer 2"]
    with torch.no_grad():
        logits = model(**elmo_tokenizer()("what is it ?", return_tensors="pt")).logits[0]
    close(panels_of(stack)["The head’s answer, token by token"], logits.softmax(-1))


def test_language_model_of_one_direction_is_shown():
    model = elmo("CustomElmoForCausalLM", input_type="words", bidirectional=False)
    (stack,) = page_data(model, ask())
    with torch.no_grad():
        logits = model(**tokenizer()(TEXT, return_tensors="pt")).logits[0]
    shown = panels_of(stack)["Predicted tokens"]["places"][-1]
    torch.testing.assert_close(
        torch.tensor(shown["logits"]), logits[-1].sort(descending=True).values, rtol=1e-5, atol=1e-5
    )
    assert panels_of(stack)["Tokens"]["ids"] == tokenizer()(TEXT)["input_ids"]


WORDS = ["king", "queen", "man", "woman", "child", "house", "tree", "river", "stone"]


def word_vectors(name="CustomWord2VecModel"):
    module = importlib.import_module("hf_custom.modeling_word2vec")
    config = importlib.import_module("hf_custom.configuration_word2vec").CustomWord2VecConfig(
        vocab_size=len(WORDS) + 1, hidden_size=6
    )
    model = getattr(module, name)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
        model.get_input_embeddings().weight[-1] = 0
    return model


def vocabulary():
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate([*WORDS, "[UNK]"])}, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[UNK]")


def test_neighbours_of_words_are_shown():
    model = word_vectors("CustomWord2VecForPreTraining")
    (stack,) = page_data(model, ask("king house spaceship king", reader=vocabulary()))
    panels = panels_of(stack)
    assert stack["notes"][0].endswith("left out: 'spaceship'.")
    vectors = model.word2vec.embeddings.weight
    for data, table in zip(panels["Embeddings"]["maps"], (vectors, model.output_embeddings.weight), strict=True):
        assert data["rows"] == ["king", "house"]
        close(data, table[[0, 5]])
    assert panels["Neighbours"]["isChosen"] and panels["Neighbours"]["most"] == 1
    for chart in panels["Neighbours"]["charts"]:
        own = vectors[WORDS.index(chart["name"])]
        expected = torch.nn.functional.cosine_similarity(own, vectors[:-1])
        for word, value in zip(chart["labels"], chart["values"], strict=True):
            assert value == pytest.approx(expected[WORDS.index(word)].item(), abs=1e-5)
        assert len(chart["labels"]) == 8 and chart["values"] == sorted(chart["values"], reverse=True)


def test_plane_holds_the_largest_variance():
    model = word_vectors()
    plane = panels_of(page_data(model, ask("king house", reader=vocabulary()))[0])["Neighbourhood"]
    assert {point["word"] for point in plane["points"]} == set(WORDS)
    assert [point["word"] for point in plane["points"] if point["asked"]] == ["king", "house"]
    units = torch.nn.functional.normalize(model.embeddings.weight, dim=-1).detach()
    order = [WORDS.index(point["word"]) for point in plane["points"]]
    expected = PCA(2).fit(units[order].numpy())
    assert plane["share"] == pytest.approx(expected.explained_variance_ratio_.sum(), abs=1e-5)
    found = torch.tensor([[point["x"], point["y"]] for point in plane["points"]])
    for axis in range(2):
        place = torch.tensor(expected.transform(units[order].numpy())[:, axis])
        scaled = (place - place.min()) / (place.max() - place.min())
        error = min((found[:, axis] - scaled).abs().max(), (found[:, axis] - (1 - scaled)).abs().max())
        assert error < 1e-5


def test_unknown_words_alone_are_refused():
    with pytest.raises(ValueError, match="no word of the vocabulary: 'spaceship'"):
        page_data(word_vectors(), ask("spaceship", reader=vocabulary()))
    (stack,) = page_data(word_vectors(), ask("king", reader=vocabulary()))
    assert len(panels_of(stack)["Neighbours"]["charts"]) == 1


# --- Size ---


def test_heads_and_layers_are_left_out_of_a_large_page(monkeypatch):
    monkeypatch.setattr(look, "MAX_WEIGHTS", 3 * len(TEXT) ** 2)
    data = panels_of(page_data(build("CustomGPT2ForCausalLM"), ask())[0])["Self-attention"]
    assert (data["layers"], data["heads"], data["left"]) == ([1], [1, 4], 10)
    monkeypatch.setattr(look, "MAX_WEIGHTS", 8 * len(TEXT) ** 2)
    data = panels_of(page_data(build("CustomGPT2ForCausalLM"), ask())[0])["Self-attention"]
    assert (data["layers"], data["heads"], data["left"]) == ([1, 3], [1, 3, 4], 6)


def test_predictions_of_a_large_vocabulary_are_fewer(monkeypatch):
    monkeypatch.setattr(stacks, "MAX_LOGITS", 2 * VOCAB)
    (stack,) = page_data(build("CustomGPT2ForCausalLM"), ask())
    places = [shown["place"] for shown in panels_of(stack)["Predicted tokens"]["places"]]
    assert places == [len(TEXT) - 2, len(TEXT) - 1] and "2 of 11 tokens" in stack["notes"][0]


def test_wide_vectors_and_many_rows_are_thinned(monkeypatch):
    monkeypatch.setattr(look, "MAX_COLUMNS", 10)
    monkeypatch.setattr(look, "MAX_ROWS", 3)
    model = build("CustomGPT2Model")
    data = panels_of(page_data(model, ask())[0])["Embeddings"]["maps"][0]
    assert (data["step"], data["rows"], data["left"]) == (4, ["w", "i", "?"], 8)
    close(data, model.wte(torch.tensor(tokenizer()(TEXT)["input_ids"]))[::5, ::4])


# --- The page ---

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028\u202e{{ 7*7 }}"


class Page(HTMLParser):
    """Tags, attributes and the data of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", tag)

    def handle_data(self, data):
        self.texts[self.inside] = self.texts.get(self.inside, "") + data


def render(model, request, title="a model"):
    return render_page(title, ["CustomGPT2ForCausalLM"], page_data(model, request), request)


def test_page_needs_no_network():
    page = render(build("CustomGPT2ForCausalLM"), ask())
    parsed = Page(page)
    assert [tag for tag, _ in parsed.tags if tag in ("link", "img", "iframe", "object", "base")] == []
    links = [value for _, found in parsed.tags for name, value in found.items() if name in ("src", "href")]
    assert links and all(link.startswith("#panel-") for link in links)
    policy = next(found["content"] for tag, found in parsed.tags if found.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|fetch\(|XMLHttpRequest|import\(", page)


def test_what_is_read_is_never_markup():
    """Titles, texts and tokens that would be markup, a script's end, a template or an invisible sign."""
    reader = tokenizer()
    reader.add_tokens([HOSTILE])
    model = build("CustomGPT2ForCausalLM", vocab_size=len(reader))
    page = render(model, ask(HOSTILE, reader=reader), title=HOSTILE)
    parsed = Page(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert not any(tag == "img" or "onerror" in found for tag, found in parsed.tags)
    assert "\u2028" not in parsed.texts["data"] and "49" not in parsed.texts["h1"]
    data = json.loads(parsed.texts["data"])
    shown = HOSTILE.replace(" ", "␣").replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
    assert data[0]["tokens"] == [shown]


def test_data_of_the_page_are_the_panels():
    request, model = ask(), build("CustomGPT2ForCausalLM")
    parsed = Page(render(model, request))
    sections = [found["data-kind"] for tag, found in parsed.tags if tag == "section"]
    assert sections == ["tokens", "maps", "mask", "attention", "maps", "lens", "next"]
    found = page_data(model, request)
    assert json.loads(parsed.texts["data"]) == json.loads(json.dumps([p["data"] for p in found[0]["panels"]]))
    assert parsed.texts["title"].strip() == "a model at work"


def test_every_panel_has_a_drawing_and_a_word_on_how_to_read_it():
    template = (Path(__file__).parent.parent / "hub_cards" / "_look.html").read_text()
    drawn = set(re.findall(r"^  (\w+)\(box", template, re.M))
    assert {panel.kind for panel in PANELS} == drawn
    assert all(panel.text.endswith(".") and panel.title for panel in PANELS)


def test_pictures_of_pages_are_small():
    pictures = sorted((Path(__file__).parent.parent / "docs" / "pictures").glob("look_*.png"))
    assert len(pictures) >= 3 and all(picture.stat().st_size < 150_000 for picture in pictures)


TOKENS = {
    ("Ġthe", True): "␣the",
    ("ĊĊ", True): "↵↵",
    ("Ã©", True): "é",
    ("Ã", True): "\\xc3",
    ("<|endoftext|>", True): "<|endoftext|>",
    ("Ġthe", False): "Ġthe",
    ("▁the", False): "␣the",
    ("##ing", False): "##ing",
    ("a\tb\x00\u200b", False): "a⇥b\\u0000\\u200b",
    ("日本", False): "日本",
}


@pytest.mark.parametrize(("token", "is_byte_level"), TOKENS)
def test_token_is_readable(token, is_byte_level):
    assert readable_token(token, is_byte_level) == TOKENS[token, is_byte_level]


# --- Mistakes ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    record = CardRecord("tiny", "three lines", metrics={"tiny": {"loss": 1.5}})
    folder = tmp_path_factory.mktemp("look") / "gpt2"
    return save_model_folder(folder, build("CustomGPT2ForCausalLM"), tokenizer(), record)


def run(*words):
    cli.main([str(word) for word in words])


def test_command_writes_the_page(folder, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    run("look", folder, "--text", TEXT, "--out", page)
    assert capsys.readouterr().out == f"written: {page}\n"
    assert Page(page.read_text()).texts["h1"].strip() == "gpt2 at work"
    sections = [found["data-kind"] for tag, found in Page(page.read_text()).tags if tag == "section"]
    assert sections == ["tokens", "maps", "mask", "attention", "maps", "lens", "next"]
    with pytest.raises(SystemExit, match="exists.*--overwrite"):
        run("look", folder, "--text", TEXT, "--out", page)
    run("look", folder, "--text", "it", "--out", page, "--overwrite")
    assert Page(page.read_text()).texts["blockquote"].strip() == "it"


MISTAKES = {
    "no text": ((), "`--text` is missing or empty. Add --text"),
    "an empty text": (("--text", ""), "`--text` is missing or empty"),
    "a text that is too long": (("--text", "a" * (MAX_TOKENS + 1)), "has 65 tokens, but a page shows at most 64"),
    "an image that is not there": (("--text", "a", "--image", "none.png"), "names none.png, which is no file"),
    "an image that is cut off": (("--text", "a", "--image", "cut.png"), "cannot be read as an image"),
    "an image that is none": (("--text", "a", "--image", __file__), "cannot be read as an image"),
    "an image for a model without vision": (
        ("--text", "a", "--image", "image.png"),
        "has no vision part. Leave out `--image`",
    ),
    "a length that is too short": (("--text", "abc", "--length", "2"), "3 tokens, more than `--length` 2"),
    "a length that is too long": (("--text", "abc", "--length", "65"), "must be from 1 to 64"),
    "a page by another name": (("--text", "a", "--out", "page.txt"), "a page's name ends in .html"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_ends_in_one_line_and_leaves_nothing(kind, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image().save("image.png")
    Path("cut.png").write_bytes(Path("image.png").read_bytes()[:200])
    words, message = MISTAKES[kind]
    with pytest.raises(SystemExit) as end:
        run("look", folder, "--out", "page.html", *words)
    assert message in end.value.code and "\n" not in end.value.code
    assert {file.name for file in tmp_path.iterdir()} == {"image.png", "cut.png"}


def test_unknown_folder_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nowhere is no folder"):
        run("look", "./nowhere", "--text", "a", "--out", tmp_path / "page.html")


REFUSED = {
    "an image that is missing": (lambda: build("CustomBertForVisualQuestionAnswering"), ask(), "`--image` is missing"),
    "a text that is missing": (
        lambda: build("CustomBertForVisualQuestionAnswering"),
        ask([], image()),
        "`--text` is missing or empty",
    ),
    "a text for a tower": (lambda: vision("CustomBlip2VisionModel"), ask("a", image()), "reads no text"),
    "a tower without an image": (lambda: vision("CustomBlip2VisionModel"), ask([]), "`--image` is missing"),
    "a text beyond the positions": (
        lambda: build("CustomGPT2ForCausalLM", n_positions=4),
        ask(),
        "`n_positions`",
    ),
    "weights that are spoiled": (lambda: spoil(build("CustomGPT2ForCausalLM")), ask(), "not finite"),
    "more texts than are read": (
        lambda: build("CustomGPT2Model"),
        ask(["a", "b", "c"]),
        "3 times, but CustomGPT2Model",
    ),
    "an empty second text": (lambda: build("CustomGPT2Model"), ask(["a", ""]), "missing or empty"),
    "padding of images": (lambda: vision("CustomBlip2VisionModel"), ask([], image(), length=3), "`--length` asks"),
    "padding of words": (word_vectors, ask("king", length=3, reader=vocabulary()), "`--length` asks"),
    "no tokenizer": (lambda: build("CustomGPT2ForCausalLM"), Request(["a"], None, None), "has no tokenizer"),
    "padding without its token": (
        lambda: build("CustomGPT2ForCausalLM"),
        ask("a", length=3, reader=type(tokenizer())(vocab={"a": 0, "<|endoftext|>": 1}, merges=[])),
        "has no padding token",
    ),
}


def spoil(model):
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    return model


@pytest.mark.parametrize("kind", REFUSED)
def test_request_that_a_model_cannot_answer_is_refused(kind):
    make_model, request, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        page_data(make_model(), request)


def test_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    image().save(tmp_path / "image.png")
    monkeypatch.setattr(stacks, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="130 pixels. Make it smaller"):
        open_image(tmp_path / "image.png")
