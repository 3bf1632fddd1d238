"""Rows ranked for a question: by one exit, by a cascade of two, by words, or by several rankings at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from modular_star_encoder.evaluation.lexical import identifier_tokens
from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.settings import IndexSettings
from modular_star_encoder.search.vector_store import Filter, Found, VectorStore
from modular_star_encoder.utils.errors import UserError

Item = TypeVar("Item", bound=Hashable)

RANK_CONSTANT = 60


def reciprocal_rank_fusion(rankings: Sequence[Sequence[Item]], constant: int = RANK_CONSTANT) -> dict[Item, float]:
    """Score items by Σ 1 / (constant + rank) over the rankings that hold them, best first; ranks count from 1.

    Items of equal score keep the order in which the rankings name them.

    Source: Cormack, Clarke & Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
    methods", SIGIR 2009; 60 is theirs.
    """
    scores: defaultdict[Item, float] = defaultdict(float)
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] += 1 / (constant + rank)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


@dataclass(frozen=True, slots=True)
class Cascade:
    """How a search is re-ranked.

    Args:
        exit_layer: the deep exit.
        candidates: how many of the shallow exit's best are ranked again.
        margin: the deep exit runs only where the best similarity of the shallow one leads the second by less than
            this; None for always.

    Raises:
        UserError: fewer than two candidates, or a margin that is NaN.
    """

    exit_layer: int
    candidates: int = 200
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise UserError("search.cascade.candidates", f"candidates must be at least 2, not {self.candidates}.")
        if self.margin is not None and np.isnan(self.margin):
            raise UserError("search.cascade.margin", "margin must be a number or None, not nan.")


@dataclass(frozen=True, slots=True)
class Ranked:
    """Rows, best first.

    Attributes:
        found: the rows with their scores. Behind a cascade's candidates come those that it didn't rank again.
        margin: how far the best similarity of the first exit leads the second; None where there are no two.
        reranked: whether the deep exit ran.
    """

    found: list[Found]
    margin: float | None
    reranked: bool = False


class Ranker:
    """Ranks the rows of an index by its embeddings at one exit and, with a cascade, again at a deeper one.

    Args:
        store: the index.
        settings: what it was made with.
        embedder: of its checkpoint.
        exit_layer: an exit of the index.
        cascade: with a deeper exit of the checkpoint, or None.
    """

    def __init__(
        self,
        store: VectorStore,
        settings: IndexSettings,
        embedder: Embedder,
        exit_layer: int,
        cascade: Cascade | None = None,
    ) -> None:
        self.exit_layer, self.cascade = exit_layer, cascade
        self._store, self._settings, self._embedder = store, settings, embedder
        self._has_deep = cascade is not None and cascade.exit_layer in settings.exit_layers
        self._has_states = cascade is not None and settings.states and not self._has_deep

    def embed(self, questions: Sequence[str]) -> list[dict[int, np.ndarray]]:
        """Of each question exit_layer → (D,) float32: one pass through the model serves both exits."""
        exits = sorted({self.exit_layer, self.cascade.exit_layer if self.cascade else self.exit_layer})
        embeddings = self._embedder.questions(questions, exits, self._settings.dimension)
        return [{one: values[row] for one, values in embeddings.items()} for row in range(len(questions))]

    def rank(self, vectors: Mapping[int, np.ndarray], limit: int, where: Filter) -> Ranked:
        """The best `limit` rows for one embedded question; the deep exit runs where the cascade wants it."""
        first = self.first(vectors, limit, where)
        wanted = self.cascade is not None and (
            self.cascade.margin is None or first.margin is None or first.margin < self.cascade.margin
        )
        chosen = self.again(first, vectors) if wanted and len(first.found) > 1 else first
        return replace(chosen, found=chosen.found[:limit])

    def first(self, vectors: Mapping[int, np.ndarray], limit: int, where: Filter) -> Ranked:
        """The ranking of the first exit, at least as long as the candidates of the cascade."""
        extras: list[str] = []
        if self._has_deep and self.cascade is not None:
            extras = [f"vector_{self.cascade.exit_layer}"]
        elif self._has_states:
            extras = ["states"]
        count = max(limit, self.cascade.candidates if self.cascade else 2)
        found = self._store.nearest(vectors[self.exit_layer], self.exit_layer, count, where, extras)
        margin = found[0].score - found[1].score if len(found) > 1 else None
        return Ranked([replace(one, exit_layer=self.exit_layer) for one in found], margin)

    def again(self, first: Ranked, vectors: Mapping[int, np.ndarray]) -> Ranked:
        """The candidates of a first ranking, ranked by the deep exit."""
        cascade = self.cascade
        if cascade is None:
            raise ValueError("Without a cascade nothing is ranked again.")
        candidates, rest = first.found[: cascade.candidates], first.found[cascade.candidates :]
        if self._has_deep:
            documents = np.stack([one.vectors[cascade.exit_layer] for one in candidates])
        else:
            # States are those of the shallowest exit, whichever exit was compared first.
            states_of = self._settings.exit_layers[0] if self._has_states else None
            documents = self._embedder.deeper(candidates, cascade.exit_layer, self._settings.dimension, states_of)
        scores = documents @ vectors[cascade.exit_layer]
        order = np.argsort(-scores, kind="stable")
        ranked = [_scored(candidates[place], float(scores[place]), cascade.exit_layer) for place in order]
        return Ranked(ranked + rest, first.margin, reranked=True)


def lexical(store: VectorStore, question: str, limit: int, where: Filter) -> list[Found]:
    """Rows by BM25; a word counts once, however often the question repeats it, as in `evaluation.bm25`."""
    return store.lexical(sorted(set(identifier_tokens(question))), limit, where)


def fused(rankings: Sequence[Sequence[Found]]) -> list[Found]:
    """Several rankings made one by reciprocal rank fusion; a row is as the first ranking that holds it has it."""
    known = {one.row_id: one for ranking in reversed(rankings) for one in ranking}
    scores = reciprocal_rank_fusion([[one.row_id for one in ranking] for ranking in rankings])
    return [_scored(known[row], score, known[row].exit_layer) for row, score in scores.items()]


def _scored(found: Found, score: float, exit_layer: int | None) -> Found:
    return replace(found, score=score, vectors={}, states=None, exit_layer=exit_layer)
