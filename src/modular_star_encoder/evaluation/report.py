"""Write the results of an evaluation as tables in Markdown, CSV, LaTeX and JSON, and as plots (extra `plots`).

There is one table per benchmark. `read_tables` reads the tables back from `report.json`.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field as Constraint
from pydantic import TypeAdapter

from modular_star_encoder.evaluation import metrics
from modular_star_encoder.evaluation.benchmarks import BENCHMARKS
from modular_star_encoder.evaluation.tasks import Estimate, Task, TaskResult
from modular_star_encoder.inference.exit_profile import ExitProfile, profile_lock
from modular_star_encoder.utils.errors import UserError, naming_extra
from modular_star_encoder.utils.files import read_json, staged_file, write_json, write_text
from modular_star_encoder.utils.reports import library_versions, markdown_table, metric_label, percent

PACKAGES = ("modular-star-encoder", "torch", "transformers", "sentence-transformers", "bm25s", "scikit-learn")

_MEANINGS = {
    "mrr": "mean of 1 / rank of the first relevant document",
    "recall@": "share of the relevant documents among the first k",
    "ndcg": "sum of 1 / log2(rank + 1) over the relevant documents found, divided by that of the best order",
    "map@r": "mean precision at the ranks of the R relevant documents, 0 at ranks above R",
    "f1": "harmonic mean of precision and recall",
}
_Key = tuple[str, int | None, int | None]  # the retriever, exit and dimensions of one row of a table
_TEX = str.maketrans(
    {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "→": r"$\to$", "–": "--"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"Δ": r"$\Delta$", "×": r"$\times$"}
)


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean score of a table row minus that of the reference row, with the p-value of a paired permutation test."""

    value: float
    p: float
    low: float | None = None  # bounds of the 95 % bootstrap interval of the difference; None for F1
    high: float | None = None

    def __str__(self) -> str:
        bounds = "" if self.low is None or self.high is None else f" ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        return f"{100 * self.value:+.1f}{bounds}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: the scores of a retriever at one exit and embedding size on a benchmark."""

    retriever: str
    exit_layer: int | None
    dimensions: int | None
    columns: Mapping[str, Estimate]  # {column of the table: value of the main metric in this column}
    mean: Estimate  # mean of the main metric over all tasks
    others: Mapping[str, float]  # {metric other than the main one: its mean over all tasks}
    difference: Difference | None  # from the reference row; None in rows that are compared with no other

    @property
    def label(self) -> str:
        """The name of the row in tables, such as "model, exit 4, 256 dimensions"."""
        exit_layer = "" if self.exit_layer is None else f", exit {self.exit_layer}"
        return f"{self.retriever}{exit_layer}{'' if self.dimensions is None else f', {self.dimensions} dimensions'}"


@dataclass(frozen=True, slots=True)
class Table:
    """The scores of all retrievers on one benchmark."""

    benchmark: str
    metric: str  # the main metric
    rows: Annotated[Sequence[Row], Constraint(max_length=1000)]  # by retriever, then exit
    reference: str  # label of the row with which others are compared, or "the same exit (RETRIEVER)"
    size: str  # the numbers of queries (or pairs) and candidates, in words
    notes: Sequence[str]  # caveats, shown below the table

    @property
    def title(self) -> str:
        """The heading of the table: the title of its benchmark."""
        return BENCHMARKS[self.benchmark].title if self.benchmark in BENCHMARKS else self.benchmark


TABLES = TypeAdapter(Annotated[list[Table], Constraint(min_length=1, max_length=100)])  # a card with more takes minutes


@dataclass(frozen=True, slots=True)
class Report:
    """The results of an evaluation: a table for each benchmark, and the results of all tasks."""

    tables: Sequence[Table]  # one per benchmark
    results: Sequence[TaskResult]  # one per retriever, exit and task, with the value of each query
    command: str = ""  # the command that ran the evaluation
    checksum: str | None = None  # checksum of the evaluated checkpoint (see `checkpoint_checksum`)

    def write(self, folder: Path) -> None:
        """Write report.md, report.csv, report.tex and report.json to a folder, each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.md", self.to_markdown())
        write_text(folder / "report.csv", to_csv(self.results))
        write_text(folder / "report.tex", to_latex(self.tables))
        write_json(folder / "report.json", self.to_dict())

    def to_markdown(self) -> str:
        """Return the tables as Markdown with aligned columns; scores are multiplied by 100."""
        installed = ", ".join(f"{name} {version}" for name, version in versions().items())
        parts = ["# Evaluation", *([f"    {self.command}"] if self.command else []), installed]
        for one in self.tables:
            parts.append("\n".join([f"## {one.title}", "", *markdown_table(_cells(one)), "", *_explain(one)]))
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json: all tables, and all results without the values of single queries."""
        stored = [asdict(replace(one, values=(), ids=())) | {"queries": len(one.values)} for one in self.results]
        results = [{name: value for name, value in one.items() if name not in ("values", "ids")} for one in stored]
        head = {"command": self.command, "checkpoint_checksum": self.checksum, "versions": versions()}
        return head | {"tables": [{"title": one.title, **asdict(one)} for one in self.tables], "results": results}


def versions() -> dict[str, str]:
    """Return {name: version} of Python and of the installed packages that affect scores."""
    return {name: version for name, version in library_versions(PACKAGES).items() if version is not None}


def make_report(
    tasks: Sequence[Task],
    results: Sequence[TaskResult],
    command: str = "",
    checksum: str | None = None,
    before: str | None = None,  # model whose same exit each exit is compared with; None: the first model's deepest exit
) -> Report:
    """Return a report on the results of all retrievers; its tables are in the order of the benchmarks in `tasks`."""
    benchmarks = dict.fromkeys(task.benchmark for task in tasks)
    tables = [_table(name, [task for task in tasks if task.benchmark == name], results, before) for name in benchmarks]
    return Report(tables, results, command, checksum)


def _table(benchmark: str, tasks: Sequence[Task], results: Sequence[TaskResult], before: str | None) -> Table:
    found: dict[_Key, dict[str, TaskResult]] = {}
    for result in results:
        if result.benchmark == benchmark:
            found.setdefault((result.retriever, result.exit_layer, result.dimensions), {})[result.task] = result
    groups = {key: [by_task[task.name] for task in tasks] for key, by_task in found.items()}
    own = [key for key in groups if key[1] is not None]
    own = [key for key in own if key[0] == own[0][0]]
    reference = max(own, key=lambda key: (key[1] or 0, key[2] or 0)) if own else next(iter(groups))
    rows = []
    for key, group in groups.items():
        other = (before, *key[1:]) if before else reference
        rows.append(_row(key, tasks, group, None if other == key else groups.get(other)))
    label = f"the same exit ({before})" if before else next(row.label for row in rows if row.difference is None)
    notes = list(dict.fromkeys(note for task in tasks for note in task.notes))
    first = groups[reference]
    size = f"{sum(len(result.values) for result in first):,} {'queries' if first[0].candidates else 'pairs'}"
    if first[0].candidates:
        counts = [one.candidates for one in first]
        size += f", {' to '.join(f'{bound:,}' for bound in sorted({min(counts), max(counts)}))} candidates each"
    return Table(benchmark, first[0].main, rows, label, size, notes)


def _row(
    key: _Key, tasks: Sequence[Task], results: Sequence[TaskResult], reference: Sequence[TaskResult] | None
) -> Row:
    groups: dict[str, list[TaskResult]] = {}
    for task, result in zip(tasks, results, strict=True):
        groups.setdefault(task.column or task.name, []).append(result)
    columns = {column: _mean_estimate(group) for column, group in groups.items()}
    names = [metric for metric in results[0].estimates if metric != results[0].main]
    others = {metric: float(np.mean([one.estimates[metric].value for one in results])) for metric in names}
    difference = None if reference is None else _difference(results, reference)
    return Row(*key, columns, _mean_estimate(results), others, difference)


def _mean_estimate(results: Sequence[TaskResult]) -> Estimate:
    """Return the mean over tasks of the main metric, with its 95 % interval; for F1, `results` must be of one task."""
    if len(results) == 1:
        return results[0].estimates[results[0].main]
    values = metrics.spread([dict(zip(result.ids, result.values, strict=True)) for result in results])
    return Estimate(float(values.mean()), *metrics.bootstrap_interval(values))


def _difference(results: Sequence[TaskResult], reference: Sequence[TaskResult]) -> Difference:
    """Return the mean of `results` minus the mean of `reference`; both must have the same tasks and queries."""
    pairs = list(zip(results, reference, strict=True))
    value = float(np.mean([a.estimates[a.main].value - b.estimates[b.main].value for a, b in pairs]))
    if results[0].main == "f1":
        first, second = (np.array(result.values, dtype=np.int64) for result in pairs[0])
        return Difference(value, metrics.f1_permutation_test(first, second))
    differences = [dict(zip(a.ids, np.subtract(a.values, b.values), strict=True)) for a, b in pairs]
    bounds = metrics.bootstrap_interval(metrics.spread(differences))
    return Difference(value, metrics.permutation_test(metrics.shares(differences)), *bounds)


def to_latex(tables: Sequence[Table]) -> str:
    """Return LaTeX code with one `table` environment per table; the code needs the LaTeX package booktabs."""
    parts = []
    for table in tables:
        caption, cells = " ".join([f"{table.title}.", *_explain(table)]), _cells(table)
        header, *lines = [" & ".join(cell.translate(_TEX) for cell in row) + r" \\" for row in cells]
        parts += [r"\begin{table}", r"\centering", rf"\caption{{{caption.translate(_TEX)}}}"]
        parts += [rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}", r"\toprule", header, r"\midrule", *lines]
        parts += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(parts)


def to_csv(results: Sequence[TaskResult]) -> str:
    """Return CSV: a header, then one line for each metric of each result; scores are fractions."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    place = ["benchmark", "task", "retriever", "exit_layer", "dimensions"]
    writer.writerow([*place, "metric", "value", "low", "high", "queries", "candidates"])
    for one in results:
        for metric, estimate in one.estimates.items():
            numbers = (estimate.value, estimate.low, estimate.high, len(one.values), one.candidates)
            writer.writerow([*(getattr(one, name) for name in place), metric, *numbers])
    return file.getvalue()


