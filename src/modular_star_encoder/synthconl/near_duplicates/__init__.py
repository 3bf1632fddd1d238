"""Near-duplicates of texts: MinHash bands propose pairs, the true Jaccard similarity of their shingles decides.

- `find_near_duplicates`: columns of texts in memory.
- `job.drop_near_duplicates`: parquet files, in bounded memory, restartable; `job.datatrove_steps` for many machines.

The unit is the row throughout: counts are of rows, and a cluster is a set of rows.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from modular_star_encoder.synthconl.near_duplicates.clusters import (
    Column,
    NearDuplicates,
    NearPairs,
    Search,
    decide,
    distinct_rows,
)
from modular_star_encoder.synthconl.near_duplicates.minhash import DuplicateSettings, fingerprint
from modular_star_encoder.utils.errors import UserError


def find_near_duplicates(
    columns: Mapping[str, Sequence[str | None]],
    *,
    ids: Sequence[str] | Sequence[int] | None = None,
    against: Mapping[str, Iterable[str | None]] | None = None,
    settings: DuplicateSettings | None = None,
) -> NearDuplicates:
    """Find the near-duplicates among rows of one or several texts each.

    Which rows are kept depends on their texts and ids alone, not on their order.

    Args:
        columns: The texts of each column, all of the same length; None and blank texts resemble nothing.
        ids: The order of rows; of near-duplicates, the smallest id stays. By default, the position.
        against: Texts of other sets by the name of the set: rows with a text near one of them, in any of `columns`, are
            dropped too. Whole texts are compared: one that contains another among much else is not near it.
        settings: What counts as a near-duplicate; by default, `DuplicateSettings()`.

    Raises:
        UserError: `synthconl.near_duplicates.columns`: no column, or columns and ids of different lengths;
            `synthconl.near_duplicates.ids`: ids repeat.
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
        [Column([column], [one], rows.rows) for column, one in zip(texts, prints, strict=True)],
        Column([others], [fingerprint(others, settings.banding)], np.arange(len(others))),
        settings,
    )
    tasks, counts = search.candidates()
    within, between = (
        NearPairs.merged([search.compare(kind, *task) for task in enumerate(tasks[kind])])
        for kind in ("within", "between")
    )
    return decide(
        rows,
        within,
        between,
        {name: len(one) for name, one in other_sets.items()},
        settings,
        **counts,
    )


def _order(columns: Mapping[str, Sequence[str | None]], ids: Sequence[str] | Sequence[int] | None) -> np.ndarray:
    """The rows by ascending id."""
    lengths = {name: len(column) for name, column in columns.items()} | ({} if ids is None else {"ids": len(ids)})
    if not columns or len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} {length}" for name, length in lengths.items())
        message = f"columns must be one or more, all and ids of the same length, not {given or 'none'}."
        raise UserError("synthconl.near_duplicates.columns", message)
    count = next(iter(lengths.values()))
    if ids is None:
        return np.arange(count)
    if len(set(ids)) < count:
        raise UserError("synthconl.near_duplicates.ids", "ids must be different for all rows.")
    return np.array(sorted(range(count), key=ids.__getitem__), np.int64)
