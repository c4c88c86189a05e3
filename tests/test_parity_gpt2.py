"""Our GPT-2 against stock GPT-2 with the same weights: every head and option, saved folders, generation."""

import json

import pytest
import torch
from parity import (
    DECODING,
    assert_agree,
    assert_generate_alike,
    assert_same_weights,
    draw_encoder,
    load_fully,
    pair,
    with_positions,
)
from reference import assert_near, assert_outputs_near, real_outputs
from safetensors.torch import save_file
from tiny import BATCH, LABELS, LENGTH, MODELS, VOCAB, name_of
from transformers import GPT2Config, Trainer, TrainingArguments

from hf_custom import CustomGPT2Config, CustomGPT2ForCausalLM

PADDINGS = [None, "left", "right"]
ROWS = {row.name.removeprefix("CustomGPT2"): row for row in MODELS}


HEADS = {
    "base": pair("GPT2Model", ROWS["Model"]),
    "language": pair("GPT2LMHeadModel", ROWS["ForCausalLM"]),
    "choices": pair("GPT2DoubleHeadsModel", ROWS["DoubleHeadsModel"]),
    "single-label": pair("GPT2ForSequenceClassification", ROWS["ForSequenceClassification"]),
    "regression": pair(
        "GPT2ForSequenceClassification",
        ROWS["ForSequenceClassification"],
        {"num_labels": 1},
        lambda b, t: {"labels": torch.randn(b)},
    ),
    "multi-label": pair(
        "GPT2ForSequenceClassification",
        ROWS["ForSequenceClassification"],
        {},
        lambda b, t: {"labels": torch.randint(0, 2, (b, LABELS)).float()},
    ),
    "token": pair("GPT2ForTokenClassification", ROWS["ForTokenClassification"]),
    "question": pair("GPT2ForQuestionAnswering", ROWS["ForQuestionAnswering"]),
}
CROSS_ATTENTION = {"add_cross_attention": True}
OPTIONS = [
    {},
    {"attn_implementation": "sdpa"},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True},
    {"n_inner": 48},
    {"activation_function": "gelu"},
    {"activation_function": "relu"},
    {"activation_function": "silu"},
    {"layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": False},
    CROSS_ATTENTION,
]


def draw_real_labels(head, inputs, padding):
    """Labels of real tokens that real tokens predict; none where the loss itself reads all positions."""
    if head == "question" and padding is not None:
        return {}
    labels, is_real = HEADS[head].draw_labels(BATCH, LENGTH), inputs["attention_mask"].bool()
    if head in ("language", "choices"):
        is_real = is_real & torch.nn.functional.pad(is_real[..., :-1], (1, 0), value=False)
    return {k: v.masked_fill(~is_real, -100) if v.shape == is_real.shape else v for k, v in labels.items()}


