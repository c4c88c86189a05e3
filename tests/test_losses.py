"""Every loss against the naive version, values and gradients, with ignored labels and a caller's count of items."""

import weakref

import pytest
import reference
import torch
from reference import assert_gradients_near, assert_near, gradients_of
from tiny import LABELS, MODELS, VOCAB
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hf_custom import losses
from hf_custom.losses import linear_cross_entropy, next_token_labels, sequence_classification_loss

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


# --- The language model's loss without logits ---

ROWS_OF_STATES, WIDTH, CLASSES = 13, 6, 50


def draw_head(bias=False, dtype=torch.float32):
    """States, a head and labels of which some are ignored; logits that spread as a trained model's do."""
    head = nn.Linear(WIDTH, CLASSES, bias=bias)
    nn.init.normal_(head.weight)
    states = torch.randn(ROWS_OF_STATES, WIDTH).to(dtype).requires_grad_()
    return states, head.to(dtype), draw(CLASSES, ROWS_OF_STATES, ignored=[0, 4, 5, 12])


def gradients_by(loss, states, head, **kwargs):
    return torch.autograd.grad(loss, (states, *head.parameters()), **kwargs)


def assert_loss_and_grad_near_naive(states, head, labels, num_items=None, factor=1.0, **options):
    loss = linear_cross_entropy(states, head, labels, num_items, **options)
    smoothing = {name: options[name] for name in ("label_smoothing", "z_loss") if name in options}
    exact = head(states).double() if states.dtype != torch.float32 else _exact_logits(states, head)
    expected = reference.smoothed_cross_entropy(exact, labels, num_items, **smoothing)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_near(loss, expected, 1e-6, scale_floor=0.0)
    gradients = gradients_by(factor * loss, states, head)
    expected = gradients_by(factor * expected, states, head)
    for gradient, exact_gradient in zip(gradients, expected, strict=True):
        assert_near(gradient, exact_gradient, scale_floor=0.0)


def _exact_logits(states, head):
    """Of a plain layer; another one says itself what it computes."""
    if type(head) is not nn.Linear or head._forward_hooks:
        return head(states).double()
    return nn.functional.linear(
        states.double(), head.weight.double(), None if head.bias is None else head.bias.double()
    )


@pytest.fixture(params=[None, 7, 50, 49], ids=["one block", "blocks of 7", "block of all", "blocks of 49"])
def vocabulary_block(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(losses, "VOCABULARY_BLOCK_OF_CPU", request.param)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 1.0}], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("chunk_size", [1, 9, ROWS_OF_STATES, None])
def test_linear_cross_entropy_equals_naive_and_grad(chunk_size, bias, options, vocabulary_block):
    assert_loss_and_grad_near_naive(*draw_head(bias), chunk_size=chunk_size, **options)


@pytest.mark.parametrize("num_items", [29, torch.tensor(29)], ids=["int", "tensor"])
def test_linear_cross_entropy_is_divided_by_count_of_caller(num_items):
    options = {"label_smoothing": 0.2, "z_loss": 1e-3}
    assert_loss_and_grad_near_naive(*draw_head(), num_items=num_items, chunk_size=4, factor=3.0, **options)


def test_linear_cross_entropy_of_huge_logits_is_finite():
    states, head, labels = draw_head()
    with torch.no_grad():
        states *= 1e4
    loss = linear_cross_entropy(states, head, labels)
    expected = nn.functional.cross_entropy(head(states), labels)
    assert_near(loss, expected, 1e-6, scale_floor=0.0)
    assert all(gradient.isfinite().all() for gradient in gradients_by(loss, states, head))


def test_linear_cross_entropy_ignores_another_index():
    states, head, labels = draw_head()
    loss = linear_cross_entropy(states, head, labels.where(labels >= 0, 7), ignore_index=7)
    expected = reference.cross_entropy(head(states), labels.where(labels != 7, -100))
    assert_near(loss, expected, 1e-6)


@pytest.mark.parametrize("wrap", [lambda head: head, nn.Sequential], ids=["plain", "wrapped"])
def test_linear_cross_entropy_of_ignored_rows_is_as_torch(wrap):
    states, head, _ = draw_head()
    head, labels = wrap(head), torch.full((ROWS_OF_STATES,), -100)
    assert linear_cross_entropy(states, head, labels).isnan()
    assert nn.functional.cross_entropy(head(states), labels).isnan()
    loss = linear_cross_entropy(states, head, labels, num_items_in_batch=5)
    assert loss == 0
    if loss.requires_grad:
        assert not any(gradient.any() for gradient in gradients_by(loss, states, head))


