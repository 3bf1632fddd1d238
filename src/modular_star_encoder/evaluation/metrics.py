"""Rank documents by scores; compute metrics of rankings and of yes/no decisions, with intervals and tests.

Scores are compared as float32. Among documents with equal scores, relevant documents come last, so a retriever that
gives every document the same score gets the worst value. No value depends on the size of blocks of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modular_star_encoder.evaluation.retrievers import Scores
from modular_star_encoder.evaluation.tasks import Judgements, Pool, RetrievalTask
from modular_star_encoder.utils.errors import UserError

# The outcomes of a decision about a pair, numbered `2 * decision + label`.
TRUE_NEGATIVE, FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE = range(4)

_DRAWS_PER_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Ranking:
    """The ranks of J (query, relevant document) pairs; each of the Q queries has one or more relevant documents."""

    queries: int  # number of queries, Q
    query: np.ndarray  # (J,) int64, ascending: the number of the query
    rank: np.ndarray  # (J,) float64: the rank of the document; 1 is the best


def check_scores(scores: np.ndarray) -> None:
    """Raise UserError if a score is NaN."""
    if missing := int(np.count_nonzero(np.isnan(scores))):
        raise UserError("evaluation.scores.nan", f"{missing} scores are NaN: check the model's weights.")


def rank_task(task: RetrievalTask, scores: Callable[[Pool], Scores]) -> tuple[Ranking, np.ndarray]:
    """Rank the candidates of each pool of queries by `scores(pool)`; return the ranks, and the queries' row numbers."""
    rankings, start = [], 0
    for pool in task.pools:
        judged = pool_judgements(task.judgements, pool)
        ranking = rank_judged(scores(pool), judged, exclude_self=task.exclude_self)
        rankings.append(replace(ranking, query=ranking.query + start))
        start += len(pool.queries)
    parts = (np.concatenate([getattr(ranking, name) for ranking in rankings]) for name in ("query", "rank"))
    return Ranking(start, *parts), np.concatenate([pool.queries for pool in task.pools])


def rank_judged(scores: Scores, judgements: Judgements, *, exclude_self: bool = False) -> Ranking:
    """Return the ranks of each query's relevant documents among all documents, by scores of Q queries × D documents.

    A document's rank is its place (1, 2, …) among the query's relevant documents, plus the number of irrelevant
    documents with the same or a higher score. With `exclude_self`, document i is not ranked for query i.
    """
    counts = np.bincount(judgements.query, minlength=scores.shape[0])
    if not counts.all():
        message = f"Query {int(np.argmin(counts))} (first: 0) has no relevant document: add one or leave the query out."
        raise UserError("evaluation.query.no_relevant", message)
    bounds = np.searchsorted(judgements.query, np.arange(scores.shape[0] + 1))
    judged_scores = np.full(len(judgements.query), np.nan, dtype=np.float32)
    above, known = np.zeros(len(judgements.query), dtype=np.int64), False
    for block in scores.blocks():
        check_scores(block.scores)
        if exclude_self:
            height, width = block.scores.shape
            first = max(block.row, block.column)
            own = np.arange(first, max(first, min(block.row + height, block.column + width)))
            block.scores[own - block.row, own - block.column] = -np.inf
        judged = slice(bounds[block.row], bounds[block.row + len(block.scores)])
        rows = judgements.query[judged] - block.row
        if block.scores.shape[1] == scores.shape[1]:
            judged_scores[judged] = block.scores[rows, judgements.document[judged]]
        elif not known:
            judged_scores[:] = scores.of_pairs(judgements.query, judgements.document)
            known = True
        above[judged] += _count_at_least(block.scores, rows, judged_scores[judged])
    return _ranking(scores.shape[0], judgements, judged_scores, above)


def pool_judgements(judgements: Judgements, pool: Pool) -> Judgements:
    """Return the (query, relevant document) pairs inside `pool`; both are numbered by their positions in the pool."""
    if not len(judgements.query):
        return judgements
    places = []  # for queries and documents: the row in the pool of each judgement, -1 outside the pool
    for members, named in zip(pool, (judgements.query, judgements.document), strict=True):
        place = np.full(max(members.max(), named.max()) + 1, -1)
        place[members] = np.arange(len(members))
        places.append(place[named])
    query, document = places
    inside = np.flatnonzero((query >= 0) & (document >= 0))
    order = inside[np.argsort(query[inside], kind="stable")]
    return Judgements(query[order], document[order])


