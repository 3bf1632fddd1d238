"""Ranking metrics from the ranks of judged documents, and F1 from decisions about pairs.

Scores are compared as float32 and ties count against the system: among equal scores a less relevant document stands
first. A system that gives every document the same score therefore gets the worst figure and not the best. Everything
here sees ranks or outcomes only, so that figures can't depend on how the scores were cut into blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TRUE_NEGATIVE, FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE = range(4)
"""Outcomes of a decision about a pair, `2 * decision + label`."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Where the judged documents of Q queries stand.

    Attributes:
        queries: Q.
        query: (J,) int64, ascending: to which query each judged document belongs.
        gain: (J,) float64, how relevant it is; 0 for a document judged irrelevant.
        rank: (J,) float64, 1 for the first document of the whole ranking; infinite where a protocol cuts it off.
    """

    queries: int
    query: np.ndarray
    gain: np.ndarray
    rank: np.ndarray


def worst_order(scores: np.ndarray, gains: np.ndarray, query: np.ndarray | None = None) -> np.ndarray:
    """Places (N,) of the documents, best score first and the less relevant one first among equal scores.

    Args:
        scores, gains: (N,) each.
        query: (N,) the query of each document, to sort several queries at once.
    """
    return np.lexsort((gains, -scores) if query is None else (gains, -scores, query))


def rank_scores(scores: Sequence[np.ndarray], gains: Sequence[np.ndarray]) -> Ranking:
    """Rank the candidates of each query.

    Args:
        scores: for each query the scores (C,) of its candidates, compared as float32; higher is better.
        gains: for each query how relevant its candidates (C,) are; 0 for the irrelevant ones.

    Raises:
        ValueError: no query, lists that don't fit together, a score that is NaN, or a gain below 0.
    """
    if not len(scores) or len(scores) != len(gains):
        raise ValueError(f"There must be as many lists of gains as of scores, not {len(gains)} and {len(scores)}.")
    ranks = []
    for number, (row, row_gains) in enumerate(zip(scores, gains, strict=True)):
        row, row_gains = np.asarray(row, dtype=np.float32), np.asarray(row_gains, dtype=np.float64)
        if row.ndim != 1 or row.shape != row_gains.shape:
            raise ValueError(f"Query {number} has scores of shape {row.shape} and gains of shape {row_gains.shape}.")
        check_scores(row)
        if not np.all(row_gains >= 0):
            raise ValueError(f"Query {number} has a gain below 0 or NaN.")
        rank = np.empty(len(row))
        rank[worst_order(row, row_gains)] = np.arange(1, len(row) + 1)
        ranks.append(rank)
    query = np.repeat(np.arange(len(ranks)), [len(rank) for rank in ranks])
    return Ranking(len(ranks), query, np.concatenate([np.asarray(g, dtype=np.float64) for g in gains]), _join(ranks))


def check_scores(scores: np.ndarray) -> None:
    """Raise ValueError if a score is NaN."""
    if missing := int(np.count_nonzero(np.isnan(scores))):
        raise ValueError(f"{missing} scores are NaN: such candidates can't be ranked.")


def reciprocal_ranks(ranking: Ranking, cutoff: int | None = None) -> np.ndarray:
    """1 / rank of the first relevant document of each query, (Q,) in [0, 1]; 0 if it stands below `cutoff`.

    Raises:
        ValueError: a query without relevant documents, or a cutoff below 1.
    """
    _check_k(cutoff)
    relevant = _relevant(ranking)
    first = np.full(ranking.queries, np.inf)
    np.minimum.at(first, relevant.query, relevant.rank)
    return np.where(first <= (np.inf if cutoff is None else cutoff), 1.0 / first, 0.0)


def recalls(ranking: Ranking, k: int) -> np.ndarray:
    """Share of the relevant documents of each query that are among the first `k`, (Q,) in [0, 1].

    Raises:
        ValueError: a query without relevant documents, or k below 1.
    """
    _check_k(k)
    relevant = _relevant(ranking)
    found = np.bincount(relevant.query[relevant.rank <= k], minlength=ranking.queries)
    return found / np.bincount(relevant.query, minlength=ranking.queries)


def ndcgs(ranking: Ranking, k: int | None = None) -> np.ndarray:
    """Normalised discounted cumulative gain of the first `k` documents, (Q,) in [0, 1] (Järvelin & Kekäläinen 2002).

    Gain 2^gain − 1, discount log2(rank + 1), as in CodeSearchNet's relevanceeval.py; the ideal ranking is cut at `k`
    too. A query without relevant documents gets NaN, to be left out of the mean.

    Raises:
        ValueError: k below 1.
    """
    _check_k(k)
    limit = np.inf if k is None else k
    order = np.lexsort((-ranking.gain, ranking.query))
    ideal_rank = np.empty(len(order))
    ideal_rank[order] = _places(ranking.query[order])

    def cumulated(rank: np.ndarray) -> np.ndarray:
        gain = np.where(rank <= limit, (2.0**ranking.gain - 1) / np.log2(rank + 1), 0.0)
        return np.bincount(ranking.query, weights=gain, minlength=ranking.queries)

    ideal = cumulated(ideal_rank)
    return np.divide(cumulated(ranking.rank), ideal, out=np.full(ranking.queries, np.nan), where=ideal > 0)


def within_judged(ranking: Ranking, cutoff: int) -> Ranking:
    """The same with ranks counted among judged documents only; those below `cutoff` of the whole ranking are lost."""
    order = np.lexsort((ranking.rank, ranking.query))
    rank = np.empty(len(order))
    rank[order] = _places(ranking.query[order])
    return Ranking(ranking.queries, ranking.query, ranking.gain, np.where(ranking.rank <= cutoff, rank, np.inf))


def average_precisions_at_r(ranking: Ranking) -> np.ndarray:
    """Average precision at R, the number of relevant documents of each query, (Q,) in [0, 1] (Musgrave et al. 2020).

    The mean over the relevant documents of (their place among the relevant ones / their rank), where those below rank R
    count 0. The divisor is R and not the number found, as in CodeXGLUE's evaluator for POJ-104.

    Raises:
        ValueError: a query without relevant documents.
    """
    relevant = _relevant(ranking)
    order = np.lexsort((relevant.rank, relevant.query))
    query, rank = relevant.query[order], relevant.rank[order]
    size = np.bincount(query, minlength=ranking.queries)
    precision = np.where(rank <= size[query], _places(query) / rank, 0.0)
    return np.bincount(query, weights=precision, minlength=ranking.queries) / size


def query_values(ranking: Ranking, metric: str) -> np.ndarray:
    """The values (Q,) of a metric by its name: mrr, mrr@K, recall@K, ndcg, ndcg@K, ndcg-judged@K, map@r.

    `ndcg-judged@K` is CodeSearchNet's NDCG within the annotated documents, of the first K of the whole ranking, and
    `ndcg-full@K` its NDCG of the full ranking, whose ideal isn't cut.

    Raises:
        ValueError: an unknown name, or what the metric itself refuses.
    """
    name, at, cut = metric.partition("@")
    k = int(cut) if cut.isdecimal() else None
    if metric == "map@r":
        return average_precisions_at_r(ranking)
    if name == "mrr" and (cut.isdecimal() or not at):
        return reciprocal_ranks(ranking, k)
    if name == "recall" and k is not None:
        return recalls(ranking, k)
    if name == "ndcg" and (cut.isdecimal() or not at):
        return ndcgs(ranking, k)
    if name == "ndcg-judged" and k:
        return ndcgs(within_judged(ranking, k))
    if name == "ndcg-full" and k:
        cut_off = np.where(ranking.rank <= k, ranking.rank, np.inf)
        return ndcgs(Ranking(ranking.queries, ranking.query, ranking.gain, cut_off))
    raise ValueError(f"There is no metric {metric!r}; there are mrr, mrr@K, recall@K, ndcg, ndcg@K and map@r.")


def outcomes(decisions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Outcome (N,) int64 of each decision about a pair, from decisions and labels (N,) of 0 and 1.

    Raises:
        ValueError: other values, other shapes, or no pair at all.
    """
    decisions, labels = np.asarray(decisions), np.asarray(labels)
    if decisions.shape != labels.shape or decisions.ndim != 1 or not len(labels):
        raise ValueError(f"Decisions and labels must be lists of one length, not {decisions.shape} and {labels.shape}.")
    if not np.isin(decisions, (0, 1)).all() or not np.isin(labels, (0, 1)).all():
        raise ValueError("Decisions and labels must be 0 or 1.")
    return 2 * decisions.astype(np.int64) + labels.astype(np.int64)


