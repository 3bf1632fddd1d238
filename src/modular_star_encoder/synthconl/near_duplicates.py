"""Find near-duplicate texts: MinHash bands propose pairs, and the Jaccard similarity of each pair's shingles decides.

A pair is a uint64: the number of the first row in the upper 32 bits, the number of the second in the lower. Rows are
the distinct rows, numbered in the order of their ids, so that no result depends on the order of the input.
`near_duplicate_job` does the same with files, in bounded memory.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modular_star_encoder.synthconl.minhash import (
    DuplicateSettings,
    Fingerprints,
    StoredColumn,
    fingerprint,
    jaccard,
    shingle_sets,
)
from modular_star_encoder.utils.errors import UserError

KEPT, EQUAL, NEAR = "kept", "equal to another row", "near another row"
_KEPT, _EQUAL, _NEAR, _FIRST_SET = range(4)
_SHIFT, _LOW = np.uint64(32), np.uint64(2**32 - 1)
_BANDS_AT_A_TIME = 8  # one cache line of keys
_PAIRS_AT_A_TIME, _CHARACTERS_AT_A_TIME = 8192, 1 << 23  # of eight bytes each, once hashed


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Says which of n rows are kept, and why; rows are named by their position in the input."""

    kept: np.ndarray  # bool (n,)
    reasons: tuple[str, ...]  # the possible reasons; `reasons[reason[i]]` is the reason for row i
    reason: np.ndarray  # int64 (n,)
    clusters: np.ndarray  # int64 (n,): the row of smallest id in the cluster of row i, which is i if row i is alone
    # int64 (n,): the most similar row, or the number of the near text in another set; −1 if row i is kept
    nearest: np.ndarray
    similarity: np.ndarray  # float64 (n,): the Jaccard similarity to `nearest`; 0 if it is kept
    pairs: np.ndarray  # int64 (pairs, 2): near pairs of distinct rows, the smaller id first
    pair_similarities: np.ndarray  # float64 (pairs,)
    # For each cluster too large for one row: `cluster` (its row of smallest id), `rows` and `kept` (counts)
    giant_clusters: tuple[dict[str, int], ...] = ()
    compared: int = 0  # number of pairs compared
    largest_bucket: int = 0  # the most distinct rows that share a band
    rows_over_limit: int = 0  # the most rows in one band that were compared with only a part of their bucket

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows for each of `reasons`, as {reason: number}."""
        return dict(zip(self.reasons, np.bincount(self.reason, minlength=len(self.reasons)).tolist(), strict=True))

    @property
    def cluster_sizes(self) -> np.ndarray:
        """The sizes of all clusters with two or more rows, largest first."""
        sizes = np.unique(self.clusters, return_counts=True)[1]
        return np.sort(sizes[sizes > 1])[::-1]


def find_near_duplicates(
    columns: Mapping[str, Sequence[str | None]],
    *,
    ids: Sequence[str] | Sequence[int] | None = None,
    against: Mapping[str, Iterable[str | None]] | None = None,
    settings: DuplicateSettings | None = None,
) -> NearDuplicates:
    """Find the near-duplicates among rows with a text in each of `columns`; None and blank texts are near no text.

    Which rows are kept depends on their texts and ids alone, not on their order.

    Args:
        columns, ids: Both have one entry per row. Of near-duplicates, the row with the smallest id is kept; the ids
            are by default the positions of the rows.
        against: Texts of other sets, by the name of the set. A row that is near one of these texts in any column is
            dropped. Whole texts are compared: a long text that contains a short one is not near it.
    """
    settings = settings or DuplicateSettings()
    ids = range(max(map(len, columns.values()), default=0)) if ids is None else ids
    lengths = {len(one) for one in (*columns.values(), ids)}
    if not columns or len(lengths) > 1:
        message = f"`columns` must not be empty; all columns and `ids` must be equally long, not {sorted(lengths)}."
        raise UserError("synthconl.near_duplicates.columns", message)
    if len(set(ids)) < len(ids):
        raise UserError("synthconl.near_duplicates.ids", "`ids` must differ for all rows.")
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
    texts = [[text or "" for text in column] for column in columns.values()]
    prints = [fingerprint(column, settings.banding) for column in texts]
    rows = distinct_rows(np.stack([one.digests for one in prints], axis=1), order)
    other_sets = {name: [text or "" for text in others] for name, others in (against or {}).items()}
    others = [text for one in other_sets.values() for text in one]
    search = Search(
        [Column([column], [one], rows.rows) for column, one in zip(texts, prints, strict=True)],
        Column([others], [fingerprint(others, settings.banding)], np.arange(len(others))),
        settings,
    )
    tasks, counts = search.candidates()
    within, between = (
        NearPairs.merged([search.compare(kind, *task) for task in enumerate(found)]) for kind, found in tasks.items()
    )
    return decide(rows, within, between, {name: len(one) for name, one in other_sets.items()}, settings, **counts)


@dataclass(frozen=True, slots=True)
class DistinctRows:
    """The m distinct rows among n rows, of which some may be equal."""

    rows: np.ndarray  # int64 (m,): the row of smallest id among equal rows
    numbers: np.ndarray  # int64 (n,): for each row, the number of the distinct row that it equals


def distinct_rows(digests: np.ndarray, order: np.ndarray) -> DistinctRows:
    """Find the distinct rows by digests of their texts; rows that are blank in every column are never equal.

    `digests`, uint64 (n, columns, 2), has `Fingerprints.digests` of each column; `order`, int64 (n,), lists rows by id.
    """
    count = len(order)
    by_id = digests.reshape(count, 2 * digests.shape[1])[order]
    sorting = np.lexsort(by_id.T)  # stable: equal rows stay in the order of their ids
    in_order = by_id[sorting]
    starts = ~in_order.any(axis=1)
    starts[:1] = True
    starts[1:] |= (in_order[1:] != in_order[:-1]).any(axis=1)
    first = sorting[starts]
    number_of_group = np.empty(len(first), np.int64)
    number_of_group[np.argsort(first)] = np.arange(len(first))
    numbers = np.empty(count, np.int64)
    numbers[order[sorting]] = number_of_group[np.cumsum(starts) - 1]
    return DistinctRows(order[np.sort(first)], numbers)


@dataclass(frozen=True, slots=True)
class NearPairs:
    """Pairs of rows whose similarity reaches the threshold of near-duplicates, and their similarities."""

    pairs: np.ndarray  # uint64 (pairs,), ascending
    similarities: np.ndarray  # float64 (pairs,): true Jaccard similarities

    @classmethod
    def merged(cls, parts: list["NearPairs"]) -> "NearPairs":
        """Return the pairs of all `parts` without repetition; a repeated pair gets its largest similarity."""
        pairs = np.concatenate([part.pairs for part in parts])
        values = np.concatenate([part.similarities for part in parts])
        sorting = np.lexsort((-values, pairs))
        pairs, first = np.unique(pairs[sorting], return_index=True)
        return cls(pairs, values[sorting][first])


def pair_ends(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack pairs of row numbers from uint64 into two int64 arrays: their first rows, and their second rows."""
    return (pairs >> _SHIFT).astype(np.int64), (pairs & _LOW).astype(np.int64)


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first.astype(np.uint64) << _SHIFT) | second.astype(np.uint64)


