"""Serve the demo page, by default to this machine alone, and the source files that its search results link to.

A browser opens no `file://` link from a page that came over HTTP. So the page's server also shows source files, but
only those that are in the index and in the indexed folder. The page loads nothing from other servers.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

from modular_star_encoder.demo.page import SearchPage, build_blocks, import_gradio
from modular_star_encoder.demo.results import LinkTo, code_styles
from modular_star_encoder.search.hits import Hit, printable
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.vector_store import file_id
from modular_star_encoder.utils.errors import UserError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

LOOPBACK = "127.0.0.1"
_LOOPBACK_NAMES = ["127.0.0.1", "localhost"]
_FONTS: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "Menlo", "Consolas", "monospace"]}
# Gradio's page needs inline scripts and eval; everything else must come from its own server.
_PAGE_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"
_SOURCE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_Scope = MutableMapping[str, Any]
_Call = Callable[..., Awaitable[None]]
ROUTE = "/source"
LARGEST_FILE = 2_000_000
_LONGEST_LINE = 2000


def serve(index: CodeIndex, **options: Any) -> None:
    """Serve the demo page of an index until Ctrl-C, and print its address; `options` and errors: see `served`."""
    with served(index, **options) as address:
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


@contextmanager
def served(
    index: CodeIndex,
    *,
    checkpoint: str | None = None,
    host: str | None = LOOPBACK,
    port: int | None = None,
    source: str | None = None,
) -> Iterator[str]:
    """Serve the demo page of an index in the background while a `with` block runs; yield the page's address.

    Args:
        index: an index from `CodeIndex.open`.
        checkpoint: folder or Hub id of the index's checkpoint if it was moved. The page says if it is a different one.
        host: IPv4 address or name to listen at; if None, environment variable GRADIO_SERVER_NAME, else 127.0.0.1.
        port: port to listen at; if None, environment variable GRADIO_SERVER_PORT, else the first free from 7860 on.
        source: web address of the indexed folder at a revision of a repository, to which hits then link. If None, hits
            link to the files on this machine.

    Raises:
        ImportError: Gradio is not installed.
        UserError: `host` is not this machine, `port` is taken or invalid, or `source` is not a web address.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UserError("demo.port", f"--port must be from 1 to 65535, not {port}.")
    host = host or os.environ.get("GRADIO_SERVER_NAME") or LOOPBACK
    _check_host(host)
    links = repository_links(source) if source else LocalFiles(index)
    gradio = import_gradio()
    blocks = build_blocks(SearchPage(index, links, checkpoint))
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=0,
            app_kwargs=_app_options(host, links),
            theme=gradio.themes.Base(primary_hue="teal", neutral_hue="slate", **_FONTS),
            css=code_styles() + _css("page.css"),
        )
    except OSError as error:
        blocks.close()
        message = f"Port {port or 'from 7860 on'} on {host} is taken or not allowed: choose another with --port."
        raise UserError("demo.port_taken", message) from error
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def _check_host(host: str) -> None:
    """Raise UserError if this machine can't listen at `host`; without this check, Gradio tries a hundred ports."""
    with socket.socket(socket.AF_INET) as trial:
        try:
            trial.bind((host, 0))
        except (OSError, UnicodeError) as error:
            message = f"--host must be an IPv4 address or a name of this machine, not {host!r}."
            raise UserError("demo.host", message) from error


def _app_options(host: str, links: LinkTo) -> dict[str, Any]:
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    middleware = [Middleware(_PolicyMiddleware)]
    if host in _LOOPBACK_NAMES:
        # A hostile web page could make its own host name mean 127.0.0.1 and read this page (DNS rebinding).
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_NAMES))
    routes = [Route(ROUTE, _source_endpoint(links))] if isinstance(links, LocalFiles) else []
    return {"middleware": middleware, "routes": routes, "openapi_url": None}


def _source_endpoint(local: LocalFiles) -> Callable[[Request], HTMLResponse]:
    from starlette.responses import HTMLResponse

    def show(request: Request) -> HTMLResponse:
        query = request.query_params
        try:
            first, last = (int(query.get(name, "0")) for name in ("first", "last"))
            return HTMLResponse(local.page(query.get("path", ""), first, last))
        except (ValueError, OSError):
            return HTMLResponse("<!doctype html><title>mose</title><p>There is no such file in the index.</p>", 404)

    return show


class _PolicyMiddleware:
    def __init__(self, app: _Call) -> None:
        self._app = app

    async def __call__(self, scope: _Scope, receive: _Call, send: _Call) -> None:
        policy = _SOURCE_POLICY if scope.get("path") == ROUTE else _PAGE_POLICY

        async def send_with_policy(message: _Scope) -> None:
            if message["type"] == "http.response.start":
                added = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
                added["referrer-policy"] = "no-referrer"
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in added.items())]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def repository_links(address: str) -> LinkTo:
    """Return a `LinkTo` for the web address of the indexed folder at a revision; UserError if it is not one."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        example = "https://github.com/OWNER/NAME/blob/REVISION/src"
        raise UserError("demo.source", f"--source must be a folder's web address, such as {example}, not {address!r}.")

    def link_to(path: str, hit: Hit) -> str:
        lines = f"L{hit.line}" + (f"-L{hit.last_line}" if hit.last_line > hit.line else "")
        return f"{address.rstrip('/')}/{quote(path)}#{lines}"

    return link_to


class LocalFiles:
    """A `LinkTo` that links hits to the indexed files on this machine, and shows these files as HTML pages."""

    def __init__(self, index: CodeIndex) -> None:
        self._index = index
        self._root = Path(os.path.realpath(index.folder))
        self._known: set[str] = set()

    def __call__(self, path: str, hit: Hit) -> str | None:
        """Return the address of a hit's lines, relative to the page's; None if the file no longer exists."""
        if self._file(path) is None:
            return None
        query = urlencode({"path": path, "first": hit.line, "last": max(hit.last_line, hit.line)})
        return f"{ROUTE.removeprefix('/')}?{query}#L-{hit.line}"

    def page(self, path: str, first: int = 0, last: int = 0) -> str:
        """Return an HTML page that shows a file of the index, with the lines `first` to `last` (from 1) marked.

        Raises:
            UserError: the file is not in the index, not in the indexed folder, too large, or not a regular file.
        """
        file = self._file(path)
        if file is None or not self._is_indexed(path):
            raise UserError("demo.file.missing", "There is no such file in the index.")
        # O_NOFOLLOW: a link may have replaced the file after the check.
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                message = f"The file can't be shown: it has more than {LARGEST_FILE:,} bytes or is not a regular file."
                raise UserError("demo.file.large", message)
            text = opened.read().decode("utf-8", "replace")
        return _source_page(path, text, first, last)

    def _file(self, path: str) -> Path | None:
        """Return the file at a path in the indexed folder; None if missing, outside, or behind a symbolic link."""
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
        lexer = get_lexer_for_filename(path, stripnl=False)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False)
    marked = list(range(max(first, 1), min(last, len(lines)) + 1))
    formatter = HtmlFormatter(linenos="inline", linespans="L", hl_lines=marked, cssclass="code", style="friendly")
    title = escape(printable(path))
    code = highlight("\n".join(lines), lexer, formatter)
    style = f"<style>{_css('source.css')}\n{formatter.get_style_defs('.code')}</style>"
    head = f'<head><meta charset="utf-8"><title>{title}</title>{style}</head>'
    return f'<!doctype html><html lang="en">{head}<body><h1>{title}</h1>{code}</body></html>'


def _css(name: str) -> str:
    return files("modular_star_encoder.demo").joinpath(name).read_text(encoding="utf-8")
