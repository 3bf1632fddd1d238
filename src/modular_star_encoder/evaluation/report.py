"""Tables as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from modular_star_encoder.evaluation.benchmarks.registry import BENCHMARKS
from modular_star_encoder.evaluation.harness import Cell, Figure
from modular_star_encoder.evaluation.significance import (
    bootstrap_interval,
    f1_permutation_test,
    permutation_test,
    shares,
    spread,
)
from modular_star_encoder.evaluation.tasks import Task
from modular_star_encoder.utils.files import write_json, write_text
from modular_star_encoder.utils.reports import markdown_table, metric_label, percent

_Key = tuple[str, int | None, int | None]
"""System, exit, dimensions: one row."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A row's mean minus the reference row's, as a fraction, and the p-value of a paired permutation test."""

    value: float
    p: float


@dataclass(frozen=True, slots=True)
class Row:
    """One system at one exit and size.

    Attributes:
        columns: the main metric by column.
        mean: over all tasks.
        others: means of the other metrics.
        difference: to the table's reference; None for the reference itself.
    """

    system: str
    exit_layer: int | None
    dimensions: int | None
    columns: Mapping[str, Figure]
    mean: Figure
    others: Mapping[str, float]
    difference: Difference | None

    @property
    def label(self) -> str:
        """How tables call it."""
        parts = [self.system]
        if self.exit_layer is not None:
            parts.append(f"exit {self.exit_layer}")
        if self.dimensions is not None:
            parts.append(f"{self.dimensions} dimensions")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Table:
    """One benchmark.

    Attributes:
        benchmark: its name.
        metric: the name of the main metric.
        rows: in the order of the systems, exits ascending.
        reference: the label of the row that differences are to.
        size: queries (or pairs) and candidates, in words.
        notes: what a reader must know.
    """

    benchmark: str
    metric: str
    rows: Sequence[Row]
    reference: str
    size: str
    notes: Sequence[str]


def build_tables(tasks: Sequence[Task], cells: Sequence[Cell], *, seed: int = 0) -> list[Table]:
    """One table for each benchmark of `tasks`, in their order.

    Args:
        cells: of all systems on all tasks, in any order.
        seed: of intervals and permutations.

    Raises:
        ValueError: a cell is missing.
    """
    return [
        _table([task for task in tasks if task.benchmark == benchmark], cells, seed)
        for benchmark in dict.fromkeys(task.benchmark for task in tasks)
    ]


def _table(tasks: Sequence[Task], cells: Sequence[Cell], seed: int) -> Table:
    benchmark = tasks[0].benchmark
    rows: dict[_Key, dict[str, Cell]] = {}
    for cell in cells:
        if cell.benchmark == benchmark:
            rows.setdefault((cell.system, cell.exit_layer, cell.dimensions), {})[cell.task] = cell
    for key, found in rows.items():
        if missing := [task.name for task in tasks if task.name not in found]:
            raise ValueError(f"{key[0]} has no figure for {benchmark}, {missing[0]}.")
    groups = {key: [found[task.name] for task in tasks] for key, found in rows.items()}
    reference = _reference(list(groups))
    built = [
        _row(key, tasks, group, None if key == reference else groups[reference], seed) for key, group in groups.items()
    ]
    first = groups[reference]
    label = next(row.label for row in built if row.difference is None)
    notes = list(dict.fromkeys(note for task in tasks for note in task.notes))
    return Table(benchmark, first[0].main, built, label, _size(first), notes)


def _reference(keys: Sequence[_Key]) -> _Key:
    """The deepest exit, whole, of the first system that has exits; otherwise the first system."""
    with_exits = [key for key in keys if key[1] is not None]
    if not with_exits:
        return keys[0]
    own = [key for key in with_exits if key[0] == with_exits[0][0]]
    return max(own, key=lambda key: (key[1], key[2] or 0))


def _row(
    key: _Key,
    tasks: Sequence[Task],
    cells: Sequence[Cell],
    reference: Sequence[Cell] | None,
    seed: int,
) -> Row:
    columns: dict[str, list[Cell]] = {}
    for task, cell in zip(tasks, cells, strict=True):
        columns.setdefault(task.column or task.name, []).append(cell)
    others = [metric for metric in cells[0].figures if metric != cells[0].main]
    return Row(
        *key,
        columns={column: mean_figure(group, seed) for column, group in columns.items()},
        mean=mean_figure(cells, seed),
        others={metric: float(np.mean([cell.figures[metric].value for cell in cells])) for metric in others},
        difference=None if reference is None else difference(cells, reference, seed),
    )


def mean_figure(cells: Sequence[Cell], seed: int) -> Figure:
    """The main metric's mean over tasks."""
    if len(cells) == 1 or cells[0].main == "f1":
        if len(cells) > 1:
            raise ValueError("F1 has no mean over tasks.")
        return cells[0].figures[cells[0].main]
    values = spread([dict(zip(cell.ids, cell.values, strict=True)) for cell in cells])
    return Figure(float(values.mean()), *bootstrap_interval(values, seed))


def difference(cells: Sequence[Cell], reference: Sequence[Cell], seed: int) -> Difference:
    """How far the mean of `cells` lies above that of `reference`, task by task the same queries."""
    value = float(
        np.mean([a.figures[a.main].value - b.figures[b.main].value for a, b in zip(cells, reference, strict=True)])
    )
    if cells[0].main == "f1":
        outcomes = (np.array(cell.values, dtype=np.int64) for cell in (cells[0], reference[0]))
        return Difference(value, f1_permutation_test(*outcomes, seed))
    pairs = [
        {query: first - second for query, first, second in zip(a.ids, a.values, b.values, strict=True)}
        for a, b in zip(cells, reference, strict=True)
    ]
    return Difference(value, permutation_test(shares(pairs), seed))


