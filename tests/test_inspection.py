"""What `inspect` says of a model is what the model has, holds and keeps, counted on the model itself."""

import json
from collections import Counter

import pytest
import torch
import transformers
from test_remote_code import BLIP2, WRITER, build_blip2
from tiny import BATCH, BERT, BERT_WITH_IMAGES, DECODER, GPT2, LENGTH, MODELS, SEQ2SEQ, TRANSFORMER, VOCAB
from torch.utils._python_dispatch import TorchDispatchMode

import hf_custom
from hf_custom import inspection
from hf_custom.inspection import BFLOAT16, FLOAT32, INFERENCE, activation_bytes, inspect, memory_table, parameter_table

# Large enough that layers outweigh what the formula leaves out: indices and a head's few rows.
WIDE = {"n_positions": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300}
WIDE_BERT = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 200}
WIDE_BERT |= {"vocab_size": 300, "max_position_embeddings": 256}
NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
each_row = pytest.mark.parametrize("row", MODELS + SEQ2SEQ, ids=lambda row: row.name)


def bytes_of(rows, use, part):
    (row,) = (row for row in rows if (row.use, row.part) == (use, part))
    return row.bytes


def empty(model_class, **fields):
    with torch.device("meta"):
        return model_class(model_class.config_class(**fields))


# --- Parameters ---


@each_row
def test_parameters_are_those_of_the_model(row):
    model = row.build()
    rows = parameter_table(model)
    assert sum(found.parameters for found in rows) == model.num_parameters()
    names = [name for name, _ in model.named_parameters()]
    assert sum(found.count for found in rows) == len(names) > len(rows)
    config = row.config()
    config.architectures = [row.name]
    assert parameter_table(inspection.build_empty(config)) == rows


@pytest.mark.parametrize("model_class", BLIP2, ids=lambda model_class: model_class.__name__)
def test_frozen_parameters_are_shown_apart(model_class):
    model = build_blip2(model_class)
    rows = parameter_table(model)
    counted = Counter()
    for row in rows:
        counted[row.is_trainable] += row.parameters
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert counted == {True: trained, False: model.num_parameters() - trained} and trained
    assert all(row.is_trainable != row.name.startswith(("vision_model", "language_model")) for row in rows)
    model.vision_model.requires_grad_(True)
    assert all(row.is_trainable for row in parameter_table(model) if row.name.startswith("vision_model"))


