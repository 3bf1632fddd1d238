"""Batches: both kinds of pairs in equal number, nothing twice, a function of seed and step."""

from collections import Counter
from dataclasses import replace

import pytest

from modular_star_encoder.data.functions import code_key, description_key
from modular_star_encoder.data.pairs import RetrievalExample, Snippet
from modular_star_encoder.data.splits import CODE_TO_CODE, TEXT_TO_CODE, BatchPlan, PairGroups, same_content_groups
from tests.errors import raises


def triplet(number, description=None, code=None, other=None):
    return RetrievalExample(
        f"Does {number}." if description is None else description,
        (Snippet("python", code or f"def f{number}(): ..."), Snippet("go", other or f"func f{number}() {{}}")),
    )


def function(number):
    return RetrievalExample(f"Says {number}.", (Snippet("ruby", f"def g{number}; end"),))


def exercise(number):
    return RetrievalExample("", tuple(Snippet(name, f"{name} {number}") for name in ("c", "java", "php")))


def plan_of(texts, batch_size, seed=0):
    return BatchPlan(PairGroups(texts), batch_size, seed)


def contents(texts, plan, step):
    """The texts that stand in a batch, each as often as it does."""
    found = Counter()
    for row, _ in plan.batch(step):
        found.update({description_key(texts[row].description)} - {""})
        found.update({code_key(snippet.code) for snippet in texts[row].snippets})
    return found


def test_rows_that_share_a_text_with_a_third_one_are_one_group():
    texts = [
        triplet(0, other="func same() {}"),
        triplet(1),
        triplet(2, description="DOES 3", other="func  same()\t{}"),
        triplet(3),
        exercise(4),
    ]
    assert same_content_groups(texts).tolist() == [0, 1, 0, 0, 2]


def test_empty_descriptions_are_not_the_same_content():
    assert same_content_groups([exercise(0), exercise(1)]).tolist() == [0, 1]


