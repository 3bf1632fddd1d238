import itertools
import socket

import evaluate
import numpy as np
import pytest

from modular_star_encoder.evaluation import evaluate_metric, metrics
from modular_star_encoder.evaluation.evaluate_metric import RetrievalMetric
from modular_star_encoder.evaluation.metrics import bootstrap_interval, f1, outcomes, query_values, spread
from tests.errors import raises
from tests.evaluation import brute_force
from tests.evaluation.brute_force import METRICS
from tests.evaluation.samples import rank_matrix


def cases(kind, queries=60, candidates=35, seed=0):
    """Scores and gains (0 or 1) of each query, with one relevant document or more."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(queries, candidates))
    if kind == "tied":
        scores = np.round(scores)
    elif kind == "float32":  # different in float64 only
        scores = np.round(scores, 1) + generator.normal(size=scores.shape) * 1e-10
    gains = generator.random(scores.shape) < 0.2
    gains[np.arange(queries), generator.integers(candidates, size=queries)] = 1
    return list(scores), list(gains.astype(float))


@pytest.mark.parametrize("kind", ["random", "tied", "float32"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_what_its_definition_says(metric, kind):
    scores, gains = cases(kind)
    expected = [METRICS[metric](*query) for query in zip(scores, gains, strict=True)]
    assert query_values(rank_matrix(scores, gains), metric) == pytest.approx(expected, abs=1e-9)


def test_a_query_without_relevant_documents_is_an_error():
    with raises("evaluation.query.no_relevant", "Query 1"):
        rank_matrix([np.arange(3.0), np.arange(3.0)], [np.eye(3)[0], np.zeros(3)])


@pytest.mark.parametrize("metric", ["mrr@0", "recall", "recall@0", "map", "ndcg@x", "mrr@", "f1"])
def test_unknown_metrics_are_an_error(metric):
    with raises("evaluation.metric.unknown", repr(metric)):
        query_values(rank_matrix([[1.0]], [[1]]), metric)


@pytest.mark.parametrize("ties", [False, True])
def test_f1_and_its_best_threshold_are_those_of_trying_all(ties):
    assert f1([5, 0, 0, 0]) == 0
    generator = np.random.default_rng(1)
    for _ in range(20):
        labels = np.append(1, generator.integers(0, 2, size=39))
        scores = (labels + generator.normal(size=40)).round(0 if ties else 9).astype(np.float32)
        tried = {t: brute_force.f1((scores >= t).astype(int).tolist(), labels.tolist()) for t in scores.tolist()}
        threshold = metrics.best_f1_threshold(scores, labels)
        assert tried[threshold] == pytest.approx(max(tried.values()), abs=1e-12)
        counts = np.bincount(outcomes((scores >= threshold).astype(int), labels), minlength=4)
        assert f1(counts) == pytest.approx(tried[threshold], abs=1e-9)


def test_bootstrap_interval_is_reproducible_and_has_the_width_of_the_normal_approximation():
    values = np.random.default_rng(1).uniform(size=2000)
    low, high = bootstrap_interval(values, seed=0)
    assert (low, high) == bootstrap_interval(values, seed=0)
    assert (low, high) != bootstrap_interval(values, seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.1)


def test_the_f1_interval_is_that_of_resampling_pairs():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, size=400)
    decisions = np.where(generator.random(400) < 0.8, labels, 1 - labels)
    results = outcomes(decisions, labels)
    figures = [f1(np.bincount(generator.choice(results, size=400), minlength=4)) for _ in range(2000)]
    assert metrics.bootstrap_f1_interval(results, 0) == pytest.approx(np.quantile(figures, [0.025, 0.975]), abs=0.01)


def test_the_p_value_is_the_share_of_signs_that_are_as_extreme():
    assert metrics.permutation_test(np.zeros(10), 0) == 1
    assert metrics.permutation_test(np.full(40, 0.1), 0) == pytest.approx(1 / 10_001)
    differences = np.array([0.5, 0.2, -0.1, 0.4, 0.0, 0.3, 0.2, -0.2])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    exact = np.mean(np.array(sums) >= differences.sum() - 1e-12)
    assert metrics.permutation_test(differences, 0, resamples=40_000) == pytest.approx(exact, abs=0.01)


def test_the_p_value_of_f1_is_that_of_swapping_pairs():
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 2, size=60)
    first, second = (outcomes(np.where(generator.random(60) < q, labels, 1 - labels), labels) for q in (0.85, 0.7))

    def gap(one, other):
        return abs(f1(np.bincount(one, minlength=4)) - f1(np.bincount(other, minlength=4)))

    extreme = 0
    for _ in range(4000):
        swap = generator.random(60) < 0.5
        extreme += gap(np.where(swap, second, first), np.where(swap, first, second)) >= gap(first, second) - 1e-12
    assert metrics.f1_permutation_test(first, second, 0) == pytest.approx(extreme / 4000, abs=0.02)
    assert metrics.f1_permutation_test(first, first, 0) == 1


def test_the_mean_of_tasks_weighs_tasks_alike_whatever_their_size():
    small, large = {"a": 1.0, "b": 0.5}, {str(i): 0.25 for i in range(50)}
    assert spread([small]) == pytest.approx([1.0, 0.5])
    assert spread([small, large]).mean() == pytest.approx((0.75 + 0.25) / 2)
    assert metrics.shares([small, {"a": 0.4, "c": 0.0}]).tolist() == pytest.approx([0.35, 0.125, 0.0])


def test_tasks_that_share_their_queries_do_not_narrow_the_interval():
    generator = np.random.default_rng(0)
    values = dict(enumerate(generator.uniform(size=100)))
    alone, copied = (spread([values] * count) for count in (1, 10))
    assert copied.std() == pytest.approx(alone.std())
    independent = spread([{(task, i): v for i, v in enumerate(generator.uniform(size=100))} for task in range(10)])
    narrower = [np.diff(bootstrap_interval(v, 0))[0] for v in (independent, alone)]
    assert narrower[0] < 0.5 * narrower[1]


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [("mrr", {}, "mrr"), ("recall", {"k": 5}, "recall@5"), ("ndcg", {}, "ndcg@10"), ("map_at_r", {}, "map@r")],
)
def test_a_metric_of_evaluate_is_its_definition_however_it_is_fed(name, options, key, tmp_path):
    scores, gains = cases("tied", queries=12)
    scores = [row.astype(np.float32) for row in scores]
    scores[3], gains[3] = scores[3][:9], np.eye(9)[2]  # lists of different lengths
    expected = np.mean([METRICS[key](s.tolist(), g.tolist()) for s, g in zip(scores, gains, strict=True)])
    metric = RetrievalMetric(name, cache_dir=str(tmp_path))
    assert metric.compute(predictions=scores, references=gains, **options)[key] == pytest.approx(expected, abs=1e-9)
    for start in range(0, 12, 5):
        metric.add_batch(predictions=scores[start : start + 5], references=gains[start : start + 5])
    assert metric.compute(**options)[key] == pytest.approx(expected, abs=1e-9)


def test_f1_is_that_of_the_positive_class(tmp_path):
    metric = RetrievalMetric("f1", cache_dir=str(tmp_path))
    decisions, labels = [1, 0, 1, 1, 0], [1, 1, 0, 1, 0]
    assert metric.compute(predictions=decisions, references=labels) == {"f1": brute_force.f1(decisions, labels)}


def test_references_that_do_not_fit_the_predictions_and_other_metrics_are_an_error(tmp_path):
    for references in ([[1]], [[1, 2]], [[1, 0], [1, 0]]):
        with raises("evaluation.references"):
            RetrievalMetric("mrr", cache_dir=str(tmp_path))._compute([[0.9, 0.3]], references)
    with raises("evaluation.metric.unknown", "'default'", "mrr, recall, ndcg, map_at_r, f1"):
        RetrievalMetric(cache_dir=str(tmp_path))


def test_evaluate_loads_it_by_path_without_network(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(evaluate.loading, "init_hf_modules", lambda _: str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    metric = evaluate.load(evaluate_metric.__file__, "ndcg", cache_dir=str(tmp_path / "cache"))
    assert metric.compute(predictions=[[0.9, 0.3], [0.1, 0.1]], references=[[1, 0], [1, 0]], k=1) == {"ndcg@1": 0.5}
    assert type(metric) is not RetrievalMetric  # it is the copy that was loaded
