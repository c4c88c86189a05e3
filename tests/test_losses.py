"""Every loss against the naive version, values and gradients, with ignored labels and a caller's count of items."""

import pytest
import reference
import torch
from reference import assert_gradients_near, assert_near, gradients_of
from tiny import LABELS, MODELS, VOCAB

from hf_custom.losses import sequence_classification_loss

ROWS = {row.name.removeprefix("CustomGPT2"): row for row in MODELS}


def draw(high, *shape, ignored=()):
    labels = torch.randint(0, high, shape)
    for index in ignored:
        labels[index] = -100
    return labels


def question_loss(outputs, labels, num_items):
    start = reference.cross_entropy(outputs.start_logits, labels["start_positions"], num_items)
    end = reference.cross_entropy(outputs.end_logits, labels["end_positions"], num_items)
    return (start + end) / 2


# Row of tiny.MODELS, configuration fields, labels for 3 sequences of 7 tokens, naive loss of (outputs, labels, count).
LOSSES = {
    "language": (
        "ForCausalLM",
        {},
        lambda: {"labels": draw(VOCAB, 3, 7, ignored=[(0, 3), (1, slice(0, 5))])},
        lambda out, labels, n: reference.next_token_loss(out.logits, labels["labels"], n),
    ),
    "language-of-choices": (
        "DoubleHeadsModel",
        {},
        lambda: {"labels": draw(VOCAB, 3, 2, 7, ignored=[(0, 1, 3), (2, 0)])},
        lambda out, labels, n: reference.next_token_loss(out.logits.flatten(0, 1), labels["labels"].flatten(0, 1), n),
    ),
    "single-label": (
        "ForSequenceClassification",
        {},
        lambda: {"labels": draw(LABELS, 3, ignored=[1])},
        lambda out, labels, n: reference.cross_entropy(out.logits, labels["labels"], n),
    ),
    "regression": (
        "ForSequenceClassification",
        {"num_labels": 1},
        lambda: {"labels": torch.randn(3)},
        lambda out, labels, n: reference.squared_error(out.logits, labels["labels"], n),
    ),
    "regression-of-vectors": (
        "ForSequenceClassification",
        {"problem_type": "regression"},
        lambda: {"labels": torch.randn(3, LABELS)},
        lambda out, labels, n: reference.squared_error(out.logits, labels["labels"], n),
    ),
    "multi-label": (
        "ForSequenceClassification",
        {},
        lambda: {"labels": draw(2, 3, LABELS).float()},
        lambda out, labels, n: reference.binary_cross_entropy(out.logits, labels["labels"], n),
    ),
    "token": (
        "ForTokenClassification",
        {},
        lambda: {"labels": draw(LABELS, 3, 7, ignored=[(0, 0), (2, slice(3, 7))])},
        lambda out, labels, n: reference.cross_entropy(out.logits.flatten(0, 1), labels["labels"].flatten(), n),
    ),
    # The last answer lies beyond the 7 tokens and is ignored.
    "question": (
        "ForQuestionAnswering",
        {},
        lambda: {"start_positions": torch.tensor([0, 6, 7]), "end_positions": torch.tensor([3, 6, 90])},
        question_loss,
    ),
}


@pytest.mark.parametrize("num_items", [None, 29, torch.tensor(29)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_matches_naive_and_grad(name, num_items):
    row, fields, draw_labels, naive = LOSSES[name]
    model = ROWS[row].build(**fields)
    inputs, labels = ROWS[row].inputs(length=7), draw_labels()
    expected = naive(model(**inputs), labels, num_items)
    expected_gradients = gradients_of(model, expected)
    counted = {} if num_items is None else {"num_items_in_batch": num_items}
    loss = model.train()(**inputs, **labels, **counted).loss
    assert_near(loss, expected, 1e-6, scale_floor=0.0)
    assert_gradients_near(gradients_of(model, loss), expected_gradients)


def test_choice_loss_matches_naive_and_grad():
    row = ROWS["DoubleHeadsModel"]
    model, inputs, right = row.build(), row.inputs(length=7), torch.tensor([1, 0, 1])
    expected = reference.cross_entropy(model(**inputs).mc_logits, right)
    expected_gradients = gradients_of(model, expected)
    loss = model.train()(**inputs, mc_labels=right).mc_loss
    assert_near(loss, expected, 1e-6, scale_floor=0.0)
    assert_gradients_near(gradients_of(model, loss), expected_gradients)


def test_given_shift_labels_are_not_shifted_again():
    row = ROWS["ForCausalLM"]
    model, inputs = row.build(), row.inputs(length=7)
    labels = draw(VOCAB, 3, 7, ignored=[(0, 3)])
    expected = reference.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())
    loss = model.train()(**inputs, labels=labels, shift_labels=labels).loss
    assert_near(loss, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cross_entropy_of_half_logits_is_taken_in_float32(dtype):
    logits, labels = torch.randn(5, LABELS).to(dtype), draw(LABELS, 5)
    loss = sequence_classification_loss(logits, labels, "single_label_classification")
    assert loss.dtype == torch.float32
    assert_near(loss, reference.cross_entropy(logits, labels), 1e-6)
