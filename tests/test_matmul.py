"""Products on every kernel that may be chosen for them, against float64; which kernel that is."""

import pytest
import reference
import torch
from reference import assert_near
from torch import nn

from hf_custom import matmul
from hf_custom.layers import Conv1D, Linear, _ActivatedAffine, project_activated
from hf_custom.matmul import affine, is_plain_linear, linear, project, times, times_transposed

# Of float32 sums over as many as 1,024 products, relative to the largest.
TOLERANCE = 1e-5


def use_transposed(x, weight, bias=None):
    return linear(x, weight.t() if weight.is_contiguous() else weight.t().contiguous(), bias)


# Each as x (N, I) · weight (I, O) + bias; the weight is stored as the function wants it.
FUNCTIONS = {
    "affine": (affine, False, True),
    "linear": (linear, True, True),
    "linear without bias": (linear, True, False),
    "times": (times, False, False),
    "times_transposed": (times_transposed, True, False),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
# N, I, O on both sides of each threshold: rows, entries of x, sides of the weight, entries of the weight.
SIZES = [
    (1, 20, 30),
    (2, 33, 7),
    (8, 64, 65),
    (31, 700, 40),
    (32, 640, 40),
    (32, 641, 40),
    (33, 641, 31),
    (33, 641, 32),
    (100, 31, 64),
    (100, 204, 50),
    (100, 205, 50),
    (700, 31, 64),
]
# Few rows, and a weight on both sides of 2^18 entries; outputs that 16 does not divide, inputs that 2 does not.
FEW_ROWS = [
    (rows, inputs, outputs)
    for rows in (1, 2, 8, 9)
    for inputs, outputs in [(255, 1031), (256, 1031), (512, 512), (513, 517)]
]


def draw(name, rows, inputs, outputs, requires_grad=False):
    """Arguments of the function, and its map of them in float64."""
    function, is_transposed, has_bias = FUNCTIONS[name]
    x = torch.randn(rows, inputs).requires_grad_(requires_grad)
    weight = torch.randn(*((outputs, inputs) if is_transposed else (inputs, outputs))).requires_grad_(requires_grad)
    bias = [torch.randn(outputs).requires_grad_(requires_grad)] if has_bias else []
    return function, [x, weight, *bias]


def exactly(name, x, weight, bias=None):
    weight = weight.double().t() if FUNCTIONS[name][1] else weight.double()
    product = x.double() @ weight
    return product if bias is None else product + bias.double()


@pytest.fixture
def onednn_calls(monkeypatch):
    """Shapes of the products that oneDNN was asked for."""
    calls = []

    def counted(convolve):
        def run(x, weight, *args, **kwargs):
            calls.append((x.shape[2], *weight.shape[:2]))
            return convolve(x, weight, *args, **kwargs)

        return run

    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(nn.functional, name, counted(getattr(nn.functional, name)))
    return calls


def is_for_onednn(rows, inputs, outputs):
    return rows >= 32 and rows * inputs > 20_480 and min(inputs, outputs) >= 32


def test_reference_product_is_the_exact_map():
    x, weight, bias = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    assert_near(exactly("affine", x, weight, bias), reference.product(x, weight, bias), 1e-14)
    assert_near(exactly("times_transposed", x, weight.t()), reference.product(x, weight), 1e-14)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@each_function
def test_product_equals_float64_by_the_expected_kernel(name, sizes, onednn_calls):
    function, arguments = draw(name, *sizes)
    output = function(*arguments)
    assert output.dtype == torch.float32
    assert_near(output, exactly(name, *arguments), TOLERANCE)
    assert len(onednn_calls) == is_for_onednn(*sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ["affine", "linear", "linear without bias"])
def test_gradients_equal_float64(name, sizes, onednn_calls):
    function, arguments = draw(name, *sizes, requires_grad=True)
    output = function(*arguments)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, arguments, upstream)
    assert len(onednn_calls) == 3 * is_for_onednn(*sizes)
    expected = torch.autograd.grad(exactly(name, *arguments), arguments, upstream.double())
    for gradient, argument, exact in zip(gradients, arguments, expected, strict=True):
        assert gradient.dtype == argument.dtype
        assert_near(gradient, exact, TOLERANCE)


