"""From verified pairs to clusters, and from clusters to the rows that are kept."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modular_star_encoder.synthconl.near_duplicates.candidates import (
    NearPairs,
    Search,
    SearchColumn,
    TextColumn,
    pair_ends,
)
from modular_star_encoder.synthconl.near_duplicates.fingerprints import DuplicateSettings, Fingerprints, fingerprint


@dataclass(frozen=True, slots=True)
class DistinctRows:
    """m different rows among n. They are numbered in the order of ids, so that results don't depend on that of rows.

    Attributes:
        rows: int64 (m,): the row of smallest id among those that are equal.
        numbers: int64 (n,): for each row, the number of the different row that it equals.
    """

    rows: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def distinct_rows(digests: np.ndarray, order: np.ndarray) -> DistinctRows:
    """Find equal rows. Rows that are blank in every column are all different: nothing shows that they are the same.

    Args:
        digests: uint64 (n, columns, 2): `Fingerprints.digests` of each column.
        order: int64 (n,): the rows, by ascending id.
    """
    count = len(order)
    if not count:
        return DistinctRows(np.empty(0, np.int64), np.empty(0, np.int64))
    by_id = digests.reshape(count, -1)[order]
    # Stable: equal rows stay in the order of their ids.
    sorting = np.lexsort(by_id.T)
    in_order = by_id[sorting]
    starts = np.concatenate(([True], (in_order[1:] != in_order[:-1]).any(axis=1))) | ~in_order.any(axis=1)
    group = np.cumsum(starts) - 1
    first = sorting[starts]
    number_of_group = np.empty(len(first), np.int64)
    number_of_group[np.argsort(first)] = np.arange(len(first))
    numbers = np.empty(count, np.int64)
    numbers[order[sorting]] = number_of_group[group]
    return DistinctRows(order[np.sort(first)], numbers)


KEPT, EQUAL, NEAR = "kept", "equal to another row", "near another row"
_KEPT, _EQUAL, _NEAR, _FIRST_SET = range(4)


@dataclass(frozen=True, slots=True)
class GiantCluster:
    """A cluster of too many different rows for all but one to be dropped: its id (a row), its rows and those kept."""

    cluster: int
    rows: int
    kept: int


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """What is kept of n rows and why; rows are named by their number in the order in which they were given.

    Attributes:
        kept: bool (n,).
        reasons: The names of what can become of a row; `reasons[reason[i]]` is what became of row i.
        reason: int64 (n,).
        clusters: int64 (n,): the row of smallest id in the cluster of row i, which is i for a row alone.
        nearest: int64 (n,): for a dropped row, the row that is most similar among those verified, or the number of the
            text of the set that it is near; −1 for rows that are kept.
        similarity: float64 (n,): the Jaccard similarity to `nearest`; 0 for rows that are kept.
        pairs: int64 (pairs, 2): the verified pairs of different rows, of smaller id first. Equal rows have none: they
            share the pairs of the one of smallest id.
        pair_similarities: float64 (pairs,).
        giant_clusters: Those that were not reduced to one row.
        compared: How many pairs were compared to find these.
        largest_bucket: The most different rows that share a band.
        rows_over_limit: The most rows, over the bands, that were compared with a part of their bucket only.
    """

    kept: np.ndarray
    reasons: tuple[str, ...]
    reason: np.ndarray
    clusters: np.ndarray
    nearest: np.ndarray
    similarity: np.ndarray
    pairs: np.ndarray
    pair_similarities: np.ndarray
    giant_clusters: tuple[GiantCluster, ...] = ()
    compared: int = 0
    largest_bucket: int = 0
    rows_over_limit: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many rows each of `reasons` applies to."""
        return dict(zip(self.reasons, np.bincount(self.reason, minlength=len(self.reasons)).tolist(), strict=True))

    @property
    def cluster_sizes(self) -> np.ndarray:
        """The number of rows of each cluster of at least two, largest first."""
        sizes = np.unique(self.clusters, return_counts=True)[1]
        return np.sort(sizes[sizes > 1])[::-1]


def near_set(name: str) -> str:
    """The reason of rows that are near a text of another set."""
    return f"near a text of {name}"


