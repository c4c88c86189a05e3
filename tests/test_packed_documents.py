"""Several documents in a row: how they are found, grouped, attended to and collated, and that none touches another."""

from itertools import pairwise

import pytest
import reference
import torch
from reference import assert_gradients_near, assert_near, gradients_of, weighted_sum
from tiny import MODELS, VARIANTS, VOCAB, name_of
from torch.nn.functional import scaled_dot_product_attention
from transformers import DataCollatorWithFlattening

from hf_custom.attention import varlen_attention_forward
from hf_custom.packing import (
    COST_OF_A_CALL,
    MOST_BUCKETS,
    Buckets,
    PackingCollator,
    best_fit,
    find_packing,
    positions_of,
)

ROWS = {row.name: row for row in MODELS + VARIANTS}
CAUSAL_LM, MASKED_LM = ROWS["CustomGPT2ForCausalLM"], ROWS["CustomBertForMaskedLM"]
BERT_CAUSAL_LM = ROWS["CustomBertForCausalLM"]

# --- Packed input ---

# Lengths of the documents of each row.
PACKED = {"one row": [[4, 1, 6]], "several rows": [[4, 1, 6], [9, 2], [11]], "single tokens": [[1, 1, 1]]}


def restarting(rows):
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])


def cumulative(rows):
    lengths = torch.tensor([length for row in rows for length in row])
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("rows", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("is_given", [False, True], ids=["positions", "lengths"])
def test_packed_input_is_recognised(rows, is_given):
    position_ids = restarting(rows)
    shape = tuple(position_ids.shape)
    if is_given:
        packing = find_packing(None, None, shape, {"cu_seq_lens_q": cumulative(rows)})
    else:
        packing = find_packing(None, position_ids, shape)
    found = [len(document) for document in reference.documents(position_ids)]
    assert packing.cu_seq_lens.diff().tolist() == found
    assert packing.indices is None and packing.max_length == max(found) and packing.shape == shape
    assert torch.equal(positions_of(packing.cu_seq_lens, shape), position_ids)
    batch = torch.randn(*shape, 2)
    assert torch.equal(packing.unpad(batch), batch.flatten(0, 1)[None])
    assert torch.equal(packing.repad(packing.unpad(batch)), batch)


def test_positions_of_one_row_serve_all_rows():
    packing = find_packing(None, restarting([[2, 3]]), (3, 5))
    assert packing.cu_seq_lens.tolist() == [0, 2, 5, 7, 10, 12, 15]
    assert torch.equal(positions_of(packing.cu_seq_lens, (3, 5)), restarting([[2, 3]] * 3))


def test_documents_may_begin_above_zero():
    packing = find_packing(None, torch.tensor([[5, 6, 2, 3, 3]]), (1, 5))
    assert packing.cu_seq_lens.tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("position_ids", [None, [[0, 1, 2, 3]], [[5, 6, 7, 8]], [[0, 1, 2, 3], [7, 8, 9, 10]]], ids=str)
def test_consecutive_positions_are_not_packed(position_ids):
    position_ids = None if position_ids is None else torch.tensor(position_ids)
    assert find_packing(None, position_ids, (2, 4)) is None


def test_empty_documents_are_left_out():
    packing = find_packing(None, None, (1, 5), {"cu_seq_lens_q": torch.tensor([0, 2, 2, 5])})
    assert packing.cu_seq_lens.tolist() == [0, 2, 5]


# --- Buckets ---


def draw_lengths(kind):
    """Lengths of queries and keys."""
    n = int(torch.randint(1, 60, ()))
    return {
        "short": lambda: (torch.randint(1, 12, (n,)), None),
        "long": lambda: (torch.randint(1, 1200, (n,)), None),
        "skewed": lambda: ((torch.rand(n) ** 6 * 900).long() + 1, None),
        "equal": lambda: (torch.full((n,), 17), None),
        "one token": lambda: (torch.ones(n, dtype=torch.long), None),
        "keys of their own": lambda: (torch.randint(1, 40, (n,)), torch.randint(0, 90, (n,))),
        "no keys": lambda: (torch.randint(1, 40, (n,)), torch.zeros(n, dtype=torch.long)),
        "1000 documents": lambda: (torch.randint(1, 300, (1000,)), None),
    }[kind]()


def ends_of(lengths):
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def rectangles(side, sizes, total):
    """For each bucket its places (count, length), each holding the index of its token, or -1 for padding."""
    places = torch.full((sum(count * length for count, length in sizes),), -1)
    places[side.scatter] = torch.arange(total)
    parts = places.split([count * length for count, length in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


KINDS = (
    "short",
    "long",
    "skewed",
    "equal",
    "one token",
    "keys of their own",
    "no keys",
    "1000 documents",
)


@pytest.mark.parametrize("kind", KINDS)
def test_buckets_hold_every_token_once(kind):
    for _ in range(2 if kind == "1000 documents" else 20):
        lengths_q, lengths_k = draw_lengths(kind)
        ends_q = ends_of(lengths_q)
        ends_k = ends_q if lengths_k is None else ends_of(lengths_k)
        buckets = Buckets.of(ends_q, ends_k)
        lengths_k = lengths_q if lengths_k is None else lengths_k
        assert len(buckets.buckets) <= MOST_BUCKETS
        assert sum(bucket.count for bucket in buckets.buckets) == len(lengths_q)
        pairs = sum(bucket.count * bucket.query_length * bucket.key_length for bucket in buckets.buckets)
        assert pairs <= len(lengths_q) * lengths_q.max() * lengths_k.max()
        queries = rectangles(
            buckets.queries, [(b.count, b.query_length) for b in buckets.buckets], int(lengths_q.sum())
        )
        keys = rectangles(buckets.keys, [(b.count, b.key_length) for b in buckets.buckets], int(lengths_k.sum()))
        documents = {(int(q), int(k)) for q, k in zip(ends_q[:-1], ends_k[:-1], strict=True)}
        starts = []
        for bucket, query_rows, key_rows in zip(buckets.buckets, queries, keys, strict=True):
            key_mask = torch.ones(key_rows.shape, dtype=torch.bool)
            if bucket.key_mask is not None:
                key_mask = bucket.key_mask[:, 0, 0]
            assert torch.equal(key_mask, key_rows >= 0)
            for query_row, key_row in zip(query_rows, key_rows, strict=True):
                query_row, key_row = query_row[query_row >= 0], key_row[key_row >= 0]
                document = ends_q.tolist().index(int(query_row[0]))
                starts.append((int(ends_q[document]), int(ends_k[document])))
                assert query_row.tolist() == list(range(ends_q[document], ends_q[document + 1]))
                assert key_row.tolist() == list(range(ends_k[document], ends_k[document + 1]))
        assert set(starts) == documents and len(starts) == len(documents)


@pytest.mark.parametrize("kind", KINDS)
def test_bucket_places_and_tokens_are_inverse_and_grad(kind):
    lengths, _ = draw_lengths(kind)
    ends = ends_of(lengths)
    side = Buckets.of(ends, ends).queries
    tokens = torch.randn(int(lengths.sum()), 2, requires_grad=True)
    places = side.to_places(tokens)
    assert torch.equal(side.to_tokens(places), tokens)
    weights = torch.randn_like(tokens)
    (gradient,) = torch.autograd.grad(side.to_tokens(places), tokens, weights)
    assert torch.equal(gradient, weights)
    places = places.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(side.to_tokens(places), places, weights)
    expected = torch.zeros_like(places)
    expected[side.scatter] = weights
    assert torch.equal(gradient, expected)


def test_equal_lengths_are_not_copied():
    ends = ends_of(torch.full((5,), 3))
    tokens = torch.randn(15, 2)
    assert Buckets.of(ends, ends).queries.to_places(tokens) is tokens


@pytest.mark.parametrize("distinct", range(1, 8))
def test_buckets_are_the_cheapest(distinct):
    counts = set()
    for _ in range(12):
        # Below 64 a length is not rounded, so that the cost is the stated one.
        values = torch.randperm(64)[:distinct] + 1
        lengths = values.repeat_interleave(torch.randint(1, 30, (distinct,)))
        lengths = lengths[torch.randperm(len(lengths))]
        ends = ends_of(lengths)
        buckets = Buckets.of(ends, ends).buckets
        cost = sum(bucket.count * bucket.query_length**2 + COST_OF_A_CALL for bucket in buckets)
        assert cost == reference.cheapest_grouping(lengths.tolist(), MOST_BUCKETS, COST_OF_A_CALL)
        counts.add(len(buckets))
    assert distinct < 3 or len(counts) > 1


def test_long_lengths_cost_at_most_their_rounding_more():
    for _ in range(10):
        lengths = torch.randint(1, 3000, (7,)).repeat_interleave(torch.randint(1, 9, (7,)))
        ends = ends_of(lengths)
        buckets = Buckets.of(ends, ends).buckets
        cost = sum(bucket.count * bucket.query_length**2 + COST_OF_A_CALL for bucket in buckets)
        step = -(-int(lengths.max()) // 64)
        rounded = (-(-lengths // step) * step).tolist()
        assert cost <= reference.cheapest_grouping(rounded, MOST_BUCKETS, COST_OF_A_CALL)


@pytest.fixture
def kernel_calls(monkeypatch):
    calls = []

    def attend(query, *args, **kwargs):
        calls.append(query.shape)
        return scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    return calls


def test_thousand_documents_take_few_kernel_calls(kernel_calls):
    lengths = (torch.rand(1000) ** 3 * 60).long() + 1
    ids = torch.randint(0, VOCAB, (1, int(lengths.sum())))
    model = CAUSAL_LM.build(n_layer=2)
    with torch.no_grad():
        model(ids, cu_seq_lens_q=ends_of(lengths), use_cache=False)
    assert 2 <= len(kernel_calls) <= 2 * MOST_BUCKETS


@pytest.mark.parametrize("kind", ["causal", "causal behind others", "full"])
@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["kernel", "with dropout"])
def test_varlen_attention_equals_naive_and_grad(dropout, kind):
    """A chance of dropout that rounds to none takes the path for dropout all the same."""
    lengths_q, is_causal = torch.tensor([3, 1, 7, 3, 2]), kind != "full"
    # Four keys precede those of the queries in each sequence, which all of its queries see.
    lengths_k = {"causal": lengths_q, "causal behind others": lengths_q + 4}.get(kind, torch.tensor([2, 9, 0, 1, 2]))
    ends_q = ends_of(lengths_q)
    ends_k = ends_q if kind == "causal" else ends_of(lengths_k)
    sizes = [int(lengths_q.sum()), int(lengths_k.sum()), int(lengths_k.sum())]
    states = [torch.randn(1, 2, size, 6, requires_grad=True) for size in sizes]
    output, _ = varlen_attention_forward(
        torch.nn.Module(),
        *states,
        None,
        scaling=0.3,
        dropout=dropout,
        is_causal=is_causal,
        cu_seq_lens_q=ends_q,
        cu_seq_lens_k=ends_k,
    )
    expected = []
    for (q, q_end), (k, k_end) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        if k == k_end:
            expected.append(torch.zeros(1, q_end - q, 2, 6))
            continue
        query, key, value = states[0][:, :, q:q_end], states[1][:, :, k:k_end], states[2][:, :, k:k_end]
        allowed = reference.allowed_keys(q_end - q, torch.ones(1, k_end - k), is_causal)
        expected.append(reference.attention(query, key, value, allowed, 0.3)[0])
    expected = torch.cat(expected, dim=1)
    assert_near(output, expected, 2e-6)
    gradients = torch.autograd.grad(weighted_sum({"": output}), states)
    expected = torch.autograd.grad(weighted_sum({"": expected}), states)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert_near(gradient, expected_gradient, 2e-6)


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["kernel", "with dropout"])
def test_sequences_none_of_which_has_keys_get_zeros(dropout):
    ends_q, ends_k = torch.tensor([0, 2, 5]), torch.tensor([0, 0, 0])
    query = torch.randn(1, 2, 5, 6, requires_grad=True)
    key = torch.randn(1, 2, 0, 6)
    output, _ = varlen_attention_forward(
        torch.nn.Module(),
        query,
        key,
        key,
        None,
        dropout=dropout,
        is_causal=False,
        cu_seq_lens_q=ends_q,
        cu_seq_lens_k=ends_k,
    )
    assert torch.equal(output, torch.zeros(1, 5, 2, 6))
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert torch.equal(gradient, torch.zeros_like(query))


# --- Packed documents, against each alone ---

DOCUMENTS = [[4, 1, 6], [9, 2]]
WAYS = {
    "positions": lambda rows: {"position_ids": restarting(rows)},
    "lengths": lambda rows: {"cu_seq_lens_q": cumulative(rows), "cu_seq_lens_k": cumulative(rows)},
    "both": lambda rows: {"position_ids": restarting(rows), "cu_seq_lens_q": cumulative(rows), "max_length_q": 9},
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def split_documents(tensor):
    return [part for row, lengths in zip(tensor, DOCUMENTS, strict=True) for part in row.split(lengths)]


@each_way
@pytest.mark.parametrize(
    "row, option",
    [
        *((row, option) for row in (CAUSAL_LM, BERT_CAUSAL_LM) for option in row.positions),
        # Masked tokens are read from both sides, with the same positions.
        *((MASKED_LM, option) for option in BERT_CAUSAL_LM.positions),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_loss_and_grad_equal_each_document_alone(implementation, row, option, way, packings):
    model = row.build(**option, attn_implementation=implementation)
    ids = row.inputs(batch=2)["input_ids"]
    labels = ids.masked_fill(restarting(DOCUMENTS) == 0, -100)
    count = int((labels != -100).sum())
    with torch.no_grad():
        logits = split_documents(model(ids, use_cache=False, **way(DOCUMENTS)).logits)
        for document, found in zip(split_documents(ids), logits, strict=True):
            assert_near(found, model(document[None]).logits[0])
    loss = model.train()(ids, labels=labels, **way(DOCUMENTS)).loss
    assert (packings[-1] is not None) == (implementation == "sdpa")
    gradients = gradients_of(model, loss)
    alone = zip(split_documents(ids), split_documents(labels), strict=True)
    expected = sum(model(i[None], labels=label[None], num_items_in_batch=count).loss for i, label in alone)
    assert_near(loss, expected, 1e-6, scale_floor=0.0)
    assert_gradients_near(gradients, gradients_of(model, expected))


@each_way
@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.num_choices is None], ids=name_of)
@torch.no_grad()
def test_changed_document_changes_no_other(row, way):
    model = row.build(pad_token_id=None)
    base = getattr(model, model.base_model_prefix, model)
    ids = row.inputs(batch=2)["input_ids"]
    states = split_documents(base(ids, use_cache=False, **way(DOCUMENTS)).last_hidden_state)
    ids[0, 5:] = (ids[0, 5:] + 1) % VOCAB
    changed = split_documents(base(ids, use_cache=False, **way(DOCUMENTS)).last_hidden_state)
    same = [torch.equal(old, new) for old, new in zip(states, changed, strict=True)]
    assert same == [True, True, False, True, True]


def test_collator_that_flattens_is_understood(packings):
    model = CAUSAL_LM.build().train()
    documents = [torch.randint(0, VOCAB, (length,)).tolist() for length in (4, 1, 6)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": document} for document in documents])
    outputs = model(**batch, return_logits=True)
    assert packings[-1].cu_seq_lens.tolist() == [0, 4, 5, 11]
    alone = torch.cat([model(torch.tensor([document])).logits[0] for document in documents])
    assert_near(outputs.logits[0], alone)
    expected = [reference.next_token_loss(*pair, num_items=8) for pair in _pairs(alone, documents)]
    assert_near(outputs.loss, sum(expected), 1e-6, scale_floor=0.0)


def _pairs(logits, documents):
    """Logits (1, T, V) and labels (1, T) of the documents that have a token to predict."""
    parts = logits.split([len(document) for document in documents])
    return [(part[None], torch.tensor([ids])) for part, ids in zip(parts, documents, strict=True) if len(ids) > 1]


# --- Documents to rows ---


@pytest.mark.parametrize("max_tokens", [1, 7, 40])
def test_best_fit_equals_naive(max_tokens):
    for count in (1, 2, 9, 60):
        lengths = torch.randint(1, max_tokens + 1, (count,))
        rows = best_fit(lengths, max_tokens)
        filled = torch.zeros(int(rows.max()) + 1, dtype=torch.long).index_add_(0, rows, lengths)
        assert filled.min() > 0 and filled.max() <= max_tokens
        assert sorted(filled.tolist()) == sorted(reference.best_fit(lengths.tolist(), max_tokens))


@pytest.mark.parametrize("lengths", [[3, 9, 2], [3, 0, 2]], ids=["too long", "empty"])
def test_best_fit_refuses_document_by_number(lengths):
    with pytest.raises(ValueError, match=f"document 1 has {lengths[1]} tokens, but a row takes 1 to 8"):
        best_fit(torch.tensor(lengths), 8)


@pytest.mark.parametrize("max_tokens", [None, 9])
def test_collated_documents_equal_each_alone_and_grad(max_tokens):
    model = CAUSAL_LM.build().train()
    documents = [{"input_ids": torch.randint(0, VOCAB, (length,)).tolist()} for length in (3, 9, 1, 4, 5, 2)]
    batch = PackingCollator(max_tokens, pad_token_id=VOCAB - 1)(documents)
    assert batch["input_ids"].shape == ((1, 24) if max_tokens is None else (3, 9))
    expected = 0.0
    for document in documents:
        row = torch.tensor([document["input_ids"]])
        if row.shape[1] > 1:
            expected = expected + model(row, labels=row, num_items_in_batch=18).loss
    expected_gradients = gradients_of(model, expected)
    loss = model(**batch, num_items_in_batch=18).loss
    assert int((batch["labels"] != -100).sum()) == 18
    assert_near(loss, expected, 1e-6, scale_floor=0.0)
    assert_gradients_near(gradients_of(model, loss), expected_gradients)


def test_collator_takes_labels_and_refuses_other_numbers_of_them():
    batch = PackingCollator()([{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}])
    assert batch["labels"].tolist() == [[-100, -100, 7]]
    with pytest.raises(ValueError, match="document 1 has 2 ids and 1 labels"):
        PackingCollator()([{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1]}])


# --- On a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_varlen_on_gpu_equals_each_document_alone_and_grad(dtype, dropout, is_causal):
    """With dropout only that it runs and that a document has no part in another's output."""
    lengths = [5, 64, 1, 130]
    states = [torch.randn(1, 4, sum(lengths), 64, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
    cumulated = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    arguments = (None, 0.125, dropout, is_causal, cumulated, cumulated, max(lengths), max(lengths))
    output, _ = varlen_attention_forward(torch.nn.Module(), *states, *arguments)
    gradients = torch.autograd.grad(output[:, :5].float().square().sum(), states, retain_graph=True)
    assert all(gradient[:, :, 5:].count_nonzero() == 0 for gradient in gradients)
    if dropout:
        return
    expected = [
        torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=is_causal, scale=0.125).transpose(1, 2)
        for parts in zip(*(state.split(lengths, 2) for state in states), strict=True)
    ]
    expected = torch.cat(expected, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_near(output, expected, tolerance)
    weights = torch.randn_like(output)
    found = torch.autograd.grad((output * weights).sum(), states)
    for gradient, other in zip(found, torch.autograd.grad((expected * weights).sum(), states), strict=True):
        assert_near(gradient, other, tolerance)
