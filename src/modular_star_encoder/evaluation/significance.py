"""How far a figure depends on which queries were drawn, and whether two figures differ.

None of it says anything about other seeds of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from modular_star_encoder.evaluation.metrics import f1

_DRAWS_PER_CHUNK = 1 << 22


def bootstrap_interval(
    values: np.ndarray, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (Q,) values (Efron 1979), the same for the same seed.

    Raises:
        ValueError: no value, a level outside (0, 1), or fewer than one resample.
    """
    values = _not_empty(values)
    _check_bootstrap(resamples, level)
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_PER_CHUNK // len(values))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = [values[generator.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    return _percentiles(np.concatenate(means), level)


def bootstrap_f1_interval(
    outcomes: np.ndarray, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of F1 over pairs, from their outcomes (N,) (see `metrics.outcomes`).

    Drawing pairs with replacement is drawing the four counts from a multinomial distribution.
    """
    _check_bootstrap(resamples, level)
    counts = np.bincount(outcomes, minlength=4)
    draws = np.random.default_rng(seed).multinomial(len(outcomes), counts / len(outcomes), size=resamples)
    return _percentiles(f1(draws), level)


def permutation_test(differences: np.ndarray, seed: int, resamples: int = 10_000) -> float:
    """Two-sided p-value of a paired permutation test: is the mean of (Q,) differences 0?

    If two systems are exchangeable, each difference is as likely to have the other sign. The p-value counts the
    observed signs as one of the resamples, so that it is never 0 (Phipson & Smyth 2010).

    Raises:
        ValueError: no difference, or fewer than one resample.
    """
    differences = _not_empty(differences)
    _check_bootstrap(resamples, 0.5)
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    observed = abs(moved.sum()) * (1 - 1e-12)  # equal sums in another order of adding up
    generator = np.random.default_rng(seed)
    at_least = 0
    rows = max(1, _DRAWS_PER_CHUNK // len(moved))
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), len(moved))
        signs = generator.integers(0, 2, size=size, dtype=np.int8) * 2 - 1
        at_least += int(np.count_nonzero(np.abs(signs @ moved) >= observed))
    return (1 + at_least) / (1 + resamples)


def f1_permutation_test(first: np.ndarray, second: np.ndarray, seed: int, resamples: int = 10_000) -> float:
    """Two-sided p-value of a paired permutation test: do two systems have the same F1?

    Args:
        first, second: (N,) outcomes of the same pairs. Swapping the systems at a pair moves it from one cell of the
            4 × 4 table of outcomes to the mirrored one, so a resample is one binomial draw per cell.
    """
    table = np.zeros((4, 4), dtype=np.int64)
    np.add.at(table, (first, second), 1)
    observed = abs(f1(table.sum(1)) - f1(table.sum(0))) * (1 - 1e-12)
    swapped = np.random.default_rng(seed).binomial(table, 0.5, size=(resamples, 4, 4))
    tables = table - swapped + swapped.transpose(0, 2, 1)
    differences = np.abs(f1(tables.sum(2)) - f1(tables.sum(1)))
    return (1 + int(np.count_nonzero(differences >= observed))) / (1 + resamples)


def spread(values: Sequence[Mapping[str, float]]) -> np.ndarray:
    """One value per query, whose mean and bootstrap are those of the mean of several tasks' means.

    Tasks may share queries (the same exercise in many pairs of languages): what is drawn is then the query with all its
    tasks. The values are the mean plus each query's influence on it, so that tasks of different sizes weigh the same.

    Args:
        values: for each task, the value of each query by its id.
    """
    means = [float(np.mean(list(task.values()))) for task in values]
    influence: dict[str, float] = {}
    for task, mean in zip(values, means, strict=True):
        for query, value in task.items():
            influence[query] = influence.get(query, 0.0) + (value - mean) / (len(task) * len(values))
    return float(np.mean(means)) + len(influence) * np.array(list(influence.values()))


def shares(differences: Sequence[Mapping[str, float]]) -> np.ndarray:
    """What each query contributes to the mean over tasks of the mean difference, for `permutation_test`."""
    total: dict[str, float] = {}
    for task in differences:
        for query, difference in task.items():
            total[query] = total.get(query, 0.0) + difference / (len(task) * len(differences))
    return np.array(list(total.values()))


def _percentiles(figures: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_bootstrap(resamples: int, level: float) -> None:
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must lie between 0 and 1 and resamples be at least 1, not {level} and {resamples}.")


def _not_empty(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"A mean needs a list of at least one query, not an array of shape {values.shape}.")
    return values
