"""The encoder-decoder: losses, padding, caches, beams, sharing, and every way to compute the same numbers."""

import copy
import math
import shutil
from itertools import product

import pytest
import reference
import torch
from reference import assert_gradients_near, assert_near, gradients_of
from tiny import BATCH, LENGTH, SEQ2SEQ, TARGET_LENGTH, TRANSFORMER, VOCAB, name_of
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.initialization import no_init_weights

from hf_custom import CustomTransformerConfig, CustomTransformerForSeq2SeqLM, CustomTransformerModel
from hf_custom.presets import preset_config

BASE, WRITER = SEQ2SEQ
SEPARATE = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 53}
SEPARATE |= {"bos_token_id": 50, "eos_token_id": 50, "pad_token_id": 51, "decoder_start_token_id": 50}
IMPLEMENTATIONS = ["eager", "sdpa"]
NORMS = [{}, {"norm_first": True}]
each_implementation = pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
each_norm = pytest.mark.parametrize("option", NORMS, ids=name_of)
each_padding = pytest.mark.parametrize("padding", [None, "left", "right"])
# The graph without a break and, in minutes rather than seconds, what is compiled of it.
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
BACKENDS = ["eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])]
each_backend = pytest.mark.parametrize("backend", BACKENDS)

# --- Labels and losses ---


def labelled(padding="right"):
    """A padded batch as a collator makes it: a source with its mask, and labels with -100 behind the target."""
    inputs = WRITER.inputs(padding=padding)
    mask, ids = inputs.pop("decoder_attention_mask"), inputs.pop("decoder_input_ids")
    return {**inputs, "labels": ids.masked_fill(mask == 0, -100)}


def shift(labels):
    """The start token, then all labels but the last, one by one."""
    rows = [[97, *row[:-1]] for row in labels.tolist()]
    return torch.tensor([[98 if label == -100 else label for label in row] for row in rows])


@each_padding
def test_labels_are_shifted_behind_the_start_token(padding):
    model, batch = WRITER.build(), labelled(padding)
    # A label in the middle may be ignored as well.
    batch["labels"][0, 2] = -100
    ids = shift(batch["labels"])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(batch["labels"]), ids)
    expected = model(**batch, decoder_input_ids=ids, use_cache=True)
    outputs = model(**batch)
    is_labelled = batch["labels"] != -100
    assert_near(outputs.logits[is_labelled], expected.logits[is_labelled])
    assert_near(outputs.loss, expected.loss)
    naive = reference.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
    assert_near(outputs.loss, naive)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [None, 37])
def test_training_loss_is_smoothed_and_counted(smoothing, count):
    model, batch = WRITER.build(label_smoothing=smoothing, loss_chunk_size=4).train(), labelled()
    outputs = model(**batch, num_items_in_batch=count)
    assert outputs.logits is None
    whole = model(**batch, num_items_in_batch=count, return_logits=True)
    rows, labels = whole.logits.flatten(0, 1), batch["labels"].flatten()
    expected = reference.smoothed_cross_entropy(rows, labels, count, smoothing)
    for name, loss in (("without logits", outputs.loss), ("with logits", whole.loss)):
        assert_near(loss, expected, name=name)
    assert_gradients_near(gradients_of(model, outputs.loss), gradients_of(model, expected.float()))
    asked = model(**batch, num_items_in_batch=count, label_smoothing=0.3).loss
    assert_near(asked, reference.smoothed_cross_entropy(rows, labels, count, 0.3))


def test_evaluation_is_not_smoothed():
    model, batch = WRITER.build(label_smoothing=0.3), labelled()
    outputs = model(**batch)
    assert outputs.logits.shape == (BATCH, TARGET_LENGTH, VOCAB)
    assert_near(outputs.loss, reference.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten()))


def test_loss_of_the_user_is_called():
    model, batch = WRITER.build().train(), labelled()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + vocab_size
    assert model(**batch).loss == VOCAB


