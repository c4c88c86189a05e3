"""Pictures of a run, drawn without a display."""

import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - the backend is chosen before


def plot_loss_curve(
    log_history: list[dict], path: str | Path, title: str, levels: dict[str, float] | None = None
) -> None:
    """Training and validation loss against the step, as a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        levels: losses to compare with, drawn as dashed lines under their names.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    for color, (name, value) in enumerate((levels or {}).items(), start=2):
        axes.axhline(value, linestyle="--", linewidth=1, color=f"C{color}", label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_image_grid(
    pixels: np.ndarray, titles: list[str], is_correct: list[bool], path: str | Path, columns: int = 4
) -> None:
    """Images with a title each, green above a correct prediction and red above another, as a PNG.

    Args:
        pixels: (N, 3, height, width) of bytes.
    """
    rows = math.ceil(len(pixels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title, correct in zip(axes.flat, pixels, titles, is_correct, strict=False):
        axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
        lines = [textwrap.fill(line, 34) for line in title.splitlines()]
        # A dollar sign would begin a formula.
        axis.set_title("\n".join(lines).replace("$", r"\$"), fontsize=9, color="darkgreen" if correct else "firebrick")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_confusion_matrix(matrix: np.ndarray, labels: list[str], path: str | Path, title: str) -> None:
    """How often each label was taken for each, as a PNG: shaded by share of the row, with the counts written in.

    Args:
        matrix: (C, C) of counts, the correct label down and the predicted one across.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = min(14, 3 + 0.6 * len(labels))
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the correct label")
    if len(labels) <= 40:
        # A dollar sign would begin a formula.
        names = [textwrap.shorten(label, 24, placeholder="...").replace("$", r"\$") for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), names)
    if len(labels) <= 20:
        for row, column in np.ndindex(matrix.shape):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{matrix[row, column]}", ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="predicted label", ylabel="correct label", title=title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
