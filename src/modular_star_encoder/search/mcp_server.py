"""The tools of `mose mcp`: agents search an index over the Model Context Protocol.

Answers are text of at most `MOST_CHARACTERS`, with paths relative to the indexed folder; files outside it are not read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from modular_star_encoder.data.sources import decode_source
from modular_star_encoder.search.hits import Hit, printable
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.pieces import LINE_END
from modular_star_encoder.utils.errors import UserError, naming_extra

MOST_CHARACTERS = 12_000
"""Longest answer: about 3,000 tokens."""
MOST_HITS = 20
MOST_LINES = 400
_LARGEST_FILE = 2_000_000


def build_server(index: CodeIndex) -> Any:
    """Return an `MCPServer` with the tools `search`, `related` and `read`; `search` refreshes the index first.

    Raises:
        ImportError: the extra `mcp` is not installed.
    """
    with naming_extra():
        from mcp.server import MCPServer

    root = Path(os.path.realpath(index.folder))
    server = MCPServer("mose", instructions="Finds code of one repository by what it does, by name, or by likeness.")

    def shown(hits: list[Hit]) -> str:
        parts = []
        for hit in hits:
            path = os.path.relpath(os.path.realpath(hit.path), root)
            code = "\n".join(printable(line) for line in hit.text.split("\n"))
            parts.append(f"{printable(path)}:{hit.line}-{hit.last_line} {printable(hit.name)}\n{code}")
        return _cut("\n\n".join(parts) or "nothing found")

    @server.tool()
    def search(question: str, top_k: int = 5, path: str | None = None) -> str:
        """Find code by a question in prose or by a symbol's name; `path` limits it to files such as 'src/**'."""
        index.refresh()
        (answer,) = index.search([question], top_k=min(max(top_k, 1), MOST_HITS), path=path)
        return shown(answer.hits)

    @server.tool()
    def related(path: str, line: int, top_k: int = 5) -> str:
        """Find code that resembles the code at a line of a file; `path` is relative to the repository."""
        return shown(index.related(path, line, top_k=min(max(top_k, 1), MOST_HITS)))

    @server.tool()
    def read(path: str, first_line: int = 1, last_line: int = MOST_LINES) -> str:
        """Read the lines `first_line` to `last_line`, at most 400, of a file; `path` is relative to the repository."""
        file = Path(os.path.normpath(root / path))
        if not file.is_relative_to(root) or file.resolve() != file or not file.is_file():  # no link leads out either
            raise UserError("search.mcp.path", f"{path!r} is not a file of the repository. Name one by its path in it.")
        if file.stat().st_size > _LARGEST_FILE:
            raise UserError("search.mcp.size", f"{path!r} has more than {_LARGEST_FILE:,} bytes, too many to read.")
        lines = LINE_END.split(decode_source(file.read_bytes())[0])
        first = max(first_line, 1)
        chosen = lines[first - 1 : min(last_line, first + MOST_LINES - 1)]
        return _cut("\n".join(f"{number}\t{printable(line)}" for number, line in enumerate(chosen, first)))

    return server


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}\n… cut"
