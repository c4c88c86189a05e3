"""How weights start: the statistics of each tensor from scratch, after the meta device, and beside loaded ones."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODELS, VARIANTS, VISION, name_of, widen

from hf_custom import (
    CustomBertConfig,
    CustomBlip2Config,
    CustomBlip2ForConditionalGeneration,
    CustomBlip2ForImageTextRetrieval,
    CustomBlip2ForPreTraining,
    CustomBlip2Model,
    CustomBlip2QFormerConfig,
    CustomBlip2QFormerModel,
    CustomGPT2Config,
)

STD = 0.03
SIZES = {"hidden_size": 96, "num_attention_heads": 4, "vocab_size": 400, "max_position_embeddings": 128}
SIZES |= {"initializer_range": STD}
INTERMEDIATE = {CustomGPT2Config: {"n_inner": 160}, CustomBertConfig: {"intermediate_size": 160}}
RELATIVE = {"position_embedding_type": "relative_key"}
# Each part of a BLIP-2 has a scale of its own, the whole that of the paper.
TOWER_STD, QFORMER_STD, WHOLE_STD, TEMPERATURE = 0.05, 0.07, 0.02, 0.5
QFORMER = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 160,
    "vocab_size": 400,
    "max_position_embeddings": 128,
    "use_qformer_text_input": True,
    "bos_token_id": 399,
    "initializer_range": QFORMER_STD,
}
TOWER = {**VISION, "num_hidden_layers": 2, "hidden_size": 96, "image_size": 32, "initializer_range": TOWER_STD}

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
    CustomBlip2QFormerConfig: {
        r"\.(query|key|value|dense)\.weight$": lambda n: (0, QFORMER_STD),
        r"(LayerNorm|layernorm)\.weight$": lambda n: (1, 0),
        r"(^|\.)\w*\.bias$": lambda n: (0, 0),
    },
    CustomBlip2Config: {
        r"^query_tokens$": lambda n: (0, WHOLE_STD),
        r"^(language_projection|vision_projection|text_projection|itm_head)\.weight$": lambda n: (0, WHOLE_STD),
        r"^embeddings\.(word|position)_embeddings\.weight$": lambda n: (0, WHOLE_STD),
        r"^cls\..*(dense|decoder)\.weight$": lambda n: (0, WHOLE_STD),
        r"^logit_scale$": lambda n: (-math.log(TEMPERATURE), 0),
        r"^vision_model\..*(class_embedding|position_embedding|(patch_embedding|qkv|projection|fc[12])\.weight)$": (
            lambda n: (0, TOWER_STD)
        ),
        r"^qformer\..*\.(query|key|value|dense)\.weight$": lambda n: (0, QFORMER_STD),
        r"^language_model\..*\.(w[tp]e|c_attn|c_fc)\.weight$": lambda n: (0, STD),
        r"^language_model\..*\.c_proj\.weight$": lambda n: (0, STD / math.sqrt(2 * n)),
        r"(LayerNorm|layer_?norm\d?|ln_\w+)\.weight$": lambda n: (1, 0),
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
    return rows[0](config.get_text_config().num_hidden_layers)


def assert_drawn(config, name, tensor):
    """Mean and std are those expected up to five standard errors of a normal sample of that size."""
    mean, std = expected_of(config, name)
    tensor = tensor.detach().double()
    rounding = 1e-6 * abs(mean)
    assert abs(tensor.mean() - mean) <= 5 * std / math.sqrt(tensor.numel()) + rounding, name
    assert abs(tensor.std(correction=0) - std) <= 5 * std / math.sqrt(2 * tensor.numel()), name


def from_scratch(model_class, config):
    return model_class(config)


def from_meta(model_class, config):
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights()
    return model


CASES = [(row, {}) for row in MODELS + VARIANTS] + [(row, RELATIVE) for row in MODELS if RELATIVE in row.options]


@pytest.mark.parametrize("build, n_layer", [(from_scratch, 2), (from_meta, 5)])
@pytest.mark.parametrize("row, option", CASES, ids=name_of)
def test_each_parameter_is_drawn_as_documented(row, option, build, n_layer):
    config = config_of(row, **option, num_hidden_layers=n_layer)
    parameters = dict(build(row.model_class, config).named_parameters())
    pattern, *counts = PER_LAYER[row.config_class]
    found = sum(bool(re.search(pattern, name)) for name in parameters)
    assert found == counts[0 if config.add_cross_attention else 1] * n_layer
    for name, parameter in parameters.items():
        assert_drawn(config, name, parameter)


@pytest.mark.parametrize("row", [row for row in MODELS if not row.draw_labels(1, 1)], ids=name_of)
def test_layers_are_drawn_apart(row):
    weights = [tensor for tensor in row.model_class(config_of(row)).state_dict().values() if tensor.std() > 0]
    assert len({float(weight.double().sum()) for weight in weights}) == len(weights) > 10


def blip2_config(model_class):
    if model_class is CustomBlip2QFormerModel:
        return CustomBlip2QFormerConfig(**QFORMER, encoder_hidden_size=96)
    text = {**SIZES, "n_inner": 160, "num_hidden_layers": 2, "model_type": "custom_gpt2"}
    fields = {"num_query_tokens": 32, "image_text_hidden_size": 64, "itc_temperature": TEMPERATURE}
    return CustomBlip2Config(vision_config=TOWER, qformer_config=QFORMER, text_config=text, **fields)


BLIP2 = [
    CustomBlip2QFormerModel,
    CustomBlip2Model,
    CustomBlip2ForConditionalGeneration,
    CustomBlip2ForImageTextRetrieval,
    CustomBlip2ForPreTraining,
]
each_blip2 = pytest.mark.parametrize("model_class", BLIP2, ids=lambda model_class: model_class.__name__)


@pytest.mark.parametrize("build", [from_scratch, from_meta])
@each_blip2
def test_each_parameter_of_a_blip2_is_drawn_as_documented(model_class, build):
    config = blip2_config(model_class)
    model = build(model_class, config)
    for name, parameter in model.named_parameters():
        assert_drawn(config, name, parameter)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@each_blip2
def test_parts_of_a_blip2_are_drawn_apart(model_class):
    weights = [weight.detach() for weight in model_class(blip2_config(model_class)).parameters()]
    weights = [weight for weight in weights if weight.numel() > 1 and weight.std() > 0]
    assert len({float(weight.double().sum()) for weight in weights}) == len(weights) > 10


# A class whose folder is loaded, without what matches; the class that it is loaded into, and what is missing there.
STAGES = {
    "scores to first stage": (
        CustomBlip2ForImageTextRetrieval,
        CustomBlip2ForPreTraining,
        r"^(cls\.predictions\.|logit_scale$)",
    ),
    "first stage to second": (
        CustomBlip2ForPreTraining,
        CustomBlip2ForConditionalGeneration,
        r"^(language_projection|language_model)\.",
    ),
    "without queries": (CustomBlip2ForConditionalGeneration, CustomBlip2ForConditionalGeneration, r"^query_tokens$"),
}


@pytest.mark.parametrize("saved_class, model_class, missing", STAGES.values(), ids=STAGES)
def test_stage_adds_what_it_needs_and_keeps_the_rest(saved_class, model_class, missing, tmp_path):
    config = blip2_config(saved_class)
    config.qformer_config.use_qformer_text_input = saved_class is not CustomBlip2ForConditionalGeneration
    widen(saved_class(config)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if not re.search(missing, name)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] and all(re.search(missing, name) for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    for name, parameter in model.named_parameters():
        if re.search(missing, name):
            assert_drawn(config, name, parameter)
        else:
            assert torch.equal(parameter, weights[name]), name


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
