"""Near-duplicates of texts in memory."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from modular_star_encoder.dataset.near_duplicates.decision import NearDuplicates, NearPairs, decide
from modular_star_encoder.dataset.near_duplicates.distinct_rows import distinct_rows
from modular_star_encoder.dataset.near_duplicates.fingerprints import Fingerprints, fingerprint
from modular_star_encoder.dataset.near_duplicates.search import Search, SearchColumn
from modular_star_encoder.dataset.near_duplicates.settings import DuplicateSettings
from modular_star_encoder.dataset.near_duplicates.verification import TextColumn


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
