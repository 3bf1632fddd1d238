"""Answers as text for people."""

from __future__ import annotations

from modular_star_encoder.search.hits import Answer, Hit

BAR_WIDTH = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"
_INDENT = "    "


def format_answer(answer: Answer, *, lines: int = 3, width: int = 120) -> str:
    """A line for each hit (place, score, name), and the first lines of its code.

    Similarities are drawn on a scale from 0 to 1; scores of words and of fused rankings as shares of the best.

    Args:
        answer: what to show.
        lines: of code for each hit.
        width: longer lines of code are cut.
    """
    whole = 1.0 if answer.method == "vector" else max((hit.score for hit in answer.hits), default=1.0)
    shown = [
        "\n".join([_headline(hit, whole), *(_INDENT + line for line in _code_lines(hit, lines, width - len(_INDENT)))])
        for hit in answer.hits
    ]
    return "\n".join(shown) if shown else "nothing found"


def score_bar(share: float, width: int = BAR_WIDTH) -> str:
    """A bar of `width` characters for a share; below 0 it is empty, above 1 full."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def printable(text: str) -> str:
    """Text without what could steer a terminal: code and names of files are anybody's."""
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