def interval(estimate: Estimate) -> str:
    """Return the 95 % interval of an estimate, × 100, as text such as "61.2–65.0"."""
    return f"{percent(estimate.low)}–{percent(estimate.high)}"


def _cells(table: Table) -> list[list[str]]:
    """Return the texts of a table's cells, header first. The first columns after the label show the main metric."""
    columns, others, main = list(table.rows[0].columns), list(table.rows[0].others), metric_label(table.metric)
    named = [*columns, "mean"] if len(columns) > 1 else columns
    cells = [[f"{main} × 100", *named, "95 % interval", *map(metric_label, others), f"Δ {main}", "p"]]
    for row in table.rows:
        values = [*row.columns.values(), row.mean][: len(named)]
        changed = ["", ""] if row.difference is None else [str(row.difference), f"{row.difference.p:.4f}"]
        scores = [percent(estimate.value) for estimate in values]
        cells.append([row.label, *scores, interval(row.mean), *map(percent, row.others.values()), *changed])
    return cells


def _explain(table: Table) -> list[str]:
    """Return the sentences shown below a table: they explain its size, metrics, intervals and tests; then its notes."""
    shown = [(re.sub(r"@\d+", "@k", metric_label(one)), one) for one in (table.metric, *table.rows[0].others)]
    known = {label: text for label, one in shown for start, text in _MEANINGS.items() if one.startswith(start)}
    meanings = "".join(f" {label}: {text}." for label, text in known.items())
    of_pairs, ties = table.metric == "f1", "among equal scores, relevant documents rank last"
    values = f"All scores × 100; {table.size}{'' if of_pairs else f'; {ties}'}.{meanings}"
    values += f" Intervals: bootstrap over {'pairs' if of_pairs else 'queries'}."
    tests = f"Δ: difference from {table.reference}, with its interval; p: paired permutation test."
    return [f"{values} {tests}", *(f"Note: {note}." for note in table.notes)]


