"""What every model class must do under every option of its configuration: one suite over the table of tiny.py."""

import json
import re
from itertools import product

import pytest
import torch
from reference import assert_gradients_near
from safetensors import safe_open
from tiny import BATCH, LENGTH, MODELS, RECURRENT, SEQ2SEQ, UNTIED, VARIANTS, VOCAB, name_of
from transformers import Trainer, TrainingArguments, set_seed
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

ROWS = MODELS + VARIANTS + SEQ2SEQ + RECURRENT
CASES = [pytest.param(row, option, id=f"{row.name}-{name_of(option)}") for row in ROWS for option in row.options]
each_case = pytest.mark.parametrize(("row", "option"), CASES)
# Models with one stream of states and attention over it; those of an encoder-decoder have other names.
each_case_of_one_stream = pytest.mark.parametrize(
    ("row", "option"), [case for case in CASES if case.values[0] not in SEQ2SEQ + RECURRENT]
)
# For a second way of doing the same: each case in the first, each model in the second.
WITH_FLAG = [
    pytest.param(*case.values, flag, id=f"{case.id}-{flag}")
    for case in CASES
    for flag in ((False, True) if case.values[1] == {} else (False,))
]
# Options that change which weights there are, or their shapes.
SHAPES = ("position_embedding_type", "n_inner", "tie_word_embeddings", "classifier_hidden_size", "vision_config")
SHAPES += ("share_encoder_decoder_embeddings", "norm_first", "bidirectional", "projection_size")
SHAPE_CASES = [case for case in CASES if all(name in SHAPES for name in case.values[1])]
each_shape = pytest.mark.parametrize(("row", "option"), SHAPE_CASES)

LABELLED = [pytest.param(row, {}, row.draw_labels, id=row.name) for row in ROWS if row.draw_labels(1, LENGTH)]
# What a classifier of whole sequences makes of its labels depends on the configuration and on their type.
PROBLEMS = {
    "regression": ({"num_labels": 1}, lambda b, t: {"labels": torch.randn(b)}),
    "regression_of_many": ({"problem_type": "regression"}, lambda b, t: {"labels": torch.randn(b, 3)}),
    "multi_label": ({}, lambda b, t: {"labels": torch.randint(0, 2, (b, 3)).float()}),
}
LABELLED += [
    pytest.param(row, *problem, id=f"{row.name}-{name}")
    for row in ROWS
    if row.name.endswith("ForSequenceClassification")
    for name, problem in PROBLEMS.items()
]
each_labelled = pytest.mark.parametrize(("row", "option", "draw_labels"), LABELLED)

# Outputs with a score for each entry of the vocabulary.
VOCABULARY = ("logits", "prediction_logits", "backward_logits")
EXACT = {"rtol": 0, "atol": 0}
WITHIN = {"rtol": 0, "atol": 1e-5}


def tensors_of(outputs) -> dict[str, torch.Tensor]:
    """The tensors of an output by name, its cache left out."""
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def assert_equal(actual, expected, **tolerances):
    """The same names and the same tensors, up to rounding unless `tolerances` are given."""
    actual, expected = dict(actual), dict(expected)
    assert actual.keys() == expected.keys() and actual
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], **tolerances)


def batch_of(row):
    return {**row.inputs(), **row.draw_labels(BATCH, LENGTH)}


def objective(model, batch):
    """The sum of the losses or, for a model without any, a number that depends on all of its outputs."""
    outputs = tensors_of(model(**batch))
    losses = [value for name, value in outputs.items() if name.endswith("loss")]
    return sum(losses) if losses else sum(value.square().sum() for value in outputs.values())


