"""Tasks (rank documents for queries, or decide about pairs) and their results.

A task holds texts and relevance judgements, and nothing about a model. Benchmarks make tasks; `run` evaluates them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from modular_star_encoder.data.pairs import RetrievalExample
from modular_star_encoder.data.splits import CODE_TO_CODE, TEXT_TO_CODE, PairGroups
from modular_star_encoder.inference.encoders import Text
from modular_star_encoder.utils.errors import UserError

POOL = 1000
"""Candidates of a query in CodeSearchNet's protocol."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over queries, or F1 over pairs, as a fraction, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The scores of one retriever, at one exit and embedding size, on one task.

    Attributes:
        benchmark, task, retriever: names.
        exit_layer, dimensions: None where the retriever has none.
        estimates: by the name of the metric; the first is the task's main metric.
        values: of the main metric, one for each of `ids` (for F1 the outcomes of the pairs, see `metrics.outcomes`).
        ids: the queries that have a relevant document; empty for pairs.
        candidates: the largest number of documents that a query was ranked against; 0 for pairs.
        threshold: the similarity at and above which a pair was called positive.
    """

    benchmark: str
    task: str
    retriever: str
    exit_layer: int | None
    dimensions: int | None
    estimates: Mapping[str, Estimate]
    values: Sequence[float]
    ids: Sequence[str]
    candidates: int
    threshold: float | None = None

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return next(iter(self.estimates))


@dataclass(frozen=True, slots=True, eq=False)
class Judgements:
    """Which documents are how relevant to which query; documents that are not listed are irrelevant.

    Attributes:
        query: (J,) int64, ascending.
        document: (J,) int64, different within a query.
        gain: (J,) float64; 0 for a document judged irrelevant.
    """

    query: np.ndarray
    document: np.ndarray
    gain: np.ndarray

    @classmethod
    def one_each(cls, documents: Sequence[int] | range) -> Judgements:
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
        benchmark: the table in which it is reported.
        name: unique within the benchmark, such as "ruby" or "java → python".
        queries, documents: the texts.
        query_ids: a name for each query; tasks of one benchmark use the same name for the same query.
        judgements: the relevance of documents.
        pools: which queries are ranked against which documents. A query is in at most one pool, which holds its
            relevant documents.
        metrics: names that `metrics.query_values` knows; the first is the main metric, which tables show.
        exclude_self: whether document i is query i itself and therefore not one of its candidates.
        column: the column of the table, where several tasks share one.
        notes: caveats, shown under the table.
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
        """All texts to embed."""
        queries = [self.queries[row] for pool in self.pools for row in pool.queries]
        return queries + [self.documents[row] for pool in self.pools for row in pool.documents]

    def checksum(self) -> str:
        """A hash of everything that the scores depend on."""
        pools = [array for pool in self.pools for array in pool]
        arrays = [self.judgements.query, self.judgements.document, self.judgements.gain, *pools]
        header = {"metrics": self.metrics, "exclude_self": self.exclude_self, "ids": list(self.query_ids)}
        return _checksum(header, self.queries, self.documents, arrays=arrays)


@dataclass(frozen=True, slots=True, eq=False)
class PairTask:
    """Decide whether two texts belong together, by a threshold on their similarity.

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
        """All texts to embed."""
        return list(self.documents)

    def checksum(self) -> str:
        """A hash of everything that the scores depend on."""
        arrays = [self.valid_pairs, self.valid_labels, self.pairs, self.labels]
        return _checksum({"metrics": "f1"}, self.documents, arrays=arrays)


Task = RetrievalTask | PairTask


