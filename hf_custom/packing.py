"""Batches without padding: the real tokens of all sequences in one row, and where each sequence begins.

A padded batch is unpadded once, before the embeddings, and padded again once, after the last block; between the two
every layer computes on real tokens only. Input that arrives packed already, from a collator that flattens, is
recognised by positions that restart or by the host's `cu_seq_lens_*`. Attention keeps the sequences apart
(`varlen_attention_forward`).
"""

import inspect
from dataclasses import dataclass
from functools import cache, partial, wraps

import torch

from .ops import is_traced

# Implementations of attention that take cumulative lengths. The others compute the padded batch with a mask.
TAKE_LENGTHS = ("sdpa", "varlen", "flash_attention_2", "flash_attention_3")
LENGTH_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

# Of the division of sequences into groups of similar length; the last is the cost of one more kernel call, in pairs of
# a query and a key.
MOST_BUCKETS, LENGTH_STEPS, COST_OF_A_CALL = 8, 64, 4096


@dataclass(eq=False)
class Packing:
    """Sequences of real tokens, one after another.

    Attributes:
        cu_seq_lens: (N + 1,) int32, where each of N sequences begins, and the total.
        max_length: length of the longest.
        shape: (B, T) of the batch that the tokens came from.
        indices: (total,), the place of each token in the flattened batch; `None` when every place holds one.
    """

    cu_seq_lens: torch.Tensor
    max_length: int
    shape: tuple[int, int]
    indices: torch.Tensor | None = None

    @classmethod
    def of_lengths(cls, lengths: torch.Tensor, shape: tuple[int, int], indices: torch.Tensor | None = None):
        """Of sequences with `lengths` (N,)."""
        cu_seq_lens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(cu_seq_lens, int(lengths.max()), shape, indices)

    def unpad(self, batch: torch.Tensor | None) -> torch.Tensor | None:
        """The real tokens of (B, T, ...), or of (1, T, ...) for all rows, as (1, total, ...)."""
        if batch is None:
            return None
        batch = batch.expand(self.shape[0], *batch.shape[1:]).flatten(0, 1)
        return (batch if self.indices is None else batch.index_select(0, self.indices)).unsqueeze(0)

    def repad(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1, total, ...) back in its places, (B, T, ...), with zeros where there was padding."""
        tokens = tokens.squeeze(0)
        if self.indices is not None:
            places = tokens.new_zeros((self.shape[0] * self.shape[1], *tokens.shape[1:]))
            tokens = places.index_copy(0, self.indices, tokens)
        return tokens.unflatten(0, self.shape)

    def repad_outputs(self, outputs) -> None:
        """The states of a model's output back in their places."""
        outputs.last_hidden_state = self.repad(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            states = (None if states is None else self.repad(states) for states in outputs.hidden_states)
            outputs.hidden_states = tuple(states)

    def unpad_encoder(self, states: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, dict]:
        """An encoder's states (B, S, D), real where `mask` (B, S) says, for the rows that have sequences here.

        Returns:
            The states (1, total, D) and the keyword arguments for the attention of these tokens over them.
        """
        rows = self.indices[self.cu_seq_lens[:-1].long()] // self.shape[1]
        is_real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask.bool()
        has_sequence = torch.zeros(len(states), dtype=torch.bool, device=states.device).index_fill(0, rows, True)
        is_real = is_real & has_sequence[:, None]
        indices = is_real.flatten().nonzero().squeeze(-1)
        keys = Packing.of_lengths(is_real.sum(-1)[rows], tuple(states.shape[:2]), indices)
        return keys.unpad(states), self.attention_arguments(keys)

    def attention_arguments(self, keys: "Packing | None" = None) -> dict:
        """Keyword arguments for the attention function, over these tokens or over the `keys` of another packing."""
        keys = self if keys is None else keys
        return {
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": keys.cu_seq_lens,
            "max_length_q": self.max_length,
            "max_length_k": keys.max_length,
            # Divided when the first layer asks, and not at all for a kernel that needs no division.
            "buckets": cache(partial(Buckets.of, self.cu_seq_lens, keys.cu_seq_lens)),
        }


def choose_packing(config, tokens, attention_mask, position_ids, past_key_values, use_cache, encoder, kwargs) -> tuple:
    """Whether to compute a batch packed, and what masks and positions to compute it with.

    Args:
        tokens: ids or embeddings (B, T, ...).
        position_ids: as the caller gave them, (B, T) or (1, T).
        encoder: the encoder's states and mask, or two `None`.
        kwargs: of the call; the host's `cu_seq_lens_*` and `max_length_*` are taken out.

    Returns:
        The packing, `None` for the ordinary path; the attention mask; the positions, as far as they are known; and the
        positions that a mask of documents is made from.
    """
    lengths = {name: kwargs.pop(name, None) for name in LENGTH_ARGUMENTS}
    are_lengths_given = lengths["cu_seq_lens_q"] is not None
    shape = tuple(tokens.shape[:2])
    is_packed = (
        config._attn_implementation in TAKE_LENGTHS
        and past_key_values is None
        and not use_cache
        and not kwargs.get("output_attentions", getattr(config, "output_attentions", False))
        and not (isinstance(encoder[1], torch.Tensor) and encoder[1].ndim != 2)
    )
    packing = None
    # Where sequences begin is data, which a compiled graph cannot branch on.
    if not is_traced():
        if past_key_values is None:
            refuse_restart(attention_mask, position_ids)
        if is_packed or are_lengths_given:
            packing = find_packing(attention_mask, position_ids, shape, lengths)
    mask_positions = position_ids
    if are_lengths_given:
        # The lengths alone say which tokens are a document; a mask of ones would unite them again.
        attention_mask = None
        mask_positions = positions_of(lengths["cu_seq_lens_q"], shape)
        position_ids = mask_positions if position_ids is None else position_ids
    # The documents of a packed row share one encoder, which the ordinary path's mask can say.
    if not is_packed or (packing is not None and packing.indices is None and encoder[0] is not None):
        packing = None
    return packing, attention_mask, position_ids, mask_positions


def positions_of(cu_seq_lens: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Positions (B, T) that begin again where each of the sequences does."""
    tokens = torch.arange(shape[0] * shape[1], device=cu_seq_lens.device)
    starts = cu_seq_lens[torch.searchsorted(cu_seq_lens, tokens, right=True) - 1]
    return (tokens - starts).view(shape)


def find_packing(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    shape: tuple[int, int],
    lengths: dict | None = None,
) -> Packing | None:
    """The sequences of a batch that the ordinary path would waste work on, or mix up; `None` for any other.

    Args:
        attention_mask: (B, T) of zeros and ones, a mask of another form, or none.
        position_ids: (B, T) or (1, T), as the caller gave them.
        shape: (B, T).
        lengths: the caller's `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, as far as given.

    Raises:
        ValueError: for lengths that do not add up, and for packed input with a mask that contradicts it.
    """
    is_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    if lengths and lengths.get("cu_seq_lens_q") is not None:
        return _of_cumulative_lengths(lengths, attention_mask if is_mask else None, shape)
    if is_mask:
        return unpadding(attention_mask)
    if attention_mask is None and position_ids is not None:
        return _of_positions(position_ids, shape)
    return None


def unpadding(attention_mask: torch.Tensor) -> Packing | None:
    """The rows of a 0/1 mask (B, T), wherever their padding stands; `None` when there is none, or nothing else."""
    is_real = attention_mask.bool()
    indices = is_real.flatten().nonzero().squeeze(-1)
    if len(indices) in (0, is_real.numel()):
        return None
    lengths = is_real.sum(-1)
    return Packing.of_lengths(lengths[lengths > 0], tuple(is_real.shape), indices)


def _of_positions(position_ids, shape):
    """Documents begin wherever a position does not follow from the one before it, which is the host's rule."""
    is_first = torch.ones_like(position_ids, dtype=torch.bool)
    is_first[:, 1:] = position_ids.diff(dim=-1) != 1
    if int(is_first.sum()) == len(is_first):
        return None
    starts = is_first.expand(shape).flatten().nonzero().squeeze(-1)
    lengths = torch.diff(starts, append=starts.new_tensor([shape[0] * shape[1]]))
    return Packing.of_lengths(lengths, shape)


def _of_cumulative_lengths(lengths, attention_mask, shape):
    cu_seq_lens, keys = lengths["cu_seq_lens_q"], lengths.get("cu_seq_lens_k")
    total = shape[0] * shape[1]
    if cu_seq_lens.ndim != 1 or len(cu_seq_lens) < 2 or cu_seq_lens.is_floating_point():
        raise ValueError(
            f"`cu_seq_lens_q` has shape {tuple(cu_seq_lens.shape)} and dtype {cu_seq_lens.dtype}, but it is a row of "
            "integers: 0, then where each document ends."
        )
    begins, ends = int(cu_seq_lens[0]), int(cu_seq_lens[-1])
    parts = cu_seq_lens.diff()
    if begins != 0 or ends != total or bool((parts < 0).any()):
        raise ValueError(
            f"`cu_seq_lens_q` runs from {begins} to {ends} {'and falls on the way ' if (parts < 0).any() else ''}but "
            f"the batch has {total} tokens: the lengths of the documents must add up to it. Start with 0, then add "
            "each document's length."
        )
    if keys is not None and not torch.equal(keys, cu_seq_lens):
        raise ValueError(
            "`cu_seq_lens_k` differs from `cu_seq_lens_q`, but every document attends to itself. Pass the same tensor."
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        row = int((attention_mask == 0).any(-1).nonzero()[0])
        raise ValueError(
            f"`cu_seq_lens_q` says that every token is real, but `attention_mask` has padding in row {row}. "
            "Packed input needs no `attention_mask`: leave it out."
        )
    return Packing.of_lengths(parts[parts > 0], shape)


def refuse_restart(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> None:
    """Positions that begin again at 0 amid the real tokens of a row say that the mask's one sequence is several."""
    is_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    if not is_mask or position_ids is None or position_ids.device.type != "cpu":
        return
    is_real = attention_mask.bool()
    restarts = (position_ids[:, 1:] == 0) & is_real[:, 1:] & is_real[:, :-1]
    if restarts.any():
        row, column = restarts.nonzero()[0].tolist()
        raise ValueError(
            f"`position_ids` begin again at token {column + 1} of row {row}, as packed documents do, but "
            "`attention_mask` makes one sequence of the row, in which they would see each other. Leave out "
            "`attention_mask` for packed input, or `position_ids` for padded input."
        )


def cache_on_request(forward=None, *, returns_cache: bool = True):
    """Keep no cache that nobody asked for: the configuration's default is meant for generation, and the unpadded path
    would be the price of it.

    A call with labels, or of a model that returns no cache, asks by `use_cache` or `past_key_values`. One that asks for
    attention weights takes the ordinary path anyway and is left alone.
    """
    if forward is None:
        return partial(cache_on_request, returns_cache=returns_cache)

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        is_labelled = not returns_cache or any(kwargs.get(name) is not None for name in ("labels", "mc_labels"))
        is_asked = any(kwargs.get(name) is not None for name in ("use_cache", "past_key_values", "output_attentions"))
        # A cache or its absence may also be named by place; the labels come after both.
        if is_labelled and not is_asked and len(args) < 2:
            kwargs["use_cache"] = False
        return forward(self, *args, **kwargs)

    # The host reads the signature for every token that it generates; finding it through the wrappers takes longer.
    wrapper.__signature__ = inspect.signature(forward)
    return wrapper


# --- Documents to rows ---


def best_fit(lengths: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """Put documents into rows of at most `max_tokens`, longest first, each where it leaves least room.

    Best-fit decreasing (Johnson 1973); a step serves all documents of one length at once.

    Args:
        lengths: (N,) integers, from 1 to `max_tokens`.

    Returns:
        (N,), the row of each document.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= max_tokens:
        index = int(((lengths < 1) | (lengths > max_tokens)).nonzero()[0])
        raise ValueError(
            f"document {index} has {int(lengths[index])} tokens, but a row takes 1 to {max_tokens}. "
            "Cut the document or raise `max_tokens`."
        )
    rows = torch.empty(len(lengths), dtype=torch.long)
    # Rows by the room they have left.
    open_rows: dict[int, list[int]] = {}
    count = 0
    order = lengths.argsort(descending=True, stable=True)
    for members in order.split(lengths[order].unique_consecutive(return_counts=True)[1].tolist()):
        length, members = int(lengths[members[0]]), members.tolist()
        while members:
            room = min((room for room in open_rows if room >= length), default=max_tokens)
            found = open_rows.pop(room, [])
            if not found:
                found, count = [count], count + 1
            each = room // length
            taken = found[: -(-len(members) // each)]
            if found[len(taken) :]:
                open_rows[room] = found[len(taken) :]
            for row in taken:
                placed, members = members[:each], members[each:]
                rows[placed] = row
                open_rows.setdefault(room - length * len(placed), []).append(row)
    return rows


@dataclass
class PackingCollator:
    """Documents to packed rows: `input_ids`, `labels` and `position_ids` that begin again with each document.

    With `max_tokens`, rows of that many tokens at most, best fit; what they leave open, a few percent, is filled as
    one more document that nothing is learnt from. Without, all documents are one row and nothing is left open.

    Args:
        max_tokens: of a row.
        pad_token_id: of the filling.

    A document is a dictionary with `input_ids` and, if wanted, `labels`, which are the ids themselves otherwise. The
    first label of a document is -100: nothing stands before it.
    """

    max_tokens: int | None = None
    pad_token_id: int = 0

    def __call__(self, documents: list[dict]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(document["input_ids"], dtype=torch.long) for document in documents]
        labels = [torch.as_tensor(document.get("labels", document["input_ids"])) for document in documents]
        for index, (row, row_labels) in enumerate(zip(ids, labels, strict=True)):
            if len(row) != len(row_labels) or len(row) == 0:
                raise ValueError(
                    f"document {index} has {len(row)} ids and {len(row_labels)} labels. Give one label an id, and "
                    "leave out empty documents."
                )
        lengths = torch.tensor([len(row) for row in ids])
        rows = torch.zeros_like(lengths)
        if self.max_tokens is not None:
            rows = best_fit(lengths, self.max_tokens)
        order = rows.argsort(stable=True)
        lengths, rows = lengths[order], rows[order]
        filled = torch.zeros(int(rows[-1]) + 1, dtype=torch.long).index_add_(0, rows, lengths)
        width = int(filled.max())
        # Where each document begins, counted through all rows; then the place of each token.
        before = lengths.cumsum(0) - lengths
        starts = before - (filled.cumsum(0) - filled)[rows] + rows * width
        positions = torch.arange(int(lengths.sum())) - before.repeat_interleave(lengths)
        places = positions + starts.repeat_interleave(lengths)
        shape = (len(filled), width)
        input_ids = torch.full(shape, self.pad_token_id).flatten()
        input_ids[places] = torch.cat([ids[i] for i in order])
        all_labels = torch.full(shape, -100).flatten()
        all_labels[places] = torch.cat([labels[i] for i in order]).long()
        all_labels[starts] = -100
        position_ids = (torch.arange(width) - filled[:, None]).clamp(min=0).flatten()
        position_ids[places] = positions
        batch = {"input_ids": input_ids, "labels": all_labels, "position_ids": position_ids}
        return {name: tensor.view(shape) for name, tensor in batch.items()}


# --- Groups of similar length, for attention kernels that take rectangles ---


@dataclass(frozen=True)
class Bucket:
    """Some sequences, padded to one length: `count` rows of `query_length` queries and `key_length` keys."""

    count: int
    query_length: int
    key_length: int
    key_mask: torch.Tensor | None  # (count, 1, 1, key_length), True for keys; None when all are.


@dataclass(eq=False)
class Side:
    """Where the rows of all buckets take their tokens from, and where the tokens find theirs again."""

    gather: torch.Tensor  # (places of all buckets,), the first token for places of padding
    scatter: torch.Tensor  # (total,)

    is_identity: bool

    def to_places(self, tokens: torch.Tensor) -> torch.Tensor:
        """(total, ...) tokens to the places of the buckets."""
        return tokens if self.is_identity else _ToPlaces.apply(tokens, self.gather, self.scatter)

    def to_tokens(self, places: torch.Tensor) -> torch.Tensor:
        """What stands at the places of the tokens, in their order."""
        return places if self.is_identity else _ToTokens.apply(places, self.scatter)


class _ToPlaces(torch.autograd.Function):
    """Padding has no gradient, so that each token takes that of its one place: a copy instead of a sum."""

    @staticmethod
    def forward(ctx, tokens, gather, scatter):
        ctx.save_for_backward(scatter)
        return tokens.index_select(0, gather)

    @staticmethod
    def backward(ctx, grad_output):
        (scatter,) = ctx.saved_tensors
        return grad_output.index_select(0, scatter), None, None


class _ToTokens(torch.autograd.Function):
    """The inverse: padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx, places, scatter):
        ctx.save_for_backward(scatter)
        ctx.places = places.shape
        return places.index_select(0, scatter)

    @staticmethod
    def backward(ctx, grad_output):
        (scatter,) = ctx.saved_tensors
        return grad_output.new_zeros(ctx.places).index_copy_(0, scatter, grad_output), None


@dataclass(eq=False)
class Buckets:
    """Sequences sorted into at most `MOST_BUCKETS` groups, so that attention takes as many kernel calls."""

    buckets: list[Bucket]
    queries: Side
    keys: Side

    @classmethod
    def of(cls, cu_seq_lens_q: torch.Tensor, cu_seq_lens_k: torch.Tensor) -> "Buckets":
        device = cu_seq_lens_q.device
        is_self = cu_seq_lens_k is cu_seq_lens_q
        starts_q, lengths_q = cu_seq_lens_q[:-1].long().cpu(), cu_seq_lens_q.diff().long().cpu()
        starts_k, lengths_k = cu_seq_lens_k[:-1].long().cpu(), cu_seq_lens_k.diff().long().cpu()
        order = torch.maximum(lengths_q, lengths_k).argsort(stable=True)
        groups = order.split(_group_sizes(torch.maximum(lengths_q, lengths_k)[order]))
        buckets = []
        for rows in groups:
            query_length, key_length = int(lengths_q[rows].max()), int(lengths_k[rows].max())
            key_mask = torch.arange(key_length) < lengths_k[rows, None]
            key_mask = None if key_mask.all() else key_mask[:, None, None].to(device)
            buckets.append(Bucket(len(rows), query_length, key_length, key_mask))
        queries = _side(groups, [bucket.query_length for bucket in buckets], starts_q, lengths_q, device)
        keys = queries
        if not is_self:
            keys = _side(groups, [bucket.key_length for bucket in buckets], starts_k, lengths_k, device)
        return cls(buckets, queries, keys)

    def split(self, *sides: torch.Tensor) -> list[list[torch.Tensor]]:
        """Queries, then keys and values (places, ...), as rectangles (count, length, ...), one a bucket."""
        lengths = ("query_length", "key_length", "key_length")
        parts = []
        for side, length in zip(sides, lengths[: len(sides)], strict=True):
            sizes = [(bucket.count, getattr(bucket, length)) for bucket in self.buckets]
            chunks = side.split([count * length for count, length in sizes])
            parts.append([chunk.unflatten(0, size) for chunk, size in zip(chunks, sizes, strict=True)])
        return parts


def _group_sizes(lengths: torch.Tensor) -> list[int]:
    """Sizes of consecutive groups of sorted `lengths` (N,) that make attention cheapest, by dynamic programming.

    A group of n sequences costs n · longest² pairs of query and key, and a call.
    """
    step = max(1, -(-int(lengths[-1]) // LENGTH_STEPS))
    tops, counts = (-(-lengths // step)).unique(return_counts=True)
    tops, ends = (tops * step).double(), counts.cumsum(0).double()
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    # Cost of one group from the distinct length i to the distinct length j.
    costs = (ends - starts[:, None]) * tops.square() + COST_OF_A_CALL
    costs = costs.masked_fill(torch.ones_like(costs).tril(-1).bool(), float("inf"))
    best, choices = costs[0], []
    for _ in range(min(MOST_BUCKETS, len(tops)) - 1):
        # One group more, which begins at i: the best for all before i, or no group more.
        before = torch.cat((best.new_zeros(1), best[:-1]))
        best, begin = (before[:, None] + costs).min(0)
        choices.append(begin)
    sizes, last = [], len(tops) - 1
    for begin in reversed(choices):
        first = int(begin[last])
        sizes.append(int(ends[last] - starts[first]))
        last = first - 1
        if last < 0:
            break
    if last >= 0:
        sizes.append(int(ends[last]))
    return sizes[::-1]


def _side(groups, group_lengths, starts, lengths, device):
    gather, scatter = [], torch.empty(int(lengths.sum()), dtype=torch.long)
    offset = 0
    for rows, length in zip(groups, group_lengths, strict=True):
        columns = torch.arange(length)
        is_real = columns < lengths[rows, None]
        tokens = starts[rows, None] + columns
        gather.append((tokens * is_real).flatten())
        scatter[tokens[is_real]] = offset + is_real.flatten().nonzero().squeeze(-1)
        offset += is_real.numel()
    is_identity = offset == len(scatter) and bool((scatter.diff() == 1).all())
    return Side(torch.cat(gather).to(device), scatter.to(device), is_identity)


__all__ = [
    "Buckets",
    "Packing",
    "PackingCollator",
    "best_fit",
    "cache_on_request",
    "choose_packing",
    "find_packing",
    "unpadding",
]
