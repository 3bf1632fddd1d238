"""The true Jaccard similarity of candidate pairs, in bounded memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from modular_star_encoder.dataset.near_duplicates.candidates import pair_ends
from modular_star_encoder.dataset.near_duplicates.shingles import jaccard, shingle_sets

_PAIRS_AT_A_TIME, _CHARACTERS_AT_A_TIME = 8192, 1 << 23  # of eight bytes each, once hashed


@dataclass(frozen=True, slots=True)
class TextColumn:
    """Texts that can be asked for by number.

    Attributes:
        lookup: Returns the texts of the numbers that it is given.
        digests: uint64 (texts, 2): equal for equal texts, zero for blank ones.
        lengths: int64 (texts,): an upper bound of the characters of each.
    """

    lookup: Callable[[np.ndarray], list[str]]
    digests: np.ndarray
    lengths: np.ndarray


def similarities(pairs: np.ndarray, first: TextColumn, second: TextColumn) -> np.ndarray:
    """Jaccard similarities, float64 (pairs,), of the texts that `pairs` names in the two columns.

    Equal texts have similarity 1, blank ones too.
    """
    left, right = pair_ends(pairs)
    result = (first.digests[left] == second.digests[right]).all(axis=1).astype(np.float64)
    unequal = np.flatnonzero(result == 0)
    left, right = left[unequal], right[unequal]
    for chunk in _chunks(first.lengths[left] + second.lengths[right]):
        if first is second:
            sets = _numbered_sets(np.concatenate((left[chunk], right[chunk])), first)
            left_sets = right_sets = sets
        else:
            left_sets, right_sets = _numbered_sets(left[chunk], first), _numbered_sets(right[chunk], second)
        result[unequal[chunk]] = [
            jaccard(left_sets[one], right_sets[other])
            for one, other in zip(left[chunk].tolist(), right[chunk].tolist(), strict=True)
        ]
    return result


def near_pairs(
    pairs: np.ndarray, columns: list[tuple[TextColumn, TextColumn]], threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs whose similarity is at least `threshold` in each of `columns`, and the smallest of these."""
    smallest = np.ones(len(pairs))
    for first, second in columns:
        smallest = np.minimum(smallest, similarities(pairs, first, second))
        near = smallest >= threshold
        pairs, smallest = pairs[near], smallest[near]
    return pairs, smallest


def _numbered_sets(numbers: np.ndarray, column: TextColumn) -> dict[int, np.ndarray]:
    wanted = np.unique(numbers)
    return dict(zip(wanted.tolist(), shingle_sets(column.lookup(wanted)), strict=True))


def _chunks(characters: np.ndarray) -> Iterator[slice]:
    """Cut pairs into slices bounded by their number and, but for a single pair, the characters of their texts."""
    total = np.cumsum(characters)
    start = 0
    while start < len(total):
        before = total[start - 1] if start else 0
        stop = int(np.searchsorted(total, before + _CHARACTERS_AT_A_TIME, side="right"))
        stop = max(start + 1, min(stop, start + _PAIRS_AT_A_TIME))
        yield slice(start, stop)
        start = stop