def test_trainer_smooths_as_the_configuration_does(tmp_path):
    """The host's smoothing reads logits and takes the labels away before the model sees them."""
    weights = []
    batch = labelled()
    ids = shift(batch["labels"])
    rows = [{name: tensor[i] for name, tensor in {**batch, "decoder_input_ids": ids}.items()} for i in range(BATCH)]
    for own, host in ((0.2, 0.0), (0.0, 0.2)):
        set_seed(1)
        model = WRITER.build(label_smoothing=own)
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=BATCH, max_steps=1, optim="sgd", learning_rate=0.1, report_to=[],
            label_smoothing_factor=host, save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(dict(model.named_parameters()))
    for name in weights[0]:
        assert_near(weights[0][name], weights[1][name], name=name)


# --- The unpadded path ---


def assert_paths_agree(model, batch, packings):
    """Loss and gradients of the padded path, which a request for attention weights asks for, and of the other."""
    padded = model(**batch, output_attentions=True)
    expected = gradients_of(model, padded.loss)
    assert packings[-2:] == [None, None]
    packed = model(**batch)
    assert_near(packed.loss, padded.loss)
    assert_gradients_near(gradients_of(model, packed.loss), expected)


@pytest.mark.parametrize("padding", ["left", "right"])
@each_norm
def test_padding_is_left_out_once(option, padding, packings):
    model, batch = WRITER.build(**option).train(), labelled(padding)
    assert_paths_agree(model, batch, packings)
    source, target = packings[-2:]
    assert source.indices.numel() == int(batch["attention_mask"].sum())
    assert target.indices.numel() == int((batch["labels"] != -100).sum())


def test_rows_without_a_source_or_a_target_are_computed_apart(packings):
    """A row may be empty on one side; its neighbours do not notice."""
    model, batch = WRITER.build().train(), labelled()
    batch["labels"][1] = -100
    alone = {name: tensor[[0, 2]] for name, tensor in batch.items()}
    assert_near(model(**batch).loss, model(**alone).loss)
    assert packings[-1] is not None
    # Attention to nothing gives zeros; what is left of the row is its target.
    batch["attention_mask"][1] = 0
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("is_padded", [(True, False), (False, True)], ids=["source", "target"])
def test_one_padded_side_is_enough(is_padded, packings):
    model, batch = WRITER.build().train(), labelled()
    if not is_padded[0]:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    if not is_padded[1]:
        batch["labels"] = batch["labels"].clamp(min=0)
    assert_paths_agree(model, batch, packings)
    assert [packing is not None for packing in packings[-2:]] == list(is_padded)


def test_states_at_padding_are_zero():
    inputs = BASE.inputs(padding="right")
    outputs = BASE.build()(**inputs, use_cache=False)
    assert not outputs.last_hidden_state[inputs["decoder_attention_mask"] == 0].any()
    assert not outputs.encoder_last_hidden_state[inputs["attention_mask"] == 0].any()


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_equals_eager():
    model, inputs = BASE.build(attn_implementation="eager"), BASE.inputs(padding="left")
    is_real = inputs["decoder_attention_mask"].bool()
    expected = model(**inputs).last_hidden_state[is_real]
    model.set_attn_implementation("flex_attention")
    assert_near(model(**inputs).last_hidden_state[is_real], expected)


# --- What is recorded ---


@pytest.mark.parametrize("is_tuple", [False, True])
@torch.no_grad()
def test_hidden_states_and_attentions_have_their_shapes(is_tuple):
    model, inputs = WRITER.build(attn_implementation="eager"), WRITER.inputs(padding="left")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True, return_dict=not is_tuple)
    names = ("logits", "past_key_values", "decoder_hidden_states", "decoder_attentions", "cross_attentions")
    names += ("encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions")
    outputs = dict(zip(names, outputs, strict=True)) if is_tuple else outputs
    assert [state.shape for state in outputs["encoder_hidden_states"]] == [(BATCH, LENGTH, 32)] * 3
    assert [state.shape for state in outputs["decoder_hidden_states"]] == [(BATCH, TARGET_LENGTH, 32)] * 4
    shapes = {"encoder": (4, LENGTH, LENGTH), "decoder": (2, TARGET_LENGTH, TARGET_LENGTH)}
    shapes["cross"] = (2, TARGET_LENGTH, LENGTH)
    for name, shape in shapes.items():
        weights = outputs[f"{name}_attentions"]
        assert [part.shape for part in weights] == [(BATCH, *shape)] * (2 if name == "encoder" else 3)
        for part in weights:
            torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:-1]))
    hidden = outputs["cross_attentions"][0].masked_select(inputs["attention_mask"][:, None, None] == 0)
    assert not hidden.any()


