"""The hits of a search as data, and functions that format them as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from modular_star_encoder.utils.reports import printable


@dataclass(frozen=True, slots=True)
class Hit:
    """A piece of code that answers a question: a function, a class or other lines."""

    path: str  # relative if the file is below the working folder, else absolute
    line: int  # 1-based line at which the definition begins; of a part of a very long definition, the first line
    name: str  # of the function or class; empty for other lines
    score: float  # with the method `vector`, the cosine similarity; otherwise the sum of `reasons`
    exit_layer: int | None  # the exit whose embeddings ranked the hit; None if it was ranked without embeddings
    last_line: int = 0  # 1-based last line of the definition; 0 if unknown
    language: str = ""  # lower-case name of the programming language
    text: str = ""  # the code from `line` to `last_line`
    reasons: Mapping[str, float] = field(default_factory=dict)  # {name of a ranking rule: what it adds to the score}
    best_line: int = 0  # 1-based line to show first; for a part of a very long definition, the best matching line

    def __str__(self) -> str:
        return printable(f"{self.path}:{self.best_line or self.line}  {self.summary()}")

    def summary(self) -> str:
        """Return a text such as `0.512  Stack.push  (exit 9)`; it ends with `(words)` if no exit ranked the hit."""
        ranked_by = "words" if self.exit_layer is None else f"exit {self.exit_layer}"
        return f"{self.score:.3f}  {self.name or '(lines)'}  ({ranked_by})"


@dataclass(frozen=True, slots=True)
class Answer:
    """The hits of a search for one question."""

    question: str
    hits: list[Hit]  # best first
    margin: float | None = None  # largest minus second-largest similarity before re-ranking; None without a second
    reranked: bool = False  # whether a deeper exit ranked the best hits again
    method: str = "hybrid"  # how the hits were found: `vector`, `lexical` or `hybrid`

    def to_dict(self, *, explain: bool = False) -> dict[str, Any]:
        """Return the answer of `mose search --json`; `explain` adds `reasons` to hits. Later versions may add keys."""
        values = asdict(self)
        if not explain:
            for hit in values["hits"]:
                del hit["reasons"]
        return values


_EIGHTHS = " ▏▎▍▌▋▊▉"
_INDENT = "    "


def format_answer(answer: Answer, *, lines: int = 3, width: int = 120, explain: bool = False) -> str:
    """Return text: for each hit, a line with path, line number, bar, score and name, then up to `lines` lines of code.

    A full bar stands for the best hit's score or, with the method `vector`, for 1. `explain` adds a line about what
    each ranking rule adds to the score.
    """
    whole = 1.0 if answer.method == "vector" else max((hit.score for hit in answer.hits), default=1.0) or 1.0
    shown = []
    for hit in answer.hits:
        first = hit.best_line or hit.line
        shown.append(printable(f"{hit.path}:{first}  {score_bar(hit.score / whole)} {hit.summary()}"))
        if explain:
            shown.append(_INDENT + ", ".join(f"{name} {gain:+.2f}" for name, gain in hit.reasons.items()))
        code = [line for line in hit.text.split("\n")[first - hit.line :] if line.strip()][:lines]
        shown += [_INDENT + printable(line)[: width - len(_INDENT)].rstrip() for line in code]
    return "\n".join(shown) if shown else "nothing found"


def score_bar(share: float, width: int = 10) -> str:
    """Return a bar of `width` characters for a share from 0 (empty) to 1 (full); shares beyond count as 0 or 1."""
    eighths = round(min(max(0.0, share), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)
