"""Tasks and results of evaluations. A task is to rank documents for queries, or to classify pairs of texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from modular_star_encoder.data.pairs import RetrievalExample
from modular_star_encoder.data.splits import CODE_TO_CODE, TEXT_TO_CODE, PairGroups
from modular_star_encoder.inference.encoders import Text
from modular_star_encoder.utils.errors import UserError

POOL = 1000  # number of candidates of a query in CodeSearchNet's protocol
HELD_OUT = {TEXT_TO_CODE: "held-out, text → code", CODE_TO_CODE: "held-out, code → code"}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over queries or an F1 over pairs, and the bounds of its 95 % bootstrap interval, as fractions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The scores of one retriever on one task, at one exit and embedding size."""

    benchmark: str
    task: str
    retriever: str
    exit_layer: int | None  # None if the retriever has no exits
    dimensions: int | None  # embedding size; None if embeddings are not truncated
    estimates: Mapping[str, Estimate]  # {metric: estimate}; the first is the task's main metric
    values: Sequence[float]  # main metric of each query in `ids`; for F1 each pair's outcome (see `metrics.outcomes`)
    ids: Sequence[str]  # ids of the queries with a relevant document; empty for pairs
    candidates: int  # number of candidates of a query, in the largest pool; 0 for pairs
    threshold: float | None = None  # pairs with at least this similarity are classified as positive

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return next(iter(self.estimates))


@dataclass(frozen=True, slots=True, eq=False)
class Judgements:
    """J pairs of a query and a relevant document. Documents that are not paired with a query are irrelevant to it."""

    query: np.ndarray  # (J,) int64 row numbers, ascending
    document: np.ndarray  # (J,) int64 row numbers, unique within a query

    @classmethod
    def one_each(cls, documents: Sequence[int] | range) -> Judgements:
        """Return judgements in which `documents[i]` is the only relevant document of query i."""
        return cls(np.arange(len(documents)), np.asarray(documents, dtype=np.int64))

    @classmethod
    def of(cls, relevant: Sequence[Sequence[int]]) -> Judgements:
        """Return judgements in which `relevant[i]` are the row numbers of the relevant documents of query i."""
        query = np.repeat(np.arange(len(relevant)), [len(documents) for documents in relevant])
        return cls(query, np.array([document for documents in relevant for document in documents], dtype=np.int64))


class Pool(NamedTuple):
    """Some queries of a task and the documents that are their candidates, both as row numbers in the task."""

    queries: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    benchmark: str  # name of the benchmark; its tasks share a table
    name: str  # unique within the benchmark, such as "ruby" or "java → python"

    def checksum(self) -> str:
        """Return the SHA-256 (hexadecimal) of all fields of the task that affect scores."""
        shown = ("benchmark", "name", "column", "notes")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in shown}
        return hashlib.sha256(json.dumps(values, default=_arrays).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalTask(_Task):
    """A task to rank documents for queries, with texts and judgements."""

    queries: Sequence[Text]
    documents: Sequence[Text]
    query_ids: Sequence[str]  # the same query has the same id in all tasks of a benchmark
    judgements: Judgements
    pools: Sequence[Pool]  # a query is in one pool at most, together with its relevant documents
    metrics: tuple[str, ...] = ("mrr", "recall@1", "recall@10", "ndcg@10")  # see `query_values`; tables show the first
    exclude_self: bool = False  # whether document i is query i, and therefore not a candidate for it
    column: str = ""  # column of the table, if several tasks share it; `name` if empty
    notes: tuple[str, ...] = ()  # caveats, shown under the table

    def texts(self) -> list[Text]:
        """Return all texts that a retriever must embed: the queries and documents of all pools."""
        return [text for pool in self.pools for part in self.texts_of(pool) for text in part]

    def texts_of(self, pool: Pool) -> tuple[list[Text], list[Text]]:
        """Return (texts of the queries of `pool`, texts of the documents of `pool`)."""
        return [self.queries[row] for row in pool.queries], [self.documents[row] for row in pool.documents]


@dataclass(frozen=True, slots=True, eq=False)
class PairTask(_Task):
    """A task to classify pairs of texts as matching or not, by a threshold on the similarity of a pair."""

    documents: Sequence[Text]
    valid_pairs: np.ndarray  # (P, 2) int64 row numbers of documents; the threshold with the best F1 on them is used
    valid_labels: np.ndarray  # (P,), 0 or 1
    pairs: np.ndarray  # (N, 2) int64; these pairs are classified with the threshold
    labels: np.ndarray
    column: str = ""
    notes: tuple[str, ...] = ()

    def texts(self) -> list[Text]:
        """Return all texts that a retriever must embed."""
        return list(self.documents)


Task = RetrievalTask | PairTask


class RetrievalRow(NamedTuple):
    """A function's description in prose, and the function's code without its documentation."""

    description: str
    code: str
    language: str | None


def _arrays(value: Any) -> Any:
    """Convert an array, or judgements of relevance, to JSON values that `checksum` can hash."""
    if isinstance(value, Judgements):
        return [value.query, value.document]
    return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]


