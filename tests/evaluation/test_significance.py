import itertools

import numpy as np
import pytest

from modular_star_encoder.evaluation.metrics import (
    bootstrap_f1_interval,
    bootstrap_interval,
    f1,
    f1_permutation_test,
    outcomes,
    permutation_test,
    shares,
    spread,
)
from tests.errors import raises


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


def test_a_mean_of_nothing_is_refused():
    for function in (bootstrap_interval, permutation_test):
        with raises("evaluation.bootstrap.no_values"):
            function(np.array([]), 0)


def test_the_f1_interval_is_that_of_resampling_pairs():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, size=400)
    decisions = np.where(generator.random(400) < 0.8, labels, 1 - labels)
    results = outcomes(decisions, labels)
    figures = [f1(np.bincount(generator.choice(results, size=400), minlength=4)) for _ in range(2000)]
    assert bootstrap_f1_interval(results, 0) == pytest.approx(np.quantile(figures, [0.025, 0.975]), abs=0.01)


def test_the_p_value_is_the_share_of_signs_that_are_as_extreme():
    differences = np.array([0.5, 0.2, -0.1, 0.4, 0.0, 0.3, 0.2, -0.2])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    exact = np.mean(np.array(sums) >= differences.sum() - 1e-12)
    assert permutation_test(differences, 0, resamples=40_000) == pytest.approx(exact, abs=0.01)


def test_equal_systems_do_not_differ_and_different_ones_do():
    assert permutation_test(np.zeros(10), 0) == 1
    assert permutation_test(np.full(40, 0.1), 0) == pytest.approx(1 / 10_001)
    p = [permutation_test(np.random.default_rng(seed).normal(size=50), seed, 500) for seed in range(100)]
    assert 0.4 < np.mean(p) < 0.6


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
    assert f1_permutation_test(first, second, 0) == pytest.approx(extreme / 4000, abs=0.02)
    assert f1_permutation_test(first, first, 0) == 1


def test_spread_values_of_one_task_are_its_own():
    values = {"a": 0.1, "b": 0.7, "c": 1.0}
    assert spread([values]) == pytest.approx(list(values.values()))


def test_the_mean_of_tasks_weighs_tasks_alike_whatever_their_size():
    small, large = {"a": 1.0, "b": 0.5}, {str(i): 0.25 for i in range(50)}
    assert spread([small, large]).mean() == pytest.approx((0.75 + 0.25) / 2)


def test_tasks_that_share_their_queries_do_not_narrow_the_interval():
    generator = np.random.default_rng(0)
    values = dict(enumerate(generator.uniform(size=100)))
    alone, copied = (spread([values] * count) for count in (1, 10))
    assert copied.std() == pytest.approx(alone.std())
    independent = spread([{(task, i): v for i, v in enumerate(generator.uniform(size=100))} for task in range(10)])
    narrower = [np.diff(bootstrap_interval(v, 0))[0] for v in (independent, alone)]
    assert narrower[0] < 0.5 * narrower[1]


def test_shares_of_a_difference_add_up_to_the_mean_difference_over_tasks():
    tasks = [{"a": 0.2, "b": -0.1}, {"a": 0.4, "c": 0.0, "d": 0.2}]
    assert shares(tasks).sum() == pytest.approx((0.05 + 0.2) / 2)
    assert len(shares(tasks)) == 4
