"""ELMo and LSTM language models: published maths, states, mixes, tokenizer, conversion, bad input."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny import ELMO, LSTM_LM, VOCAB, widen
from tiny import tokenizer as byte_tokenizer
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_custom import (
    CustomElmoConfig,
    CustomElmoForCausalLM,
    CustomElmoForPreTraining,
    CustomElmoForTokenClassification,
    CustomElmoModel,
    CustomElmoTokenizer,
)
from hf_custom.cards import CardRecord, snippet
from hf_custom.cli import main
from hf_custom.conversion import convert
from hf_custom.hub import save_model_folder
from hf_custom.lstm import TimeOrder, run_lstm
from hf_custom.modeling_elmo import CustomElmoCache
from hf_custom.packing import unpadding
from hf_custom.presets import preset_config

WITHIN = {"rtol": 0, "atol": 1e-5}
CHARACTERS = {
    **ELMO,
    "input_type": "characters",
    "max_characters_per_token": 12,
    "character_embedding_size": 4,
    "filters": [[1, 3], [2, 5], [4, 6]],
    "num_highway_layers": 2,
}
TEXTS = ["the cat sat", "a dog", "it was on the mat , wasn't it ?", "Ünïcödé extraordinarily"]


def build(model_class=CustomElmoModel, fields=None, **overrides):
    """A model with wide weights, in evaluation mode."""
    return widen(model_class(CustomElmoConfig(**{**(fields or ELMO), **overrides}))).eval()


def draw_ids(batch=3, length=9):
    return torch.randint(0, VOCAB, (batch, length))


def mask_of(lengths, length, side="right"):
    columns, lengths = torch.arange(length), torch.tensor(lengths)[:, None]
    return (columns < lengths if side == "right" else columns >= length - lengths).long()


# --- The published maths, in plain loops over numpy arrays of double precision ---


def sigmoid(x):
    import numpy as np

    return 1 / (1 + np.exp(-x))


class Reference:
    """bilm-tf's bidirectional language model, one word of one text at a time, from the tensors of its weights."""

    def __init__(self, weights, options):
        self.weights, self.options, self.states = weights, options, {}

    def characters(self, word):
        size = self.options["char_cnn"]["max_characters_per_token"]
        code = {"<S>": [256], "</S>": [257]}.get(word) or list(word.encode()[: size - 2])
        ids = [258, *code, 259]
        # One more than the number, for the row of no word; the weights lack that row.
        return [number + 1 for number in ids + [260] * (size - len(ids))]

    def word(self, word):
        import numpy as np

        w, options = self.weights, self.options.get("char_cnn")
        if options is None:
            return w["embedding"][self.options["numbers"][word]]
        characters = [w["char_embed"][number - 1] for number in self.characters(word)]
        activation = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}[options["activation"]]
        found = []
        for index, (width, count) in enumerate(options["filters"]):
            kernel, bias = w[f"CNN/W_cnn_{index}"][0], w[f"CNN/b_cnn_{index}"]
            windows = []
            for start in range(len(characters) - width + 1):
                window = sum(characters[start + offset] @ kernel[offset] for offset in range(width))
                windows.append(window + bias)
            assert len(bias) == count
            found.append(activation(np.max(windows, axis=0)))
        x = np.concatenate(found)
        for index in range(options["n_highway"]):
            name = f"CNN_high_{index}"
            gate = sigmoid(x @ w[f"{name}/W_carry"] + w[f"{name}/b_carry"])
            x = gate * np.maximum(x @ w[f"{name}/W_transform"] + w[f"{name}/b_transform"], 0) + (1 - gate) * x
        return x @ w["CNN_proj/W_proj"] + w["CNN_proj/b_proj"]

    def layers(self, row, words):
        """Layers (L + 1, T, D) of the words of a text; the states of that row go on from its last text."""
        import numpy as np

        options = self.options["lstm"]
        inputs = [self.word(word) for word in words]
        directions = []
        for direction in range(2 if self.options.get("bidirectional", True) else 1):
            x = inputs[:: -1 if direction else 1]
            found = [x]
            for layer in range(options["n_layers"]):
                y = self.lstm(row, direction, layer, x)
                if layer and options.get("use_skip_connections"):
                    y = [one + other for one, other in zip(y, x, strict=True)]
                found.append(y)
                x = y
            directions.append([layer[:: -1 if direction else 1] for layer in found])
        return np.concatenate([np.array(direction) for direction in directions], axis=-1)

    def lstm(self, row, direction, layer, x):
        import numpy as np

        options, name = self.options["lstm"], f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
        kernel, bias, projection = (self.weights.get(f"{name}/{part}") for part in ("W_0", "B", "W_P_0"))
        empty = np.zeros(options["dim"]), np.zeros(options["projection_dim"])
        cell, output = self.states.get((row, direction, layer), empty)
        found = []
        for vector in x:
            i, j, f, o = np.split(np.concatenate([vector, output]) @ kernel + bias, 4)
            cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(j)
            if options.get("cell_clip"):
                cell = np.clip(cell, -options["cell_clip"], options["cell_clip"])
            output = (sigmoid(o) * np.tanh(cell)) @ projection
            if options.get("proj_clip"):
                output = np.clip(output, -options["proj_clip"], options["proj_clip"])
            found.append(output)
        self.states[row, direction, layer] = cell, output
        return found


