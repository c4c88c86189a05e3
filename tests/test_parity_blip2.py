"""BLIP-2 against stock with the same weights: outputs, loss, gradients, generated tokens, scores, saved folders."""

import inspect
import json

import pytest
import torch
import transformers
from parity import DECODING, assert_generate_alike, assert_same_weights, load_fully
from reference import (
    assert_gradients_near,
    assert_near,
    assert_outputs_near,
    at_real_positions,
    gradients_of,
    weighted_sum,
)
from tiny import name_of, widen
from transformers import Blip2Config, Blip2QFormerConfig, Blip2QFormerModel

import hf_custom
from hf_custom import CustomBlip2Config, CustomBlip2QFormerConfig, CustomBlip2QFormerModel

QUERIES, IMAGE, VOCAB = 5, 98, 99
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 8,
    "patch_size": 4,
}
QFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "encoder_hidden_size": VISION["hidden_size"],
}
READER = {**QFORMER, "use_qformer_text_input": True}
# Tokens at which generation would end are left out, so that it goes on.
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
TEXTS = {"custom_gpt2": GPT2, "gpt2": GPT2, "opt": OPT, "t5": T5}
WRITER, BASE, SCORER = "ForConditionalGeneration", "Model", "ForImageTextRetrieval"
each_text = pytest.mark.parametrize("text", TEXTS)
each_implementation = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])


def build(name=WRITER, text="opt", attn_implementation="eager", **fields):
    """Ours with wide weights, nothing of it frozen, and stock with the same."""
    qformer_config = READER if name == SCORER else QFORMER
    fields = {"num_query_tokens": QUERIES, "image_text_hidden_size": 12, "image_token_index": IMAGE, **fields}
    fields = {"vision_config": VISION, "qformer_config": qformer_config, **fields}
    config = CustomBlip2Config(**fields, text_config={**TEXTS[text], "model_type": text}, frozen_modules=[])
    ours = getattr(hf_custom, f"CustomBlip2{name}")._from_config(config, attn_implementation=attn_implementation)
    stock_text = {**TEXTS[text], "model_type": text.removeprefix("custom_")}
    stock_class = getattr(transformers, f"Blip2{name}")
    stock_config = Blip2Config(**fields, text_config=stock_text)
    stock = stock_class._from_config(stock_config, attn_implementation=attn_implementation)
    stock.load_state_dict(widen(ours).state_dict(), strict=True)
    return ours.eval(), stock.eval()


def images(batch=3):
    return torch.randn(batch, 3, 8, 8)


def prompts(padding=None, length=7):
    """Images, and texts behind their tokens; of each text but the first some are padding."""
    ids = torch.cat((torch.full((3, QUERIES), IMAGE), torch.randint(2, 90, (3, length))), 1)
    mask = torch.ones_like(ids)
    for row in (1, 2) if padding else ():
        ids[row, -2 * row :], mask[row, -2 * row :] = 0, 0
        if padding == "left":
            ids[row], mask[row] = ids[row].roll(2 * row), mask[row].roll(2 * row)
    return {"pixel_values": images(), "input_ids": ids, "attention_mask": mask}


def labels_of(text, inputs):
    """Of all tokens of the text, or of an answer to it."""
    if text == "t5":
        return torch.randint(2, 90, (3, 4)).index_fill(1, torch.tensor(2), -100)
    ids = inputs["input_ids"]
    return ids.masked_fill((ids == IMAGE) | (inputs["attention_mask"] == 0), -100)


def for_stock(text, inputs):
    """Stock's GPT-2 does not count the positions of padded texts itself."""
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**inputs, "position_ids": positions} if "gpt2" in text else inputs


def flat(outputs, prefix=""):
    """Tensors by name, those of parts as `part.name` and the members of tuples as `name.index`."""
    found = {}
    for name, output in outputs.items() if hasattr(outputs, "items") else enumerate(outputs):
        if isinstance(output, torch.Tensor):
            found[f"{prefix}{name}"] = output
        elif isinstance(output, tuple | transformers.utils.ModelOutput):
            found |= flat(output, f"{prefix}{name}.")
    return found


def real(outputs, mask):
    return {name: at_real_positions(output, mask) if output.ndim else output for name, output in outputs.items()}


def assert_trains_alike(ours, stock, objective, expected):
    gradients, expected = gradients_of(ours, objective), gradients_of(stock, expected)
    assert_gradients_near(gradients, expected)
    return gradients


# --- The whole model ---

MODELS = [(WRITER, text, padding) for text in TEXTS for padding in ("left", "right")]
MODELS += [(BASE, "opt", "left"), (BASE, "t5", "right")]


