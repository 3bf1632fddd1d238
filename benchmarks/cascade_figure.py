"""The figure of cascade.py: quality against what indexing costs, and against what a question costs."""

from pathlib import Path
from typing import Any

SIZES = {10: 20, 50: 45, 200: 90}


def plot(figures: dict[str, Any], path: Path) -> None:
    """A line of the exits alone with their intervals, and a point for each cascade into the deepest exit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    exits, deepest = figures["exit_layers"], figures["exit_layers"][-1]
    alone = [way for way in figures["ways"] if way["rerank_exit_layer"] is None]
    cascades = [way for way in figures["ways"] if way["rerank_exit_layer"] == deepest]
    for axes, cost in ((left, "index_gflop_per_1000"), (right, "query_gflop")):
        places = [way[cost] for way in alone]
        axes.plot(places, [100 * way["mrr"] for way in alone], marker="s", color="black", label="an exit alone")
        low, high = ([100 * way["interval"][bound] for way in alone] for bound in (0, 1))
        axes.fill_between(places, low, high, color="black", alpha=0.1, linewidth=0)
        for way, place in zip(alone, places, strict=True):
            axes.annotate(
                f"{way['exit_layer']}", (place, 100 * way["mrr"]), xytext=(4, -12), textcoords="offset points"
            )
        for way in cascades:
            colour = f"C{exits.index(way['exit_layer'])}"
            fill = colour if "margins" not in way else "none"
            size = SIZES[way["candidates"]]
            axes.scatter(way[cost], 100 * way["mrr"], s=size, facecolors=fill, edgecolors=colour, alpha=0.8, zorder=3)
        axes.grid(alpha=0.3)
    left.set_xlim(left=0)
    right.set_xscale("log")
    for exit_layer in exits[:-1]:
        colour = f"C{exits.index(exit_layer)}"
        left.scatter([], [], color=colour, label=f"exit {exit_layer}, then {deepest} on its candidates")
    left.scatter([], [], facecolors="none", edgecolors="grey", label="the same, with a fitted margin")
    left.set_xlabel("GFLOP to index 1,000 functions")
    right.set_xlabel("GFLOP per question")
    left.set_ylabel("MRR × 100")
    left.legend(fontsize="x-small")
    right.set_title("small, middle and large points: 10, 50 and 200 candidates", fontsize="small")
    left.set_title(f"{figures['checkpoint']}; CodeSearchNet, {', '.join(figures['languages'])}", fontsize="small")
    figure.savefig(path, dpi=150)