@pytest.mark.parametrize("only", range(3), ids=["x", "weight", "bias"])
@pytest.mark.parametrize("name", ["affine", "linear"])
def test_gradient_of_one_argument_equals_float64(name, only):
    function, arguments = draw(name, 64, 330, 40)
    arguments[only].requires_grad_()
    output = function(*arguments)
    upstream = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, arguments[only], upstream)
    (expected,) = torch.autograd.grad(exactly(name, *arguments), arguments[only], upstream.double())
    assert_near(gradient, expected, TOLERANCE)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SPLITS = {
    "affine": "_affine_of_few_rows",
    "linear": "_linear_of_few_rows",
    "linear without bias": "_linear_of_few_rows",
}


@pytest.mark.parametrize("has_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("sizes", FEW_ROWS, ids=str)
@pytest.mark.parametrize("name", SPLITS)
def test_few_rows_equal_float64_split_only_without_grad(name, sizes, has_grad, two_threads, monkeypatch):
    splits, split = [], getattr(matmul, SPLITS[name])
    monkeypatch.setattr(matmul, SPLITS[name], lambda *args: splits.append(1) or split(*args))
    function, arguments = draw(name, *sizes, requires_grad=True)
    with torch.set_grad_enabled(has_grad):
        output = function(*arguments)
    assert_near(output, exactly(name, *arguments), TOLERANCE)
    rows, inputs, outputs = sizes
    assert len(splits) == (not has_grad and rows <= 8 and inputs * outputs >= 2**18)
    assert output.requires_grad == has_grad
    if has_grad:
        upstream = torch.randn_like(output)
        expected = torch.autograd.grad(exactly(name, *arguments), arguments, upstream.double())
        for gradient, exact in zip(torch.autograd.grad(output, arguments, upstream), expected, strict=True):
            assert_near(gradient, exact, TOLERANCE)


LAYOUTS = {
    "x transposed": lambda x, weight: (x.t().contiguous().t(), weight),
    "x strided": lambda x, weight: (torch.cat((x, x), 1)[:, : x.shape[1]], weight),
    "weight transposed": lambda x, weight: (x, weight.t().contiguous().t()),
    "weight strided": lambda x, weight: (x, torch.stack((weight, weight), -1)[..., 0]),
    "x of one repeated row": lambda x, weight: (x[:1].expand(len(x), -1), weight),
}


@pytest.mark.parametrize("sizes", [(64, 330, 40), (2, 512, 600), (1, 512, 600)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each_function
def test_strides_do_not_matter(name, layout, sizes, two_threads):
    function, (x, weight, *bias) = draw(name, *sizes)
    x, weight = layout(x, weight)
    assert sizes[0] == 1 or not (x.is_contiguous() and weight.is_contiguous())
    with torch.no_grad():
        assert_near(function(x, weight, *bias), exactly(name, x, weight, *bias), TOLERANCE)
    if name.startswith("times"):
        return
    arguments = [tensor.requires_grad_() for tensor in (x, weight, *bias)]
    output = function(*arguments)
    # A gradient that is one number everywhere has no strides.
    expected = torch.autograd.grad(exactly(name, *arguments).sum(), arguments)
    for gradient, exact in zip(torch.autograd.grad(output.sum(), arguments), expected, strict=True):
        assert_near(gradient, exact, TOLERANCE)


@pytest.mark.parametrize("sizes", [(64, 330, 40), (2, 512, 600)], ids=str)
@each_function
def test_bfloat16_is_left_to_torch(name, sizes, onednn_calls):
    function, arguments = draw(name, *sizes)
    arguments = [tensor.bfloat16() for tensor in arguments]
    output = function(*arguments)
    assert output.dtype == torch.bfloat16 and not onednn_calls
    assert_near(output, exactly(name, *arguments), torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("sizes", [(64, 330, 40), (2, 512, 600)], ids=str)
@pytest.mark.parametrize("name", ["affine", "linear", "times", "times_transposed"])
def test_autocast_is_left_to_torch(name, sizes, onednn_calls):
    function, arguments = draw(name, *sizes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = function(*arguments)
    assert output.dtype == torch.bfloat16 and not onednn_calls
    rounded = [tensor.bfloat16() for tensor in arguments]
    assert_near(output, exactly(name, *rounded), torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", ["affine", "linear"])
def test_float64_is_left_to_torch(name, onednn_calls):
    function, arguments = draw(name, 64, 330, 40)
    arguments = [tensor.double() for tensor in arguments]
    assert_near(function(*arguments), exactly(name, *arguments), 1e-13)
    assert not onednn_calls


@pytest.mark.parametrize("name", ["affine", "linear"])
def test_double_backward_equals_float64(name, onednn_calls):
    function, arguments = draw(name, 64, 330, 40, requires_grad=True)
    upstream = torch.randn(64, 40)
    found = []
    for compute in (function, lambda *args: exactly(name, *args)):
        output = compute(*arguments)
        first = torch.autograd.grad(output, arguments, upstream.to(output.dtype), create_graph=True)
        # Cubes, so that the second pass depends on the first one's result.
        objective = sum((gradient.double() ** 3).mean() for gradient in first[:2])
        found.append(torch.autograd.grad(objective, arguments[:2]))
    assert onednn_calls
    for gradient, expected in zip(*found, strict=True):
        assert_near(gradient, expected, TOLERANCE)


@pytest.mark.parametrize("name", ["affine", "linear"])
def test_function_transforms_equal_float64(name, onednn_calls):
    function, (x, weight, bias) = draw(name, 64, 330, 40)

    def objective(compute):
        return lambda x, weight, bias: compute(x, weight, bias).double().sin().sum()

    def exact(*args):
        return exactly(name, *args)

    gradients = torch.func.grad(objective(function), argnums=(0, 1, 2))(x, weight, bias)
    assert onednn_calls
    expected = torch.func.grad(objective(exact), argnums=(0, 1, 2))(x, weight, bias)
    for gradient, exact_gradient in zip(gradients, expected, strict=True):
        assert_near(gradient, exact_gradient, TOLERANCE)
    batches = torch.randn(3, 64, 330)
    mapped = torch.func.vmap(function, in_dims=(0, None, None))(batches, weight, bias)
    assert_near(mapped, torch.stack([exact(batch, weight, bias) for batch in batches]), TOLERANCE)
    per_example = torch.func.vmap(torch.func.grad(objective(function), argnums=1), in_dims=(0, None, None))
    expected = [torch.func.grad(objective(exact), argnums=1)(batch, weight, bias) for batch in batches]
    assert_near(per_example(batches, weight, bias), torch.stack(expected), TOLERANCE)


# --- Modules ---


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def patched(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)
    return module


def with_forward_hook(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


def with_pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return module


def with_backward_hook(module):
    module.register_full_backward_hook(lambda module, inputs, outputs: None)
    return module


def with_lora(module):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(module)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    return model.base_model.model[0]


OTHERS = {
    "subclass": lambda module: Doubled(330, 40),
    "wrapped": nn.Sequential,
    "patched": patched,
    "forward hook": with_forward_hook,
    "forward pre-hook": with_pre_hook,
    "backward hook": with_backward_hook,
    "lora": with_lora,
    "parametrized": nn.utils.parametrizations.weight_norm,
    "identity": lambda module: nn.Identity(),
}


@pytest.mark.parametrize("wrap", OTHERS.values(), ids=OTHERS)
def test_other_module_is_called(wrap, onednn_calls):
    module, x = wrap(nn.Linear(330, 40)), torch.randn(64, 330)
    assert not is_plain_linear(module)
    assert torch.equal(project(module, x), module(x)) and not onednn_calls


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(64, 330), (2, 32, 330), (2, 2, 16, 330), (330,), (2, 3, 330)], ids=str)
def test_plain_linear_is_projected_as_called(shape, has_bias, onednn_calls):
    module, x = nn.Linear(330, 40, bias=has_bias), torch.randn(shape)
    assert is_plain_linear(module)
    expected = nn.functional.linear(x.double(), module.weight.double(), module.bias.double() if has_bias else None)
    assert_near(project(module, x), expected, TOLERANCE)
    assert len(onednn_calls) == (x.numel() == 64 * 330)


def test_project_of_no_rows_is_empty():
    assert project(nn.Linear(330, 40), torch.randn(2, 0, 330)).shape == (2, 0, 40)


# --- Second half of a feed-forward layer ---


PROJECTIONS = {
    "linear": lambda: nn.Linear(330, 40),
    "linear without bias": lambda: nn.Linear(330, 40, bias=False),
    "conv1d": lambda: Conv1D(40, 330),
    "projection": lambda: Linear(40, 330),
}
each_projection = pytest.mark.parametrize("make", PROJECTIONS.values(), ids=PROJECTIONS)


def activated_exactly(x, projection, weight, bias):
    weight = weight.double().t() if isinstance(projection, nn.Linear) else weight.double()
    product = nn.functional.gelu(x.double()) @ weight
    return product if bias is None else product + bias.double()


def leaves_of(x, projection):
    return [x, *projection.parameters()]


@pytest.fixture
def recomputed(monkeypatch):
    """One entry a product whose activation is not kept."""
    calls, apply = [], _ActivatedAffine.apply
    monkeypatch.setattr(_ActivatedAffine, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("shape", [(64, 330), (2, 3, 330), (330,)], ids=str)
@each_projection
def test_activated_product_and_gradients_equal_float64(make, shape, recomputed):
    projection, x = make(), torch.randn(shape, requires_grad=True)
    output = project_activated(nn.GELU(), x, projection)
    assert len(recomputed) == 1
    expected = activated_exactly(x, projection, projection.weight, projection.bias)
    assert_near(output, expected, TOLERANCE)
    upstream = torch.randn_like(output)
    leaves = leaves_of(x, projection)
    gradients = torch.autograd.grad(output, leaves, upstream)
    exact = torch.autograd.grad(expected, leaves, upstream.double())
    for gradient, expected_gradient in zip(gradients, exact, strict=True):
        assert_near(gradient, expected_gradient, TOLERANCE)
    with torch.no_grad():
        assert_near(project_activated(nn.GELU(), x, projection), expected, TOLERANCE)
    assert len(recomputed) == 1


@each_projection
def test_second_derivative_of_activated_product_equals_float64(make):
    projection, x = make(), torch.randn(16, 330, requires_grad=True)
    leaves, upstream, found = leaves_of(x, projection), torch.randn(16, 40), []
    for compute in (
        lambda: project_activated(nn.GELU(), x, projection),
        lambda: activated_exactly(x, projection, projection.weight, projection.bias),
    ):
        output = compute()
        first = torch.autograd.grad(output, leaves, upstream.to(output.dtype), create_graph=True)
        # Cubes, so that the second pass depends on the first one's result.
        objective = sum((gradient.double() ** 3).mean() for gradient in first[:2])
        found.append(torch.autograd.grad(objective, leaves[:2]))
    for gradient, expected in zip(*found, strict=True):
        assert_near(gradient, expected, TOLERANCE)


@pytest.mark.parametrize("only", ["x", "weight", "bias"])
@pytest.mark.parametrize("make", [PROJECTIONS["linear"], PROJECTIONS["conv1d"]], ids=["linear", "conv1d"])
def test_gradient_of_one_part_of_activated_product_equals_float64(make, only):
    projection, x = make().requires_grad_(False), torch.randn(64, 330)
    leaf = x if only == "x" else getattr(projection, only)
    leaf.requires_grad_()
    upstream = torch.randn(64, 40)
    (gradient,) = torch.autograd.grad(project_activated(nn.GELU(), x, projection), leaf, upstream)
    expected = activated_exactly(x, projection, projection.weight, projection.bias)
    (exact,) = torch.autograd.grad(expected, leaf, upstream.double())
    assert_near(gradient, exact, TOLERANCE)


@pytest.mark.parametrize("wrap", OTHERS.values(), ids=OTHERS)
def test_other_module_is_called_with_the_activated_input(wrap, recomputed):
    module, act, x = wrap(nn.Linear(330, 40)), nn.GELU(), torch.randn(64, 330, requires_grad=True)
    assert torch.equal(project_activated(act, x, module), module(act(x)))
    assert not recomputed


ACTIVATIONS = {
    "patched": lambda: patched(nn.GELU()),
    "forward hook": lambda: with_forward_hook(nn.GELU()),
    "parameters": nn.PReLU,
}


@pytest.mark.parametrize("make_act", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_other_activation_is_called_once(make_act, recomputed):
    projection, act, x = nn.Linear(330, 40), make_act(), torch.randn(64, 330, requires_grad=True)
    assert_near(project_activated(act, x, projection), projection(act(x)).detach(), TOLERANCE)
    assert not recomputed


@each_projection
def test_autocast_of_activated_product_is_that_of_torch(make, recomputed):
    projection, x = make(), torch.randn(64, 330, requires_grad=True)
    upstream, leaves, found = torch.randn(64, 40).bfloat16(), leaves_of(x, projection), []
    for compute in (
        lambda: project_activated(nn.GELU(), x, projection),
        lambda: projection(nn.functional.gelu(x)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = compute()
        found.append([output, *torch.autograd.grad(output, leaves, upstream)])
    assert len(recomputed) == 1
    for value, expected in zip(*found, strict=True):
        assert value.dtype == expected.dtype
        assert_near(value, expected.detach(), 2 * torch.finfo(torch.bfloat16).eps)