@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_half_is_no_worse_than_cross_entropy_of_half_logits(chunk_size, dtype, autocast, vocabulary_block):
    states, head, labels = draw_head(dtype=torch.float32 if autocast else dtype)
    rounded = states.detach().to(dtype).double().requires_grad_(), head.weight.detach().to(dtype).double()
    rounded[1].requires_grad_()
    exact = nn.functional.cross_entropy(rounded[0] @ rounded[1].t(), labels)
    exact = [exact, *torch.autograd.grad(exact, rounded)]
    found = []
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for compute in (
            lambda: linear_cross_entropy(states, head, labels, chunk_size=chunk_size),
            lambda: nn.functional.cross_entropy(head(states).float(), labels),
        ):
            loss = compute()
            found.append([loss, *gradients_by(loss, states, head)])
    assert found[0][0].dtype == torch.float32
    for ours, theirs, value in zip(*found, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error, allowed = ((tensor.double() - value).abs().max() for tensor in (ours, theirs))
        # A sum of roundings has no order: half a unit in the last place of the type over theirs.
        assert error <= allowed + 0.5 * torch.finfo(dtype).eps * value.abs().max()


def test_weight_gradient_is_summed_in_float32():
    """Thousands of equal terms: summed in bfloat16 they would stop to grow at 256."""
    states = torch.ones(4096, 1, dtype=torch.bfloat16)
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    loss = linear_cross_entropy(states, head, torch.zeros(4096, dtype=torch.long), chunk_size=1)
    (gradient,) = torch.autograd.grad(loss, head.weight)
    assert_near(gradient, torch.tensor([[-0.5], [0.5]]), 1e-3)


@pytest.mark.parametrize("needs_states, needs_weight", [(True, False), (False, True), (False, False)])
def test_only_asked_gradients_are_taken(needs_states, needs_weight):
    states, head, labels = draw_head(bias=True)
    loss = linear_cross_entropy(states, head, labels, chunk_size=4)
    expected = gradients_by(loss, states, head)
    states = states.detach().requires_grad_(needs_states)
    head.requires_grad_(needs_weight)
    again = linear_cross_entropy(states, head, labels, chunk_size=4)
    assert torch.equal(again, loss) and again.requires_grad == (needs_states or needs_weight)
    if needs_states:
        assert torch.equal(torch.autograd.grad(again, states)[0], expected[0])
    if needs_weight:
        found = torch.autograd.grad(again, tuple(head.parameters()))
        assert all(torch.equal(one, other) for one, other in zip(found, expected[1:], strict=True))


def test_loss_without_gradients_equals_with():
    states, head, labels = draw_head()
    with torch.no_grad():
        loss = linear_cross_entropy(states, head, labels)
    assert not loss.requires_grad and torch.equal(loss, linear_cross_entropy(states, head, labels))


@pytest.mark.parametrize("factors", [(1.0, 1.0), (3.0, -0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward_equals_first(dtype, factors):
    states, head, labels = draw_head(bias=True, dtype=dtype)
    loss = linear_cross_entropy(states, head, labels, chunk_size=4)
    first, second = (
        gradients_by(loss, states, head, grad_outputs=torch.tensor(factor), retain_graph=True) for factor in factors
    )
    for one, other in zip(first, second, strict=True):
        assert_near(other / factors[1], one / factors[0], torch.finfo(dtype).eps * 4, scale_floor=0.0)


def with_hook(head):
    head.register_forward_hook(lambda module, args, output: 2 * output)
    return head


def with_lora(head):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(head), config).base_model.model[0]
    return model.requires_grad_()


HEADS = {"wrapped": nn.Sequential, "hooked": with_hook, "lora": with_lora}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("wrap", HEADS.values(), ids=HEADS)
def test_any_head_equals_naive_and_grad(wrap, chunk_size, options):
    states, head, labels = draw_head(bias=True)
    assert_loss_and_grad_near_naive(states, wrap(head), labels, chunk_size=chunk_size, **options)


@pytest.mark.parametrize("wrap", [lambda head: head, nn.Sequential], ids=["plain", "wrapped"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_loss_under_checkpointing_equals_without(use_reentrant, wrap):
    states, head, labels = draw_head()
    head = wrap(head)

    def compute(states):
        return linear_cross_entropy(2 * states, head, labels, chunk_size=4)

    expected = compute(states)
    expected = {"states": torch.autograd.grad(expected, states, retain_graph=True)[0], **gradients_of(head, expected)}
    states.grad = None
    loss = checkpoint(compute, states, use_reentrant=use_reentrant)
    found = gradients_of(head, loss)
    assert_gradients_near({"states": states.grad, **found}, expected)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_of_no_rows_is_refused(chunk_size):
    with pytest.raises(ValueError, match=f"`chunk_size` is {chunk_size}.*256"):
        linear_cross_entropy(*draw_head(), chunk_size=chunk_size)


LABELS_TO_SHIFT = torch.tensor([[1, 2, 3, 4], [5, 6, 7, -100]])
SHIFTED = [[2, 3, 4, -100], [6, 7, -100, -100]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, SHIFTED),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], SHIFTED),
        ([[0, 0, 1, 1], [1, 1, 0, 0]], [[-100, -100, 4, -100], [6, 7, -100, -100]]),
        ([[1, 0, 1, 1], [0, 0, 0, 0]], [[2, -100, 4, -100], [-100] * 4]),
        # Two cached tokens before those of the labels.
        ([[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]], [[-100, 3, 4, -100], [6, -100, -100, -100]]),
    ],
    ids=["none", "ones", "padding", "holes", "cached"],
)
def test_next_token_labels_skip_what_padding_predicts(mask, expected):
    mask = None if mask is None else torch.tensor(mask)
    given = LABELS_TO_SHIFT.clone()
    assert next_token_labels(given, mask).tolist() == expected
    assert torch.equal(given, LABELS_TO_SHIFT)
    if mask is not None:
        assert next_token_labels(given, mask.bool()).tolist() == expected
        assert next_token_labels(given[:, None], mask[:, None]).squeeze(1).tolist() == expected


def test_next_token_labels_leave_shifted_labels_and_ready_masks():
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    assert next_token_labels(LABELS_TO_SHIFT, mask).tolist() == SHIFTED
    shifted = next_token_labels(LABELS_TO_SHIFT, torch.tensor([[0, 1, 1, 1]] * 2), torch.tensor(SHIFTED))
    assert shifted.tolist() == [[-100, 3, 4, -100], [-100, 7, -100, -100]]


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside that were there together."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return output

    def _count(self, storage, given):
        if storage._cdata in given | self.known:
            return
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key, size):
        self.known.discard(key)
        self.live -= size


