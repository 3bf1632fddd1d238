"""Rank the rows of an index for a question: by similarity at an exit, by words, or by ranking rules that use both.

Each ranking rule is one function of the question and its candidates; benchmarks/README.md has the effect of each rule.
The rules are those of the code search semble (MinishLab, 2026), but they add standardised scores instead of ranks.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.pieces import definition_word, parts, question_stems, telling_parts
from modular_star_encoder.search.vector_store import Filter, Found, IndexSettings, VectorStore
from modular_star_encoder.utils.errors import UserError

Method = Literal["hybrid", "vector", "lexical"]

# Largest numbers of candidates that are found by similarity, by words, and by the names that they define.
_BY_SIMILARITY, _BY_WORDS, _BY_DEFINITION = 100, 400, 50
_DEFINERS = 1000  # largest number of rows that are looked up because they define a name


@dataclass(frozen=True, slots=True)
class Cascade:
    """Settings to rank the best hits again at a deeper exit; UserError if `candidates` < 2 or `margin` is NaN."""

    exit_layer: int  # the deeper exit
    candidates: int = 20  # number of best hits to rank again
    margin: float | None = None  # rank again only if the two best similarities differ by less than this; None: always

    def __post_init__(self) -> None:
        if self.candidates < 2 or np.isnan(self.margin or 0):
            fault = "`candidates` must be at least 2, and `margin` a number or None"
            raise UserError("search.cascade", f"{fault}, not {self.candidates} and {self.margin}.")


@dataclass(frozen=True, slots=True)
class Ranked:
    """The rows found for one question, best first."""

    found: list[Found]
    margin: float | None = None  # largest minus second-largest similarity before re-ranking; None for fewer than 2 rows
    reranked: bool = False  # whether a cascade ranked the best rows again


@dataclass(frozen=True)
class Ranker:
    """Ranks the rows of an index for questions at one exit; a cascade ranks the best rows again at a deeper exit."""

    store: VectorStore
    settings: IndexSettings
    embedder: Embedder
    exit_layer: int
    cascade: Cascade | None = None

    def embed(self, questions: Sequence[str]) -> list[dict[int, np.ndarray]]:
        """Return, for each question, {exit: embedding (D,) float32} for `self.exit_layer` and the cascade's exit."""
        exits = sorted({self.exit_layer, self.cascade.exit_layer if self.cascade else self.exit_layer})
        embeddings = self.embedder.questions(questions, exits, self.settings.dimension)
        return [{one: values[row] for one, values in embeddings.items()} for row in range(len(questions))]

    def by_similarity(self, vectors: Mapping[int, np.ndarray], limit: int, where: Filter) -> Ranked:
        """Return the `limit` rows that fit `where` and most resemble a question; `vectors`: {exit: embedding (D,)}."""
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
        """Return the best `limit` rows for a question by the rules in `place`, which use similarity and words."""
        read = Question.of(question)
        nearest = self._nearest(vectors, _BY_SIMILARITY, where)
        candidates, words, definers = _candidates(self.store, read, where, nearest)
        if not candidates:
            return Ranked([])
        for row in candidates:
            row.exit_layer = self.exit_layer
        similarities = self.store.vectors(candidates, self.exit_layer) @ vectors[self.exit_layer]
        margin = _lead(nearest)
        if cascade := self._cascade_for(margin):
            placed = place(read, [row.path for row in candidates], definers, similarities, words, cascade.candidates)
            best = [one for one, *_ in placed]
            for one in best:
                candidates[one].exit_layer = cascade.exit_layer
            deep = self._similarities([candidates[one] for one in best], vectors, cascade.exit_layer)
            shallow = similarities[best]
            similarities[best] = (deep - deep.mean()) / (deep.std() + 1e-9) * shallow.std() + shallow.mean()
        found = _placed(read, candidates, definers, similarities, words, limit)
        return Ranked(found, margin, reranked=cascade is not None)

    def _nearest(self, vectors: Mapping[int, np.ndarray], limit: int, where: Filter) -> list[Found]:
        found = self.store.nearest(vectors[self.exit_layer], self.exit_layer, limit, where)
        for one in found:
            one.exit_layer = self.exit_layer
        return found

    def _cascade_for(self, margin: float | None) -> Cascade | None:
        if self.cascade is None or margin is None:  # None: fewer than two hits
            return None
        return self.cascade if self.cascade.margin is None or margin < self.cascade.margin else None

    def _similarities(self, found: Sequence[Found], vectors: Mapping[int, np.ndarray], exit_layer: int) -> np.ndarray:
        """Return cosine similarities (N,) of `found` to a question; embed these rows if the index lacks the exit."""
        if exit_layer in self.settings.exit_layers:
            documents = self.store.vectors(found, exit_layer)
        else:
            snippets = [one.snippet for one in found]
            documents = self.embedder.snippets(snippets, [exit_layer], self.settings.dimension)[exit_layer]
        return documents @ vectors[exit_layer]


def by_words(store: VectorStore, question: str, limit: int, where: Filter) -> Ranked:
    """Return the best `limit` rows for a question by the ranking rules, from words alone and without a model."""
    read = Question.of(question)
    candidates, words, definers = _candidates(store, read, where, [])
    return Ranked(_placed(read, candidates, definers, None, words, limit))