def _count_at_least(scores: np.ndarray, rows: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return J counts; count j is how many scores in row `rows[j]` are `thresholds[j]` or more. `rows` is ascending."""
    if len(np.unique(rows)) == len(rows):
        chosen = scores if np.array_equal(rows, np.arange(len(scores))) else scores[rows]
        return np.count_nonzero(chosen >= thresholds[:, None], axis=1)
    counts = np.empty(len(rows), dtype=np.int64)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        ordered = np.sort(scores[rows[start]])
        counts[start:end] = len(ordered) - np.searchsorted(ordered, thresholds[start:end], side="left")
    return counts


def _ranking(queries: int, judgements: Judgements, scores: np.ndarray, above: np.ndarray) -> Ranking:
    """Return the ranks of J relevant documents; `above[j]` counts documents with the score of j or higher."""
    order = np.lexsort((-scores, judgements.query))
    query, ordered = judgements.query[order], scores[order]
    # Relevant documents with equal scores get successive ranks: those that follow in `order` don't count.
    run = np.cumsum(np.append(True, (query[1:] != query[:-1]) | (ordered[1:] != ordered[:-1]))[: len(order)])
    last = np.searchsorted(run, run, side="right") - 1
    rank = np.empty(len(order))
    rank[order] = above[order] - (last - np.arange(len(order)))
    return Ranking(queries, judgements.query, rank)


def query_values(ranking: Ranking, metric: str) -> np.ndarray:
    """Return the value of `metric` for each query: mrr, mrr@K, recall@K, ndcg, ndcg@K or map@r, else UserError.

    MRR is 1 / (rank of the first relevant document). Recall is the fraction of the relevant documents that are found.
    NDCG (Järvelin & Kekäläinen 2002) is the sum of 1 / log2(rank + 1) over the relevant documents, divided by this sum
    for the ideal ranking. Documents at ranks above K count as not found. MAP@R (Musgrave et al. 2020, as in CodeXGLUE
    for POJ-104) is the mean over the R relevant documents of this value: 0 if the document's rank is above R, else its
    place among the relevant documents, divided by its rank.
    """
    name, at, cut = metric.partition("@")
    k = float(cut) if cut.isdecimal() else 0 if at else np.inf
    query, rank, count = ranking.query, ranking.rank, ranking.queries
    relevant = np.bincount(query, minlength=count)
    if metric == "map@r":
        order = np.lexsort((rank, query))
        query, rank = query[order], rank[order]
        precision = np.where(rank <= relevant[query], _places(query) / rank, 0.0)
        return np.bincount(query, weights=precision, minlength=count) / relevant
    if name == "recall" and 0 < k < np.inf:
        return np.bincount(query[rank <= k], minlength=count) / relevant
    if name == "mrr" and k > 0:
        first = np.full(count, np.inf)
        np.minimum.at(first, query, rank)
        return np.where(first <= k, 1.0 / first, 0.0)
    if name == "ndcg" and k > 0:
        gains = [np.where(place <= k, 1 / np.log2(place + 1), 0.0) for place in (rank, _places(query))]
        found, ideal = (np.bincount(query, weights=gain, minlength=count) for gain in gains)
        return found / ideal
    available = "mrr, mrr@K, recall@K, ndcg, ndcg@K, map@r, with K at least 1"
    raise UserError("evaluation.metric.unknown", f"Unknown metric {metric!r}. Available: {available}.")


def outcomes(decisions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the outcomes (N,) int64, such as `TRUE_POSITIVE`, of N decisions with N labels, each 0 or 1."""
    return 2 * decisions.astype(np.int64) + labels.astype(np.int64)


def f1(counts: np.ndarray) -> np.ndarray:
    """Return the F1 of class 1 from counts (…, 4) of the outcomes 0 to 3, see `TRUE_NEGATIVE`; 0 if F1 is undefined."""
    counts = np.asarray(counts, dtype=np.float64)
    twice = 2 * counts[..., TRUE_POSITIVE]
    total = twice + counts[..., FALSE_POSITIVE] + counts[..., FALSE_NEGATIVE]
    return np.divide(twice, total, out=np.zeros_like(total), where=total > 0)


def best_f1_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold at which the decisions `scores >= threshold` have the best F1, the highest if several do."""
    scores, labels = np.asarray(scores, dtype=np.float32), np.asarray(labels)
    check_scores(scores)
    order = np.argsort(-scores, kind="stable")
    ordered, positive = scores[order], np.cumsum(labels[order])
    last_of_ties = np.append(ordered[1:] != ordered[:-1], True)
    said = np.arange(1, len(scores) + 1)
    return float(ordered[last_of_ties][np.argmax((2 * positive / (said + positive[-1]))[last_of_ties])])


def _places(query: np.ndarray) -> np.ndarray:
    """Return the place (N,) of each entry of the ascending array `query` among equal entries: [5, 5, 7] → [1, 2, 1]."""
    return np.arange(1, len(query) + 1) - np.searchsorted(query, query, side="left")


def bootstrap_interval(values: np.ndarray, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """Return (low, high), the 95 % percentile bootstrap interval (Efron 1979) of the mean of `values` (Q,)."""
    generator = np.random.default_rng(seed)
    shapes = _chunks(resamples, len(values))
    means = [values[generator.integers(len(values), size=shape)].mean(axis=1) for shape in shapes]
    return _percentiles(np.concatenate(means))


def bootstrap_f1_interval(outcomes: np.ndarray, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """Return (low, high), the 95 % bootstrap interval of F1 for N outcomes, such as `TRUE_POSITIVE`."""
    counts = np.bincount(outcomes, minlength=4)
    draws = np.random.default_rng(seed).multinomial(len(outcomes), counts / len(outcomes), size=resamples)
    return _percentiles(f1(draws))


def permutation_test(differences: np.ndarray, seed: int = 0, resamples: int = 10_000) -> float:
    """Return the two-sided p-value of a paired permutation test of whether `differences` (Q,) have mean 0.

    A resample gives the differences random signs. The observed differences count as one more resample, so p is never 0
    (Phipson & Smyth 2010).
    """
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    observed = abs(moved.sum()) * (1 - 1e-12)  # tolerates the rounding of sums added in another order
    generator = np.random.default_rng(seed)
    at_least = 0
    for shape in _chunks(resamples, len(moved)):
        signs = generator.integers(0, 2, size=shape, dtype=np.int8) * 2 - 1
        at_least += int(np.count_nonzero(np.abs(signs @ moved) >= observed))
    return (1 + at_least) / (1 + resamples)


def f1_permutation_test(first: np.ndarray, second: np.ndarray, seed: int = 0, resamples: int = 10_000) -> float:
    """Return the two-sided p-value of a paired permutation test of whether two retrievers' outcomes (N,) have equal F1.

    A resample swaps the retrievers' outcomes for randomly chosen items. In a 4 × 4 table, entry (i, j) counts the items
    with outcome i for the first and j for the second retriever; a swap moves an item to entry (j, i). A resample is
    therefore one binomial draw per entry.
    """
    table = np.zeros((4, 4), dtype=np.int64)
    np.add.at(table, (first, second), 1)
    observed = abs(f1(table.sum(1)) - f1(table.sum(0))) * (1 - 1e-12)
    swapped = np.random.default_rng(seed).binomial(table, 0.5, size=(resamples, 4, 4))
    tables = table - swapped + swapped.transpose(0, 2, 1)
    differences = np.abs(f1(tables.sum(2)) - f1(tables.sum(1)))
    return (1 + int(np.count_nonzero(differences >= observed))) / (1 + resamples)


def spread(values: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Return one value for each of Q queries, for `bootstrap_interval`; their mean, M, is the mean of the tasks' means.

    `values` has a dict {query: metric} for each task. A query that occurs in several tasks still gets one value, so
    that the bootstrap draws it as a whole. This value is M + Q × t. To get t, each task's mean is subtracted from the
    metrics of its queries; then t is what the query adds to the mean of the tasks' means (see `shares`).
    """
    means = [float(np.mean(list(task.values()))) for task in values]
    distances = [{query: one - mean for query, one in task.items()} for task, mean in zip(values, means, strict=True)]
    influence = shares(distances)
    return float(np.mean(means)) + len(influence) * influence


def shares(differences: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Return what each query adds to the mean of the tasks' means; `differences` has a dict {query: value} per task."""
    total: dict[str, float] = {}
    for task in differences:
        for query, value in task.items():
            total[query] = total.get(query, 0.0) + value / (len(task) * len(differences))
    return np.array(list(total.values()))


def _chunks(resamples: int, size: int) -> Iterator[tuple[int, int]]:
    """Divide `resamples` rows of `size` draws into chunks that fit into memory; yield the shape of each chunk."""
    rows = max(1, _DRAWS_PER_CHUNK // size)
    for start in range(0, resamples, rows):
        yield min(rows, resamples - start), size


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)
