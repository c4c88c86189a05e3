"""word2vec: the loss and its closed form, the fast updates, draws against their formulas, neighbours, files of vectors.

What the conformance suite checks of models that read sequences is checked here of this one, which reads pairs.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import WORD2VEC
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer

import hf_custom
from hf_custom import CustomWord2VecConfig, CustomWord2VecForPreTraining, CustomWord2VecModel
from hf_custom.modeling_word2vec import vocabulary_digest, words_of_tokenizer
from training.word_pairs import (
    AliasTable,
    Corpus,
    Sampler,
    choose_vocabulary,
    count_words,
    explicit_pairs,
    keep_probabilities,
    make_tokenizer,
    noise_probabilities,
    read_corpus,
)
from training.word_trainer import Chunks, ChunkUpdates
from training.word_updates import Tables, cbow_updates, skip_gram_updates, words_per_update

VOCAB, WIDTH, WINDOW = WORD2VEC["vocab_size"], WORD2VEC["hidden_size"], WORD2VEC["window_size"]
UNKNOWN = VOCAB - 1
OBJECTIVES = ("skip_gram", "cbow")
WORDS = [f"word{number}" for number in range(VOCAB - 1)]

each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def build(model_class=CustomWord2VecForPreTraining, **fields):
    """A tiny model with wide weights; the vector of unknown words stays zero."""
    model = model_class(CustomWord2VecConfig(**{**WORD2VEC, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
            parameter[UNKNOWN] = 0
    return model.eval()


def tables_of(model, dtype=torch.float32):
    return Tables(model.word2vec.embeddings.weight.data.to(dtype), model.output_embeddings.weight.data.to(dtype))


def text(length=300, ends=(7, 8, 60, 200, 300), seed=0):
    """Ids, frequent ones more often, and where sentences end."""
    ids = (np.random.default_rng(seed).random(length) ** 2 * (VOCAB - 1)).astype(np.int32)
    return ids, np.array(ends)


def sampler(num_shared=3, group_size=8, seed=1, **fields):
    config = CustomWord2VecConfig(**{**WORD2VEC, **fields})
    counts = np.bincount(text(5000, (5000,))[0], minlength=VOCAB)
    return Sampler.of(config, counts, num_shared, group_size, seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("word2vec")
    build(vocabulary_sha256=vocabulary_digest([*WORDS, "<unk>"])).save_pretrained(path)
    make_tokenizer(WORDS).save_pretrained(path)
    return path


# --- The loss ---


def sigmoid(value):
    return 1 / (1 + np.exp(-value))


def closed_form(inputs, outputs, pairs, objective, whole_error):
    """Loss and gradients of both tables in float64, a pair after the other: d/d score = σ(score) - label (Mikolov et
    al. 2013b, equation 4)."""
    grad_inputs, grad_outputs, loss = np.zeros_like(inputs), np.zeros_like(outputs), 0.0
    for center, context, noise in pairs:
        predicted, given = (center, context) if objective == "cbow" else (context[0], [center])
        mean = inputs[given].mean(0)
        error = np.zeros_like(mean)
        for word, label in [(predicted, 1), *((word, 0) for word in noise if word != predicted)]:
            score = mean @ outputs[word]
            loss -= np.log(sigmoid(score if label else -score))
            error += (sigmoid(score) - label) * outputs[word]
            grad_outputs[word] += (sigmoid(score) - label) * mean
        for word in given:
            grad_inputs[word] += error if whole_error else error / len(given)
    return loss / len(pairs), grad_inputs / len(pairs), grad_outputs / len(pairs)


@pytest.mark.parametrize(
    ("objective", "whole_error"), [("skip_gram", True), ("cbow", True), ("cbow", False)], ids=["sg", "cbow", "mean"]
)
def test_loss_matches_the_closed_form_and_grad(objective, whole_error):
    model = build(objective=objective, whole_cbow_error=whole_error).double()
    # Context words that repeat, noise that is the word to predict, noise that repeats.
    pairs = [(3, [4, 5, 4], [7, 3, 4]), (4, [3], [3, 3, 9]), (3, [8, 1], [0, 2, 2])]
    if objective == "skip_gram":
        pairs = [(center, context[:1], noise) for center, context, noise in pairs]
        context, options = torch.tensor([context[0] for _, context, _ in pairs]), {}
    else:
        context = torch.tensor([[4, 5, 4], [3, 0, 0], [8, 1, 0]])
        options = {"context_mask": torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])}
    centers, noise = torch.tensor([row[0] for row in pairs]), torch.tensor([row[2] for row in pairs])
    output = model(centers, context, noise, **options)
    output.loss.backward()
    inputs, outputs = model.word2vec.embeddings.weight, model.output_embeddings.weight
    loss, *gradients = closed_form(inputs.detach().numpy(), outputs.detach().numpy(), pairs, objective, whole_error)
    assert output.loss.item() == pytest.approx(loss, abs=1e-12)
    for parameter, gradient in zip((inputs, outputs), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, torch.from_numpy(gradient), atol=1e-12, rtol=0)
    assert output.logits.shape == (3, 4)


def test_noise_counts_by_its_weight():
    model, ids = build(objective="skip_gram"), torch.tensor([1, 2])
    noise = torch.tensor([[5, 6, 6], [7, 8, 8]])
    weights = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    torch.testing.assert_close(
        model(ids, ids + 2, noise).loss, model(ids, ids + 2, noise[:, :2], negative_weights=weights).loss
    )


def test_words_without_context_have_a_mean_of_zero():
    model = build()
    output = model(torch.tensor([1]), torch.tensor([[2]]), torch.tensor([[3]]), context_mask=torch.tensor([[0]]))
    assert output.logits.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("objective", "arguments", "words"),
    [
        ("skip_gram", ([1, 2], [[1], [2]], [[1], [2]]), ["context_ids", "skip_gram"]),
        ("cbow", ([1, 2], [1, 2], [[1], [2]]), ["context_ids", "cbow"]),
        ("cbow", ([1, 2], [[1]], [[1], [2]]), ["context_ids", "(2, C)"]),
        ("skip_gram", ([1, 2], [1, 2], [1, 2]), ["negative_ids", "(2, K)"]),
        ("skip_gram", ([[1, 2]], [1], [[1]]), ["center_ids"]),
        ("skip_gram", ([VOCAB], [1], [[1]]), ["center_ids", str(VOCAB), "row 0"]),
        ("skip_gram", ([1], [-1], [[1]]), ["context_ids", "-1"]),
        ("skip_gram", ([1], [1], [[VOCAB + 3]]), ["negative_ids", str(VOCAB + 3)]),
    ],
)
def test_bad_pairs_are_refused(objective, arguments, words):
    with pytest.raises(ValueError) as error:
        build(objective=objective)(*(torch.tensor(argument) for argument in arguments))
    assert all(word in str(error.value) for word in words)


def test_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="context_mask.*context_ids"):
        build()(torch.tensor([1]), torch.tensor([[2]]), torch.tensor([[3]]), context_mask=torch.ones(1, 2))


# --- The fast updates ---


def update_all(model, draw, tables, learning_rate, num_words=None, with_loss=False):
    """All updates of a draw; the sum of their losses."""
    config, losses = model.config, []
    if config.objective == "cbow":
        size = num_words or len(draw.noise) * draw.group_size
        updates = cbow_updates(draw, WINDOW, config.num_negatives, UNKNOWN, config.whole_cbow_error, size)
    else:
        whole = skip_gram_updates(draw, WINDOW, config.num_negatives, UNKNOWN)
        groups = (num_words or len(draw.noise) * draw.group_size) // draw.group_size
        updates = [whole[start : start + groups] for start in range(0, len(draw.noise), groups)]
    for update in updates:
        losses.append(update.apply(tables, learning_rate, with_loss=with_loss))
    return float(sum(losses)) if with_loss else None


def autograd(model, draw):
    """Loss, summed over pairs, and gradients by the model's own forward."""
    model.zero_grad()
    total = 0.0
    for pairs in explicit_pairs(draw, model.config.objective):
        weights = torch.full(pairs["negative_ids"].shape, model.config.num_negatives / draw.noise.shape[1])
        loss = model(**pairs, negative_weights=weights).loss * len(pairs["center_ids"])
        loss.backward()
        total += loss.item()
    return total, model.word2vec.embeddings.weight.grad, model.output_embeddings.weight.grad