# --- Masked heads ---


def draw_head_masks():
    """A factor for each head of each layer, of the three kinds of attention."""
    return {
        "head_mask": torch.rand(2, 4),
        "decoder_head_mask": torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 1.0]]),
        "cross_attn_head_mask": torch.rand(3, 2),
    }


def masked_projections(model):
    """By argument, the output projections (of each layer) whose columns belong to its heads."""
    encoder, decoder = model.model.encoder.layers, model.model.decoder.layers
    return {
        "head_mask": [layer.self_attn.out_proj for layer in encoder],
        "decoder_head_mask": [layer.self_attn.out_proj for layer in decoder],
        "cross_attn_head_mask": [layer.cross_attn.out_proj for layer in decoder],
    }


def scale_heads(model, masks):
    """The model with the heads' factors in its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, projections in masked_projections(model).items():
            for projection, factors in zip(projections, masks[name], strict=True):
                projection.weight.unflatten(1, (len(factors), -1)).mul_(factors[:, None])
    return model


@each_implementation
def test_masked_heads_equal_scaled_weights(attn_implementation, packings):
    model, batch = WRITER.build(attn_implementation=attn_implementation).train(), labelled("left")
    masks = draw_head_masks()
    expected = scale_heads(model, masks)(**batch, return_logits=True)
    outputs = model(**batch, **masks, return_logits=True)
    assert_near(outputs.loss, expected.loss)
    is_labelled = batch["labels"] != -100
    assert_near(outputs.logits[is_labelled], expected.logits[is_labelled])
    assert (packings[-1] is not None) == (attn_implementation == "sdpa")
    plain = model(**batch, return_logits=True)
    assert (plain.logits - outputs.logits)[is_labelled].abs().max() > 0.1


@pytest.mark.parametrize("is_checkpointing", [False, True])
def test_factor_of_a_head_has_its_importance_for_gradient(is_checkpointing):
    """At factors of 1: the gradient of the head's columns times these."""
    model, batch = WRITER.build().train(), labelled()
    if is_checkpointing:
        model.gradient_checkpointing_enable()
    masks = {name: torch.ones_like(mask, requires_grad=True) for name, mask in draw_head_masks().items()}
    model(**batch, **masks).loss.backward()
    for name, projections in masked_projections(model).items():
        weights = torch.stack([projection.weight * projection.weight.grad for projection in projections])
        expected = weights.sum(1).unflatten(1, (masks[name].shape[1], -1)).sum(-1)
        assert_near(masks[name].grad, expected, name=name, scale_floor=0.0)


@pytest.mark.parametrize("axes", [2, 5])
def test_beams_keep_the_heads_of_their_rows(axes):
    model, inputs, masks = build_writer(), sources("left"), draw_head_masks()
    expected = generate(scale_heads(model, masks), inputs, num_beams=3)
    assert not torch.equal(generate(model, inputs, num_beams=3), expected)
    if axes == 5:
        masks = {name: mask[:, None, :, None, None].repeat(1, BATCH, 1, 1, 1) for name, mask in masks.items()}
    assert torch.equal(generate(model, inputs, num_beams=3, **masks), expected)


@pytest.mark.parametrize("name", ["head_mask", "decoder_head_mask", "cross_attn_head_mask"])
def test_mask_of_other_heads_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^`{name}` has shape \(5, 5\)"):
        WRITER.build()(**labelled(), **{name: torch.ones(5, 5)})