OPTIONS = {
    "lstm": {
        "dim": 7,
        "projection_dim": 5,
        "n_layers": 3,
        "use_skip_connections": True,
        "cell_clip": 0.4,
        "proj_clip": 0.3,
    },
    "char_cnn": {
        "embedding": {"dim": 3},
        "filters": [[1, 4], [2, 3], [5, 6]],
        "n_highway": 2,
        "n_characters": 262,
        "max_characters_per_token": 12,
        "activation": "relu",
    },
}
WORDS = ["<S>", "</S>", "<UNK>", *sorted({word for text in TEXTS for word in text.split()})]
VARIANTS = {
    "clipped, skip connections": {},
    "no clips": {"lstm": {**OPTIONS["lstm"], "cell_clip": None, "proj_clip": None}},
    "clipped cells, no skip connections": {
        "lstm": {"dim": 7, "projection_dim": 5, "n_layers": 2, "cell_clip": 0.2},
        "char_cnn": {**OPTIONS["char_cnn"], "activation": "tanh", "n_highway": 1, "n_characters": 261},
    },
    "words, one direction": {"char_cnn": None, "bidirectional": False, "n_tokens_vocab": len(WORDS)},
}


def shapes_of(options):
    """Shape of every tensor that bilm-tf writes for some options."""
    lstm, characters = options["lstm"], options.get("char_cnn")
    width, units, found = lstm["projection_dim"], lstm["dim"], {}
    if characters is None:
        found["embedding"] = (options["n_tokens_vocab"], width)
    else:
        size, total = characters["embedding"]["dim"], sum(count for _, count in characters["filters"])
        found["char_embed"] = (261, size)
        for index, (window, count) in enumerate(characters["filters"]):
            found |= {f"CNN/W_cnn_{index}": (1, window, size, count), f"CNN/b_cnn_{index}": (count,)}
        for index, part in product(range(characters["n_highway"]), ("carry", "transform")):
            found |= {f"CNN_high_{index}/W_{part}": (total, total), f"CNN_high_{index}/b_{part}": (total,)}
        found |= {"CNN_proj/W_proj": (total, width), "CNN_proj/b_proj": (width,)}
    for direction, layer in product(range(2 if options.get("bidirectional", True) else 1), range(lstm["n_layers"])):
        name = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
        found |= {f"{name}/W_0": (2 * width, 4 * units), f"{name}/B": (4 * units,), f"{name}/W_P_0": (units, width)}
    return found


def publish(folder, variant="clipped, skip connections", change=None):
    """Options, weights and vocabulary as they are published; the weights as arrays of doubles."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    options = deepcopy({name: part for name, part in {**OPTIONS, **VARIANTS[variant]}.items() if part is not None})
    weights = {name: torch.randn(shape) * 0.6 for name, shape in shapes_of(options).items()}
    if change is not None:
        change(options, weights)
    folder.mkdir()
    (folder / "options.json").write_text(json.dumps(options))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    with h5py.File(folder / "lm_weights.hdf5", "w") as file:
        for name, tensor in weights.items():
            file[name] = tensor.numpy()
    return options, {name: tensor.double().numpy() for name, tensor in weights.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_published_weights_give_every_layer(variant, tmp_path):
    """Three batches of three texts, of which some end early; states are carried on, as bilm-tf carries them."""
    options, weights = publish(tmp_path / "published", variant)
    convert(tmp_path / "published", tmp_path / "ours")
    model, report = CustomElmoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    model.eval()
    reader = AutoTokenizer.from_pretrained(tmp_path / "ours")
    reference = Reference(weights, {**options, "numbers": {word: number for number, word in enumerate(WORDS)}})
    state, mixed = None, []
    for batch in (TEXTS[:3], TEXTS[1:], TEXTS[:3][::-1]):
        inputs = reader(batch, padding=True, return_tensors="pt")
        outputs = model(**inputs, past_key_values=state, use_cache=True, output_hidden_states=True)
        state = outputs.past_key_values
        for row, text in enumerate(batch):
            words = ["<S>", *text.split(), "</S>"]
            expected = torch.from_numpy(reference.layers(row, words)).float()
            found = torch.stack([layer[row, : len(words)] for layer in outputs.hidden_states])
            torch.testing.assert_close(found, expected, **WITHIN)
            mixed.append((outputs.last_hidden_state[row, : len(words)], expected.mean(0)))
    for found, expected in mixed:
        torch.testing.assert_close(found, expected, **WITHIN)
    clip = options["lstm"].get("proj_clip") or options["lstm"].get("cell_clip")
    assert clip is None or any((abs(cell) == clip).any() for state in reference.states.values() for cell in state)


@pytest.mark.data
@torch.no_grad()
def test_published_fixture_gives_the_published_vectors(data_folder, tmp_path):
    """Of the last layer, forward and backward, in the ten batches of three that they were computed in; and of the
    layers under it, by the reference that gives the same last ones."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    source = Path(data_folder) / "checkpoints" / "elmo_fixture"
    texts = json.loads((source / "lm_embeddings_sentences.json").read_text())
    convert(source, tmp_path / "ours")
    model, reader = (
        CustomElmoModel.from_pretrained(tmp_path / "ours").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "ours"),
    )
    with h5py.File(source / "lm_weights.hdf5") as file:
        weights = {}
        file.visititems(lambda name, item: weights.update({name: item[...]}) if hasattr(item, "shape") else None)
    reference = Reference(weights, json.loads((source / "options.json").read_text()))
    state = None
    for index in range(10):
        batch = [rows[index] for rows in texts]
        inputs = reader(batch, padding=True, return_tensors="pt")
        outputs = model(**inputs, past_key_values=state, use_cache=True, output_hidden_states=True)
        state = outputs.past_key_values
        for row, text in enumerate(batch):
            words = ["<S>", *text.split(), "</S>"]
            found = torch.stack([layer[row, : len(words)] for layer in outputs.hidden_states])
            with h5py.File(source / f"lm_embeddings_{row}.hdf5") as file:
                published = torch.from_numpy(file[str(index)][...])
            torch.testing.assert_close(found[-1, 1:-1], torch.cat(tuple(published), dim=-1), **WITHIN)
            expected = torch.from_numpy(reference.layers(row, words)).float()
            torch.testing.assert_close(found, expected, **WITHIN)