def test_layers_are_one_row_and_a_frozen_one_another():
    model = empty(hf_custom.CustomGPT2ForCausalLM, **GPT2)
    model.transformer.h[1].attn.c_attn.weight.requires_grad_(False)
    found = {row.name: row for row in parameter_table(model) if row.name.endswith("attn.c_attn.weight")}
    assert set(found) == {"transformer.h.0,2.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"}
    row = found["transformer.h.0,2.attn.c_attn.weight"]
    assert (row.count, row.shape, row.parameters, row.is_trainable) == (2, (32, 96), 2 * 32 * 96, True)
    assert not found["transformer.h.1.attn.c_attn.weight"].is_trainable
    assert "transformer.h.0..2.ln_1.bias" in [row.name for row in parameter_table(model)]


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_weights_are_counted_once(is_tied):
    model = empty(hf_custom.CustomGPT2ForCausalLM, **{**GPT2, "tie_word_embeddings": is_tied})
    rows = {row.name: row for row in parameter_table(model)}
    assert rows["transformer.wte.weight"].tied == (("lm_head.weight",) if is_tied else ())
    assert ("lm_head.weight" in rows) is not is_tied


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # Radford et al. 2019 (the checkpoint `gpt2`), and Devlin et al. 2019 (`bert-base-uncased`, with its pooler).
        (hf_custom.CustomGPT2Config(architectures=["GPT2LMHeadModel"]), 124_439_808),
        (hf_custom.CustomBertConfig(architectures=["BertModel"]), 109_482_240),
    ],
)
def test_published_sizes(config, count):
    model = inspection.build_empty(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(row.parameters for row in parameter_table(model)) == count


# --- Memory of inference ---


# A row of choices has as many logits as choices.
@pytest.mark.parametrize("row", [row for row in MODELS if row.num_choices is None], ids=lambda row: row.name)
def test_logits_are_those_of_the_head(row):
    model = row.build()
    inputs = row.inputs()
    options = {"logits_to_keep": 1} if model.can_generate() else {}
    outputs = model(**inputs, **options)
    logits = [value for name, value in outputs.items() if name in ("logits", "start_logits", "end_logits")]
    logits += [value for name, value in outputs.items() if name == "prediction_logits"]
    found = bytes_of(memory_table(model, batch_size=BATCH, length=LENGTH), INFERENCE, "logits")
    assert found == sum(value.numel() * value.itemsize for value in logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_class", "fields"), [(hf_custom.CustomGPT2ForCausalLM, GPT2), (hf_custom.CustomBertForCausalLM, DECODER)]
)
def test_cache_is_what_the_model_fills(model_class, fields, dtype):
    model = model_class(model_class.config_class(**fields)).to(dtype).eval()
    cache = model(torch.randint(0, VOCAB, (BATCH, LENGTH)), use_cache=True).past_key_values
    held = sum(t.numel() * t.itemsize for layer in cache.layers for t in (layer.keys, layer.values))
    rows = memory_table(model, batch_size=BATCH, length=LENGTH, dtype=dtype)
    assert bytes_of(rows, INFERENCE, "cache of keys and values") == held


def test_cache_of_an_encoder_decoder_holds_both_sides():
    model = SEQ2SEQ[1].model_class(SEQ2SEQ[1].config_class(**TRANSFORMER)).eval()
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH))
    cache = model(ids, decoder_input_ids=ids, use_cache=True).past_key_values
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    held = sum(t.numel() * t.itemsize for layer in layers for t in (layer.keys, layer.values))
    rows = memory_table(model, batch_size=BATCH, length=LENGTH)
    assert bytes_of(rows, INFERENCE, "cache of keys and values") == held
    # The inner layer of the encoder is the wider one.
    widest = BATCH * LENGTH * TRANSFORMER["encoder_ffn_dim"] * 4
    assert bytes_of(rows, INFERENCE, "largest activation") == widest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_what_is_loaded(dtype, tmp_path):
    """In float16 the host keeps BLIP-2's Q-Former in float32."""
    model = build_blip2(WRITER)
    model.save_pretrained(tmp_path)
    loaded = WRITER.from_pretrained(tmp_path, dtype=dtype)
    held = sum(t.numel() * t.itemsize for t in [*loaded.parameters(), *loaded.buffers()])
    assert bytes_of(memory_table(model, length=LENGTH, dtype=dtype), INFERENCE, "weights") == held
    stored = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert (held < stored) == (dtype != torch.float32)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator made."""

    def __init__(self, model):
        super().__init__()
        self.old = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.old:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (hf_custom.CustomGPT2Model, {**WIDE, "n_inner": 100}),
        (hf_custom.CustomGPT2Model, WIDE),
        (hf_custom.CustomBertModel, WIDE_BERT),
        (hf_custom.CustomBertModel, {**WIDE_BERT, "intermediate_size": 32}),
        (hf_custom.CustomBertModel, {**BERT_WITH_IMAGES}),
    ],
)
def test_largest_activation_is_the_largest_tensor(model_class, fields):
    model = model_class(model_class.config_class(**fields)).eval()
    inputs = {"input_ids": torch.randint(0, VOCAB - 1, (2, 50))}
    if "vision_config" in fields:
        inputs["pixel_values"] = torch.randn(2, 3, *fields["vision_config"]["image_size"])
    with torch.no_grad(), Largest(model) as largest:
        model(**inputs, use_cache=False)
    rows = memory_table(model, batch_size=2, length=50)
    assert bytes_of(rows, INFERENCE, "largest activation") == largest.bytes


# --- Memory of training ---


def saved_bytes(model, is_autocast, **inputs):
    """Bytes of the storages that the graph of a training step keeps, weights and inputs apart: those of states, and
    those of cast weights. Beside the graph the chunked loss holds the gradient of the states, in float32."""
    own = [*model.parameters(), *model.buffers(), *inputs.values()]
    seen = {tensor.untyped_storage().data_ptr(): None for tensor in own}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    states, copies = {}, {}

    def keep(tensor):
        key = tensor.untyped_storage().data_ptr()
        if key not in seen:
            is_copy = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
            # The tensor too: its address must not be given to another one.
            (copies if is_copy else states)[key] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        loss = model.train()(**inputs).loss
    held = sum(
        gradient.numel() * gradient.itemsize
        for node in nodes_of(loss.grad_fn)
        for gradient in (getattr(node, "gradients", None) or ())[:1]
    )
    return sum(size for size, _ in states.values()) + held, sum(size for size, _ in copies.values())


def nodes_of(node):
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return seen


def training_case(family, dropout, **fields):
    """A model with a loss over many tokens, and a batch of two rows."""
    without = {} if dropout else NO_DROPOUT[family]
    input_ids = torch.randint(0, 299, (2, 200))
    if family == "gpt2":
        model = hf_custom.CustomGPT2ForCausalLM(hf_custom.CustomGPT2Config(**WIDE, **without, **fields))
        return model, {"input_ids": input_ids, "labels": input_ids.clone()}
    model = hf_custom.CustomBertForMaskedLM(hf_custom.CustomBertConfig(**WIDE_BERT, **without, **fields))
    is_masked = torch.arange(200) % 20 < 3
    return model, {"input_ids": input_ids, "labels": input_ids.masked_fill(~is_masked, -100)}


@pytest.mark.parametrize("is_autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {}),
        ("gpt2", {"n_inner": 64}),
        ("gpt2", {"position_embedding_type": "rope"}),
        ("bert", {}),
        ("bert", {"position_embedding_type": "rope"}),
    ],
)
def test_activations_are_what_the_graph_keeps(family, fields, dropout, is_autocast):
    model, inputs = training_case(family, dropout, **fields)
    states, copies = saved_bytes(model, is_autocast, **inputs)
    rows = memory_table(model, batch_size=2, length=200)
    use = BFLOAT16 if is_autocast else FLOAT32
    assert bytes_of(rows, use, "activations") == pytest.approx(states, rel=0.02)
    if is_autocast:
        assert bytes_of(rows, use, "copies of weights") == pytest.approx(copies, rel=0.1)
    else:
        assert copies == 0


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_padding_is_not_kept(family):
    model, inputs = training_case(family, dropout=False)
    mask = (torch.arange(200) < torch.tensor([[200], [100]])).long()
    labels = inputs["labels"].masked_fill(mask == 0, -100)
    states, _ = saved_bytes(model, False, **inputs | {"labels": labels}, attention_mask=mask)
    assert activation_bytes(model, 3, 100, is_unpadded=True) == pytest.approx(states, rel=0.02)
    assert activation_bytes(model, 2, 200) > states


@each_row
def test_weights_gradients_and_optimizer_are_exact(row):
    model = row.build().train()
    rows = memory_table(model, length=LENGTH)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    held = {
        "weights": [*model.parameters(), *model.buffers()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "AdamW": states,
    }
    for use in (FLOAT32, BFLOAT16):
        for part, tensors in held.items():
            assert bytes_of(rows, use, part) == sum(tensor.numel() * tensor.itemsize for tensor in tensors), part


def test_frozen_parts_have_neither_gradients_nor_moments():
    model = build_blip2(WRITER)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = memory_table(model, length=LENGTH)
    assert bytes_of(rows, FLOAT32, "gradients") == 4 * sum(parameter.numel() for parameter in trained)
    assert bytes_of(rows, FLOAT32, "activations") is None and bytes_of(rows, FLOAT32, "all") is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sums_are_those_of_the_parts(device):
    config = hf_custom.CustomGPT2Config(**{**GPT2, "attn_pdrop": 0.1}, architectures=["GPT2LMHeadModel"])
    rows = memory_table(config, batch_size=2, length=64, device=device)
    for use in (INFERENCE, FLOAT32, BFLOAT16):
        parts = [row.bytes for row in rows if row.use == use and row.part != "all"]
        assert bytes_of(rows, use, "all") == sum(parts) and len(parts) >= 4
    # The mask of a causal attention's dropout, which a CUDA kernel draws again: 3 layers, 4 heads, one block.
    on_cpu = activation_bytes(inspection.build_empty(config), 2, 64)
    assert on_cpu - activation_bytes(inspection.build_empty(config), 2, 64, device="cuda") == 3 * 2 * 4 * 64 * 64
    assert bytes_of(rows, FLOAT32, "logits of the loss") == 2 * 63 * VOCAB * 4


@pytest.mark.parametrize("fields", [{"add_cross_attention": True, "is_decoder": True}, BERT_WITH_IMAGES])
def test_what_the_formula_lacks_is_said(fields):
    model = empty(hf_custom.CustomBertModel, **{**BERT, **fields})
    rows = memory_table(model, length=LENGTH)
    (row,) = (row for row in rows if (row.use, row.part) == (FLOAT32, "activations"))
    assert row.bytes is None and "no formula" in row.note


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"length": 0}, "length"),
        ({"length": 65}, "length"),
        ({"device": "x"}, "device"),
    ],
)
def test_wrong_sizes_are_refused(options, named):
    with pytest.raises(ValueError, match=f"`{named}` is"):
        memory_table(hf_custom.CustomGPT2Config(**GPT2), **options)


# --- The text ---


def test_folder_is_described_without_its_weights(tmp_path):
    model = hf_custom.CustomGPT2ForCausalLM(hf_custom.CustomGPT2Config(**GPT2)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    text = inspect(tmp_path, batch_size=2, length=16)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0].endswith(": CustomGPT2ForCausalLM")
    assert {"model_type: custom_gpt2", "vocab_size: 99", "n_layer: 3", "num_labels: 3"} <= set(lines)
    assert not any(line.startswith(("summary_type", "id2label", "rope_theta")) for line in lines)
    assert all(any(line.startswith(name) for line in lines) for name in (*shards, "config.json"))
    count = model.num_parameters()
    assert any(line.split() == ["all", f"{count:,}", f"{count:,}", "trainable"] for line in lines)
    tensors = len(list(model.parameters()))
    assert lines[-1] == f"weights: {tensors} tensors, {count:,} x BF16"
    assert any("3 x (32 x 96)" in line and "9,216" in line for line in lines)
    (tmp_path / shards[0]).unlink()
    assert f"{shards[0]} is missing" in inspect(tmp_path)
    (tmp_path / shards[0]).write_bytes(b"short")
    assert "no safetensors file" in inspect(tmp_path)


@pytest.mark.parametrize(
    ("stock", "name"),
    [
        (transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2), "GPT2LMHeadModel"),
        (transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2), "BertForMaskedLM"),
    ],
)
def test_stock_checkpoint_is_described_as_ours(stock, name, tmp_path):
    stock.architectures = [name]
    stock.save_pretrained(tmp_path)
    text = inspect(tmp_path)
    ours = {"GPT2LMHeadModel": "CustomGPT2ForCausalLM"}.get(name, f"Custom{name}")
    assert text.splitlines()[0].endswith(f": {ours}")
    with torch.device("meta"):
        count = getattr(transformers, name)(stock).num_parameters()
    assert f"{count:,} trainable" in text and "has no model.safetensors" in text


def test_blip2_is_described_by_its_parts(tmp_path):
    build_blip2(WRITER).save_pretrained(tmp_path)
    text = inspect(tmp_path, length=16)
    for expected in (
        "CustomBlip2ForConditionalGeneration",
        "vision_config:",
        "qformer_config:",
        "n_layer: 3",
        "frozen",
    ):
        assert expected in text


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama'"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom_gpt2", "architectures": ["NoModel"]}))
    with pytest.raises(ValueError, match="`architectures` names 'NoModel'"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (2**30, "1.0 GiB"),
        (2**50, "1024.0 TiB"),
        (None, "unknown"),
    ],
)
def test_units_are_readable(count, text):
    assert inspection.readable(count) == text
