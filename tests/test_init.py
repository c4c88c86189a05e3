"""How weights start: the statistics of each tensor from scratch, after the meta device, and beside loaded ones."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODELS, VARIANTS, VISION, name_of, widen

from hf_custom import CustomBertConfig, CustomGPT2Config

STD = 0.03
SIZES = {"hidden_size": 96, "num_attention_heads": 4, "vocab_size": 400, "max_position_embeddings": 128}
SIZES |= {"initializer_range": STD}
INTERMEDIATE = {CustomGPT2Config: {"n_inner": 160}, CustomBertConfig: {"intermediate_size": 160}}
RELATIVE = {"position_embedding_type": "relative_key"}

# By configuration, name of a parameter -> (mean, std) in a model of n layers. Every parameter matches exactly one row.
EXPECTED = {
    CustomGPT2Config: {
        r"(^|\.)w[tp]e\.weight": lambda n: (0, STD),
        r"\.(c_attn|q_attn|c_fc)\.weight": lambda n: (0, STD),
        r"\.(attn|crossattention|mlp)\.c_proj\.weight": lambda n: (0, STD / math.sqrt(2 * n)),
        r"^(lm_head|score|classifier|qa_outputs|multiple_choice_head\.summary)\.weight": lambda n: (0, STD),
        r"(^|\.)ln_\w+\.weight": lambda n: (1, 0),
        r"\.bias$": lambda n: (0, 0),
    },
    CustomBertConfig: {
        r"(word|position|token_type|modality_type|distance)_embeddings?\.weight$": lambda n: (0, STD),
        r"vision_model\.embeddings\.(class_embedding|position_embedding|patch_embedding\.weight)$": lambda n: (0, STD),
        r"\.(query|key|value|dense|qkv|projection|fc[12])\.weight$": lambda n: (0, STD),
        r"^(bert\.)?vision_projection\.weight$": lambda n: (0, STD),
        r"\.(decoder|seq_relationship)\.weight$": lambda n: (0, STD),
        r"^(classifier|classifier\.out_proj|qa_outputs|itm_head)\.weight$": lambda n: (0, STD),
        r"(LayerNorm|layer_?norm\d?)\.weight$": lambda n: (1, 0),
        r"\.bias$": lambda n: (0, 0),
    },
}
# What each layer has as many of, with cross-attention and without.
PER_LAYER = {
    CustomGPT2Config: (r"c_proj\.weight$", 3, 2),
    CustomBertConfig: (r"(?<!pooler)\.output\.dense\.weight$", 3, 2),
}


def config_of(row, **fields):
    """The configuration with every parameter that there is, and with sizes that tell."""
    fields = {**SIZES, **INTERMEDIATE[row.config_class], "tie_word_embeddings": False, **fields}
    if row.has_cache:
        fields["add_cross_attention"] = True
    if row.num_patches:
        vision = {**VISION, "num_hidden_layers": 2, "hidden_size": 96, "image_size": 32, "initializer_range": STD}
        fields["vision_config"] = vision
    return row.config(**fields)


def expected_of(config, name):
    rows = [row for pattern, row in EXPECTED[type(config)].items() if re.search(pattern, name)]
    assert len(rows) == 1, f"{name} matches {len(rows)} rows"
    return rows[0](config.num_hidden_layers)


def assert_drawn(config, name, tensor):
    """Mean and std are those expected up to five standard errors of a normal sample of that size."""
    mean, std = expected_of(config, name)
    tensor = tensor.detach().double()
    assert abs(tensor.mean() - mean) <= 5 * std / math.sqrt(tensor.numel()), name
    assert abs(tensor.std(correction=0) - std) <= 5 * std / math.sqrt(2 * tensor.numel()), name


def from_scratch(row, config):
    return row.model_class(config)


def from_meta(row, config):
    with torch.device("meta"):
        model = row.model_class(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights()
    return model


CASES = [(row, {}) for row in MODELS + VARIANTS] + [(row, RELATIVE) for row in MODELS if RELATIVE in row.options]


@pytest.mark.parametrize("n_layer", [2, 8])
@pytest.mark.parametrize("build", [from_scratch, from_meta])
@pytest.mark.parametrize("row, option", CASES, ids=name_of)
def test_each_parameter_is_drawn_as_documented(row, option, build, n_layer):
    config = config_of(row, **option, num_hidden_layers=n_layer)
    parameters = dict(build(row, config).named_parameters())
    pattern, *counts = PER_LAYER[row.config_class]
    found = sum(bool(re.search(pattern, name)) for name in parameters)
    assert found == counts[0 if config.add_cross_attention else 1] * n_layer
    for name, parameter in parameters.items():
        assert_drawn(config, name, parameter)


@pytest.mark.parametrize("row", [row for row in MODELS if not row.draw_labels(1, 1)], ids=name_of)
def test_layers_are_drawn_apart(row):
    weights = [tensor for tensor in row.model_class(config_of(row)).state_dict().values() if tensor.std() > 0]
    assert len({float(weight.double().sum()) for weight in weights}) == len(weights) > 10


MISSING = {
    "CustomGPT2ForCausalLM": [
        r"mlp\.c_proj\.weight",
        r"attn\.c_proj\.weight",
        r"crossattention\.c_proj\.(weight|bias)",
        r"c_(attn|fc)\.bias",
        r"q_attn\.weight",
        r"h\.1\.",
        r"w[tp]e\.weight",
        r"ln_(1|f)\.weight",
    ],
    "CustomBertForCausalLM": [
        r"\.output\.dense\.weight",
        r"self\.(query|key|value)\.weight",
        r"crossattention\.",
        r"\.dense\.bias",
        r"layer\.1\.",
        r"embeddings\.weight",
        r"LayerNorm\.weight",
        r"predictions\.(bias|decoder\.bias)",
        r"predictions\.transform\.",
    ],
    "CustomBertForMaskedLM-with-images": [r"vision_model\.", r"vision_projection\.", r"modality", r"class_embedding"],
}


@pytest.mark.parametrize(
    "row, missing", [(row, pattern) for row in MODELS + VARIANTS for pattern in MISSING.get(row.name, ())], ids=name_of
)
def test_missing_weights_are_drawn_and_loaded_ones_kept(row, missing, tmp_path):
    config = config_of(row, num_hidden_layers=2)
    saved = widen(row.model_class(config))
    saved.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not re.search(missing, name)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = row.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == weights.keys() - kept.keys()
    for name, parameter in model.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]), name
        else:
            assert_drawn(config, name, parameter)
