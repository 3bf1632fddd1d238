"""The CodeSearchNet protocol: find the one relevant document among it and 999 distractors, query → document.

The variant is CodeBERT's (github.com/microsoft/CodeBERT, codesearch): shuffle the pairs with seed 0, cut them into
batches of 1000, drop the last incomplete one, rank the documents of a batch for each of its queries, average over all
queries. Ties count against the model. Every ranking system goes through one seam, a `BatchScorer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.evaluation.metrics import (
    bootstrap_interval,
    mean_reciprocal_rank,
    recall_at_k,
    reciprocal_ranks,
)

BatchScorer = Callable[[np.ndarray], np.ndarray]
"""From the row numbers (B,) of a batch to the scores (B, B) of its queries (rows) against its documents (columns)."""


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


def evaluate_scorer(
    scorer: BatchScorer, n: int, *, size: int = 1000, seed: int = 0, progress: bool = True, label: str = "ranking"
) -> RetrievalScores:
    """Rank `n` pairs by a scoring function; the relevant document of query i is document i."""
    batches = distractor_batches(n, size, seed)
    values = np.concatenate(
        [
            reciprocal_ranks(scorer(rows), np.arange(len(rows)))
            for rows in tqdm(batches, desc=label, unit="batch", disable=not progress, leave=False)
        ]
    )
    return RetrievalScores(
        mrr=mean_reciprocal_rank(values),
        recall_at_1=recall_at_k(values, 1),
        recall_at_10=recall_at_k(values, 10),
        interval=bootstrap_interval(values, seed),
        queries=len(values),
        distractors=len(batches[0]) - 1,
    )


def evaluate_with_distractors(
    query_embeddings: np.ndarray,
    document_embeddings: np.ndarray,
    *,
    size: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> RetrievalScores:
    """Rank by cosine similarity.

    Args:
        query_embeddings, document_embeddings: (N, D) each; row i of one belongs to row i of the other.
        size: candidates of each query, the relevant one included.

    Raises:
        ValueError: the shapes differ, there are fewer than two rows, or an embedding holds NaN.
    """
    if query_embeddings.ndim != 2 or query_embeddings.shape != document_embeddings.shape:
        raise ValueError(
            "Queries and documents need embeddings of the same shape (N, D), "
            f"not {query_embeddings.shape} and {document_embeddings.shape}."
        )

    def scorer(rows: np.ndarray) -> np.ndarray:
        return cosine_scores(query_embeddings[rows], document_embeddings[rows])

    return evaluate_scorer(scorer, len(query_embeddings), size=size, seed=seed, progress=progress)


def cosine_scores(query_embeddings: np.ndarray, document_embeddings: np.ndarray) -> np.ndarray:
    """Cosine similarity (Q, D) float32 of (Q, F) and (D, F) embeddings; a vector of zeros is similar to nothing (0).

    Summed in float64 and then rounded: equal vectors get equal scores wherever they stand in the matrix, which float32
    matrix products don't guarantee and which the tie rule depends on.
    """
    return (_unit_rows(query_embeddings) @ _unit_rows(document_embeddings).T).astype(np.float32)


def _unit_rows(embeddings: np.ndarray) -> np.ndarray:
    embeddings = embeddings.astype(np.float64)
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(norms == 0, 1, norms)