# --- The LSTM and the order of time ---


def gradients_of(outputs, states, tensors):
    total = sum((outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).flatten())
    total = total + sum(state.square().sum() * factor for factor, state in zip((0.5, 0.3), states, strict=True))
    return torch.autograd.grad(total, tensors)


def draw_lstm(projection, sizes):
    lstm = widen(nn.LSTM(6, 8, proj_size=projection), std=0.5)
    x = torch.randn(sum(sizes), 6, requires_grad=True)
    state = tuple(torch.randn(sizes[0], size, requires_grad=True) for size in (projection or 8, 8))
    return lstm, x, state


@pytest.mark.parametrize("projection", [0, 5])
@pytest.mark.parametrize("sizes", [[3] * 7, [4, 4, 3, 2, 2, 1], [1]], ids=str)
def test_own_lstm_equals_torch_and_grad(projection, sizes):
    """With bounds that nothing reaches, so that the loop runs."""
    lstm, x, state = draw_lstm(projection, sizes)
    outputs, states = run_lstm(lstm, x, sizes, state, cell_clip=1e9, proj_clip=1e9)
    packed, expected = lstm(PackedSequence(x, torch.tensor(sizes)), tuple(part[None] for part in state))
    expected = tuple(part[0] for part in expected)
    for found, reference in zip((outputs, *states), (packed.data, *expected), strict=True):
        torch.testing.assert_close(found, reference, **WITHIN)
    tensors = [*lstm.parameters(), x, *state]
    found, reference = gradients_of(outputs, states, tensors), gradients_of(packed.data, expected, tensors)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def naive_lstm(lstm, x, sizes, state, cell_clip, proj_clip):
    """One sequence, one step at a time, by torch's own operators alone."""
    w = dict(lstm.named_parameters())
    starts = [sum(sizes[:step]) for step in range(len(sizes))]
    outputs, states = {}, []
    for sequence in range(sizes[0]):
        h, c = state[0][sequence], state[1][sequence]
        for step, size in enumerate(sizes):
            if sequence >= size:
                break
            place = starts[step] + sequence
            gates = w["weight_ih_l0"] @ x[place] + w["weight_hh_l0"] @ h + w["bias_ih_l0"] + w["bias_hh_l0"]
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            c = c.clamp(-cell_clip, cell_clip)
            h = o.sigmoid() * c.tanh()
            h = (w["weight_hr_l0"] @ h if "weight_hr_l0" in w else h).clamp(-proj_clip, proj_clip)
            outputs[place] = h
        states.append((h, c))
    ordered = torch.stack([outputs[place] for place in range(len(outputs))])
    return ordered, tuple(torch.stack(part) for part in zip(*states, strict=True))


@pytest.mark.parametrize("projection", [0, 5])
def test_clipped_lstm_matches_naive_and_grad(projection):
    sizes = [4, 4, 3, 2, 2, 1]
    lstm, x, state = draw_lstm(projection, sizes)
    outputs, states = run_lstm(lstm, x, sizes, state, cell_clip=0.6, proj_clip=0.25)
    expected, expected_states = naive_lstm(lstm, x, sizes, state, 0.6, 0.25)
    assert (expected.abs() == 0.25).any() and (expected_states[1].abs() == 0.6).any()
    assert (expected.abs() < 0.25).any()
    for found, reference in zip((outputs, *states), (expected, *expected_states), strict=True):
        torch.testing.assert_close(found, reference, **WITHIN)
    tensors = [*lstm.parameters(), x, *state]
    found, reference = gradients_of(outputs, states, tensors), gradients_of(expected, expected_states, tensors)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, theirs, **WITHIN)


def test_time_order_reads_only_real_tokens_and_turns_each_sequence():
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]])
    order = TimeOrder.of(unpadding(mask), (4, 5), mask.device)
    assert order.batch_sizes == [3, 2, 2, 1] and order.rows.tolist() == [2, 0, 3]
    tokens = order.take(torch.arange(20).view(4, 5))
    assert tokens.tolist() == [10, 1, 19, 11, 3, 12, 4, 13]
    assert tokens[order.reversal].tolist() == [13, 4, 19, 12, 3, 11, 1, 10]
    assert order.last(tokens).tolist() == [13, 4, 19]
    assert torch.equal(order.put(tokens + 1), (torch.arange(20).view(4, 5) + 1) * mask)


