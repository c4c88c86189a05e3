"""Words and their tags: read and check them, label their sub-tokens, and score what was predicted."""

import re
from collections.abc import Iterator

from datasets import ClassLabel, Dataset, DatasetDict
from seqeval.metrics import accuracy_score, classification_report
from seqeval.scheme import IOB2
from transformers import PreTrainedTokenizerBase

from training.preflight import ROW, Finding, Origin, check_columns, set_aside

ENTITY_TAG = re.compile(r"[BIESLU]-.+")
# Entities whose own F1 is reported; more would bury the rest.
MOST_ENTITIES = 12
IGNORED = -100


def find_unequal(tokens: list[list], tags: list[list], tokens_column: str, tags_column: str) -> Iterator[Finding]:
    """Rows with more or fewer tags than words, or without one of them."""
    for row, (words, marks) in enumerate(zip(tokens, tags, strict=True)):
        if len(words) != len(marks):
            problem = f"has {len(words)} words in `{tokens_column}` but {len(marks)} tags in `{tags_column}`"
            yield Finding(row, "ragged", problem, "Give each word one tag.")
        elif None in words or None in marks:
            yield Finding(row, "empty", "lacks a word or a tag", "Fill it or remove the row.")


def read_tags(rows: Dataset, split: str, tokens_column: str, tags_column: str, origin: Origin | None = None) -> Dataset:
    """Columns `tokens`, `tags` (as words) and `ROW`, the place in the data as given.

    Args:
        origin: says what becomes of bad rows; without it the first is refused.

    Raises:
        ValueError: for a column of another kind and for a row without words or with more or fewer tags than words.
    """
    origin = origin or Origin(f"the {split} data")
    rows = check_columns(rows, {"tokens_column": tokens_column, "tags_column": tags_column}, origin)
    kind = getattr(rows.features[tags_column], "feature", None)
    for flag, column in (("tokens_column", tokens_column), ("tags_column", tags_column)):
        item = getattr(rows.features[column], "feature", None)
        if not isinstance(item, ClassLabel) and getattr(item, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"column `{column}` holds {rows.features[column]}, not a list of words for each row. "
                f"Name another with --{flag}; tags that are numbers need their names (a `ClassLabel` of `datasets`)."
            )
    unequal = find_unequal(rows[tokens_column], rows[tags_column], tokens_column, tags_column)
    rows = set_aside(rows, unequal, origin)
    tokens, tags = rows[tokens_column], rows[tags_column]
    if isinstance(kind, ClassLabel):
        tags = [kind.int2str(list(marks)) for marks in tags]
    places = rows[ROW] if ROW in rows.column_names else range(len(rows))
    return Dataset.from_dict({"tokens": tokens, "tags": tags, ROW: places})


def inside(tag: str) -> str:
    """The tag of what follows within the same word: `I-X` of `B-X`."""
    return re.sub(r"^[BSU]-", "I-", tag)


def find_labels(splits: DatasetDict, label_all_tokens: bool, origins: dict[str, Origin] | None = None) -> list[str]:
    """The tags of the training data, `O` first.

    Args:
        origins: say what becomes of rows with a tag that training has not, by split; without it the first is refused.

    Raises:
        ValueError: when they are part entities and part not, or another split has one that training has not.
    """
    labels = {tag for tags in splits["train"]["tags"] for tag in tags}
    entities = {tag for tag in labels if ENTITY_TAG.match(tag)}
    if entities and entities | {"O"} != labels | {"O"}:
        odd = min(labels - entities - {"O"})
        raise ValueError(f"tag {odd!r} is no entity's, though others are. Write `B-NAME`, `I-NAME` or `O`.")
    known = ", ".join(sorted(labels))
    for split in set(splits) - {"train"}:
        findings = (
            Finding(
                index,
                "unknown label",
                f"has tag {min(set(tags) - labels)!r}, which is not in the training data ({known})",
                "Correct it, or train on rows that have it.",
            )
            for index, tags in enumerate(splits[split]["tags"])
            if set(tags) - labels
        )
        splits[split] = set_aside(splits[split], findings, (origins or {}).get(split, f"the {split} data"))
    if label_all_tokens:
        labels |= {inside(tag) for tag in labels}
    return sorted(labels, key=lambda tag: (tag != "O", tag))


def encode_words(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, labels: list[str], max_length: int, label_all_tokens: bool
) -> tuple[Dataset, int]:
    """Token ids and labels of the rows, and how many rows lost words to `max_length`.

    A word's first token carries its label; the others carry none or, with `label_all_tokens`, the one for inside.
    """
    numbers = {label: number for number, label in enumerate(labels)}

    def encode(batch):
        encoded = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
        labels = []
        for row, tags in enumerate(batch["tags"]):
            targets, last = [], None
            for word in encoded.word_ids(row):
                if word is None or (word == last and not label_all_tokens):
                    targets.append(IGNORED)
                else:
                    targets.append(numbers[inside(tags[word]) if word == last else tags[word]])
                last = word
            labels.append(targets)
        cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
        return {**encoded, "labels": labels, "cut": cut}

    # Not the places of rows, by which bad ones are named.
    names = [name for name in rows.column_names if name != ROW]
    encoded = rows.map(encode, batched=True, remove_columns=names, desc="tokenizing")
    return encoded.remove_columns("cut"), sum(encoded["cut"])


def score_tags(predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities and accuracy of words; of tags that are no entities', accuracy alone.

    An entity counts where its words and its name are right. `strict f1` takes an `I-` without a `B-` before it for no
    entity (IOB2), where the others take it for the beginning of one.
    """
    metrics = {}
    prefixes = {tag[0] for tags in references for tag in tags if ENTITY_TAG.match(tag)}
    if prefixes:
        report = classification_report(references, predictions, output_dict=True, zero_division=0)
        total = report["micro avg"]
        metrics = {"f1": total["f1-score"], "precision": total["precision"], "recall": total["recall"]}
        if prefixes <= {"B", "I"}:
            strict = classification_report(
                references, predictions, output_dict=True, zero_division=0, mode="strict", scheme=IOB2
            )
            metrics["strict f1"] = strict["micro avg"]["f1-score"]
        entities = [name for name in report if not name.endswith(" avg")]
        if len(entities) <= MOST_ENTITIES:
            metrics |= {f"f1 {name}": report[name]["f1-score"] for name in entities}
    return {
        **{name: float(value) for name, value in metrics.items()},
        "accuracy": accuracy_score(references, predictions),
    }
