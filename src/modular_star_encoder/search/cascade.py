"""When the deep exit of a cascade need not run: a margin fitted on an index, and kept beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.ranking import Cascade, Ranked
from modular_star_encoder.search.vector_store import MARGINS_NAME, Filter, Found
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_json


@dataclass(frozen=True, slots=True)
class FittedMargin:
    """A margin and what it gave on the queries that it was fitted on.

    Attributes:
        margin: the deep exit runs where the shallow margin is below; 0 if it never has to.
        share: of queries for which it ran.
        quality: mean over all queries of the ranking that was used.
        shallow_quality, deep_quality: the means of either alone.
        queries: their number.
    """

    margin: float
    share: float
    quality: float
    shallow_quality: float
    deep_quality: float
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def fit_margin(
    index: CodeIndex,
    cascade: Cascade,
    *,
    exit_layer: int | None = None,
    queries: int = 200,
    tolerance: float = 0.005,
    progress: bool = True,
) -> FittedMargin:
    """The margin below which the deep exit is worth running, for `Cascade.margin`.

    Descriptions of the index's own functions are the held-out questions: they aren't part of what is embedded, and the
    function that each describes is the right answer. Quality is the reciprocal rank among the candidates.

    Args:
        index: what will be asked.
        cascade: its exit and candidates; its margin doesn't count.
        exit_layer: as for `CodeIndex.search`.
        queries: how many descriptions, chosen by their ids: the same in every run.
        tolerance: mean reciprocal rank that may be lost.
        progress: whether to show a bar.

    Raises:
        ValueError: the index has no described function, or as `CodeIndex.ranker`.
    """
    ranker = index.ranker(exit_layer, replace(cascade, margin=None))
    asked = index.store.sample(queries)
    if not asked:
        raise UserError(
            "search.margin.descriptions",
            f"The index {index.store.location} has no function with a description to fit a margin on.",
        )
    embedded = ranker.embed([one.snippet.description for one in asked])
    margins, shallow, deep = [], [], []
    bar = tqdm(asked, desc="fitting", unit="question", disable=not progress, leave=False)
    for one, vectors in zip(bar, embedded, strict=True):
        first = ranker.first(vectors, cascade.candidates, Filter())
        margins.append(first.margin or 0.0)
        shallow.append(_reciprocal_rank(first, one))
        deep.append(_reciprocal_rank(ranker.again(first, vectors), one))
    return fit_threshold(margins, shallow, deep, tolerance=tolerance)


def fitted_margin(
    index: CodeIndex, cascade: Cascade, *, exit_layer: int | None = None, progress: bool = True
) -> FittedMargin:
    """The margin of a cascade on an index: fitted at the first call (`fit_margin`), then read.

    It is kept for an index in a folder here, until that is built anew; others are fitted every time.

    Raises:
        ValueError: as `fit_margin`; or the file that keeps margins is damaged.
        OSError: the file can't be written.
    """
    folder = getattr(index.store, "folder", None)
    path = None if folder is None else Path(folder) / MARGINS_NAME
    settings = index.settings
    first = settings.exit_layers[0] if exit_layer is None else exit_layer
    key = f"{settings.checksum} {settings.dimension} {first} {cascade.exit_layer} {cascade.candidates}"
    kept = {} if path is None or not path.exists() else _read(path)
    if key in kept:
        return FittedMargin(**kept[key])
    fitted = fit_margin(index, cascade, exit_layer=exit_layer, progress=progress)
    if path is not None:
        write_json(path, {**kept, key: fitted.to_dict()})
    return fitted


def threshold_curve(
    margins: Sequence[float], shallow: Sequence[float], deep: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every threshold on the margin would give.

    Args:
        margins: (Q,) how far the shallow exit's best leads.
        shallow, deep: (Q,) quality of each query's ranking by either, such as the reciprocal rank.

    Returns:
        Thresholds (T,), ascending from 0, to be compared by "margin < threshold"; the share of deep passes (T,); the
        mean quality (T,).

    Raises:
        ValueError: no query, or lists of different lengths.
    """
    margin, without, with_deep = (np.asarray(values, dtype=np.float64) for values in (margins, shallow, deep))
    if not len(margin) or not len(margin) == len(without) == len(with_deep):
        raise UserError(
            "search.margin.values",
            "A threshold needs one margin and two qualities for each query, and at least one query.",
        )
    ascending = np.sort(margin)
    distinct = np.unique(margin)
    # Halfway between two margins, so that a threshold doesn't hang on the last bit of one of them.
    thresholds = np.concatenate([[0.0], (distinct[:-1] + distinct[1:]) / 2, [np.nextafter(distinct[-1], np.inf)]])
    counts = np.searchsorted(ascending, thresholds, side="left")
    gains = np.concatenate([[0.0], np.cumsum((with_deep - without)[np.argsort(margin, kind="stable")])])
    return thresholds, counts / len(margin), without.mean() + gains[counts] / len(margin)


def fit_threshold(
    margins: Sequence[float], shallow: Sequence[float], deep: Sequence[float], *, tolerance: float = 0.005
) -> FittedMargin:
    """The margin with the fewest deep passes whose quality is within `tolerance` of passing every query.

    Args:
        margins, shallow, deep: as for `threshold_curve`, of held-out queries.
        tolerance: quality that may be lost, in the unit of the quality.

    Raises:
        ValueError: as `threshold_curve`, or a negative tolerance.
    """
    if tolerance < 0:
        raise UserError("search.margin.tolerance", f"tolerance must not be negative, but is {tolerance}.")
    thresholds, shares, qualities = threshold_curve(margins, shallow, deep)
    place = int(np.argmax(qualities >= qualities[-1] - tolerance - 1e-12))
    return FittedMargin(
        margin=float(thresholds[place]),
        share=float(shares[place]),
        quality=float(qualities[place]),
        shallow_quality=float(qualities[0]),
        deep_quality=float(qualities[-1]),
        queries=len(margins),
    )


def _reciprocal_rank(ranked: Ranked, wanted: Found) -> float:
    """Of the wanted row, or of one with the same code."""
    for rank, one in enumerate(ranked.found, start=1):
        if one.text_hash == wanted.text_hash:
            return 1 / rank
    return 0.0


def _read(path: Path) -> dict[str, dict]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        for values in kept.values():
            FittedMargin(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError("search.margin.damaged", f"{path} is damaged ({error}). Remove it.") from error
    return kept
