"""The CodeSearchNet protocol: find the one relevant document among it and 999 distractors, query → document.

The variant is CodeBERT's (github.com/microsoft/CodeBERT, codesearch): shuffle the pairs with seed 0, cut them into
batches of 1000, drop the last incomplete one, rank the documents of a batch for each of its queries, average over all
queries. Ties count against the system.
"""

from __future__ import annotations

import numpy as np

from modular_star_encoder.evaluation.scores import similarities, unit_rows


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


def cosine_scores(query_embeddings: np.ndarray, document_embeddings: np.ndarray) -> np.ndarray:
    """Cosine similarity (Q, D) float32 of (Q, F) and (D, F) embeddings; see `scores` for what is larger than memory."""
    return similarities(unit_rows(query_embeddings), unit_rows(document_embeddings))
