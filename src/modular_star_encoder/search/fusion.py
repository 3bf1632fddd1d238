"""Several rankings made one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)

RANK_CONSTANT = 60


def reciprocal_rank_fusion(rankings: Sequence[Sequence[Item]], constant: int = RANK_CONSTANT) -> dict[Item, float]:
    """Score items by Σ 1 / (constant + rank) over the rankings that hold them, best first; ranks count from 1.

    Items of equal score keep the order in which the rankings name them.

    Source: Cormack, Clarke & Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
    methods", SIGIR 2009; 60 is theirs.
    """
    scores: defaultdict[Item, float] = defaultdict(float)
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] += 1 / (constant + rank)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))
