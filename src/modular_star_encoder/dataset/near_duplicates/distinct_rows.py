"""Rows that are equal in every column made one, in the order of their ids: what is searched for near-duplicates."""

from dataclasses import dataclass

import numpy as np


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
