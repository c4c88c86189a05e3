"""Rows of words for models that read a token a word: sentences of a text, distinct words, batches."""

import re
from collections.abc import Iterable, Iterator

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from training.preflight import ROW

IGNORED = -100
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[A-Z\"'“‘(=])")
PARAGRAPH_END = re.compile(r"\n\s*\n")


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text: parts of a paragraph that end with a full stop before a capital letter, roughly."""
    for paragraph in PARAGRAPH_END.split(text):
        yield from (part for part in SENTENCE_END.split(" ".join(paragraph.split())) if part)


def word_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_words: int) -> Iterator[list[str]]:
    """The words of each sentence; a sentence with more than `max_words` gives several rows."""
    for text in texts:
        for sentence in sentences(text):
            words = tokenizer.tokenize(sentence)
            yield from (words[start : start + max_words] for start in range(0, len(words), max_words))


class Lexicon:
    """The distinct words of some data, so that each is encoded once.

    Args:
        tokenizer: of ELMo's kind, a token a word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.indices: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def index(self, words: list[str]) -> list[int]:
        """Numbers of the words of a row and of the signs of its begin and end."""
        row = [self.tokenizer.bos_token, *words, self.tokenizer.eos_token]
        return [self.indices.setdefault(word, len(self.indices)) for word in row]

    def inputs(self) -> torch.Tensor:
        """What the model reads of each word, (N, C) or (N,)."""
        return torch.tensor(self.tokenizer.encode_words(list(self.indices)))

    def numbers(self) -> torch.Tensor:
        """The number of each word in the vocabulary, (N,)."""
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(list(self.indices)))


class WordCollator:
    """Rows of `input_ids` that number the words of a lexicon to batches of what the model reads.

    Args:
        lexicon: complete; words that it learns later are not known here.
        predicts_words: label each word with its number in the vocabulary; else rows bring `labels`, or none.
    """

    def __init__(self, lexicon: Lexicon, predicts_words: bool = False):
        self.inputs = lexicon.inputs()
        self.numbers = lexicon.numbers() if predicts_words else None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = pad([row["input_ids"] for row in rows], 0)
        mask = pad([[1] * len(row["input_ids"]) for row in rows], 0)
        batch = {"input_ids": self.inputs[ids], "attention_mask": mask}
        if self.numbers is not None:
            batch["labels"] = self.numbers[ids].masked_fill(mask == 0, IGNORED)
        elif "labels" in rows[0]:
            batch["labels"] = pad([row["labels"] for row in rows], IGNORED)
        return batch


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Lists of different lengths as one tensor (B, T), filled up on the right."""
    tensors = [torch.as_tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def encode_tagged(rows: Dataset, lexicon: Lexicon, labels: list[str], max_length: int) -> tuple[Dataset, int]:
    """Numbers in the lexicon and labels of tagged rows, and how many rows lost words to `max_length`.

    Args:
        rows: with columns `tokens` and `tags`.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    kept = max_length - 2
    columns = {
        "input_ids": [lexicon.index(words[:kept]) for words in rows["tokens"]],
        "labels": [[IGNORED, *(numbers[tag] for tag in tags[:kept]), IGNORED] for tags in rows["tags"]],
    }
    if ROW in rows.column_names:
        columns[ROW] = rows[ROW]
    return Dataset.from_dict(columns), sum(len(words) > kept for words in rows["tokens"])
