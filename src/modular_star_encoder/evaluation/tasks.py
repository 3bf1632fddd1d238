"""What a benchmark asks of a system: rank documents for queries, or decide about pairs.

A task holds texts and who belongs to whom, and nothing about any system. Benchmarks make them, the harness runs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from modular_star_encoder.data.batch_plan import CODE_TO_CODE, TEXT_TO_CODE, PairGroups
from modular_star_encoder.data.pairs import RetrievalExample
from modular_star_encoder.inference.encoders import Text


@dataclass(frozen=True, slots=True, eq=False)
class Judgements:
    """Which documents are how relevant to which query; documents that aren't named are irrelevant.

    Attributes:
        query: (J,) int64, ascending.
        document: (J,) int64, different within a query.
        gain: (J,) float64; 0 for a document judged irrelevant.
    """

    query: np.ndarray
    document: np.ndarray
    gain: np.ndarray

    @classmethod
    def one_each(cls, documents: Sequence[int]) -> Judgements:
        """Query i has the one relevant document `documents[i]`."""
        count = len(documents)
        return cls(np.arange(count), np.asarray(documents, dtype=np.int64), np.ones(count))

    @classmethod
    def of(cls, gains: Sequence[Mapping[int, float]]) -> Judgements:
        """From {document: gain} of each query."""
        query = np.repeat(np.arange(len(gains)), [len(judged) for judged in gains])
        document = np.array([document for judged in gains for document in judged], dtype=np.int64)
        return cls(query, document, np.array([gain for judged in gains for gain in judged.values()], dtype=np.float64))


class Pool(NamedTuple):
    """Queries (Q,) that are ranked against the same candidates (D,): row numbers into the texts of a task."""

    queries: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalTask:
    """Rank documents for queries.

    Attributes:
        benchmark: the table that it goes into.
        name: unique within the benchmark, such as "ruby" or "java → python".
        queries, documents: the texts.
        query_ids: a name for each query; tasks of one benchmark that ask the same thing use the same name.
        judgements: the relevance of documents.
        pools: who is ranked against whom. Each query is in one pool at most, with its relevant documents.
        metrics: names that `metrics.query_values` knows; the first is the one that tables show.
        exclude_self: whether document i is query i itself and isn't a candidate of it.
        column: the column of the table, where several tasks share one.
        notes: what a reader of the figures must know.
    """

    benchmark: str
    name: str
    queries: Sequence[Text]
    documents: Sequence[Text]
    query_ids: Sequence[str]
    judgements: Judgements
    pools: Sequence[Pool]
    metrics: tuple[str, ...] = ("mrr", "recall@1", "recall@10", "ndcg@10")
    exclude_self: bool = False
    column: str = ""
    notes: tuple[str, ...] = ()

    def texts(self) -> list[Text]:
        """All that has to be embedded."""
        queries = [self.queries[row] for pool in self.pools for row in pool.queries]
        return queries + [self.documents[row] for pool in self.pools for row in pool.documents]

    def fingerprint(self) -> str:
        """A hash of everything that its figures depend on."""
        pools = [array for pool in self.pools for array in pool]
        arrays = [self.judgements.query, self.judgements.document, self.judgements.gain, *pools]
        header = {"metrics": self.metrics, "exclude_self": self.exclude_self, "ids": list(self.query_ids)}
        return _fingerprint(header, self.queries, self.documents, arrays=arrays)


@dataclass(frozen=True, slots=True, eq=False)
class PairTask:
    """Say of pairs of texts whether they belong together, by a threshold on their similarity.

    Attributes:
        benchmark, name, column, notes: as in `RetrievalTask`.
        documents: the texts.
        valid_pairs, pairs: (P, 2) int64 rows of `documents`; the threshold is chosen on the first, used on the second.
        valid_labels, labels: (P,) of 0 and 1.
    """

    benchmark: str
    name: str
    documents: Sequence[Text]
    valid_pairs: np.ndarray
    valid_labels: np.ndarray
    pairs: np.ndarray
    labels: np.ndarray
    column: str = ""
    notes: tuple[str, ...] = ()

    def texts(self) -> list[Text]:
        """All that has to be embedded."""
        return list(self.documents)

    def fingerprint(self) -> str:
        """A hash of everything that its figures depend on."""
        arrays = [self.valid_pairs, self.valid_labels, self.pairs, self.labels]
        return _fingerprint({"metrics": "f1"}, self.documents, arrays=arrays)


Task = RetrievalTask | PairTask


def full_pool(queries: int, documents: int) -> tuple[Pool]:
    """Every document is a candidate of every query."""
    return (Pool(np.arange(queries), np.arange(documents)),)


def _fingerprint(header: object, *texts: Iterable[Text], arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header).encode())
    for part in texts:
        digest.update(json.dumps(list(part)).encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def distractor_batches(n: int, size: int = 1000, seed: int = 0) -> list[np.ndarray]:
    """Row numbers of each batch: `n` rows shuffled, cut into batches of `size`, the incomplete last one dropped.

    With fewer than `size` rows there is one batch of them all: its length says how many candidates there are.
    The shuffle is the one of `np.random.seed(seed)`, which CodeSearchNet and CodeBERT use: same rows, same batches.

    Raises:
        ValueError: fewer than two rows, or a batch of fewer than two.
    """
    if n < 2 or size < 2:
        raise ValueError(
            f"Ranking needs at least 2 rows and batches of at least 2, not {n} rows and batches of {size}."
        )
    order = np.random.RandomState(seed).permutation(n)
    if n < size:
        return [order]
    return [order[start : start + size] for start in range(0, n - size + 1, size)]


POOL = 1000
BENCHMARKS = {TEXT_TO_CODE: "held-out, text → code", CODE_TO_CODE: "held-out, code → code"}


def held_out_tasks(texts: Sequence[RetrievalExample], *, limit: int = 1000, seed: int = 0) -> list[RetrievalTask]:
    """A task for each kind of pairs of which there are two at least.

    Args:
        texts: the rows.
        limit: queries of a task, drawn at random; above 1000 whole thousands of them, each ranked in its own.
        seed: of the draw.
    """
    groups = PairGroups(texts)
    tasks = []
    for kind, rows_of_groups in groups.rows.items():
        generator = np.random.default_rng((seed, len(tasks)))
        drawn = generator.permutation(len(rows_of_groups))[:limit]
        if len(drawn) > POOL:
            drawn = drawn[: len(drawn) // POOL * POOL]  # batches drop what is left over
        if len(drawn) > 1:
            tasks.append(_task(kind, [texts[rows_of_groups[group][0]] for group in drawn], generator))
    return tasks


def _task(kind: str, texts: Sequence[RetrievalExample], generator: np.random.Generator) -> RetrievalTask:
    queries, documents = [], []
    for text in texts:
        if kind == TEXT_TO_CODE:
            (query, language), answer = (text.description, None), text.snippets[0]
        else:
            places = generator.choice(len(text.snippets), size=2, replace=False)
            first, answer = (text.snippets[place] for place in places)
            query, language = first.code, first.language
        queries.append(Text(query, language))
        documents.append(Text(answer.code, answer.language))
    return RetrievalTask(
        benchmark=BENCHMARKS[kind],
        name="all languages",
        queries=queries,
        documents=documents,
        query_ids=[str(number) for number in range(len(texts))],
        judgements=Judgements.one_each(range(len(texts))),
        pools=tuple(Pool(batch, batch) for batch in distractor_batches(len(texts), POOL)),
    )


@torch.inference_mode()
def classification_scores(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], *, progress: bool = True
) -> dict[int, dict[str, float]]:
    """Accuracy, and precision, recall and F1 of class 1, the metric of BigCloneBench since 2021-09-13.

    Args:
        model: a `ModularStarEncoderForSequenceClassification` with two classes, in evaluation mode.
        batches: `input_ids`, `attention_mask` and `labels`, as `ClassificationCollator` makes them.
        progress: whether to show a progress bar.

    Returns:
        exit → name → a fraction between 0 and 1; precision, recall and F1 are 0 where nothing is found.
    """
    exits, device = tuple(model.config.exit_layers), next(model.parameters()).device
    decisions, labels = [], []
    for batch in tqdm(batches, desc="classifying", unit="batch", disable=not progress, leave=False):
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        decisions.append(model(**inputs, exit_layers=exits).exit_logits.argmax(dim=-1).cpu().numpy())
        labels.append(batch["labels"].numpy())
    truth = np.concatenate(labels)
    return {
        exit_layer: binary_scores(decided, truth)
        for exit_layer, decided in zip(exits, np.concatenate(decisions, axis=1), strict=True)
    }


def binary_scores(decisions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of class 1, of decisions and labels (N,)."""
    found, true = int(decisions.sum()), int(labels.sum())
    right = int((decisions * labels).sum())
    return {
        "accuracy": float((decisions == labels).mean()),
        "precision": right / found if found else 0.0,
        "recall": right / true if true else 0.0,
        "f1": 2 * right / (found + true) if found + true else 0.0,
    }