def _candidates(
    store: VectorStore, question: "Question", where: Filter, nearest: Sequence[Found]
) -> tuple[list[Found], np.ndarray, dict[str, list[int]]]:
    """Return N rows to rank, their BM25 scores (N,), and {name in the question: indices of the rows that define it}."""
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


def _placed(question: "Question", candidates: Sequence[Found], *given: Any) -> list[Found]:
    """Return the best candidates, with scores and what each rule adds; `given` are the other arguments of `place`."""
    return [
        replace(candidates[one], score=score, reasons=reasons)
        for one, score, reasons in place(question, [row.path for row in candidates], *given)
    ]


def _lead(found: Sequence[Found]) -> float | None:
    return found[0].score - found[1].score if len(found) > 1 else None


SIMILARITY_WEIGHT, SIMILARITY_WEIGHT_OF_SYMBOLS = 0.5, 0.3
DEFINITION, OWN_FILE, INSIDE_A_SENTENCE = 1.5, 1.5, 0.5
PATH, FOLDER = 1.5, 0.5
GOOD_FILE, PIECES_OF_A_FILE = 1.0, 5
SIDE_FILES, INITIAL_FILES, DECLARATIONS = 0.5, 0.5, 0.7
FURTHER_PIECE = 0.93
_SHORTEST_PREFIX = 3

_SEPARATOR = re.compile(r"::|->|\.|\\|#|/")
_SYMBOL = re.compile(r"[\w$]+(?:(?:::|->|\.|\\|#|/)[\w$]+)*[!?]?")
_SIGN_OF_SYMBOL = re.compile(r"[A-Z_]|::|->|\.|\\")
_NAME_IN_SENTENCE = re.compile(r"[A-Za-z_$][\w$]*[!?]?")
_SIGN_OF_NAME = re.compile(r"[a-z][A-Z]|_\w|[A-Z]{2}")
_CAPITALISED = re.compile(r"[A-Z][a-z]+")
_SIDE_FILE = re.compile(
    r"(^|/)(_?examples?|samples?|demo|docs?(_src)?|legacy|compat|deprecated|bench(marks?)?|fixtures|mocks?|testdata"
    r"|testing|__tests__|test_suite|tests?|specs?)(/|$)"
    r"|(^|/)(test_[^/]*|conftest\.py)$|[._-](tests?|specs?|bench|stories)\.[^/]*$"
    r"|[a-z0-9](Tests?|Spec|TestCase)\.\w+$"
)
_ABOUT_TESTS = re.compile(r"\b(tests?|specs?|testing|examples?|benchmarks?|mocks?)", re.IGNORECASE)
_INITIAL_FILE = re.compile(r"(^|/)(__init__\.py|package-info\.java)$")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the names of functions and classes in it."""

    text: str
    is_symbol: bool  # whether the question is only a name, such as `Router::Match` or `parse_header`
    names: Mapping[str, float]  # {lower-case name in the question: weight of a piece that defines this name}

    @classmethod
    def of(cls, text: str) -> "Question":
        """Make a `Question` of `text`: find the words that look like names of functions or classes."""
        plain = text.strip()
        if _SYMBOL.fullmatch(plain) and _SIGN_OF_SYMBOL.search(plain):
            return cls(text, True, {_SEPARATOR.split(plain)[-1].lower().rstrip("!?"): 1.0})
        names = {}
        for match in _NAME_IN_SENTENCE.finditer(plain):
            if _SIGN_OF_NAME.search(match[0]) or (_CAPITALISED.fullmatch(match[0]) and match.start() > 0):
                names[match[0].lower().rstrip("!?")] = INSIDE_A_SENTENCE
        return cls(text, False, names)


def fused(similarities: np.ndarray | None, words: np.ndarray, weight: float) -> np.ndarray:
    """Return N scores: `weight` × similarity + (1 - `weight`) × BM25 score, or only BM25 scores without similarities.

    Both kinds of score are standardised first. The median is subtracted from the sums, and negative values become 0.
    """
    if similarities is None:
        return words.astype(np.float64)
    scores = weight * _standardised(similarities) + (1 - weight) * _standardised(words)
    middle = np.sort(scores)[[(len(scores) - 1) // 2, len(scores) // 2]].mean()  # np.median imports masked arrays
    return np.maximum(scores - middle, 0)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-9)


def definitions(question: Question, paths: Sequence[str], definers: Mapping[str, Collection[int]]) -> np.ndarray:
    """Return what to add to N scores: above 0 if a piece defines a name in the question, more if its file has it."""
    gains = np.zeros(len(paths))
    for name, weight in question.names.items():
        for number in definers.get(name, ()):
            # Endings do not count: the file of `Formatter` may be `src/Formatter.cs` or ``src/Formatter`1.cs``.
            file_name = re.split(r"[^\w-]", PurePosixPath(paths[number]).name)[0]
            own = OWN_FILE if _plain(file_name) == _plain(name) else 1.0
            gains[number] = max(gains[number], DEFINITION * weight * own)
    return gains


def _plain(name: str) -> str:
    return re.sub(r"[_-]", "", name.lower())


def paths(question: Question, files: Sequence[str]) -> np.ndarray:
    """Return what to add to the scores in F files: `PATH` × share of the question's words in the file name.

    A word that is only in the folder name counts as `FOLDER` words.
    """
    wanted = telling_parts(question.text)
    if question.is_symbol or not wanted:
        return np.zeros(len(files))
    named = [_named(path) for path in files]
    every = {part for both in named for one in both for part in one}
    met = np.zeros(len(files))  # for each file, the number of words that its name or its folder's name has
    for word in wanted:
        like = {part for part in every if _alike(word, part)}
        for number, (file, folder) in enumerate(named):
            if not like.isdisjoint(file):
                met[number] += 1.0
            elif not like.isdisjoint(folder):
                met[number] += FOLDER
    return PATH * met / len(wanted)


@lru_cache(maxsize=100_000)
def _named(path: str) -> tuple[set[str], set[str]]:
    return parts(PurePosixPath(path).stem), parts(PurePosixPath(path).parent.name)


def _alike(word: str, other: str) -> bool:
    begins = word.startswith(other) or other.startswith(word)
    return begins and (word == other or min(len(word), len(other)) >= _SHORTEST_PREFIX)


def good_files(scores: np.ndarray, gained: np.ndarray, file_of: np.ndarray) -> np.ndarray:
    """Return what to add to N scores: for a file's best piece by `gained`, more if the file has high `scores`."""
    counted = _place_in_file(scores, file_of) < PIECES_OF_A_FILE
    sums = np.bincount(file_of[counted], weights=scores[counted])
    return np.where(_place_in_file(gained, file_of) == 0, GOOD_FILE * sums[file_of] / (sums.max() or 1.0), 0.0)


