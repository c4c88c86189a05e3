"""The Auto classes give this package's classes, stock checkpoints are steered here on request, and table = code."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import transformers
from tiny import BERT, GPT2, LSTM_LM, MODELS, TRANSFORMER, VISION, WORD2VEC, name_of, tokenizer, widen
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GPT2Config,
    GPT2Tokenizer,
)

import hf_custom
from hf_custom.registry import FAMILIES

# Stock configuration by family; its tiny fields are those of the family's rows that stock declares too.
STOCK = {
    hf_custom.CustomGPT2Config: GPT2Config,
    hf_custom.CustomBertConfig: BertConfig,
    hf_custom.CustomBlip2VisionConfig: Blip2VisionConfig,
    hf_custom.CustomBlip2QFormerConfig: Blip2QFormerConfig,
    hf_custom.CustomBlip2Config: Blip2Config,
}
SQUARE = {**VISION, "image_size": 8}
QFORMER = {name: BERT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
QFORMER |= {"intermediate_size": 48, "encoder_hidden_size": VISION["hidden_size"]}
# Those that no row of `MODELS` has.
TINY = {
    hf_custom.CustomBlip2VisionConfig: SQUARE,
    hf_custom.CustomBlip2QFormerConfig: QFORMER,
    hf_custom.CustomBlip2Config: {
        "vision_config": SQUARE,
        "qformer_config": QFORMER,
        "text_config": {**GPT2, "model_type": "gpt2"},
        "num_query_tokens": 2,
        "image_token_index": 96,
    },
    hf_custom.CustomTransformerConfig: TRANSFORMER,
    hf_custom.CustomElmoConfig: LSTM_LM,
    hf_custom.CustomWord2VecConfig: WORD2VEC,
}
TOKENIZERS = dict(FAMILIES)
AUTO = [
    pytest.param(config_class, auto_name, reference, id=f"{config_class.__name__}-{auto_name}")
    for config_class, _ in FAMILIES
    for auto_name, reference in config_class.auto_classes.items()
]
AUTO_MODELS = [row for row in AUTO if row.values[1] != "AutoConfig"]
each_auto = pytest.mark.parametrize(("config_class", "auto_name", "reference"), AUTO)
each_auto_model = pytest.mark.parametrize(("config_class", "auto_name", "reference"), AUTO_MODELS)
# Those for which stock has a class too.
STEERED = [
    row
    for row in AUTO_MODELS
    if row.values[0] in STOCK and STOCK[row.values[0]] in getattr(transformers, row.values[1])._model_mapping.keys()
]


def tiny_config(config_class):
    if config_class in TINY:
        return config_class(**TINY[config_class])
    return next(row for row in MODELS if row.config_class is config_class).config()


def stock_config(config_class):
    # Two labels, as stock's question answering needs.
    declared = {**tiny_config(config_class).to_dict(), "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    stock = STOCK[config_class]
    return stock(**{name: value for name, value in declared.items() if name in stock().to_dict() and value is not None})


@each_auto
def test_table_names_a_public_class_of_the_named_file(config_class, auto_name, reference):
    module_name, class_name = reference.split(".")
    module = import_module(f"hf_custom.{module_name}")
    named = getattr(module, class_name)
    assert named.__module__ == module.__name__
    assert class_name in module.__all__ and class_name in hf_custom.__all__
    assert named is config_class if auto_name == "AutoConfig" else named.config_class is config_class


@each_auto_model
def test_auto_class_gives_the_named_class(config_class, auto_name, reference, tmp_path):
    auto_class, config = getattr(transformers, auto_name), tiny_config(config_class)
    model = auto_class.from_config(config)
    assert f"{type(model).__module__}.{type(model).__name__}" == f"hf_custom.{reference}"
    model.save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class


@pytest.mark.parametrize("row", MODELS, ids=name_of)
def test_saved_model_lists_every_auto_class(row, tmp_path):
    row.build().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == row.config_class.auto_classes


@pytest.mark.parametrize("config_class", [config_class for config_class, _ in FAMILIES])
def test_auto_config_knows_the_model_type(config_class):
    assert type(AutoConfig.for_model(config_class.model_type)) is config_class


def test_importing_the_package_registers_and_leaves_stock_alone():
    script = (
        "import hf_custom, transformers\n"
        "assert type(transformers.AutoConfig.for_model('gpt2')) is transformers.GPT2Config\n"
        "for config_class, _ in hf_custom.registry.FAMILIES:\n"
        "    config = transformers.AutoConfig.for_model(config_class.model_type)\n"
        "    assert type(config) is config_class\n"
        "    for name, reference in config_class.auto_classes.items():\n"
        "        if name != 'AutoConfig':\n"
        "            model_class = getattr(transformers, name)._model_mapping[config_class]\n"
        "            print(name, model_class.__name__ == reference.split('.')[1])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [word for row in AUTO_MODELS for word in (row.values[1], "True")]


def registered():
    """What the host holds in its tables beside its own entries."""
    names = {row.values[1] for row in AUTO_MODELS}
    tables = {name: getattr(transformers, name)._model_mapping for name in names}
    tables |= {"configurations": transformers.CONFIG_MAPPING, "tokenizers": transformers.TOKENIZER_MAPPING}
    shipping = {row.name: row.model_class._auto_class for row in MODELS}
    return {name: dict(table._extra_content) for name, table in tables.items()}, shipping


@pytest.mark.parametrize("replace_stock", [None, True, False])
def test_registering_again_changes_nothing(replace_stock):
    hf_custom.register(replace_stock)
    once = registered()
    hf_custom.register(replace_stock)
    hf_custom.register()
    assert registered() == once


def test_giving_stock_back_leaves_no_trace():
    before = registered()
    hf_custom.register(replace_stock=True)
    assert registered() != before
    hf_custom.register(replace_stock=False)
    assert registered() == before


def stock_folder(config_class, auto_name, folder):
    """A stock checkpoint with its tokenizer, as the Hub holds them, and its model."""
    model = widen(getattr(transformers, auto_name).from_config(stock_config(config_class))).eval()
    assert type(model).__module__.startswith("transformers.")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def draw_batch(config_class, auto_name, folder):
    """What the model of a folder reads."""
    if config_class is hf_custom.CustomBlip2QFormerConfig:
        return {"query_embeds": torch.randn(2, 3, 32), "encoder_hidden_states": torch.randn(2, 5, 24)}
    if config_class is hf_custom.CustomBlip2Config:
        return {"pixel_values": torch.randn(2, 3, 8, 8), "input_ids": torch.tensor([[96, 96, 1, 2], [96, 96, 3, 4]])}
    if TOKENIZERS[config_class] is None:
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    tokens = AutoTokenizer.from_pretrained(folder)(["the cat", "that hat!"], padding=True, return_tensors="pt")
    return {name: tensor[None] if "MultipleChoice" in auto_name else tensor for name, tensor in tokens.items()}


@pytest.mark.parametrize(("config_class", "auto_name", "reference"), STEERED)
def test_stock_checkpoint_is_steered_here_and_back(config_class, auto_name, reference, tmp_path):
    auto_class, stock = getattr(transformers, auto_name), stock_folder(config_class, auto_name, tmp_path)
    batch = draw_batch(config_class, auto_name, tmp_path)
    mask = batch.get("attention_mask")
    expected = stock(**batch)
    for replace in (True, True, False, False, True):
        hf_custom.register(replace_stock=replace)
        model, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        found = AutoTokenizer.from_pretrained(tmp_path)
        assert type(found) is GPT2Tokenizer and found(["the cat"]) == tokenizer()(["the cat"])
        config = AutoConfig.from_pretrained(tmp_path)
        if replace:
            assert f"{type(model).__module__}.{type(model).__name__}" == f"hf_custom.{reference}"
            assert type(config) is type(model.config) is config_class
        else:
            assert type(model) is type(stock)
            assert type(config) is type(model.config) is type(stock.config)
        outputs = model(**batch)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                real = slice(None) if mask is None or value.shape[:2] != mask.shape else mask.bool()
                torch.testing.assert_close(outputs[name][real], value[real])


def save_nameless_tokenizer(folder):
    """As in the oldest checkpoints, whose tokenizer is found by the type of the model."""
    tokenizer().save_pretrained(folder)
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    assert stored.pop("tokenizer_class") == "GPT2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("row", MODELS, ids=name_of)
def test_tokenizer_of_a_saved_model_is_found_without_trust(row, tmp_path):
    row.build().save_pretrained(tmp_path)
    save_nameless_tokenizer(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is TOKENIZERS[row.config_class]


@pytest.mark.parametrize("config_class", [name for name in STOCK if TOKENIZERS[name] is not None])
def test_tokenizer_of_a_steered_checkpoint_is_found(config_class, tmp_path):
    stock_folder(config_class, "AutoModelForCausalLM", tmp_path)
    save_nameless_tokenizer(tmp_path)
    hf_custom.register(replace_stock=True)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is TOKENIZERS[config_class]
