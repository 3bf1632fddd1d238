"""The hits of a search, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Hit:
    """A function, or a window of lines, that answers a question.

    Attributes:
        path: path of the file, relative if it is below the working folder, else absolute.
        line: 1-based line at which the hit begins.
        name: name of the function; empty for a window.
        score: cosine similarity in a vector search; else the score of the ranking rules, as a share of the best score
            by similarity and words.
        exit_layer: the exit that ranked it; None if only words did.
        last_line: its last line; 0 if not known.
        language: lower-case name of the programming language.
        text: the code, from the definition on.
        reasons: ranking rule → what it added to the score or subtracted from it.
    """

    path: str
    line: int
    name: str
    score: float
    exit_layer: int | None
    last_line: int = 0
    language: str = ""
    text: str = ""
    reasons: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        ranked_by = "words" if self.exit_layer is None else f"exit {self.exit_layer}"
        return f"{self.path}:{self.line}  {self.score:.3f}  {self.name or '(lines)'}  ({ranked_by})"


@dataclass(frozen=True, slots=True)
class Answer:
    """The hits of one question.

    Attributes:
        question: the question's text.
        hits: best first.
        margin: how far the best similarity of the first exit leads the second; None where there are no two.
        reranked: whether a deep exit ranked the hits.
        method: how they were found: `vector`, `lexical` or `hybrid`.
    """

    question: str
    hits: list[Hit]
    margin: float | None = None
    reranked: bool = False
    method: str = "hybrid"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


BAR_WIDTH = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"
_INDENT = "    "


def format_answer(answer: Answer, *, lines: int = 3, width: int = 120, explain: bool = False) -> str:
    """A line for each hit (place, score, name), and the first lines of its code.

    Bars show similarities on a scale from 0 to 1, and lexical and hybrid scores as shares of the best score.

    Args:
        answer: what to show.
        lines: number of code lines to show for each hit.
        width: longer lines of code are cut.
        explain: also show what each ranking rule added.
    """
    whole = 1.0 if answer.method == "vector" else max((hit.score for hit in answer.hits), default=1.0)
    shown = []
    for hit in answer.hits:
        reasons = [", ".join(f"{name} {gain:+.2f}" for name, gain in hit.reasons.items())] if explain else []
        below = [*reasons, *_code_lines(hit, lines, width - len(_INDENT))]
        shown.append("\n".join([_headline(hit, whole), *(_INDENT + line for line in below)]))
    return "\n".join(shown) if shown else "nothing found"


def score_bar(share: float, width: int = BAR_WIDTH) -> str:
    """A bar of `width` characters for a share; below 0 it is empty, above 1 full."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def printable(text: str) -> str:
    """Replace unprintable characters, because untrusted code and file names could control a terminal."""
    return "".join(character if character.isprintable() else "�" for character in text.replace("\t", _INDENT))


def _headline(hit: Hit, whole: float) -> str:
    bar = score_bar(hit.score / whole if whole else 0.0)
    return printable(f"{hit.path}:{hit.line}  {bar} {hit.score:.3f}  {hit.name or '(lines)'}  ({_ranked_by(hit)})")


def _ranked_by(hit: Hit) -> str:
    return "words" if hit.exit_layer is None else f"exit {hit.exit_layer}"


def _code_lines(hit: Hit, count: int, width: int) -> list[str]:
    """The first lines that aren't blank."""
    chosen = [line for line in hit.text.splitlines() if line.strip()][:count]
    return [printable(line)[:width].rstrip() for line in chosen]
