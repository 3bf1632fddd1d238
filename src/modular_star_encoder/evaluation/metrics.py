"""Metrics of rankings and of decisions about pairs, with intervals and significance tests.

Scores are compared as float32 and ties count against the retriever: among equal scores a less relevant document comes
first. A retriever that gives every document the same score therefore gets the worst value. The functions take ranks or
outcomes, never scores in blocks, so that no value depends on how the scores were cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modular_star_encoder.utils.errors import UserError

TRUE_NEGATIVE, FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE = range(4)
"""Outcomes of a decision about a pair, `2 * decision + label`."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ranks of the judged documents of Q queries.

    Attributes:
        queries: Q.
        query: (J,) int64, ascending: the query of each judged document.
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
        UserError: no query, lists that don't fit together, a score that is NaN, or a gain below 0.
    """
    if not len(scores) or len(scores) != len(gains):
        raise UserError(
            "evaluation.scores.shape", f"Give one list of gains per list of scores, not {len(gains)} for {len(scores)}."
        )
    ranks = []
    for number, (row, row_gains) in enumerate(zip(scores, gains, strict=True)):
        row, row_gains = np.asarray(row, dtype=np.float32), np.asarray(row_gains, dtype=np.float64)
        if row.ndim != 1 or row.shape != row_gains.shape:
            shapes = f"{row.shape} and gains of shape {row_gains.shape}"
            raise UserError("evaluation.scores.shape", f"Query {number} has scores of shape {shapes}.")
        check_scores(row)
        if not np.all(row_gains >= 0):
            raise UserError("evaluation.scores.gain", f"Query {number} has a gain below 0 or NaN.")
        rank = np.empty(len(row))
        rank[worst_order(row, row_gains)] = np.arange(1, len(row) + 1)
        ranks.append(rank)
    query = np.repeat(np.arange(len(ranks)), [len(rank) for rank in ranks])
    every_gain = np.concatenate([np.asarray(row_gains, dtype=np.float64) for row_gains in gains])
    return Ranking(len(ranks), query, every_gain, np.concatenate(ranks))


def check_scores(scores: np.ndarray) -> None:
    """Raise UserError if a score is NaN."""
    if missing := int(np.count_nonzero(np.isnan(scores))):
        raise UserError(
            "evaluation.scores.nan", f"{missing} scores are NaN and cannot be ranked. Did training diverge?"
        )


def reciprocal_ranks(ranking: Ranking, cutoff: int | None = None) -> np.ndarray:
    """1 / rank of the first relevant document of each query, (Q,) in [0, 1]; 0 if its rank is above `cutoff`.

    Raises:
        UserError: a query without relevant documents, or a cutoff below 1.
    """
    _check_k(cutoff)
    relevant = _relevant(ranking)
    first = np.full(ranking.queries, np.inf)
    np.minimum.at(first, relevant.query, relevant.rank)
    return np.where(first <= (np.inf if cutoff is None else cutoff), 1.0 / first, 0.0)


def recalls(ranking: Ranking, k: int) -> np.ndarray:
    """Share of the relevant documents of each query that are among the first `k`, (Q,) in [0, 1].

    Raises:
        UserError: a query without relevant documents, or k below 1.
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
        UserError: k below 1.
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
        UserError: a query without relevant documents.
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
        UserError: an unknown name, or what the metric itself refuses.
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
    raise UserError(
        "evaluation.metric.unknown",
        f"Unknown metric {metric!r}. Available: mrr, mrr@K, recall@K, ndcg, ndcg@K, map@r.",
    )