# --- Decoding step by step ---

CHUNKS = {"tokens": [1] * TARGET_LENGTH, "chunks": [3, 1, 2, 1]}


def make_cache(is_static, config):
    def part(length):
        return StaticCache(config=config, max_cache_len=length) if is_static else DynamicCache(config=config)

    decoder = config.get_text_config(decoder=True)
    config = decoder if is_static else config
    return EncoderDecoderCache(part(TARGET_LENGTH + 3), part(LENGTH))


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@each_implementation
@each_norm
@torch.no_grad()
def test_incremental_equals_full_decoding(option, attn_implementation, is_static, chunks):
    model = WRITER.build(**option, attn_implementation=attn_implementation)
    inputs = WRITER.inputs(padding="left")
    ids = inputs.pop("decoder_input_ids")
    del inputs["decoder_attention_mask"]
    expected = model(**inputs, decoder_input_ids=ids, use_cache=False).logits
    cache, logits, calls = make_cache(is_static, model.config), [], []
    model.model.decoder.layers[0].cross_attn.k_proj.register_forward_hook(lambda *args: calls.append(1))
    encoder_outputs = model.get_encoder()(**inputs)
    for part in ids.split(CHUNKS[chunks], dim=1):
        outputs = model(
            attention_mask=inputs["attention_mask"],
            encoder_outputs=encoder_outputs,
            decoder_input_ids=part,
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(outputs.logits)
    assert_near(torch.cat(logits, dim=1), expected)
    assert len(calls) == 1, "the encoder is projected once"


@torch.no_grad()
def test_cache_is_made_when_asked_and_kept_off_when_not():
    model, inputs = WRITER.build(), WRITER.inputs()
    outputs = model(**inputs)
    assert isinstance(outputs.past_key_values, EncoderDecoderCache)
    assert outputs.past_key_values.get_seq_length() == TARGET_LENGTH
    assert model(**labelled()).past_key_values is None
    assert model(**inputs, use_cache=False).past_key_values is None


@torch.no_grad()
def test_encoder_outputs_may_be_a_tuple_and_logits_a_few():
    model, inputs = WRITER.build(), WRITER.inputs(padding="right")
    expected = model(**inputs).logits
    states = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    del inputs["input_ids"]
    assert_near(model(**inputs, encoder_outputs=(states,), logits_to_keep=2).logits, expected[:, -2:])


@torch.no_grad()
def test_loss_is_the_same_whichever_logits_are_computed():
    model, batch = WRITER.build(), labelled()
    expected = model(**batch, return_logits=False)
    assert expected.logits is None
    for options in ({}, {"logits_to_keep": 2}):
        assert_near(model(**batch, **options).loss, expected.loss)


@torch.no_grad()
def test_embeddings_stand_for_ids():
    model, inputs = WRITER.build(), WRITER.inputs(padding="left")
    expected = model(**inputs).logits
    table = model.get_input_embeddings()
    given = {"inputs_embeds": table(inputs.pop("input_ids"))}
    given["decoder_inputs_embeds"] = table(inputs.pop("decoder_input_ids"))
    assert_near(model(**inputs, **given).logits, expected)


STRATEGIES = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 1.5, "top_k": 30},
    "beam": {"num_beams": 4, "length_penalty": 0.6},
}


def build_writer(**options):
    """A model that never ends."""
    return WRITER.build(**{"eos_token_id": None, "tie_word_embeddings": False, **options})


def generate(model, inputs, **kwargs):
    """No token twice, or wide weights would repeat one."""
    set_seed(1)
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 8, "no_repeat_ngram_size": 1, **kwargs})


def sources(padding):
    inputs = WRITER.inputs(padding=padding)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("option", [{}, {"norm_first": True}, SEPARATE | {"eos_token_id": None}], ids=name_of)