def ranking_task(
    benchmark: str,
    name: str,
    queries: Sequence[Text],
    documents: Sequence[Text],
    ids: Sequence[str] | None = None,
    judgements: Judgements | None = None,
    *,
    batches: Iterable[np.ndarray] | None = None,  # each has the row numbers (B,) of queries and of their candidates
    **options: Any,
) -> RetrievalTask:
    """Build a task to rank all documents or those in a query's batch; by default, document i is relevant to query i."""
    rows = range(len(queries))
    ids, judgements = list(map(str, rows)) if ids is None else list(ids), judgements or Judgements.one_each(rows)
    pools = [Pool(np.arange(len(queries)), np.arange(len(documents)))]
    if batches is not None:
        pools = [Pool(batch, batch) for batch in batches]
    return RetrievalTask(benchmark, name, queries, documents, ids, judgements, pools, **options)


def candidate_batches(n: int, size: int = POOL, seed: int = 0) -> list[np.ndarray]:
    """Shuffle the row numbers 0 to n - 1 into batches of `size`; drop an incomplete batch unless it is the only one."""
    if n < 2 or size < 2:
        message = f"A ranking needs 2 or more pairs in batches of 2 or more, not {n} pairs in batches of {size}."
        raise UserError("evaluation.candidates.too_few", message)
    order = np.random.RandomState(seed).permutation(n)  # as in CodeSearchNet and CodeBERT
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
    """Build a task to find code by description from (description, code, language) rows, with `size` candidates each."""
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
    """Build a task from the arguments of `MultiExitEvaluator.from_mappings`; `options` are other fields of the task."""
    places = {name: place for place, name in enumerate(corpus)}
    answered = [name for name in queries if relevant.get(name)]
    if unknown := sorted({document for name in answered for document in relevant[name]} - set(places)):
        message = f"`relevant` names {len(unknown)} ids that are not in `corpus`, such as {unknown[0]!r}: remove them."
        raise UserError("evaluation.task.unknown_document", message)
    if not answered or len(places) < 2:
        needed = "1 or more queries with relevant documents, and 2 or more documents"
        message = f"A task needs {needed}; this one has {len(answered)} and {len(places)}."
        raise UserError("evaluation.candidates.too_few", message)
    judgements = Judgements.of([sorted(places[document] for document in relevant[name]) for name in answered])
    asked, documents = [Text(queries[name]) for name in answered], [Text(text, language) for text in corpus.values()]
    return ranking_task("mappings", "all", asked, documents, answered, judgements, **options)


def held_out_tasks(texts: Sequence[RetrievalExample], *, limit: int = POOL, seed: int = 0) -> list[RetrievalTask]:
    """Return a task to find code by text and a task to find code by code, each with 2 to `limit` pairs, or no task."""
    tasks: list[RetrievalTask] = []
    for kind, groups in PairGroups(texts).rows.items():
        generator = np.random.default_rng((seed, len(tasks)))
        drawn = generator.permutation(len(groups))[:limit]
        if len(drawn) > POOL:
            drawn = drawn[: len(drawn) // POOL * POOL]  # an incomplete last batch would be dropped
        if len(drawn) < 2:
            continue
        pairs = []
        for example in (texts[groups[group][0]] for group in drawn):
            snippets = [Text(snippet.code, snippet.language) for snippet in example.snippets]
            if kind == TEXT_TO_CODE:
                pairs.append((Text(example.description), snippets[0]))
            else:  # two random snippets
                pairs.append(tuple(snippets[one] for one in generator.choice(len(snippets), size=2, replace=False)))
        queries, documents = map(list, zip(*pairs, strict=True))
        batches = candidate_batches(len(pairs), POOL)
        tasks.append(ranking_task(HELD_OUT[kind], "all languages", queries, documents, batches=batches))
    return tasks