def outcomes(decisions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Outcome (N,) int64 of each decision about a pair, from decisions and labels (N,) of 0 and 1.

    Raises:
        UserError: other values, other shapes, or no pair at all.
    """
    decisions, labels = np.asarray(decisions), np.asarray(labels)
    if decisions.shape != labels.shape or decisions.ndim != 1 or not len(labels):
        shapes = f"{decisions.shape} and {labels.shape}"
        raise UserError("evaluation.labels.shape", f"Decisions and labels must be lists of one length, not {shapes}.")
    if not np.isin(decisions, (0, 1)).all() or not np.isin(labels, (0, 1)).all():
        raise UserError("evaluation.labels.value", "Decisions and labels must be 0 or 1.")
    return 2 * decisions.astype(np.int64) + labels.astype(np.int64)


def f1(counts: np.ndarray) -> np.ndarray:
    """F1 of the positive class (...), from counts (..., 4) of the outcomes; 0 where nothing is or is said positive."""
    counts = np.asarray(counts, dtype=np.float64)
    twice = 2 * counts[..., TRUE_POSITIVE]
    total = twice + counts[..., FALSE_POSITIVE] + counts[..., FALSE_NEGATIVE]
    return np.divide(twice, total, out=np.zeros_like(total), where=total > 0)


def binary_scores(decisions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of class 1, of decisions and labels (N,) of 0 and 1; 0 where undefined."""
    counts = np.bincount(outcomes(decisions, labels), minlength=4)
    correct = counts[TRUE_POSITIVE]
    found, positive = counts[FALSE_POSITIVE] + correct, counts[FALSE_NEGATIVE] + correct
    return {
        "accuracy": float((counts[TRUE_NEGATIVE] + correct) / len(labels)),
        "precision": float(correct / found) if found else 0.0,
        "recall": float(correct / positive) if positive else 0.0,
        "f1": float(f1(counts)),
    }


def best_f1_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The score at and above which "positive" gives the highest F1; the highest such score if there are several.

    Args:
        scores: (N,), compared as float32.
        labels: (N,) of 0 and 1.

    Raises:
        UserError: a score is NaN, or no label is 1.
    """
    scores, labels = np.asarray(scores, dtype=np.float32), np.asarray(labels)
    check_scores(scores)
    if not labels.any():
        raise UserError("evaluation.labels.value", "A threshold needs at least one positive pair.")
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
        raise UserError("evaluation.query.no_relevant", f"Query {int(np.argmin(counts))} has no relevant document.")
    return relevant


def _places(query: np.ndarray) -> np.ndarray:
    """1, 2, … within each run of equal numbers of an ascending array."""
    return np.arange(1, len(query) + 1) - np.searchsorted(query, query, side="left")


def _check_k(k: int | None) -> None:
    if k is not None and k < 1:
        raise UserError("evaluation.metric.k", f"k must be at least 1, not {k}.")


_DRAWS_PER_CHUNK = 1 << 22


def bootstrap_interval(
    values: np.ndarray, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (Q,) values (Efron 1979), the same for the same seed.

    Raises:
        UserError: no value, a level outside (0, 1), or fewer than one resample.
    """
    values = _not_empty(values)
    _check_bootstrap(resamples, level)
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_PER_CHUNK // len(values))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = [values[generator.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    return _percentiles(np.concatenate(means), level)


def bootstrap_f1_interval(
    outcomes: np.ndarray, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of F1 over pairs, from their outcomes (N,) (see `metrics.outcomes`).

    Drawing pairs with replacement is drawing the four counts from a multinomial distribution.
    """
    _check_bootstrap(resamples, level)
    counts = np.bincount(outcomes, minlength=4)
    draws = np.random.default_rng(seed).multinomial(len(outcomes), counts / len(outcomes), size=resamples)
    return _percentiles(f1(draws), level)


def permutation_test(differences: np.ndarray, seed: int, resamples: int = 10_000) -> float:
    """Two-sided p-value of a paired permutation test: is the mean of (Q,) differences 0?

    If two systems are exchangeable, each difference is as likely to have the other sign. The p-value counts the
    observed signs as one of the resamples, so that it is never 0 (Phipson & Smyth 2010).

    Raises:
        UserError: no difference, or fewer than one resample.
    """
    differences = _not_empty(differences)
    _check_bootstrap(resamples, 0.5)
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    observed = abs(moved.sum()) * (1 - 1e-12)  # equal sums in another order of adding up
    generator = np.random.default_rng(seed)
    at_least = 0
    rows = max(1, _DRAWS_PER_CHUNK // len(moved))
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), len(moved))
        signs = generator.integers(0, 2, size=size, dtype=np.int8) * 2 - 1
        at_least += int(np.count_nonzero(np.abs(signs @ moved) >= observed))
    return (1 + at_least) / (1 + resamples)


def f1_permutation_test(first: np.ndarray, second: np.ndarray, seed: int, resamples: int = 10_000) -> float:
    """Two-sided p-value of a paired permutation test: do two systems have the same F1?

    Args:
        first, second: (N,) outcomes of the same pairs. Swapping the systems at a pair moves it from one cell of the
            4 × 4 table of outcomes to the mirrored one, so a resample is one binomial draw per cell.
    """
    table = np.zeros((4, 4), dtype=np.int64)
    np.add.at(table, (first, second), 1)
    observed = abs(f1(table.sum(1)) - f1(table.sum(0))) * (1 - 1e-12)
    swapped = np.random.default_rng(seed).binomial(table, 0.5, size=(resamples, 4, 4))
    tables = table - swapped + swapped.transpose(0, 2, 1)
    differences = np.abs(f1(tables.sum(2)) - f1(tables.sum(1)))
    return (1 + int(np.count_nonzero(differences >= observed))) / (1 + resamples)


def spread(values: Sequence[Mapping[str, float]]) -> np.ndarray:
    """One value per query, whose mean and bootstrap are those of the mean of several tasks' means.

    Tasks may share queries (the same exercise in many pairs of languages): what is drawn is then the query with all its
    tasks. The values are the mean plus each query's influence on it, so that tasks of different sizes weigh the same.

    Args:
        values: for each task, the value of each query by its id.
    """
    means = [float(np.mean(list(task.values()))) for task in values]
    influence: dict[str, float] = {}
    for task, mean in zip(values, means, strict=True):
        for query, value in task.items():
            influence[query] = influence.get(query, 0.0) + (value - mean) / (len(task) * len(values))
    return float(np.mean(means)) + len(influence) * np.array(list(influence.values()))


def shares(differences: Sequence[Mapping[str, float]]) -> np.ndarray:
    """What each query contributes to the mean over tasks of the mean difference, for `permutation_test`."""
    total: dict[str, float] = {}
    for task in differences:
        for query, difference in task.items():
            total[query] = total.get(query, 0.0) + difference / (len(task) * len(differences))
    return np.array(list(total.values()))


def _percentiles(figures: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_bootstrap(resamples: int, level: float) -> None:
    if not 0 < level < 1 or resamples < 1:
        raise UserError(
            "evaluation.bootstrap.settings",
            f"level must be between 0 and 1 and resamples at least 1, not {level} and {resamples}.",
        )


def _not_empty(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise UserError(
            "evaluation.bootstrap.no_values", f"A mean needs at least one value, not an array of shape {values.shape}."
        )
    return values
