"""Bits per byte and the baselines, against slow and plain computations."""

import lzma
import math

import numpy as np
import pytest
import tiny
import torch

from training.metrics import BigramModel, TextScore, score_text, xz_bits_per_byte

CAUSAL_LM = next(row for row in tiny.MODELS if row.name == "CustomGPT2ForCausalLM")


def test_units():
    score = TextScore(nats=8 * math.log(2), tokens=4, bytes=2)
    assert score.bits_per_byte == pytest.approx(4.0)
    assert score.perplexity == pytest.approx(4.0)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 12, 13, 30, 61])
def test_score_text_scores_each_token_once_with_half_a_window(length):
    model = CAUSAL_LM.build()
    ids = torch.randint(0, 90, (length,))
    window, stride = 8, 4
    nats = 0.0
    with torch.no_grad():
        for target in range(1, length):
            # The window in which this token is scored: the first, or the earliest that reaches it.
            start = 0 if target <= window else -(-(target - window) // stride) * stride
            logits = model(ids[None, start:target]).logits[0, -1]
            nats -= logits.log_softmax(-1)[ids[target]].item()
            assert target - start >= min(target, window - stride)
    score = score_text(model, ids, num_bytes=100, window=window, batch_size=3)
    assert score.tokens == length - 1
    assert score.nats == pytest.approx(nats, rel=1e-5)


def test_bigram_probabilities_sum_to_one():
    ids = torch.randint(0, 20, (200,))  # entries 20 to 24 are never seen
    model = BigramModel(ids, vocab_size=25)
    for history in range(25):
        total = model.probabilities(np.full(25, history), np.arange(25)).sum()
        assert total == pytest.approx(1.0, abs=1e-12)


def test_bigram_matches_the_formula():
    ids = torch.tensor([0, 1, 0, 1, 0, 2, 1, 2])
    model = BigramModel(ids, vocab_size=4, discount=0.75)
    # Pairs: 01 twice, 10 twice, 02, 21, 12: five types; 1 follows 0 and 2; 0 is followed three times by two types.
    continuation = (2 - 0.75) / 5 + 0.75 * 3 / 5 / 4
    expected = (2 - 0.75) / 3 + 0.75 * 2 / 3 * continuation
    assert model.probabilities(np.array([0]), np.array([1]))[0] == pytest.approx(expected)
    unseen_history = model.probabilities(np.array([3]), np.array([1]))[0]
    assert unseen_history == pytest.approx(continuation)
    score = model.score(ids, num_bytes=10)
    by_hand = -np.log(model.probabilities(ids[:-1].numpy(), ids[1:].numpy())).sum()
    assert (score.nats, score.tokens) == (pytest.approx(by_hand), 7)


def test_xz_is_what_the_compressor_gives():
    text = "Grüße und mehr. " * 50
    size = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte(text) == 8 * size / len(text.encode())