class Column:
    """One column's texts and fingerprints in the distinct `rows`, int64 (m,), from one or more lists or files."""

    def __init__(
        self, texts: Sequence[list[str] | StoredColumn], prints: Sequence[Fingerprints], rows: np.ndarray
    ) -> None:
        self._texts, self._rows = texts, rows
        self._keys = [one.keys for one in prints]
        self._starts = np.cumsum([0, *(len(one.digests) for one in prints)])
        self.digests = np.concatenate([one.digests for one in prints])[rows]
        self.lengths = np.concatenate([one.lengths for one in prints])[rows]

    def texts(self, numbers: np.ndarray) -> list[str]:
        rows = self._rows[numbers]
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[parts]
        return [self._texts[part][place] for part, place in zip(parts.tolist(), places.tolist(), strict=True)]

    def not_blank(self) -> np.ndarray:
        """Return the numbers of the distinct rows whose text in this column is not blank."""
        return np.flatnonzero(self.digests.any(axis=1))

    def bands(self) -> Iterator[np.ndarray]:
        """Yield for each band the keys of the m distinct rows, uint64 (m,); files are read a few bands at a time."""
        for start in range(0, self._keys[0].shape[1], _BANDS_AT_A_TIME):
            block = np.concatenate([part[:, start : start + _BANDS_AT_A_TIME] for part in self._keys])[self._rows]
            for band in range(block.shape[1]):
                yield np.ascontiguousarray(block[:, band])


