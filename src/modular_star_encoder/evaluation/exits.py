"""Retrieval quality at every exit, beside BM25 and the same model untrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from modular_star_encoder.evaluation.bm25 import BM25
from modular_star_encoder.evaluation.distractors import distractor_batches
from modular_star_encoder.evaluation.encoders import ExitEncoder
from modular_star_encoder.evaluation.harness import Cell, evaluate_tasks
from modular_star_encoder.evaluation.markdown import markdown_table, percent
from modular_star_encoder.evaluation.systems import EmbeddingSystem
from modular_star_encoder.evaluation.tasks import Judgements, Pool, RetrievalTask, Text


@dataclass(frozen=True)
class RetrievalScores:
    """What one system reached. Figures are fractions between 0 and 1.

    `interval` is the 95 % bootstrap interval of `mrr` over the queries; `queries` is the number of queries ranked (rows
    of the incomplete last batch are not); `distractors` is how many wrong candidates each of them had.
    """

    mrr: float
    recall_at_1: float
    recall_at_10: float
    interval: tuple[float, float]
    queries: int
    distractors: int


class RetrievalRow(NamedTuple):
    """One pair: a description in prose and the function that it describes, without its documentation."""

    description: str
    code: str
    language: str


@dataclass(frozen=True)
class ExitResults:
    """Scores of each exit, and of the systems that a trained model has to beat.

    `untrained` is the same architecture with fresh weights: what the wording of the pairs gives away by itself.
    """

    exits: Mapping[int, RetrievalScores]
    bm25: RetrievalScores
    untrained: Mapping[int, RetrievalScores] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Only dicts, lists, strings and numbers, for JSON; exits become strings, as JSON wants."""
        return {
            "exits": {str(exit_layer): asdict(scores) for exit_layer, scores in self.exits.items()},
            "bm25": asdict(self.bm25),
            "untrained": {str(exit_layer): asdict(scores) for exit_layer, scores in self.untrained.items()},
        }


def evaluate_exits(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[RetrievalRow],
    *,
    exit_layers: Sequence[int] | None = None,
    untrained: bool = False,
    size: int = 1000,
    seed: int = 0,
    progress: bool = True,
    **encode_options: Any,
) -> ExitResults:
    """Find each description's code among `size` candidates (see `distractors`), at each exit and by BM25.

    Args:
        model: a `ModularStarEncoderForRetrieval`.
        rows: the pairs, of one language or of several; with several, distractors of other languages are easy ones.
        exit_layers: which exits; all that the model has if None.
        untrained: also measure the architecture with fresh weights (takes as long again, and as much memory).
        encode_options: go to `encode_exits`: max_length, tokens_per_batch, dtype.

    Raises:
        ValueError: an exit that the model doesn't have, or fewer than two rows.
    """
    task = pairs_task("folder", "all", [RetrievalRow(*row) for row in rows], size=size, seed=seed)
    encoder = ExitEncoder(model, tokenizer, "model", exit_layers=exit_layers, **encode_options)
    systems = [BM25(), EmbeddingSystem(encoder)]
    if untrained:
        systems.append(EmbeddingSystem(encoder.untrained(seed)))
    cells = evaluate_tasks([task], systems, seed=seed, progress=progress)
    exits = {system.name: _by_exit(cells, system.name) for system in systems}
    return ExitResults(exits["model"], exits["BM25"][None], exits.get("model, untrained", {}))


def pairs_task(
    benchmark: str,
    name: str,
    rows: Sequence[RetrievalRow],
    *,
    ids: Sequence[str] | None = None,
    size: int = 1000,
    seed: int = 0,
    **options: Any,
) -> RetrievalTask:
    """Find each description's code among `size` candidates, in the batches of `distractor_batches`.

    Args:
        ids: a name for each row; its number if None.
        options: other fields of the task.
    """
    pools = tuple(Pool(batch, batch) for batch in distractor_batches(len(rows), size, seed))
    return RetrievalTask(
        benchmark=benchmark,
        name=name,
        queries=[Text(row.description) for row in rows],
        documents=[Text(row.code, row.language) for row in rows],
        query_ids=[str(number) for number in range(len(rows))] if ids is None else list(ids),
        judgements=Judgements.one_each(range(len(rows))),
        pools=pools,
        **options,
    )


def _by_exit(cells: Sequence[Cell], system: str) -> dict[int | None, RetrievalScores]:
    """Scores of a system's whole embeddings, by exit."""
    widest: dict[int | None, Cell] = {}
    for cell in cells:
        kept = widest.get(cell.exit_layer)
        if cell.system == system and (kept is None or (cell.dimensions or 0) > (kept.dimensions or 0)):
            widest[cell.exit_layer] = cell
    return {exit_layer: _scores(cell) for exit_layer, cell in widest.items()}


def _scores(cell: Cell) -> RetrievalScores:
    mrr = cell.figures["mrr"]
    return RetrievalScores(
        mrr=mrr.value,
        recall_at_1=cell.figures["recall@1"].value,
        recall_at_10=cell.figures["recall@10"].value,
        interval=(mrr.low, mrr.high),
        queries=len(cell.values),
        distractors=cell.candidates - 1,
    )


COLUMNS = ("", "MRR", "95 % interval", "R@1", "R@10")


def format_table(results: ExitResults) -> str:
    """A Markdown table, aligned for reading as plain text, scores × 100; the line below it states the protocol."""
    rows = [("BM25", results.bm25)]
    rows += [(f"untrained, exit {exit_layer}", scores) for exit_layer, scores in results.untrained.items()]
    rows += [(f"exit {exit_layer}", scores) for exit_layer, scores in results.exits.items()]
    lines = markdown_table([COLUMNS, *((name, *_figures(scores)) for name, scores in rows)])
    scores = results.bm25
    protocol = f"{scores.queries} queries, {scores.distractors} distractors each, ties count against the system."
    return "\n".join([*lines, "", protocol])


def _figures(scores: RetrievalScores) -> tuple[str, ...]:
    low, high = scores.interval
    figures = (percent(scores.mrr), f"{percent(low)}–{percent(high)}")
    return (*figures, percent(scores.recall_at_1), percent(scores.recall_at_10))
