"""When the deep exit of a cascade need not run: a margin fitted on questions whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from modular_star_encoder.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class FittedMargin:
    """A margin and what it gave on the queries that it was fitted on.

    Attributes:
        margin: the deep exit runs where the shallow margin is below; 0 if it never has to.
        share: of queries for which it ran.
        quality: mean over all queries of the ranking that was used.
        shallow_quality, deep_quality: the means of either alone.
        queries: their number.
    """

    margin: float
    share: float
    quality: float
    shallow_quality: float
    deep_quality: float
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def threshold_curve(
    margins: Sequence[float], shallow: Sequence[float], deep: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every threshold on the margin would give.

    Args:
        margins: (Q,) how far the shallow exit's best leads.
        shallow, deep: (Q,) quality of each query's ranking by either, such as the reciprocal rank.

    Returns:
        Thresholds (T,), ascending from 0, to be compared by "margin < threshold"; the share of deep passes (T,); the
        mean quality (T,).

    Raises:
        ValueError: no query, or lists of different lengths.
    """
    margin, without, with_deep = (np.asarray(values, dtype=np.float64) for values in (margins, shallow, deep))
    if not len(margin) or not len(margin) == len(without) == len(with_deep):
        raise UserError(
            "search.margin.values",
            "A threshold needs one margin and two qualities for each query, and at least one query.",
        )
    ascending = np.sort(margin)
    distinct = np.unique(margin)
    # Halfway between two margins, so that a threshold doesn't hang on the last bit of one of them.
    thresholds = np.concatenate([[0.0], (distinct[:-1] + distinct[1:]) / 2, [np.nextafter(distinct[-1], np.inf)]])
    counts = np.searchsorted(ascending, thresholds, side="left")
    gains = np.concatenate([[0.0], np.cumsum((with_deep - without)[np.argsort(margin, kind="stable")])])
    return thresholds, counts / len(margin), without.mean() + gains[counts] / len(margin)


def fit_threshold(
    margins: Sequence[float], shallow: Sequence[float], deep: Sequence[float], *, tolerance: float = 0.005
) -> FittedMargin:
    """The margin with the fewest deep passes whose quality is within `tolerance` of passing every query.

    Args:
        margins, shallow, deep: as for `threshold_curve`, of held-out queries.
        tolerance: quality that may be lost, in the unit of the quality.

    Raises:
        ValueError: as `threshold_curve`, or a negative tolerance.
    """
    if tolerance < 0:
        raise UserError("search.margin.tolerance", f"tolerance must not be negative, but is {tolerance}.")
    thresholds, shares, qualities = threshold_curve(margins, shallow, deep)
    place = int(np.argmax(qualities >= qualities[-1] - tolerance - 1e-12))
    return FittedMargin(
        margin=float(thresholds[place]),
        share=float(shares[place]),
        quality=float(qualities[place]),
        shallow_quality=float(qualities[0]),
        deep_quality=float(qualities[-1]),
        queries=len(margins),
    )