def _candidates(column: Column, others: Column, limit: int) -> tuple[np.ndarray, int, int]:
    """Return pairs (row, other row) with an equal band key: each row with the first `limit` other rows of its bucket.

    If `others` is `column`, the pairs are (earlier row, row). Also return the size of the largest bucket, and how many
    rows of a band, at most, have more than `limit` others in their bucket.
    """
    rows, other_rows, within = column.not_blank(), others.not_blank(), column is others
    pairs, largest, most_over = np.empty(0, np.uint64), 0, 0
    other_bands = None if within else others.bands()
    for keys in column.bands():
        other_keys = keys if other_bands is None else next(other_bands)
        in_order = other_rows[np.argsort(other_keys[other_rows], kind="stable")]
        rows = in_order if within else rows
        first = np.searchsorted(other_keys[in_order], keys[rows])  # where the bucket of each row begins
        end = np.arange(len(rows)) if within else np.searchsorted(other_keys[in_order], keys[rows], "right")
        counts = end - first
        found = [pairs]
        for leader in range(min(limit, int(counts.max(initial=0)))):
            paired = np.flatnonzero(counts > leader)
            ends = rows[paired], in_order[first[paired] + leader]
            found.append(_joined(*(reversed(ends) if within else ends)))
        pairs = np.unique(np.concatenate(found))
        largest = max(largest, int(counts.max(initial=-1)) + 1)
        most_over = max(most_over, int(np.count_nonzero(counts > limit)))
    return pairs, largest, most_over


def _similarities(pairs: np.ndarray, first: Column, second: Column) -> np.ndarray:
    """Return each pair's Jaccard similarity, float64 (pairs,); 1 for equal texts, also for two blank texts."""
    left, right = pair_ends(pairs)
    result = (first.digests[left] == second.digests[right]).all(axis=1).astype(np.float64)
    unequal = np.flatnonzero(result == 0)
    left, right = left[unequal], right[unequal]
    total = np.cumsum(first.lengths[left] + second.lengths[right])
    start = 0
    while start < len(total):
        before = total[start - 1] if start else 0
        stop = int(np.searchsorted(total, before + _CHARACTERS_AT_A_TIME, side="right"))
        chunk = slice(start, start := max(start + 1, min(stop, start + _PAIRS_AT_A_TIME)))
        if first is second:
            left_sets = right_sets = _shingle_sets(np.concatenate((left[chunk], right[chunk])), first)
        else:
            left_sets, right_sets = _shingle_sets(left[chunk], first), _shingle_sets(right[chunk], second)
        result[unequal[chunk]] = [
            jaccard(left_sets[one], right_sets[other])
            for one, other in zip(left[chunk].tolist(), right[chunk].tolist(), strict=True)
        ]
    return result


def _shingle_sets(numbers: np.ndarray, column: Column) -> dict[int, np.ndarray]:
    wanted = np.unique(numbers)
    return dict(zip(wanted.tolist(), shingle_sets(column.texts(wanted)), strict=True))


@dataclass(frozen=True, slots=True)
class Search:
    """Searches for near pairs among rows ("within") and between rows and texts of other sets ("between").

    A task is the list of pairs to compare in one column; if `match` is "both", all columns "within" are one task.
    """

    columns: Sequence[Column]
    others: Column
    settings: DuplicateSettings

    def candidates(self) -> tuple[dict[str, list[np.ndarray]], dict[str, int]]:
        """Return pairs to compare, uint64, as {"within" or "between": an array per task}, and counts of the search."""
        limit = self.settings.bucket_limit
        found = [_candidates(one, one, limit) for one in self.columns]
        within = [pairs for pairs, _, _ in found]
        if self.settings.match == "both":
            within = [np.unique(np.concatenate(within))]
        between = [_candidates(one, self.others, limit)[0] for one in self.columns]
        return {"within": within, "between": between}, {
            "compared": sum(map(len, within)),
            "largest_bucket": max(largest for _, largest, _ in found),
            "rows_over_limit": max(over for _, _, over in found),
        }

    def compare(self, kind: str, task: int, pairs: np.ndarray) -> NearPairs:
        """Return the `pairs` of a task that reach the threshold; `kind` is "within" or "between", `task` its number."""
        every = kind == "within" and self.settings.match == "both"
        smallest = np.ones(len(pairs))
        for column in self.columns if every else self.columns[task : task + 1]:
            other = self.others if kind == "between" else column
            smallest = np.minimum(smallest, _similarities(pairs, column, other))
            near = smallest >= self.settings.threshold
            pairs, smallest = pairs[near], smallest[near]
        return NearPairs(pairs, smallest)


