"""Pairs of texts: read from tables or parallel files, encoded, translated in batches, and scored."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.args import TableArguments
from training.data import complete_splits, load_tables
from training.embedded_tasks import embedded_numbers
from training.file_rows import check_text_file
from training.preflight import Quarantine, check_columns

SOURCE, TARGET = "source", "target"
# Tokens that a translation may have beyond the number of its source (Vaswani et al. 2017, section 6.1).
MOST_NEW_TOKENS_BEYOND_SOURCE = 50


@dataclass
class PairArguments:
    """Where a pair's source and target stand."""

    source_column: str = field(default=SOURCE, metadata={"help": "column of the text to translate"})
    target_column: str = field(default=TARGET, metadata={"help": "column of its translation"})
    target_files: list[str] | None = field(
        default=None,
        metadata={"help": "text files whose lines translate those of --files, which are then text files as well"},
    )
    validation_target_files: list[str] | None = field(
        default=None, metadata={"help": "the same for --validation_files"}
    )
    test_target_files: list[str] | None = field(default=None, metadata={"help": "the same for --test_files"})


def read_lines(paths: Iterable[str]) -> list[str]:
    """Lines of text files, one after another."""
    lines = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"text file {path} does not exist. Check the path.")
        check_text_file(str(path))
        text = path.read_text(encoding="utf-8-sig")
        # Not `splitlines`, for which a form feed in a sentence ends a line.
        lines += text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def load_parallel(data_args: TableArguments, pairs: PairArguments, seed: int, quarantine: Quarantine) -> DatasetDict:
    """Splits of parallel text files, in columns `SOURCE` and `TARGET`.

    Raises:
        ValueError: for a side that is missing, and for files whose numbers of lines differ.
    """
    splits = {}
    for name, prefix in (("train", ""), ("validation", "validation_"), ("test", "test_")):
        sources = getattr(data_args, f"{prefix}files")
        targets = getattr(pairs, f"{prefix}target_files")
        if not sources and not targets:
            continue
        if not sources or not targets:
            raise ValueError(
                f"--{prefix}{'files' if sources else 'target_files'} was given without "
                f"--{prefix}{'target_files' if sources else 'files'}. Parallel text has both sides."
            )
        lines = {SOURCE: read_lines(sources), TARGET: read_lines(targets)}
        counts = [len(side) for side in lines.values()]
        if counts[0] != counts[1] or not counts[0]:
            raise ValueError(
                f"{', '.join(sources)} has {counts[0]} lines but {', '.join(targets)} has {counts[1]}. Each line of "
                "one translates the line of the other that has its number: give as many of both, and at least one."
            )
        quarantine.origin(name).files = [(", ".join(sources), counts[0])]
        splits[name] = Dataset.from_dict(lines)
    if "train" not in splits:
        raise ValueError("held-out text files were given without text to train on. Name --files and --target_files.")
    return complete_splits(splits, data_args, seed, quarantine)


def load_pairs(
    data_args: TableArguments, pairs: PairArguments, seed: int, quarantine: Quarantine | None = None
) -> DatasetDict:
    """Splits `train`, `validation` and perhaps `test` with columns `SOURCE` and `TARGET`, no text of them empty."""
    quarantine = quarantine or Quarantine()
    columns = {"source_column": pairs.source_column, "target_column": pairs.target_column}
    if pairs.target_files or pairs.validation_target_files or pairs.test_target_files:
        splits, columns = (
            load_parallel(data_args, pairs, seed, quarantine),
            dict(zip(columns, (SOURCE, TARGET), strict=True)),
        )
    else:
        if pairs.source_column == pairs.target_column:
            raise ValueError(f"--source_column and --target_column are both {pairs.source_column!r}. Name two.")
        read = None if any("." in column for column in columns.values()) else columns.values()
        splits = load_tables(data_args, embedded_numbers, seed, quarantine, read)
    found = DatasetDict()
    for split, rows in splits.items():
        # Of a column of the Hub that holds both languages: `translation.en`.
        rows = check_columns(rows.flatten(), columns, quarantine.origin(split))
        for flag, column in columns.items():
            kind = rows.features.arrow_schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"column `{column}` holds {kind}, not text. Name another with --{flag}.")
        rows = rows.select_columns(list(columns.values()))
        found[split] = rows.rename_columns(dict(zip(columns.values(), (SOURCE, TARGET), strict=True)))
    return found


def encode_targets(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase | None,
    **options,
) -> list[list[int]]:
    """Ids of targets, by a tokenizer of their own or by the mode of the one that both have."""
    if target_tokenizer is not None:
        return target_tokenizer(texts, **options)["input_ids"]
    return tokenizer(text_target=texts, **options)["input_ids"]


def encode_pairs(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    is_cut: bool,
) -> tuple[Dataset, int]:
    """Tokenized pairs, and the number of those with more than `max_length` tokens on a side.

    Args:
        is_cut: those are cut; else they are left out, for what is cut off one side is not what is cut off the other.
    """

    def encode(batch):
        options = {"truncation": is_cut, "max_length": max_length if is_cut else None, "verbose": False}
        sources = tokenizer(batch[SOURCE], **options)
        labels = encode_targets(batch[TARGET], tokenizer, target_tokenizer, **options)
        lengths = [max(map(len, pair)) for pair in zip(sources["input_ids"], labels, strict=True)]
        return {
            "input_ids": sources["input_ids"],
            "attention_mask": sources["attention_mask"],
            "labels": labels,
            "length": lengths,
        }

    encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="tokenizing")
    if is_cut:
        return encoded, 0
    kept = [index for index, length in enumerate(encoded["length"]) if length <= max_length]
    if not kept:
        raise ValueError(f"every pair has more than {max_length} tokens on a side. Raise --max_length.")
    return encoded.select(kept), len(encoded) - len(kept)


@torch.no_grad()
def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int,
    target_tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    desc: str = "translating",
    **options,
) -> list[str]:
    """Translations of `texts`, in batches of similar length, with a progress bar.

    Args:
        max_length: tokens of a source; what follows is not read.
        options: of `generate`.
    """
    was_training = model.training
    model.eval()
    encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    most = model.config.max_position_embeddings - 1
    decode = partial((target_tokenizer or tokenizer).batch_decode, skip_special_tokens=True)
    found = {}
    with tqdm(total=len(texts), desc=desc, unit=" texts") as bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [encoded[index] for index in indices]}, return_tensors="pt")
            longest = min(batch["input_ids"].shape[1] + MOST_NEW_TOKENS_BEYOND_SOURCE, most)
            tokens = model.generate(**batch.to(model.device), max_new_tokens=longest, **options)
            found |= dict(zip(indices, (text.strip() for text in decode(tokens)), strict=True))
            bar.update(len(indices))
    model.train(was_training)
    return [found[index] for index in range(len(texts))]


def import_sacrebleu():
    """The package that scores, or a sentence that says how to have it."""
    try:
        import sacrebleu
    except ImportError:
        raise ValueError(
            "translations are scored by sacrebleu, which is not installed. Run `pip install 'hf_custom[translation]'`, "
            "or `pip install sacrebleu`."
        ) from None
    return sacrebleu


def score_translations(translations: list[str], references: list[str]) -> tuple[dict[str, float], str]:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015) of whole texts, from 0 to 100, and BLEU's signature."""
    metrics = import_sacrebleu().metrics
    bleu, chrf = metrics.BLEU(), metrics.CHRF()
    scores = {
        "BLEU": bleu.corpus_score(translations, [references]).score,
        "chrF": chrf.corpus_score(translations, [references]).score,
    }
    return scores, str(bleu.get_signature())