def test_generate_is_same_with_any_cache(option, strategy):
    model, inputs, strategy = build_writer(**option), sources("left"), STRATEGIES[strategy]
    expected = generate(model, inputs, use_cache=False, **strategy)
    assert expected.shape == (BATCH, 9) and len(expected.unique()) > 9
    assert torch.equal(generate(model, inputs, **strategy), expected)
    assert torch.equal(generate(model, inputs, cache_implementation="static", **strategy), expected)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("padding", ["left", "right"])
@each_implementation
def test_batch_generates_as_rows_alone(attn_implementation, padding, strategy):
    model, inputs = build_writer(attn_implementation=attn_implementation), sources(padding)
    tokens = generate(model, inputs, **STRATEGIES[strategy])
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = generate(model, {"input_ids": inputs["input_ids"][row, mask][None]}, **STRATEGIES[strategy])
        assert torch.equal(tokens[row], alone[0])


END = 4


@torch.no_grad()
def best_of_all(model, input_ids, length, length_penalty):
    """The target of at most `length` tokens with the highest log-probability over its length to a power."""
    best, target = -math.inf, None
    for tokens in product(range(model.config.vocab_size), repeat=length):
        tokens = tokens[: tokens.index(END) + 1] if END in tokens else tokens
        ids = torch.tensor([[model.config.decoder_start_token_id, *tokens]])
        chances = model(input_ids, decoder_input_ids=ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
        score = sum(chances[i, token].item() for i, token in enumerate(tokens)) / len(tokens) ** length_penalty
        if score > best:
            best, target = score, ids[0].tolist()
    return best, target


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_beam_search_finds_the_best_of_all(length_penalty):
    """With as many beams as there are targets, nothing is left out."""
    small = {"vocab_size": 6, "bos_token_id": 0, "eos_token_id": END, "pad_token_id": 5, "decoder_start_token_id": 0}
    model, length = WRITER.build(**small, tie_word_embeddings=False, num_hidden_layers=1, decoder_layers=1), 3
    input_ids = torch.tensor([[1, 2, 3, 1]])
    score, expected = best_of_all(model, input_ids, length, length_penalty)
    found = model.generate(
        input_ids=input_ids, num_beams=6**length, length_penalty=length_penalty, max_new_tokens=length,
        do_sample=False, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert found.sequences[0].tolist()[: len(expected)] == expected
    assert found.sequences_scores[0].item() == pytest.approx(score, abs=1e-5)


@each_backend
@torch.no_grad()
def test_compiled_model_equals_eager(backend):
    model, inputs = WRITER.build(encoder_layers=1, decoder_layers=1), WRITER.inputs(padding="left")
    expected = model(**inputs, output_attentions=True).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_near(compiled(**inputs, use_cache=False).logits, expected)


@each_backend
@torch.no_grad()
def test_compiled_decoding_equals_eager(backend):
    model, inputs = WRITER.build(encoder_layers=1, decoder_layers=1), WRITER.inputs()
    ids, encoder_outputs = inputs["decoder_input_ids"], model.get_encoder()(inputs["input_ids"])
    expected = model(decoder_input_ids=ids, encoder_outputs=encoder_outputs, use_cache=False).logits
    cache = make_cache(True, model.config)
    model(decoder_input_ids=ids[:, :3], encoder_outputs=encoder_outputs, past_key_values=cache, use_cache=True)
    torch._dynamo.reset()
    decode = torch.compile(model, fullgraph=True, backend=backend)
    for step in range(3, TARGET_LENGTH):
        part = ids[:, step : step + 1]
        outputs = decode(decoder_input_ids=part, encoder_outputs=encoder_outputs, past_key_values=cache, use_cache=True)
        assert_near(outputs.logits, expected[:, step : step + 1], name=f"step {step}")


# --- Tables, sharing and weights at the start ---

SHARING = [
    {},
    {"tie_word_embeddings": False},
    {"share_encoder_decoder_embeddings": False},
    SEPARATE,
    {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False},
]


@pytest.mark.parametrize("option", SHARING, ids=name_of)
def test_tables_are_shared_as_asked_and_stored_once(option, tmp_path):
    WRITER.build(**option).save_pretrained(tmp_path)
    model, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    source, target = model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight
    assert (source is target) == option.get("share_encoder_decoder_embeddings", True)
    assert (model.lm_head.weight is target) == option.get("tie_word_embeddings", True)
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * model.num_parameters() + 20_000
    assert len({id(parameter) for parameter in model.parameters()}) == len(list(model.parameters()))


def test_vocabularies_of_their_own_are_resized_apart():
    model = WRITER.build(**SEPARATE)
    model.resize_token_embeddings(120)
    model.resize_decoder_token_embeddings(60)
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (120, 60)
    ids = torch.tensor([[119, 3]])
    assert model(ids, decoder_input_ids=torch.tensor([[59, 2]])).logits.shape == (1, 2, 60)
    with pytest.raises(ValueError, match="Use `resize_token_embeddings`"):
        WRITER.build().resize_decoder_token_embeddings(60)


def test_weights_start_as_asked(tmp_path):
    config = CustomTransformerConfig(
        vocab_size=400, d_model=96, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=160, decoder_ffn_dim=160, max_position_embeddings=64,
        tie_word_embeddings=False, share_encoder_decoder_embeddings=False, initializer_range=0.03,
    )  # fmt: skip
    with no_init_weights():
        model = CustomTransformerForSeq2SeqLM(config)
    model.init_weights()
    for name, parameter in model.named_parameters():
        mean, std = float(name.endswith("norm.weight")), 0.03 * (parameter.ndim == 2)
        assert parameter.mean().item() == pytest.approx(mean, abs=3e-3), name
        assert parameter.std(correction=0).item() == pytest.approx(std, rel=0.03), name
    expected = reference.sinusoids(torch.arange(config.max_position_embeddings)[None], 96)[0]
    model.save_pretrained(tmp_path)
    loaded = CustomTransformerForSeq2SeqLM.from_pretrained(tmp_path)
    for part in (model.model, loaded.model):
        for stack in (part.encoder, part.decoder):
            assert_near(stack.embed_positions.table, expected)


@pytest.mark.parametrize("row", SEQ2SEQ, ids=name_of)
def test_shared_table_is_resized_for_both_sides(row, tmp_path):
    model = row.build()
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path)
    loaded = row.model_class.from_pretrained(tmp_path)
    assert (loaded.config.vocab_size, loaded.config.decoder_vocab_size) == (120, 120)
    assert loaded(torch.tensor([[119]]), decoder_input_ids=torch.tensor([[119]]))[0].isfinite().all()


@pytest.mark.parametrize("preset, millions", [("transformer-base", 65), ("transformer-big", 213)])
def test_published_size_has_as_many_parameters(preset, millions):
    """Of table 3, whose vocabulary is given as about 37,000."""
    with torch.device("meta"):
        model = CustomTransformerForSeq2SeqLM(preset_config(preset))
    assert model.num_parameters() == pytest.approx(millions * 10**6, rel=0.04)


def test_plan_of_tensor_parallelism_names_linear_maps():
    model = WRITER.build()
    layers = {name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    plan = model.config.base_model_tp_plan
    assert {name.replace(".layers.0.", ".layers.*.") for name in layers if ".layers.0." in name} == set(plan)


# --- Fields ---


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("decoder_attention_heads", 3, r"`decoder_attention_heads` \(3\) does not divide `d_model` \(32\)"),
        ("encoder_attention_heads", 5, "does not divide"),
        ("decoder_layers", 0, "`decoder_layers` is 0 but must be an integer from 1"),
        ("encoder_layers", 0, "`encoder_layers` is 0"),
        ("decoder_ffn_dim", -1, "`decoder_ffn_dim` is -1"),
        ("encoder_ffn_dim", 10**9, "`encoder_ffn_dim` is 1000000000"),
        ("decoder_vocab_size", 50, "Set `share_encoder_decoder_embeddings=False`"),
        ("label_smoothing", 1.5, "`label_smoothing` is 1.5 but a probability"),
        ("dropout", -0.1, "`dropout` is -0.1 but a probability"),
        ("max_position_embeddings", 0, "`max_position_embeddings` is 0"),
        ("initializer_range", 0.0, "`initializer_range` is 0.0 but must be greater than 0"),
        ("is_encoder_decoder", False, "Leave the field out"),
        ("decoder_layerz", 2, "did you mean `decoder_layers`"),
        ("activation_function", "rellu", "`activation_function` 'rellu' is unknown. Did you mean 'relu'"),
    ],
)
def test_bad_field_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        CustomTransformerModel(CustomTransformerConfig(**{**TRANSFORMER, name: value}))