@pytest.mark.parametrize("num_shared", [1, 3, 8])
@pytest.mark.parametrize(
    ("objective", "whole_error"), [("skip_gram", True), ("cbow", True), ("cbow", False)], ids=["sg", "cbow", "mean"]
)
def test_update_matches_autograd(objective, whole_error, num_shared):
    """Given the same pairs, noise and weights; noise that is predicted among them."""
    model = build(objective=objective, whole_cbow_error=whole_error)
    draw = sampler(num_shared).draw(*text(), 0, 0)
    assert len(draw.words) % draw.group_size and len(draw.words) > 100
    total, grad_inputs, grad_outputs = autograd(model, draw)
    before, after = tables_of(model, torch.float64), tables_of(model, torch.float64)
    draws = update_all(model, draw, after, 1.0)
    assert draws is None
    for old, new, gradient in (
        (before.inputs, after.inputs, grad_inputs),
        (before.outputs, after.outputs, grad_outputs),
    ):
        torch.testing.assert_close(old - new, gradient.double(), atol=1e-4, rtol=1e-4)
        assert gradient.abs().max() > 1
    assert update_all(model, draw, tables_of(model), 0.0, with_loss=True) == pytest.approx(total, rel=1e-5)


@each_objective
def test_collisions_of_noise_are_drawn(objective):
    """The draw of the test above would not be worth much without them."""
    hits = 0
    for pairs in explicit_pairs(sampler().draw(*text(), 0, 0), objective):
        predicted = pairs["center_ids" if objective == "cbow" else "context_ids"]
        hits += int((pairs["negative_ids"] == predicted[:, None]).sum())
    assert hits > 5


