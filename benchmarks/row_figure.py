"""Rows of a results file (see `ratios.figure`) as a picture: each ratio with its interval, beside its target."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ratios import is_met


def plot_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: a line per ratio, green where the target is met, red where not; the target is a black stroke."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {True: "tab:green", False: "tab:red", None: "tab:blue"}
    figure, axes = plt.subplots(figsize=(10, 1 + 0.3 * len(rows)))
    for place, row in enumerate(rows):
        low, high = row.get("low", row["value"]), row.get("high", row["value"])
        axes.plot([low, high], [place, place], color=colours[is_met(row)])
        axes.plot(row["value"], place, "o", color=colours[is_met(row)])
        if is_met(row) is not None:
            axes.plot(row.get("most", row.get("least")), place, "|", color="black", markersize=14)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ratio and its 95 % interval; | the target")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
