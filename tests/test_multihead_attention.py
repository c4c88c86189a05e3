"""The attention modules of every family against `torch.nn.MultiheadAttention` with the same weights."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reference import assert_gradients_near, assert_near, weighted_sum
from tiny import widen
from torch import nn

from hf_custom import CustomBertConfig, CustomBlip2QFormerConfig, CustomBlip2VisionConfig, CustomGPT2Config
from hf_custom.configuration_transformer import CustomTransformerConfig
from hf_custom.modeling_bert import CustomBertAttention
from hf_custom.modeling_blip2_qformer import CustomBlip2QFormerAttention
from hf_custom.modeling_blip2_vision import CustomBlip2VisionAttention
from hf_custom.modeling_gpt2 import CustomGPT2Attention
from hf_custom.modeling_transformer import CustomTransformerAttention
from hf_custom.packing import Packing

BATCH, LENGTH, WIDTH, HEADS = 3, 7, 32, 4
# Of the keys of attention over an encoder, and the width of an image's.
KEYS, IMAGE_WIDTH = 5, 24

GPT2 = {"n_embd": WIDTH, "n_head": HEADS, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
BERT = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
TRANSFORMER = {"d_model": WIDTH, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}


def thirds(kind):
    """Of torch's fused `in_proj`, the rows of the queries, of the keys and of the values, or several."""
    return {"query": slice(0, WIDTH), "key": slice(WIDTH, 2 * WIDTH), "value": slice(2 * WIDTH, None)}[kind]


def fused(name, rows=slice(None), is_conv1d=False):
    """A projection of ours that holds `rows` of torch's, as (in, out) or as (out, in)."""
    turned = (lambda weight: weight.t()) if is_conv1d else (lambda weight: weight)
    return {
        f"{name}.weight": lambda theirs: turned(theirs["in_proj_weight"][rows]),
        f"{name}.bias": lambda theirs: theirs["in_proj_bias"][rows],
    }


def last(name, is_conv1d=False):
    """A projection of ours that is torch's `out_proj`."""
    turned = (lambda weight: weight.t()) if is_conv1d else (lambda weight: weight)
    return {
        f"{name}.weight": lambda theirs: turned(theirs["out_proj.weight"]),
        f"{name}.bias": lambda theirs: theirs["out_proj.bias"],
    }


def separate(names, output):
    """Projections of ours that each hold a third of torch's."""
    rules = {}
    for kind, name in zip(("query", "key", "value"), names, strict=True):
        rules |= fused(name, thirds(kind))
    return rules | last(output)


def of_other_width(names, output):
    """The same, of a module of torch that holds them apart because keys are of another width."""
    rules = separate(names, output)
    for letter, name in zip("qkv", names, strict=True):
        rules[f"{name}.weight"] = lambda theirs, letter=letter: theirs[f"{letter}_proj_weight"]
    return rules


@dataclass(frozen=True)
class Kind:
    """How to build a module, and which of its parameters holds what of torch's.

    Attributes:
        rules: from torch's parameters, or their gradients, to that of ours, by the name of ours.
        inner: module inside that computes attention; the output projection is another.
    """

    build: Any
    config: Any
    rules: dict
    inner: str = ""
    is_cross: bool = False
    arguments: dict = field(default_factory=dict)

    @property
    def key_width(self):
        return IMAGE_WIDTH if self.build is CustomBlip2QFormerAttention and self.is_cross else WIDTH

    def pair(self, attn_implementation):
        """Ours, and torch's with the same weights."""
        self.config._attn_implementation = attn_implementation
        width = None if self.key_width == WIDTH else self.key_width
        theirs = widen(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, kdim=width, vdim=width))
        ours, parameters = self.build(self.config, **self.arguments), dict(theirs.named_parameters())
        with torch.no_grad():
            for name, rule in self.rules.items():
                ours.get_parameter(name).copy_(rule(parameters))
        return ours, theirs

    def attend(self, ours, states, keys, attention_mask, **kwargs):
        """Output (B, T, D) and weights, if any."""
        if not self.is_cross:
            named = {} if self.build is CustomBlip2VisionAttention else {"attention_mask": attention_mask}
            output, weights = ours.get_submodule(self.inner)(states, **named, **kwargs)
        elif self.build is CustomBlip2QFormerAttention:
            # Whose images are projected once for several calls.
            inner = ours.get_submodule(self.inner)
            output, weights = inner(states, attention_mask, *inner.key_value(keys), **kwargs)
        else:
            named = {"attention_mask": attention_mask, "encoder_hidden_states": keys}
            output, weights = ours.get_submodule(self.inner)(states, **named, **kwargs)
        return (ours.output.dense(output) if self.inner else output), weights