@each_objective
def test_updates_in_parts_have_the_pairs_of_the_whole(objective):
    """Windows reach over the border of two updates: with short steps the order does not matter."""
    model, draw, rate = build(objective=objective), sampler().draw(*text(), 0, 0), 1e-5
    whole, parts = tables_of(model, torch.float64), tables_of(model, torch.float64)
    before = tables_of(model, torch.float64)
    update_all(model, draw, whole, rate)
    update_all(model, draw, parts, rate, num_words=16)
    for old, one, other in (
        (before.inputs, whole.inputs, parts.inputs),
        (before.outputs, whole.outputs, parts.outputs),
    ):
        torch.testing.assert_close((one - old) / rate, (other - old) / rate, atol=2e-2, rtol=1e-3)


@each_objective
def test_row_of_unknown_words_stays_zero(objective):
    model = build(objective=objective)
    tables = tables_of(model)
    for chunk in range(3):
        update_all(model, sampler().draw(*text(seed=chunk), 0, chunk), tables, 0.1)
    assert tables.inputs[UNKNOWN].abs().max() == tables.outputs[UNKNOWN].abs().max() == 0
    assert tables.inputs.isfinite().all() and tables.outputs.isfinite().all()


@each_objective
@pytest.mark.parametrize(("length", "ends"), [(1, (1,)), (2, (1, 2)), (3, (1, 3))])
def test_lonely_words_change_nothing_but_are_no_error(objective, length, ends):
    model, tables = build(objective=objective), tables_of(build(objective=objective))
    before = tables.inputs.clone()
    draw = sampler(subsample_threshold=0).draw(*text(length, ends), 0, 0)
    update_all(model, draw, tables, 1.0)
    assert (draw.num_pairs > 0) == (not torch.equal(tables.inputs, before))