def f1(counts: np.ndarray) -> np.ndarray:
    """F1 of the positive class (...), from counts (..., 4) of the outcomes; 0 where nothing is or is said positive."""
    counts = np.asarray(counts, dtype=np.float64)
    twice = 2 * counts[..., TRUE_POSITIVE]
    total = twice + counts[..., FALSE_POSITIVE] + counts[..., FALSE_NEGATIVE]
    return np.divide(twice, total, out=np.zeros_like(total), where=total > 0)


def best_f1_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The score at and above which "positive" gives the highest F1; the highest such score if there are several.

    Args:
        scores: (N,), compared as float32.
        labels: (N,) of 0 and 1.

    Raises:
        ValueError: a score is NaN, or no label is 1.
    """
    scores, labels = np.asarray(scores, dtype=np.float32), np.asarray(labels)
    check_scores(scores)
    if not labels.any():
        raise ValueError("A threshold needs at least one positive pair.")
    order = np.argsort(-scores, kind="stable")
    ordered, positive = scores[order], np.cumsum(labels[order])
    last_of_ties = np.append(ordered[1:] != ordered[:-1], True)
    said = np.arange(1, len(scores) + 1)
    return float(ordered[last_of_ties][np.argmax((2 * positive / (said + positive[-1]))[last_of_ties])])


def _relevant(ranking: Ranking) -> Ranking:
    chosen = ranking.gain > 0
    relevant = Ranking(ranking.queries, ranking.query[chosen], ranking.gain[chosen], ranking.rank[chosen])
    counts = np.bincount(relevant.query, minlength=ranking.queries)
    if not counts.all():
        raise ValueError(f"Query {int(np.argmin(counts))} has no relevant document.")
    return relevant


def _places(query: np.ndarray) -> np.ndarray:
    """1, 2, … within each run of equal numbers of an ascending array."""
    return np.arange(1, len(query) + 1) - np.searchsorted(query, query, side="left")


def _check_k(k: int | None) -> None:
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0)
