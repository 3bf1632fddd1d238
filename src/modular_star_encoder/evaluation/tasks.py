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

HELD_OUT = {TEXT_TO_CODE: "held-out, text → code", CODE_TO_CODE: "held-out, code → code"}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over queries, or F1 over pairs, as a fraction, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The scores of one retriever, at one exit and embedding size, on one task."""

    benchmark: str
    task: str
    retriever: str
    exit_layer: int | None  # None where the retriever has none, as for dimensions
    dimensions: int | None
    estimates: Mapping[str, Estimate]  # by the name of the metric; the first is the task's main metric
    values: Sequence[float]  # of the main metric, one for each id; for F1 the outcomes of the pairs
    ids: Sequence[str]  # the queries that have a relevant document; empty for pairs
    candidates: int  # the largest number of documents that a query was ranked against; 0 for pairs
    threshold: float | None = None  # the similarity at and above which a pair was called positive

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return next(iter(self.estimates))


@dataclass(frozen=True, slots=True, eq=False)
class Judgements:
    """Which documents are how relevant to which query; documents that are not listed are irrelevant."""

    query: np.ndarray  # (J,) int64, ascending
    document: np.ndarray  # (J,) int64, different within a query
    gain: np.ndarray  # (J,) float64; 0 for a document judged irrelevant

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
    """Rank documents for queries."""

    benchmark: str  # the table in which it is reported
    name: str  # unique within the benchmark, such as "ruby" or "java → python"
    queries: Sequence[Text]
    documents: Sequence[Text]
    query_ids: Sequence[str]  # tasks of one benchmark use the same name for the same query
    judgements: Judgements
    pools: Sequence[Pool]  # a query is in at most one pool, which holds its relevant documents
    metrics: tuple[str, ...] = ("mrr", "recall@1", "recall@10", "ndcg@10")  # see `query_values`; tables show the first
    exclude_self: bool = False  # whether document i is query i itself and therefore not one of its candidates
    column: str = ""  # of the table, where several tasks share one
    notes: tuple[str, ...] = ()  # caveats, shown under the table

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
    """Decide whether two texts belong together, by a threshold on their similarity."""

    benchmark: str
    name: str
    documents: Sequence[Text]
    valid_pairs: np.ndarray  # (P, 2) int64 rows of `documents`, on which the threshold is chosen
    valid_labels: np.ndarray  # (P,) of 0 and 1
    pairs: np.ndarray  # those on which it is used
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


class RetrievalRow(NamedTuple):
    """One pair: a description in prose, and the function that it describes without its documentation."""

    description: str
    code: str
    language: str | None


def _checksum(header: object, *texts: Iterable[Text], arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header).encode())
    for part in texts:
        digest.update(json.dumps(list(part)).encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def ranking_task(
    benchmark: str,
    name: str,
    queries: Sequence[Text],
    documents: Sequence[Text],
    ids: Sequence[str] | None = None,
    judgements: Judgements | None = None,
    *,
    batches: Iterable[np.ndarray] | None = None,
    **options: Any,
) -> RetrievalTask:
    """A task whose queries are ranked against all documents, or row by row within batches.

    Args:
        ids: of the queries; their numbers if None.
        judgements: if None, document i is the relevant one of query i.
        batches: the rows of each batch; all documents are candidates of every query if None.
        options: other fields of the task.
    """
    pools = [Pool(np.arange(len(queries)), np.arange(len(documents)))]
    return RetrievalTask(
        benchmark,
        name,
        queries,
        documents,
        list(map(str, range(len(queries)))) if ids is None else list(ids),
        Judgements.one_each(range(len(queries))) if judgements is None else judgements,
        tuple(pools if batches is None else (Pool(rows, rows) for rows in batches)),
        **options,
    )


def candidate_batches(n: int, size: int = POOL, seed: int = 0) -> list[np.ndarray]:
    """Row numbers of each batch: `n` rows shuffled, cut into batches of `size`, the incomplete last one dropped.

    With fewer than `size` rows there is one batch of them all. The shuffle is the one of `np.random.seed(seed)`, which
    CodeSearchNet and CodeBERT use: same rows, same batches.
    """
    if n < 2 or size < 2:
        message = f"Ranking needs at least 2 pairs in batches of at least 2, not {n} pairs in batches of {size}."
        raise UserError("evaluation.candidates.too_few", message)
    order = np.random.RandomState(seed).permutation(n)
    return [order[start : start + size] for start in range(0, max(n - size, 0) + 1, size)]


def pairs_task(
    benchmark: str,
    name: str,
    rows: Iterable[tuple[str, str, str | None]],
    *,
    size: int | None = POOL,
    seed: int = 0,
    **options: Any,
) -> RetrievalTask:
    """A task that asks for the code of each description.

    Args:
        rows: (description, code, language), such as `RetrievalRow`s.
        size: candidates of each query, in the batches of `candidate_batches`; all documents if None.
        seed: of the batches.
        options: for `ranking_task`.
    """
    pairs = [(Text(description), Text(code, language)) for description, code, language in rows]
    batches = candidate_batches(len(pairs), size or POOL, seed)  # also checks the number of pairs
    queries, documents = map(list, zip(*pairs, strict=True))
    return ranking_task(benchmark, name, queries, documents, batches=batches if size else None, **options)


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
        message = f"{len(unknown)} relevant documents are not in `corpus`, such as {unknown[0]!r}."
        raise UserError("evaluation.task.unknown_document", message)
    if not answered or len(places) < 2:
        message = f"Ranking needs an answered query and two documents, not {len(answered)} and {len(places)}."
        raise UserError("evaluation.candidates.too_few", message)
    judged = [sorted(places[document] for document in relevant[name]) for name in answered]
    judgements = Judgements.of([dict.fromkeys(found, 1.0) for found in judged])
    asked, documents = [Text(queries[name]) for name in answered], [Text(text, language) for text in corpus.values()]
    return ranking_task("mappings", "all", asked, documents, answered, judgements, **options)


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
        pairs = []
        for example in (texts[groups[group][0]] for group in drawn):
            snippets = [Text(snippet.code, snippet.language) for snippet in example.snippets]
            if kind == TEXT_TO_CODE:
                pairs.append((Text(example.description), snippets[0]))
            else:  # two snippets drawn at random
                first, second = generator.choice(len(snippets), size=2, replace=False)
                pairs.append((snippets[first], snippets[second]))
        queries, documents = map(list, zip(*pairs, strict=True))
        batches = candidate_batches(len(pairs), POOL)
        tasks.append(ranking_task(HELD_OUT[kind], "all languages", queries, documents, batches=batches))
    return tasks