def decide(
    rows: DistinctRows,
    near: NearPairs,
    near_others: NearPairs,
    other_sets: dict[str, int],
    settings: DuplicateSettings,
    **report: int,
) -> NearDuplicates:
    """Choose what is kept.

    1. Rows near a text of another set are dropped. They belong to no cluster.
    2. Clusters are the connected components of the rows that remain, over verified pairs and equality.
    3. Of each, the row of smallest id is kept. In a cluster of more than `settings.giant_cluster` different rows, a row
       is dropped only if it is equal or near to one that is kept; rows are taken in the order of their ids.

    Args:
        rows: The different rows.
        near: Pairs of different rows.
        near_others: Pairs (different row, text of another set); texts are numbered through all sets.
        other_sets: The number of texts of each other set, in order.
        settings: What counts as a near-duplicate.
        report: Figures of the search, passed on.
    """
    count = len(rows)
    reason = np.full(count, _KEPT)
    nearest, similarity = np.full(count, -1), np.zeros(count)
    found, texts = pair_ends(near_others.pairs)
    _set_most_similar(nearest, similarity, found, texts, near_others.similarities)
    starts = np.cumsum([0, *other_sets.values()])
    set_of = np.searchsorted(starts, nearest[found], side="right") - 1
    reason[found] = _FIRST_SET + set_of
    nearest[found] -= starts[set_of]

    first, second = pair_ends(near.pairs)
    clean = (reason[first] == _KEPT) & (reason[second] == _KEPT)
    first, second, values = first[clean], second[clean], near.similarities[clean]
    clusters = _components(count, first, second)
    kept, giants = _kept(clusters, first, second, settings.giant_cluster)
    most_similar, its_similarity = np.full(count, -1), np.zeros(count)
    _set_most_similar(
        most_similar,
        its_similarity,
        np.concatenate((first, second)),
        np.concatenate((second, first)),
        np.concatenate((values, values)),
    )
    dropped = ~kept
    reason[dropped] = _NEAR
    nearest[dropped], similarity[dropped] = rows.rows[most_similar[dropped]], its_similarity[dropped]
    if giants:
        _warn(giants, settings)
    by_row = _by_row(rows, reason, clusters, nearest, similarity)
    return NearDuplicates(
        **by_row,
        reasons=(KEPT, EQUAL, NEAR, *map(near_set, other_sets)),
        pairs=np.stack((rows.rows[first], rows.rows[second]), axis=1),
        pair_similarities=values,
        giant_clusters=_counted_in_rows(giants, by_row["clusters"], by_row["kept"], rows),
        **report,
    )


def _by_row(
    rows: DistinctRows, reason: np.ndarray, clusters: np.ndarray, nearest: np.ndarray, similarity: np.ndarray
) -> dict[str, np.ndarray]:
    """What became of the different rows, said of all rows."""
    number = rows.numbers
    copies = np.ones(len(number), bool)
    copies[rows.rows] = False
    copies &= reason[number] < _FIRST_SET
    by_row = {
        "reason": np.where(copies, _EQUAL, reason[number]),
        "clusters": rows.rows[clusters][number],
        "nearest": np.where(copies, rows.rows[number], nearest[number]),
        "similarity": np.where(copies, 1.0, similarity[number]),
    }
    # Equal rows near another set are each dropped on their own account.
    alone = by_row["reason"] >= _FIRST_SET
    by_row["clusters"][alone] = np.flatnonzero(alone)
    return {"kept": by_row["reason"] == _KEPT, **by_row}