def gradients(model, batch):
    """Gradients of a training step with seeded dropout, by name of the parameter."""
    model.train().zero_grad()
    set_seed(1)
    objective(model, batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def with_dropout(row, p):
    return dict.fromkeys(row.config_class.probabilities, p)


@each_case
def test_outputs_are_finite(row, option):
    outputs = tensors_of(row.build(**option)(**batch_of(row)))
    assert all(tensor.isfinite().all() for tensor in outputs.values())
    assert "loss" in outputs or not row.draw_labels(1, LENGTH)


@each_case
def test_every_parameter_receives_a_gradient(row, option):
    model = row.build(**option).train()
    objective(model, batch_of(row)).backward()
    reached = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    reached = [name for name in reached if model.get_parameter(name).grad.count_nonzero()]
    without = set()
    if option == UNTIED:
        # The head's bias is the decoder's; untied it is a key of stock's folders that nothing reads, in stock either.
        without.add("cls.predictions.bias")
    if row.name == "CustomBertForMultipleChoice":
        # It moves the scores of both choices alike.
        without.add("classifier.bias")
    assert reached == [name for name, _ in model.named_parameters() if name not in without]


@pytest.mark.parametrize(("row", "option", "use_reentrant"), WITH_FLAG)
def test_checkpointing_changes_no_gradient(row, option, use_reentrant):
    model = row.build(**{**with_dropout(row, 0.1), **option})
    # Checkpointing turns the cache off, and with it the layout of keys, which shows in the last bit.
    batch = {**batch_of(row), "use_cache": False}
    expected = gradients(model, batch)
    calls = []
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        # On a part of the block: the hooks of the block itself stay outside the checkpoint.
        next(block.children()).register_forward_pre_hook(lambda *args: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(model, batch)
    assert len(calls) == 2 * len(blocks) > 0, "each block runs again in the backward pass"
    if use_reentrant and row in SEQ2SEQ + RECURRENT:
        # Every layer of a decoder uses the encoder's states, and both directions of an ELMo the word vectors, whose
        # gradient is a sum in another order then.
        assert_gradients_near(actual, expected)
    else:
        assert_equal(actual, expected, **EXACT)


@each_case_of_one_stream
def test_hidden_states_and_attentions_have_their_shapes(row, option):
    model, inputs = row.build(**option, attn_implementation="eager"), row.inputs()
    config, rows = model.config, inputs["input_ids"].numel() // LENGTH
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    states, attentions = outputs.hidden_states, outputs.attentions
    # Blocks see choices as rows; the last state alone gets the axes of the input back, in stock too.
    states = [state.view(-1, *state.shape[-2:]) for state in states]
    length = LENGTH + row.num_patches
    assert [state.shape for state in states] == [(rows, length, config.hidden_size)] * (config.num_hidden_layers + 1)
    shape = (rows, config.num_attention_heads, length, length)
    assert [weights.shape for weights in attentions] == [shape] * config.num_hidden_layers
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))
    if row.num_choices is not None:
        inputs = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
    base = getattr(model, model.base_model_prefix, model)(**inputs)
    torch.testing.assert_close(states[-1], base.last_hidden_state, **EXACT)


@each_case
def test_tuple_equals_dict(row, option):
    model, batch = row.build(**option), batch_of(row)
    asked = {**batch, "output_hidden_states": True}
    expected, actual = model(**asked), model(**asked, return_dict=False)
    assert type(actual) is tuple and len(actual) == len(expected.to_tuple())
    for value, reference in zip(actual, expected.to_tuple(), strict=True):
        assert type(value) is type(reference)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, reference, **EXACT)


