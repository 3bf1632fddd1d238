"""What is found by a search: functions, and windows of lines of files that hold no function."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from modular_star_encoder.data.functions import extract_functions
from modular_star_encoder.data.sources.source_files import SourceFile

_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Windows:
    """How files without functions are divided: windows of `lines` lines, each sharing `overlap` with the one before.

    Raises:
        ValueError: no lines, or an overlap that leaves no step forward.
    """

    lines: int = 40
    overlap: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.lines:
            raise ValueError(f"Windows of {self.lines} lines can't overlap by {self.overlap}: use 0 to lines - 1.")


@dataclass(frozen=True, slots=True)
class Snippet:
    """A function, or a window of lines.

    Attributes:
        path: of the file from the folder that was read, with forward slashes.
        language: lower-case name of the programming language.
        name: dotted name of the function; empty for a window.
        first_line, last_line: 1-based lines of the file, both included.
        description: first paragraph of a function's documentation in one line, or empty.
        text: what is embedded. Of a function, its code without documentation: models are trained on that, and what
            is found is what the code does.
    """

    path: str
    language: str
    name: str
    first_line: int
    last_line: int
    description: str
    text: str


def file_snippets(file: SourceFile, windows: Windows) -> list[Snippet]:
    """The functions of a file in their order, documented or not, or its windows if it has none; never empty."""
    found = [
        Snippet(
            path=file.path,
            language=function.language,
            name=function.name,
            first_line=function.line,
            last_line=last_line(function.line, function.source),
            description=function.description,
            text=function.code,
        )
        for function in extract_functions(file, documented_only=False)
    ]
    return found or list(file_windows(file, windows))


def last_line(first_line: int, source: str) -> int:
    """The line of the last character of a text that begins on `first_line`."""
    return first_line + len(_LINE_END.findall(source))


def file_windows(file: SourceFile, windows: Windows) -> Iterator[Snippet]:
    """The windows of a file that isn't blank, whatever it holds."""
    lines = _LINE_END.split(file.text)
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    for start in range(0, len(lines), windows.lines - windows.overlap):
        chosen = lines[start : start + windows.lines]
        is_last = start + windows.lines >= len(lines)
        if any(line.strip() for line in chosen):
            last = start + len(chosen)
            yield Snippet(file.path, file.language, "", start + 1, last, "", "\n".join(chosen))
        if is_last:
            return