@torch.no_grad()
def test_word_is_computed_once_and_padding_of_words_is_cut():
    """The convolutions see no more of the longest word's padding than one window; the numbers are those of all."""
    embeddings = build(fields=CHARACTERS).embeddings
    reader = CustomElmoTokenizer(max_characters_per_token=12)
    ids = torch.tensor(reader.encode_words(["a", "bc", "a", "bc", "a"]))
    seen = []
    embeddings.convolutions[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    found = embeddings(ids)
    assert seen == [(2, 4, 8)]
    long = torch.tensor(reader.encode_words(["abcdefghijkl"]))
    torch.testing.assert_close(found, embeddings(torch.cat((ids, long)))[:5], **WITHIN)


# --- Padding, documents, states ---


@pytest.mark.parametrize("fields", [ELMO, {**ELMO, "cell_clip": 0.5, "proj_clip": 0.3}], ids=["plain", "clipped"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_of_either_side_changes_nothing_and_gives_zeros(fields, side):
    model, ids = build(fields=fields), draw_ids()
    mask = mask_of([9, 4, 1], 9, side)
    outputs = model(ids.masked_fill(mask == 0, 0), attention_mask=mask, output_hidden_states=True)
    for row in range(3):
        real = mask[row].bool()
        alone = model(ids[row : row + 1, real], output_hidden_states=True)
        for found, expected in zip(outputs.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(found[row, real], expected[0], **WITHIN)
            assert not found[row, ~real].any()
        torch.testing.assert_close(outputs.pooler_output[row], alone.pooler_output[0], **WITHIN)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other():
    model, ids = build(), draw_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    bounds = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
    parts = torch.cat([model(part).last_hidden_state for part in ids.split([3, 4, 2], dim=1)], dim=1)
    torch.testing.assert_close(model(ids, position_ids=positions).last_hidden_state, parts, **WITHIN)
    torch.testing.assert_close(model(ids, cu_seq_lens_q=bounds).last_hidden_state, parts, **WITHIN)


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 3, 2]], ids=str)
@pytest.mark.parametrize("padding", [None, "left"])
@torch.no_grad()
def test_text_read_in_chunks_equals_whole(chunks, padding):
    model, ids = build(CustomElmoForCausalLM, LSTM_LM), draw_ids()
    mask = mask_of([9, 6, 3] if padding else [9, 9, 9], 9, "left")
    expected = model(ids, attention_mask=mask).logits
    state, logits, end = None, [], 0
    for part in ids.split(chunks, dim=1):
        end += part.shape[1]
        outputs = model(part, attention_mask=mask[:, :end], past_key_values=state, use_cache=True)
        state = outputs.past_key_values
        assert type(state) is CustomElmoCache and state.get_seq_length() == end
        logits.append(outputs.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], **WITHIN)


@torch.no_grad()
def test_language_model_has_one_loss_whichever_logits_are_computed():
    model, ids = build(CustomElmoForCausalLM, LSTM_LM), draw_ids()
    inputs = {"input_ids": ids, "attention_mask": mask_of([9, 4, 1], 9), "labels": ids}
    expected = model(**inputs, return_logits=False)
    assert expected.logits is None
    for options in ({}, {"logits_to_keep": 2}):
        torch.testing.assert_close(model(**inputs, **options).loss, expected.loss, **WITHIN)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=str)
@torch.no_grad()
def test_generation_equals_that_without_state_and_without_padding(options):
    model = build(CustomElmoForCausalLM, LSTM_LM, eos_token_id=None, tie_word_embeddings=False)
    ids, mask = draw_ids(2, 6), mask_of([6, 3], 6, "left")
    arguments = {"max_new_tokens": 8, "do_sample": False, **options}

    def write(ids, **kwargs):
        torch.manual_seed(0)
        return model.generate(ids, **arguments, **kwargs)

    padded = write(ids, attention_mask=mask)
    assert torch.equal(padded, write(ids, attention_mask=mask, use_cache=False))
    if "do_sample" not in options:
        alone = write(ids[1:, 3:])
        assert torch.equal(padded[1:, 6:], alone[:, 3:])


@torch.no_grad()
def test_generation_goes_on_from_a_state():
    model, ids = build(CustomElmoForCausalLM, LSTM_LM, eos_token_id=None), draw_ids(2, 7)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    state = model(ids[:, :5], use_cache=True).past_key_values
    assert torch.equal(model.generate(ids, past_key_values=state, max_new_tokens=6, do_sample=False), expected)


def test_state_carries_no_gradient_and_can_be_emptied():
    model, ids = build(CustomElmoForCausalLM, LSTM_LM), draw_ids()
    state = model(ids, use_cache=True).past_key_values
    assert all(not part.requires_grad for index in range(2) for part in state.read(index))
    state.reset()
    assert state.get_seq_length() == 0 and state.read(0) is None
    torch.testing.assert_close(model(ids, past_key_values=state).logits, model(ids).logits)


# --- Mix, freezing, heads ---


