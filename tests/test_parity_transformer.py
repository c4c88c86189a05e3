"""The encoder-decoder beside torch's own module and the host's Marian with the same weights, and naive loops."""

import math
from itertools import product

import pytest
import reference
import torch
from reference import assert_gradients_near, assert_near, gradients_of, weighted_sum
from test_transformer import each_implementation, each_norm, each_padding, generate, labelled, sources
from tiny import SEQ2SEQ
from torch import nn

from training.benchmarks.translate import marian_of

BASE, WRITER = SEQ2SEQ
# One size for both stacks, as torch's module has it.
EVEN = {"decoder_attention_heads": 4, "decoder_ffn_dim": 48}

# --- torch.nn.Transformer ---

ATTENTION = {"self_attn": "self_attn", "multihead_attn": "cross_attn"}


def torch_transformer(config):
    """torch's module of the same size; as published, it has no norm behind a stack whose sums are normalised."""
    options = {"activation": config.activation_function, "norm_first": config.norm_first, "batch_first": True}
    sizes = (config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim, config.dropout)
    stacks = {}
    for name in ("Encoder", "Decoder"):
        layer = getattr(nn, f"Transformer{name}Layer")(*sizes, **options)
        norm = nn.LayerNorm(config.d_model) if config.norm_first else None
        count = getattr(config, f"{name.lower()}_layers")
        flags = {"enable_nested_tensor": False} if name == "Encoder" else {}
        stacks[name.lower()] = getattr(nn, f"Transformer{name}")(layer, count, norm, **flags)
    return nn.Transformer(
        *sizes[:2], custom_encoder=stacks["encoder"], custom_decoder=stacks["decoder"], batch_first=True
    )


def torch_names(config):
    """Our name of each of torch's parameters; three of ours, stacked, for its input projections."""
    names = {}
    for stack in ("encoder", "decoder"):
        norms = ["self_attn_layer_norm", "final_layer_norm"]
        if stack == "decoder":
            norms.insert(1, "cross_attn_layer_norm")
        for i, kind in product(range(getattr(config, f"{stack}_layers")), ("weight", "bias")):
            layer = f"{stack}.layers.{i}"
            for theirs, ours in list(ATTENTION.items())[: 1 + (stack == "decoder")]:
                parts = [f"{layer}.{ours}.{part}_proj.{kind}" for part in "qkv"]
                names[f"{layer}.{theirs}.in_proj_{kind}"] = parts
                names[f"{layer}.{theirs}.out_proj.{kind}"] = [f"{layer}.{ours}.out_proj.{kind}"]
            for n in (1, 2):
                names[f"{layer}.linear{n}.{kind}"] = [f"{layer}.mlp.fc{n}.{kind}"]
            for n, norm in enumerate(norms, 1):
                names[f"{layer}.norm{n}.{kind}"] = [f"{layer}.{norm}.{kind}"]
        if config.norm_first:
            names |= {f"{stack}.norm.{kind}": [f"{stack}.layer_norm.{kind}"] for kind in ("weight", "bias")}
    return names


class TorchModel(nn.Module):
    """torch's module between our embeddings, positions and output projection, all written out."""

    def __init__(self, ours):
        super().__init__()
        self.config, self.ours = ours.config, {"": ours}
        self.core = torch_transformer(ours.config).train(ours.training)
        own = dict(ours.named_parameters())
        names = torch_names(ours.config)
        state = {theirs: torch.cat([own[f"model.{name}"] for name in parts]) for theirs, parts in names.items()}
        self.core.load_state_dict(state, strict=True)
        self.table = nn.Parameter(ours.model.encoder.embed_tokens.weight.detach().clone())

    def embed(self, ids, mask):
        positions = reference.sinusoids((mask.cumsum(-1) - 1).clamp(min=0), self.config.d_model)
        return self.table[ids] * math.sqrt(self.config.d_model) + positions.float()

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        is_padding, is_target_padding = attention_mask == 0, decoder_attention_mask == 0
        length = decoder_input_ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        states = self.core(
            self.embed(input_ids, attention_mask),
            self.embed(decoder_input_ids, decoder_attention_mask),
            tgt_mask=future,
            src_key_padding_mask=is_padding,
            tgt_key_padding_mask=is_target_padding,
            memory_key_padding_mask=is_padding,
        )
        return states, states @ self.table.T