def test_both_kinds_are_equally_present_and_no_text_stands_twice_in_any_batch(monkeypatch):
    texts = [triplet(i, description=f"Does {i % 20}.") for i in range(40)]
    texts += [triplet(i + 100, code=f"def f{i % 7}(): ...") for i in range(20)]
    size = PairGroups(texts).largest_batch
    assert size > 10
    plan = plan_of(texts, size, seed=1)
    for step in range(40):
        assert [draw.kind for draw in plan.batch(step)] == [TEXT_TO_CODE, CODE_TO_CODE] * (size // 2)
        assert set(contents(texts, plan, step).values()) == {1}
    # Chance alone would bring equal texts together.
    monkeypatch.setattr(BatchPlan, "_replace_taken", lambda self, places, *_: places)
    careless = plan_of(texts, size, seed=1)
    assert any(max(contents(texts, careless, step).values()) > 1 for step in range(40))


def test_every_row_has_its_turn_also_those_of_large_groups():
    texts = [triplet(i, description=f"Does {i % 8}.") for i in range(24)]
    plan = plan_of(texts, 4, seed=0)
    seen = {kind: set() for kind in (TEXT_TO_CODE, CODE_TO_CODE)}
    for step in range(3 * 4):
        for row, kind in plan.batch(step):
            seen[kind].add(row)
    assert PairGroups(texts).counts == {TEXT_TO_CODE: 8, CODE_TO_CODE: 8}
    assert len(seen[TEXT_TO_CODE]) == 24
    assert len(seen[CODE_TO_CODE]) > 16


def test_an_epoch_takes_each_group_once_and_epochs_differ():
    plan = plan_of([function(i) for i in range(12)], 4, seed=0)
    epochs = [[draw.row for step in range(3) for draw in plan.batch(3 * epoch + step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def with_negatives(texts, step):
    """Each row has the code of another one as its negative."""
    return [replace(text, negative=texts[(row + step) % len(texts)].snippets[0]) for row, text in enumerate(texts)]


def test_no_hard_negative_says_what_a_row_of_the_batch_says(monkeypatch):
    texts = with_negatives([triplet(i) for i in range(20)], step=3)
    plan = plan_of(texts, 8, seed=2)

    def collisions(plan, step):
        said = contents(texts, plan, step)
        return [row for row in plan.negatives(step) if code_key(texts[row].negative.code) in said]

    for step in range(40):
        assert len(plan.negatives(step)) == 8
        assert not collisions(plan, step)
        own = [row == draw.row for row, draw in zip(plan.negatives(step), plan.batch(step), strict=True)]
        assert any(own)
    assert plan.negatives(5) == plan_of(texts, 8, seed=2).negatives(5)
    # Chance alone would bring them together.
    monkeypatch.setattr(plan, "_draw_negatives", lambda step, _: [draw.row for draw in plan.batch(step)])
    assert any(collisions(plan, step) for step in range(40))


def test_a_batch_leaves_a_negative_outside():
    pool = [triplet(i) for i in range(6)]
    few = with_negatives([function(i) for i in range(10)], step=1)
    few = [replace(text, negative=few[row % 3].snippets[0]) for row, text in enumerate(few)]
    assert PairGroups(few).largest_batch == 2
    with raises("data.batch_size", 10, 3):
        plan_of(few, 4)
    with raises("data.batch_size"):
        plan_of([function(i) for i in range(10)], 40)
    assert PairGroups([replace(text, negative=pool[0].snippets[0]) for text in few]).largest_batch == 10
    assert PairGroups([*few, function(20)]).negatives is None
    assert plan_of([*few, function(20)], 4).negatives(0) is None


def test_a_batch_is_a_function_of_seed_and_step_alone():
    texts = [triplet(i) for i in range(30)] + [exercise(i) for i in range(10)]
    forwards, backwards = ([plan_of(texts, 8, seed=5)] * 20, [plan_of(texts, 8, seed=5) for _ in range(20)])
    batches = [plan.batch(step) for step, plan in enumerate(forwards)]
    assert batches == [plan.batch(step) for step, plan in enumerate(backwards)]
    assert batches != [plan_of(texts, 8, seed=6).batch(step) for step in range(20)]
    assert len({tuple(batch) for batch in batches}) == 20


def test_one_kind_alone_fills_the_batch_and_sources_mix():
    exercises = plan_of([exercise(i) for i in range(6)], 5).batch(0)
    assert [draw.kind for draw in exercises] == [CODE_TO_CODE] * 5
    mixed = [function(i) for i in range(6)] + [exercise(i) for i in range(3)]
    assert [draw.row < 6 for draw in plan_of(mixed, 6, seed=0).batch(1)] == [True, False] * 3


@pytest.mark.parametrize(
    ("texts", "batch_size", "message"),
    [
        ([triplet(i) for i in range(10)], 12, "from 2 to 10 pairs, an even number, not 12: there are 10 groups"),
        ([triplet(i) for i in range(10)], 5, "an even number, not 5"),
        ([triplet(i, description="Same.") for i in range(10)], 2, "from 2 to 0 pairs"),
        ([function(i) for i in range(10)], 11, "from 2 to 10 pairs, not 11"),
        ([function(i) for i in range(10)] + [exercise(i) for i in range(3)], 8, "from 2 to 6 pairs"),
        ([], 2, "no pairs"),
    ],
)
def test_batches_that_cannot_be_filled_are_refused(texts, batch_size, message):
    with raises("data.batch_size", message):
        plan_of(texts, batch_size, seed=0)


def test_the_largest_batch_can_be_filled_at_every_step():
    texts = [triplet(i) for i in range(9)] + [exercise(i) for i in range(4)]
    largest = PairGroups(texts).largest_batch
    plan = plan_of(texts, largest, seed=0)
    for step in range(50):
        assert set(contents(texts, plan, step).values()) == {1}
