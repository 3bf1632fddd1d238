"""What an ONNX file means for retrieval: the rankings that it gives, and their quality, beside those of the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from modular_star_encoder.evaluation.metrics import bootstrap_interval
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever, Retriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import Estimate, RetrievalTask, TaskResult
from modular_star_encoder.inference.encode import encode_batches
from modular_star_encoder.inference.encoders import ExitEncoder, Prompted, Text
from modular_star_encoder.inference.onnx_export import open_session
from modular_star_encoder.utils.reports import markdown_table, metric_label, percent

TOP = 10

TIE = 1e-5
"""Similarities closer than this are a tie: embeddings that differ by rounding alone may order them either way."""


class OnnxEncoder:
    """An ONNX file in onnxruntime, on the texts of an `ExitEncoder`: same prompts, tokenizer, lengths and batches.

    Args:
        path: the file.
        reference: the encoder of the model that the file was made of, at one exit and without options.
        name: as tables show it.
    """

    dimensions: tuple[int | None, ...] = (None,)

    def __init__(self, path: str | os.PathLike, reference: ExitEncoder, name: str) -> None:
        self.name, self.exit_layers = name, reference.exit_layers
        self._session, self._reference = open_session(path), reference
        digest = hashlib.sha256(reference.checksum.encode())
        for file in (Path(path), Path(f"{os.fspath(path)}_data")):
            if file.is_file():
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        self.checksum = digest.hexdigest()

    def prompt(self, text: Text) -> str:
        """The model's prompt."""
        return self._reference.prompt(text)

    def encode(
        self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True
    ) -> Mapping[int | None, np.ndarray]:
        """See `Encoder`."""
        config = self._reference.model.config
        embeddings = encode_batches(
            self._reference.tokenizer,
            [prompt + text for prompt, text in texts],
            self._encode_batch,
            max_length=config.max_position_embeddings,
            progress=progress,
        )
        if embeddings is None:
            embeddings = np.empty((1, 0, config.projection_size), dtype=np.float32)
        return dict.fromkeys(exit_layers, embeddings[0])

    def _encode_batch(self, batch: Mapping[str, torch.Tensor]) -> np.ndarray:
        inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
        return self._session.run(["sentence_embedding"], inputs)[0][None]


@dataclass(frozen=True, slots=True)
class RankingComparison:
    """A file beside its model on one task.

    Attributes:
        benchmark, task, queries, candidates: what was ranked.
        same_top_10: queries whose first ten documents are the same in the same order.
        ties_in_top_10: queries where they differ, but only between documents whose similarities by the model are
            closer than `TIE`.
        shared_top_10: share of the first ten documents that are the model's, whatever their order; mean over queries.
        metric: the task's main metric, for instance `mrr`.
        model, file: its values, as fractions.
        difference: `file` - `model`, with its 95 % bootstrap interval over the queries.
    """

    benchmark: str
    task: str
    queries: int
    candidates: int
    same_top_10: int
    ties_in_top_10: int
    shared_top_10: float
    metric: str
    model: float
    file: float
    difference: Estimate

    @property
    def agrees(self) -> bool:
        """Whether every query has the same first ten documents, ties apart."""
        return self.same_top_10 + self.ties_in_top_10 == self.queries

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_rankings(
    reference: ExitEncoder,
    files: Mapping[str, str | os.PathLike],
    tasks: Sequence[RetrievalTask],
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, list[RankingComparison]]:
    """Rank with a model and with ONNX files of it.

    Args:
        reference: the model at the exit that the files hold.
        files: name → ONNX file.
        tasks: what to rank.
        seed: of the intervals.

    Returns:
        For each name of a file, a comparison for each task.

    Raises:
        ValueError: a reference at several exits, or scores that are NaN.
        ImportError: onnxruntime is missing.
    """
    if len(reference.exit_layers) != 1:
        raise ValueError(f"An ONNX file has one exit; the model is to rank at {list(reference.exit_layers)}.")
    model = EmbeddingRetriever(reference)
    systems = {name: EmbeddingRetriever(OnnxEncoder(path, reference, name)) for name, path in files.items()}
    cells = evaluate_tasks(tasks, [model, *systems.values()], seed=seed, progress=progress)
    own = [
        [cell for cell in cells if (cell.retriever, cell.dimensions) == (system.name, system.variants[0].dimensions)]
        for system in (model, *systems.values())
    ]
    return {
        name: [_comparison(task, (model, system), pair, seed) for task, *pair in zip(tasks, own[0], found, strict=True)]
        for (name, system), found in zip(systems.items(), own[1:], strict=True)
    }


