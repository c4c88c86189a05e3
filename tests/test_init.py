"""How weights start: the statistics of each tensor from scratch, after the meta device, and beside loaded ones."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODELS, name_of, widen

STD = 0.03
SIZES = {"n_embd": 96, "n_head": 4, "vocab_size": 400, "n_positions": 128, "initializer_range": STD, "n_inner": 160}
ALL_PARAMETERS = {"add_cross_attention": True, "tie_word_embeddings": False}

# Name of a parameter -> (mean, std) in a model of n layers. Every parameter matches exactly one row.
EXPECTED = {
    r"(^|\.)w[tp]e\.weight": lambda n: (0, STD),
    r"\.(c_attn|q_attn|c_fc)\.weight": lambda n: (0, STD),
    r"\.(attn|crossattention|mlp)\.c_proj\.weight": lambda n: (0, STD / math.sqrt(2 * n)),
    r"^(lm_head|score|classifier|qa_outputs|multiple_choice_head\.summary)\.weight": lambda n: (0, STD),
    r"(^|\.)ln_\w+\.weight": lambda n: (1, 0),
    r"\.bias$": lambda n: (0, 0),
}


def expected_of(name, n_layer):
    rows = [row for pattern, row in EXPECTED.items() if re.search(pattern, name)]
    assert len(rows) == 1, f"{name} matches {len(rows)} rows"
    return rows[0](n_layer)


def assert_drawn(name, tensor, n_layer):
    """Mean and std are those expected up to five standard errors of a normal sample of that size."""
    mean, std = expected_of(name, n_layer)
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


@pytest.mark.parametrize("n_layer", [2, 8])
@pytest.mark.parametrize("build", [from_scratch, from_meta])
@pytest.mark.parametrize("row", MODELS, ids=name_of)
def test_each_parameter_is_drawn_as_documented(row, build, n_layer):
    model = build(row, row.config(**SIZES, **ALL_PARAMETERS, n_layer=n_layer))
    parameters = dict(model.named_parameters())
    assert sum(name.endswith("c_proj.weight") for name in parameters) == 3 * n_layer
    for name, parameter in parameters.items():
        assert_drawn(name, parameter, n_layer)


def test_layers_are_drawn_apart():
    row = MODELS[0]
    weights = [tensor for tensor in row.model_class(row.config(**SIZES)).state_dict().values() if tensor.std() > 0]
    assert len({float(weight.double().sum()) for weight in weights}) == len(weights) > 10


@pytest.mark.parametrize(
    "missing",
    [
        r"mlp\.c_proj\.weight",
        r"attn\.c_proj\.weight",
        r"crossattention\.c_proj\.(weight|bias)",
        r"c_(attn|fc)\.bias",
        r"q_attn\.weight",
        r"h\.1\.",
        r"w[tp]e\.weight",
        r"ln_(1|f)\.weight",
    ],
)
@pytest.mark.parametrize("row", [row for row in MODELS if row.is_generative], ids=name_of)
def test_missing_weights_are_drawn_and_loaded_ones_kept(row, missing, tmp_path):
    config = row.config(**SIZES, **ALL_PARAMETERS, n_layer=2)
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
            assert_drawn(name, parameter, n_layer=2)
