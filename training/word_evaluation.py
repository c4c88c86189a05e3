"""How good word vectors are: similarities beside those that people gave, and analogies.

  python -m training.word_evaluation runs/word2vec --word_pairs wordsim353.tsv simlex999.tsv \\
    --analogies questions-words.txt

Which rows count is as in gensim: words are compared without regard to case, and a row with an unknown word is left out.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from hf_custom.loading import load_model
from hf_custom.modeling_word2vec import CustomWord2VecModel, check_vocabulary, words_of_tokenizer

# Questions whose cosines with the vocabulary are in memory together.
BATCH = 256


def rank(values: np.ndarray) -> np.ndarray:
    """Ranks (N,) from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two series (N,); NaN where one is constant."""
    first, second = (rank(np.asarray(values)) for values in (first, second))
    first, second = first - first.mean(), second - second.mean()
    norm = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / norm) if norm else float("nan")


@dataclass(frozen=True)
class WordVectors:
    """Vectors by word.

    Attributes:
        words: in the order of their ids, the unknown one left out.
        vectors: (V, D) of length 1.
    """

    words: list[str]
    vectors: torch.Tensor

    @classmethod
    def of(cls, model: CustomWord2VecModel, tokenizer) -> "WordVectors":
        words = words_of_tokenizer(tokenizer)
        check_vocabulary(words, model.config, "the tokenizer")
        unknown = model.config.unk_token_id
        known = [index for index in range(len(words)) if index != unknown]
        return cls([words[index] for index in known], model.unit_vectors()[known])

    def first(self, number: int | None) -> "WordVectors":
        """The most frequent words alone."""
        return WordVectors(self.words[:number], self.vectors[:number])

    def ids(self) -> dict[str, int]:
        """The first word of each spelling without regard to case."""
        return {word.upper(): index for index, word in reversed(list(enumerate(self.words)))}


@dataclass(frozen=True)
class Score:
    """A number, from how many rows, and how many had an unknown word."""

    value: float
    used: int
    skipped: int


def score_word_pairs(words: WordVectors, file: str | Path) -> Score:
    """Spearman's correlation of cosines with the third column of a file of two words and a number a line, parted by
    tabs; lines that start with # are comments.

    Raises:
        ValueError: for a line of another form, which is named, or when no pair is known.
    """
    ids, rows, given, skipped = words.ids(), [], [], 0
    for number, line in enumerate(_lines(file), 1):
        if not line.strip() or line.startswith("#"):
            continue
        first, second, value = _fields(line.rstrip("\n").split("\t"), 3, file, number, "two words and a number")
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{file}, line {number}: {value!r} is no number. Correct the third column.") from None
        pair = [ids.get(word.strip().upper()) for word in (first, second)]
        if None in pair:
            skipped += 1
        else:
            rows.append(pair)
            given.append(value)
    if not rows:
        raise ValueError(f"{file} has no pair whose words are both known. Use vectors of more words, or another file.")
    left, right = words.vectors[torch.tensor(rows)].unbind(1)
    return Score(spearman((left * right).sum(-1).numpy(), np.array(given)), len(rows), skipped)


def score_analogies(words: WordVectors, file: str | Path, restrict_vocab: int | None = None) -> dict[str, Score]:
    """The share of questions a : b = c : d that are answered right, by the word nearest to b - a + c (3CosAdd; Mikolov
    et al. 2013, "Linguistic Regularities in Continuous Space Word Representations", section 4), by section of the file
    and, under "total", of all. Lines that start with a colon name sections; others have four words.

    Args:
        restrict_vocab: questions and answers among that many of the first words alone, as in gensim.
    """
    words = words.first(restrict_vocab)
    ids, section = words.ids(), None
    questions: dict[str, list[list[int]]] = {}
    skipped: dict[str, int] = {}
    for number, line in enumerate(_lines(file), 1):
        if line.startswith(":"):
            section = line.lstrip(":").strip()
            questions.setdefault(section, [])
            skipped.setdefault(section, 0)
            continue
        if not line.strip():
            continue
        if section is None:
            raise ValueError(f"{file}, line {number}: a question before the first section. Begin with `: name`.")
        fields = _fields(line.split(), 4, file, number, "four words")
        found = [ids.get(word.upper()) for word in fields]
        if None in found:
            skipped[section] += 1
        else:
            questions[section].append(found)
    scores = {}
    right_in_all, used_in_all = 0, 0
    # What is spelt like a word of the question is no answer.
    spelling = torch.tensor([ids[word.upper()] for word in words.words])
    for section, rows in questions.items():
        right = _count_right(words.vectors, spelling, torch.tensor(rows)) if rows else 0
        scores[section] = Score(right / len(rows) if rows else float("nan"), len(rows), skipped[section])
        right_in_all, used_in_all = right_in_all + right, used_in_all + len(rows)
    if not used_in_all:
        raise ValueError(f"{file} has no question whose words are all known. Use vectors of more words.")
    scores["total"] = Score(right_in_all / used_in_all, used_in_all, sum(skipped.values()))
    return scores


def _count_right(vectors: torch.Tensor, spelling: torch.Tensor, questions: torch.Tensor) -> int:
    right = 0
    for a, b, c, d in (batch.unbind(1) for batch in questions.split(BATCH)):
        cosines = (vectors[b] - vectors[a] + vectors[c]) @ vectors.T
        for asked in (a, b, c):
            cosines.masked_fill_(spelling[None] == spelling[asked][:, None], -torch.inf)
        right += int((spelling[cosines.argmax(1)] == spelling[d]).sum())
    return right


def _lines(file: str | Path):
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist. Check the path.")
    with open(file, encoding="utf-8") as stream:
        try:
            yield from stream
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error.reason}). Save it as UTF-8.") from None


def _fields(fields: list[str], count: int, file, number: int, wanted: str) -> list[str]:
    if len(fields) != count:
        raise ValueError(f"{file}, line {number}: {len(fields)} fields where {wanted} are needed. Correct the line.")
    return fields


def evaluate(
    model: CustomWord2VecModel,
    tokenizer,
    word_pairs: list[str],
    analogies: list[str],
    restrict_vocab: int | None = None,
) -> dict[str, float]:
    """Numbers by the names of the files."""
    words, metrics = WordVectors.of(model, tokenizer), {}
    for file in word_pairs:
        score = score_word_pairs(words, file)
        metrics[f"{Path(file).stem} spearman"] = score.value
        metrics[f"{Path(file).stem} pairs"] = score.used
    for file in analogies:
        total = score_analogies(words, file, restrict_vocab)["total"]
        metrics[f"{Path(file).stem} accuracy"] = total.value
        metrics[f"{Path(file).stem} questions"] = total.used
    return metrics


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a word2vec model and its tokenizer")
    parser.add_argument("--word_pairs", nargs="+", default=[], metavar="FILE", help="two words and a number a line")
    parser.add_argument("--analogies", nargs="+", default=[], metavar="FILE", help="questions of four words")
    parser.add_argument("--restrict_vocab", type=int, help="analogies among that many of the most frequent words")
    args = parser.parse_args(argv)
    try:
        if not args.word_pairs and not args.analogies:
            raise ValueError("nothing to evaluate. Name files with --word_pairs or --analogies.")
        model = load_model(args.model)
        model = getattr(model, "word2vec", model)
        if not isinstance(model, CustomWord2VecModel):
            raise ValueError(f"{args.model} holds a {type(model).__name__}. Name a word2vec model.")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        metrics = evaluate(model, tokenizer, args.word_pairs, args.analogies, args.restrict_vocab)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value:,}")


if __name__ == "__main__":
    main()