def _checksum(header: object, *texts: Iterable[Text], arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header).encode())
    for part in texts:
        digest.update(json.dumps(list(part)).encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def full_pool(queries: int, documents: int) -> tuple[Pool]:
    """Every document is a candidate of every query."""
    return (Pool(np.arange(queries), np.arange(documents)),)


def full_pool_task(
    benchmark: str,
    name: str,
    queries: Sequence[Text],
    documents: Sequence[Text],
    ids: Sequence[str],
    judgements: Judgements | None = None,
    **options: Any,
) -> RetrievalTask:
    """A task in which every document is a candidate of every query.

    Args:
        ids: of the queries.
        judgements: if None, document i is the relevant one of query i.
        options: other fields of the task.
    """
    return RetrievalTask(
        benchmark=benchmark,
        name=name,
        queries=queries,
        documents=documents,
        query_ids=ids,
        judgements=Judgements.one_each(range(len(queries))) if judgements is None else judgements,
        pools=full_pool(len(queries), len(documents)),
        **options,
    )


def candidate_batches(n: int, size: int = POOL, seed: int = 0) -> list[np.ndarray]:
    """Row numbers of each batch: `n` rows shuffled, cut into batches of `size`, the incomplete last one dropped.

    With fewer than `size` rows there is one batch of them all. The shuffle is the one of `np.random.seed(seed)`, which
    CodeSearchNet and CodeBERT use: same rows, same batches.
    """
    if n < 2 or size < 2:
        raise UserError(
            "evaluation.candidates.too_few",
            f"Ranking needs at least 2 pairs in batches of at least 2, not {n} pairs in batches of {size}.",
        )
    order = np.random.RandomState(seed).permutation(n)
    if n < size:
        return [order]
    return [order[start : start + size] for start in range(0, n - size + 1, size)]


class RetrievalRow(NamedTuple):
    """One pair: a description in prose, and the function that it describes without its documentation."""

    description: str
    code: str
    language: str | None


def pairs_task(
    benchmark: str,
    name: str,
    rows: Iterable[tuple[str, str, str | None]],
    *,
    ids: Sequence[str] | None = None,
    size: int | None = POOL,
    seed: int = 0,
    **options: Any,
) -> RetrievalTask:
    """A task that asks for the code of each description.

    Args:
        rows: (description, code, language), such as `RetrievalRow`s.
        ids: a name for each row; its number if None.
        size: candidates of each query, in the batches of `candidate_batches`; all documents if None.
        seed: of the batches.
        options: other fields of the task.
    """
    pairs = [RetrievalRow(*row) for row in rows]
    batches = candidate_batches(len(pairs), size or POOL, seed)
    return RetrievalTask(
        benchmark=benchmark,
        name=name,
        queries=[Text(row.description) for row in pairs],
        documents=[Text(row.code, row.language) for row in pairs],
        query_ids=[str(number) for number in range(len(pairs))] if ids is None else list(ids),
        judgements=Judgements.one_each(range(len(pairs))),
        pools=tuple(Pool(batch, batch) for batch in batches) if size else full_pool(len(pairs), len(pairs)),
        **options,
    )


def task_from_mappings(
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    relevant: Mapping[str, Collection[str]],
    language: str | None = None,
    **options: Any,
) -> RetrievalTask:
    """A task from texts by id; queries without a relevant document are left out, all documents are candidates.

    Args:
        queries, corpus: id → text.
        relevant: id of a query → ids of its relevant documents.
        language: of all documents; None if it is unknown or they are prose.
        options: other fields of the task.
    """
    places = {name: place for place, name in enumerate(corpus)}
    answered = [name for name in queries if relevant.get(name)]
    if unknown := sorted({document for name in answered for document in relevant[name]} - set(places)):
        raise UserError(
            "evaluation.task.unknown_document",
            f"`relevant` names {len(unknown)} documents that `corpus` does not hold, such as {unknown[0]!r}.",
        )
    if not answered or len(places) < 2:
        raise UserError(
            "evaluation.candidates.too_few",
            f"Ranking needs a query with a relevant document and at least two documents, not {len(answered)} and "
            f"{len(places)}.",
        )
    relevant_places = [sorted(places[document] for document in relevant[name]) for name in answered]
    return full_pool_task(
        "mappings",
        "all",
        [Text(queries[name]) for name in answered],
        [Text(text, language) for text in corpus.values()],
        answered,
        Judgements.of([dict.fromkeys(found, 1.0) for found in relevant_places]),
        **options,
    )


HELD_OUT = {TEXT_TO_CODE: "held-out, text → code", CODE_TO_CODE: "held-out, code → code"}


def held_out_tasks(texts: Sequence[RetrievalExample], *, limit: int = POOL, seed: int = 0) -> list[RetrievalTask]:
    """A task for each kind of pairs, text → code and code → code, of which there are at least two.

    Args:
        texts: the rows.
        limit: queries of a task, drawn at random; above 1000 whole thousands of them, each ranked within its own.
        seed: of the draw.
    """
    tasks: list[RetrievalTask] = []
    for kind, groups in PairGroups(texts).rows.items():
        generator = np.random.default_rng((seed, len(tasks)))
        drawn = generator.permutation(len(groups))[:limit]
        if len(drawn) > POOL:
            drawn = drawn[: len(drawn) // POOL * POOL]  # batches drop an incomplete rest
        if len(drawn) < 2:
            continue
        pairs = [_pair(kind, texts[groups[group][0]], generator) for group in drawn]
        queries, documents = zip(*pairs, strict=True)
        tasks.append(
            RetrievalTask(
                benchmark=HELD_OUT[kind],
                name="all languages",
                queries=queries,
                documents=documents,
                query_ids=[str(number) for number in range(len(pairs))],
                judgements=Judgements.one_each(range(len(pairs))),
                pools=tuple(Pool(batch, batch) for batch in candidate_batches(len(pairs), POOL)),
            )
        )
    return tasks


def _pair(kind: str, text: RetrievalExample, generator: np.random.Generator) -> tuple[Text, Text]:
    """The query and its answer; of code → code two snippets drawn at random."""
    if kind == TEXT_TO_CODE:
        return Text(text.description), Text(text.snippets[0].code, text.snippets[0].language)
    first, second = (text.snippets[place] for place in generator.choice(len(text.snippets), size=2, replace=False))
    return Text(first.code, first.language), Text(second.code, second.language)