def decide(
    rows: DistinctRows,
    near: NearPairs,
    near_others: NearPairs,
    other_sets: dict[str, int],
    settings: DuplicateSettings,
    **counts: int,
) -> NearDuplicates:
    """Decide which rows are kept, given the near pairs of distinct rows.

    1. Rows near a text of another set are dropped. They belong to no cluster.
    2. Clusters are the connected components of the remaining rows, over near pairs and equality.
    3. Each cluster keeps its row of smallest id. A cluster of more than `settings.giant_cluster` distinct rows drops
       only rows equal or near to a kept one; rows are taken in the order of their ids.

    Args:
        near, near_others: Pairs of distinct rows; pairs (distinct row, text), with texts numbered through all sets.
        other_sets: The number of texts of each other set, in order.
        counts: Counts of the search, passed on to the result.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(rows.rows)
    reason = np.full(count, _KEPT)
    found, texts = pair_ends(near_others.pairs)
    nearest, similarity = _most_similar(count, found, texts, near_others.similarities)
    starts = np.cumsum([0, *other_sets.values()])
    set_of = np.searchsorted(starts, nearest[found], side="right") - 1
    reason[found] = _FIRST_SET + set_of
    nearest[found] -= starts[set_of]

    first, second = pair_ends(near.pairs)
    clean = (reason[first] == _KEPT) & (reason[second] == _KEPT)
    first, second, values = first[clean], second[clean], near.similarities[clean]
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    clusters = np.unique(labels, return_index=True)[1][labels]  # of each row, the smallest row of its component
    sizes = np.bincount(clusters, minlength=count)
    is_giant = sizes[clusters] > settings.giant_cluster
    kept = (clusters == np.arange(count)) | is_giant
    # Pairs ascend, so it is known whether `one` is kept before its pairs with later rows come.
    inside = np.flatnonzero(is_giant[first])
    for one, other in zip(first[inside].tolist(), second[inside].tolist(), strict=True):
        if kept[one]:
            kept[other] = False
    dropped = ~kept
    both_ways = np.concatenate((first, second)), np.concatenate((second, first)), np.concatenate((values, values))
    most_similar, its_similarity = _most_similar(count, *both_ways)
    reason[dropped] = _NEAR
    nearest[dropped], similarity[dropped] = rows.rows[most_similar[dropped]], its_similarity[dropped]

    # From the distinct rows to all rows: the copies of a row are equal to it, unless it is near another set.
    number = rows.numbers
    copies = np.ones(len(number), bool)
    copies[rows.rows] = False
    copies &= reason[number] < _FIRST_SET
    reasons = np.where(copies, _EQUAL, reason[number])
    row_clusters = rows.rows[clusters][number]
    alone = np.flatnonzero(reasons >= _FIRST_SET)
    row_clusters[alone] = alone
    giants = []
    for row in rows.rows[sizes > settings.giant_cluster].tolist():
        members = reasons[row_clusters == row]
        giants.append({"cluster": row, "rows": len(members), "kept": int((members == _KEPT).sum())})
    if giants:
        size = settings.giant_cluster
        message = f"{len(giants)} clusters have more than {size} different rows; these drop only rows near a kept one."
        warnings.warn(message, stacklevel=2)
    return NearDuplicates(
        kept=reasons == _KEPT,
        reasons=(KEPT, EQUAL, NEAR, *(f"near a text of {name}" for name in other_sets)),
        reason=reasons,
        clusters=row_clusters,
        nearest=np.where(copies, rows.rows[number], nearest[number]),
        similarity=np.where(copies, 1.0, similarity[number]),
        pairs=np.stack((rows.rows[first], rows.rows[second]), axis=1),
        pair_similarities=values,
        giant_clusters=tuple(giants),
        **counts,
    )


def _most_similar(
    count: int, nodes: np.ndarray, partners: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each node its partner with the highest value (if equal, the smallest; −1 if none) and this value."""
    partner, similarity = np.full(count, -1), np.zeros(count)
    sorting = np.lexsort((-partners, values, nodes))  # of several assignments to one place, the last one applies
    partner[nodes[sorting]], similarity[nodes[sorting]] = partners[sorting], values[sorting]
    return partner, similarity