def read_tables(path: str | os.PathLike[str], checkpoint: str = "") -> list[Table]:
    """Read the tables of a results file; keep only the rows of the evaluated model and of retrievers without exits.

    `path` is a report.json, a training_log.json or a file from `mose evaluate --json`. `checkpoint` is the checksum
    that the evaluated model must have; "" accepts any model. If an exit has rows for several embedding sizes, only the
    row of the largest size is kept.
    """
    try:
        content = read_json(path)
        content = content.get("retrieval", content)
        measured = content["checkpoint_checksum"]
        tables = [_evaluated_model(table) for table in TABLES.validate_python(content["tables"])]
        TABLES.dump_json(tables)  # raises ValueError for lone surrogates
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        message = f"{path} is not a results file of `mose evaluate`, or is from another version: evaluate again."
        raise UserError("evaluation.report.unreadable", message) from error
    if measured and checkpoint and measured != checkpoint:
        message = f"{path} is of a model with other weights (checksum {measured}, not {checkpoint}): evaluate again."
        raise UserError("evaluation.report.other_weights", message)
    return tables


def read_quality(path: str | os.PathLike[str], checkpoint: str = "", benchmark: str = "") -> dict[int, float]:
    """Read {exit_layer: mean of the main metric} from the table of `benchmark` in a results file (see `read_tables`).

    `benchmark` may be a name of the user's own, not in `BENCHMARKS`: if no table has this name, read the first table.
    """
    tables = read_tables(path, checkpoint)
    is_known = benchmark in BENCHMARKS
    chosen = [one for one in tables if one.benchmark == benchmark][:1] or ([] if is_known else tables[:1])
    quality = {row.exit_layer: row.mean.value for one in chosen for row in one.rows if row.exit_layer is not None}
    if not quality:
        message = f"{path} has no scores of exits{f' on {benchmark}' * is_known}: evaluate a model that has exits."
        raise UserError("evaluation.report.no_exits", message)
    return quality