@each_objective
def test_chunk_that_subsampling_empties(objective):
    tables = tables_of(build(objective=objective))
    draw = sampler(subsample_threshold=1e-9).draw(*text(20, (20,)), 0, 0)
    assert len(draw.words) == 0 and len(draw.noise) == 0
    corpus = Corpus(text(20, (20,))[0], np.array([20]), 20)
    config = CustomWord2VecConfig(**{**WORD2VEC, "objective": objective, "subsample_threshold": 1e-9})
    updates = ChunkUpdates(config, Chunks(corpus, 20), np.bincount(corpus.ids, minlength=VOCAB), 0, 0.1)
    assert updates.run(tables, 0, [0, 0], 0.1) == 0.0


def test_frequent_words_shorten_the_updates():
    counts = np.array([1000, *[10] * 200])
    config = CustomWord2VecConfig(vocab_size=202, subsample_threshold=0)
    few = words_per_update(config, counts, 16, 0.025)
    more = words_per_update(config, np.full(201, 10), 16, 0.025)
    assert 16 <= few < more and few % 16 == more % 16 == 0
    config.objective = "cbow"
    assert words_per_update(config, counts, 32, 0.025) > few
    assert words_per_update(config, counts, 32, 0.025) < words_per_update(config, counts, 32, 0.005)
    assert words_per_update(config, np.array([5, 5]), 32, 10.0) == 32


# --- Draws ---


def test_keep_probabilities_are_those_of_the_c_code():
    counts, threshold = np.array([100_000, 5000, 100, 3, 1]), 1e-3
    # In the form in which the C code writes it.
    expected = [
        min(1, (np.sqrt(count / (threshold * counts.sum())) + 1) * (threshold * counts.sum()) / count)
        for count in counts
    ]
    np.testing.assert_allclose(keep_probabilities(counts, threshold), expected, rtol=1e-12)
    # The paper's term (equation 5) and the one that the code adds.
    share = counts[0] / counts.sum()
    assert keep_probabilities(counts, threshold)[0] == pytest.approx(np.sqrt(threshold / share) + threshold / share)
    assert keep_probabilities(counts, 0).tolist() == [1] * 5
    assert np.isfinite(keep_probabilities(np.array([5, 0]), threshold)).all()


def test_words_are_kept_at_their_rate():
    ids = np.repeat(np.arange(4, dtype=np.int32), (40_000, 8000, 1500, 500))
    counts = np.bincount(ids)
    config = CustomWord2VecConfig(vocab_size=5, subsample_threshold=0.01)
    drawn = Sampler.of(config, np.append(counts, 0), 4, 16, 0).draw(ids, np.array([len(ids)]), 0, 0)
    kept, rates = np.bincount(drawn.words, minlength=4), keep_probabilities(counts, 0.01)
    assert rates[0] < 0.2 and rates[3] == 1 and kept[3] == 500
    # Four standard deviations of a binomial.
    assert (np.abs(kept - counts * rates) <= 4 * np.sqrt(counts * rates * (1 - rates))).all()


@pytest.mark.parametrize("exponent", [0.75, 0.0, 1.0])
def test_alias_table_has_the_distribution(exponent):
    counts = np.array([5, 900, 1, 44, 44, 3000, 7])
    expected = counts**exponent / (counts**exponent).sum()
    probabilities = noise_probabilities(counts, exponent)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    table = AliasTable(probabilities)
    found = table.threshold.astype(float) / len(counts)
    np.add.at(found, table.alias, (1 - table.threshold.astype(float)) / len(counts))
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_noise_follows_its_formula():
    counts = np.array([400, 100, 50, 10, 1, 0])
    drawn = AliasTable(noise_probabilities(counts, 0.75)).draw(np.random.default_rng(0), 200_000)
    expected = noise_probabilities(counts, 0.75) * len(drawn)
    found = np.bincount(drawn, minlength=6)
    assert found[5] == 0
    assert stats.chisquare(found[:5], expected[:5]).pvalue > 0.001


