"""Tables as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from modular_star_encoder.data.files import write_json, write_text
from modular_star_encoder.evaluation.benchmarks.registry import BENCHMARKS
from modular_star_encoder.evaluation.harness import Cell, Figure
from modular_star_encoder.evaluation.markdown import markdown_table, metric_label, percent
from modular_star_encoder.evaluation.tables import Row, Table

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
