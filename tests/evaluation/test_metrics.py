import numpy as np
import pytest

from modular_star_encoder.evaluation.metrics import best_f1_threshold, f1, outcomes, query_values, rank_scores
from tests.errors import raises
from tests.evaluation import brute_force

METRICS = {
    "mrr": brute_force.reciprocal_rank,
    "mrr@3": lambda scores, gains: brute_force.reciprocal_rank(scores, gains, 3),
    "recall@1": lambda scores, gains: brute_force.recall(scores, gains, 1),
    "recall@5": lambda scores, gains: brute_force.recall(scores, gains, 5),
    "ndcg": lambda scores, gains: brute_force.ndcg(scores, gains, None),
    "ndcg@10": lambda scores, gains: brute_force.ndcg(scores, gains, 10),
    "map@r": brute_force.map_at_r,
}


def cases(kind, queries=60, candidates=35, seed=0):
    """Scores and gains of each query, with one relevant document or more."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(queries, candidates))
    if kind == "tied":
        scores = np.round(scores)
    elif kind == "float32":  # different in float64 only
        scores = np.round(scores, 1) + generator.normal(size=scores.shape) * 1e-10
    gains = generator.integers(0, 4, size=scores.shape) * (generator.random(scores.shape) < 0.3)
    gains[np.arange(queries), generator.integers(candidates, size=queries)] = 1
    return list(scores), list(gains.astype(float))


@pytest.mark.parametrize("kind", ["random", "tied", "float32"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_what_its_definition_says(metric, kind):
    scores, gains = cases(kind)
    expected = [METRICS[metric](*query) for query in zip(scores, gains, strict=True)]
    assert query_values(rank_scores(scores, gains), metric) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["random", "tied"])
@pytest.mark.parametrize(("metric", "within"), [("ndcg-judged@12", True), ("ndcg-full@12", False)])
def test_both_ndcgs_of_the_human_judgements_are_those_of_the_authors_script(metric, within, kind):
    scores, gains = cases(kind, candidates=40)
    judged = [np.random.default_rng(7).random(len(row)) < 0.5 for row in scores]
    ranking = rank_scores(scores, gains)
    keep = np.concatenate([mask | (row > 0) for mask, row in zip(judged, gains, strict=True)])
    part = type(ranking)(ranking.queries, ranking.query[keep], ranking.gain[keep], ranking.rank[keep])
    expected = []
    for row, row_gains, mask in zip(scores, gains, judged, strict=True):
        order = sorted(range(len(row)), key=lambda i: (-brute_force.float32(row[i]), row_gains[i]))
        grades = {i: row_gains[i] for i in range(len(row)) if mask[i] or row_gains[i] > 0}
        expected.append(brute_force.relevance_eval(order, grades, within, cutoff=12))
    if kind == "random":  # unjudged ties of gain 0 may stand on either side of judged ones of gain 0
        assert query_values(part, metric) == pytest.approx(expected, abs=1e-9)
    assert query_values(part, metric) == pytest.approx(expected, abs=0.35)


def test_ties_count_against_the_system():
    ranking = rank_scores([np.zeros(4)], [np.array([0, 1, 0, 0])])
    assert query_values(ranking, "mrr") == [1 / 4]
    assert query_values(rank_scores([np.zeros(4)], [np.array([3, 1, 2, 0])]), "ndcg@1") == [0]


def test_one_relevant_document_makes_recall_a_hit_or_a_miss():
    scores = [np.array([0.1, 0.9, 0.5])] * 3
    gains = [np.eye(3)[i] for i in range(3)]
    assert query_values(rank_scores(scores, gains), "recall@2").tolist() == [0, 1, 1]


def test_a_query_without_relevant_documents_is_refused_and_has_no_ndcg():
    ranking = rank_scores([np.arange(3.0), np.arange(3.0)], [np.eye(3)[0], np.zeros(3)])
    for metric in ("mrr", "recall@1", "map@r"):
        with raises("evaluation.query.no_relevant", "Query 1"):
            query_values(ranking, metric)
    assert np.isnan(query_values(ranking, "ndcg@10")).tolist() == [False, True]


@pytest.mark.parametrize(
    ("scores", "gains", "fault"),
    [
        ([], [], "shape"),
        ([[0.5, np.nan]], [[1, 0]], "nan"),
        ([[0.5, 0.1]], [[1]], "shape"),
        ([[0.5, 0.1]], [[1, -1]], "gain"),
    ],
)
def test_scores_that_cannot_be_ranked_are_an_error(scores, gains, fault):
    with raises(f"evaluation.scores.{fault}"):
        rank_scores(scores, gains)


@pytest.mark.parametrize("metric", ["mrr@0", "recall", "recall@0", "map", "ndcg@x", "mrr@", "f1"])
def test_unknown_metrics_are_an_error(metric):
    with raises(f"evaluation.metric.{'k' if metric.endswith('0') else 'unknown'}"):
        query_values(rank_scores([[1.0]], [[1]]), metric)


@pytest.mark.parametrize("ties", [False, True])
def test_f1_and_its_best_threshold_are_those_of_trying_all(ties):
    generator = np.random.default_rng(1)
    for _ in range(20):
        labels = generator.integers(0, 2, size=40)
        labels[0] = 1
        scores = (labels + generator.normal(size=40)).round(0 if ties else 9).astype(np.float32)
        tried = {t: brute_force.f1((scores >= t).astype(int).tolist(), labels.tolist()) for t in scores.tolist()}
        threshold = best_f1_threshold(scores, labels)
        assert tried[threshold] == pytest.approx(max(tried.values()), abs=1e-12)
        counts = np.bincount(outcomes((scores >= threshold).astype(int), labels), minlength=4)
        assert f1(counts) == pytest.approx(tried[threshold], abs=1e-9)


def test_f1_without_positives_is_zero():
    assert f1([5, 0, 0, 0]) == 0
    with raises("evaluation.labels.value"):
        best_f1_threshold(np.ones(2), np.zeros(2))
    with raises("evaluation.labels.value"):
        outcomes(np.array([0, 2]), np.array([0, 1]))
