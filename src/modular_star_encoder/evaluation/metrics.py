"""Ranking metrics with exactly one relevant candidate for each query.

Ranks are pessimistic: a candidate that scores the same as the relevant one counts as ranked above it. A model that
gives every candidate the same score therefore gets the worst figure and not the best.
"""

from __future__ import annotations

import numpy as np


def reciprocal_ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """1 / rank of the relevant candidate of each query, where rank = number of candidates with score ≥ its score.

    Args:
        scores: (Q, D), compared as float32; higher is better. Each row is ranked on its own.
        relevant: (Q,) integers, the column of the relevant candidate of each row.

    Returns:
        (Q,) float64 in (0, 1].

    Raises:
        ValueError: a score is NaN, the shapes don't fit together, or a column doesn't exist.
    """
    scores = np.asarray(scores, dtype=np.float32)
    relevant = np.asarray(relevant)
    if scores.ndim != 2 or relevant.shape != scores.shape[:1]:
        raise ValueError(
            f"scores must be (queries, candidates) and relevant (queries,), not {scores.shape} and {relevant.shape}."
        )
    if not np.issubdtype(relevant.dtype, np.integer) or np.any((relevant < 0) | (relevant >= scores.shape[1])):
        raise ValueError(f"relevant must hold column numbers between 0 and {scores.shape[1] - 1}.")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are NaN: such candidates can't be ranked.")
    relevant_scores = np.take_along_axis(scores, relevant[:, None], axis=1)
    return 1.0 / np.count_nonzero(scores >= relevant_scores, axis=1)


def mean_reciprocal_rank(reciprocal_ranks: np.ndarray) -> float:
    """Mean of the (Q,) values of `reciprocal_ranks`, in (0, 1]. Raises ValueError without queries."""
    return float(np.mean(_not_empty(reciprocal_ranks)))


def recall_at_k(reciprocal_ranks: np.ndarray, k: int) -> float:
    """Share of the queries whose relevant candidate is among the first `k`, in [0, 1], from (Q,) reciprocal ranks."""
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
    return float(np.mean(_not_empty(reciprocal_ranks) >= 1.0 / k))


def bootstrap_interval(
    values: np.ndarray, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (Q,) values (Efron 1979), the same for the same seed.

    It tells how far the figure depends on which queries were drawn, and nothing about other seeds of training.
    """
    values = _not_empty(values)
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must lie between 0 and 1 and resamples be at least 1, not {level} and {resamples}.")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _not_empty(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"A mean needs a list of at least one query, not an array of shape {values.shape}.")
    return values
