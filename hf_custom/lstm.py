"""LSTM layers over the real tokens of a batch, in torch's own LSTM or, with cells and outputs clipped, in our own.

Sequences of different lengths lie in one row ordered by time, as in torch's `PackedSequence`: the first tokens of all
sequences, the longest sequence first, then the second tokens, and so on. A step computes the sequences that have not
ended, and no padding.

Gates of one token, with input x, last output h and last cell c (Hochreiter and Schmidhuber 1997; Gers et al. 2000;
projection W_p as in Sak et al. 2014, equations 1 to 6, without peepholes):

    i, f, g, o = W_x x + W_h h + b
    c' = clip(sigmoid(f) c + sigmoid(i) tanh(g)),   h' = clip(W_p (sigmoid(o) tanh(c')))
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from .ops import is_traced
from .packing import Packing

State = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class TimeOrder:
    """Where the tokens of a batch (B, T) stand in a row (N, ...) that is ordered by time.

    Attributes:
        batch_sizes: for each step how many sequences have a token there; falling.
        indices: (N,), the place of each token of the row in the flattened batch.
        reversal: (N,), the token that stands in the same place when each sequence is read backwards.
        rows: (S,), the row of the batch that each of the S sequences comes from, the longest first.
        shape: (B, T).
        is_full: whether the row has every place of the batch.
    """

    batch_sizes: list[int]
    indices: torch.Tensor
    reversal: torch.Tensor
    rows: torch.Tensor
    shape: tuple[int, int]
    is_full: bool

    @classmethod
    def of(cls, packing: Packing | None, shape: tuple[int, int], device: torch.device) -> "TimeOrder":
        """Of a batch's sequences, which are its rows when there is no packing."""
        batch_size, length = shape
        if packing is None:
            lengths = torch.full((batch_size,), length, device=device)
            starts, places = torch.arange(batch_size, device=device) * length, None
        else:
            lengths, starts, places = (
                packing.cu_seq_lens.diff().long(),
                packing.cu_seq_lens[:-1].long(),
                packing.indices,
            )
        lengths, order = lengths.sort(descending=True, stable=True)
        starts = starts[order]
        steps = torch.arange(int(lengths[0]), device=device)
        is_there = steps[:, None] < lengths  # (steps, S)
        times, sequences = is_there.nonzero(as_tuple=True)
        tokens = starts[sequences] + times
        batch_sizes = is_there.sum(-1)
        first_places = batch_sizes.cumsum(0) - batch_sizes
        reversal = first_places[lengths[sequences] - 1 - times] + sequences
        first_tokens = starts
        if places is not None:
            tokens, first_tokens = places[tokens], places[starts]
        return cls(
            batch_sizes=batch_sizes.tolist(),
            indices=tokens,
            reversal=reversal,
            rows=first_tokens // length,
            shape=shape,
            is_full=len(tokens) == batch_size * length,
        )

    def take(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (N, ...)."""
        return batch.flatten(0, 1).index_select(0, self.indices)

    def put(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, ...) -> (B, T, ...), zero where there is padding."""
        places = (tokens.new_empty if self.is_full else tokens.new_zeros)(
            (self.shape[0] * self.shape[1], *tokens.shape[1:])
        )
        return places.index_copy(0, self.indices, tokens).unflatten(0, self.shape)

    def last(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last token of each sequence: (N, ...) -> (S, ...)."""
        return tokens.index_select(0, self.reversal[: len(self.rows)])


def run_lstm(
    lstm: nn.LSTM,
    x: torch.Tensor,
    batch_sizes: list[int],
    state: State | None = None,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
) -> tuple[torch.Tensor, State]:
    """One layer, in one direction, over sequences ordered by time.

    Args:
        lstm: holds the weights; its own kernels run where nothing is clipped and they exist for the device.
        x: (N, I); see `TimeOrder`.
        state: outputs (S, P) and cells (S, H) before the first token; zeros when not given.
        cell_clip: bound of the absolute values of cells.
        proj_clip: bound of those of outputs.

    Returns:
        Outputs (N, P), and the state (S, P) and (S, H) after each sequence's last token.
    """
    is_clipped = cell_clip is not None or proj_clip is not None
    # torch's CPU kernels do not project; what it does instead is slower than the loop below.
    has_kernel = x.device.type != "cpu" or not lstm.proj_size
    if not is_clipped and (has_kernel or is_traced()):
        packed = PackedSequence(x, torch.tensor(batch_sizes))
        given = None if state is None else tuple(part.to(x.dtype).unsqueeze(0).contiguous() for part in state)
        outputs, (last_outputs, last_cells) = lstm(packed, given)
        return outputs.data, (last_outputs.squeeze(0), last_cells.squeeze(0))
    weights = dict(lstm.named_parameters())
    gates = nn.functional.linear(x, weights["weight_ih_l0"], weights["bias_ih_l0"] + weights["bias_hh_l0"])
    projection = weights.get("weight_hr_l0")
    output_size = lstm.proj_size or lstm.hidden_size
    if state is None:
        state = tuple(gates.new_zeros(batch_sizes[0], size) for size in (output_size, lstm.hidden_size))
    # Under autocast the gates have its type, and everything else follows them.
    others = (weights["weight_hh_l0"], projection, *state)
    others = [None if tensor is None else tensor.to(gates.dtype) for tensor in others]
    with torch.autocast(x.device.type, enabled=False):
        outputs, last_outputs, last_cells = _ClippedLSTM.apply(gates, *others, batch_sizes, cell_clip, proj_clip)
    return outputs, (last_outputs, last_cells)


def _steps(batch_sizes):
    """The range of each step in a row ordered by time."""
    return [slice(end - size, end) for size, end in zip(batch_sizes, accumulate(batch_sizes), strict=True)]


class _ClippedLSTM(torch.autograd.Function):
    """The recurrence, with the input's share of the gates computed before, and its gradient.

    Weights receive their gradients from all steps in one product, where automatic differentiation adds up one a step.
    A clipped value passes no gradient.
    """

    @staticmethod
    def forward(ctx, gates, weight_hh, weight_hr, first_outputs, first_cells, batch_sizes, cell_clip, proj_clip):
        size = first_cells.shape[1]
        gates = gates.clone()
        outputs = gates.new_empty(len(gates), first_outputs.shape[1])
        cells, hidden = gates.new_empty(len(gates), size), gates.new_empty(len(gates), size)
        last_outputs, last_cells = first_outputs.clone(), first_cells.clone()
        recurrent = weight_hh.t()
        h, c = first_outputs, first_cells
        for step in _steps(batch_sizes):
            count = step.stop - step.start
            current = gates[step]
            current.addmm_(h[:count], recurrent)
            current[:, : 2 * size].sigmoid_()
            current[:, 2 * size : 3 * size].tanh_()
            current[:, 3 * size :].sigmoid_()
            i, f, g, o = current.split(size, dim=1)
            c = torch.mul(f, c[:count], out=cells[step]).addcmul_(i, g)
            if cell_clip is not None:
                c.clamp_(-cell_clip, cell_clip)
            r = torch.tanh(c, out=hidden[step]).mul_(o)
            if weight_hr is None:
                h = outputs[step].copy_(r)
            else:
                h = torch.mm(r, weight_hr.t(), out=outputs[step])
            if proj_clip is not None:
                h.clamp_(-proj_clip, proj_clip)
            last_outputs[:count], last_cells[:count] = h, c
        ctx.save_for_backward(gates, weight_hh, weight_hr, first_outputs, first_cells, outputs, cells, hidden)
        ctx.options = (batch_sizes, cell_clip, proj_clip)
        return outputs, last_outputs, last_cells

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_outputs, grad_last_outputs, grad_last_cells):
        gates, weight_hh, weight_hr, first_outputs, first_cells, outputs, cells, hidden = ctx.saved_tensors
        batch_sizes, cell_clip, proj_clip = ctx.options
        size = first_cells.shape[1]
        steps = _steps(batch_sizes)
        grad_gates = torch.empty_like(gates)
        # By the projected outputs, before they were clipped.
        grad_projected = grad_outputs.contiguous().clone()
        dh, dc = grad_last_outputs.clone(), grad_last_cells.clone()
        before = [(first_outputs, first_cells), *((outputs[step], cells[step]) for step in steps[:-1])]
        for step, (_, last_c) in zip(reversed(steps), reversed(before), strict=True):
            count = step.stop - step.start
            i, f, g, o = gates[step].split(size, dim=1)
            di, df, dg, do = grad_gates[step].split(size, dim=1)
            dp = grad_projected[step].add_(dh[:count])
            if proj_clip is not None:
                dp.mul_(outputs[step].abs() < proj_clip)
            dr = dp if weight_hr is None else dp @ weight_hr
            tanh_c = torch.tanh(cells[step])
            # sigmoid' = s (1 - s) and tanh' = 1 - t².
            torch.mul(dr * tanh_c * o, 1 - o, out=do)
            dc_now = dc[:count].addcmul_(dr * o, 1 - tanh_c.square())
            if cell_clip is not None:
                dc_now.mul_(cells[step].abs() < cell_clip)
            torch.mul(dc_now * g * i, 1 - i, out=di)
            torch.mul(dc_now * last_c[:count] * f, 1 - f, out=df)
            torch.mul(dc_now * i, 1 - g.square(), out=dg)
            dc[:count] = dc_now * f
            dh[:count] = grad_gates[step] @ weight_hh
        last_h = torch.cat([h[: step.stop - step.start] for step, (h, _) in zip(steps, before, strict=True)])
        grad_weight_hh = grad_gates.t() @ last_h
        grad_weight_hr = None if weight_hr is None else grad_projected.t() @ hidden
        return grad_gates, grad_weight_hh, grad_weight_hr, dh, dc, None, None, None


__all__ = ["State", "TimeOrder", "run_lstm"]