@pytest.mark.parametrize("name, text, padding", MODELS)
@each_implementation
def test_matches_stock(name, text, padding, attn_implementation):
    ours, stock = build(name, text, attn_implementation)
    inputs = prompts(padding)
    answers, mask = {"labels": labels_of(text, inputs)}, inputs["attention_mask"]
    stock_inputs = for_stock(text, inputs)
    outputs, expected = (flat(model(**given, **answers)) for model, given in ((ours, inputs), (stock, stock_inputs)))
    for part in ("logits", "vision_outputs.last_hidden_state", "qformer_outputs.last_hidden_state"):
        assert part in outputs
    assert_near(outputs["loss"], expected["loss"], 1e-6, scale_floor=0.0)
    assert_outputs_near(real(outputs, mask), real(expected, mask))
    asked = {"output_hidden_states": True, "output_attentions": attn_implementation == "eager"}
    given = {"decoder_input_ids": torch.randint(2, 90, (3, 4))} if text == "t5" else {}
    found = [
        flat(model(**inputs, **given, **asked).language_model_outputs)
        for model, inputs in ((ours, inputs), (stock, stock_inputs))
    ]
    assert_outputs_near(*(real(outputs, mask) for outputs in found))
    losses = ours.train()(**inputs, **answers).loss, stock.train()(**stock_inputs, **answers).loss
    assert_near(*losses, 1e-6, scale_floor=0.0)
    gradients = assert_trains_alike(ours, stock, *losses)
    assert gradients.keys() == dict(ours.named_parameters()).keys()


def test_labels_of_the_last_tokens_match_stock():
    """Of which stock, that fails with fewer labels than tokens in more than one row, is given all."""
    ours, stock = build(attn_implementation="sdpa")
    inputs = prompts("left")
    labels, items = inputs["input_ids"], torch.tensor(5)
    # The first of them is predicted by no labelled token.
    all_labels = torch.cat((torch.full_like(labels[:, :-2], -100), labels[:, -2:]), 1)
    expected = stock.train()(**inputs, labels=all_labels, num_items_in_batch=items).loss
    loss = ours(**inputs, labels=labels[:, -3:], num_items_in_batch=items).loss
    assert_near(loss, expected, 1e-6, scale_floor=0.0)
    loss = ours.train()(**inputs, labels=labels[:, -3:], num_items_in_batch=items).loss
    assert_near(loss, expected, 1e-6, scale_floor=0.0)
    assert_trains_alike(ours, stock, loss, expected)


def test_losses_of_micro_batches_add_up_to_that_of_stock():
    """Of an encoder-decoder, to which stock does not pass the number of labels."""
    ours, stock = build(text="t5", attn_implementation="sdpa")
    inputs = prompts("right")
    labels = labels_of("t5", inputs)
    labels[0, 1:] = -100
    expected, items = stock(**inputs, labels=labels).loss, (labels != -100).sum()
    parts = [
        ours(**{name: tensor[rows] for name, tensor in inputs.items()}, labels=labels[rows], num_items_in_batch=items)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert_near(sum(part.loss for part in parts), expected, 1e-6, scale_floor=0.0)


@each_implementation
def test_image_features_match_stock(attn_implementation):
    """On images of another size as well."""
    ours, stock = build(attn_implementation=attn_implementation)
    asked = {"output_hidden_states": True, "output_attentions": attn_implementation == "eager"}
    pixel_values = torch.randn(2, 3, 12, 16)
    found, expected = (model.get_image_features(pixel_values, True, **asked) for model in (ours, stock))
    assert found.hidden_states and bool(found.attentions) == (attn_implementation == "eager")
    # Asked for, the Q-Former's own hidden states come too.
    assert found.qformer_outputs.hidden_states
    found, expected = flat(found), flat(expected)
    assert_outputs_near({name: found[name] for name in expected}, expected)
    ours, stock = build(BASE, attn_implementation=attn_implementation)
    pixel_values = images()
    assert_near(ours.get_qformer_features(pixel_values), stock.get_qformer_features(pixel_values))


def test_arguments_begin_with_those_of_stock():
    for name in (WRITER, "QFormerModel"):
        ours, stock = getattr(hf_custom, f"CustomBlip2{name}"), getattr(transformers, f"Blip2{name}")
        names, stock_names = (
            [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]
            for model in (ours, stock)
        )
        assert names[: len(stock_names)] == stock_names


# --- Generation ---

# Models this small would repeat a token for ever.
LIVELY = {"max_new_tokens": 12, "no_repeat_ngram_size": 1}
DECODINGS = {name: {**DECODING[name], **LIVELY} for name in ("greedy", "beam")}
each_decoding = pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)