# The other heads stand on the body of the language model; that of the choices has tied weights too.
CASES = [
    pytest.param(head, option, id=f"{head}-{name_of(option)}")
    for head in HEADS
    for option in {"language": OPTIONS, "choices": [*OPTIONS[:2], *OPTIONS[-2:]]}.get(head, OPTIONS[:2])
]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("head, option", CASES)
def test_matches_stock(head, option, padding):
    ours, stock = HEADS[head].build(**option)
    inputs = HEADS[head].row.indexed_inputs(padding)
    labels = draw_real_labels(head, inputs, padding)
    if option == CROSS_ATTENTION:
        inputs |= draw_encoder(inputs["input_ids"].numel() // LENGTH, ours.config.n_embd)
    assert_agree(ours, stock, inputs, labels)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("head", HEADS)
def test_matches_stock_with_token_types(head, padding):
    ours, stock = HEADS[head].build()
    inputs = HEADS[head].row.indexed_inputs(padding)
    labels = draw_real_labels(head, inputs, padding)
    inputs["token_type_ids"] = torch.randint(0, VOCAB, inputs["input_ids"].shape)
    assert_agree(ours, stock, inputs, labels)


# Stock classifies the last position of `inputs_embeds`, padding or not; ours reads the mask.
READS_PADDING = [("single-label", "right"), ("regression", "right"), ("multi-label", "right")]


@pytest.mark.parametrize(
    "head, padding",
    [(head, padding) for head in HEADS for padding in PADDINGS if (head, padding) not in READS_PADDING],
)
def test_matches_stock_with_embeddings(head, padding):
    ours, stock = HEADS[head].build()
    inputs = HEADS[head].row.indexed_inputs(padding)
    labels = draw_real_labels(head, inputs, padding)
    if head == "choices":
        # Embeddings have no axis of choices: each is a sequence of its own, and one question is left.
        inputs = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
        labels = {"labels": labels["labels"].flatten(0, 1), "mc_labels": labels["mc_labels"][0]}
    shape = inputs.pop("input_ids").shape
    inputs["inputs_embeds"] = torch.randn(*shape, ours.config.n_embd)
    assert_agree(ours, stock, inputs, labels)


@pytest.mark.parametrize("head", ["single-label", "regression", "multi-label"])
def test_classifier_finds_end_of_right_padded_embeddings(head):
    model, _ = HEADS[head].build()
    inputs = HEADS[head].row.indexed_inputs("right")
    expected = model(**inputs).logits
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert_near(model(**inputs, inputs_embeds=embeddings).logits, expected)


def test_label_smoothing_matches_stock(tmp_path):
    """The Trainer shifts the labels of a smoothed loss by itself, for the classes that it knows as language models."""
    inputs = HEADS["language"].row.inputs()
    batch = {**inputs, "labels": inputs["input_ids"]}
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    losses = [Trainer(model, arguments).compute_loss(model, dict(batch)) for model in HEADS["language"].build()]
    assert_near(losses[0], losses[1], 1e-6, "loss", scale_floor=0.0)


# --- The summary of the choices ---

SUMMARIES = [
    {"summary_type": "cls_index"},
    {"summary_type": "last"},
    {"summary_type": "first"},
    {"summary_type": "mean"},
    {"summary_use_proj": False},
    {"summary_activation": "tanh"},
    {"summary_proj_to_labels": False},
]


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize("option", SUMMARIES, ids=name_of)
def test_summary_matches_stock(option, is_indexed):
    ours, stock = HEADS["choices"].build(**option)
    inputs = HEADS["choices"].row.inputs()
    if is_indexed:
        inputs["mc_token_ids"] = torch.randint(0, LENGTH, inputs["input_ids"].shape[:-1])
    if ours.config.summary_type == "cls_index":
        assert_agree(ours, stock, inputs, {})
    # For its other types stock reads the axis of choices as that of tokens, so they need a sequence a row.
    assert_agree(ours, stock, {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}, {})


@pytest.mark.parametrize("summary_type", ["cls_index", "last", "first", "mean"])
def test_summary_of_choices_is_summary_of_each(summary_type):
    model, _ = HEADS["choices"].build(summary_type=summary_type)
    inputs = HEADS["choices"].row.inputs()
    scores = model(**inputs).mc_logits
    flat = model(**{name: tensor.flatten(0, 1) for name, tensor in inputs.items()}).mc_logits
    assert_near(scores, flat.view(BATCH, 2))


# --- Saved folders ---


@pytest.mark.parametrize(
    "head, option",
    [*((head, {}) for head in HEADS), ("language", {"tie_word_embeddings": False}), ("language", CROSS_ATTENTION)],
    ids=name_of,
)
def test_state_dict_loads_strictly_both_ways(head, option):
    ours, stock = HEADS[head].build(**option)
    other_ours, other_stock = HEADS[head].build(**option)
    other_ours.load_state_dict(stock.state_dict(), strict=True)
    other_stock.load_state_dict(ours.state_dict(), strict=True)
    assert_same_weights(other_ours, ours)
    assert_same_weights(other_stock, stock)


@pytest.mark.parametrize("head", HEADS)
def test_stock_folder_loads_in_ours(head, tmp_path):
    ours, stock = HEADS[head].build()
    stock.save_pretrained(tmp_path)
    loaded = load_fully(type(ours), tmp_path)
    assert_same_weights(loaded, ours)
    inputs = HEADS[head].row.indexed_inputs("left")
    assert_outputs_near(real_outputs(loaded, inputs), real_outputs(stock, with_positions(inputs)))


@pytest.mark.parametrize("head", HEADS)
def test_our_folder_loads_in_stock(head, tmp_path):
    ours, stock = HEADS[head].build()
    ours.save_pretrained(tmp_path)
    loaded = load_fully(type(stock), tmp_path)
    assert_same_weights(loaded, stock)
    inputs = HEADS[head].row.indexed_inputs("left")
    assert_outputs_near(real_outputs(loaded, with_positions(inputs)), real_outputs(ours, inputs))


@pytest.mark.parametrize("to_ours", [True, False])
@pytest.mark.parametrize("option", [{}, {"tie_word_embeddings": False}, CROSS_ATTENTION], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sharded_folder_loads_in_its_type(dtype, option, to_ours, tmp_path):
    ours, stock = (model.to(dtype) for model in HEADS["language"].build(**option))
    saved, other = (stock, ours) if to_ours else (ours, stock)
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(load_fully(type(other), tmp_path), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_base_checkpoint_loads_under_head_and_back(dtype, tmp_path):
    ours, stock = (model.to(dtype) for model in HEADS["language"].build())
    stock.transformer.save_pretrained(tmp_path / "base")
    assert_same_weights(load_fully(type(ours), tmp_path / "base"), ours)
    stock.save_pretrained(tmp_path / "head")
    assert_same_weights(load_fully(type(ours.transformer), tmp_path / "head"), ours.transformer)


# --- Published files ---

# The configuration of `gpt2` on the Hub, as first published.
PUBLISHED = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def test_published_config_loads_silently(records, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = CustomGPT2Config.from_pretrained(tmp_path)
    assert records == []
    assert config.model_type == "custom_gpt2"
    expected = {**PUBLISHED, "model_type": "custom_gpt2"}
    assert {name: getattr(config, name) for name in expected} == expected
    stock = GPT2Config.from_pretrained(tmp_path)
    for name in GPT2Config().to_dict().keys() - {"model_type", "transformers_version"}:
        assert getattr(config, name) == getattr(stock, name), name


def test_config_of_stock_fields_is_ours():
    config = CustomGPT2Config.from_dict(HEADS["language"].build()[1].config.to_dict())
    assert config.model_type == config.to_dict()["model_type"] == "custom_gpt2"
    assert CustomGPT2ForCausalLM(config).config is config


def write_old_checkpoint(base, folder, prefix, is_safetensors):
    """The base model's weights and, beside them, the causal masks that old versions stored as buffers."""
    length = base.config.n_positions
    tensors = {prefix + name: tensor.clone() for name, tensor in base.state_dict().items()}
    for layer in range(base.config.n_layer):
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(length, length).tril()[None, None]
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if is_safetensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    shape = {name: getattr(base.config, name) for name in ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")}
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **shape, "bos_token_id": 97, "eos_token_id": 97}))


@pytest.mark.parametrize("is_safetensors", [True, False])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_old_checkpoint_loads_silently(prefix, is_safetensors, records, tmp_path):
    ours, _ = HEADS["language"].build()
    write_old_checkpoint(ours.transformer, tmp_path, prefix, is_safetensors)
    loaded = load_fully(CustomGPT2ForCausalLM, tmp_path)
    assert records == []
    assert_same_weights(loaded, ours)


def test_missing_and_unknown_weights_are_reported(records, tmp_path):
    ours, _ = HEADS["language"].build()
    weights = ours.transformer.state_dict()
    weights["h.0.attn.c_attn.extra"] = weights.pop("h.0.attn.c_attn.bias")
    ours.transformer.save_pretrained(tmp_path, state_dict=weights)
    _, report = CustomGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"transformer.h.0.attn.c_attn.bias"}
    assert len(report["unexpected_keys"]) == 1
    assert records != []


# --- Generation ---

# Wide tied weights mostly repeat the last token.
WRITERS = [{}, {"tie_word_embeddings": False, "attn_implementation": "sdpa"}, CROSS_ATTENTION]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("option", WRITERS, ids=name_of)
@pytest.mark.parametrize("decoding", DECODING.values(), ids=DECODING)
def test_generates_tokens_of_stock(decoding, option, padding):
    ours, stock = HEADS["language"].build(**option, n_positions=128, eos_token_id=None)
    inputs = HEADS["language"].row.inputs(padding=padding)
    if option == CROSS_ATTENTION:
        inputs |= draw_encoder(BATCH, ours.config.n_embd)
    tokens = assert_generate_alike(ours, stock, inputs, **decoding)
    assert tokens.shape[1] == LENGTH + decoding["max_new_tokens"]


@pytest.mark.parametrize("decoding", DECODING.values(), ids=DECODING)
def test_double_heads_generate_tokens_of_stock(decoding):
    ours, stock = HEADS["choices"].build(n_positions=128, eos_token_id=None, tie_word_embeddings=False)
    assert_generate_alike(ours, stock, HEADS["language"].row.inputs(padding="left"), **decoding)


@pytest.mark.parametrize("decoding", DECODING.values(), ids=DECODING)
def test_generation_stops_where_stock_stops(decoding):
    ours, stock = HEADS["language"].build(n_positions=128, tie_word_embeddings=False)
    inputs = HEADS["language"].row.inputs(padding="left")
    # The end is a token that the first row soon generates.
    end = stock.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, -1].item()
    assert_generate_alike(ours, stock, inputs, **decoding, eos_token_id=end)
