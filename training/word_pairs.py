"""From text to the words, windows and noise that word2vec learns from: vectorised, and streamed by chunks of text.

A chunk is a run of whole sentences. What is drawn for it, which words are left out, how wide each window is and which
words are noise, is a pure function of seed, epoch and the chunk's number. So neither the number of threads nor a
resumed run changes any of it.

Shape letters of this file: N words of a chunk that were kept, W window, K noise words shared by a group of words.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

UNKNOWN = "<unk>"
# How text is cut into words; each is a pre-tokenizer of the `tokenizers` library.
SPLITS: dict[str, Callable] = {
    # Runs of letters and digits, and runs of other signs.
    "words": pre_tokenizers.Whitespace,
    # At white space alone.
    "whitespace": pre_tokenizers.WhitespaceSplit,
}


# --- Vocabulary ---


def word_pieces(text: str, tokenizer: Tokenizer) -> list[str]:
    """The words of a text, known or not, as the tokenizer cuts it."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def make_tokenizer(words: list[str], split: str = "words", lower_case: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer that numbers `words` in their order; the unknown word, which pads too, comes after them."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown. Use one of {', '.join(SPLITS)}.")
    vocabulary = {word: index for index, word in enumerate([*words, UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    if lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = SPLITS[split]()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def count_words(texts: Iterable[str], tokenizer: Tokenizer) -> Counter:
    """How often each word stands in the texts."""
    counts: Counter = Counter()
    for text in texts:
        counts.update(word_pieces(text, tokenizer))
    return counts


def choose_vocabulary(counts: Counter, min_count: int, max_words: int | None = None) -> list[str]:
    """Words that stand at least `min_count` times, the most frequent first, as many as `max_words`; of words that are
    as frequent, the order of the alphabet says which is the first.

    Raises:
        ValueError: when less than two words are left.
    """
    if min_count < 1:
        raise ValueError(f"--min_count is {min_count} but must be at least 1.")
    if max_words is not None and max_words < 2:
        raise ValueError(f"--max_words is {max_words} but two words are the fewest that can be told apart.")
    counts = {word: count for word, count in counts.items() if word != UNKNOWN}
    if not counts:
        raise ValueError("the corpus has no words. Give text.")
    if len(counts) == 1:
        raise ValueError(
            f"the corpus has one word alone, {next(iter(counts))!r}, and nothing to tell it from. Give more text."
        )
    kept = sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word)
    )
    if len(kept) < 2:
        raise ValueError(
            f"--min_count {min_count} leaves {len(kept)} of {len(counts)} words; the most frequent stands "
            f"{max(counts.values())} times. Lower it, or give more text."
        )
    return sorted(kept, key=lambda word: (-counts[word], word))[:max_words]


def keep_probabilities(counts: np.ndarray, threshold: float) -> np.ndarray:
    """The share of each word's places (V,) that subsampling keeps: (√(z / t) + 1) · t / z, at most 1, where z is the
    word's share of the text and t the threshold; 1 where t is 0.

    This is the rule of the word2vec C code. The paper's own (Mikolov et al. 2013b, equation 5) keeps √(t / z), which is
    the first of its two terms.
    """
    if threshold == 0:
        return np.ones(len(counts))
    # A word of the vocabulary need not stand in this text.
    shares = np.maximum(counts, 1) / counts.sum()
    return np.minimum(1.0, (np.sqrt(shares / threshold) + 1) * threshold / shares)


def noise_probabilities(counts: np.ndarray, exponent: float) -> np.ndarray:
    """The probability (V,) of each word as noise, in proportion to its count to the power `exponent`."""
    weights = counts.astype(np.float64) ** exponent
    return weights / weights.sum()


class AliasTable:
    """Draws from a discrete distribution in constant time (Walker 1977; Vose 1991, "A Linear Algorithm for Generating
    Random Numbers with a Given Distribution").

    Args:
        probabilities: (V,), which sum to 1.
    """

    def __init__(self, probabilities: np.ndarray):
        scaled = (probabilities * len(probabilities)).tolist()
        self.alias = np.arange(len(scaled), dtype=np.int32)
        small = [index for index, value in enumerate(scaled) if value < 1]
        large = [index for index, value in enumerate(scaled) if value >= 1]
        while small and large:
            low, high = small.pop(), large.pop()
            self.alias[low] = high
            scaled[high] -= 1 - scaled[low]
            (small if scaled[high] < 1 else large).append(high)
        for index in (*small, *large):
            # Left over by rounding.
            scaled[index] = 1.0
        self.threshold = np.array(scaled, dtype=np.float32)

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """`count` indices (int32)."""
        columns = generator.integers(0, len(self.alias), count, dtype=np.int32)
        takes_other = generator.random(count, dtype=np.float32) >= self.threshold[columns]
        return np.where(takes_other, self.alias[columns], columns)


# --- Text as numbers ---


@dataclass(frozen=True)
class Corpus:
    """A text as the ids of its known words.

    Attributes:
        ids: (words,) int32; unknown words are left out, so that their neighbours become each other's.
        ends: (sentences,) where each sentence ends in `ids`.
        num_words: of the text, unknown ones included.
    """

    ids: np.ndarray
    ends: np.ndarray
    num_words: int

    def chunks(self, size: int) -> np.ndarray:
        """Where chunks of about `size` words end, (chunks,); each at the end of a sentence."""
        groups = (self.ends - 1) // size
        return self.ends[np.append(groups[1:] != groups[:-1], True)]


def read_corpus(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_sentence_length: int) -> Corpus:
    """The ids of texts, each a sentence or, where it is longer, cut after every `max_sentence_length` words."""
    vocabulary = {word: index for word, index in tokenizer.get_vocab().items() if word != UNKNOWN}
    ids, ends, num_words, num_known = [], [], 0, 0
    for text in texts:
        words = word_pieces(text, tokenizer.backend_tokenizer)
        num_words += len(words)
        numbers = np.fromiter((vocabulary.get(word, -1) for word in words), dtype=np.int32, count=len(words))
        known = numbers >= 0
        before = np.append(
            np.cumsum(known)[max_sentence_length - 1 : len(words) - 1 : max_sentence_length], known.sum()
        )
        # Without sentences of unknown words alone.
        before = before[np.diff(before, prepend=0) > 0]
        ids.append(numbers[known])
        ends.append(before + num_known)
        num_known += int(known.sum())
    if num_known == 0:
        raise ValueError("the corpus has no word of the vocabulary. Give the text that the vocabulary was made of.")
    return Corpus(np.concatenate(ids), np.concatenate(ends).astype(np.int64), num_words)


# --- Draws ---


@dataclass(frozen=True)
class Draw:
    """What is learned from a chunk: the word at place i with those from i - left to i + right, and noise.

    Attributes:
        words: (N,) int32, without those left out by subsampling.
        left, right: (N,) int32, reach of each word's window within its sentence.
        noise: (groups, K) int32; the g-th row belongs to the g-th run of `group_size` words.
    """

    words: np.ndarray
    left: np.ndarray
    right: np.ndarray
    noise: np.ndarray
    group_size: int

    @property
    def num_pairs(self) -> int:
        return int(self.left.sum() + self.right.sum())


@dataclass(frozen=True)
class Sampler:
    """Draws from a corpus.

    Attributes:
        keep: (V,) share of each word's places that is kept.
        noise: of words to draw.
        num_shared: noise words of a group (K).
        group_size: words of a group.
    """

    keep: np.ndarray
    noise: AliasTable
    window: int
    num_shared: int
    group_size: int
    seed: int

    @classmethod
    def of(cls, config, counts: np.ndarray, num_shared: int, group_size: int, seed: int) -> "Sampler":
        """As a configuration asks, of words that stand `counts` (V,) times in the text."""
        keep = keep_probabilities(counts, config.subsample_threshold).astype(np.float32)
        noise = AliasTable(noise_probabilities(counts, config.noise_exponent))
        return cls(keep, noise, config.window_size, num_shared, group_size, seed)

    def draw(self, ids: np.ndarray, ends: np.ndarray, epoch: int, chunk: int) -> Draw:
        """The draw of a chunk.

        Args:
            ids: of its words.
            ends: of its sentences in `ids`.
        """
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence((self.seed, epoch, chunk))))
        kept = generator.random(len(ids), dtype=np.float32) < self.keep[ids]
        words = ids[kept]
        ends = np.cumsum(kept, dtype=np.int32)[ends - 1]
        lengths = np.diff(ends, prepend=0)
        places = np.arange(len(words), dtype=np.int32)
        windows = generator.integers(1, self.window + 1, len(words), dtype=np.int32)
        left = np.minimum(windows, places - np.repeat(ends - lengths, lengths))
        right = np.minimum(windows, np.repeat(ends, lengths) - 1 - places)
        groups = -(-len(words) // self.group_size)
        noise = self.noise.draw(generator, groups * self.num_shared).reshape(groups, self.num_shared)
        return Draw(words, left, right, noise, self.group_size)


def explicit_pairs(draw: Draw, objective: str) -> Iterator[dict[str, torch.Tensor]]:
    """The examples of a draw, group by group, as `CustomWord2VecForPreTraining` takes them: the plain form, a line for
    each pair (skip-gram) or word (CBOW), that the fast updates are tested against."""
    for group, noise in enumerate(draw.noise):
        centers, contexts = [], []
        start = group * draw.group_size
        for place in range(start, min(start + draw.group_size, len(draw.words))):
            around = [*range(place - draw.left[place], place), *range(place + 1, place + draw.right[place] + 1)]
            if objective == "cbow" and around:
                centers.append(draw.words[place])
                contexts.append(draw.words[around].tolist())
            elif objective == "skip_gram":
                centers += [draw.words[place]] * len(around)
                contexts += draw.words[around].tolist()
        if not centers:
            continue
        pairs = {"center_ids": torch.tensor(np.array(centers)).long()}
        if objective == "cbow":
            longest = max(map(len, contexts))
            padded = [row + [0] * (longest - len(row)) for row in contexts]
            mask = [[1] * len(row) + [0] * (longest - len(row)) for row in contexts]
            pairs |= {"context_ids": torch.tensor(padded), "context_mask": torch.tensor(mask)}
        else:
            pairs["context_ids"] = torch.tensor(contexts)
        yield {**pairs, "negative_ids": torch.from_numpy(noise).long().expand(len(centers), -1)}


__all__ = [
    "UNKNOWN",
    "AliasTable",
    "Corpus",
    "Draw",
    "Sampler",
    "choose_vocabulary",
    "count_words",
    "explicit_pairs",
    "keep_probabilities",
    "make_tokenizer",
    "noise_probabilities",
    "read_corpus",
    "word_pieces",
]
