"""Pairs worth comparing: those that share the key of a band.

Pairs are numbers, first · 2^32 + second, ascending and without repetition; first < second among the rows themselves.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_ROWS = 1 << 32
_SHIFT, _LOW = np.uint64(32), np.uint64(MAX_ROWS - 1)
_BANDS_AT_A_TIME = 8  # one cache line of keys


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pairs to be compared.

    Attributes:
        pairs: uint64 (pairs,): see the module.
        largest_bucket: The most rows that share a key.
        rows_over_limit: The most rows, over the bands, that lie beyond the limit of their bucket and so are compared
            with the limit's number of smallest ids only.
    """

    pairs: np.ndarray
    largest_bucket: int = 0
    rows_over_limit: int = 0


def pair_ends(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two numbers of each pair, int64."""
    return (pairs >> _SHIFT).astype(np.int64), (pairs & _LOW).astype(np.int64)


def bands(keys: Sequence[np.ndarray], rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the keys of one band after the other, uint64 (rows,), of chosen rows of an array that is split by rows.

    Args:
        keys: uint64 (some rows, bands) each; they may be mapped files, of which a few columns at a time are read.
        rows: int64: which rows of all, and in which order.
    """
    for start in range(0, keys[0].shape[1] if keys else 0, _BANDS_AT_A_TIME):
        block = np.concatenate([part[:, start : start + _BANDS_AT_A_TIME] for part in keys])[rows]
        for band in range(block.shape[1]):
            yield np.ascontiguousarray(block[:, band])


def pairs_within(keys_by_band: Iterable[np.ndarray], blank: np.ndarray, limit: int) -> Candidates:
    """Pairs of rows that share a key; each row with the `limit` first of its bucket.

    Args:
        keys_by_band: uint64 (rows,) for each band.
        blank: bool (rows,): rows that are compared with none.
        limit: How many rows of a bucket the others are compared with.
    """
    rows = np.flatnonzero(~blank)
    pairs, largest, most_over = np.empty(0, np.uint64), 0, 0
    for keys in keys_by_band:
        order = np.argsort(keys[rows], kind="stable")
        starts = _run_starts(keys[rows[order]])
        place = np.arange(len(order)) - starts
        most = int(place.max(initial=0))
        found = [pairs]
        for leader in range(min(limit, most)):
            later = np.flatnonzero(place > leader)
            found.append(_joined(rows[order[starts[later] + leader]], rows[order[later]]))
        pairs = np.unique(np.concatenate(found))
        largest = max(largest, most + 1 if len(rows) else 0)
        most_over = max(most_over, int(np.count_nonzero(place > limit)))
    return Candidates(pairs, largest, most_over)


def pairs_between(
    keys_by_band: Iterable[np.ndarray],
    blank: np.ndarray,
    other_keys_by_band: Iterable[np.ndarray],
    other_blank: np.ndarray,
    limit: int,
) -> np.ndarray:
    """Pairs (row, text of another set) that share a key, each row with the `limit` first texts of its bucket."""
    rows, others = np.flatnonzero(~blank), np.flatnonzero(~other_blank)
    pairs = np.empty(0, np.uint64)
    for keys, other_keys in zip(keys_by_band, other_keys_by_band, strict=True):
        order = np.argsort(other_keys[others], kind="stable")
        in_order = other_keys[others[order]]
        start, stop = (np.searchsorted(in_order, keys[rows], side) for side in ("left", "right"))
        found = [pairs]
        for leader in range(min(limit, int((stop - start).max(initial=0)))):
            within = np.flatnonzero(start + leader < stop)
            found.append(_joined(rows[within], others[order[start[within] + leader]]))
        pairs = np.unique(np.concatenate(found))
    return pairs


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first.astype(np.uint64) << _SHIFT) | second.astype(np.uint64)


def _run_starts(values: np.ndarray) -> np.ndarray:
    """For each of some sorted values, the place of the first that is equal."""
    starts = np.arange(len(values))
    starts[1:][values[1:] == values[:-1]] = 0
    return np.maximum.accumulate(starts)
