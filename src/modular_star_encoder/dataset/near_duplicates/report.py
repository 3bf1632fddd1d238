"""What a job tells: figures for people and cards, and one line for every row that was dropped."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modular_star_encoder.dataset.near_duplicates.decision import EQUAL, KEPT, NEAR, NearDuplicates

_LARGEST_CLUSTERS, _ROWS_AT_A_TIME = 20, 8192


@dataclass(frozen=True, slots=True)
class DuplicateReport:
    """Figures of a finished job, in rows; the columns of `dropped.jsonl` are told by `write_dropped`.

    Attributes:
        rows: All rows.
        counts: What became of them: those kept, and those dropped, by reason.
        clusters: The number of clusters of at least two rows.
        largest_clusters: Their sizes, largest first, twenty at the most.
        giant_clusters: `"cluster"` (an id), `"rows"` and `"kept"` of those too large to be reduced to one row.
        pairs_compared: Candidate pairs whose true similarity was computed.
        near_pairs: Those at or above the threshold.
        largest_bucket: The most different rows that share a band.
        rows_over_limit: The most rows, over the bands, that were compared with a part of their bucket only.
    """

    rows: int
    counts: dict[str, int]
    clusters: int
    largest_clusters: list[int]
    giant_clusters: list[dict[str, Any]]
    pairs_compared: int
    near_pairs: int
    largest_bucket: int
    rows_over_limit: int

    @property
    def kept(self) -> int:
        """The number of rows kept."""
        return self.counts[KEPT]

    @classmethod
    def of(cls, result: NearDuplicates, ids: pa.ChunkedArray) -> "DuplicateReport":
        """The report of a result; `ids` are those of all rows."""
        sizes = result.cluster_sizes
        return cls(
            rows=len(result.kept),
            counts=result.counts,
            clusters=len(sizes),
            largest_clusters=sizes[:_LARGEST_CLUSTERS].tolist(),
            giant_clusters=[
                {"cluster": ids[one.cluster].as_py(), "rows": one.rows, "kept": one.kept}
                for one in result.giant_clusters
            ],
            pairs_compared=result.compared,
            near_pairs=len(result.pairs),
            largest_bucket=result.largest_bucket,
            rows_over_limit=result.rows_over_limit,
        )

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> "DuplicateReport":
        """The report that a JSON file holds, beside other things."""
        return cls(**{name: written[name] for name in cls.__dataclass_fields__})


def write_dropped(
    path: Path, ids: pa.ChunkedArray, reasons: tuple[str, ...], figures: Mapping[str, np.ndarray]
) -> None:
    """Write a JSON line for each dropped row, in the order of rows.

    Its keys: `id`, `reason`, `cluster` (the smallest id in it), `nearest` (the id of the most similar row, or the
    0-based number of the text of the set that it is near) and `similarity`.
    """
    dropped = np.flatnonzero(~figures["kept"])
    among_rows = np.isin(np.array(reasons), (EQUAL, NEAR))
    with path.open("w", encoding="utf-8") as output:
        for start in range(0, len(dropped), _ROWS_AT_A_TIME):
            rows = dropped[start : start + _ROWS_AT_A_TIME]
            reason, nearest = figures["reason"][rows], figures["nearest"][rows].copy()
            is_row = among_rows[reason]
            shown = ids.take(pa.array(np.where(is_row, nearest, 0))).to_pylist()
            columns = (
                ids.take(pa.array(rows)).to_pylist(),
                [reasons[one] for one in reason.tolist()],
                ids.take(pa.array(figures["clusters"][rows])).to_pylist(),
                [name if row else number for name, row, number in zip(shown, is_row, nearest.tolist(), strict=True)],
                figures["similarity"][rows].tolist(),
            )
            for values in zip(*columns, strict=True):
                line = dict(zip(("id", "reason", "cluster", "nearest", "similarity"), values, strict=True))
                output.write(json.dumps(line, ensure_ascii=False) + "\n")