def test_windows_are_uniform_and_end_with_sentences():
    ids, ends = text(30_000, (10_000, 30_000))
    draw = sampler(subsample_threshold=0).draw(ids, ends, 0, 0)
    inner = slice(WINDOW, 10_000 - WINDOW)
    assert (draw.left[inner] == draw.right[inner]).all()
    widths = np.bincount(draw.left[inner], minlength=WINDOW + 1)
    assert widths[0] == 0
    assert stats.chisquare(widths[1:]).pvalue > 0.001
    for start, end in ((0, 10_000), (10_000, 30_000)):
        assert draw.left[start] == draw.right[end - 1] == 0
        assert draw.left[start + 1] == draw.right[end - 2] == 1


def test_pairs_are_those_of_a_plain_loop():
    draw = sampler().draw(*text(), 0, 0)
    expected = []
    for place, word in enumerate(draw.words):
        for other in range(place - draw.left[place], place + draw.right[place] + 1):
            if other != place:
                expected.append((int(word), int(draw.words[other])))
    found = []
    for pairs in explicit_pairs(draw, "skip_gram"):
        found += zip(pairs["center_ids"].tolist(), pairs["context_ids"].tolist(), strict=True)
    assert found == expected and draw.num_pairs == len(expected)


def test_draw_is_a_function_of_seed_epoch_and_chunk():
    ids, ends = text()

    def of(seed, epoch, chunk):
        draw = sampler(seed=seed).draw(ids, ends, epoch, chunk)
        return [part.tolist() for part in (draw.words, draw.left, draw.noise)]

    first = of(1, 0, 0)
    assert of(1, 0, 0) == first
    for other in (of(2, 0, 0), of(1, 1, 0), of(1, 0, 1)):
        assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))


# --- Text as numbers ---


def test_tokenizer_numbers_words_by_frequency_and_is_saved(tmp_path):
    texts = ["The cat saw the dog.", "A dog, a dog!"]
    counts = count_words(texts, make_tokenizer([]).backend_tokenizer)
    words = choose_vocabulary(counts, 2)
    assert words == ["dog", "a", "the"]
    tokenizer = make_tokenizer(words)
    assert tokenizer("THE dog ate").input_ids == [2, 0, 3]
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id, len(tokenizer)) == (3, 3, 4)
    tokenizer.save_pretrained(tmp_path)
    CustomWord2VecConfig(vocab_size=4).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(["The cat", "a"], padding=True).input_ids == [[2, 3], [1, 3]]
    assert words_of_tokenizer(loaded) == [*words, "<unk>"]
    kept = make_tokenizer(["The", "dog."], split="whitespace", lower_case=False)
    assert kept("The dog. the").input_ids == [0, 1, 2]


def test_corpus_has_the_ids_of_the_tokenizer():
    tokenizer = make_tokenizer(["a", "b", "ç", "naïve"])
    texts = ["A b x\u00a0Ç", "", "naïve NAÏVE, b", "x y"]
    corpus = read_corpus(texts, tokenizer, max_sentence_length=1000)
    ids = [index for row in texts for index in tokenizer(row).input_ids]
    assert corpus.ids.tolist() == [index for index in ids if index != tokenizer.unk_token_id]
    assert corpus.ends.tolist() == [3, 6] and corpus.num_words == len(ids)


def test_long_sentences_are_cut_by_their_words_known_or_not():
    tokenizer = make_tokenizer(["a", "b"])
    corpus = read_corpus(["a x b", " ".join(["a", "x", "b", "a", "x", "x", "b"])], tokenizer, max_sentence_length=3)
    # a x b | a x b | a x x | b
    assert corpus.ends.tolist() == [2, 4, 5, 6]
    whole = read_corpus(["a b " * 3], tokenizer, max_sentence_length=3)
    assert whole.ends.tolist() == [3, 6]


