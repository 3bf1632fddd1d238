"""Words of code and of questions, as BM25 compares them: identifiers, their parts, and the stems of both."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import PurePosixPath

from modular_star_encoder.search.pieces import Snippet

_WORD = re.compile(r"[^\W\d][\w$]*|\d+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+|\d+")
_STOP_WORD = re.compile(
    r"an?|and|are|as|at|be|by|can|do|does|for|from|how|i|if|in|into|is|its?|not|of|on|or|that|the|this|to|use|used|using"
    r"|via|was|we|what|when|where|which|with|you",
    re.IGNORECASE,
)
_SHORTEST_STEM = 3
_WEIGHT_OF_NAME = 2
_DEFINES = "defines:"


@lru_cache(maxsize=200_000)
def _stems(word: str) -> tuple[str, ...]:
    """Stems of a word's parts, and of the whole if it has several."""
    parts = [part.lower() for part in _PART.findall(word)]
    whole = [word.lower().strip("_$")] if len(parts) > 1 else []
    return tuple(_stem(part) for part in [*parts, *whole])


def _stem(word: str) -> str:
    """The word without the endings of English plurals and verbs: `parsing`, `parses` and `parsed` are `pars`."""
    for ending in ("ing", "ies", "ed", "es", "s"):
        if len(word) > _SHORTEST_STEM + 1 and word.endswith(ending) and len(word) - len(ending) >= _SHORTEST_STEM:
            word = word[: -len(ending)] + ("y" if ending == "ies" else "")
            break
    if len(word) > _SHORTEST_STEM and word[-1] == "e":
        word = word[:-1]
    if len(word) > _SHORTEST_STEM and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    return word


def stems(text: str) -> list[str]:
    """The stems of the words of a text: `getHTTPResponse` is get, http, respons and gethttprespons."""
    return [stem for word in _WORD.findall(text) for stem in _stems(word)]


def parts(text: str) -> set[str]:
    """The stems of the parts of the words of a text."""
    return {_stem(part.lower()) for part in _PART.findall(text)}


def question_stems(question: str) -> list[str]:
    """What BM25 looks for: each stem once, without the words that say nothing, unless there are no others."""
    words = _WORD.findall(question)
    telling = [word for word in words if not _STOP_WORD.fullmatch(word)] or words
    return sorted({stem for word in telling for stem in _stems(word)})


def telling_parts(question: str) -> set[str]:
    """Stems of the parts of a question's words that may name a file."""
    words = " ".join(word for word in _WORD.findall(question) if not _STOP_WORD.fullmatch(word))
    return {_stem(part.lower()) for part in _PART.findall(words) if len(part) > 2}


def definition_word(name: str) -> str:
    """The word of a piece that defines `name`."""
    return _DEFINES + re.sub(r"\s", "", name.lower().rstrip("!?"))


def snippet_words(snippet: Snippet) -> list[str]:
    """What BM25 compares of a piece: its text, its name, its file's name twice, its folder's, and what it defines."""
    path = PurePosixPath(snippet.path)
    place = f"{path.stem} " * _WEIGHT_OF_NAME + path.parent.name
    return [*stems(f"{snippet.text} {snippet.name} {place}"), *map(definition_word, snippet.defines)]