def working_bytes(compute, rows, classes, width=16):
    """The peak of a forward and a backward pass, without inputs and returned gradients."""
    states, head = torch.randn(rows, width, requires_grad=True), nn.Linear(width, classes, bias=False)
    labels = draw(classes, rows)
    with LiveBytes() as memory:
        gradients = torch.autograd.grad(compute(states, head, labels), (states, head.weight))
    return memory.peak - sum(gradient.nbytes for gradient in gradients)


def test_counted_bytes_are_those_of_tensors():
    with LiveBytes() as memory:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1
        del first
        assert (memory.live, memory.peak) == (4000, 8000)
        third = second.t().contiguous()
        del second
        assert (memory.live, memory.peak) == (4000, 8000)
        third.add_(1)
    assert third.nbytes == memory.live


@pytest.mark.parametrize("chunk_size", [32, 64])
def test_memory_of_loss_grows_with_chunk_and_not_with_rows(chunk_size):
    classes, width = 5000, 16

    def compute(*args):
        return linear_cross_entropy(*args, chunk_size=chunk_size)

    def full(states, head, labels):
        return nn.functional.cross_entropy(head(states), labels)

    found = {rows: working_bytes(compute, rows, classes, width) for rows in (512, 2048)}
    # A chunk's logits and their transpose, two products of the weight's size; of each row, where its label stands.
    allowed = 4 * (2 * chunk_size * classes + 2 * classes * width)
    assert found[512] <= allowed
    assert found[2048] - found[512] <= 16 * (2048 - 512)
    assert working_bytes(full, 512, classes, width) >= 6 * allowed


def test_compiled_training_step_equals_eager():
    """In one graph, backward pass included."""
    row = ROWS["ForCausalLM"]
    model, inputs = row.build(n_layer=2, loss_chunk_size=5).train(), row.inputs(padding="left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    gradients = gradients_of(model, loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, labels=labels).loss
    assert_near(compiled, loss, 1e-6, scale_floor=0.0)
    assert_gradients_near(gradients_of(model, compiled), gradients)