def tensors_held(model):
    """Parameters and buffers, those that are never saved included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def weight_files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".py", ".json"))


@each_shape
def test_loading_leaves_no_garbage(row, option, tmp_path):
    batch, fresh = batch_of(row), row.build(**option)
    fresh.save_pretrained(tmp_path)
    assert weight_files(tmp_path) == ["model.safetensors"]
    with torch.device("meta"):
        empty = row.model_class(row.config(**option))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert tensors_held(empty).keys() == tensors_held(fresh).keys()
    loaded, report = row.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_equal(tensors_held(loaded), tensors_held(fresh), **EXACT)
    assert_equal(tensors_of(loaded(**batch)), tensors_of(fresh(**batch)))


@pytest.mark.parametrize(("row", "option", "is_float16"), WITH_FLAG)
def test_half_precision_runs_and_is_kept_in_shards(row, option, is_float16, tmp_path):
    dtype = torch.float16 if is_float16 else torch.bfloat16
    model, batch = row.build(**option).to(dtype), batch_of(row)
    outputs = tensors_of(model(**batch))
    assert all(value.isfinite().all() for value in outputs.values())
    assert {value.dtype for name, value in outputs.items() if not name.endswith("loss")} == {dtype}
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(weight_files(tmp_path)) > 2
    assert all(name.endswith(".safetensors") for name in weight_files(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded, report = row.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_equal(tensors_held(loaded), tensors_held(model), **EXACT)
    assert_equal(tensors_of(loaded(**batch)), outputs)


@each_case
def test_batch_equals_single_rows(row, option):
    model, inputs = row.build(**option), row.inputs()
    together = tensors_of(model(**inputs))
    for index in range(BATCH):
        alone = model(**{name: tensor[index : index + 1] for name, tensor in inputs.items()})
        expected = {name: tensor[index : index + 1] for name, tensor in together.items()}
        assert_equal(tensors_of(alone), expected, **WITHIN)


@pytest.mark.parametrize("padding", ["left", "right"])
@each_case
def test_padded_rows_equal_unpadded_ones(row, option, padding):
    model, inputs = row.build(**option), row.inputs(padding=padding)
    mask = inputs["attention_mask"].bool()
    assert not mask.all()
    if row.index_argument is not None:
        inputs[row.index_argument] = (mask * torch.arange(LENGTH)).argmax(-1)
    padded = tensors_of(model(**inputs))
    for index in product(*map(range, mask.shape[:-1])):
        for name, alone in tensors_of(model(**row.alone(inputs, index))).items():
            together, real = padded[name][index], row.mask_of(name, inputs)
            if padded[name].shape[: real.ndim] == real.shape:
                together = together[real[index]]
            torch.testing.assert_close(together, alone[(0,) * len(index)], **WITHIN)


@pytest.mark.parametrize("size", [VOCAB + 13, VOCAB - 9])
@pytest.mark.parametrize(("row", "option"), [case for case in SHAPE_CASES if not case.values[0].reads_characters])
def test_resized_vocabulary_keeps_its_rows(row, option, size):
    model, inputs = row.build(**option), row.inputs()
    for name in row.id_arguments:
        inputs[name] %= size
    before = tensors_of(model(**inputs))
    row.resize(model, size)
    after = tensors_of(model(**inputs))
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == size
    has_lm_head = model.get_output_embeddings() is not None
    for name in before:
        width = min(before[name].shape[-1], after[name].shape[-1])
        assert after[name].shape[-1] == (size if has_lm_head and name in VOCABULARY else before[name].shape[-1])
        torch.testing.assert_close(after[name][..., :width], before[name][..., :width], **WITHIN)
    batch, largest = batch_of(row), torch.tensor(size - 1)
    batch |= {name: largest.expand_as(batch[name]) for name in row.id_arguments}
    if has_lm_head:
        batch["labels"] = batch[row.id_arguments[-1]]
    assert objective(model, batch).isfinite()


@pytest.mark.parametrize("row", [row for row in ROWS if not row.reads_characters], ids=name_of)
def test_replaced_embeddings_are_the_ones_read(row):
    model, inputs = row.build(tie_word_embeddings=False), row.inputs()
    constant = torch.nn.Embedding.from_pretrained(torch.ones(VOCAB, row.embedding_width(model)))
    model.set_input_embeddings(constant)
    assert model.get_input_embeddings() is constant
    others = {**inputs, "input_ids": inputs["input_ids"].flip(-1)}
    assert_equal(tensors_of(model(**inputs)), tensors_of(model(**others)), **EXACT)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("row", [row for row in MODELS + RECURRENT if row.model_class._tied_weights_keys], ids=name_of)
def test_tied_weights_are_one_tensor_stored_once(row, is_tied, tmp_path):
    row.build(tie_word_embeddings=is_tied).save_pretrained(tmp_path)
    model = row.model_class.from_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    for target, source in row.model_class._tied_weights_keys.items():
        assert (model.get_parameter(target).data_ptr() == model.get_parameter(source).data_ptr()) == is_tied
        assert source in stored and (target in stored) != is_tied


def micro_batches(row, draw_labels, rows=4):
    """Rows apart, with unequal numbers of ignored labels: in the last one nothing is left to learn."""
    batch = {**row.inputs(batch=rows), **draw_labels(rows, LENGTH)}
    labels = batch.get("labels")
    if labels is not None and not labels.is_floating_point():
        if labels.ndim == 1:
            labels[-1] = -100
        else:
            for index, count in enumerate((0, 3, 6, LENGTH)):
                labels[index, ..., :count] = -100
    return batch, [{name: tensor[index : index + 1] for name, tensor in batch.items()} for index in range(rows)]


@each_labelled
def test_accumulated_gradient_is_that_of_the_large_batch(row, option, draw_labels):
    model = row.build(**option)
    batch, parts = micro_batches(row, draw_labels)
    counted, scale = {}, len(parts)
    if "labels" in batch:
        is_shifted = LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss
        items = (batch["labels"][..., 1:] if is_shifted else batch["labels"]).ne(-100).sum()
        counted, scale = {"num_items_in_batch": items}, 1
    # Of the two losses of pre-training the second has another number of labels, so that one count changes their weight.
    model.train()(**batch, **(counted if "next_sentence_label" in batch else {})).loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    for part in parts:
        (model(**part, **counted).loss / scale).backward()
    for name in expected:
        torch.testing.assert_close(model.get_parameter(name).grad, expected[name], rtol=1e-5, atol=1e-5)


def trained_weights(row, option, rows, batch_size, folder):
    """Parameters after one step of SGD by the Trainer over all `rows`."""
    set_seed(1)
    model = row.build(**option)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(rows) // batch_size,
        max_steps=1,
        optim="sgd",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    return dict(model.named_parameters())


# One of each kind of labels that the Trainer counts: shifted ones, those of tokens, of sequences, real numbers, two
# losses, and positions, of which it counts none.
COUNTED = re.compile(
    "CustomGPT2(ForCausalLM|ForSequenceClassification(-regression)?|ForQuestionAnswering|DoubleHeadsModel)"
    "|CustomBert(ForMaskedLM|ForPreTraining)|CustomTransformerForSeq2SeqLM"
    "|CustomElmoFor(PreTraining|CausalLM|TokenClassification)"
)


@pytest.mark.parametrize(("row", "option", "draw_labels"), [case for case in LABELLED if COUNTED.fullmatch(case.id)])
def test_trainer_accumulates_as_one_large_batch(row, option, draw_labels, tmp_path):
    batch, _ = micro_batches(row, draw_labels)
    rows = [{name: tensor[index] for name, tensor in batch.items()} for index in range(4)]
    expected = trained_weights(row, option, rows, batch_size=4, folder=tmp_path)
    actual = trained_weights(row, option, rows, batch_size=1, folder=tmp_path)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-6)


@each_case
def test_dropout_follows_the_seed(row, option):
    model, batch = row.build(**{**with_dropout(row, 0.3), **option}), batch_of(row)

    def run(seed):
        set_seed(seed)
        return objective(model, batch)

    assert run(1) == run(2), "no dropout in evaluation"
    model.train()
    assert run(1) == run(1) != run(2)
