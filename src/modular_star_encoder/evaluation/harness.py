"""Run tasks on systems, and keep every figure that is finished.

A *cell* is one system at one exit and size on one task. Its file is named by what its figures depend on (the task's
texts and protocol, the system's weights), so that a run that is started again computes only what is missing, and
nothing that was measured is ever overwritten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.evaluation.metrics import (
    FALSE_POSITIVE,
    TRUE_POSITIVE,
    Ranking,
    best_f1_threshold,
    check_scores,
    f1,
    outcomes,
    query_values,
)
from modular_star_encoder.evaluation.retrievers import System, Variant
from modular_star_encoder.evaluation.scores import pool_judgements, rank_judged
from modular_star_encoder.evaluation.significance import bootstrap_f1_interval, bootstrap_interval
from modular_star_encoder.evaluation.tasks import PairTask, RetrievalTask, Task
from modular_star_encoder.utils.files import write_json

PROTOCOL = 1
"""Goes up when the same scores would give other figures."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over queries, or F1 over pairs, as a fraction, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Cell:
    """What one system at one exit reached on one task.

    Attributes:
        benchmark, task, system: names.
        exit_layer, dimensions: None where the system has none.
        figures: by the name of the metric; the first is the task's main one.
        values: of the main metric, one for each of `ids` (for F1 the outcomes of the pairs, see `metrics.outcomes`).
        ids: the queries that count; empty for pairs.
        candidates: the largest number of documents that a query was ranked against; 0 for pairs.
        threshold: at and above which pairs were said to belong together.
    """

    benchmark: str
    task: str
    system: str
    exit_layer: int | None
    dimensions: int | None
    figures: Mapping[str, Figure]
    values: Sequence[float]
    ids: Sequence[str]
    candidates: int
    threshold: float | None = None

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return next(iter(self.figures))


def evaluate_tasks(
    tasks: Sequence[Task],
    systems: Sequence[System],
    *,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Cell]:
    """Every cell of these tasks and systems, systems outermost; all texts of a system are embedded in one pass.

    Args:
        out: folder whose `cells/` are read and written; nothing is kept if None.
        seed: of the bootstrap.

    Raises:
        ValueError: scores that are NaN, or a kept cell that is damaged.
        OSError: the folder can't be written to.
    """
    fingerprints = [task.fingerprint() for task in tasks]
    cells = []
    for system in systems:
        paths = {
            (number, variant): _path(out, fingerprint, system, variant, seed)
            for number, fingerprint in enumerate(fingerprints)
            for variant in system.variants
        }
        missing = {key for key, path in paths.items() if path is None or not path.is_file()}
        if missing:
            texts = [text for number in sorted({number for number, _ in missing}) for text in tasks[number].texts()]
            variants = [variant for variant in system.variants if variant in {key[1] for key in missing}]
            system.prepare(list(dict.fromkeys(texts)), variants, progress=progress)
        bar = tqdm(paths.items(), desc=f"scoring, {system.name}", unit="cell", disable=not progress, leave=False)
        for (number, variant), path in bar:
            task = tasks[number]
            if (number, variant) in missing:
                cell = evaluate_task(task, system, variant, seed=seed, progress=progress)
                if path is not None:
                    _write(path, cell)
            else:
                names = {"benchmark": task.benchmark, "task": task.name, "system": system.name}
                cell = replace(read_cell(path), **names)  # they may have been called otherwise
            cells.append(cell)
    return cells


def evaluate_task(task: Task, system: System, variant: Variant, *, seed: int = 0, progress: bool = True) -> Cell:
    """One cell; the system has prepared the task's texts."""
    if isinstance(task, PairTask):
        return _evaluate_pairs(task, system, variant, seed)
    ranking, rows = rank_task(task, system, variant, progress=progress)
    figures: dict[str, Figure] = {}
    kept, main = np.arange(len(rows)), np.empty(0)
    for metric in task.metrics:
        values = query_values(ranking, metric)
        if not figures:
            kept = np.flatnonzero(~np.isnan(values))
            if not len(kept):
                raise ValueError(f"{task.benchmark}, {task.name}: no query has a relevant document.")
            main = values[kept]
        values = values[~np.isnan(values)]
        figures[metric] = Figure(float(values.mean()), *bootstrap_interval(values, seed))
    return Cell(
        benchmark=task.benchmark,
        task=task.name,
        system=system.name,
        exit_layer=variant.exit_layer,
        dimensions=variant.dimensions,
        figures=figures,
        values=main.tolist(),
        ids=[task.query_ids[rows[place]] for place in kept],
        candidates=max(len(pool.documents) for pool in task.pools) - task.exclude_self,
    )


def rank_task(
    task: RetrievalTask, system: System, variant: Variant, *, progress: bool = True
) -> tuple[Ranking, np.ndarray]:
    """Ranks in all pools, queries numbered from 0 in the order of the pools, and their rows (Q,) in the task."""
    rankings = []
    for pool in task.pools:
        queries = [task.queries[row] for row in pool.queries]
        documents = [task.documents[row] for row in pool.documents]
        judgements = pool_judgements(task.judgements, pool)
        scores = system.scores(queries, documents, variant)
        rankings.append(
            rank_judged(scores, judgements, exclude_self=task.exclude_self, progress=progress, label=task.name)
        )
    starts = np.cumsum([0, *(ranking.queries for ranking in rankings)])
    query = np.concatenate([ranking.query + start for ranking, start in zip(rankings, starts, strict=False)])
    gain, rank = (np.concatenate([getattr(ranking, name) for ranking in rankings]) for name in ("gain", "rank"))
    return Ranking(int(starts[-1]), query, gain, rank), np.concatenate([pool.queries for pool in task.pools])


def _evaluate_pairs(task: PairTask, system: System, variant: Variant, seed: int) -> Cell:
    scores = system.scores(task.documents, task.documents, variant)
    valid, test = (scores.of_pairs(*pairs.T) for pairs in (task.valid_pairs, task.pairs))
    check_scores(test)
    threshold = best_f1_threshold(valid, task.valid_labels)
    results = outcomes((test >= np.float32(threshold)).astype(int), task.labels)
    value = float(f1(np.bincount(results, minlength=4)))
    figures = {"f1": Figure(value, *bootstrap_f1_interval(results, seed))}
    for name, members in (("precision", results >= FALSE_POSITIVE), ("recall", results % 2 == 1)):
        hits = results[members] == TRUE_POSITIVE if members.any() else np.zeros(1)
        figures[name] = Figure(float(np.mean(hits)), *bootstrap_interval(hits, seed))
    names = (task.benchmark, task.name, system.name, variant.exit_layer, variant.dimensions)
    return Cell(*names, figures, results.tolist(), [], 0, threshold)


def read_cell(path: Path) -> Cell:
    """A cell that a run has kept.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        figures = {name: Figure(**figure) for name, figure in data.pop("figures").items()}
        return Cell(figures=figures, **data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no cell of an evaluation ({error}): remove it and run again.") from None


def _write(path: Path, cell: Cell) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(cell))


def _path(out: str | Path | None, task: str, system: System, variant: Variant, seed: int) -> Path | None:
    if out is None:
        return None
    identity = json.dumps([PROTOCOL, task, system.fingerprint, variant.exit_layer, variant.dimensions, seed])
    return Path(out) / "cells" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
