"""The ranking rules: rank a question's candidates by similarity, words, definitions, paths and files.

Each rule is one function of the question and its candidates; benchmarks/README.md measures the effect of each.
All languages and repositories share the same weights. The rules reimplement those of semble (MinishLab, 2026), but fuse
standardised scores instead of ranks, because ranks do not say how far candidates are apart.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from modular_star_encoder.search.pieces import Snippet, parts, telling_parts

SIMILARITY_WEIGHT, SIMILARITY_WEIGHT_OF_SYMBOLS = 0.5, 0.3
DEFINITION, OWN_FILE, INSIDE_A_SENTENCE = 1.5, 1.5, 0.5
PATH, FOLDER = 1.5, 0.5
GOOD_FILE, PIECES_OF_A_FILE = 1.0, 5
SIDE_FILES, INITIAL_FILES, DECLARATIONS = 0.5, 0.5, 0.7
FURTHER_PIECE = 0.8
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
    r"|[a-z0-9](Tests?|Spec|TestCase)\.\w+$",
)
_ABOUT_TESTS = re.compile(r"\b(tests?|specs?|testing|examples?|benchmarks?|mocks?)", re.IGNORECASE)
_INITIAL_FILE = re.compile(r"(^|/)(__init__\.py|package-info\.java)$")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the names in it."""

    text: str
    is_symbol: bool  # whether it is a name alone, such as `Router::Match` or `parse_header`
    names: Mapping[str, float]  # lower-case name whose definition is wanted → its weight

    @classmethod
    def of(cls, text: str) -> Question:
        """Return the question with the names that its text contains."""
        plain = text.strip()
        if _SYMBOL.fullmatch(plain) and _SIGN_OF_SYMBOL.search(plain):
            return cls(text, True, {_SEPARATOR.split(plain)[-1].lower().rstrip("!?"): 1.0})
        names = {}
        for match in _NAME_IN_SENTENCE.finditer(plain):
            is_first = match.start() == 0
            if _SIGN_OF_NAME.search(match[0]) or (_CAPITALISED.fullmatch(match[0]) and not is_first):
                names[match[0].lower().rstrip("!?")] = INSIDE_A_SENTENCE
        return cls(text, False, names)


def fused(similarities: np.ndarray | None, words: np.ndarray, weight: float) -> np.ndarray:
    """Return scores (N,) of at least 0: the weighted sum of both, standardised; `words` alone without similarities."""
    if similarities is None:
        return words.astype(np.float64)
    scores = weight * _standardised(similarities) + (1 - weight) * _standardised(words)
    return np.maximum(scores - np.median(scores), 0)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-9)


def definitions(question: Question, snippets: Sequence[Snippet]) -> np.ndarray:
    """Return gains (N,) for pieces that define a name in the question; larger if their file also has that name."""
    gains = np.zeros(len(snippets))
    for place, snippet in enumerate(snippets):
        defined = {name.lower().rstrip("!?") for name in snippet.defines}
        for name, weight in question.names.items():
            if name in defined:
                own = OWN_FILE if _plain(_file_name(snippet.path)) == _plain(name) else 1.0
                gains[place] = max(gains[place], DEFINITION * weight * own)
    return gains


def _file_name(path: str) -> str:
    """Return `Formatter` for `src/Formatter.cs` and for ``src/Formatter`1.cs``."""
    return re.split(r"[^\w-]", PurePosixPath(path).name)[0]


def _plain(name: str) -> str:
    return re.sub(r"[_-]", "", name.lower())


def paths(question: Question, files: Mapping[str, Sequence[int]], count: int) -> np.ndarray:
    """Return gains (N,): the share of the question's words in a piece's file name; words in its folder count half."""
    gains = np.zeros(count)
    wanted = telling_parts(question.text)
    if question.is_symbol or not wanted:
        return gains
    for path, places in files.items():
        file, folder = parts(PurePosixPath(path).stem), parts(PurePosixPath(path).parent.name)
        met = sum(1.0 if _met(word, file) else FOLDER if _met(word, folder) else 0.0 for word in wanted)
        gains[places] = PATH * met / len(wanted)
    return gains


def _met(word: str, others: set[str]) -> bool:
    """Return whether a word equals one of the others, is a prefix of one, or begins with one."""
    return word in others or any(
        min(len(word), len(other)) >= _SHORTEST_PREFIX and (word.startswith(other) or other.startswith(word))
        for other in others
    )


def good_files(scores: np.ndarray, gained: np.ndarray, files: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Return gains (N,) for the best piece of each file: the sum of the file's best scores over the largest sum."""
    gains = np.zeros(len(scores))
    sums = {path: np.sort(scores[places])[-PIECES_OF_A_FILE:].sum() for path, places in files.items()}
    most = max(sums.values(), default=0.0) or 1.0
    for path, places in files.items():
        gains[places[int(np.argmax(gained[places]))]] = GOOD_FILE * sums[path] / most
    return gains


def priors(question: Question, files: Mapping[str, Sequence[int]], count: int) -> np.ndarray:
    """Return factors (N,) that lower files that re-export and, unless the question is about tests, side files."""
    factors = np.ones(count)
    about_tests = bool(_ABOUT_TESTS.search(question.text))
    for path, places in files.items():
        if not about_tests and _SIDE_FILE.search(path):
            factors[places] *= SIDE_FILES
        if _INITIAL_FILE.search(path):
            factors[places] *= INITIAL_FILES
        if path.endswith(".d.ts"):
            factors[places] *= DECLARATIONS
    return factors


def diversity(scores: np.ndarray, snippets: Sequence[Snippet]) -> np.ndarray:
    """Return factors (N,) that lower each further piece of a file more than the one before."""
    factors, seen = np.ones(len(scores)), Counter[str]()
    for place in np.argsort(-scores, kind="stable"):
        path = snippets[place].path
        factors[place] = FURTHER_PIECE ** seen[path]
        seen[path] += 1
    return factors


@dataclass(frozen=True, slots=True)
class Placed:
    """A ranked candidate: its number, its score, and what each rule added to the score or subtracted from it."""

    candidate: int
    score: float
    reasons: Mapping[str, float]


def place(
    question: Question, snippets: Sequence[Snippet], similarities: np.ndarray | None, words: np.ndarray
) -> list[Placed]:
    """Return the candidates of a question, best first.

    Args:
        question: the question.
        snippets: the candidates (N).
        similarities: (N,) cosine similarities to the question; None to rank without a model.
        words: (N,) BM25 scores; 0 for a piece without a word of the question.
    """
    if not snippets:
        return []
    weight = SIMILARITY_WEIGHT_OF_SYMBOLS if question.is_symbol else SIMILARITY_WEIGHT
    scores = fused(similarities, words, weight)
    scores = scores / (scores.max() or 1.0)
    files: defaultdict[str, list[int]] = defaultdict(list)
    for number, snippet in enumerate(snippets):
        files[snippet.path].append(number)
    reasons = {"similarity and words": scores, "definition": definitions(question, snippets)}
    reasons["path"] = paths(question, files, len(snippets))
    total = np.sum(list(reasons.values()), axis=0)
    reasons["good file"] = good_files(scores, total, files)
    total = total + reasons["good file"]
    factors = priors(question, files, len(snippets))
    reasons["kind of file"], total = total * (factors - 1), total * factors
    factors = diversity(total, snippets)
    reasons["diversity"], total = total * (factors - 1), total * factors
    return [
        Placed(int(one), float(total[one]), {name: float(gains[one]) for name, gains in reasons.items() if gains[one]})
        for one in np.argsort(-total, kind="stable")
    ]
