"""How similar queries and documents are, in blocks small enough for memory, and the ranks that follow from it.

A cosine similarity is the float64 sum of products of unit vectors, added up pairwise in the order of the components,
then rounded to float32. Matrix products add in whatever order is fastest for their shape, so a block rounds at once
only what rounds alike with any such error, and computes the few other scores in the fixed order. Equal vectors then get
equal scores wherever they stand, and no figure depends on the size of a block or on the library that multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.evaluation.metrics import Ranking, check_scores, worst_order
from modular_star_encoder.evaluation.tasks import Judgements, Pool

BLOCK = 1 << 22
"""Scores per block: 32 MiB in float64."""

_NOTHING = 2.0**-24
"""Similarities closer to 0 are 0: below, float32 tells apart what float64 sums don't."""

_PAIRS = 4096  # pairs of vectors in memory at a time
_SHOWN = 10**8  # scores that take seconds

HELD = 1 << 25
"""Components of documents in memory at a time, 256 MiB in float64; with no more, a block holds all documents."""


class Block(NamedTuple):
    """Scores (R, C) float32 of consecutive queries and documents, from `row` and `column` on."""

    row: int
    column: int
    scores: np.ndarray


class Scores(Protocol):
    """The scores of Q queries and D documents, never all in memory."""

    shape: tuple[int, int]

    def blocks(self) -> Iterator[Block]:
        """All scores, each once, in any order."""
        ...

    def of_pairs(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """The scores (P,) float32 of queries (P,) and documents (P,), equal to those of the blocks bit for bit."""
        ...


class Rows(Protocol):
    """Embeddings (N, F) float32 in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray: ...


class CosineScores:
    """Cosine similarity, exact and then rounded to float32; a vector of zeros is similar to nothing (0).

    Args:
        queries, documents: (Q, F) and (D, F); they are read in slices and may be larger than memory.
        dimensions: use the first so many components, normalised again; all if None.
    """

    def __init__(self, queries: Rows, documents: Rows, dimensions: int | None = None) -> None:
        self.queries, self.documents, self.dimensions = queries, documents, dimensions
        self.shape = (len(queries), len(documents))

    def blocks(self) -> Iterator[Block]:
        """Columns outside, rows inside, so that each document is read once."""
        height, width = self.shape
        size = self.documents[:1].shape[1]
        columns = width if width * size <= HELD else max(1, HELD // (4 * size))
        rows = max(1, BLOCK // max(1, columns))
        for column in range(0, width, columns):
            documents = self._unit(self.documents[column : column + columns])
            for row in range(0, height, rows):
                yield Block(row, column, similarities(self._unit(self.queries[row : row + rows]), documents))

    def of_pairs(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """See `Scores`."""
        scores = np.empty(len(queries), dtype=np.float32)
        for start in range(0, len(queries), _PAIRS):
            part = slice(start, start + _PAIRS)
            units = self._unit(self.queries[queries[part]]), self._unit(self.documents[documents[part]])
            scores[part] = _rounded((units[0] * units[1]).sum(axis=1))
        return scores

    def _unit(self, embeddings: np.ndarray) -> np.ndarray:
        return unit_rows(embeddings[:, : self.dimensions])


def unit_rows(embeddings: np.ndarray) -> np.ndarray:
    """Rows (N, F) scaled to length 1, float64; rows of zeros stay, infinity becomes NaN."""
    embeddings = embeddings.astype(np.float64)
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        embeddings /= np.where(norms == 0, 1, norms)
    return embeddings


def similarities(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Rounded similarities (Q, D) float32 of unit rows, those of `CosineScores.of_pairs` bit for bit."""
    products = queries @ documents.T
    # Twice the error of a sum of F products of unit vectors (Higham 2002, section 3.1), in whatever order.
    error = queries.shape[1] * 2.0**-52
    products -= error
    scores = _rounded(products)
    products += 2 * error
    unsure = np.flatnonzero(scores != _rounded(products))
    rows, columns = np.divmod(unsure, products.shape[1])
    for start in range(0, len(unsure), _PAIRS):
        part = slice(start, start + _PAIRS)
        scores[rows[part], columns[part]] = _rounded((queries[rows[part]] * documents[columns[part]]).sum(axis=1))
    return scores


def _rounded(similarities: np.ndarray) -> np.ndarray:
    rounded = similarities.astype(np.float32)
    rounded[np.abs(rounded) < _NOTHING] = 0
    return rounded


def rank_judged(
    scores: Scores,
    judgements: Judgements,
    *,
    exclude_self: bool = False,
    progress: bool = False,
    label: str = "ranking",
) -> Ranking:
    """Ranks of the judged documents among all documents, in one pass over the scores.

    The rank of a document is the number of unjudged documents that score at least as much, plus its place among the
    judged ones. Memory: one block, and a few numbers for each judgement.

    Args:
        scores: (Q, D); each row is ranked on its own.
        judgements: rows and columns of `scores`.
        exclude_self: leave column i out of row i.

    Raises:
        ValueError: a score is NaN.
    """
    bounds = np.searchsorted(judgements.query, np.arange(scores.shape[0] + 1))
    judged_scores = np.full(len(judgements.query), np.nan, dtype=np.float32)
    above = np.zeros(len(judgements.query), dtype=np.int64)
    known = False
    total = scores.shape[0] * scores.shape[1]
    quiet = not progress or total < _SHOWN
    with tqdm(total=total, desc=label, unit="score", unit_scale=True, disable=quiet, leave=False) as bar:
        for block in scores.blocks():
            check_scores(block.scores)
            bar.update(block.scores.size)
            if exclude_self:
                _leave_out_self(block)
            judged = slice(bounds[block.row], bounds[block.row + len(block.scores)])
            rows = judgements.query[judged] - block.row
            if block.scores.shape[1] == scores.shape[1]:
                judged_scores[judged] = block.scores[rows, judgements.document[judged]]
            elif not known:
                judged_scores[:] = scores.of_pairs(judgements.query, judgements.document)
                known = True
            above[judged] += _count_at_least(block.scores, rows, judged_scores[judged])
    return _ranking(scores.shape[0], judgements, judged_scores, above)


def pool_judgements(judgements: Judgements, pool: Pool) -> Judgements:
    """The judgements of the queries of a pool about its documents, as rows and columns of the pool."""
    if not len(judgements.query):
        return judgements
    row = _places_of(pool.queries, judgements.query)
    column = _places_of(pool.documents, judgements.document)
    query, document = row[judgements.query], column[judgements.document]
    inside = np.flatnonzero((query >= 0) & (document >= 0))
    order = inside[np.argsort(query[inside], kind="stable")]
    return Judgements(query[order], document[order], judgements.gain[order])


def _places_of(members: np.ndarray, named: np.ndarray) -> np.ndarray:
    """The place of each number among `members`, or -1."""
    places = np.full(max(members.max(), named.max()) + 1, -1)
    places[members] = np.arange(len(members))
    return places


def _leave_out_self(block: Block) -> None:
    height, width = block.scores.shape
    first = max(block.row, block.column)
    own = np.arange(first, max(first, min(block.row + height, block.column + width)))
    block.scores[own - block.row, own - block.column] = -np.inf


def _count_at_least(scores: np.ndarray, rows: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """For each (row, threshold) the number of scores of that row that reach the threshold; rows ascend."""
    if len(np.unique(rows)) == len(rows):
        chosen = scores if np.array_equal(rows, np.arange(len(scores))) else scores[rows]
        return np.count_nonzero(chosen >= thresholds[:, None], axis=1)
    counts = np.empty(len(rows), dtype=np.int64)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        ordered = np.sort(scores[rows[start]])
        counts[start:end] = len(ordered) - np.searchsorted(ordered, thresholds[start:end], side="left")
    return counts


def _ranking(queries: int, judgements: Judgements, scores: np.ndarray, above: np.ndarray) -> Ranking:
    """Ranks from the scores of the judged documents and the number of documents that score at least as much."""
    order = worst_order(scores, judgements.gain, judgements.query)
    query, ordered = judgements.query[order], scores[order]
    first = np.searchsorted(query, query, side="left")
    place = np.arange(len(order)) - first
    # The last of those with the same query and score: up to it, judged documents score at least as much.
    run = np.cumsum(np.append(True, (query[1:] != query[:-1]) | (ordered[1:] != ordered[:-1]))[: len(order)])
    last = np.searchsorted(run, run, side="right") - 1
    rank = np.empty(len(order))
    rank[order] = above[order] - (last - first + 1) + place + 1
    return Ranking(queries, judgements.query, judgements.gain, rank)