def add_quality(path: Path, benchmark: str, results: str | os.PathLike[str]) -> ExitProfile:
    """Add scores from the file `results` (see `read_quality`) to the exit profile in `path`; return the new profile."""
    with profile_lock():
        profile = ExitProfile.load(path)
        profile = profile.with_quality(benchmark, read_quality(results, profile.checkpoint, benchmark))
        profile.save(path)
    return profile


def _evaluated_model(table: Table) -> Table:
    """Return `table` with only the first model's exits, at the largest embedding size, and retrievers without exits."""
    own = next((row.retriever for row in table.rows if row.exit_layer is not None), None)
    by_size = sorted(table.rows, key=lambda row: (row.dimensions is None, row.dimensions or 0))
    largest = {row.exit_layer: row for row in by_size if row.retriever == own}
    rows = [row for row in table.rows if row.exit_layer is None or row is largest.get(row.exit_layer)]
    return replace(table, rows=rows)


def plot_report(tables: Sequence[Table], profiles: Mapping[str, Path], folder: Path) -> None:
    """Plot quality against depth (quality_by_depth.png) and, if there are exit profiles, latency (…_by_latency.png)."""
    by_depth, by_latency = folder / "quality_by_depth.png", folder / "quality_by_latency.png"
    for path in (by_depth, by_latency):
        path.unlink(missing_ok=True)
    if not any(_exits_by_name(table) for table in tables):
        return
    plot_quality(tables, by_depth)
    found = {name: ExitProfile.load(path) for name, path in profiles.items() if path.is_file()}
    parts = ("processor", "threads", "gpu")
    if len({(one.device, one.shapes[0], *map(one.machine.get, parts)) for one in found.values()}) > 1:
        how = "Repeat `mose profile` for all models, on one machine, with the same device, threads and batches."
        message = f"The exit profiles of {' and '.join(found)} can't be compared: machine or settings differ. {how}"
        raise UserError("evaluation.plots.other_machines", message)
    if found:
        plot_quality(tables, by_latency, {name: median_latencies(one) for name, one in found.items()})