@torch.no_grad()
def test_mix_is_the_formula():
    model, ids = build(), draw_ids()
    outputs = model(ids, output_hidden_states=True)
    weights, gamma = model.scalar_mix.weights, model.scalar_mix.gamma
    shares = weights.exp() / weights.exp().sum()
    expected = gamma * sum(share * layer for share, layer in zip(shares, outputs.hidden_states, strict=True))
    torch.testing.assert_close(outputs.last_hidden_state, expected)
    model.scalar_mix.do_layer_norm = True
    normed = [
        (layer - layer.mean(-1, keepdim=True)) / (layer.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        for layer in outputs.hidden_states
    ]
    expected = gamma * sum(share * layer for share, layer in zip(shares, normed, strict=True))
    torch.testing.assert_close(model(ids).last_hidden_state, expected, **WITHIN)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_mix_trains_and_language_models_freeze_on_request(is_frozen, tmp_path):
    fields = {"freeze_bilm": is_frozen, "lstm_dropout": 0.5, "classifier_dropout": 0.0, "num_labels": 3}
    build(CustomElmoForTokenClassification, **fields).save_pretrained(tmp_path)
    model = CustomElmoForTokenClassification.from_pretrained(tmp_path).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    ids, labels = draw_ids(), torch.randint(0, 3, (3, 9))
    losses = []
    for _ in range(30):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"elmo.scalar_mix.weights", "elmo.scalar_mix.gamma", "classifier.weight"} <= moved
    assert any("_lstm." in name or "embeddings" in name for name in moved) != is_frozen
    assert model.elmo.forward_lstm.training != is_frozen and model.dropout.training
    if is_frozen:
        # No dropout in what is frozen.
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("bidirectional", [True, False])
@torch.no_grad()
def test_pooling_is_over_real_words(bidirectional):
    model, ids = build(bidirectional=bidirectional), draw_ids()
    mask = mask_of([9, 4, 1], 9)
    found = {}
    for kind in ("mean", "max", "ends"):
        model.config.pooling_type = kind
        outputs = model(ids, attention_mask=mask)
        found[kind] = outputs.pooler_output
    states, size = outputs.last_hidden_state, model.config.direction_size
    for row, length in enumerate((9, 4, 1)):
        real = states[row, :length]
        torch.testing.assert_close(found["mean"][row], real.mean(0))
        torch.testing.assert_close(found["max"][row], real.amax(0))
        ends = torch.cat((real[-1, :size], real[0, size:]))
        torch.testing.assert_close(found["ends"][row], ends)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_loss_is_that_of_the_word_after_and_the_word_before(bidirectional):
    model = build(CustomElmoForPreTraining, bidirectional=bidirectional)
    ids, mask = draw_ids(), mask_of([9, 4, 1], 9)
    labels = torch.randint(0, VOCAB, (3, 9)).masked_fill(mask == 0, -100)
    labels[0, 3] = -100
    outputs = model(ids, attention_mask=mask, labels=labels)
    forward = nn.functional.log_softmax(outputs.logits, -1)
    total, count, backward_total = 0.0, 0, 0.0
    for row, length in enumerate((9, 4, 1)):
        for place in range(length - 1):
            if (after := labels[row, place + 1]) != -100:
                total, count = total - forward[row, place, after], count + 1
            if bidirectional and (before := labels[row, place]) != -100:
                backward_total -= outputs.backward_logits[row, place + 1].log_softmax(-1)[before]
    torch.testing.assert_close(outputs.forward_loss, total / count)
    if bidirectional:
        torch.testing.assert_close(outputs.backward_loss, backward_total / count)
        torch.testing.assert_close(outputs.loss, (total + backward_total) / count / 2)
    else:
        assert outputs.backward_loss is None and outputs.backward_logits is None
        torch.testing.assert_close(outputs.loss, outputs.forward_loss)
    trained = model.train()(ids, attention_mask=mask, labels=labels, num_items_in_batch=2 * count)
    assert trained.logits is None and trained.backward_logits is None
    torch.testing.assert_close(trained.loss, outputs.loss / 2)


@pytest.mark.parametrize("fields", [ELMO, CHARACTERS], ids=["words", "characters"])
def test_tagger_has_word_vectors_of_its_own_on_request(fields):
    """They train when the language models do not, and stand behind the mix."""
    model = build(CustomElmoForTokenClassification, fields, classifier_embeddings=True, freeze_bilm=True)
    ids = draw_ids() if fields is ELMO else torch.randint(1, 262, (3, 9, 12))
    mask = mask_of([9, 4, 1], 9)
    logits = model(ids, attention_mask=mask).logits
    states = model.elmo(ids, attention_mask=mask).last_hidden_state
    vectors = torch.cat((states, model.word_vectors(ids.flatten(0, 1)).view(3, 9, -1)), -1)
    torch.testing.assert_close(logits[mask.bool()], model.classifier(vectors)[mask.bool()], **WITHIN)
    logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("word_vectors.") for name in trained)
    assert not any(name.startswith(("elmo.embeddings", "elmo.forward", "elmo.backward")) for name in trained)
    with pytest.raises(ValueError, match="`classifier_embeddings` read `input_ids`"):
        model(inputs_embeds=torch.randn(1, 2, 16))


@torch.no_grad()
def test_tagger_equals_torch_bidirectional_lstm():
    model = build(CustomElmoForTokenClassification, classifier_lstm_size=5)
    ids, mask = draw_ids(), mask_of([9, 4, 1], 9)
    logits, states = model(ids, attention_mask=mask).logits, model.elmo(ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate((9, 4, 1)):
        expected = model.classifier(model.tagger(states[row, :length])[0])
        torch.testing.assert_close(logits[row, :length], expected, **WITHIN)


def test_model_without_layers_is_its_word_vectors_twice():
    """What a tagger without ELMo reads."""
    model, ids = build(num_hidden_layers=0), draw_ids()
    (layer,) = model(ids, output_hidden_states=True).hidden_states
    vectors = model.embeddings(ids)
    torch.testing.assert_close(layer, torch.cat((vectors, vectors), -1))


@pytest.mark.parametrize("fields", [ELMO, {**ELMO, "bidirectional": False}, CHARACTERS], ids=["words", "one", "chars"])
def test_embeddings_may_be_given_instead_of_ids(fields):
    model = build(fields=fields)
    ids = draw_ids()
    if fields is CHARACTERS:
        ids = torch.randint(1, 262, (3, 9, 12))
    vectors = model.embeddings(ids.flatten(0, 1)).view(3, 9, -1)
    found, expected = model(inputs_embeds=vectors), model(ids)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **WITHIN)


