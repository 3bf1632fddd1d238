import pytest

from modular_star_encoder.search.ranking import reciprocal_rank_fusion


def test_scores_are_sums_of_reciprocal_ranks():
    scores = reciprocal_rank_fusion([["a", "b", "c"], ["b", "d"]])
    assert scores == pytest.approx({"b": 1 / 62 + 1 / 61, "a": 1 / 61, "d": 1 / 62, "c": 1 / 63})
    assert list(scores) == ["b", "a", "d", "c"]


def test_equal_scores_keep_the_order_of_the_rankings():
    assert list(reciprocal_rank_fusion([["a"], ["b"]])) == ["a", "b"]
    assert list(reciprocal_rank_fusion([["b"], ["a"]])) == ["b", "a"]
