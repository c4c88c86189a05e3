"""Batches without padding: the bookkeeping against naive loops, whole models against the ordinary path."""

from itertools import pairwise

import pytest
import reference
import torch
from reference import (
    assert_gradients_near,
    assert_near,
    assert_outputs_near,
    gradients_of,
    real_outputs,
    weighted_sum,
)
from tiny import BATCH, LENGTH, MODELS, VARIANTS, VOCAB, name_of
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import DataCollatorWithFlattening

from hf_custom import CustomBertConfig, CustomGPT2Config, modeling_bert, modeling_gpt2
from hf_custom.attention import varlen_attention_forward
from hf_custom.packing import (
    COST_OF_A_CALL,
    MOST_BUCKETS,
    Buckets,
    PackingCollator,
    best_fit,
    choose_packing,
    find_packing,
    positions_of,
    unpadding,
)

ROWS = {row.name: row for row in MODELS + VARIANTS}
CAUSAL_LM, QUESTION = ROWS["CustomGPT2ForCausalLM"], ROWS["CustomGPT2ForQuestionAnswering"]
BERT_CAUSAL_LM, MASKED_LM = ROWS["CustomBertForCausalLM"], ROWS["CustomBertForMaskedLM"]
GENERATIVE = [CAUSAL_LM, BERT_CAUSAL_LM]
# A question's loss is a softmax over all positions, padding among them, of which GPT-2's head says nothing.
LABELLED = [row for row in ROWS.values() if row.draw_labels(1, LENGTH) and row is not QUESTION]
each_model = pytest.mark.parametrize("row", ROWS.values(), ids=name_of)
each_writer = pytest.mark.parametrize("row", GENERATIVE, ids=name_of)

# --- Tokens in and out ---

MASKS = {
    "right": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]],
    "left": [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]],
    "masked rows": [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    "one row": [[0, 1, 1, 0]],
    "rows of one token": [[1], [0], [1]],
}
each_mask = pytest.mark.parametrize("mask", [torch.tensor(mask) for mask in MASKS.values()], ids=MASKS)
each_mask_type = pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)


@each_mask_type
@each_mask
def test_unpadding_equals_naive(mask, dtype):
    mask = mask.to(dtype)
    packing, places = find_packing(mask, None, tuple(mask.shape)), reference.real_places(mask)
    lengths = [sum(b == row for b, _ in places) for row in range(len(mask))]
    lengths = [length for length in lengths if length]
    assert packing.shape == tuple(mask.shape)
    assert packing.indices.tolist() == [b * mask.shape[1] + t for b, t in places]
    assert packing.cu_seq_lens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packing.cu_seq_lens.dtype == torch.int32
    assert packing.max_length == max(lengths)
    for batch in (torch.randn(*mask.shape, 2, 3), torch.randint(0, 9, mask.shape), torch.randn(1, mask.shape[1], 2)):
        expected = torch.stack([batch[b % len(batch), t] for b, t in places])[None]
        assert torch.equal(packing.unpad(batch), expected)


@each_mask
def test_repad_is_inverse_of_unpad_with_zeros_at_padding(mask):
    packing, batch = unpadding(mask), torch.randn(*mask.shape, 5)
    padded, places = packing.repad(packing.unpad(batch)), reference.real_places(mask)
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            expected = batch[b, t] if (b, t) in places else torch.zeros(5)
            assert torch.equal(padded[b, t], expected)
    tokens = torch.randn(1, len(places), 5)
    assert torch.equal(packing.unpad(packing.repad(tokens)), tokens)


@each_mask
def test_unpad_and_repad_give_each_token_its_gradient(mask):
    packing, places = unpadding(mask), reference.real_places(mask)
    batch = torch.randn(*mask.shape, 5, requires_grad=True)
    tokens = packing.unpad(batch)
    weights = torch.randn_like(tokens)
    (gradient,) = torch.autograd.grad(tokens, batch, weights)
    expected = torch.zeros_like(batch)
    for i, (b, t) in enumerate(places):
        expected[b, t] = weights[0, i]
    assert torch.equal(gradient, expected)
    tokens = torch.randn(1, len(places), 5, requires_grad=True)
    weights = torch.randn_like(batch)
    (gradient,) = torch.autograd.grad(packing.repad(tokens), tokens, weights)
    assert torch.equal(gradient[0], torch.stack([weights[b, t] for b, t in places]))