def median_latencies(profile: ExitProfile) -> dict[int, float]:
    """Return {exit_layer: median latency in milliseconds} for the first batch shape of an exit profile."""
    return {k: profile.measurement(k, profile.shapes[0]).latency_ms_p50 for k in profile.exits}


def plot_quality(
    tables: Sequence[Table], path: Path, latencies: Mapping[str, Mapping[int, float]] | None = None
) -> None:
    """Write a PNG with one panel per table: it plots each exit's main metric, with interval, against the exit's depth.

    A dashed line shows each retriever without exits. If `latencies` ({retriever: {exit_layer: milliseconds}}) is given,
    the x axis is latency instead of depth; exits without a latency, and all dashed lines, are left out.
    """
    with naming_extra():
        from matplotlib.figure import Figure
    height, width = -(-len(tables) // 3), min(3, len(tables))
    figure, drawn = Figure(figsize=(4.2 * width, 3.2 * height), layout="constrained"), False
    for number, table in enumerate(tables, start=1):
        axes = figure.add_subplot(height, width, number)
        for name, exits in _exits_by_name(table).items():
            retriever = next(iter(exits.values())).retriever
            times = {k: float(k) for k in exits} if latencies is None else latencies.get(retriever, {})
            placed = {times[k]: row for k, row in exits.items() if k in times}
            if not placed:
                continue
            drawn, means = True, [row.mean for row in placed.values()]
            value, low, high = ([100 * getattr(one, bound) for one in means] for bound in ("value", "low", "high"))
            (line,) = axes.plot(list(placed), value, marker="o", markersize=4, label=_plain(name))
            axes.fill_between(list(placed), low, high, alpha=0.15, color=line.get_color(), linewidth=0)
            for place, row in placed.items() if latencies is not None else ():
                axes.annotate(str(row.exit_layer), (place, 100 * row.mean.value), fontsize="small")
        if latencies is not None:
            axes.set(xlabel="median time of a batch, ms", xscale="log")
        else:
            for place, row in enumerate(row for row in table.rows if row.exit_layer is None):
                style: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "color": f"C{7 + place}"}
                axes.axhline(100 * row.mean.value, label=_plain(row.label), **style)
            ticks = sorted({row.exit_layer for row in table.rows if row.exit_layer is not None})
            axes.set(xlabel="layers executed", xticks=ticks)
        axes.set_title(_plain(table.title), fontsize="medium")
        axes.set_ylabel(f"{_plain(metric_label(table.metric))} × 100")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="x-small")
    if not drawn:
        message = f"Nothing to plot in {path.name}: no table has an exit, or `latencies` has no time for those exits."
        raise UserError("evaluation.plots.empty", message)
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _plain(text: str) -> str:
    """Return the first 200 characters of `text`; `$` is escaped, because matplotlib would read it as a formula."""
    return "".join(one if one.isprintable() else "�" for one in text[:200]).replace("$", r"\$")


def _exits_by_name(table: Table) -> dict[str, dict[int, Row]]:
    """Return a table's rows with exits: {label: {exit_layer: row}}; a label names a retriever and an embedding size."""
    found: dict[str, dict[int, Row]] = {}
    for row in sorted(table.rows, key=lambda row: row.exit_layer or 0):
        if row.exit_layer is not None:
            found.setdefault(replace(row, exit_layer=None).label, {})[row.exit_layer] = row
    return found
