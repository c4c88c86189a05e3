"""Layers that the models share."""

import difflib

import torch
from torch import nn
from transformers import pytorch_utils
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .dropout import Dropout
from .matmul import affine, has_hooks, is_plain_linear, linear, project, times, times_transposed
from .ops import first_attended, is_traced, last_attended, padding_of


class Conv1D(pytorch_utils.Conv1D):
    """Affine map with its weight stored (in, out), as OpenAI's GPT and GPT-2 store it: (..., nx) -> (..., nf).

    A subclass of the host's, so that PEFT and the quantizers know it.

    Args:
        nf: number of output features.
        nx: number of input features.
        is_residual_projection: the output joins the residual stream, so the weight starts smaller by the square root
            of the number of residual layers (Radford et al. 2019, section 2.3).
    """

    def __init__(self, nf: int, nx: int, is_residual_projection: bool = False):
        super().__init__(nf, nx)
        self.is_residual_projection = is_residual_projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return affine(x.reshape(-1, self.nx), self.weight, self.bias).view(*x.shape[:-1], self.nf)


class Linear(nn.Linear):
    """The same map with its weight stored (out, in), which tensor parallelism and more quantizers can take.

    In a state dict, and so in every file, the weight is (in, out) nevertheless: one and the same for both layouts.

    Args:
        nf, nx, is_residual_projection: as of `Conv1D`.
    """

    def __init__(self, nf: int, nx: int, is_residual_projection: bool = False):
        super().__init__(nx, nf)
        self.is_residual_projection = is_residual_projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.weight) not in (torch.Tensor, nn.Parameter):
            return super().forward(x)
        rows = linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return rows.view(*x.shape[:-1], rows.shape[-1])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (name := f"{prefix}weight") in destination:
            destination[name] = destination[name].t()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if (name := f"{prefix}weight") in state_dict:
            # A copy, because `contiguous` leaves the strides of a shard (DTensor) as they are.
            weight = state_dict[name].t().clone(memory_format=torch.contiguous_format)
            state_dict = {**state_dict, name: weight}
        super()._load_from_state_dict(state_dict, prefix, *args)


PROJECTIONS = {"conv1d": Conv1D, "linear": Linear}


def get_projection(config, nf: int, nx: int, is_residual_projection: bool = False) -> Conv1D | Linear:
    """An affine map of a block in the layout that `config.projection_layout` names: (..., nx) -> (..., nf)."""
    return PROJECTIONS[config.projection_layout](nf, nx, is_residual_projection)


class FromConv1D(ConversionOps):
    """The weight of a file, (in, out), as a `Linear` holds it; `from_pretrained` sets parameters past the state dict.

    Nothing is to reverse in saving, because the state dict is in the file's layout. Neither is anything in a weight
    that was quantized before it was saved.
    """

    def convert(self, input_dict, model, full_layer_name, **kwargs):
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        found = {}
        for name, tensors in input_dict.items():
            weight = tensors[0] if isinstance(tensors, list) else tensors
            is_stored = isinstance(module, nn.Linear) and weight.ndim == 2 and weight.is_floating_point()
            found[name] = weight.t().contiguous() if is_stored else weight
        return found

    @property
    def reverse_op(self):
        return _AsSaved()


class _AsSaved(ConversionOps):
    def convert(self, input_dict, **kwargs):
        return input_dict

    @property
    def reverse_op(self):
        return FromConv1D()


