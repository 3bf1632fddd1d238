"""Where a hit's file can be read: in a repository on the web, on a page of our own, or nowhere.

Browsers open no `file://` link from a page that came over HTTP, so files of a local index are shown by the server of
the page: files that the index holds and that lie in its folder, and no others.
"""

from __future__ import annotations

import os
import stat
from html import escape
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

from modular_star_encoder.search.hits import Hit, printable
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.vector_store import file_id
from modular_star_encoder.utils.errors import UserError

ROUTE = "/source"
LARGEST_FILE = 2_000_000
_LONGEST_LINE = 2000
_STYLE = """
body { margin: 0; font: 14px/1.5 system-ui, sans-serif; color: #1f2430; }
h1 { font-size: 15px; margin: 0; padding: 12px 20px; border-bottom: 1px solid #e3e6ec; position: sticky; top: 0;
  background: #fff; }
pre { margin: 0; padding: 12px 20px; font: 13px/1.55 ui-monospace, Menlo, Consolas, monospace; }
[id^="L-"] { scroll-margin-top: 30vh; }
body .code, body .code pre { background: #fff; }
body .code .hll { background: #fff6d6; display: block; }
"""


class RepositoryLinks:
    """Links to a repository at a revision.

    Args:
        address: of the indexed folder there, such as `https://github.com/OWNER/NAME/blob/REVISION/src`.

    Raises:
        ValueError: not an address that begins with https:// or http:// and names a host.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise UserError(
                "demo.source",
                f"{address!r} is not the address of a folder of a repository, such as "
                "https://github.com/OWNER/NAME/blob/REVISION/src.",
            )
        self._address = address.rstrip("/")

    def __call__(self, path: str, hit: Hit) -> str:
        """The address of a hit's lines."""
        lines = f"L{hit.line}" + (f"-L{hit.last_line}" if hit.last_line > hit.line else "")
        return f"{self._address}/{quote(path)}#{lines}"


class LocalFiles:
    """The files of an index that are here.

    Args:
        index: whose files are shown.
    """

    def __init__(self, index: CodeIndex) -> None:
        self._index = index
        self._root = Path(os.path.realpath(index.folder))
        self._known: set[str] = set()

    def __call__(self, path: str, hit: Hit) -> str | None:
        """The address, on the page's own server, of a hit's lines; None where the file isn't there any more."""
        if self._file(path) is None:
            return None
        query = urlencode({"path": path, "first": hit.line, "last": max(hit.last_line, hit.line)})
        return f"{ROUTE.removeprefix('/')}?{query}#L-{hit.line}"

    def page(self, path: str, first: int = 0, last: int = 0) -> str:
        """A page with a file, its lines from `first` to `last` marked.

        Raises:
            ValueError: no file of the index, one outside its folder, or one too large to show.
        """
        file = self._file(path)
        if file is None or not self._is_indexed(path):
            raise UserError("demo.file.missing", "There is no such file in the index.")
        # O_NOFOLLOW: what was a file when it was checked may be a link by now.
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                raise UserError(
                    "demo.file.large", f"The file is larger than {LARGEST_FILE:,} bytes, or not a regular file."
                )
            text = opened.read().decode("utf-8", "replace")
        return _source_page(path, text, first, last)

    def _file(self, path: str) -> Path | None:
        """The file that a path from the folder leads to without passing a link."""
        try:
            file = self._root / path
            resolved = file.resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return None
        plain = os.path.normpath(file)
        return resolved if str(resolved) == plain and resolved.is_relative_to(self._root) else None

    def _is_indexed(self, path: str) -> bool:
        wanted = file_id(path)
        if wanted not in self._known:
            self._known = set(self._index.store.files())
        return wanted in self._known


def _source_page(path: str, text: str, first: int, last: int) -> str:
    lines = [printable(line)[:_LONGEST_LINE] for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    try:
        lexer = get_lexer_for_filename(path)
    except ClassNotFound:
        lexer = TextLexer()
    lexer.stripnl = False
    marked = list(range(max(first, 1), min(last, len(lines)) + 1))
    formatter = HtmlFormatter(linenos="inline", linespans="L", hl_lines=marked, cssclass="code", style="friendly")
    title = escape(printable(path))
    code = highlight("\n".join(lines), lexer, formatter)
    style = f"<style>{_STYLE}\n{formatter.get_style_defs('.code')}</style>"
    head = f'<head><meta charset="utf-8"><title>{title}</title>{style}</head>'
    return f'<!doctype html><html lang="en">{head}<body><h1>{title}</h1>{code}</body></html>'
