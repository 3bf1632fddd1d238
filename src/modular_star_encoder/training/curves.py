"""Curves of a pre-training run: what each exit learned, as a picture."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modular_star_encoder.data.files import staged_file

PANELS = (("mlm_loss", "masked-token loss (nats)"), ("icc_accuracy", "in-context classification accuracy"))


def plot_curves(log: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw masked-token loss and in-context accuracy of every exit over the steps.

    Thin lines are training rows, dots held-out repositories; dashes are what needs no model: the unigram entropy, and
    the accuracy of identifier overlap on the held-out rows.

    Args:
        log: what `pretrain` returns, or the content of its `training_log.json`.
        path: PNG file to write, replaced if it is there.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the log has no line of training.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Curves need matplotlib: pip install 'modular-star-encoder[plots]'.") from error
    history = log["log_history"]
    exits = _exits(history)
    if not exits:
        raise ValueError("The log has no line of training to draw.")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    floors = {"mlm_loss": log["unigram_entropy"], "icc_accuracy": log["identifier_overlap"]["accuracy"]}
    for axes, (metric, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for number, exit_layer in enumerate(exits):
            colour = f"C{number}"
            axes.plot(*_series(history, f"{metric}_exit_{exit_layer}"), color=colour, linewidth=0.7, alpha=0.5)
            held_out = _series(history, f"eval_{metric}_exit_{exit_layer}")
            axes.plot(*held_out, color=colour, marker="o", markersize=3, label=f"exit {exit_layer}")
        axes.axhline(floors[metric], color="grey", linestyle="--", linewidth=0.8)
        axes.set(xlabel="step", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    with staged_file(Path(path)) as staging:
        figure.savefig(staging, format="png", dpi=120)


def _exits(history: Sequence[Mapping[str, Any]]) -> list[int]:
    prefix = "mlm_loss_exit_"
    return sorted({int(key.removeprefix(prefix)) for line in history for key in line if key.startswith(prefix)})


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = {line["step"]: line[key] for line in history if line.get(key) is not None}
    return list(points), list(points.values())