def convert_on_load(model_type: str, names: tuple[str, ...]) -> None:
    """Let the host transpose the weights of these layers in models of a type, where they are `Linear`.

    Raises:
        ValueError: under DeepSpeed's ZeRO stage 3, which gathers weights to save without asking for the state dict.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed's ZeRO stage 3 would save the weights of `projection_layout='linear'` transposed. Set "
            "`projection_layout='conv1d'`, or divide the model by tensor parallelism instead."
        )
    known = get_checkpoint_conversion_mapping(model_type) or []
    has_ours = any(
        type(op).__name__ == FromConv1D.__name__ for entry in known for op in getattr(entry, "operations", ())
    )
    if not has_ours:
        ours = [WeightConverter(f"{name}.weight", f"{name}.weight", [FromConv1D()]) for name in names]
        register_checkpoint_conversion_mapping(model_type, [*known, *ours], overwrite=True)


class Table(nn.Embedding):
    """An embedding that is read whole, where each reader looks up rows by itself: (N, D)."""

    def forward(self) -> torch.Tensor:
        return self.weight


class _ActivatedAffine(torch.autograd.Function):
    """act(x) · weight + bias with the weight (I, O), or `is_transposed` (O, I), for which the backward pass computes
    act(x) again instead of keeping it."""

    @staticmethod
    def forward(ctx, x, weight, bias, act, is_transposed):
        ctx.act, ctx.is_transposed, device = act, is_transposed, x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(x, weight, bias)
        return (linear if is_transposed else affine)(act(x), weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        # The graph of a second derivative goes through the input itself.
        is_differentiated = torch.is_grad_enabled()
        grad_x = grad_weight = grad_bias = None
        device, dtype, is_enabled = ctx.autocast
        with torch.autocast(device, dtype, is_enabled), torch.enable_grad():
            x = x if is_differentiated else x.detach().requires_grad_()
            # A view, because a leaf may carry hooks that no inner gradient can run.
            activated = ctx.act(x.view_as(x))
            with torch.set_grad_enabled(is_differentiated):
                if needs_weight:
                    rows, columns = (grad_output, activated) if ctx.is_transposed else (activated, grad_output)
                    grad_weight = times(rows.t(), columns.contiguous()).to(weight.dtype)
                if needs_bias:
                    grad_bias = grad_output.sum(0).to(bias.dtype)
                if needs_x:
                    product = times if ctx.is_transposed else times_transposed
                    grad_activated = product(grad_output, weight).to(activated.dtype)
                    (grad_x,) = torch.autograd.grad(activated, x, grad_activated, create_graph=is_differentiated)
        return grad_x, grad_weight, grad_bias, None, None


def _is_plain(module, layout):
    """Whether calling `module` is the map of a projection in this layout and nothing else."""
    is_whole = type(module) is layout and type(module.weight) in (torch.Tensor, nn.Parameter)
    return is_whole and "forward" not in vars(module) and not has_hooks(module)


def project_activated(act: nn.Module, x: torch.Tensor, projection: nn.Module) -> torch.Tensor:
    """`projection(act(x))`, the second half of a feed-forward layer, without keeping act(x) in training: (..., O).

    At four times the hidden size it is the largest tensor of a block, and the cheapest to compute again.
    """
    if not torch.is_grad_enabled() or is_traced():
        return project(projection, act(x))
    is_linear = is_plain_linear(projection) or _is_plain(projection, Linear)
    is_plain = not ("forward" in vars(act) or has_hooks(act) or next(act.parameters(), None) is not None)
    if not is_plain or not (is_linear or _is_plain(projection, Conv1D)):
        return project(projection, act(x))
    rows = _ActivatedAffine.apply(x.reshape(-1, x.shape[-1]), projection.weight, projection.bias, act, is_linear)
    return rows.view(*x.shape[:-1], -1)


def get_activation(name: str, field: str) -> nn.Module:
    """The host's activation of that name; `gelu_new` (Hendrycks and Gimpel 2016, tanh form) as torch's one kernel.

    Raises:
        ValueError: naming the configuration's `field`, for a name that the host does not know.
    """
    if name not in ACT2FN:
        close = difflib.get_close_matches(name, list(ACT2FN), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(ACT2FN))}."
        raise ValueError(f"`{field}` {name!r} is unknown.{hint}")
    return ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]


class SequenceSummary(nn.Module):
    """One vector a sequence: pick or average its real positions, then project and activate, with dropout around both.

    Args:
        config: with the fields `summary_*`.
        num_classes: size of the vector, when it is projected to labels.
    """

    def __init__(self, config, num_classes: int):
        super().__init__()
        self.summary_type = config.summary_type
        if self.summary_type == "attn":
            raise ValueError(
                "`summary_type='attn'` has never been defined for GPT-2, in stock either. "
                "Use 'cls_index', 'last', 'first' or 'mean'."
            )
        width = config.hidden_size
        self.summary = nn.Identity()
        if config.summary_use_proj:
            self.summary = nn.Linear(width, num_classes if config.summary_proj_to_labels else width)
        self.activation = nn.Identity()
        if config.summary_activation:
            self.activation = get_activation(config.summary_activation, "summary_activation")
        self.first_dropout = Dropout(config.summary_first_dropout)
        self.last_dropout = Dropout(config.summary_last_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cls_index: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(..., T, D) -> (..., classes).

        Args:
            cls_index: (...), the position to read for `cls_index`; the last real one when not given.
            attention_mask: (..., T), 1 for real tokens; all are, when there is none.
        """
        is_padding = padding_of(attention_mask, hidden_states.shape[:-1])
        is_real = torch.ones_like(hidden_states[..., 0]) if is_padding is None else ~is_padding
        if self.summary_type == "mean":
            share = is_real / is_real.sum(-1, keepdim=True).clamp(min=1)
            output = (hidden_states * share[..., None].to(hidden_states.dtype)).sum(-2)
        else:
            if self.summary_type == "first":
                cls_index = first_attended(is_real)
            elif self.summary_type == "last" or cls_index is None:
                cls_index = last_attended(is_real)
            index = cls_index[..., None, None].expand(*cls_index.shape, 1, hidden_states.shape[-1])
            output = hidden_states.gather(-2, index).squeeze(-2)
        return self.last_dropout(self.activation(self.summary(self.first_dropout(output))))


__all__ = [
    "Conv1D",
    "FromConv1D",
    "Linear",
    "PROJECTIONS",
    "SequenceSummary",
    "Table",
    "convert_on_load",
    "get_activation",
    "get_projection",
    "project_activated",
]