def test_chunks_are_whole_sentences():
    ends = np.cumsum([3, 3, 10, 1, 1, 7])
    corpus = Corpus(np.arange(25, dtype=np.int32), ends, 25)
    chunks = Chunks(corpus, size=6)
    assert chunks.ends.tolist() == [6, 18, 25] and len(chunks) == 3
    assert [chunks.words(number)[1].tolist() for number in range(3)] == [[3, 6], [10, 11, 12], [7]]
    assert np.concatenate([chunks.words(number)[0] for number in range(3)]).tolist() == list(range(25))
    batch = chunks.collate([chunks[0], chunks[2]])
    assert batch["center_ids"].tolist() == [*range(6), *range(18, 25)] and batch["chunks"] == [0, 2]
    assert len(Chunks(corpus, 6, held_out=0.6)) == 1 and list(Chunks(corpus, 6, held_out=0.01).held_out) == [2]
    assert chunks[1] != Chunks(Corpus(corpus.ids[::-1].copy(), ends, 25), 6)[1]


@pytest.mark.parametrize(
    ("counts", "options", "words"),
    [
        ({}, {}, ["no words"]),
        ({"only": 9}, {}, ["one word alone", "only"]),
        ({"a": 3, "b": 2}, {"min_count": 4}, ["--min_count 4", "leaves 0 of 2", "3 times"]),
        ({"a": 3, "b": 2}, {"min_count": 3}, ["leaves 1 of 2"]),
        ({"a": 3, "b": 2}, {"min_count": 0}, ["--min_count is 0"]),
        ({"a": 3, "b": 2}, {"max_words": 1}, ["two words"]),
    ],
)
def test_vocabulary_that_is_none_is_refused(counts, options, words):
    with pytest.raises(ValueError) as error:
        choose_vocabulary(counts, **{"min_count": 1, **options})
    assert all(word in str(error.value) for word in words)


def test_corpus_without_known_words_is_refused():
    with pytest.raises(ValueError, match="no word of the vocabulary"):
        read_corpus(["x y"], make_tokenizer(["a", "b"]), 10)


# --- Neighbours ---


def cosines(model, positive, negative):
    vectors = model.embeddings.weight.detach().double().numpy()
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    target = unit[positive].sum(0) - unit[negative].sum(0)
    return unit @ (target / np.linalg.norm(target))


@pytest.mark.parametrize(("positive", "negative", "restrict"), [([3], [], None), ([3, 9], [4], None), ([3], [7], 10)])
def test_most_similar_matches_naive(positive, negative, restrict):
    model = build(CustomWord2VecModel)
    scores = cosines(model, positive, negative)
    left = [index for index in range(restrict or UNKNOWN) if index not in positive + negative]
    expected = sorted(left, key=lambda index: -scores[index])[:5]
    found = model.most_similar(positive, negative, topn=5, restrict_vocab=restrict)
    assert [index for index, _ in found] == expected
    np.testing.assert_allclose([value for _, value in found], scores[expected], atol=1e-6)


