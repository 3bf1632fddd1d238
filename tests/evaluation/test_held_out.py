"""Held-out rows as tasks."""

from modular_star_encoder.data.pairs import RetrievalExample, Snippet
from modular_star_encoder.evaluation.tasks import held_out_tasks


def triplet(number, description=None):
    return RetrievalExample(
        description or f"Does {number}.", (Snippet("go", f"func f{number}() {{}}"), Snippet("c", f"void f{number}();"))
    )


def exercise(number):
    return RetrievalExample("", tuple(Snippet(name, f"{name} {number}") for name in ("java", "php", "ruby")))


def test_descriptions_find_their_code_and_code_the_same_in_another_language():
    text, code = held_out_tasks([triplet(i) for i in range(5)] + [exercise(i) for i in range(4)])
    assert [task.benchmark for task in (text, code)] == ["held-out, text → code", "held-out, code → code"]
    assert (len(text.queries), len(code.queries)) == (5, 9)
    for query, document in zip(text.queries, text.documents, strict=True):
        number = query.text.removeprefix("Does ").removesuffix(".")
        assert (query.language, document) == (None, (f"func f{number}() {{}}", "go"))
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


def test_one_pair_is_no_task():
    assert held_out_tasks([triplet(0)]) == []


def test_every_query_of_a_task_is_ranked(monkeypatch):
    monkeypatch.setattr("modular_star_encoder.evaluation.tasks.POOL", 4)
    for count, queries, pools in ((3, 3, 1), (4, 4, 1), (7, 4, 1), (9, 8, 2)):
        text, _ = held_out_tasks([triplet(i) for i in range(count)])
        assert (len(text.queries), len(text.pools)) == (queries, pools)
        assert sum(len(pool.queries) for pool in text.pools) == queries
