"""What a search answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Hit:
    """A function, or a window of lines, that answers a question.

    Attributes:
        path: leads to the file from where the folder was named.
        line: 1-based line at which it begins.
        name: of the function; empty for a window.
        score: the cosine similarity, at `exit_layer`; of a lexical search the BM25 score, of a fused one the sum of
            reciprocal ranks.
        exit_layer: the exit that ranked it; None if only words did.
        last_line: its last line; 0 if not known.
        language: lower-case name of the programming language.
        text: the code, without the function's documentation.
    """

    path: str
    line: int
    name: str
    score: float
    exit_layer: int | None
    last_line: int = 0
    language: str = ""
    text: str = ""

    def __str__(self) -> str:
        ranked_by = "words" if self.exit_layer is None else f"exit {self.exit_layer}"
        return f"{self.path}:{self.line}  {self.score:.3f}  {self.name or '(lines)'}  ({ranked_by})"


@dataclass(frozen=True, slots=True)
class Answer:
    """The hits of one question.

    Attributes:
        question: as it was asked.
        hits: best first.
        margin: how far the best similarity of the first exit leads the second; None where there are no two.
        reranked: whether a deep exit ranked the hits.
        method: how they were found: `vector`, `lexical` or `fused`.
    """

    question: str
    hits: list[Hit]
    margin: float | None = None
    reranked: bool = False
    method: str = "vector"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
