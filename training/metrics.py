"""How good a language model is, in numbers that can be compared: bits per byte, and two baselines beside it.

Perplexity depends on the tokenizer; bits per byte do not, so a compressor can stand in the same table.
"""

import lzma
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class TextScore:
    """Negative log-likelihood of a text, in nats, over all its tokens, and the text's length in UTF-8 bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def score_text(
    model: nn.Module, token_ids: torch.Tensor, num_bytes: int, window: int, batch_size: int = 16, progress: bool = False
) -> TextScore:
    """Score every token of a text exactly once, each with at least half a window of context where there is so much.

    Args:
        model: a causal language model.
        token_ids: (N,), the first of which is context only.
        num_bytes: length of the text in UTF-8 bytes.
        window: tokens the model sees at a time; windows overlap by half.
    """
    model.eval()
    device = next(model.parameters()).device
    stride = max(1, window // 2)
    starts = list(range(0, max(1, len(token_ids) - 1 - (window - stride)), stride))
    nats = 0.0
    batches = range(0, len(starts), batch_size)
    for first in tqdm(batches, desc="scoring", disable=not progress):
        rows = []
        for start in starts[first : first + batch_size]:
            inputs = token_ids[start : start + window]
            targets = token_ids[start + 1 : start + 1 + window].clone()
            # The first window scores all of its tokens, each later one those that no window has scored.
            if start > 0:
                targets[: window - stride] = -100
            rows.append((inputs[: len(targets)], targets))
        inputs = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True).to(device)
        targets = nn.utils.rnn.pad_sequence([row[1] for row in rows], batch_first=True, padding_value=-100).to(device)
        # Padding stands on the right, where a causal model cannot see it.
        logits = model(input_ids=inputs, use_cache=False).logits
        nats += nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
        ).item()
    return TextScore(nats, len(token_ids) - 1, num_bytes)


class BigramModel:
    """Interpolated Kneser-Ney bigram model (Kneser and Ney 1995; Chen and Goodman 1999, section 2.7).

    Args:
        token_ids: (N,), the text to count.
        vocab_size: number of entries of the vocabulary, over which the last back-off is uniform.
        discount: taken from every count and given to what was not seen.
    """

    def __init__(self, token_ids: torch.Tensor, vocab_size: int, discount: float = 0.75):
        ids = token_ids.numpy().astype(np.int64)
        self.vocab_size = vocab_size
        self.discount = discount
        self.pairs, self.pair_counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
        histories, words = np.divmod(self.pairs, vocab_size)
        self.history_counts = np.bincount(histories, weights=self.pair_counts, minlength=vocab_size)
        followers = np.bincount(histories, minlength=vocab_size)
        preceders = np.bincount(words, minlength=vocab_size)
        # How likely a word is to follow something new, itself smoothed with the uniform distribution.
        types = preceders.sum()
        freed = discount * np.count_nonzero(preceders) / types
        self.continuation = np.maximum(preceders - discount, 0) / types + freed / vocab_size
        with np.errstate(divide="ignore", invalid="ignore"):
            self.backoff = np.where(self.history_counts > 0, discount * followers / self.history_counts, 1.0)

    def probabilities(self, histories: np.ndarray, words: np.ndarray) -> np.ndarray:
        """P(word | history) of each pair of ids, (N,) and (N,) -> (N,)."""
        keys = histories * self.vocab_size + words
        places = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        counts = np.where(self.pairs[places] == keys, self.pair_counts[places], 0)
        seen = np.maximum(counts - self.discount, 0) / np.maximum(self.history_counts[histories], 1)
        return seen + self.backoff[histories] * self.continuation[words]

    def score(self, token_ids: torch.Tensor, num_bytes: int) -> TextScore:
        """Score every token but the first, as `score_text` does."""
        ids = token_ids.numpy().astype(np.int64)
        nats = -np.log(self.probabilities(ids[:-1], ids[1:])).sum()
        return TextScore(float(nats), len(ids) - 1, num_bytes)


def xz_bits_per_byte(text: str) -> float:
    """What `xz` at its best makes of the text, given nothing."""
    data = text.encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
