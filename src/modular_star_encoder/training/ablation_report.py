"""From the reciprocal ranks of single queries to the tables and the plot of an ablation.

Every estimate is a mean over queries of the mean over seeds. Its interval is a percentile bootstrap over the queries,
paired for differences. Benchmarks of several tasks weigh every task equally (see `spread`). Seeds are reported one by
one, because three of them make no interval.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from modular_star_encoder.evaluation.metrics import bootstrap_interval, spread
from modular_star_encoder.evaluation.report import versions
from modular_star_encoder.utils.files import staged_file, write_json, write_text
from modular_star_encoder.utils.reports import markdown_table, metric_label, percent

SELF_DISTILLED = "self-distilled"

Values = Mapping[str, Mapping[str, float]]
"""task → query → value."""

Scores = Mapping[tuple[str, int], Mapping[str, Mapping[int, Values]]]
"""(kind of model, seed) → benchmark → exit → the reciprocal rank of each query."""

METRICS: dict[str, Callable[[float], float]] = {
    "mrr": lambda reciprocal_rank: reciprocal_rank,
    "recall@1": lambda reciprocal_rank: float(reciprocal_rank == 1.0),
}


@dataclass(frozen=True, slots=True)
class SeededEstimate:
    """A score or a difference, as a fraction, with its 95 % bootstrap interval over the queries.

    Attributes:
        value, low, high: of the mean over seeds.
        by_seed: the value of each seed.
    """

    value: float
    low: float
    high: float
    by_seed: list[float]


def compare(
    scores: Scores, exits: Sequence[int], seeds: Sequence[int], variants: Sequence[str], *, draws: int = 0
) -> dict[str, Any]:
    """Compare self-distilled exits with those trained alone, and variants with the self-distilled model.

    Args:
        scores: of every cell.
        exits: of the model.
        seeds: in the order of `by_seed`.
        variants: their names.
        draws: seed of the bootstrap.

    Returns:
        `exits`, `seeds`, and `benchmarks`: name → `queries`, `exits` (exit → `self_distilled` and, with a
        baseline, `alone` and `difference`, each with `mrr` and `recall@1`), `mean_difference` over these exits, and
        `variants` (name → the figures and differences of each exit, `mean_difference` over all exits, and
        `recommended`).
    """
    benchmarks = scores[SELF_DISTILLED, seeds[0]]
    return {
        "exits": list(exits),
        "seeds": list(seeds),
        "benchmarks": {name: _Benchmark(name, scores, exits, seeds, draws).results(variants) for name in benchmarks},
    }


class _Benchmark:
    """The scores of all models on one benchmark."""

    def __init__(self, name: str, scores: Scores, exits: Sequence[int], seeds: Sequence[int], draws: int) -> None:
        self.name, self.scores, self.exits, self.seeds, self.draws = name, scores, exits, seeds, draws

    def results(self, variants: Sequence[str]) -> dict[str, Any]:
        """All estimates on the benchmark."""
        alone = [exit_layer for exit_layer in self.exits if (f"exit-{exit_layer}", self.seeds[0]) in self.scores]
        by_exit: dict[str, Any] = {}
        for exit_layer in self.exits:
            own = self.values(SELF_DISTILLED, exit_layer)
            by_exit[str(exit_layer)] = {"self_distilled": self.figures(own)}
            if exit_layer in alone:
                other = self.values(f"exit-{exit_layer}", exit_layer)
                by_exit[str(exit_layer)] |= {
                    "alone": self.figures(other),
                    "difference": self.figures(own, other),
                }
        found = {"queries": sum(map(len, self.values(SELF_DISTILLED, self.exits[0])[0].values())), "exits": by_exit}
        if alone:
            found["mean_difference"] = self.figures(
                self.over_exits([self.values(SELF_DISTILLED, exit_layer) for exit_layer in alone]),
                self.over_exits([self.values(f"exit-{exit_layer}", exit_layer) for exit_layer in alone]),
            )
        return found | {"variants": {name: self.variant(name) for name in variants}}

    def variant(self, name: str) -> dict[str, Any]:
        """The estimates of a variant, and of its difference from the self-distilled model.

        It is recommended if it raises the mean MRR over exits (the interval of the difference is above 0) and lowers no
        exit (no interval of an exit's difference is below 0).
        """
        pairs = {
            exit_layer: (self.values(name, exit_layer), self.values(SELF_DISTILLED, exit_layer))
            for exit_layer in self.exits
        }
        by_exit = {
            str(exit_layer): {"figures": self.figures(own), "difference": self.figures(own, reference)}
            for exit_layer, (own, reference) in pairs.items()
        }
        own, reference = (self.over_exits([pair[side] for pair in pairs.values()]) for side in (0, 1))
        mean = self.figures(own, reference)
        lowered = [exit_layer for exit_layer, found in by_exit.items() if found["difference"]["mrr"]["high"] < 0]
        return {
            "exits": by_exit,
            "mean_difference": mean,
            "lowered_exits": list(map(int, lowered)),
            "recommended": mean["mrr"]["low"] > 0 and not lowered,
        }

    def values(self, model: str, exit_layer: int) -> list[Values]:
        """Reciprocal ranks at an exit, by seed."""
        return [self.scores[model, seed][self.name][exit_layer] for seed in self.seeds]

    def over_exits(self, by_exit: Sequence[list[Values]]) -> list[list[Values]]:
        """Map each seed to its values, one for each exit."""
        return [list(of_seed) for of_seed in zip(*by_exit, strict=True)]

    def figures(self, own: Sequence[Any], reference: Sequence[Any] | None = None) -> dict[str, dict[str, Any]]:
        """Metric → figure of `own`, or of its difference to `reference`; both by seed, of one exit or of several."""
        found = {}
        for metric, of_rank in METRICS.items():
            by_seed = [_average(_as_list(values), of_rank) for values in own]
            if reference is not None:
                others = [_average(_as_list(values), of_rank) for values in reference]
                by_seed = [_minus(first, second) for first, second in zip(by_seed, others, strict=True)]
            queries = spread(list(_average(by_seed).values()))
            means = [float(np.mean([np.mean(list(task.values())) for task in one.values()])) for one in by_seed]
            low, high = bootstrap_interval(queries, self.draws)
            found[metric] = asdict(SeededEstimate(float(queries.mean()), low, high, means))
        return found


def _as_list(values: Values | list[Values]) -> list[Values]:
    return values if isinstance(values, list) else [values]


def _average(several: Sequence[Values], function: Callable[[float], float] = float) -> Values:
    """The mean, query by query, of a function of the values."""
    first = several[0]
    return {
        task: {query: float(np.mean([function(values[task][query]) for values in several])) for query in first[task]}
        for task in first
    }


def _minus(first: Values, second: Values) -> Values:
    return {task: {query: value - second[task][query] for query, value in of.items()} for task, of in first.items()}


_PANEL = (4.6, 3.4)  # inches


def write_ablation_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write `ablation.json`, `ablation.md` and, where matplotlib is installed, `ablation.png`.

    Args:
        results: those of `compare`, with `command`, `recipe`, `seconds` and `bm25` (benchmark → MRR).
        folder: where to write.
    """
    write_json(folder / "ablation.json", {**results, "versions": dict(versions())})
    write_text(folder / "ablation.md", to_markdown(results))
    if find_spec("matplotlib"):
        plot_ablation(results, folder / "ablation.png")


def without_places(value: Any) -> Any:
    """The same with `$MOSE_DATA` and `$HOME` in place of their paths on this machine."""
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
        f"{recipe['max_steps']} steps of {recipe['batch_size']} pairs from {recipe['model']}; means over seeds "
        f"{seeds}. Scores × 100. Intervals: 95 %, bootstrap over queries, paired for differences; ties count against "
        "the retriever.",
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
                low, high = ([100 * one[bound] for one in figures] for bound in ("low", "high"))
                axes.fill_between(places, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
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
