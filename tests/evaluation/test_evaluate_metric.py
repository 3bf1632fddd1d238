import socket

import evaluate
import numpy as np
import pytest

from modular_star_encoder.evaluation import evaluate_metric
from modular_star_encoder.evaluation.evaluate_metric import RetrievalMetric
from tests.errors import raises
from tests.evaluation import brute_force
from tests.evaluation.test_metrics import cases

EXPECTED = {
    "mrr": ({}, "mrr", brute_force.reciprocal_rank),
    "recall": ({"k": 3}, "recall@3", lambda s, g: brute_force.recall(s, g, 3)),
    "ndcg": ({}, "ndcg@10", lambda s, g: brute_force.ndcg(s, g, 10)),
    "map_at_r": ({}, "map@r", brute_force.map_at_r),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_metric_is_its_definition_however_it_is_fed(name, tmp_path):
    options, key, brute = EXPECTED[name]
    scores, gains = cases("tied", queries=12)
    scores = [row.astype(np.float32) for row in scores]
    scores[3], gains[3] = scores[3][:9], np.eye(9)[2]  # lists of different lengths
    expected = np.mean([brute(s.tolist(), g.tolist()) for s, g in zip(scores, gains, strict=True)])
    metric = RetrievalMetric(name, cache_dir=str(tmp_path))
    assert metric.compute(predictions=scores, references=gains, **options)[key] == pytest.approx(expected, abs=1e-9)
    for start in range(0, 12, 5):
        metric.add_batch(predictions=scores[start : start + 5], references=gains[start : start + 5])
    assert metric.compute(**options)[key] == pytest.approx(expected, abs=1e-9)


def test_f1_is_that_of_the_positive_class(tmp_path):
    metric = RetrievalMetric("f1", cache_dir=str(tmp_path))
    decisions, labels = [1, 0, 1, 1, 0], [1, 1, 0, 1, 0]
    assert metric.compute(predictions=decisions, references=labels) == {"f1": brute_force.f1(decisions, labels)}


def test_there_are_no_others(tmp_path):
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