@each_text
@each_decoding
def test_generates_tokens_of_stock(decoding, text):
    ours, stock = build(text=text, attn_implementation="sdpa")
    inputs = prompts("right" if text == "t5" else "left")
    tokens = assert_generate_alike(ours, stock, inputs, **decoding)
    assert tokens.shape == (3, 12 + (1 if text == "t5" else inputs["input_ids"].shape[1]))
    assert all(len(row.unique()) == 12 for row in tokens[:, -12:])


@each_text
def test_generates_from_images_alone_and_from_embeddings_as_stock(text):
    ours, stock = build(text=text, attn_implementation="sdpa")
    inputs = prompts("left")
    assert_generate_alike(ours, stock, {"pixel_values": inputs["pixel_values"]}, **DECODINGS["greedy"])
    inputs["inputs_embeds"] = ours.get_input_embeddings()(inputs.pop("input_ids")).detach()
    # Of a prompt that has no ids nothing can be barred.
    tokens = assert_generate_alike(ours, stock, inputs, do_sample=False, max_new_tokens=12)
    assert tokens.shape == (3, 12 + (text == "t5"))


def test_generation_stops_where_stock_stops():
    ours, stock = build()
    inputs = prompts("left")
    # The end is a token that the first row soon generates.
    end = stock.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -1].item()
    tokens = assert_generate_alike(ours, stock, inputs, **DECODINGS["greedy"], eos_token_id=end)
    assert end in tokens[0, -12:]


# --- Scores of images and texts ---


@pytest.mark.parametrize("image_token_index", [None, IMAGE])
@pytest.mark.parametrize("uses_matching_head", [False, True])
@each_implementation
def test_scores_match_stock(attn_implementation, uses_matching_head, image_token_index):
    ours, stock = build(SCORER, attn_implementation=attn_implementation, image_token_index=image_token_index)
    inputs = prompts("right")
    mask = inputs["attention_mask"]
    text_mask = mask[:, QUERIES:]
    if image_token_index is None:
        inputs |= {"input_ids": inputs["input_ids"][:, QUERIES:], "attention_mask": text_mask}
    if not uses_matching_head:
        # As many texts as there happen to be.
        inputs["pixel_values"] = images(4)
    options = {"use_image_text_matching_head": uses_matching_head}
    outputs, expected = (
        real(flat(model(**inputs, **options)), mask if uses_matching_head else text_mask) for model in (ours, stock)
    )
    assert outputs["logits_per_image"].shape == ((3, 2) if uses_matching_head else (4, 3))
    assert_outputs_near(outputs, expected)
    objectives = ({name: found[name] for name in found if name.startswith("logits")} for found in (outputs, expected))
    assert_trains_alike(ours, stock, *(weighted_sum(found) for found in objectives))


# --- The Q-Former alone ---


def build_qformer(attn_implementation="eager", **fields):
    config = CustomBlip2QFormerConfig(**{**READER, **fields})
    ours = CustomBlip2QFormerModel._from_config(config, attn_implementation=attn_implementation)
    stock_config = Blip2QFormerConfig(**{**READER, **fields})
    stock = Blip2QFormerModel._from_config(stock_config, attn_implementation=attn_implementation)
    stock.load_state_dict(widen(ours).state_dict(), strict=True)
    return ours.eval(), stock.eval()


def read_by_qformer(query_length, text_length):
    """Queries and texts, embedded, and images; texts are padded in rows but the first.

    So are images for queries alone: stock fails on images with padding beside a text.
    """
    length = query_length + text_length
    mask, image_mask = torch.ones(3, length, dtype=torch.long), torch.ones(3, 6, dtype=torch.long)
    for row in (1, 2) if text_length else ():
        mask[row, -2 * row :] = 0
    image_mask[1:, 6 if text_length else 4 :] = 0
    image = {"encoder_hidden_states": torch.randn(3, 6, VISION["hidden_size"]), "encoder_attention_mask": image_mask}
    read = {"query_embeds": torch.randn(3, length, 32), "query_length": query_length, "attention_mask": mask}
    return {**read, **(image if query_length else {})}


READINGS = {"queries": (QUERIES, 0), "text": (0, 7), "both": (QUERIES, 7)}
QFORMER_OPTIONS = [{"attn_implementation": "sdpa"}, {}]
QFORMER_OPTIONS += [{"hidden_act": "relu"}, {"layer_norm_eps": 0.1}, {"chunk_size_feed_forward": 1}]
QFORMER_OPTIONS += [{"cross_attention_frequency": 1}, {"cross_attention_frequency": 3}]
CASES = [(option, reading) for option in QFORMER_OPTIONS[:2] for reading in READINGS]
CASES += [(option, "both") for option in QFORMER_OPTIONS[2:]]