def _size(cells: Sequence[Cell]) -> str:
    counts = [len(cell.values) for cell in cells]
    if not cells[0].candidates:
        return f"{sum(counts):,} pairs"
    pools = sorted({cell.candidates for cell in cells})
    candidates = f"{pools[0]:,}" if len(pools) == 1 else f"{pools[0]:,} to {pools[-1]:,}"
    return f"{sum(counts):,} queries, {candidates} candidates each"


PACKAGES = ("modular-star-encoder", "torch", "transformers", "sentence-transformers", "bm25s", "scikit-learn")

_TEX = str.maketrans(
    {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "→": r"$\to$", "–": "--"}
    | {
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "Δ": r"$\Delta$",
        "×": r"$\times$",
    }
)


def write_report(
    folder: Path, tables: Sequence[Table], cells: Sequence[Cell], command: str, fingerprint: str | None = None
) -> list[Path]:
    """Write report.md, report.csv, report.tex and report.json, each whole or not at all, and return their paths.

    Args:
        command: what made them; it stands in the Markdown and the JSON.
        fingerprint: of the checkpoint that was measured (see `fingerprint`), for the JSON; None if it is no folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"md": to_markdown(tables, command), "csv": to_csv(cells), "tex": to_latex(tables)}
    for ending, text in texts.items():
        write_text(folder / f"report.{ending}", text)
    write_json(folder / "report.json", to_dict(tables, cells, command, fingerprint))
    return [folder / f"report.{ending}" for ending in (*texts, "json")]


def to_markdown(tables: Sequence[Table], command: str) -> str:
    """A section with a table for each benchmark; scores × 100, aligned for reading as plain text."""
    sections = [f"# Evaluation\n\n    {command}\n\n{', '.join(f'{k} {v}' for k, v in versions().items())}"]
    for table in tables:
        lines = markdown_table(_cells(table))
        sections.append("\n".join([f"## {title(table)}", "", *lines, "", *_explain(table)]))
    return "\n\n".join(sections) + "\n"


def to_latex(tables: Sequence[Table]) -> str:
    """A `table` for each benchmark, for the package booktabs."""
    parts = []
    for table in tables:
        caption = " ".join([f"{title(table)}.", *_explain(table)])
        header, *rows = [[cell.translate(_TEX) for cell in row] for row in _cells(table)]
        parts += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption.translate(_TEX)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    return "\n".join(parts)


def to_csv(cells: Sequence[Cell]) -> str:
    """A line for each metric of each cell, as fractions."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ["benchmark", "task", "system", "exit_layer", "dimensions", "metric", "value", "low", "high"]
    writer.writerow([*names, "queries", "candidates"])
    for cell in cells:
        place = [cell.benchmark, cell.task, cell.system, cell.exit_layer, cell.dimensions]
        for metric, figure in cell.figures.items():
            writer.writerow([*place, metric, figure.value, figure.low, figure.high, len(cell.values), cell.candidates])
    return file.getvalue()


def to_dict(
    tables: Sequence[Table], cells: Sequence[Cell], command: str, fingerprint: str | None = None
) -> dict[str, Any]:
    """Everything but the values of single queries, as fractions."""
    figures = [{key: value for key, value in asdict(cell).items() if key not in ("values", "ids")} for cell in cells]
    return {
        "command": command,
        "checkpoint_fingerprint": fingerprint,
        "versions": versions(),
        "tables": [{"title": title(table), **asdict(table)} for table in tables],
        "cells": [{**figure, "queries": len(cell.values)} for figure, cell in zip(figures, cells, strict=True)],
    }


def title(table: Table) -> str:
    """The heading of a table."""
    known = BENCHMARKS.get(table.benchmark)
    return table.benchmark if known is None else known.title


def versions() -> Mapping[str, str]:
    """Python and the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cells(table: Table) -> list[list[str]]:
    """Header and rows as text."""
    columns = list(table.rows[0].columns)
    others = list(table.rows[0].others)
    mean = ["mean"] if len(columns) > 1 else []
    header = ["", *columns, *mean, "95 % interval", *map(metric_label, others), f"Δ {metric_label(table.metric)}", "p"]
    return [header, *([row.label, *_figures(row, bool(mean))] for row in table.rows)]


def _figures(row: Row, with_mean: bool) -> list[str]:
    means = [percent(row.mean.value)] if with_mean else []
    changed = ["", ""]
    if row.difference is not None:
        changed = [f"{100 * row.difference.value:+.1f}", f"{row.difference.p:.4f}"]
    figures = [percent(figure.value) for figure in row.columns.values()]
    return [*figures, *means, interval(row.mean), *(percent(value) for value in row.others.values()), *changed]


def interval(figure: Figure) -> str:
    """Its bounds × 100."""
    return f"{percent(figure.low)}–{percent(figure.high)}"


def _explain(table: Table) -> list[str]:
    ties = "" if table.metric == "f1" else "; ties count against the system"
    return [
        f"{metric_label(table.metric)} × 100; {table.size}{ties}. Intervals: bootstrap over queries. "
        f"Δ and p: to {table.reference}, paired permutation test.",
        *(f"Note: {note}." for note in table.notes),
    ]
