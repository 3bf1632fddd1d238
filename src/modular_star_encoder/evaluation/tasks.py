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


class Text(NamedTuple):
    """A text to embed: prose, or code in a programming language ("python", "c++", "c#", …)."""

    text: str
    language: str | None = None


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