def _place_in_file(scores: np.ndarray, file_of: np.ndarray) -> np.ndarray:
    """Return, for each of N pieces, how many pieces of the same file have a better score: an array (N,)."""
    order = np.lexsort((-scores, file_of))
    starts = np.searchsorted(file_of[order], file_of[order])
    places = np.empty(len(scores), dtype=np.int64)
    places[order] = np.arange(len(scores)) - starts
    return places


def priors(question: Question, files: Sequence[str]) -> np.ndarray:
    """Return factors for the scores in F files: below 1 for tests, examples, docs, re-exports and type declarations.

    For tests, examples and docs, the factor is 1 if the question mentions tests or examples.
    """
    kinds = np.array([_kinds(path) for path in files], dtype=bool)
    kinds[:, 0] &= not _ABOUT_TESTS.search(question.text)
    return np.where(kinds, [SIDE_FILES, INITIAL_FILES, DECLARATIONS], 1.0).prod(axis=1)


@lru_cache(maxsize=100_000)
def _kinds(path: str) -> tuple[bool, bool, bool]:
    """Return whether, by its path, a file has tests, examples or docs; has only re-exports; has only declarations."""
    return bool(_SIDE_FILE.search(path)), bool(_INITIAL_FILE.search(path)), path.endswith(".d.ts")


def diversity(scores: np.ndarray, file_of: np.ndarray) -> np.ndarray:
    """Return factors (N,) for scores of pieces: 1 for a file's best piece, 0.93 for the second, 0.93² for the third."""
    return FURTHER_PIECE ** _place_in_file(scores, file_of)


def place(
    question: Question,
    candidates: Sequence[str],
    definers: Mapping[str, Collection[int]],
    similarities: np.ndarray | None,
    words: np.ndarray,
    limit: int,
) -> list[tuple[int, float, dict[str, float]]]:
    """Rank N pieces of code, the candidates, for a question by all ranking rules.

    Return the best `limit`, best first, as (index of the candidate, score, {rule: addition to the score}).
    `candidates` are the pieces' file paths. `definers` is {name in the question: indices of candidates that define it}.
    `similarities` (N,) are None without a model. `words` (N,) are BM25 scores.
    """
    if not candidates:
        return []
    weight = SIMILARITY_WEIGHT_OF_SYMBOLS if question.is_symbol else SIMILARITY_WEIGHT
    scores = fused(similarities, words, weight)
    scores = scores / (scores.max() or 1.0)
    files = list(dict.fromkeys(candidates))
    numbers = {path: number for number, path in enumerate(files)}
    file_of = np.array([numbers[path] for path in candidates])
    reasons = {"similarity and words": scores, "definition": definitions(question, candidates, definers)}
    reasons["path"] = paths(question, files)[file_of]
    total = np.sum(list(reasons.values()), axis=0)
    reasons["good file"] = good_files(scores, total, file_of)
    total = total + reasons["good file"]
    factors = priors(question, files)[file_of]
    reasons["kind of file"], total = total * (factors - 1), total * factors
    factors = diversity(total, file_of)
    reasons["diversity"], total = total * (factors - 1), total * factors
    return [
        (int(one), float(total[one]), {name: float(gains[one]) for name, gains in reasons.items() if gains[one]})
        for one in np.argsort(-total, kind="stable")[:limit]
    ]