def test_words_and_ids_are_asked_alike(folder):
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    by_id = model.most_similar([3, 4], [5], topn=4)
    by_word = model.most_similar(["word3", "WORD4"], ["word5"], topn=4, tokenizer=tokenizer)
    assert by_word == [(WORDS[index], value) for index, value in by_id]
    assert model.analogy(5, 3, 4) == model.most_similar([3, 4], [5], topn=1)
    assert model.analogy("word5", "word3", "word4", tokenizer=tokenizer)[0][0] == by_word[0][0]
    assert model.similarity(3, 4) == pytest.approx(model.similarity("word3", "word4", tokenizer), abs=1e-7)
    assert model.similarity(3, 3) == pytest.approx(1, abs=1e-6)
    assert len(model.most_similar(3, topn=1000)) == UNKNOWN - 1
    assert model.most_similar(3, topn=1) == model.most_similar([3], topn=1)


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda model, tokenizer: model.most_similar("wrd3", tokenizer=tokenizer), ValueError, ["'wrd3'", "'word3'"]),
        (lambda model, tokenizer: model.analogy("word1", "<unk>", "word2", tokenizer=tokenizer), ValueError, ["<unk>"]),
        (lambda model, tokenizer: model.similarity("word1", "qqqq", tokenizer), ValueError, ["'qqqq'", "unknown"]),
        (lambda model, tokenizer: model.most_similar("word3"), TypeError, ["tokenizer"]),
        (lambda model, tokenizer: model.most_similar(VOCAB), ValueError, [str(VOCAB), str(VOCAB - 1)]),
        (lambda model, tokenizer: model.most_similar([]), ValueError, ["no word"]),
        (lambda model, tokenizer: model.most_similar(1, topn=0), ValueError, ["topn"]),
        (
            lambda model, tokenizer: model.most_similar(1, tokenizer=make_tokenizer(WORDS[:-1])),
            ValueError,
            ["40", "41"],
        ),
        (
            lambda model, tokenizer: model.most_similar(1, tokenizer=make_tokenizer(WORDS[::-1])),
            ValueError,
            ["vocabulary_sha256"],
        ),
    ],
)
def test_bad_questions_are_refused(folder, ask, error, words):
    with pytest.raises(error) as found:
        ask(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    assert all(word in str(found.value) for word in words)


# --- What the conformance suite does of models of sequences ---


def test_input_vectors_are_looked_up():
    model = build(CustomWord2VecModel)
    ids, mask = torch.tensor([[1, UNKNOWN, 3], [4, 5, 6]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    states = model(ids, attention_mask=mask).last_hidden_state
    table = model.embeddings.weight
    assert torch.equal(states[0], table[ids[0]]) and states[0, 1].abs().max() == 0
    assert torch.equal(states[1, :2], table[ids[1, :2]]) and states[1, 2].abs().max() == 0
    assert torch.equal(model(inputs_embeds=table[ids]).last_hidden_state, table[ids])
    assert model(ids, return_dict=False)[0].shape == (2, 3, WIDTH)
    assert model.to(torch.bfloat16)(ids).last_hidden_state.dtype == torch.bfloat16
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": table[ids]}, {"input_ids": ids + VOCAB}):
        with pytest.raises(ValueError):
            model(**arguments)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=mask[:1])


@each_objective
def test_vectors_start_as_the_configuration_says(objective):
    config = CustomWord2VecConfig(vocab_size=2000, hidden_size=50, objective=objective, initializer_range=2.0)
    model = CustomWord2VecForPreTraining(config)
    weight = model.word2vec.embeddings.weight
    assert weight[-1].abs().max() == 0 and model.output_embeddings.weight.abs().max() == 0
    assert 0.039 < weight.max() <= 0.04 and -0.04 <= weight.min() < -0.039
    assert weight[:-1].std().item() == pytest.approx(0.04 / np.sqrt(3), rel=0.02)
    with torch.device("meta"):
        empty = CustomWord2VecForPreTraining(config)
    empty.to_empty(device="cpu").init_weights()
    torch.manual_seed(0)
    assert empty.word2vec.embeddings.weight.abs().max() <= 0.04 and empty.output_embeddings.weight.abs().max() == 0


def test_saved_models_load_again(folder, tmp_path):
    model, report = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert type(model) is CustomWord2VecForPreTraining and not any(report.values())
    base, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(base) is CustomWord2VecModel and not report["missing_keys"]
    assert torch.equal(base.embeddings.weight, model.word2vec.embeddings.weight)
    base.save_pretrained(tmp_path)
    again, report = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"output_embeddings.weight"}
    assert torch.equal(again.word2vec.embeddings.weight, base.embeddings.weight)
    assert again.output_embeddings.weight.abs().max() == 0


def test_every_parameter_gets_a_gradient():
    model = build(objective="skip_gram")
    model(torch.tensor([1]), torch.tensor([2]), torch.tensor([[3]])).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_tables_grow_together():
    model = build()
    before = model.word2vec.embeddings.weight.clone()
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert model.word2vec.embeddings.weight.shape == model.output_embeddings.weight.shape == (VOCAB + 3, WIDTH)
    assert torch.equal(model.word2vec.embeddings.weight[:VOCAB], before) and model.config.vocab_size == VOCAB + 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"window_size": 0}, ["window_size", "0"]),
        ({"num_negatives": 0}, ["num_negatives"]),
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"hidden_size": -4}, ["hidden_size", "-4"]),
        ({"vocab_size": 0}, ["vocab_size"]),
        ({"objective": "glove"}, ["objective", "cbow"]),
        ({"subsample_threshold": -1.0}, ["subsample_threshold"]),
        ({"unk_token_id": VOCAB}, ["unk_token_id"]),
        ({"window_sizes": 3}, ["window_size"]),
        ({"vector_size": 300}, ["vector_size", "hidden_size"]),
        ({"vocab_size": 2**24, "hidden_size": 2**17}, ["parameters", "vocab_size"]),
    ],
)
def test_bad_configuration_is_refused(fields, words):
    with pytest.raises(ValueError) as error:
        CustomWord2VecConfig(**{**WORD2VEC, **fields})
    assert all(word in str(error.value) for word in words)