# --- Tokenizer ---


def test_characters_are_numbered_as_published():
    reader = CustomElmoTokenizer()
    ids = reader(["ab é", "c"], padding=True)
    first = ids["input_ids"][0]
    assert first[0][:4] == [259, 257, 260, 261] and first[3][:4] == [259, 258, 260, 261]
    assert first[1][:5] == [259, 98, 99, 260, 261] and first[2][:5] == [259, 0xC3 + 1, 0xA9 + 1, 260, 261]
    assert all(len(word) == 50 for row in ids["input_ids"] for word in row)
    assert ids["input_ids"][1][3] == [0] * 50 and ids["attention_mask"] == [[1, 1, 1, 1], [1, 1, 1, 0]]
    long = reader.characters_of("x" * 60)
    assert long == [259, *[121] * 48, 260]
    left = reader(["ab é", "c"], padding=True, padding_side="left", return_tensors="pt")
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]] and not left["input_ids"][1, 0].any()
    assert left["input_ids"][1, 1:].tolist() == ids["input_ids"][1][:3]
    marks = reader(["ab é", "c"], padding=True, padding_side="left", return_special_tokens_mask=True)
    assert marks["special_tokens_mask"] == [[1, 0, 0, 1], [1, 1, 0, 1]]
    assert reader.pad([dict(reader("c")), dict(reader("ab é"))], padding_side="left")["attention_mask"][0] == [
        0,
        1,
        1,
        1,
    ]
    longer = reader(["c"], padding="max_length", max_length=5, return_tensors="pt")
    assert longer["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] and longer["input_ids"].dtype == torch.long


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_tokenizer_survives_saving_and_cuts_to_length(kind, tmp_path):
    (tmp_path / "words.txt").write_text("<PAD>\n<UNK>\n<S>\n</S>\nthe\ncat\n\u2028odd\n")
    reader = CustomElmoTokenizer(str(tmp_path / "words.txt"), input_type=kind, split_punctuation=True)
    reader.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(loaded) is CustomElmoTokenizer and len(loaded) == len(reader) == 7
    for tokenizer in (reader, loaded):
        assert tokenizer.tokenize("the cat, isn't it?") == ["the", "cat", ",", "isn't", "it", "?"]
        words = tokenizer(["the cat sat", "the"], padding=True, return_tensors="pt")
        assert words["input_ids"].shape[:2] == (2, 5)
        split = tokenizer([["the", "cat", "sat"], ["the"]], is_split_into_words=True, padding=True, return_tensors="pt")
        assert torch.equal(split["input_ids"], words["input_ids"])
        cut = tokenizer("the cat sat", truncation=True, max_length=4)
        assert len(cut["input_ids"]) == 4 and cut["input_ids"][-1] == words["input_ids"][0][-1].tolist()
        bare = tokenizer("the cat", add_special_tokens=False)
        assert len(bare["input_ids"]) == 2
    if kind == "words":
        # A word that is not in the vocabulary is the unknown one; a special one is never so by its letters.
        assert words["input_ids"].tolist() == [[2, 4, 5, 1, 3], [2, 4, 3, 0, 0]]
        assert loaded.decode([4, 5]) == "the cat"


def test_unknown_word_has_characters_of_its_own():
    model, reader = build(fields=CHARACTERS), CustomElmoTokenizer(max_characters_per_token=12)
    states = [model(**reader(text, return_tensors="pt")).last_hidden_state for text in ("the zqxj", "the zqxk")]
    assert not torch.allclose(states[0][0, 2], states[1][0, 2])


# --- Conversion ---


def drop(options, weights):
    del weights["CNN_high_1/W_carry"]


def add(options, weights):
    weights["CNN_high_2/W_carry"] = torch.zeros(13, 13)


def reshape(options, weights):
    weights["CNN/W_cnn_1"] = torch.zeros(1, 2, 3, 4)


def fewer_layers(options, weights):
    options["lstm"]["n_layers"] = 2


def other_characters(options, weights):
    options["char_cnn"] = {**options["char_cnn"], "n_characters": 300}


def no_dim(options, weights):
    options["lstm"] = {key: value for key, value in options["lstm"].items() if key != "dim"}


def more_words(options, weights):
    options["n_tokens_vocab"] = 12345


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, ("CNN_high_1/W_carry", "no tensor")),
        (add, ("CNN_high_2/W_carry", "do not call for")),
        (reshape, ("CNN/W_cnn_1", "(1, 2, 3, 4)", "(1, 2, 3, 3)")),
        (fewer_layers, ("Cell2", "do not call for")),
        (other_characters, ("`n_characters`", "300")),
        (no_dim, ("`dim`", "options.json")),
        (more_words, ("vocabulary", "disagree", "12345", str(len(WORDS)))),
    ],
)
def test_published_files_that_disagree_are_refused(change, words, tmp_path):
    publish(tmp_path / "published", change=change)
    with pytest.raises(ValueError) as caught:
        convert(tmp_path / "published", tmp_path / "ours")
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "ours").exists()


