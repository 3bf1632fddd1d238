"""Retrieval quality at every exit, beside BM25 and the same model untrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.evaluation.bm25 import bm25_scorer
from modular_star_encoder.evaluation.distractors import RetrievalScores, evaluate_scorer, evaluate_with_distractors
from modular_star_encoder.evaluation.encode import encode_exits


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
    rows = [RetrievalRow(*row) for row in rows]
    protocol = {"size": size, "seed": seed, "progress": progress}
    queries, codes = [row.description for row in rows], [row.code for row in rows]
    bm25 = evaluate_scorer(bm25_scorer(queries, codes), len(rows), **protocol, label="BM25")

    def score(model: torch.nn.Module) -> dict[int, RetrievalScores]:
        options = {"exit_layers": exit_layers, "progress": progress, **encode_options}
        instructions = model.config.instruction_prompts
        prompt = text_prompt(instructions=instructions)
        query_embeddings = encode_exits(model, tokenizer, queries, prompt=prompt, **options)
        prompted = [code_prompt(row.language, instructions=instructions) + row.code for row in rows]
        code_embeddings = encode_exits(model, tokenizer, prompted, **options)
        return {
            exit_layer: evaluate_with_distractors(embeddings, code_embeddings[exit_layer], **protocol)
            for exit_layer, embeddings in query_embeddings.items()
        }

    return ExitResults(score(model), bm25, score(_untrained_copy(model, seed)) if untrained else {})


def _untrained_copy(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    parameter = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)(model.config).to(device=parameter.device, dtype=parameter.dtype)


COLUMNS = ("", "MRR", "95 % interval", "R@1", "R@10")


def format_table(results: ExitResults) -> str:
    """A Markdown table, aligned for reading as plain text, scores × 100; the line below it states the protocol."""
    rows = [("BM25", results.bm25)]
    rows += [(f"untrained, exit {exit_layer}", scores) for exit_layer, scores in results.untrained.items()]
    rows += [(f"exit {exit_layer}", scores) for exit_layer, scores in results.exits.items()]
    cells = [COLUMNS, *((name, *_figures(scores)) for name, scores in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    lines = ["| " + " | ".join(_align(row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    scores = results.bm25
    protocol = f"{scores.queries} queries, {scores.distractors} distractors each, ties count against the system."
    return "\n".join([lines[0], rule, *lines[1:], "", protocol])


def _figures(scores: RetrievalScores) -> tuple[str, ...]:
    low, high = scores.interval
    return (
        f"{100 * scores.mrr:.1f}",
        f"{100 * low:.1f}–{100 * high:.1f}",
        f"{100 * scores.recall_at_1:.1f}",
        f"{100 * scores.recall_at_10:.1f}",
    )


def _align(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