@each_mask_type
@pytest.mark.parametrize("fill", [0, 1])
def test_mask_of_one_kind_has_no_packing(fill, dtype):
    assert unpadding(torch.full((3, 4), fill, dtype=dtype)) is None


def test_unpad_of_nothing_is_nothing():
    assert unpadding(torch.tensor([[0, 1]])).unpad(None) is None


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


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["kernel", "with dropout"])
def test_varlen_attention_equals_naive_and_grad(dropout, is_causal):
    """A chance of dropout that rounds to none takes the path for dropout all the same."""
    lengths_q = torch.tensor([3, 1, 7, 3, 2])
    lengths_k = lengths_q if is_causal else torch.tensor([2, 9, 0, 1, 2])
    ends_q = ends_of(lengths_q)
    ends_k = ends_q if is_causal else ends_of(lengths_k)
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


# --- Whole models, against the ordinary path ---


@pytest.fixture
def packings(monkeypatch):
    """What each call of a model chose."""
    chosen = []

    def spy(*args, **kwargs):
        found = choose_packing(*args, **kwargs)
        chosen.append(found[0])
        return found

    for module in (modeling_gpt2, modeling_bert):
        monkeypatch.setattr(module, "choose_packing", spy)
    return chosen


PADDINGS = ("left", "right", "holes", "one row", "one token", "masked row")


def padded_inputs(row, padding):
    """Inputs with padding, the mask shaped as the ids, and the last real position of each sequence where needed."""
    batch = 1 if padding == "one row" else BATCH
    inputs = row.inputs(batch=batch)
    input_ids = inputs["input_ids"]
    rows, columns = input_ids.view(-1, LENGTH).shape[0], torch.arange(LENGTH)
    lengths = torch.tensor([[LENGTH - 2 * (index + 1) % (LENGTH - 1)] for index in range(rows)])
    mask = columns >= LENGTH - lengths
    if padding == "right":
        mask = columns < lengths
    elif padding == "holes":
        mask = (3 * columns + 2 * torch.arange(rows)[:, None]) % 4 != 0
    elif padding == "one token":
        mask[1] = columns == 4
    elif padding == "masked row":
        mask[1] = False
    mask = mask.view_as(input_ids).long()
    inputs |= {"input_ids": input_ids.masked_fill(mask == 0, VOCAB - 1), "attention_mask": mask}
    if row.index_argument is not None:
        inputs[row.index_argument] = (mask * torch.arange(LENGTH)).argmax(-1)
    return inputs