def test_vocabulary_that_disagrees_with_the_word_vectors_is_refused(tmp_path):
    publish(tmp_path / "published", "words, one direction")
    (tmp_path / "published" / "vocab.txt").write_text("<S>\n</S>\nthe\n")
    with pytest.raises(ValueError, match="disagree about the number of words.*vocab.txt"):
        convert(tmp_path / "published", tmp_path / "ours")


@pytest.mark.parametrize(("text", "words"), [("a\nb\n\nc\n", "line 3"), ("a\nb\na\n", "'a' in lines 1 and 3")])
def test_bad_vocabulary_file_is_refused(text, words, tmp_path):
    (tmp_path / "vocab.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        CustomElmoTokenizer(str(tmp_path / "vocab.txt"))


def test_heads_and_missing_h5py_and_damage_are_refused(tmp_path, monkeypatch):
    publish(tmp_path / "published")
    with pytest.raises(ValueError, match="`n_head`"):
        convert(tmp_path / "published", tmp_path / "ours", n_head=2)
    (tmp_path / "published" / "lm_weights.hdf5").write_bytes(b"damaged")
    with pytest.raises(OSError, match="lm_weights.hdf5 is damaged"):
        convert(tmp_path / "published", tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        convert(tmp_path / "published", tmp_path / "ours")
    (tmp_path / "published" / "options.json").write_text("{")
    with pytest.raises(ValueError, match="options.json is no JSON"):
        convert(tmp_path / "published", tmp_path / "ours")


# --- Bad input ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cell_clip": 0.0}, ("`cell_clip`", "0.0")),
        ({"proj_clip": -1}, ("`proj_clip`", "-1")),
        ({"filters": []}, ("`filters`", "empty")),
        ({"filters": [[51, 4]]}, ("`filters`", "[51, 4]")),
        ({"max_characters_per_token": 2}, ("`max_characters_per_token`", "2")),
        ({"projection_size": 0}, ("`projection_size`", "0")),
        ({"num_highway_layers": -1}, ("`num_highway_layers`", "-1")),
        ({"input_type": "letters"}, ("`input_type`", "'letters'")),
        ({"pooling_type": "sum"}, ("`pooling_type`", "'sum'")),
        ({"tie_word_embeddings": True}, ("`tie_word_embeddings`", "characters")),
        ({"cell_sizes": 3}, ("`cell_sizes`", "`cell_size`")),
        ({"vocab_size": 10**9}, ("`vocab_size`",)),
        ({"num_hidden_layers": 10_000, "cell_size": 100_000}, ("`num_hidden_layers`", "parameters")),
    ],
    ids=str,
)
def test_bad_field_is_refused_by_name(fields, words):
    with pytest.raises(ValueError) as caught:
        CustomElmoConfig(**fields)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: build()(torch.tensor([[VOCAB]])), ValueError, ("`input_ids`", str(VOCAB), "row 0")),
        (lambda: build()(torch.zeros(2, 0, dtype=torch.long)), ValueError, ("`input_ids`", "without a token")),
        (lambda: build(fields=CHARACTERS)(draw_ids()), ValueError, ("(3, 9)", "(batch, words, 12)", "tokenizer")),
        (
            lambda: build(fields=CHARACTERS)(torch.full((1, 2, 12), 262)),
            ValueError,
            ("`input_ids`", "262", "vocabulary of 262"),
        ),
        (lambda: build()(draw_ids(), attention_mask=torch.ones(3, 8)), ValueError, ("`attention_mask`", "(3, 9)")),
        (
            lambda: build(CustomElmoForPreTraining)(draw_ids(), labels=draw_ids() + VOCAB),
            ValueError,
            ("`labels`", "`vocab_size`"),
        ),
        (
            lambda: build(CustomElmoForTokenClassification)(draw_ids(), labels=draw_ids() + 50),
            ValueError,
            ("`labels`", "`num_labels`"),
        ),
        (lambda: build(CustomElmoForCausalLM), ValueError, ("`bidirectional` is True", "`bidirectional=False`")),
        (
            lambda: build(CustomElmoForCausalLM, CHARACTERS, bidirectional=False),
            ValueError,
            ("'characters'", "`input_type='words'`"),
        ),
        (lambda: build(fields=CHARACTERS).resize_token_embeddings(300), ValueError, ("characters", "resize")),
        (
            lambda: build()(draw_ids(), past_key_values=DynamicCache()),
            TypeError,
            ("`past_key_values`", "DynamicCache", "CustomElmoCache"),
        ),
        (
            lambda: build()(draw_ids(2), past_key_values=build()(draw_ids(), use_cache=True).past_key_values),
            ValueError,
            ("`past_key_values`", "3 rows", "has 2"),
        ),
        (lambda: CustomElmoTokenizer()("a", "b"), ValueError, ("`text_pair`",)),
        (lambda: CustomElmoTokenizer(input_type="letters"), ValueError, ("`input_type`", "'letters'")),
    ],
)
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def test_assisted_decoding_is_refused():
    model = build(CustomElmoForCausalLM, LSTM_LM)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(draw_ids(1), assistant_model=model, max_new_tokens=3)


