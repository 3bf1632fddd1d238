"""How sure a shallow exit must be of its best hit for the deep one to rest: fitted on an index, kept beside it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tqdm.auto import tqdm

from modular_star_encoder.search.cascade import Cascade, FittedMargin, fit_threshold
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.ranking import Ranked
from modular_star_encoder.search.settings import MARGINS_NAME
from modular_star_encoder.search.vector_store import Filter, Found
from modular_star_encoder.utils.files import write_json


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
    ranker = index.ranker(exit_layer, dataclasses.replace(cascade, margin=None))
    asked = index.store.sample(queries)
    if not asked:
        raise ValueError(f"The index {index.store.location} has no function with a description to fit a margin on.")
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
    key = f"{settings.fingerprint} {settings.dimension} {first} {cascade.exit_layer} {cascade.candidates}"
    kept = {} if path is None or not path.exists() else _read(path)
    if key in kept:
        return FittedMargin(**kept[key])
    fitted = fit_margin(index, cascade, exit_layer=exit_layer, progress=progress)
    if path is not None:
        write_json(path, {**kept, key: fitted.to_dict()})
    return fitted


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
        raise ValueError(f"{path} is damaged ({error}): remove it.") from error
    return kept
