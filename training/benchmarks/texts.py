"""Documents of real lengths, as token ids: paragraphs of the files that are named, or of the embedded corpus."""

import random
import re
from pathlib import Path

import torch
from transformers import GPT2Tokenizer

from training.data import embedded_corpus
from training.file_rows import check_text_file
from training.tokenizer import train_tokenizer

# A shorter paragraph is a heading or the like, and a shorter sentence the number of one.
FEWEST_WORDS, FEWEST_WORDS_OF_SENTENCE = 12, 3
MASKED_SHARE = 0.15


def paragraphs(folder: str | None, are_sentences: bool = False) -> list[str]:
    """Paragraphs, or their sentences, of all text files under `folder`, or of the embedded corpus."""
    if folder is None:
        texts = embedded_corpus()["text"]
    else:
        files = sorted(str(file) for file in Path(folder).rglob("*.txt"))
        if not files:
            raise ValueError(f"folder {folder} holds no .txt file. Name one with text, or leave out --data.")
        for file in files:
            check_text_file(file)
        texts = [Path(file).read_text(encoding="utf-8") for file in files]
    found = [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)]
    if are_sentences:
        found = [sentence for part in found for sentence in re.split(r"(?<=[.!?]) +", part)]
    fewest = FEWEST_WORDS_OF_SENTENCE if are_sentences else FEWEST_WORDS
    return [part for part in found if len(part.split()) >= fewest]


def tokenizer_for(folder: str | None, texts: list[str], vocab_size: int, kind: str):
    """GPT-2's own tokenizer where the folder has its files and the model its vocabulary; else one trained here."""
    if kind != "bpe":
        return train_tokenizer(iter(texts), kind, min(vocab_size, 8192))
    merges = next(iter(sorted(Path(folder).rglob("merges.txt"))), None) if folder is not None else None
    if merges is not None:
        tokenizer = GPT2Tokenizer(vocab=str(merges.with_name("vocab.json")), merges=str(merges))
        if len(tokenizer) <= vocab_size:
            return tokenizer
    return train_tokenizer(iter(texts), kind, min(vocab_size, 8192))


def draw_documents(
    folder: str | None,
    vocab_size: int,
    count: int,
    max_length: int,
    seed: int = 0,
    kind: str = "bpe",
    are_sentences: bool = False,
) -> list[list[int]]:
    """`count` paragraphs or sentences at random as ids, cut at `max_length`; repeated when there are fewer."""
    texts = paragraphs(folder, are_sentences)
    tokenizer = tokenizer_for(folder, texts, vocab_size, kind)
    chosen = random.Random(seed).choices(texts, k=count)
    return [ids[:max_length] for ids in tokenizer(chosen, verbose=False)["input_ids"]]


def full_documents(
    folder: str | None, vocab_size: int, count: int, length: int, seed: int = 0, kind: str = "bpe"
) -> list[list[int]]:
    """`count` documents of exactly `length` ids: paragraphs run together."""
    stream, wanted = [], count * length
    while len(stream) < wanted:
        stream += [i for ids in draw_documents(folder, vocab_size, 256, 10**6, seed, kind) for i in ids]
        seed += 1
    return [stream[i * length : (i + 1) * length] for i in range(count)]


def shorten(documents: list[list[int]], share_of_padding: float, seed: int = 0) -> list[list[int]]:
    """Documents of one length, cut at random so that padding takes that share of their batch; the first stays whole."""
    if share_of_padding == 0:
        return documents
    generator = random.Random(seed)
    length, count = len(documents[0]), len(documents)
    kept = length * (1 - share_of_padding) * count - length
    weights = [generator.uniform(0.2, 1.8) for _ in documents[1:]]
    sizes = [max(1, min(length, round(kept * weight / sum(weights)))) for weight in weights]
    return [documents[0]] + [ids[:size] for ids, size in zip(documents[1:], sizes, strict=True)]


def mask_tokens(ids: list[int], mask_token_id: int) -> tuple[list[int], list[int]]:
    """A document with some tokens hidden, the same whatever batch it is in, and their labels; -100 elsewhere."""
    generator = random.Random(str(ids))
    hidden = set(generator.sample(range(len(ids)), max(1, round(MASKED_SHARE * len(ids)))))
    inputs = [mask_token_id if place in hidden else token for place, token in enumerate(ids)]
    return inputs, [token if place in hidden else -100 for place, token in enumerate(ids)]


def collate(documents: list[list[int]], mask_token_id: int | None = None) -> dict[str, torch.Tensor]:
    """What an ordinary collator makes: padded on the right to the longest, labels -100 there.

    Args:
        mask_token_id: hide tokens by it, which are then the only ones with labels.
    """
    pairs = [(ids, ids) if mask_token_id is None else mask_tokens(ids, mask_token_id) for ids in documents]
    input_ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(pair[i]) for pair in pairs], True, padding)
        for i, padding in enumerate((0, -100))
    )
    lengths = torch.tensor([len(ids) for ids in documents])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def batches(
    documents: list[list[int]], batch_size: int, group_by_length: bool = False, mask_token_id: int | None = None
) -> list[dict]:
    """Documents in batches, in their order or sorted by length, as `group_by_length` brings them together."""
    if group_by_length:
        documents = sorted(documents, key=len, reverse=True)
    parts = (documents[i : i + batch_size] for i in range(0, len(documents), batch_size))
    return [collate(part, mask_token_id) for part in parts]