def gpt2(layout, is_cross):
    is_conv1d = layout == "conv1d"
    rules = last("c_proj", is_conv1d)
    if is_cross:
        rules |= fused("q_attn", thirds("query"), is_conv1d) | fused("c_attn", slice(WIDTH, None), is_conv1d)
    else:
        rules |= fused("c_attn", is_conv1d=is_conv1d)
    config = CustomGPT2Config(**GPT2, projection_layout=layout)
    arguments = {"is_cross_attention": is_cross, "layer_idx": 0}
    return Kind(CustomGPT2Attention, config, rules, is_cross=is_cross, arguments=arguments)


def bert(is_cross, **fields):
    rules = separate(("self.query", "self.key", "self.value"), "output.dense")
    arguments = {"layer_idx": 0, "is_cross_attention": is_cross}
    config = CustomBertConfig(**BERT, **fields)
    return Kind(CustomBertAttention, config, rules, "self", is_cross, arguments)


def transformer(is_cross, is_causal=False):
    rules = separate(("q_proj", "k_proj", "v_proj"), "out_proj")
    arguments = {"num_heads": HEADS, "layer_idx": 0, "is_causal": is_causal, "is_cross_attention": is_cross}
    config = CustomTransformerConfig(**TRANSFORMER)
    return Kind(CustomTransformerAttention, config, rules, is_cross=is_cross, arguments=arguments)


def qformer(is_cross):
    names = ("attention.query", "attention.key", "attention.value")
    rules = (of_other_width if is_cross else separate)(names, "output.dense")
    arguments = {"layer_idx": 0, "is_cross_attention": is_cross}
    config = CustomBlip2QFormerConfig(**BERT, encoder_hidden_size=IMAGE_WIDTH)
    return Kind(CustomBlip2QFormerAttention, config, rules, "attention", is_cross, arguments)


TOWER = CustomBlip2VisionConfig(hidden_size=WIDTH, num_attention_heads=HEADS)
KINDS = {
    "gpt2": gpt2("conv1d", False),
    "gpt2-linear": gpt2("linear", False),
    "gpt2-cross": gpt2("conv1d", True),
    "gpt2-linear-cross": gpt2("linear", True),
    "bert": bert(False),
    "bert-decoder": bert(False, is_decoder=True),
    "bert-cross": bert(True),
    "transformer-encoder": transformer(False),
    "transformer-decoder": transformer(False, is_causal=True),
    "transformer-cross": transformer(True),
    "qformer": qformer(False),
    "qformer-image": qformer(True),
}
VISION = Kind(CustomBlip2VisionAttention, TOWER, fused("qkv") | last("projection"))
CAUSAL = ("gpt2", "gpt2-linear", "bert-decoder", "transformer-decoder")
each_implementation = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_causal_kind = pytest.mark.parametrize("kind", [KINDS[name] for name in CAUSAL], ids=CAUSAL)


def draw(kind):
    """States (B, T, D) and those that are attended to, which are the same unless it is another sequence."""
    states = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    return states, torch.randn(BATCH, KEYS, kind.key_width, requires_grad=True) if kind.is_cross else states


def draw_padding(length):
    """(B, S), True for keys that are padding: none, on the right, on the left."""
    columns = torch.arange(length)
    return torch.stack((columns < 0, columns >= length - 2, columns < 1))


def draw_mask(form, key_length):
    """torch's `attn_mask`, and ours of reals that broadcasts to (B, H, T, S)."""
    shape = (BATCH * HEADS, LENGTH, key_length) if "head" in form else (LENGTH, key_length)
    if form.startswith("bool"):
        theirs = torch.rand(shape) < 0.4
        # Each query keeps a key, of those that are no padding in any row.
        theirs[..., 1] = False
        ours = torch.zeros(shape).masked_fill(theirs, torch.finfo(torch.float32).min)
    else:
        ours = theirs = torch.randn(shape)
    return theirs, ours.unflatten(0, (BATCH, HEADS)) if "head" in form else ours[None, None]


def run_torch(theirs, states, keys, **masks):
    output, weights = theirs(states, keys, keys, need_weights=True, average_attn_weights=False, **masks)
    return output, weights


def gradients(objective, named):
    found = torch.autograd.grad(objective, list(named.values()))
    return dict(zip(named, found, strict=True))


def assert_same(kind, ours, theirs, inputs, actual, expected):
    """Outputs, and gradients of the inputs and of every weight, in torch's order."""
    assert_near(actual, expected)
    states, keys = inputs
    leaves = {"states": states, "keys": keys} if kind.is_cross else {"states": states}
    actual = gradients(weighted_sum({"": actual}), leaves | {name: ours.get_parameter(name) for name in kind.rules})
    expected = gradients(weighted_sum({"": expected}), leaves | dict(theirs.named_parameters()))
    translated = {name: expected[name] for name in leaves} | {name: kind.rules[name](expected) for name in kind.rules}
    assert_gradients_near(actual, translated)


def test_weights_cover_every_parameter():
    for kind in (*KINDS.values(), VISION):
        ours, _ = kind.pair("eager")
        assert {name for name, _ in ours.named_parameters() if "LayerNorm" not in name} == set(kind.rules)