def _components(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """For each of `count` nodes the smallest node of its connected component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    return np.unique(labels, return_index=True)[1][labels]


def _kept(
    clusters: np.ndarray, first: np.ndarray, second: np.ndarray, giant_cluster: int
) -> tuple[np.ndarray, list[int]]:
    """Which nodes are kept, and the giant clusters."""
    sizes = np.bincount(clusters, minlength=len(clusters))
    is_giant = sizes[clusters] > giant_cluster
    kept = (clusters == np.arange(len(clusters))) | is_giant
    # Pairs ascend, so whether `one` is kept is settled before its pairs with later nodes come.
    inside = np.flatnonzero(is_giant[first])
    for one, other in zip(first[inside].tolist(), second[inside].tolist(), strict=True):
        if kept[one]:
            kept[other] = False
    return kept, np.flatnonzero(sizes > giant_cluster).tolist()


def _set_most_similar(
    partner: np.ndarray, similarity: np.ndarray, nodes: np.ndarray, partners: np.ndarray, values: np.ndarray
) -> None:
    """For each of `nodes`, note the partner of the highest value; of equal ones the smallest."""
    sorting = np.lexsort((-partners, values, nodes))  # of several assignments to one place, the last one counts
    partner[nodes[sorting]], similarity[nodes[sorting]] = partners[sorting], values[sorting]


def _warn(giants: list[int], settings: DuplicateSettings) -> None:
    warnings.warn(
        f"{len(giants)} clusters have more than {settings.giant_cluster} different rows. In them, only rows near a row "
        "that is kept are dropped.",
        stacklevel=3,
    )


def _counted_in_rows(
    giants: list[int], clusters: np.ndarray, kept: np.ndarray, rows: DistinctRows
) -> tuple[GiantCluster, ...]:
    members = [clusters == rows.rows[giant] for giant in giants]
    return tuple(
        GiantCluster(int(rows.rows[giant]), int(inside.sum()), int(kept[inside].sum()))
        for giant, inside in zip(giants, members, strict=True)
    )


def find_near_duplicates(
    columns: Mapping[str, Sequence[str | None]],
    *,
    ids: Sequence[str] | Sequence[int] | None = None,
    against: Mapping[str, Iterable[str]] | None = None,
    settings: DuplicateSettings | None = None,
) -> NearDuplicates:
    """Find the near-duplicates among rows of one or several texts each.

    Which rows are kept depends on their texts and ids alone, not on their order.

    Args:
        columns: The texts of each column, all of the same length; None and blank texts resemble nothing.
        ids: What orders the rows; of near-duplicates, the smallest stays. By default, their place.
        against: Texts of other sets by the name of the set: rows with a text near one of them, in any of `columns`, are
            dropped too. Whole texts are compared: one that holds another among much else is not near it.
        settings: What counts as a near-duplicate; by default, `DuplicateSettings()`.

    Raises:
        ValueError: There is no column, they differ in length, or ids repeat.
        ImportError: rensa isn't installed.
    """
    settings = settings or DuplicateSettings()
    order = _order(columns, ids)
    texts = [[text or "" for text in column] for column in columns.values()]
    prints = [fingerprint(column, settings.banding) for column in texts]
    rows = distinct_rows(np.stack([one.digests for one in prints], axis=1), order)
    other_sets = {name: [text or "" for text in others] for name, others in (against or {}).items()}
    others = [text for one in other_sets.values() for text in one]
    search = Search(
        [_search_column(column, one, rows.rows) for column, one in zip(texts, prints, strict=True)],
        _search_column(others, fingerprint(others, settings.banding), np.arange(len(others))),
        settings,
    )
    within, report = search.candidates_within()
    return decide(
        rows,
        NearPairs.merged([search.compare_within(*task) for task in enumerate(within)]),
        NearPairs.merged([search.compare_between(*task) for task in enumerate(search.candidates_between())]),
        {name: len(one) for name, one in other_sets.items()},
        settings,
        **report,
    )


def _order(columns: Mapping[str, Sequence[str | None]], ids: Sequence[str] | Sequence[int] | None) -> np.ndarray:
    """The rows by ascending id."""
    if not columns:
        raise ValueError("columns must hold at least one column of texts.")
    lengths = {name: len(column) for name, column in columns.items()} | ({} if ids is None else {"ids": len(ids)})
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"All columns and ids must have the same length, not {told}.")
    count = next(iter(lengths.values()))
    if ids is None:
        return np.arange(count)
    if len(set(ids)) < count:
        raise ValueError("ids must be different for all rows.")
    return np.array(sorted(range(count), key=ids.__getitem__), np.int64)


def _search_column(texts: Sequence[str], prints: Fingerprints, rows: np.ndarray) -> SearchColumn:
    def lookup(numbers: np.ndarray) -> list[str]:
        return [texts[row] for row in rows[numbers].tolist()]

    return SearchColumn([prints.keys], rows, TextColumn(lookup, prints.digests[rows], prints.lengths[rows]))
