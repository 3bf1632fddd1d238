"""Figures and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def percent(value: float) -> str:
    """A fraction × 100."""
    return f"{100 * value:.1f}"


def metric_label(name: str) -> str:
    """How tables write the name of a metric: `mrr` → MRR, `recall@10` → R@10."""
    if name in ("precision", "recall"):
        return name
    return name.replace("recall@", "R@").upper()


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, aligned for reading as plain text; the first row is its header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]
