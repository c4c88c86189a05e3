"""Masks: what is chosen and what becomes of it, checked exactly, and that nothing but seed, epoch and row decides."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from training.masking import IGNORED, MaskedRows, Masker, choose_tokens, random_numbers
from training.segments import FOLLOWS, RANDOM, fit, pairs_of_document, tokenize_pairs, tokenize_segments
from training.tokenizer import train_tokenizer

TEXT = "Walking walkers walked. They talk, talked and were talking! Is it unwalkable? It is."


@pytest.fixture(scope="module")
def tokenizer():
    words = ["walk", "talk", "and", "the", "were", "is", "it", "they", "un"]
    forms = [word + ending for word in words for ending in ("", "ed", "ing", "er", "ers", "able")]
    return train_tokenizer(iter([" ".join(forms), TEXT]), "wordpiece", 300)


def masked_many(masker, ids, times=4000):
    pairs = [masker(ids, random_numbers(0, epoch)) for epoch in range(times)]
    return np.stack([masked for masked, _ in pairs]), np.stack([labels for _, labels in pairs])


def test_shares_are_those_of_the_paper(tokenizer):
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    ids = np.concatenate([[tokenizer.cls_token_id], ordinary[:90], [tokenizer.sep_token_id, tokenizer.pad_token_id]])
    masked, labels = masked_many(Masker(tokenizer, 0.15, False), ids)
    chosen = labels != IGNORED
    assert (labels[chosen] == np.broadcast_to(ids, labels.shape)[chosen]).all()
    assert (masked[~chosen] == np.broadcast_to(ids, labels.shape)[~chosen]).all()
    assert not chosen[:, [0, -2, -1]].any()
    # 13.5 of 90 tokens: 13 or 14 in each row, and each place alike.
    assert set(chosen.sum(1)) == {13, 14}
    assert abs(chosen.sum(1).mean() - 13.5) < 0.05
    assert abs(chosen[:, 1:-2].mean(0) - 0.15).max() < 0.03
    became_mask = (masked == tokenizer.mask_token_id)[chosen].mean()
    kept = (masked == labels)[chosen].mean()
    assert abs(became_mask - 0.8) < 0.01 and abs(kept - 0.1) < 0.01
    others = masked[chosen & (masked != tokenizer.mask_token_id) & (masked != labels)]
    assert not set(others) & set(tokenizer.all_special_ids)
    assert len(set(others)) > 0.9 * len(ordinary)


def test_one_token_at_least_is_chosen():
    maskable = np.array([False, True, False])
    for key in range(50):
        assert choose_tokens(maskable, None, 0.01, random_numbers(0, key)).tolist() == [1]
        long_word = choose_tokens(np.ones(6, bool), np.array([0, 1, 1, 1, 1, 1], bool), 0.15, random_numbers(0, key))
        assert long_word.tolist() == [0, 1, 2, 3, 4, 5]


def test_whole_words_are_chosen_whole():
    # A piece that begins a row, two words, a special token, and a piece behind it.
    continues = np.array([1, 0, 1, 1, 0, 0, 1, 1], bool)
    maskable = np.array([1, 1, 1, 1, 1, 0, 1, 1], bool)
    words = [{0}, {1, 2, 3}, {4}, {6, 7}]
    seen = set()
    for key in range(300):
        chosen = set(choose_tokens(maskable, continues, 0.4, random_numbers(1, key)).tolist())
        parts = [number for number, word in enumerate(words) if word <= chosen]
        assert chosen == set().union(*(words[number] for number in parts)) and 1 <= len(chosen) <= 3
        seen.add(tuple(parts))
    assert {(1,), (0, 3), (2, 3), (0, 2)} <= seen


def test_share_of_whole_words_is_kept(tokenizer):
    ids = np.array(tokenizer(TEXT * 4)["input_ids"])
    _, labels = masked_many(Masker(tokenizer, 0.15, True), ids, 1000)
    count = (~np.isin(ids, tokenizer.all_special_ids)).sum()
    share = (labels != IGNORED).sum(1).mean() / count
    assert 0.13 < share < 0.151


def test_tokenizers_that_cannot_be_masked_are_refused(tokenizer):
    bpe = train_tokenizer(iter([TEXT]), "bpe", 300)
    with pytest.raises(ValueError, match="no `mask_token`"):
        Masker(bpe, 0.15, False)
    bpe.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    with pytest.raises(ValueError, match="--whole_word_masking needs a WordPiece"):
        Masker(bpe, 0.15, True)
    with pytest.raises(ValueError, match="--mlm_probability is 0.0"):
        Masker(tokenizer, 0.0, False)


@pytest.fixture
def rows(tokenizer):
    texts = Dataset.from_dict({"text": [TEXT] * 12})
    return tokenize_segments(texts, tokenizer, "text", 40)


def read(dataset, loader=None):
    loader = loader or DataLoader(dataset, batch_size=3, collate_fn=list)
    return [(row["input_ids"], row["labels"]) for batch in loader for row in batch]


def test_masks_are_of_seed_epoch_and_row(rows, tokenizer):
    masker = Masker(tokenizer, 0.15, False)
    first = MaskedRows(rows, masker, seed=1)
    straight = read(first)
    # The same text stands in all rows, masked in many ways.
    assert len({str(row) for row in straight}) > len(straight) / 2
    assert read(MaskedRows(rows, masker, seed=1)) == straight
    assert [(first[3]["input_ids"], first[3]["labels"])] == straight[3:4]
    assert read(MaskedRows(rows, masker, seed=2)) != straight
    first.start_epoch(1)
    assert read(first) != straight
    first.start_epoch(0)
    assert read(first) == straight
    assert read(MaskedRows(rows, masker, seed=1, fixed=True)) != straight


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_hear_of_the_epoch(rows, tokenizer, persistent):
    masker = Masker(tokenizer, 0.15, False)
    dataset, alone = MaskedRows(rows, masker, seed=1), MaskedRows(rows, masker, seed=1)
    loader = DataLoader(dataset, batch_size=2, collate_fn=list, num_workers=2, persistent_workers=persistent)
    epochs = []
    for epoch in range(3):
        dataset.start_epoch(epoch)
        alone.start_epoch(epoch)
        epochs.append(read(dataset, loader))
        assert epochs[-1] == read(alone)
    assert epochs[0] != epochs[1] != epochs[2]


def test_segments_are_the_documents_cut(tokenizer):
    texts = ["", TEXT, "\n", TEXT * 5, "數數"]
    rows = tokenize_segments(Dataset.from_dict({"text": texts, "other": [0] * 5}), tokenizer, "text", 16)
    assert rows.column_names == ["input_ids"]
    found = [row["input_ids"] for row in rows]
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in found)
    assert max(map(len, found)) == 16 and min(map(len, found)) < 16
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TEXT, TEXT * 5)]
    assert [token for row in found for token in row[1:-1]] == pieces[0] + pieces[1]
    # No row holds the end of one document and the start of the next.
    assert -(-len(pieces[0]) // 14) + -(-len(pieces[1]) // 14) == len(found)


def test_text_without_a_known_word_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no word that the tokenizer knows"):
        tokenize_segments(Dataset.from_dict({"text": ["數", ""]}), tokenizer, "text", 16)


def test_fit_cuts_the_longer_one():
    ten, four = list(range(10)), list(range(4))
    assert fit(ten, four, 20) == (ten, four)
    assert fit(ten, four, 10) == (ten[-6:], four)
    assert fit(four, ten, 10) == (four, ten[:6])
    assert fit(ten, ten, 7) == (ten[-4:], ten[:3])


def test_pairs_use_each_sentence_and_follow_where_they_say():
    document = [[10 * sentence + token for token in range(3)] for sentence in range(40)]
    stream = [token for sentence in document for token in sentence]
    counts = {FOLLOWS: 0, RANDOM: 0}
    for key in range(40):
        end = 0
        for first, second, label in pairs_of_document(document, 20, random_numbers(0, key), lambda _: [[-1]] * 5):
            assert first and second and len(first) + len(second) <= 20
            start = stream.index(first[0])
            assert start == end and stream[start : start + len(first)] == first
            end = start + len(first)
            counts[label] += 1
            if label == FOLLOWS:
                assert stream[end : end + len(second)] == second
                end += len(second)
            else:
                assert second == [-1] * 5
        # All of it is used but a last sentence by itself.
        assert end >= len(stream) - 3
    assert abs(counts[FOLLOWS] / sum(counts.values()) - 0.5) < 0.06


def test_pairs_of_rows(tokenizer):
    texts = Dataset.from_dict({"text": [TEXT * 4, "", "Unwalkable walkers. " * 9, "It is. " * 9]})
    rows = tokenize_pairs(texts, tokenizer, "text", 32, seed=0)
    assert set(rows.column_names) == {"input_ids", "token_type_ids", "next_sentence_label"}
    assert set(rows["next_sentence_label"]) == {FOLLOWS, RANDOM}
    for row in rows:
        ids, types = np.array(row["input_ids"]), np.array(row["token_type_ids"])
        assert len(ids) == len(types) <= 32
        ends = np.flatnonzero(ids == tokenizer.sep_token_id)
        assert ids[0] == tokenizer.cls_token_id and len(ends) == 2 and ends[1] == len(ids) - 1
        assert types.tolist() == [0] * (ends[0] + 1) + [1] * (ends[1] - ends[0])
    again = tokenize_pairs(texts, tokenizer, "text", 32, seed=0)
    assert again.to_dict() == rows.to_dict()
    assert tokenize_pairs(texts, tokenizer, "text", 32, seed=1).to_dict() != rows.to_dict()


def test_random_pairs_come_from_another_document(tokenizer):
    texts = Dataset.from_dict({"text": ["walk walk. " * 30, "talk talk. " * 30]})
    for row in tokenize_pairs(texts, tokenizer, "text", 24, seed=0):
        text = tokenizer.decode(row["input_ids"])
        assert ("walk" in text and "talk" in text) == (row["next_sentence_label"] == RANDOM)


@pytest.mark.parametrize(
    ("texts", "words"),
    [(["One. Two. Three."], "fewer than two"), (["walk", "talk"], "at least two sentences")],
)
def test_documents_without_pairs_are_refused(tokenizer, texts, words):
    with pytest.raises(ValueError, match=words):
        tokenize_pairs(Dataset.from_dict({"text": texts}), tokenizer, "text", 32, seed=0)


def test_epoch_is_shared_memory(rows, tokenizer):
    assert MaskedRows(rows, Masker(tokenizer, 0.15, False), 0).epoch.is_shared()
    assert MaskedRows(rows, Masker(tokenizer, 0.15, False), 0).epoch.dtype == torch.int64