def test_odd_width_is_refused():
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3}
    with pytest.raises(ValueError, match=r"`d_model` \(33\) must be even"):
        CustomTransformerConfig(**{**TRANSFORMER, "d_model": 33, **heads})


# --- Bad input ---

IDS = torch.arange(12).view(2, 6)
LONG = torch.zeros(1, 65, dtype=torch.long)
BAD = {
    "source beyond the positions": (
        {"input_ids": LONG, "labels": IDS[:1]},
        "row 0 needs position 64 but `max_position_embeddings` is 64.*Truncate it to 64",
    ),
    "target beyond the positions": (
        {"input_ids": IDS[:1], "labels": LONG},
        "row 0 needs position 64 but `max_position_embeddings` is 64",
    ),
    "source outside the vocabulary": (
        {"input_ids": IDS + 92, "labels": IDS},
        "`input_ids` holds 99 in row 1, outside the vocabulary of 99",
    ),
    "target outside the vocabulary": (
        {"input_ids": IDS, "decoder_input_ids": IDS - 1},
        "`decoder_input_ids` holds -1 in row 0",
    ),
    "label outside the vocabulary": (
        {"input_ids": IDS, "labels": IDS + 95},
        "`labels` holds 99 in row 0.*`decoder_voc",
    ),
    "labels of another shape": (
        {"input_ids": IDS, "decoder_input_ids": IDS, "labels": IDS[:, :4]},
        r"`labels` has shape \(2, 4\) but \(2, 6\) is needed",
    ),
    "no target": ({"input_ids": IDS}, "the decoder has nothing to read. Pass `decoder_input_ids`, or `labels`"),
    "no source": ({"decoder_input_ids": IDS}, "pass exactly one of `input_ids` and `inputs_embeds`"),
    "empty source": ({"input_ids": IDS[:, :0], "labels": IDS}, "without a token"),
    "mask of another shape": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 5), "labels": IDS},
        r"`attention_mask` has shape \(2, 5\) but \(2, 6\)",
    ),
    "mask of the target of another shape": (
        {"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": torch.ones(2, 7)},
        r"has shape \(2, 7\) but \(2, 6\)",
    ),
    "source and states of different lengths": (
        {"encoder_outputs": (torch.zeros(2, 4, 32),), "attention_mask": torch.ones(2, 5), "labels": IDS},
        r"`encoder_attention_mask` has shape \(2, 5\) but \(2, 4\)",
    ),
    "packed documents": (
        {"input_ids": IDS, "labels": IDS, "cu_seq_lens_q": torch.tensor([0, 6, 12])},
        "which source a target belongs to.*Pass a row a pair",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    inputs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        WRITER.build()(**inputs)


def test_labels_need_a_start_and_a_padding_token():
    model = WRITER.build(decoder_start_token_id=None)
    with pytest.raises(ValueError, match="the configuration has None and 98. Set both"):
        model(IDS, labels=IDS)


def test_target_vocabulary_is_the_one_that_is_checked():
    model = WRITER.build(**SEPARATE)
    assert model(IDS + 80, labels=IDS).logits.shape == (2, 6, 53)
    with pytest.raises(ValueError, match="`decoder_vocab_size` is 53"):
        model(IDS, labels=IDS + 47)
    with pytest.raises(ValueError, match="`decoder_input_ids` holds 53 in row 1, outside the vocabulary of 53"):
        model(IDS, decoder_input_ids=IDS + 47)
