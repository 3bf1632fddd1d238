"""The tools of `mose mcp`, with which agents search an index and read its files (Model Context Protocol)."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, BinaryIO, cast

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from modular_star_encoder.search.hits import Hit
from modular_star_encoder.search.index import LONGEST_QUESTION, CodeIndex
from modular_star_encoder.search.pieces import LINE_END
from modular_star_encoder.search.vector_store import LONGEST_PATH, readable_path
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.reports import printable

MOST_CHARACTERS = 12_000  # largest number of characters of an answer: about 3,000 tokens
MOST_HITS = 20
MOST_LINES = 400
_Question = Annotated[str, Field(max_length=LONGEST_QUESTION)]
_Path = Annotated[str, Field(max_length=LONGEST_PATH)]


@contextmanager
def _errors_as_answers() -> Iterator[None]:
    """Context manager and decorator: replace a UserError or OSError by an MCP ToolError with the same message."""
    try:
        yield
    except (UserError, OSError) as error:
        is_gone = isinstance(error, UserError) and error.key == "search.index.rebuilt"
        raise ToolError(printable(str(error)) + " To open it again, restart `mose mcp`." * is_gone) from error


def build_server(index: CodeIndex) -> MCPServer:
    """Return an MCP server with the tools `search`, `related` and `read`. Each call updates the index first."""
    root = readable_path(os.path.realpath(index.folder))  # as the paths of hits
    server = MCPServer("mose", instructions="Finds code in one repository by a description, by name, or by similarity.")

    def shown(hits: list[Hit]) -> str:
        parts = []
        for hit in hits:
            path = os.path.relpath(os.path.realpath(hit.path), root)
            code = "\n".join(printable(line) for line in hit.text.split("\n"))
            parts.append(f"{printable(path)}:{hit.line}-{hit.last_line} {printable(hit.name)}\n{code}")
        return _cut("\n\n".join(parts) or "nothing found") + index.report.gap().replace(" ", "\n\n", 1)

    def inside(path: str) -> str:
        is_other_form = path.startswith(("./", f"{root}/"))
        return os.path.relpath(os.path.join(root, path), root).replace(os.sep, "/") if is_other_form else path

    @server.tool()
    @_errors_as_answers()
    def search(question: _Question, top_k: int = 5, path: _Path | None = None) -> str:
        """Find code by a question in prose or a symbol's name. `path`, such as 'src/**', selects files to search."""
        index.refresh()
        (answer,) = index.search([question], top_k=min(max(top_k, 1), MOST_HITS), path=path)
        if not answer.hits:
            index.check_filter(None, path)
        return shown(answer.hits)

    @server.tool()
    @_errors_as_answers()
    def related(path: _Path, line: int, top_k: int = 5) -> str:
        """Find code that resembles the code at a line of a file; `path` is relative to the repository."""
        index.refresh()
        return shown(index.related(inside(path), line, top_k=min(max(top_k, 1), MOST_HITS)))

    @server.tool()
    @_errors_as_answers()
    def read(path: _Path, first_line: int = 1, last_line: int = MOST_LINES) -> str:
        """Read lines `first_line` to `last_line` of a file, at most 400; `path` is relative to the repository."""
        index.refresh()
        lines = LINE_END.split(index.read_file(inside(path)))
        first = max(first_line, 1)
        count = len(lines) - (not lines[-1])
        if not first <= min(last_line, count):
            raise ToolError(f"{printable(path)} has {count:,} lines, none from {first_line} to {last_line}.")
        chosen = lines[first - 1 : min(last_line, first + MOST_LINES - 1)]
        return _cut("\n".join(f"{number}\t{printable(line)}" for number, line in enumerate(chosen, first)))

    return server


class _Input(io.BufferedIOBase):
    """A stream of JSON lines from a binary file, with � for each lone surrogate (`\\ud800`), which mcp can't decode."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1, /) -> bytes:
        line = self._file.readline()
        if b"\\ud" in line.lower():
            with suppress(ValueError, RecursionError):  # not JSON: the library reports it
                text = json.dumps(json.loads(line), ensure_ascii=False)
                return re.sub("[\ud800-\udfff]", "�", text).encode() + b"\n"
        return line


def serve(index: CodeIndex) -> None:
    """Serve the tools of `build_server` on stdin and stdout until stdin ends; UserError if either stream is closed."""
    if sys.stdin is None or sys.stdout is None:
        raise UserError("mcp.closed", "`mose mcp` needs an open stdin and stdout. Let an agent start the command.")
    own = sys.stdin
    sys.stdin = io.TextIOWrapper(cast(Any, _Input(own.buffer)))  # with `close`, which worker processes call
    try:
        build_server(index).run("stdio")
    finally:
        sys.stdin = own


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}\n… cut"
