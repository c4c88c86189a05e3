"""The updates of word2vec on a processor: the sums of `CustomWord2VecForPreTraining`, many pairs at a time.

The C code takes a pair after the other, each with noise of its own: six products of a vector with a vector. Here the
noise is shared by a group of consecutive words, each noise word counting for as many as it stands for, which leaves the
expectation of the gradient as it is (Ji et al. 2016, "Parallelizing Word2Vec in Shared and Distributed Memory"). So the
scores of a group are products of matrices. Gradients are written out by hand and added to the rows they belong to:

  d loss / d score = weight · (σ(score) - label), label 1 for words that were there and 0 for noise.

An update sums the gradients of some hundred words at one point. Of a word that is frequent among them that is a long
step; `words_per_update` keeps it short. The last row of both tables, that of unknown words, is zero and stays so: what
fills up a shape points there.

Shape letters: G groups, T words of a group, W window, K noise words of a group, D vector, N words of an update.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from training.word_pairs import Draw, keep_probabilities, noise_probabilities

# Words of a group, and noise words that they share. Skip-gram pays for the square of the first. With half the noise
# analogies get worse; words are the same.
SKIP_GRAM_GROUP, SKIP_GRAM_NOISE = 16, 32
CBOW_GROUP, CBOW_NOISE = 32, 16
# The learning rate times the gradients that an update sums up, on average, of the most frequent word.
LONGEST_STEP = 1.5
MOST_WORDS_PER_UPDATE = 1024
# Places without a centre, in the table of which word is heard by which.
NOWHERE = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Tables:
    """Input and output vectors (V, D), changed in place; the last row of both is zero."""

    inputs: torch.Tensor
    outputs: torch.Tensor


def add_rows(table: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Add `values` (..., D) to those rows (...) of a table; a row that is named twice gets both."""
    width = table.shape[1]
    # By this of torch's additions rows are sorted first and each is written once.
    table.scatter_add_(0, rows.reshape(-1, 1).expand(-1, width), values.reshape(-1, width))


