"""Labels of rows: their names and numbers, and a loss that weighs them by how rare they are."""

import math

import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset
from torch import nn
from transformers.utils import ModelOutput

from training.preflight import Finding, Origin, row_of_the_data, set_aside

# Of a column of labels with more distinct values than this share of its rows, every other row would be a class.
MOST_CLASSES = 0.5


def label_type(rows: Dataset, column: str) -> pa.DataType:
    """What a column holds, as Arrow names it."""
    return rows.features.arrow_schema.field(column).type


def label_names(rows: Dataset, column: str) -> list[str]:
    """The label of each row by name."""
    feature, values = rows.features[column], list(rows[column])
    if isinstance(feature, ClassLabel):
        # The Hub hides the labels of a test split behind -1.
        return [feature.names[value] if value >= 0 else str(value) for value in values]
    return [str(value) for value in values]


def find_classes(rows: Dataset, column: str) -> list[str]:
    """Names of the classes, in the order of their values.

    Raises:
        ValueError: when the column is none of labels.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    kind = label_type(rows, column)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)) and (
        not pa.types.is_boolean(kind)
    ):
        raise ValueError(f"column `{column}` holds {kind}, not labels. Name another with --label_column.")
    classes = [str(value) for value in sorted(set(rows[column]))]
    if len(classes) < 2:
        raise ValueError(f"column `{column}` holds `{classes[0]}` in all rows, so there is nothing to tell apart.")
    if len(classes) > max(2, MOST_CLASSES * len(rows)):
        raise ValueError(
            f"column `{column}` holds {len(classes)} different values in {len(rows)} rows, too many for labels. "
            "Name another with --label_column or, if they are amounts, add --regression."
        )
    return classes


def class_numbers(rows: Dataset, column: str, classes: list[str], where: str) -> list[int]:
    """The number of each row's class.

    Args:
        where: the rows in words.

    Raises:
        ValueError: for a label that is no class, naming its row.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    names = label_names(rows, column)
    for index, name in enumerate(names):
        if name not in numbers:
            raise ValueError(
                f"row {row_of_the_data(rows, index)} of {where} has the label `{name}` in column `{column}`, which no "
                f"training row has; those have {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}. "
                "Remove the row, or give rows with this label to train on."
            )
    return [numbers[name] for name in names]


def known_labels(rows: Dataset, column: str, classes: list[str], where: Origin) -> Dataset:
    """The rows whose label is one of the classes; another is refused or, with a quarantine, set aside."""
    known = set(classes)
    findings = (
        Finding(
            index,
            "unknown label",
            f"has the label `{name}` in column `{column}`, which no training row has; those have "
            f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}",
            "Remove the row, or give rows with this label to train on.",
        )
        for index, name in enumerate(label_names(rows, column))
        if name not in known
    )
    return set_aside(rows, findings, where)


def finite_amounts(rows: Dataset, column: str, where: Origin) -> Dataset:
    """The rows whose amount is finite; another is refused or, with a quarantine, set aside."""
    check_amounts(rows, column, where.words)
    findings = (
        Finding(index, "label out of range", f"has {value} in column `{column}`", "Give a number or remove the row.")
        for index, value in enumerate(rows[column])
        if not math.isfinite(value)
    )
    return set_aside(rows, findings, where)


def check_amounts(rows: Dataset, column: str, where: str) -> None:
    """Refuse a column of anything but numbers."""
    kind = label_type(rows, column)
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"column `{column}` of {where} holds {kind}, but --regression needs numbers.")


def amounts(rows: Dataset, column: str, where: str) -> list[float]:
    """The number to predict of each row.

    Raises:
        ValueError: for what is no finite number, naming its row.
    """
    check_amounts(rows, column, where)
    values = [float(value) for value in rows[column]]
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"row {row_of_the_data(rows, index)} of {where} has {value} in column `{column}`.")
    return values


def balanced_weights(numbers: list[int], num_classes: int) -> torch.Tensor:
    """Weights (C,) with which each class counts alike and the mean weight of a row is 1; 0 of a class without rows."""
    counts = torch.bincount(torch.tensor(numbers), minlength=num_classes)
    return torch.where(counts > 0, len(numbers) / (counts.clamp(min=1) * (counts > 0).sum()), 0.0)


class WeightedLoss:
    """Cross-entropy with a weight for each class, as `compute_loss_func` of the host's Trainer.

    Divided by the number of rows in all micro-batches of a step, so that how they are cut changes nothing. Divided by
    their weights, as torch does, a row would count for more in a batch of common classes.

    Args:
        weights: (C,), one for each class.
    """

    def __init__(self, weights: torch.Tensor, label_smoothing: float = 0.0):
        self.weights = weights
        self.label_smoothing = label_smoothing

    def __call__(
        self, outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        total = nn.functional.cross_entropy(
            outputs["logits"].float(),
            labels,
            self.weights.to(labels.device),
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
