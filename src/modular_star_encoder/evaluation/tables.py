"""From cells to tables: a row for each system and exit, a column for each language, their mean, and what differs.

Means over tasks weigh every task the same. Their intervals and p-values resample queries, each together with all its
tasks (see `significance.spread`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modular_star_encoder.evaluation.harness import Cell, Figure
from modular_star_encoder.evaluation.significance import (
    bootstrap_interval,
    f1_permutation_test,
    permutation_test,
    shares,
    spread,
)
from modular_star_encoder.evaluation.tasks import Task

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