MASKS = ("none", "padding", "bool", "float", "bool-by-head", "float-by-head", "float-and-padding")


@pytest.mark.parametrize("form", MASKS)
@each_implementation
@each_kind
def test_matches_torch_and_grad(kind, attn_implementation, form):
    ours, theirs = kind.pair(attn_implementation)
    states, keys = draw(kind)
    masks, mask = {}, torch.zeros(1, 1, 1, keys.shape[1])
    if form not in ("none", "padding"):
        masks["attn_mask"], mask = draw_mask(form, keys.shape[1])
    if "padding" in form:
        is_padding = draw_padding(keys.shape[1])
        # Torch wants both of one type.
        masks["key_padding_mask"] = torch.zeros(is_padding.shape).masked_fill(is_padding, float("-inf"))
        masks = masks if "attn_mask" in masks else {"key_padding_mask": is_padding}
        mask = mask.masked_fill(is_padding[:, None, None], torch.finfo(torch.float32).min)
    if attn_implementation == "sdpa" and form in ("padding", "bool", "bool-by-head"):
        # As the host builds it.
        mask = mask == 0
    mask = None if form == "none" else mask.expand(BATCH, -1, LENGTH, -1)
    expected, expected_weights = run_torch(theirs, states, keys, **masks)
    actual, weights = kind.attend(ours, states, keys, mask, is_causal=False)
    assert (weights is None) == (attn_implementation == "sdpa")
    if weights is not None:
        assert_near(weights, expected_weights)
        assert_near(weights.mean(1), theirs(states, keys, keys, **masks)[1])
    assert_same(kind, ours, theirs, (states, keys), actual, expected)


@pytest.mark.parametrize("is_padded", [False, True])
@each_implementation
@each_causal_kind
def test_causal_matches_torch_and_grad(kind, attn_implementation, is_padded):
    ours, theirs = kind.pair(attn_implementation)
    states, keys = draw(kind)
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    # On the right alone: to the left of the first token a causal query has no key.
    is_padding = draw_padding(LENGTH) & (torch.arange(BATCH)[:, None] == 1)
    masks = {"key_padding_mask": is_padding} if is_padded else {}
    expected, expected_weights = run_torch(theirs, states, keys, attn_mask=future, is_causal=not is_padded, **masks)
    hidden = future | is_padding[:, None] if is_padded else future[None]
    mask = ~hidden[:, None].expand(BATCH, -1, -1, -1)
    if attn_implementation == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    elif not is_padded:
        # The kernel is told by the module.
        assert ours.get_submodule(kind.inner).is_causal
        mask = None
    actual, weights = kind.attend(ours, states, keys, mask)
    if weights is not None:
        assert_near(weights, expected_weights)
    assert_same(kind, ours, theirs, (states, keys), actual, expected)


PACKED = [
    pytest.param(kind, is_causal, id=name + "-causal" * is_causal)
    for name, kind in KINDS.items()
    for is_causal in ((False,) if kind.is_cross else (False, True))
]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "varlen"])
@pytest.mark.parametrize("kind, is_causal", PACKED)
def test_packed_rows_match_padded_ones_of_torch_and_grad(kind, attn_implementation, is_causal):
    """The rows without their padding, one after another, and where each begins."""
    ours, theirs = kind.pair(attn_implementation)
    states, keys = draw(kind)
    is_padding = draw_padding(keys.shape[1])
    is_real = torch.ones(BATCH, LENGTH, dtype=torch.bool) if kind.is_cross else ~is_padding
    masks = {"key_padding_mask": is_padding}
    if is_causal:
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) | is_padding[:, None]
        # Causal queries of padding on the left would have no key, of which torch makes NaN.
        masks = {"attn_mask": (hidden & is_real[:, :, None]).repeat_interleave(HEADS, 0)}
    expected, _ = run_torch(theirs, states, keys, **masks)

    packing, packed_keys = (
        Packing.of_lengths(real.sum(-1), tuple(real.shape), real.flatten().nonzero().squeeze(-1))
        for real in (is_real, ~is_padding)
    )
    lengths = packing.attention_arguments(packed_keys) | {"is_causal": is_causal}
    actual, _ = kind.attend(ours, packing.unpad(states), packed_keys.unpad(keys), None, **lengths)
    assert_same(kind, ours, theirs, (states, keys), actual[0], expected[is_real])


@each_implementation
def test_attention_of_patches_matches_torch_and_grad(attn_implementation):
    ours, theirs = VISION.pair(attn_implementation)
    states, keys = draw(VISION)
    expected, expected_weights = run_torch(theirs, states, keys)
    actual, weights = VISION.attend(ours, states, keys, None)
    if weights is not None:
        assert_near(weights, expected_weights)
    assert_same(VISION, ours, theirs, (states, keys), actual, expected)