@lru_cache
def _bounds(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(0, rows * columns, columns, dtype=torch.int32)


def sum_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sums (N, D) of those rows (N, C) of a table."""
    return functional.embedding_bag(rows.view(-1), table, _bounds(*rows.shape), mode="sum")


def words_per_update(config, counts: np.ndarray, group_size: int, learning_rate: float) -> int:
    """How many words' gradients are summed before the tables change: as many as the most frequent word bears.

    Args:
        config: of the model.
        counts: (V,) of the words in the text.
    """
    kept = counts * keep_probabilities(counts, config.subsample_threshold)
    noise = noise_probabilities(counts, config.noise_exponent)
    commonest = kept.max() / kept.sum() + config.num_negatives * noise.max()
    # A window is as wide as half the largest on either side, on average.
    pairs = config.window_size + 1 if config.objective == "skip_gram" else 1
    words = LONGEST_STEP / (commonest * pairs * learning_rate)
    return int(min(max(words // group_size, 1) * group_size, MOST_WORDS_PER_UPDATE))


# --- Skip-gram ---


@dataclass(frozen=True)
class SkipGramUpdate:
    """Groups of words, and all that each is scored with: the words from W before a group to W behind it, then noise.

    Attributes:
        centers: (G, T).
        others: (G, T + 2 W + K).
        weights: (G, T, T + 2 W + K): 1 in the window of a word; of noise, how much it counts; else 0.
        num_positive: T + 2 W.
    """

    centers: torch.Tensor
    others: torch.Tensor
    weights: torch.Tensor
    num_positive: int

    def __getitem__(self, groups: slice) -> "SkipGramUpdate":
        return SkipGramUpdate(self.centers[groups], self.others[groups], self.weights[groups], self.num_positive)

    @torch.no_grad()
    def apply(self, tables: Tables, learning_rate: float, with_loss: bool = False) -> torch.Tensor | None:
        """Change the tables; the loss, summed over pairs, where it is asked for."""
        positive = self.num_positive
        inputs = functional.embedding(self.centers, tables.inputs)  # (G, T, D)
        outputs = functional.embedding(self.others, tables.outputs)  # (G, T + 2 W + K, D)
        scores = torch.bmm(inputs, outputs.transpose(1, 2))
        loss = self._loss(scores) if with_loss else None
        steps = scores.sigmoid_()
        steps[:, :, :positive].sub_(1)
        steps.mul_(self.weights).mul_(-learning_rate)
        add_rows(tables.inputs, self.centers, torch.bmm(steps, outputs))
        add_rows(tables.outputs, self.others, torch.bmm(steps.transpose(1, 2), inputs))
        return loss

    @property
    def num_examples(self) -> int:
        """Pairs."""
        return int(self.weights[:, :, : self.num_positive].sum())

    def _loss(self, scores: torch.Tensor) -> torch.Tensor:
        signs = torch.ones(scores.shape[-1])
        signs[self.num_positive :] = -1
        return -(functional.logsigmoid(scores * signs) * self.weights).sum()


def skip_gram_updates(draw: Draw, window: int, num_negatives: int, unknown: int) -> SkipGramUpdate:
    """All groups of a draw.

    Args:
        unknown: the row that is zero.
    """
    size, (groups, num_noise) = draw.group_size, draw.noise.shape
    reach = size + 2 * window
    padded = np.full(groups * size + 2 * window, unknown, dtype=np.int64)
    padded[window : window + len(draw.words)] = draw.words
    around = np.lib.stride_tricks.sliding_window_view(padded, reach)[::size]
    others = torch.from_numpy(np.concatenate([around, draw.noise], axis=1))
    left, right = (_as_groups(side, groups, size) for side in (draw.left, draw.right))
    distance = torch.arange(reach)[None] - window - torch.arange(size)[:, None]  # (T, T + 2 W)
    # Small integers compare many times faster than large ones.
    distance = distance.to(left.dtype)
    is_pair = (distance >= -left) & (distance <= right) & (distance != 0)
    weights = torch.empty(groups, size, reach + num_noise)
    weights[:, :, :reach] = is_pair
    share = num_negatives / num_noise
    weights[:, :, reach:] = (left + right) * share
    # Noise that is the word to predict does not count.
    group, place, column = (others[:, :reach, None] == others[:, None, reach:]).nonzero(as_tuple=True)
    if len(group):
        rows = torch.arange(size)[None]
        not_noise = weights[group, :, place] * -share
        weights.index_put_((group[:, None], rows, reach + column[:, None]), not_noise, accumulate=True)
    centers = torch.from_numpy(padded[window : window + groups * size].reshape(groups, size))
    return SkipGramUpdate(centers, others, weights, reach)


def _as_groups(values: np.ndarray, groups: int, size: int) -> torch.Tensor:
    """(N,) as (G, T, 1), filled up with zero."""
    filled = np.zeros(groups * size, dtype=np.int16)
    filled[: len(values)] = values
    return torch.from_numpy(filled).view(groups, size, 1)


# --- CBOW ---


@dataclass(frozen=True)
class CbowUpdate:
    """Words to predict, the words around each, and noise.

    Attributes:
        words: (W + N + W,) with those around the N that are predicted.
        around: (N, 2 W) rows of the words around each, the zero row where there is none.
        hears: (W + N + W, 2 W) for each word the places, counted from 1, of those it is around; 0 or N + 1 for none.
        scale: (N, 1) one over the number of words around.
        noise: (G, K).
        hits: (G, T, K) true where noise is the word to predict, and does not count.
        share: how much a noise word counts.
        whole_error: see `CustomWord2VecConfig.whole_cbow_error`.
    """

    words: torch.Tensor
    around: torch.Tensor
    hears: torch.Tensor
    scale: torch.Tensor
    noise: torch.Tensor
    hits: torch.Tensor
    share: float
    whole_error: bool

    @torch.no_grad()
    def apply(self, tables: Tables, learning_rate: float, with_loss: bool = False) -> torch.Tensor | None:
        """Change the tables; the loss, summed over words that have others around them, where it is asked for."""
        (groups, size, _), width = self.hits.shape, tables.inputs.shape[1]
        margin = (len(self.words) - len(self.around)) // 2
        centers = self.words[margin : len(self.words) - margin]
        hidden = sum_rows(tables.inputs, self.around).mul_(self.scale)  # (N, D)
        grouped = hidden.view(groups, size, width)
        outputs = functional.embedding(centers, tables.outputs)  # (N, D)
        noise = functional.embedding(self.noise, tables.outputs)  # (G, K, D)
        positive = torch.linalg.vecdot(hidden, outputs)
        negative = torch.bmm(grouped, noise.transpose(1, 2))
        loss = self._loss(positive, negative) if with_loss else None
        step = positive.neg_().sigmoid_().mul_(learning_rate).unsqueeze(1)  # (N, 1)
        steps = negative.sigmoid_().mul_(-learning_rate * self.share).masked_fill_(self.hits, 0)  # (G, T, K)
        # The error of each mean between two rows of zeros.
        padded = hidden.new_empty(len(hidden) + 2, width)
        padded[0] = padded[-1] = 0
        errors = padded[1:-1]
        torch.bmm(steps, noise, out=errors.view(groups, size, width))
        errors.addcmul_(step, outputs)
        if not self.whole_error:
            errors.mul_(self.scale)
        add_rows(tables.outputs, self.noise, torch.bmm(steps.transpose(1, 2), grouped))
        add_rows(tables.outputs, centers, hidden.mul_(step))
        add_rows(tables.inputs, self.words, sum_rows(padded, self.hears))
        return loss

    @property
    def num_examples(self) -> int:
        """Words that have others around them."""
        return int((self.scale > 0).sum())

    def _loss(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        has_any = self.scale.squeeze(1) > 0
        noise = functional.logsigmoid(-negative) * ~self.hits * has_any.view(*negative.shape[:2], 1)
        return -(functional.logsigmoid(positive) * has_any).sum() - noise.sum() * self.share


def cbow_updates(
    draw: Draw, window: int, num_negatives: int, unknown: int, whole_error: bool, num_words: int
) -> Iterator[CbowUpdate]:
    """The updates of a draw, of `num_words` words each.

    Args:
        unknown: the row that is zero.
        num_words: a multiple of the group's size.
    """
    size, (groups, num_noise) = draw.group_size, draw.noise.shape
    count, total = len(draw.words), groups * size
    ids = np.full(total + 2 * window, unknown, dtype=np.int32)
    left, right = np.zeros((2, total + 2 * window), dtype=np.int16)
    inside = slice(window, window + count)
    ids[inside], left[inside], right[inside] = draw.words, draw.left, draw.right
    around = np.full((2 * window, total), unknown, dtype=np.int32)
    hears = np.full((2 * window, total + 2 * window), NOWHERE, dtype=np.int32)
    places = np.arange(total + 2 * window, dtype=np.int32)
    middle = slice(window, window + total)
    for offset in range(1, window + 1):
        reaches_left, reaches_right = left >= offset, right >= offset
        before, after = offset - 1, window + offset - 1
        np.copyto(around[before], ids[window - offset : window - offset + total], where=reaches_left[middle])
        np.copyto(around[after], ids[window + offset : window + offset + total], where=reaches_right[middle])
        # A word is heard by the one `offset` places after it if that one's window reaches so far back.
        np.copyto(hears[before, :-offset], places[offset:], where=reaches_left[offset:])
        np.copyto(hears[after, offset:], places[:-offset], where=reaches_right[:-offset])
    around, hears = np.ascontiguousarray(around.T), np.ascontiguousarray(hears.T)
    heard = left[middle] + right[middle]
    scale = torch.from_numpy(np.where(heard > 0, 1 / np.maximum(heard, 1), 0).astype(np.float32)).unsqueeze(1)
    words, around, noise = torch.from_numpy(ids), torch.from_numpy(around), torch.from_numpy(draw.noise)
    hits = words[middle].view(groups, size, 1) == noise[:, None, :]
    words, noise = words.long(), noise.long()
    for start in range(0, total, num_words):
        end = min(start + num_words, total)
        # Places are counted from that of the row of zeros before the update's first word.
        origin = start + window - 1
        near = np.clip(hears[start : end + 2 * window], origin, end + window) - origin
        part = slice(start // size, end // size)
        yield CbowUpdate(
            words[start : end + 2 * window],
            around[start:end],
            torch.from_numpy(near),
            scale[start:end],
            noise[part],
            hits[part],
            num_negatives / num_noise,
            whole_error,
        )


__all__ = [
    "CbowUpdate",
    "SkipGramUpdate",
    "Tables",
    "add_rows",
    "cbow_updates",
    "skip_gram_updates",
    "words_per_update",
]