@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
@each_padding
@each_implementation
@each_norm
def test_matches_torch_with_gradients(option, attn_implementation, padding, is_training):
    """Values at real positions and the gradient of every parameter; training takes the unpadded path on sdpa."""
    ours = WRITER.build(**EVEN, **option, attn_implementation=attn_implementation).train(is_training)
    theirs, inputs = TorchModel(ours), WRITER.inputs(padding=padding)
    states, logits = theirs(**inputs)
    outputs = ours(**inputs, use_cache=False, output_hidden_states=True)
    is_real = inputs["decoder_attention_mask"].bool()
    assert_near(outputs.decoder_hidden_states[-1][is_real], states[is_real], name="states")
    assert_near(outputs.logits[is_real], logits[is_real], name="logits")
    expected = gradients_of(theirs, weighted_sum({"logits": logits[is_real]}))
    actual = gradients_of(ours, weighted_sum({"logits": outputs.logits[is_real]}))
    shared = actual.pop("model.encoder.embed_tokens.weight")
    assert_near(shared, expected.pop("table"), name="table", scale_floor=0.0)
    names = torch_names(ours.config)
    assert len(actual) == sum(map(len, names.values())) and set(expected) == {f"core.{name}" for name in names}
    joined = {
        f"core.{theirs_}": torch.cat([actual[f"model.{name}"] for name in parts]) for theirs_, parts in names.items()
    }
    assert_gradients_near(joined, expected)


# --- The host's Marian model ---


@each_implementation
def test_matches_marian_with_the_same_positions(attn_implementation):
    """Logits, loss, gradients and beams; Marian's own sinusoids differ in the order of their coordinates alone."""
    ours = WRITER.build(attn_implementation=attn_implementation, label_smoothing=0.0)
    stock, batch = marian_of(ours).eval(), labelled()
    stock.set_attn_implementation(attn_implementation)
    is_labelled = batch["labels"] != -100
    outputs, expected = ours(**batch), stock(**batch)
    assert_near(outputs.logits[is_labelled], expected.logits[is_labelled])
    assert_near(outputs.loss, expected.loss)
    actual, stock_gradients = gradients_of(ours.train(), ours(**batch).loss), gradients_of(stock, expected.loss)
    for name in ("model.encoder.layers.1.mlp.fc1.weight", "model.decoder.layers.2.cross_attn.q_proj.weight"):
        theirs = name.replace(".mlp.", ".").replace("cross_attn", "encoder_attn")
        assert_near(actual[name], stock_gradients[theirs], name=name, scale_floor=0.0)
    table = stock_gradients["model.shared.weight" if "model.shared.weight" in stock_gradients else "lm_head.weight"]
    assert_near(actual["model.encoder.embed_tokens.weight"], table, name="table", scale_floor=0.0)
    ours.eval()
    inputs, options = sources("right"), {"num_beams": 4, "length_penalty": 0.6}
    assert torch.equal(generate(ours, inputs, **options), generate(stock, inputs, **options))


# --- Naive loops in float64 ---


def naive_attention(module, hidden_states, states, allowed):
    def heads(layer, rows):
        return (
            (rows @ layer.weight.double().T + layer.bias.double()).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        )

    query, key, value = heads(module.q_proj, hidden_states), heads(module.k_proj, states), heads(module.v_proj, states)
    output, _ = reference.attention(query, key, value, allowed, module.scaling)
    return output.flatten(2) @ module.out_proj.weight.double().T + module.out_proj.bias.double()


def naive_norm(norm, rows):
    centred = rows - rows.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return centred / scale * norm.weight.double() + norm.bias.double()


def naive_layer(layer, x, states, own_allowed, cross_allowed):
    """norm(x + f(x)) for each sublayer f, or x + f(norm(x))."""
    sublayers = [(layer.self_attn_layer_norm, lambda rows: naive_attention(layer.self_attn, rows, rows, own_allowed))]
    if states is not None:
        sublayers.append(
            (
                layer.cross_attn_layer_norm,
                lambda rows: naive_attention(layer.cross_attn, rows, states, cross_allowed),
            )
        )
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2

    def feed_forward(rows):
        hidden = (rows @ fc1.weight.double().T + fc1.bias.double()).clamp(min=0)
        return hidden @ fc2.weight.double().T + fc2.bias.double()

    for norm, sublayer in [*sublayers, (layer.final_layer_norm, feed_forward)]:
        x = x + sublayer(naive_norm(norm, x)) if layer.norm_first else naive_norm(norm, x + sublayer(x))
    return x


@each_norm
def test_layers_match_naive_loops(option):
    model = BASE.build(**option)
    x, states = torch.randn(2, 5, 32), torch.randn(2, 4, 32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    states_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    bidirectional = reference.allowed_keys(5, mask, is_causal=False)
    causal = reference.allowed_keys(5, mask)
    across = reference.allowed_keys(5, states_mask, is_causal=False)

    def bias(allowed):
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]

    layer = model.encoder.layers[0]
    real = mask.bool()
    model.set_attn_implementation("eager")
    expected = naive_layer(layer, x.double(), None, bidirectional, None)
    assert_near(layer(x, bias(bidirectional))[real], expected[real], name="encoder")
    layer = model.decoder.layers[1]
    expected = naive_layer(layer, x.double(), states.double(), causal, across)
    actual = layer(x, bias(causal), states, bias(across))
    assert_near(actual[real], expected[real], name="decoder")
