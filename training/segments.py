"""From documents to rows of their real length for an encoder: segments, or pairs of them for next sentence prediction.

A document is a row of the data. None is joined with another, but for the pairs that are so on purpose.
"""

import re

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from training.masking import random_numbers

# A sentence ends at its mark or with its paragraph.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
# As the host's classes number the next sentence labels.
FOLLOWS, RANDOM = 0, 1


def has_words(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether any id stands for a word, so that something can be predicted."""
    return not set(ids) <= set(tokenizer.all_special_ids)


def tokenize_segments(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, column: str, block_size: int, num_proc: int | None = None
) -> Dataset:
    """`input_ids` of at most `block_size` tokens, special ones included: each document cut from its start to its end.

    Raises:
        ValueError: when the text has no word that the tokenizer knows.
    """
    length = block_size - 2

    def to_segments(batch):
        segments = []
        for ids in tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]:
            segments += [ids[start : start + length] for start in range(0, len(ids), length)]
        segments = [segment for segment in segments if has_words(segment, tokenizer)]
        return {"input_ids": [[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id] for ids in segments]}

    names = list(rows.column_names)
    segments = rows.map(to_segments, batched=True, remove_columns=names, num_proc=num_proc, desc="tokenizing")
    if len(segments) == 0:
        raise ValueError("the text has no word that the tokenizer knows. Use a tokenizer of its language.")
    return segments


def fit(first: list[int], second: list[int], length: int) -> tuple[list[int], list[int]]:
    """Both cut to `length` tokens together, the longer one more: the first at its start, the second at its end."""
    half = length // 2
    keep_second = min(len(second), max(half, length - len(first)))
    keep_first = min(len(first), length - keep_second)
    return first[len(first) - keep_first :], second[:keep_second]


def join(sentences: list[list[int]]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


def pairs_of_document(
    document: list[list[int]], length: int, generator: np.random.Generator, another
) -> list[tuple[list[int], list[int], int]]:
    """Pairs (first, second, label) of at most `length` tokens together, from the sentences of one document.

    Args:
        another: gives sentences from some place of another document.
    """
    pairs, start = [], 0
    # A sentence by itself has none that follows.
    while start < len(document) - 1:
        end = start + 2
        while end < len(document) and sum(map(len, document[start : end + 1])) <= length:
            end += 1
        cut = int(generator.integers(start + 1, end))
        follows = generator.random() < 0.5
        second = document[cut:end] if follows else another(generator)
        pairs.append((*fit(join(document[start:cut]), join(second), length), FOLLOWS if follows else RANDOM))
        # What a random one stood in for is still to be used.
        start = end if follows else cut
    return pairs


def tokenize_pairs(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    block_size: int,
    seed: int,
    num_proc: int | None = None,
) -> Dataset:
    """Pairs of segments with `token_type_ids` and `next_sentence_label`: of half of them the second follows the first,
    of the others it comes from another document (Devlin et al. 2019, section 3.1).

    Raises:
        ValueError: with fewer than two documents, or none that has two sentences.
    """

    def to_sentences(row):
        sentences = [sentence for sentence in SENTENCE_END.split(row[column]) if sentence.strip()]
        ids = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"] if sentences else []
        return {"sentences": [sentence for sentence in ids if has_words(sentence, tokenizer)]}

    names = list(rows.column_names)
    documents = rows.map(to_sentences, remove_columns=names, num_proc=num_proc, desc="tokenizing")
    documents = documents.filter(lambda row: len(row["sentences"]) > 0, num_proc=num_proc)
    if len(documents) < 2:
        raise ValueError(
            "--next_sentence takes its random pairs from other documents, but a part of the data has fewer than two. "
            "Give each document as a row or file of its own."
        )
    cls, sep, length = tokenizer.cls_token_id, tokenizer.sep_token_id, block_size - 3

    def to_pairs(batch, indices):
        found = {"input_ids": [], "token_type_ids": [], "next_sentence_label": []}
        for index, document in zip(indices, batch["sentences"], strict=True):

            def another(generator, index=index):
                other = int(generator.integers(len(documents) - 1))
                sentences = documents[other + (other >= index)]["sentences"]
                return sentences[int(generator.integers(len(sentences))) :]

            for first, second, label in pairs_of_document(document, length, random_numbers(seed, index), another):
                found["input_ids"].append([cls, *first, sep, *second, sep])
                found["token_type_ids"].append([0] * (len(first) + 2) + [1] * (len(second) + 1))
                found["next_sentence_label"].append(label)
        return found

    pairs = documents.map(
        to_pairs, batched=True, with_indices=True, remove_columns=["sentences"], num_proc=num_proc, desc="pairing"
    )
    if len(pairs) == 0:
        raise ValueError("--next_sentence needs a document of at least two sentences, and the data has none.")
    return pairs
