import numpy as np
import pytest

from modular_star_encoder.evaluation.tasks import candidate_batches, held_out_tasks, pairs_task, task_from_mappings
from tests.data.test_splits import exercise, triplet
from tests.errors import raises

PAIRS = [(f"text {i}", f"code {i}", "python") for i in range(12)]


def test_batches_are_full_and_those_of_codesearchnets_shuffle_and_follow_the_seed():
    np.random.seed(0)
    order = np.arange(2500)
    np.random.shuffle(order)
    assert np.array_equal(candidate_batches(2500), [order[:1000], order[1000:2000]])
    assert not np.array_equal(candidate_batches(2500, seed=1)[0], order[:1000])
    assert sorted(candidate_batches(30)[0]) == list(range(30))


def test_queries_without_a_relevant_document_are_left_out_and_spare_documents_are_candidates():
    task = task_from_mappings({"q1": "one", "q2": "two"}, {"a": "A", "b": "B", "c": "C"}, {"q1": {"c", "a"}}, "ruby")
    assert task.queries == [("one", None)]
    assert task.documents == [("A", "ruby"), ("B", "ruby"), ("C", "ruby")]
    assert (task.query_ids, task.judgements.document.tolist()) == (["q1"], [0, 2])
    assert [len(part) for part in task.pools[0]] == [1, 3]


@pytest.mark.parametrize(
    ("build", "key", "value"),
    [
        (lambda: candidate_batches(0), "evaluation.candidates.too_few", 0),
        (lambda: candidate_batches(5, 1), "evaluation.candidates.too_few", 1),
        (lambda: pairs_task("b", "t", PAIRS[:1], size=None), "evaluation.candidates.too_few", 1),
        (lambda: from_ids("ab", {"q": ["x"]}), "evaluation.task.unknown_document", "'x'"),
        (lambda: from_ids("ab", {}), "evaluation.candidates.too_few", "has 0 and 2"),
        (lambda: from_ids("a", {"q": ["a"]}), "evaluation.candidates.too_few", "has 1 and 1"),
    ],
)
def test_too_few_texts_to_rank_are_an_error(build, key, value):
    with raises(key, value):
        build()


def from_ids(documents, relevant):
    return task_from_mappings({"q": ""}, dict.fromkeys(documents, ""), relevant)


def test_descriptions_find_their_code_and_code_the_same_in_another_language():
    text, code = held_out_tasks([triplet(i) for i in range(5)] + [exercise(i) for i in range(4)])
    assert [task.benchmark for task in (text, code)] == ["held-out, text → code", "held-out, code → code"]
    assert (len(text.queries), len(code.queries)) == (5, 9)
    for query, document in zip(text.queries, text.documents, strict=True):
        number = query.text.removeprefix("Does ").removesuffix(".")
        assert (query.language, document) == (None, (f"def f{number}(): ...", "python"))
    for query, document in zip(code.queries, code.documents, strict=True):
        assert None not in (query.language, document.language)
        assert query.language != document.language
        assert set(query.text) & set("0123456789") == set(document.text) & set("0123456789")


def test_rows_that_share_a_text_are_one_query_and_draws_follow_the_seed():
    rows = [triplet(i, description="Same." if i < 3 else None) for i in range(9)]
    (text, _) = held_out_tasks(rows)
    assert len(text.queries) == 7
    drawn = [held_out_tasks(rows, limit=4, seed=seed)[0].queries for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4


def test_every_query_of_a_task_is_ranked_and_one_pair_is_no_task(monkeypatch):
    assert held_out_tasks([triplet(0)]) == []
    monkeypatch.setattr("modular_star_encoder.evaluation.tasks.POOL", 4)
    for count, queries, pools in ((3, 3, 1), (4, 4, 1), (7, 4, 1), (9, 8, 2)):
        text, _ = held_out_tasks([triplet(i) for i in range(count)])
        assert (len(text.queries), len(text.pools)) == (queries, pools)
        assert sum(len(pool.queries) for pool in text.pools) == queries
