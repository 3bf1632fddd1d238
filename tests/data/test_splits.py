from collections import Counter
from dataclasses import replace

from modular_star_encoder.data.splits import drop_near_identical_descriptions, split_by_repository
from tests.data.samples import function
from tests.errors import raises


def corpus(sizes):
    return [
        function(name, f"f{i}", f"Describe {name} number {i}.", f"def f{i}():\n    {name} = {i}\n    return {name}")
        for name, size in sizes.items()
        for i in range(size)
    ]


MANY = {f"r{i}": 10 for i in range(50)} | {"huge": 300, "large": 200}


def repositories(rows):
    return {row.repository for row in rows}


def test_near_identical_descriptions_and_codes_are_kept_once():
    first = function()
    same_words = replace(first, description="run ALL the steps", code="def other(): ...")
    same_code = replace(first, description="Something else.", code=first.code.replace("    ", "\t"))
    different = replace(first, description="Something else.", code="def other(): ...")
    assert drop_near_identical_descriptions([first, same_words, same_code, different]) == [first, different]


def test_no_repository_is_in_both_parts_and_no_row_is_lost():
    rows = corpus(MANY)
    split = split_by_repository(rows, seed=0, min_test=100)
    assert not repositories(split.train) & repositories(split.test)
    assert len(split.train) + len(split.test) == len(rows)
    assert split.removed_from_train == 0
    assert split.train == [row for row in rows if row in split.train]


def test_only_small_repositories_are_held_out_and_no_more_than_needed():
    for seed in range(5):
        split = split_by_repository(corpus(MANY), seed=seed, min_test=95)
        assert len(split.test) == 100
        assert not {"huge", "large"} & repositories(split.test)


def test_the_seed_alone_decides_the_draw():
    rows = corpus(MANY)
    one = split_by_repository(rows, seed=1, min_test=100)
    assert repositories(split_by_repository(rows[::-1], seed=1, min_test=100).test) == repositories(one.test)
    assert repositories(split_by_repository(rows, seed=2, min_test=100).test) != repositories(one.test)


def test_the_draw_of_a_seed_is_the_same_everywhere():
    split = split_by_repository(corpus({f"r{i}": 1 for i in range(40)}), seed=7, min_test=5)
    assert repositories(split.test) == {"r8", "r12", "r21", "r27", "r37"}


def test_a_small_corpus_holds_out_about_a_fifth():
    split = split_by_repository(corpus({f"r{i}": 1 for i in range(100)}), seed=0)
    assert len(split.test) == 20


def test_large_repositories_are_drawn_smallest_first_when_nothing_else_is_there():
    split = split_by_repository(corpus({"a": 30, "b": 10, "c": 60}), seed=0, min_test=1)
    assert Counter(row.repository for row in split.test) == {"b": 10}
    assert repositories(split.train) == {"a", "c"}


def test_one_repository_always_remains_for_training():
    split = split_by_repository(corpus({"a": 50, "b": 50}), seed=0)
    assert (repositories(split.test), repositories(split.train)) == ({"a"}, {"b"})
    split = split_by_repository(corpus({"a": 90, "b": 5}), seed=0)
    assert (repositories(split.test), repositories(split.train)) == ({"b"}, {"a"})


def test_what_is_held_out_is_not_trained_on_under_another_name():
    rows = corpus({"test": 3, "train": 20})
    held = rows[0]
    copies = [
        replace(held, repository="train", description="Words of its own."),
        replace(held, repository="train", description=held.description.upper(), code="def g():\n    ..."),
    ]
    split = split_by_repository(rows + copies, seed=0, min_test=1)
    assert repositories(split.test) == {"test"}
    assert split.removed_from_train == 2
    assert not set(copies) & set(split.train)
    assert len(split.train) == 20


def test_bad_input_is_refused_in_one_sentence():
    with raises("data.split.too_few_repositories", 1):
        split_by_repository(corpus({"a": 5}), seed=0)
    with raises("data.split.arguments", "min_test", 1):
        split_by_repository(corpus({"a": 5, "b": 5}), seed=0, min_test=0)
    twins = [row for name in "ab" for row in [function(name)]]
    with raises("data.split.nothing_to_train"):
        split_by_repository(twins, seed=0)