def _comparison(
    task: RetrievalTask, systems: tuple[Retriever, Retriever], cells: Sequence[TaskResult], seed: int
) -> RankingComparison:
    tops = _compare_tops(task, *systems)
    model, file = cells
    changes = np.array(file.values) - np.array(model.values)
    return RankingComparison(
        benchmark=task.benchmark,
        task=task.name,
        queries=len(tops.same),
        candidates=model.candidates,
        same_top_10=int(tops.same.sum()),
        ties_in_top_10=int((tops.tied & ~tops.same).sum()),
        shared_top_10=float(tops.shared.mean()),
        metric=model.main,
        model=model.estimates[model.main].value,
        file=file.estimates[file.main].value,
        difference=Estimate(float(changes.mean()), *bootstrap_interval(changes, seed)),
    )


class TopTen(NamedTuple):
    """How the ten best columns of two score matrices (Q, N) compare, for each row.

    Attributes:
        same: (Q,) bool, the same columns in the same order; those with equal scores stand in ascending order.
        tied: (Q,) bool, the same but for ties: place by place, the columns that the second matrix has there score in
            the first within `TIE` of those that stand there.
        shared: (Q,) share of columns that both have, in any order.
    """

    same: np.ndarray
    tied: np.ndarray
    shared: np.ndarray


def compare_tops(expected: np.ndarray, found: np.ndarray) -> TopTen:
    """Compare the ten best columns of the rows of two score matrices (Q, N)."""
    first, second = (np.argsort(-scores, axis=1, kind="stable")[:, :TOP] for scores in (expected, found))
    in_order, as_found = (np.take_along_axis(expected, order, axis=1) for order in (first, second))
    return TopTen(
        same=(first == second).all(axis=1),
        tied=(np.abs(in_order - as_found) < TIE).all(axis=1),
        shared=(first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1),
    )


def _compare_tops(task: RetrievalTask, model: Retriever, other: Retriever) -> TopTen:
    """All queries of a task, in the order of its pools."""
    parts = []
    for pool in task.pools:
        queries = [task.queries[row] for row in pool.queries]
        documents = [task.documents[row] for row in pool.documents]
        blocks = [system.scores(queries, documents, system.variants[0]).blocks() for system in (model, other)]
        for expected, found in zip(*blocks, strict=True):
            if expected.scores.shape[1] != len(documents):
                raise ValueError(f"{task.benchmark}, {task.name}: too many documents to compare rankings.")
            parts.append(compare_tops(expected.scores, found.scores))
    return TopTen(*map(np.concatenate, zip(*parts, strict=True)))


def format_rankings(rankings: Mapping[str, Sequence[RankingComparison]]) -> str:
    """A Markdown table, scores × 100: each file beside its model on each task."""
    header = ("", "task", "same top 10", "shared top 10", "metric", "model", "file", "difference")
    rows = [
        (
            name,
            f"{one.benchmark}, {one.task}",
            f"{one.same_top_10 + one.ties_in_top_10} of {one.queries}",
            percent(one.shared_top_10),
            metric_label(one.metric),
            percent(one.model),
            percent(one.file),
            f"{100 * one.difference.value:+.2f} ({100 * one.difference.low:+.2f} to {100 * one.difference.high:+.2f})",
        )
        for name, comparisons in rankings.items()
        for one in comparisons
    ]
    return "\n".join(markdown_table([header, *rows]))
