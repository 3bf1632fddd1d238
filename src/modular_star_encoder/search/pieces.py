"""Divide files into pieces (functions, classes or other lines), the rows of an index; find their words for BM25."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from modular_star_encoder.data.languages.function_finder import Definition, outline
from modular_star_encoder.data.languages.parsing import MAX_LINE_BYTES, UnparsableSourceError

SMALL_CLASS = 20  # largest number of lines of a class that stays one piece; a longer class is divided into its members
MOST_LINES = 60  # largest number of lines of a block of other lines, and of each part of a long function
EMBEDDED_CHARACTERS = 1600
_WEIGHT_OF_NAME, _WEIGHT_OF_FILE_NAME = 4, 2  # how often a piece's name and its file's name count
_LONGEST_FUNCTION = 2 * MOST_LINES  # a function with more lines is divided
_LONGEST_LINE = MAX_LINE_BYTES // 4  # in characters (of up to four bytes); the rest of a longer line is left out
_LONGEST_NAME = 400  # in characters; of a longer dotted name, the end is kept
_FEWEST_LETTERS = 8
LINE_END = re.compile(r"\r\n|\r|\n")
# Lines before a definition that belong to it: comments, decorators and attributes.
_LEADING = re.compile(r"\s*(//|#(?!\s*(include|define|if|endif|pragma)\b)|/\*|\*|--|@|\[\[?[A-Z])")
_IMPORT = re.compile(
    r"""^[ \t]*(?:
        (?:import|from|use|using|package|module|require\w*|include|namespace|alias|extern[ ]crate|pub[ ](?:use|mod)|mod
          |\#[ ]*(?:include|import|pragma[ ]once)|source|<\?php)\b
        | export\b[^\n;]*\bfrom\b | export\s*\{ | (?:pub[ ])?(?:const|let|var|local)\b[^\n]*=\s*(?:require|@import)\b
        | ["']use[ ]strict["']
    )(?:[^\n]*[({][ \t]*\n(?:[^(){}]|[({][^(){}]*[)}])*[)}][^\n]*|[^\n]*)$""",
    re.MULTILINE | re.VERBOSE,
)
_COMMENT_START = re.compile(r"/\*|\{-")
_COMMENT_ENDS = {"/*": "*/", "{-": "-}"}
_LICENCE = re.compile(r"copyright|licen[sc]e|SPDX", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Snippet:
    """A piece of a file, such as a function. A search compares pieces with the question, and its hits are pieces."""

    path: str  # path of the file relative to the indexed folder, with forward slashes
    language: str  # lower-case name; empty if the language is unknown
    name: str  # dotted name of the function or class, or of the class around these lines; else empty
    first_line: int  # 1-based number of the first line of the piece
    last_line: int  # 1-based number of the last line of the piece
    text: str  # the text of these lines
    line: int = 0  # 1-based number of the line where the definition begins, after comments and decorators
    defines: tuple[str, ...] = ()  # names that the piece defines, such as `push` for `Stack.push`

    def embedded(self) -> str:
        """Return the text to embed: the file's folder and name, four times the name of the piece, and its code."""
        place = " ".join(self.path.split("/")[-2:])
        return f"{place}{f' {self.name}' * _WEIGHT_OF_NAME}\n{self.text}"[:EMBEDDED_CHARACTERS]


def file_pieces(path: str, language: str, text: str) -> list[Snippet]:
    """Return a file's pieces in order: functions, classes and blocks of other lines, except blocks with few letters."""
    lines = LINE_END.split(text)
    if max(map(len, lines)) > _LONGEST_LINE:
        text = "\n".join(line if len(line) <= _LONGEST_LINE else "" for line in lines)
        lines = [line[:_LONGEST_LINE] for line in lines]
    try:
        definitions = outline(text, language) if language else []
    except UnparsableSourceError:
        definitions = []
    # Names that a statement defines besides its first would each count as an inner definition of the one before.
    statements = [one for one in definitions if not one.repeats]
    return list(_Divider(path, language, lines, definitions).pieces(0, len(lines), statements, ""))


class _Divider:
    def __init__(self, path: str, language: str, lines: list[str], definitions: Sequence[Definition]) -> None:
        self._path, self._language, self._lines = path, language, lines
        self._definitions = [one for one in definitions if one.kind != "extension"]
        self._starts = [one.start for one in self._definitions]

    def pieces(self, start: int, end: int, definitions: Sequence[Definition], outer: str) -> Iterator[Snippet]:
        """Divide lines `start` to `end`, which hold `definitions`, into pieces; `outer` names the class around them."""
        at, place = start, 0
        while place < len(definitions):
            one = definitions[place]
            following = place + 1
            while following < len(definitions) and definitions[following].start < one.end:
                following += 1
            inner, place = definitions[place + 1 : following], following
            if one.start < at:  # it begins on the last line of the previous definition
                continue
            first = one.start
            while first > at and _LEADING.match(self._lines[first - 1]):
                first -= 1
            yield from self._block(at, first, outer)
            name = f"{outer}.{one.name}"[-_LONGEST_NAME:] if outer else one.name
            is_small = one.end - first <= SMALL_CLASS and (one.kind != "extension" or len(inner) < 2)
            if one.kind != "function" and inner and not is_small:
                yield from self.pieces(first, one.end, inner, name)
            else:
                step = MOST_LINES if one.end - first > _LONGEST_FUNCTION else one.end - first
                for top in range(first, one.end, step):
                    yield self._snippet(top, min(top + step, one.end), name, max(top, one.line))
            at = one.end
        yield from self._block(at, end, outer)

    def _block(self, start: int, end: int, name: str) -> Iterator[Snippet]:
        """Yield lines `start` to `end` as pieces of at most `MOST_LINES` lines, but no pieces with few letters."""
        filled = [number for number in range(start, end) if self._lines[number].strip()]
        start, end = (filled[0], filled[-1] + 1) if filled else (end, end)
        for first in range(start, end, MOST_LINES):
            last = min(first + MOST_LINES, end)
            if sum(map(str.isalnum, "".join(self._lines[first:last]))) >= _FEWEST_LETTERS:
                yield self._snippet(first, last, name)

    def _snippet(self, first: int, end: int, name: str, line: int | None = None) -> Snippet:
        inside = self._definitions[bisect_left(self._starts, first) : bisect_left(self._starts, end)]
        if line is None:  # a block may begin with the decorators of a class
            line = inside[0].line if inside and inside[0].line < end else first
        names = tuple(dict.fromkeys(one.name.rpartition(".")[2] for one in inside))
        text = "\n".join(self._lines[first:end])
        return Snippet(self._path, self._language, name, first + 1, end, text, line + 1, names)


def is_boilerplate(snippet: Snippet) -> bool:
    """Return whether a piece is no answer to any question: it defines no name, and has only imports or a licence."""
    if snippet.defines or snippet.language == "markdown":
        return False
    text = _without_licences(snippet.text)
    lines = [line for line in _IMPORT.sub("", text).split("\n") if line.strip()]
    return not lines or (bool(_LICENCE.search(text)) and all(map(_LEADING.match, lines)))


def _without_licences(text: str) -> str:
    """Return `text` without block comments that contain a licence, in linear time even if comments are not closed."""
    last_ends = {start: text.rfind(end) for start, end in _COMMENT_ENDS.items()}
    kept, at = [], 0
    for start in _COMMENT_START.finditer(text):
        if at <= start.start() and start.end() <= last_ends[start[0]]:
            end = text.index(_COMMENT_ENDS[start[0]], start.end()) + 2
            kept.append(text[at : start.start()])
            if not _LICENCE.search(text, start.start(), end):
                kept.append(text[start.start() : end])
            at = end
    return "".join(kept) + text[at:]


_WORD = re.compile(r"[^\W\d][\w$]*|\d+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+|\d+")
_STOP_WORD = re.compile(
    r"an?|and|are|as|at|be|by|can|do|does|for|from|how|i|if|in|into|is|its?|not|of|on|or|that|the|this|to|use|used|using"
    r"|via|was|we|what|when|where|which|with|you",
    re.IGNORECASE,
)
_SHORTEST_STEM = 3

_LONGEST_REMEMBERED, _MOST_REMEMBERED = 100, 500_000


class Memo(dict[str, Any]):
    """A dictionary that maps a text to `function(text)`, computed at the first look-up; faster than `lru_cache`."""

    def __init__(self, function: Callable[[str], Any]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, key: str) -> Any:
        value = self._function(key)
        if len(key) <= _LONGEST_REMEMBERED:
            if len(self) >= _MOST_REMEMBERED:
                self.clear()
            self[key] = value
        return value


def _stems(text: str) -> list[str]:
    """Return the stems of all words and of their parts: `camelCase` gives camel, cas and camelcas."""
    found = []
    for word in _WORD.findall(text):
        parts = [part.lower() for part in _PART.findall(word)]
        whole = [word.lower().strip("_$")] if len(parts) > 1 else []
        found += [*map(_part_stems.__getitem__, parts), *map(_stem, whole)]
    return found


_part_stems = Memo(lambda part: _stem(part))
_joined_stems = Memo(lambda text: " ".join(_stems(text)))
# All ASCII characters that separate words.
_SEPARATORS = str.maketrans({one: " " for one in map(chr, range(128)) if not (one.isalnum() or one in "_$")})


def _stem(word: str) -> str:
    """Return a word without the endings of English plurals and verbs: `pars` for `parsing`, `parses` and `parsed`."""
    for ending in ("ing", "ies", "ed", "es", "s"):
        if len(word) > _SHORTEST_STEM + 1 and word.endswith(ending) and len(word) - len(ending) >= _SHORTEST_STEM:
            word = word[: -len(ending)] + ("y" if ending == "ies" else "")
            break
    if len(word) > _SHORTEST_STEM and word[-1] == "e":
        word = word[:-1]
    if len(word) > _SHORTEST_STEM and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    return word


def stems(text: str) -> str:
    """Return the stems of a text's words: `getHTTPResponse` gives "get http respons gethttprespons"."""
    runs = text.translate(_SEPARATORS).split() if text.isascii() else _WORD.findall(text)
    return " ".join(filter(None, map(_joined_stems.__getitem__, runs)))


def parts(text: str) -> set[str]:
    """Return the stems of the parts of a text's words: `getHTTPResponse` gives get, http and respons."""
    return {_stem(part.lower()) for part in _PART.findall(text)}


def question_stems(question: str) -> list[str]:
    """Return a question's stems for BM25, sorted. Stop words are left out if the question has other words."""
    words = _WORD.findall(question)
    telling = [word for word in words if not _STOP_WORD.fullmatch(word)] or words
    return sorted(set(stems(" ".join(telling)).split()))


def best_line(snippet: Snippet, question: str) -> int:
    """Return the 1-based line to show: `snippet.line`; of a function's later part, the line most like the question."""
    if snippet.name.rpartition(".")[2] in ("", *snippet.defines):
        return snippet.line
    wanted = set(question_stems(question))
    met = [wanted.intersection(stems(line).split()) for line in snippet.text.split("\n")]
    counts = [(len(one.union(*met[at + 1 : at + 3])), len(one)) for at, one in enumerate(met)]
    return max(snippet.line, snippet.first_line + counts.index(max(counts)))


def telling_parts(question: str) -> set[str]:
    """Return the stems of the parts of a question's words, without stop words and parts of fewer than 3 letters."""
    words = " ".join(word for word in _WORD.findall(question) if not _STOP_WORD.fullmatch(word))
    return {_stem(part.lower()) for part in _PART.findall(words) if len(part) > 2}


def definition_word(name: str) -> str:
    """Return the word that `snippet_words` adds for a definition of `name`: `Push` gives "defines:push"."""
    return "defines:" + re.sub(r"\s", "", name.lower().rstrip("!?"))


def snippet_words(snippet: Snippet) -> str:
    """Return a piece's words for BM25: stems of its text, name, file and folder, and a `definition_word` per name."""
    words = stems(f"{snippet.text}{f' {snippet.name}' * _WEIGHT_OF_NAME} {_place(snippet.path)}")
    return " ".join([words, *map(definition_word, snippet.defines)])


@lru_cache(maxsize=16)
def _place(path: str) -> str:
    place = PurePosixPath(path)
    return f"{place.stem} " * _WEIGHT_OF_FILE_NAME + place.parent.name