# Opens each folder where this package cannot be imported, runs the snippet of its card and compares the outputs.
REMOTE = """
import os, sys
sys.modules["hf_custom"] = None
import torch, transformers
for folder, auto_name in (("tagger", "AutoModelForTokenClassification"), ("writer", "AutoModelForCausalLM"),
                          ("bilm", "AutoModelForPreTraining"), ("base", "AutoModel")):
    os.chdir(os.path.join(sys.argv[1], folder))
    case = torch.load("case.pt")
    model = getattr(transformers, auto_name).from_pretrained(".", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    for name, expected in case["outputs"].items():
        torch.testing.assert_close(model(**case["inputs"])[name], expected)
    if os.path.exists("tokenizer_config.json"):
        reader = transformers.AutoTokenizer.from_pretrained(".", trust_remote_code=True)
        found = reader(case["text"], return_tensors="pt")
        assert torch.equal(found["input_ids"], case["inputs"]["input_ids"])
    exec(open("snippet.py").read(), {})
    model.save_pretrained("again")
    assert os.path.exists("again/modeling_elmo.py")
"""


@torch.no_grad()
def test_saved_folders_open_where_the_package_is_not(tmp_path):
    reader = CustomElmoTokenizer(max_characters_per_token=12, split_punctuation=True)
    models = {
        "tagger": (build(CustomElmoForTokenClassification, CHARACTERS, classifier_lstm_size=5), reader),
        "writer": (build(CustomElmoForCausalLM, LSTM_LM), byte_tokenizer()),
        "bilm": (build(CustomElmoForPreTraining, CHARACTERS), reader),
        "base": (build(fields=CHARACTERS, cell_clip=0.4), reader),
    }
    for name, (model, words) in models.items():
        folder = save_model_folder(tmp_path / name, model, words, CardRecord(name, "words", {name: {"accuracy": 1.0}}))
        inputs = words("It was good.", return_tensors="pt")
        outputs = {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}
        torch.save({"inputs": dict(inputs), "outputs": outputs, "text": "It was good."}, folder / "case.pt")
        (folder / "snippet.py").write_text(snippet(folder))
    run = subprocess.run([sys.executable, "-c", REMOTE, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "LABEL_" in run.stdout and "It was" in run.stdout and "torch.Size([1, 6, 32])" in run.stdout


def test_model_is_inspected_and_has_no_stock_counterpart(tmp_path, capsys):
    build(CustomElmoForCausalLM, LSTM_LM).save_pretrained(tmp_path / "writer")
    assert main(["inspect", str(tmp_path / "writer"), "--batch-size", "2"]) is None
    # Two layers of 16 outputs and 32 cells each, of two texts, at 4 bytes a number.
    assert re.search(r"state +768 bytes +after any number of tokens", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="CustomElmoForCausalLM has no stock counterpart"):
        main(["export", str(tmp_path / "writer"), str(tmp_path / "stock")])


def test_command_converts_published_weights(tmp_path, capsys, monkeypatch):
    publish(tmp_path / "published")
    main(["convert", str(tmp_path / "published"), str(tmp_path / "ours")])
    assert type(AutoModel.from_pretrained(tmp_path / "ours")) is CustomElmoModel
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SystemExit, match="pip install h5py"):
        main(["convert", str(tmp_path / "published"), str(tmp_path / "again")])


@pytest.mark.parametrize("is_meta", [False, True])
def test_weights_start_as_documented(is_meta):
    fields = {**CHARACTERS, "cell_size": 200, "projection_size": 100, "filters": [[3, 150]], "num_labels": 50}
    with torch.device("meta" if is_meta else "cpu"):
        model = CustomElmoForTokenClassification(CustomElmoConfig(**fields))
    if is_meta:
        model = model.to_empty(device="cpu")
        model.init_weights()
    weights, cells = dict(model.named_parameters()), 200
    glorot = lambda rows, columns: (2 / (rows + columns)) ** 0.5  # noqa: E731
    layer = "elmo.backward_lstm.layers.1.lstm"
    expected = {
        f"{layer}.weight_ih_l0": glorot(4 * cells, 100),
        f"{layer}.weight_hh_l0": glorot(4 * cells, 100),
        f"{layer}.weight_hr_l0": glorot(100, cells),
        "elmo.embeddings.convolutions.0.weight": (3 * 4) ** -0.5,
        "elmo.embeddings.highways.1.carry.weight": 150**-0.5,
        "elmo.embeddings.projection.weight": 150**-0.5,
        "elmo.embeddings.character_embeddings.weight": 0.1,
        "classifier.weight": 200**-0.5,
    }
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.1), name
    constants = {
        "elmo.embeddings.highways.0.carry.bias": -2.0,
        "elmo.embeddings.highways.0.transform.bias": 0.0,
        "elmo.scalar_mix.weights": 0.0,
        "elmo.scalar_mix.gamma": 1.0,
        f"{layer}.bias_hh_l0": 0.0,
    }
    for name, value in constants.items():
        assert (weights[name] == value).all(), name
    assert weights[f"{layer}.bias_ih_l0"].view(4, cells).mean(-1).tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(("name", "millions"), [("elmo", 93.6), ("elmo-medium", 28.0), ("elmo-small", 13.6)])
def test_presets_have_the_published_sizes(name, millions):
    """As the project's page gives them, of the language models; torch keeps each bias of an LSTM twice."""
    with torch.device("meta"):
        model = CustomElmoModel(preset_config(name), add_scalar_mix=False)
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if "bias_hh" not in name)
    assert round(count / 1e6, 1) == millions


def test_auto_classes_open_what_was_saved(tmp_path):
    model = build(CustomElmoForCausalLM, LSTM_LM)
    model.save_pretrained(tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), draw_ids()
    assert type(loaded) is CustomElmoForCausalLM
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is CustomElmoModel
    # A language model has no mix; a new one is the mean.
    assert AutoModel.from_pretrained(tmp_path).scalar_mix.gamma.item() == 1.0
