import json
from dataclasses import replace

import numpy as np
import pytest

from modular_star_encoder.evaluation import run as run_module
from modular_star_encoder.evaluation.metrics import query_values, rank_judged
from modular_star_encoder.evaluation.retrievers import ExitVariant
from modular_star_encoder.evaluation.run import evaluate_task, evaluate_tasks
from modular_star_encoder.evaluation.tasks import Judgements, Pool
from modular_star_encoder.inference.encoders import Text
from tests.errors import raises
from tests.evaluation import brute_force
from tests.evaluation.samples import given_retriever, pair_task, retrieval_task

METRICS = retrieval_task().metrics
ESTIMATE = {"value": 0.5, "low": 0.4, "high": 0.6}


def run(tasks, retrievers, out=None):
    return evaluate_tasks(tasks, retrievers, out=out, progress=False)


def run_one(task, out=None, exit_layer=3, **options):
    (result,) = run([task], [given_retriever(exit_layers=(exit_layer,), **options)], out)
    return result


def test_a_result_holds_every_metric_of_the_task_and_the_values_of_its_main_one():
    task = retrieval_task(metrics=("ndcg@10", "mrr"))
    result, retriever = run_one(task, exit_layer=2), given_retriever(exit_layers=(2,))
    retriever.prepare(task.texts(), retriever.variants, progress=False)
    ranking = rank_judged(retriever.scores(task.queries, task.documents, ExitVariant(2)), task.judgements)
    assert result.main == "ndcg@10"
    assert result.values == query_values(ranking, "ndcg@10").tolist()
    assert result.estimates["mrr"].value == query_values(ranking, "mrr").mean()
    assert result.estimates["mrr"].low <= result.estimates["mrr"].value <= result.estimates["mrr"].high
    assert result.ids == [f"q{i}" for i in range(20)]
    assert (result.exit_layer, result.candidates) == (2, 20)


def test_each_query_is_ranked_in_its_own_pool():
    pools = (Pool(np.array([3, 5]), np.array([5, 3])), Pool(np.array([0, 1]), np.array([0, 1, 2])))
    task = retrieval_task(pools=pools)
    result = run_one(task)
    assert result.ids == ["q3", "q5", "q0", "q1"]
    for value, query in zip(result.values, (3, 5, 0, 1), strict=True):
        documents = next(pool.documents for pool in pools if query in pool.queries)
        numbers = [[float(x) for x in text.text.split()] for text in [*task.queries, *task.documents]]
        row = [brute_force.cosine(numbers[query], numbers[20 + document]) for document in documents]
        assert value == pytest.approx(brute_force.reciprocal_rank(row, [float(d == query) for d in documents]))


def test_finished_results_are_kept_and_only_missing_ones_computed(tmp_path, monkeypatch):
    tasks = [retrieval_task(), retrieval_task(name="two", seed=1)]
    first = run(tasks, [given_retriever(exit_layers=(1, 2))], tmp_path)
    computed = []
    monkeypatch.setattr(run_module, "evaluate_task", lambda *a, **k: computed.append(a[2]) or evaluate_task(*a, **k))
    retriever = given_retriever(exit_layers=(1, 2, 3), folder=tmp_path / "embeddings")
    again = run(tasks, [retriever], tmp_path)
    assert computed == [ExitVariant(3)] * 2
    assert retriever.encoder.calls == [(80, (3,))]
    assert [result for result in again if result.exit_layer < 3] == first
    assert run(tasks, [given_retriever(exit_layers=(1, 2))], tmp_path) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda task: replace(task, documents=[Text("1 2 3"), *task.documents[1:]]),
        lambda task: replace(task, judgements=Judgements.one_each([1, *range(1, 20)])),
        lambda task: replace(task, metrics=("recall@1",)),
        lambda task: replace(task, pools=(Pool(np.arange(19), np.arange(20)),)),
        lambda task: replace(task, exclude_self=True, judgements=Judgements.one_each([*range(1, 20), 0])),
    ],
)
def test_another_task_or_other_weights_of_the_same_name_are_evaluated_again(tmp_path, change):
    task = retrieval_task()
    run_one(task, tmp_path)
    run_one(change(task), tmp_path)
    run_one(task, tmp_path, noise=0.5)
    assert len(list(tmp_path.glob("cells/*.json"))) == 3


@pytest.mark.parametrize(
    ("task", "change"),
    [
        *((retrieval_task(), text) for text in ("", "{}", '{"estimates": {"mrr": 1}}', "[]", "a folder")),
        (retrieval_task(), {"exit_layer": 2}),
        (retrieval_task(), {"dimensions": -5}),
        (retrieval_task(), {"candidates": -3}),
        (retrieval_task(), {"estimates": {}}),
        (retrieval_task(), {"estimates": {"f1": ESTIMATE}}),
        (retrieval_task(), {"estimates": dict.fromkeys((*METRICS, "ndcg"), ESTIMATE)}),
        (retrieval_task(), {"estimates": dict.fromkeys(reversed(METRICS), ESTIMATE)}),
        (retrieval_task(), {"estimates": dict.fromkeys(METRICS, ESTIMATE | {"value": 57})}),
        (retrieval_task(), {"estimates": dict.fromkeys(METRICS, ESTIMATE | {"low": "nan"})}),
        (retrieval_task(), {"estimates": dict.fromkeys(METRICS, ESTIMATE | {"low": 0.9})}),
        (retrieval_task(), {"values": [0.5] * 19}),
        (retrieval_task(), {"values": [2] * 20}),
        (retrieval_task(), {"ids": [f"q{i}" for i in range(19)], "values": [0.5] * 19}),
        (retrieval_task(), {"threshold": 0.5}),
        (pair_task(), {"values": [0]}),
        (pair_task(), {"values": [int(label) + 4 for label in pair_task().labels]}),
        (pair_task(), {"values": [1 - int(label) for label in pair_task().labels]}),
        (pair_task(), {"threshold": None}),
        (pair_task(), {"threshold": "nan"}),
    ],
)
def test_a_result_that_is_damaged_or_does_not_fit_its_task_is_an_error_that_names_the_file(tmp_path, task, change):
    first = run_one(task, tmp_path)
    (path,) = tmp_path.glob("cells/*.json")
    assert run_one(task, tmp_path) == first
    if change == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with raises("evaluation.result.damaged", path.name):
        run_one(task, tmp_path)


def test_the_threshold_is_chosen_on_one_half_and_used_on_the_other():
    task = pair_task(60)
    result = run_one(task)
    numbers = [[float(x) for x in text.text.split()] for text in task.documents]
    parts = (task.valid_pairs, task.pairs)
    valid, test = ([brute_force.cosine(numbers[i], numbers[j]) for i, j in pairs] for pairs in parts)

    def quality(scores, labels, threshold):
        return brute_force.f1([int(score >= threshold) for score in scores], labels.tolist())

    best = max(valid, key=lambda threshold: (quality(valid, task.valid_labels, threshold), threshold))
    assert result.threshold == pytest.approx(best)
    assert result.estimates["f1"].value == pytest.approx(quality(test, task.labels, best), abs=1e-9)
    said = np.array(test) >= best
    assert result.estimates["precision"].value == pytest.approx(task.labels[said].mean())
    assert result.estimates["recall"].value == pytest.approx(said[task.labels == 1].mean())
