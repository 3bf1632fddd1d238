"""An ablation as Markdown, JSON and a picture."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modular_star_encoder.data.files import staged_file, write_json, write_text
from modular_star_encoder.evaluation.markdown import markdown_table, metric_label, percent
from modular_star_encoder.evaluation.report import versions
from modular_star_encoder.training.ablation_results import METRICS

_PANEL = (4.6, 3.4)  # inches


def write_ablation_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write `ablation.json`, `ablation.md` and, where matplotlib is installed, `ablation.png`.

    Args:
        results: what `compare` returns, with `command`, `recipe`, `seconds` and `bm25` (benchmark → MRR).
        folder: where to write.
    """
    write_json(folder / "ablation.json", {**results, "versions": dict(versions())})
    write_text(folder / "ablation.md", to_markdown(results))
    if find_spec("matplotlib"):
        plot_ablation(results, folder / "ablation.png")


def without_places(value: Any) -> Any:
    """The same with `$MOSE_DATA` and `$HOME` in place of where they are on this machine."""
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    if isinstance(value, str):
        for variable in ("MOSE_DATA", "HOME"):
            if place := os.environ.get(variable, "").rstrip("/"):
                value = value.replace(place, f"${variable}")
    return value


def to_markdown(results: Mapping[str, Any]) -> str:
    """Tables with scores × 100, aligned for reading as plain text."""
    seeds = ", ".join(map(str, results["seeds"]))
    recipe = results["recipe"]["finetuning"]
    parts = [
        "# Ablation: exits trained together and alone",
        *([f"    {results['command']}"] if results["command"] else []),
        f"{recipe['steps']} steps of {recipe['batch_size']} pairs from {recipe['model']}; means over seeds {seeds}. "
        "Scores × 100. Intervals: 95 %, bootstrap over queries, paired for differences; ties count against the system.",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    for name, found in results["benchmarks"].items():
        parts.append(f"## {name}")
        parts.append(f"{found['queries']:,} queries; BM25 has an MRR of {percent(results['bm25'][name])}.")
        parts.append("\n".join(markdown_table(_exit_rows(found))))
        if found["variants"]:
            parts.append("Other recipes, compared with the self-distilled model by MRR:")
            parts.append("\n".join(markdown_table(_variant_rows(results["exits"], found["variants"]))))
    return "\n\n".join(parts) + "\n"


def plot_ablation(results: Mapping[str, Any], path: Path) -> None:
    """MRR and Recall@1 against layers, self-distilled and alone, with intervals; a row of panels for each benchmark.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'modular-star-encoder[plots]'.") from error
    benchmarks, width = results["benchmarks"], len(METRICS)
    figure = Figure(figsize=(width * _PANEL[0], len(benchmarks) * _PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (name, found) in enumerate(benchmarks.items()):
        for column, metric in enumerate(METRICS):
            axes = figure.add_subplot(len(benchmarks), width, row * width + column + 1)
            for key, label in (("self_distilled", "self-distilled"), ("alone", "single exits")):
                exits = [exit_layer for exit_layer, one in found["exits"].items() if key in one]
                figures = [found["exits"][exit_layer][key][metric] for exit_layer in exits]
                places = list(map(int, exits))
                (line,) = axes.plot(places, [100 * one["value"] for one in figures], marker="o", label=label)
                bounds = ([100 * one[bound] for one in figures] for bound in ("low", "high"))
                axes.fill_between(places, *bounds, alpha=0.15, color=line.get_color(), linewidth=0)
            axes.set(xlabel="layers", ylabel=f"{metric_label(metric)} × 100", title=name)
            axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    with staged_file(path) as staging:
        figure.savefig(staging, format="png", dpi=120)


def _exit_rows(found: Mapping[str, Any]) -> list[list[str]]:
    header = ["exit"]
    for metric in METRICS:
        header += [f"{metric_label(metric)}", "alone", "difference", "interval", "by seed"]
    rows = [header]
    for exit_layer, one in found["exits"].items():
        row = [exit_layer]
        for metric in METRICS:
            row.append(percent(one["self_distilled"][metric]["value"]))
            row += [percent(one["alone"][metric]["value"]) if "alone" in one else ""]
            row += _difference(one.get("difference", {}).get(metric))
        rows.append(row)
    if "mean_difference" in found:
        row = ["mean"]
        for metric in METRICS:
            row += ["", "", *_difference(found["mean_difference"][metric])]
        rows.append(row)
    return rows


def _variant_rows(exits: Sequence[int], variants: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", *(f"exit {exit_layer}" for exit_layer in exits), "mean", "interval", "by seed", "verdict"]]
    for name, one in variants.items():
        changes = [100 * one["exits"][str(exit_layer)]["difference"]["mrr"]["value"] for exit_layer in exits]
        verdict = "recommended" if one["recommended"] else "no gain"
        if one["lowered_exits"]:
            verdict = f"lowers {', '.join(map(str, one['lowered_exits']))}"
        rows.append(
            [name, *(f"{change:+.1f}" for change in changes), *_difference(one["mean_difference"]["mrr"]), verdict]
        )
    return rows


def _difference(figure: Mapping[str, Any] | None) -> list[str]:
    """Difference, interval, and the smallest and largest of the seeds."""
    if figure is None:
        return ["", "", ""]
    value, low, high = (f"{100 * figure[name]:+.1f}" for name in ("value", "low", "high"))
    seeds = [100 * value for value in figure["by_seed"]]
    return [value, f"{low} to {high}", f"{min(seeds):+.1f} to {max(seeds):+.1f}"]
