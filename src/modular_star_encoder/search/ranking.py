"""Rank rows for a question by similarity at one exit, by words, or by rules over both; re-rank at a deeper exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.pieces import definition_word, question_stems
from modular_star_encoder.search.rules import Question, place
from modular_star_encoder.search.vector_store import Filter, Found, IndexSettings, VectorStore
from modular_star_encoder.utils.errors import UserError

Method = Literal["hybrid", "vector", "lexical"]

_BY_SIMILARITY, _BY_WORDS, _BY_DEFINITION = 100, 400, 50
"""Number of candidates that the rules take by similarity, by words, and by the names that they define."""
_DEFINERS = 1000  # most rows that are known to define a name


@dataclass(frozen=True, slots=True)
class Cascade:
    """Settings to rank the best hits again at a deeper exit; UserError if `candidates` < 2 or `margin` is NaN.

    Attributes:
        exit_layer: the deeper exit.
        candidates: number of the best hits that are ranked again.
        margin: re-rank only if the two best similarities at the first exit differ by less than this; None: always.
    """

    exit_layer: int
    candidates: int = 20
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise UserError("search.cascade.candidates", f"`candidates` must be at least 2, not {self.candidates}.")
        if self.margin is not None and np.isnan(self.margin):
            raise UserError("search.cascade.margin", "`margin` must be a number or None, not nan.")


@dataclass(frozen=True, slots=True)
class Ranked:
    """The rows found for one question, best first."""

    found: list[Found]  # from `by_similarity`, first those that a cascade ranked again
    margin: float | None  # best similarity at the first exit minus the second best; None if there are not two
    reranked: bool = False  # whether a cascade ranked the best again


class Ranker:
    """Ranks the rows of an index by their embeddings at one exit, and with a cascade again at a deeper exit."""

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

    def embed(self, questions: Sequence[str]) -> list[dict[int, np.ndarray]]:
        """Return, for each question, exit_layer → (D,) float32 at the first exit and the cascade's, from one pass."""
        exits = sorted({self.exit_layer, self.cascade.exit_layer if self.cascade else self.exit_layer})
        embeddings = self._embedder.questions(questions, exits, self._settings.dimension)
        return [{one: values[row] for one, values in embeddings.items()} for row in range(len(questions))]

    def by_similarity(self, vectors: Mapping[int, np.ndarray], limit: int, where: Filter) -> Ranked:
        """Return the `limit` rows most similar to a question, whose embeddings are `vectors` (exit_layer → (D,))."""
        count = max(limit, self.cascade.candidates if self.cascade else 2)
        found = self._nearest(vectors, count, where)
        margin = _lead(found)
        if (cascade := self._cascade_for(margin)) is None:
            return Ranked(found[:limit], margin)
        best, rest = found[: cascade.candidates], found[cascade.candidates :]
        scores = self._similarities(best, vectors, cascade.exit_layer)
        order = np.argsort(-scores, kind="stable")
        again = [replace(best[one], score=float(scores[one]), exit_layer=cascade.exit_layer) for one in order.tolist()]
        return Ranked([*again, *rest][:limit], margin, reranked=True)

    def by_rules(self, question: str, vectors: Mapping[int, np.ndarray], limit: int, where: Filter) -> Ranked:
        """Return the best `limit` rows for a question by the ranking rules over similarity and words (`rules.place`).

        With a cascade, the best rows get their similarities at the deeper exit, rescaled to the mean and deviation of
        the old ones. Then all rows are ranked again.
        """
        read = Question.of(question)
        nearest = self._nearest(vectors, _BY_SIMILARITY, where)
        candidates, words, definers = _candidates(self._store, read, where, nearest)
        if not candidates:
            return Ranked([], None)
        paths = [one.path for one in candidates]
        similarities = self._store.vectors(candidates, self.exit_layer) @ vectors[self.exit_layer]
        margin, exits = _lead(nearest), [self.exit_layer] * len(candidates)
        cascade = self._cascade_for(margin)
        if cascade is not None:
            placed = place(read, paths, definers, similarities, words, cascade.candidates)
            best = [one.candidate for one in placed]
            deep = self._similarities([candidates[one] for one in best], vectors, cascade.exit_layer)
            shallow = similarities[best]
            similarities[best] = (deep - deep.mean()) / (deep.std() + 1e-9) * shallow.std() + shallow.mean()
            for one in best:
                exits[one] = cascade.exit_layer
        found = [
            replace(candidates[one.candidate], score=one.score, exit_layer=exits[one.candidate], reasons=one.reasons)
            for one in place(read, paths, definers, similarities, words, limit)
        ]
        return Ranked(found, margin, reranked=cascade is not None)

    def _nearest(self, vectors: Mapping[int, np.ndarray], limit: int, where: Filter) -> list[Found]:
        found = self._store.nearest(vectors[self.exit_layer], self.exit_layer, limit, where)
        for one in found:
            one.exit_layer = self.exit_layer
        return found

    def _cascade_for(self, margin: float | None) -> Cascade | None:
        if self.cascade is None or margin is None:  # None: fewer than two hits
            return None
        return self.cascade if self.cascade.margin is None or margin < self.cascade.margin else None

    def _similarities(self, found: Sequence[Found], vectors: Mapping[int, np.ndarray], exit_layer: int) -> np.ndarray:
        """Return cosine similarities (N,) of rows to a question; rows are embedded now if the index lacks the exit."""
        if exit_layer in self._settings.exit_layers:
            documents = self._store.vectors(found, exit_layer)
        else:
            snippets = [one.snippet for one in found]
            documents = self._embedder.snippets(snippets, [exit_layer], self._settings.dimension)[exit_layer]
        return documents @ vectors[exit_layer]


def by_words(store: VectorStore, question: str, limit: int, where: Filter) -> list[Found]:
    """Return the best `limit` rows for a question by the ranking rules over words alone, without a model."""
    read = Question.of(question)
    candidates, words, definers = _candidates(store, read, where, [])
    return [
        replace(candidates[one.candidate], score=one.score, reasons=one.reasons)
        for one in place(read, [one.path for one in candidates], definers, None, words, limit)
    ]


def _candidates(
    store: VectorStore, question: Question, where: Filter, nearest: Sequence[Found]
) -> tuple[list[Found], np.ndarray, dict[str, list[int]]]:
    """Return the candidate rows (N) of a question, their BM25 scores (N,), and name → indices of rows that define it.

    The BM25 score of a row is 0 if the row has none of the question's words.
    """
    lexical = store.lexical(question_stems(question.text), _BY_WORDS, where)
    names = [definition_word(name) for name in question.names]
    defining = store.lexical(names, _BY_DEFINITION, where)
    rows = {one.row_id: one for one in (*defining, *lexical, *nearest)}
    words = {one.row_id: one.score for one in lexical}
    numbers = {row_id: number for number, row_id in enumerate(rows)}
    definers = {
        name: [numbers[one.row_id] for one in store.lexical([word], _DEFINERS, where) if one.row_id in numbers]
        for name, word in zip(question.names, names, strict=True)
    }
    return list(rows.values()), np.array([words.get(row_id, 0.0) for row_id in rows]), definers


def _lead(found: Sequence[Found]) -> float | None:
    return found[0].score - found[1].score if len(found) > 1 else None
