"""The search for near-duplicates, over texts in memory or on disk alike: propose pairs, compare them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from modular_star_encoder.synthconl.near_duplicates.fingerprints import (
    DuplicateSettings,
    jaccard,
    shingle_sets,
)


@dataclass(frozen=True, slots=True)
class NearPairs:
    """Verified pairs; see `candidates` for how a pair is written.

    Attributes:
        pairs: uint64 (pairs,), ascending.
        similarities: float64 (pairs,): true Jaccard similarities.
    """

    pairs: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    similarities: np.ndarray = field(default_factory=lambda: np.empty(0))

    @classmethod
    def merged(cls, parts: list["NearPairs"]) -> "NearPairs":
        """All pairs of `parts`, each once, with the largest of its similarities."""
        pairs = np.concatenate([part.pairs for part in parts] or [cls().pairs])
        values = np.concatenate([part.similarities for part in parts] or [cls().similarities])
        sorting = np.lexsort((-values, pairs))
        pairs, values = pairs[sorting], values[sorting]
        first = np.concatenate(([True], pairs[1:] != pairs[:-1])) if len(pairs) else np.empty(0, bool)
        return cls(pairs[first], values[first])


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


@dataclass(frozen=True, slots=True)
class SearchColumn:
    """One column of n rows, of which m are different.

    Attributes:
        keys: uint64 (some of the n rows, bands) each: the keys of all rows, in one array or several.
        rows: int64 (m,): the different rows.
        texts: The m texts.
    """

    keys: Sequence[np.ndarray]
    rows: np.ndarray
    texts: TextColumn

    @property
    def blank(self) -> np.ndarray:
        """Which of the m texts are blank: bool (m,)."""
        return ~self.texts.digests.any(axis=1)


@dataclass(frozen=True, slots=True)
class Search:
    """A search in the columns of some rows, among themselves ("within") and against texts of other sets ("between").

    Within, a task is a list of pairs to be near in one column, or in all of them, as `settings.match` says; between, in
    one column.
    """

    columns: Sequence[SearchColumn]
    others: SearchColumn
    settings: DuplicateSettings

    def __post_init__(self) -> None:
        """Refuse more rows than a pair can name.

        Raises:
            ValueError: There are more than 2^32.
        """
        if any(len(one.rows) > MAX_ROWS for one in (*self.columns, self.others)):
            raise ValueError(f"More than {MAX_ROWS} rows can't be searched at once; divide them.")

    def candidates_within(self) -> tuple[list[np.ndarray], dict[str, int]]:
        """The pairs of each task, uint64, and figures of the search that `decision.decide` passes on."""
        limit = self.settings.bucket_limit
        found: list[Candidates] = [pairs_within(bands(one.keys, one.rows), one.blank, limit) for one in self.columns]
        tasks = [one.pairs for one in found]
        if self.settings.match == "both":
            tasks = [np.unique(np.concatenate(tasks))]
        return tasks, {
            "compared": sum(map(len, tasks)),
            "largest_bucket": max(one.largest_bucket for one in found),
            "rows_over_limit": max(one.rows_over_limit for one in found),
        }

    def candidates_between(self) -> list[np.ndarray]:
        """The pairs of each task, one task for each column."""
        others = self.others
        return [
            pairs_between(
                bands(one.keys, one.rows),
                one.blank,
                bands(others.keys, others.rows),
                others.blank,
                self.settings.bucket_limit,
            )
            for one in self.columns
        ]

    def compare_within(self, task: int, pairs: np.ndarray) -> NearPairs:
        """Those of a task's `pairs` that are near."""
        columns = self.columns if self.settings.match == "both" else self.columns[task : task + 1]
        ends = [(one.texts, one.texts) for one in columns]
        return NearPairs(*near_pairs(pairs, ends, self.settings.threshold))

    def compare_between(self, task: int, pairs: np.ndarray) -> NearPairs:
        """Those of a task's `pairs` that are near."""
        ends = [(self.columns[task].texts, self.others.texts)]
        return NearPairs(*near_pairs(pairs, ends, self.settings.threshold))