def test_field_that_was_changed_is_refused_before_memory_is_taken():
    config = CustomWord2VecConfig(**WORD2VEC)
    config.vocab_size = 2**40
    with pytest.raises(ValueError, match="vocab_size"):
        CustomWord2VecForPreTraining(config)


@pytest.mark.parametrize("words", [WORDS[:-1], [*WORDS, "more"], WORDS[::-1]], ids=["fewer", "more", "other order"])
def test_vocabulary_file_that_disagrees_with_the_weights_is_refused(folder, tmp_path, words):
    CustomWord2VecForPreTraining.from_pretrained(folder).save_pretrained(tmp_path)
    make_tokenizer(words).save_pretrained(tmp_path)
    for auto_class in (AutoModel, AutoModelForPreTraining):
        with pytest.raises(ValueError, match="tokenizer.json.*saved with them"):
            auto_class.from_pretrained(tmp_path)


REMOTE = """
import sys
sys.modules["hf_custom"] = None
import torch
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer
folder, target = sys.argv[1:]
case = torch.load(folder + "/case.pt")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
for auto in (AutoModel, AutoModelForPreTraining):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    base = model.base_model
    assert torch.equal(base(case["ids"]).last_hidden_state, case["states"])
    assert base.most_similar("word3", tokenizer=tokenizer) == case["near"]
assert torch.equal(model(*case["pairs"]).loss, case["loss"])
model.save_pretrained(target)
print("same")
"""


def test_code_on_the_hub_runs_alone(folder, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = AutoModelForPreTraining.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, UNKNOWN]])
    pairs = (torch.tensor([1, 2]), torch.tensor([[3, 4], [5, 6]]), torch.tensor([[7, 8], [1, 9]]))
    case = {
        "ids": ids,
        "states": model.word2vec(ids).last_hidden_state,
        "near": model.word2vec.most_similar("word3", tokenizer=tokenizer),
        "pairs": pairs,
        "loss": model(*pairs).loss,
    }
    torch.save(case, tmp_path / "case.pt")
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.stdout.strip().endswith("same"), run.stderr
    assert (tmp_path / "again" / "modeling_word2vec.py").is_file()


# --- Where the package knows its families ---


def test_presets_and_inspection_know_word2vec(folder):
    from hf_custom.inspection import inspect
    from hf_custom.presets import preset_config

    assert preset_config("cbow-mini").objective == "cbow" and preset_config("word2vec-news").hidden_size == 300
    assert "without gradients" in inspect(str(folder))
    with pytest.raises(ValueError, match="no stock counterpart"):
        hf_custom.export_to_stock(AutoModel.from_pretrained(folder), folder / "stock")
