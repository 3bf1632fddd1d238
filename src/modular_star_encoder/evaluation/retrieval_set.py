"""Queries, documents and which belong together; quality of one exit's embeddings on them.

Unlike `distractors`, a query may have several relevant documents, and documents that belong to no query may be added to
the pool. Ranks are pessimistic: a wrong document that scores the same as a relevant one counts as ranked above it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modular_star_encoder.evaluation.distractors import cosine_scores, distractor_batches
from modular_star_encoder.evaluation.exits import RetrievalRow

NDCG_AT = 10
SCORES_PER_CHUNK = 2**24  # float64 and float32 copies of a chunk of scores take 200 MB together


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalSet:
    """What is asked, what can be found, and what is right.

    Args:
        queries: descriptions, in order.
        documents: code, in order.
        languages: of each document, for its prompt; None where unknown.
        relevant: for each query the positions of its relevant documents, int64, at least one.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    languages: tuple[str | None, ...]
    relevant: tuple[np.ndarray, ...]

    @classmethod
    def from_pairs(cls, rows: Iterable[RetrievalRow | tuple[str, str, str]]) -> RetrievalSet:
        """(description, code, language) rows: the code of row i is what its description asks for.

        Raises:
            ValueError: fewer than two rows.
        """
        rows = [RetrievalRow(*row) for row in rows]
        if len(rows) < 2:
            raise ValueError(f"Ranking needs at least two pairs, not {len(rows)}.")
        descriptions, codes, languages = zip(*rows, strict=True)
        return cls(descriptions, codes, languages, tuple(np.array([position]) for position in range(len(rows))))

    @classmethod
    def from_mappings(
        cls,
        queries: Mapping[str, str],
        corpus: Mapping[str, str],
        relevant: Mapping[str, Collection[str]],
        language: str | None = None,
    ) -> RetrievalSet:
        """Texts by id, and for each query's id the ids of its documents; queries without any are left out.

        Args:
            language: of all documents.

        Raises:
            ValueError: no query has a relevant document, there are fewer than two documents, or `relevant` names a
                document that `corpus` doesn't hold.
        """
        places = {name: place for place, name in enumerate(corpus)}
        asked = [name for name in queries if relevant.get(name)]
        unknown = sorted({document for name in asked for document in relevant[name]} - set(places))
        if unknown:
            raise ValueError(f"relevant names {len(unknown)} documents that are not in corpus, such as {unknown[0]!r}.")
        if not asked or len(places) < 2:
            raise ValueError(
                f"Ranking needs a query with a relevant document and at least two documents, "
                f"not {len(asked)} and {len(places)}."
            )
        return cls(
            tuple(queries[name] for name in asked),
            tuple(corpus.values()),
            (language,) * len(places),
            tuple(np.array(sorted({places[document] for document in relevant[name]})) for name in asked),
        )

    @property
    def is_paired(self) -> bool:
        """Whether document i, and no other, is relevant to query i, for all documents."""
        return len(self.queries) == len(self.documents) and all(
            places.tolist() == [query] for query, places in enumerate(self.relevant)
        )

    def score(
        self,
        queries: np.ndarray,
        documents: np.ndarray,
        *,
        distractors: int | None,
        seed: int,
        recall_at: Sequence[int],
    ) -> dict[str, float]:
        """Quality of embeddings by cosine similarity.

        Args:
            queries: (Q, D) float32.
            documents: (N, D) float32.
            distractors: rank each document among this many others, in the batches of `distractor_batches`; None ranks
                all documents for every query.
            seed: of the batches.
            recall_at: values of k.

        Returns:
            `mrr` (of the first relevant document), `ndcg_at_10` and `recall_at_{k}` (share of the relevant documents
            among the first k), means over the queries, in [0, 1]. NDCG has gain 1 and discount log2(rank + 1)
            (Järvelin and Kekäläinen, 2002).

        Raises:
            ValueError: an embedding is NaN.
        """
        ranks: list[np.ndarray] = []
        for query_rows, document_rows in self._blocks(distractors, seed):
            chosen = documents if document_rows is None else documents[document_rows]
            scores = cosine_scores(queries[query_rows], chosen)
            if np.isnan(scores).any():
                raise ValueError("The embeddings hold NaN, so nothing can be ranked: has the training diverged?")
            for place, query in enumerate(query_rows):
                # Within a batch of distractors the document of the i-th query is the i-th document.
                relevant = self.relevant[query] if document_rows is None else np.array([place])
                ranks.append(relevant_ranks(scores[place], relevant))
        return mean_metrics(ranks, recall_at)

    def _blocks(self, distractors: int | None, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Rows of the queries and of the documents (None: all) that are scored together."""
        if distractors is not None:
            for rows in distractor_batches(len(self.queries), distractors + 1, seed):
                yield rows, rows
            return
        step = max(1, SCORES_PER_CHUNK // len(self.documents))
        for start in range(0, len(self.queries), step):
            yield np.arange(start, min(start + step, len(self.queries))), None


def relevant_ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Ranks (R,) of one query's relevant documents, ascending: the j-th stands behind j - 1 relevant ones and behind
    every wrong one that scores as much or more.

    Args:
        scores: (N,) float32; higher is better.
        relevant: (R,) positions, at least one.
    """
    own = np.sort(scores[relevant])[::-1]
    as_good = np.count_nonzero(scores >= own[:, None], axis=1)
    relevant_as_good = np.count_nonzero(own >= own[:, None], axis=1)
    return as_good - relevant_as_good + np.arange(1, len(own) + 1)


def mean_metrics(ranks: Sequence[np.ndarray], recall_at: Sequence[int]) -> dict[str, float]:
    """Means over queries of what `RetrievalSet.score` returns, from the ranks of each query's relevant documents."""
    ideal = np.cumsum(1 / np.log2(np.arange(2, NDCG_AT + 2)))
    gains = [(1 / np.log2(own[own <= NDCG_AT] + 1)).sum() / ideal[min(len(own), NDCG_AT) - 1] for own in ranks]
    return {
        "mrr": float(np.mean([1 / own[0] for own in ranks])),
        f"ndcg_at_{NDCG_AT}": float(np.mean(gains)),
        **{f"recall_at_{k}": float(np.mean([np.mean(own <= k) for own in ranks])) for k in recall_at},
    }