def real_labels(row, inputs):
    """Labels, of which those of tokens stand at real ones only."""
    labels = row.draw_labels(*[inputs["attention_mask"].shape[i] for i in (0, -1)])
    if "labels" in labels and labels["labels"].shape == inputs["attention_mask"].shape:
        labels["labels"] = labels["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    return labels


# Outputs of sequences, not of tokens. What they read in a row without a token is left open.
OF_SEQUENCES = ("mc_logits", "pooler_output", "seq_relationship_logits")


def compared(row, model, inputs, **kwargs):
    outputs = real_outputs(model, inputs, output_hidden_states=True, **kwargs)
    has_tokens = inputs["attention_mask"].any(-1)
    has_tokens = has_tokens if row.num_choices is None else has_tokens.all(-1)
    labels = row.draw_labels(1, LENGTH).get("labels")
    of_sequences = (*OF_SEQUENCES, "logits") if labels is not None and labels.ndim == 1 else OF_SEQUENCES
    return {name: output[has_tokens] if name in of_sequences else output for name, output in outputs.items()}


# Options that have a part in what is packed.
PACKED_OPTIONS = (
    "position_embedding_type",
    "reorder_and_upcast_attn",
    "scale_attn_by_inverse_layer_idx",
    "chunk_size_feed_forward",
    "classifier_hidden_size",
    "tie_word_embeddings",
)
OPTIONS = [
    pytest.param(row, option, id=f"{row.name}-{name_of(option)}")
    for row in ROWS.values()
    for option in row.options
    if all(name in PACKED_OPTIONS for name in option)
]


def build(row, **option):
    """For training. BERT in float64: a gradient of its norms is a small difference of large terms."""
    model = row.build(**option).train()
    return model.double() if row.config_class is CustomBertConfig else model


def ordinary_path(row):
    """Arguments that keep a batch from the unpadded path: a cache or weights of attention are asked for."""
    return {"use_cache": True} if row.has_cache else {"output_attentions": True}


def assert_same_as_ordinary(row, model, inputs, packings, **kwargs):
    """Outputs at real tokens and gradients of the unpadded path, of eager, and of the ordinary path of sdpa."""
    found = {}
    paths = (("", "sdpa", {"use_cache": False}), ("eager", "eager", {"use_cache": False}))
    for path, implementation, arguments in (*paths, ("ordinary", "sdpa", ordinary_path(row))):
        model.set_attn_implementation(implementation)
        outputs = compared(row, model, inputs, **arguments, **kwargs)
        found[path] = outputs, gradients_of(model, weighted_sum(outputs))
    assert [packing is not None for packing in packings[-3:]] == [True, False, False]
    for path in ("eager", "ordinary"):
        assert_outputs_near(found[""][0], found[path][0])
        assert_gradients_near(found[""][1], found[path][1])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("row, option", OPTIONS)
def test_unpadded_equals_ordinary_and_grad(row, option, padding, packings):
    model, inputs = build(row, **option), padded_inputs(row, padding)
    assert_same_as_ordinary(row, model, inputs, packings)


@pytest.mark.parametrize("padding", PADDINGS)
@each_model
def test_unpadded_types_and_embeddings_equal_ordinary(row, padding, packings):
    model, inputs = build(row), padded_inputs(row, padding)
    mask = inputs["attention_mask"]
    inputs["token_type_ids"] = torch.randint(0, getattr(model.config, "type_vocab_size", VOCAB), mask.shape)
    assert_same_as_ordinary(row, model, inputs, packings)
    ids = inputs.pop("input_ids")
    if row.num_choices is None:
        inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
        assert_same_as_ordinary(row, model, inputs, packings)


@pytest.mark.parametrize("padding", PADDINGS)
@each_model
def test_unpadded_states_are_zero_at_padding(row, padding, packings):
    model, inputs = row.build(), padded_inputs(row, padding)
    inputs.pop(row.index_argument, None)
    base = getattr(model, model.base_model_prefix, model)
    if row.config_class is CustomBertConfig and row.num_choices is not None:
        inputs = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
    is_padding = torch.nn.functional.pad(inputs["attention_mask"] == 0, (0, row.num_patches))
    outputs = base(**inputs, use_cache=False, output_hidden_states=True)
    assert packings[-1] is not None
    assert outputs.last_hidden_state.shape == (*is_padding.shape, model.config.hidden_size)
    assert not outputs.last_hidden_state[is_padding].any()
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    for states in outputs.hidden_states:
        assert not states.view(*is_padding.shape, -1)[is_padding].any() and states.any()


@pytest.mark.parametrize("padding", PADDINGS[:-1])
@pytest.mark.parametrize("row", LABELLED, ids=name_of)
def test_unpadded_loss_equals_ordinary_and_grad(row, padding, packings):
    model, inputs = row.build().train(), padded_inputs(row, padding)
    labels = real_labels(row, inputs)
    found = []
    for kwargs in ({}, ordinary_path(row)):
        outputs = model(**inputs, **labels, **kwargs)
        loss = outputs.loss if outputs.get("mc_loss") is None else outputs.loss + outputs.mc_loss
        found.append((loss, gradients_of(model, loss)))
    assert packings[0] is not None and packings[1] is None
    assert_near(found[0][0], found[1][0], 1e-6, scale_floor=0.0)
    assert_gradients_near(found[0][1], found[1][1])


@pytest.mark.parametrize("padding", ["left", "holes", "masked row"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@each_writer
def test_label_after_padding_is_not_predicted(row, implementation, padding):
    model, inputs = row.build(attn_implementation=implementation).train(), padded_inputs(row, padding)
    mask, labels = inputs["attention_mask"], real_labels(row, inputs)["labels"]
    loss = model(**inputs, labels=labels).loss
    logits = model.eval()(**inputs).logits
    expected = labels.clone()
    expected[:, 1:][mask[:, :-1] == 0] = -100
    assert (expected != labels).any()
    assert_near(loss, reference.next_token_loss(logits, expected), 1e-6, scale_floor=0.0)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["ForMaskedLM", "ForMaskedLM-with-images", "ForPreTraining"])
def test_masked_token_at_padding_is_not_predicted(name, implementation, padding):
    row = ROWS[f"CustomBert{name}"]
    model, inputs = row.build(attn_implementation=implementation), padded_inputs(row, padding)
    labels, is_padding = inputs["input_ids"], inputs["attention_mask"] == 0
    assert is_padding.any()
    outputs = model(**inputs, labels=labels)
    logits = outputs["prediction_logits" if name == "ForPreTraining" else "logits"]
    expected = reference.cross_entropy(logits[~is_padding], labels[~is_padding])
    for losses in (outputs, model.train()(**inputs, labels=labels)):
        assert_near(losses.loss, expected, 1e-6, scale_floor=0.0)


@pytest.mark.parametrize("encoder_padding", [None, "right", "holes", "masked row"])
@pytest.mark.parametrize("padding", ["left", "right", "masked row"])
@each_writer
def test_unpadded_cross_attention_equals_ordinary(row, padding, encoder_padding, packings):
    model = row.build(add_cross_attention=True, num_hidden_layers=2).train()
    inputs = padded_inputs(row, padding)
    inputs["encoder_hidden_states"] = torch.randn(BATCH, 5, model.config.hidden_size)
    if encoder_padding is not None:
        masks = {
            "right": [[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
            "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [1] * 5],
            "masked row": [[1] * 5, [0] * 5, [0, 0, 1, 1, 0]],
        }
        inputs["encoder_attention_mask"] = torch.tensor(masks[encoder_padding])
        if encoder_padding == "masked row":
            # What a row without a single state of the encoder reads is said by the unpadded path alone: nothing.
            inputs["attention_mask"][1] = 0
    assert_same_as_ordinary(row, model, inputs, packings)


# --- Which path ---


def with_cache(model, inputs):
    cache = model(inputs["input_ids"][:, :5], attention_mask=inputs["attention_mask"][:, :5], use_cache=True)
    return model(
        inputs["input_ids"][:, 5:], attention_mask=inputs["attention_mask"], past_key_values=cache.past_key_values
    )


ORDINARY = {
    "attentions": lambda model, inputs: (
        model.set_attn_implementation("eager") or model(**inputs, output_attentions=True, labels=inputs["input_ids"])
    ),
    "attentions of sdpa": lambda model, inputs: model(**inputs, output_attentions=True, labels=inputs["input_ids"]),
    "cache asked for": lambda model, inputs: model(**inputs, use_cache=True, labels=inputs["input_ids"]),
    "cache by default": lambda model, inputs: model(**inputs),
    "cache given": with_cache,
    "generate": lambda model, inputs: model.generate(**inputs, max_new_tokens=3, do_sample=False),
    "mask of 4 dimensions": lambda model, inputs: model(
        inputs["input_ids"], attention_mask=torch.ones(BATCH, 1, LENGTH, LENGTH).bool().tril(), use_cache=False
    ),
    "no padding": lambda model, inputs: model(inputs["input_ids"], use_cache=False),
}


@pytest.mark.parametrize("call", ORDINARY.values(), ids=ORDINARY)
@each_writer
def test_ordinary_path_is_taken(row, call, packings):
    call(row.build(), padded_inputs(row, "left"))
    assert packings and all(packing is None for packing in packings)


def test_cache_by_place_takes_ordinary_path(packings):
    inputs = padded_inputs(CAUSAL_LM, "left")
    CAUSAL_LM.build()(inputs.pop("input_ids"), None, **inputs)
    assert packings == [None]


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("row", LABELLED, ids=name_of)
def test_labels_take_unpadded_path(row, is_training, packings):
    model, inputs = row.build(use_cache=True).train(is_training), padded_inputs(row, "left")
    shapes = []
    layers = model.transformer.h if row.config_class is CustomGPT2Config else model.bert.encoder.layer
    layers[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))
    outputs = model(**inputs, **real_labels(row, inputs))
    total = int(inputs["attention_mask"].sum()) + BATCH * row.num_patches
    assert packings[-1] is not None and shapes == [(1, total)]
    assert outputs.get("past_key_values") is None


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
        *((row, option) for row in GENERATIVE for option in row.positions),
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


# --- Dropout and cost ---


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("row", [*LABELLED, QUESTION], ids=name_of)
def test_seed_repeats_dropout_exactly(row, padding):
    model = row.build(**dict.fromkeys(row.config_class.probabilities, 0.1)).train()
    inputs = padded_inputs(row, padding) if padding else row.inputs()
    labels = real_labels(row, inputs)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs = model(**inputs, **labels)
        loss = outputs.loss if outputs.get("mc_loss") is None else outputs.loss + outputs.mc_loss
        found.append({"loss": loss.detach(), **gradients_of(model, loss)})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["loss"], found[2]["loss"])


# torch counts its GPU kernels' operations and leaves out the CPU's.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *args, out_shape=None, **kwargs: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *args, out_shape=None, **kwargs: 2.5 * sdpa_flop_count(query, key, value)
    ),
}


