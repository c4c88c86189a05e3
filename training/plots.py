"""Pictures of a run, drawn without a display."""

from pathlib import Path

import matplotlib

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
