import numpy as np
import pytest

from modular_star_encoder.evaluation.metrics import (
    bootstrap_interval,
    mean_reciprocal_rank,
    recall_at_k,
    reciprocal_ranks,
)


def test_rank_counts_the_candidates_that_score_higher():
    scores = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    assert reciprocal_ranks(scores, np.array([2, 0])).tolist() == [1 / 2, 1]


def test_ties_count_against_the_system():
    assert reciprocal_ranks(np.zeros((1, 4)), np.array([0])).tolist() == [1 / 4]


def test_differences_below_float32_are_ties():
    scores = np.array([[1.0, 1.0 - 1e-12]])
    assert reciprocal_ranks(scores, np.array([0])).tolist() == [1 / 2]


def test_ranks_do_not_depend_on_the_chunk_size():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(60, 40)).round(1)  # rounded, so that there are ties
    relevant = generator.integers(40, size=60)
    whole = reciprocal_ranks(scores, relevant)
    for size in (1, 7, 59):
        chunks = [reciprocal_ranks(scores[i : i + size], relevant[i : i + size]) for i in range(0, 60, size)]
        assert np.array_equal(np.concatenate(chunks), whole)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="1 scores are NaN"):
        reciprocal_ranks(np.array([[0.5, np.nan]]), np.array([0]))


@pytest.mark.parametrize("relevant", [np.array([3]), np.array([-1]), np.array([0.0]), np.array([0, 1])])
def test_relevant_columns_that_do_not_exist_are_refused(relevant):
    with pytest.raises(ValueError, match="relevant"):
        reciprocal_ranks(np.zeros((1, 3)), relevant)


def test_means_over_queries():
    values = np.array([1, 1 / 2, 1 / 10, 1 / 11])
    assert mean_reciprocal_rank(values) == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11) / 4)
    assert [recall_at_k(values, k) for k in (1, 2, 10, 11)] == [0.25, 0.5, 0.75, 1.0]


def test_recall_includes_the_kth_rank_for_every_k():
    assert all(recall_at_k(reciprocal_ranks(np.ones((1, k)), np.array([0])), k) == 1 for k in range(1, 200))


def test_a_mean_of_nothing_is_refused():
    for mean in (
        mean_reciprocal_rank,
        lambda values: recall_at_k(values, 1),
        lambda values: bootstrap_interval(values, 0),
    ):
        with pytest.raises(ValueError, match="at least one query"):
            mean(np.array([]))


def test_bootstrap_interval_is_reproducible_and_has_the_width_of_the_normal_approximation():
    values = np.random.default_rng(1).uniform(size=2000)
    low, high = bootstrap_interval(values, seed=0)
    assert (low, high) == bootstrap_interval(values, seed=0)
    assert (low, high) != bootstrap_interval(values, seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.1)


def test_a_lower_level_gives_a_narrower_interval():
    values = np.random.default_rng(1).uniform(size=200)
    narrow, wide = (bootstrap_interval(values, seed=0, level=level) for level in (0.5, 0.95))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