def operations_of_step(model, input_ids, attention_mask=None, labels=None):
    if labels is None:
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(input_ids, attention_mask=attention_mask, labels=labels).loss.backward()
    found = counter.get_flop_counts()["Global"]
    assert sum("attention" in str(name) for name in found) == 2
    return sum(found.values())


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("row", [CAUSAL_LM, MASKED_LM], ids=name_of)
def test_padding_costs_no_operations(row, padding):
    model = row.build(hidden_size=64, num_hidden_layers=2).train()
    batch, length, real = 16, 32, 8
    ids, mask = torch.randint(0, VOCAB, (batch, length)), torch.zeros(batch, length, dtype=torch.long)
    columns = slice(length - real, None) if padding == "left" else slice(0, real)
    mask[:, columns] = 1
    padded, full = operations_of_step(model, ids, mask), operations_of_step(model, ids)
    alone = operations_of_step(model, ids[:, columns])
    assert padded <= 0.3 * full
    assert abs(padded - alone) <= 0.02 * alone


@pytest.mark.parametrize("name", ["ForMaskedLM", "ForPreTraining"])
def test_masked_lm_head_computes_labelled_positions_alone(name):
    row = ROWS[f"CustomBert{name}"]
    model, ids = row.build().train(), row.inputs()["input_ids"]
    width, found = model.config.hidden_size, []
    for count in (1, 3, LENGTH):
        labels = ids.masked_fill(torch.arange(LENGTH) >= count, -100)
        found.append(operations_of_step(model, ids, labels=labels))
    # Forwards and to both gradients: the transform and the vocabulary's logits, two operations a weight.
    each = 3 * 2 * (width * width + width * VOCAB) * BATCH
    assert [operations - found[0] for operations in found] == [0, 2 * each, (LENGTH - 1) * each]


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