@pytest.mark.parametrize("option, reading", CASES, ids=name_of)
def test_qformer_matches_stock(option, reading):
    ours, stock = build_qformer(**option)
    inputs = read_by_qformer(*READINGS[reading])
    is_eager = "attn_implementation" not in option
    asked = {"output_hidden_states": True, "output_attentions": is_eager}
    outputs, expected = (model(**inputs, **asked) for model in (ours, stock))
    if is_eager and reading != "text":
        # Stock lists the maps of cross-attention among those of self-attention too.
        crossed = {id(attention) for attention in expected.cross_attentions}
        expected.attentions = tuple(attention for attention in expected.attentions if id(attention) not in crossed)
    outputs, expected = (real(flat(found), inputs["attention_mask"]) for found in (outputs, expected))
    assert ("attentions.2" in outputs) == is_eager
    assert_outputs_near(outputs, expected)
    gradients = assert_trains_alike(ours, stock, weighted_sum(outputs), weighted_sum(expected))
    if reading == "both":
        assert gradients.keys() == dict(ours.named_parameters()).keys()


# --- Saved folders ---

FOLDERS = [(WRITER, "opt"), (WRITER, "t5"), (WRITER, "gpt2"), (BASE, "opt"), (SCORER, "opt")]
each_folder = pytest.mark.parametrize("name, text", FOLDERS)


@each_folder
def test_stock_folder_loads_in_ours(name, text, records, tmp_path):
    ours, stock = build(name, text)
    stock.save_pretrained(tmp_path)
    loaded = load_fully(type(ours), tmp_path)
    assert type(loaded.config) is CustomBlip2Config
    assert loaded.config.text_config.model_type == text
    assert_same_weights(loaded, ours)
    inputs = prompts()
    given = {"decoder_input_ids": inputs["input_ids"]} if text == "t5" else {}
    assert_outputs_near(flat(loaded(**inputs, **given)), flat(stock(**inputs, **given)))
    assert records == []


@each_folder
def test_our_folder_loads_in_stock(name, text, tmp_path):
    ours, stock = build(name, text)
    ours.save_pretrained(tmp_path)
    loaded, report = type(stock).from_pretrained(tmp_path, config=stock.config, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_weights(loaded, stock)


def test_qformer_folders_load_both_ways(tmp_path):
    ours, stock = build_qformer()
    stock.save_pretrained(tmp_path / "stock")
    assert_same_weights(load_fully(CustomBlip2QFormerModel, tmp_path / "stock"), ours)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_weights(load_fully(Blip2QFormerModel, tmp_path / "ours"), stock)


@pytest.mark.parametrize("name", [WRITER, SCORER])
def test_qformer_of_a_whole_checkpoint_loads(name, tmp_path):
    ours, stock = build(name)
    stock.save_pretrained(tmp_path)
    assert_same_weights(load_fully(CustomBlip2QFormerModel, tmp_path), ours.qformer)


def test_language_model_without_a_type_is_opt_as_in_stock(tmp_path):
    """As the first published checkpoints name it."""
    ours, stock = build()
    stock.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["text_config"].pop("model_type") == "opt"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert_same_weights(load_fully(type(ours), tmp_path), ours)
    del stored["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert type(CustomBlip2Config.from_pretrained(tmp_path).text_config) is transformers.OPTConfig


STEERED = {"AutoModelForImageTextToText": WRITER, "AutoModel": BASE}


@pytest.mark.parametrize("auto_name", STEERED)
def test_auto_class_gives_ours_for_a_stock_folder_on_request(auto_name, tmp_path):
    ours, stock = build(STEERED[auto_name])
    stock.save_pretrained(tmp_path)
    auto_class = getattr(transformers, auto_name)
    for replaces, expected in ((True, ours), (False, stock)):
        hf_custom.register(replace_stock=replaces)
        loaded = load_fully(auto_class, tmp_path)
        assert type(loaded) is type(expected)
        assert_same_weights(loaded, ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [WRITER, BASE, SCORER])
@torch.no_grad()
def test_half_precision_keeps_what_stock_keeps(name, dtype, tmp_path):
    ours, stock = build(name)
    stock.save_pretrained(tmp_path)
    loaded, expected = (type(model).from_pretrained(tmp_path, dtype=dtype) for model in (ours, stock))
    kinds = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert kinds == {name: parameter.dtype for name, parameter in expected.named_parameters()}
    assert set(kinds.values()) == {dtype, torch.float32 if dtype == torch.float16 else dtype}
    inputs = prompts("right")
    outputs, exact = (
        model(**given).to_tuple()[0]
        for model, given in ((loaded, {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}), (ours, inputs))
    )
    assert outputs.dtype == dtype and outputs.isfinite().all()
    is_real = slice(None) if name == SCORER else inputs["attention_mask"].bool()
    assert_near(outputs[is_real], exact[is_real], 0.1)
