"""The search for near-duplicates, over texts in memory or on disk alike: propose pairs, compare them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modular_star_encoder.dataset.near_duplicates.candidates import (
    MAX_ROWS,
    Candidates,
    bands,
    pairs_between,
    pairs_within,
)
from modular_star_encoder.dataset.near_duplicates.decision import NearPairs
from modular_star_encoder.dataset.near_duplicates.settings import DuplicateSettings
from modular_star_encoder.dataset.near_duplicates.verification import TextColumn, near_pairs


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
