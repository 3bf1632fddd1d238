"""Serve the demo page, by default only to this machine, and the indexed files that its search results link to."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from html import escape
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from pygments.formatters import HtmlFormatter

from modular_star_encoder.data.languages.registry import language_of
from modular_star_encoder.demo.page import (
    BAD_REQUEST,
    LinkTo,
    SearchPage,
    build_blocks,
    code_styles,
    highlighted,
    import_gradio,
)
from modular_star_encoder.search.hits import Hit
from modular_star_encoder.search.index import CodeIndex, file_inside
from modular_star_encoder.search.pieces import LINE_END
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.reports import printable

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
_Call = Callable[..., Awaitable[Any]]
ROUTE = "/source"
MOST_UNREAD = 400  # messages to clients, about three for each answer
LARGEST_REQUEST = 100_000  # largest number of bytes of a request's body; more are refused (HTTP status 413)
MOST_LINES, MOST_CHARACTERS = 1000, 50_000  # of a file on one page; in HTML, a character may take twenty
_LONGEST_LINE = 2000


def serve(index: CodeIndex, **options: Any) -> None:
    """Serve the demo page of an index until Ctrl-C, and print its address; `served` describes options and errors."""
    with served(index, **options) as address:
        print(f"{address}  (Ctrl-C stops the server)", flush=True)
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

    Without `host` and `port`, the environment variables GRADIO_SERVER_NAME and GRADIO_SERVER_PORT apply. `source` is
    the web address of the indexed folder, to which hits link. UserError if an argument is invalid.
    """
    host = host or os.environ.get("GRADIO_SERVER_NAME") or LOOPBACK
    if port is not None and not 1 <= port <= 65535:
        raise UserError("demo.port", f"--port must be from 1 to 65535, not {port}.")
    try:  # without this check, Gradio would try a hundred ports
        with socket.socket(socket.AF_INET) as trial:
            trial.bind((host, 0))
    except (OSError, UnicodeError) as error:
        raise UserError("demo.host", f"--host must be a name or IPv4 address of this machine, not {host!r}.") from error
    links = repository_links(source) if source else LocalFiles(index)
    gradio = import_gradio()
    blocks = build_blocks(SearchPage(index, links, checkpoint))
    options: dict[str, Any] = {"share": False, "prevent_thread_lock": True, "quiet": True, "footer_links": []}
    options |= {"run_history": False, "ssr_mode": False, "pwa": False, "mcp_server": False, "max_file_size": 0}
    options |= {"app_kwargs": _app_options(host, links, blocks), "css": code_styles() + _css("page.css")}
    theme = gradio.themes.Base(primary_hue="teal", neutral_hue="slate", **_FONTS)
    try:
        _, address, _ = blocks.launch(server_name=host, server_port=port, theme=theme, **options)
    except OSError as error:
        blocks.close()
        message = f"{f'Port {port}' if port else 'Each port tried'} on {host} is taken or not allowed. Use --port N."
        raise UserError("demo.port_taken", message) from error
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def _app_options(host: str, links: LinkTo, blocks: Any) -> dict[str, Any]:
    from starlette.middleware import Middleware
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    middleware = [Middleware(_PolicyMiddleware), Middleware(RequestBodyLimitMiddleware, max_body_size=LARGEST_REQUEST)]
    middleware.append(Middleware(_QuestionMiddleware, blocks=blocks))
    if host in _LOOPBACK_NAMES:
        # A hostile web page could make its own host name mean 127.0.0.1 and read this page (DNS rebinding).
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_NAMES))
    routes = [Route(ROUTE, _source_endpoint(links))] if isinstance(links, LocalFiles) else []
    return {"middleware": middleware, "routes": routes, "openapi_url": None}


def _source_endpoint(local: LocalFiles) -> Callable[[Request], Awaitable[HTMLResponse]]:
    from anyio import CapacityLimiter, to_thread
    from starlette.responses import HTMLResponse

    one_at_a_time = CapacityLimiter(1)  # bounds the memory of many requests, and leaves threads for questions

    async def show(request: Request) -> HTMLResponse:
        query = request.query_params
        try:
            first, last = (int(query.get(name, "0")) for name in ("first", "last"))
            page = to_thread.run_sync(local.page, query.get("path", ""), first, last, limiter=one_at_a_time)
            return HTMLResponse(await page)
        except (ValueError, OSError):
            return HTMLResponse("<!doctype html><title>mose</title><p>The index can't show this file.</p>", 404)

    return show


class _PolicyMiddleware:
    """Adds security headers to responses. After an error of the application, prints one line and sends status 400."""

    def __init__(self, app: _Call) -> None:
        self._app = app

    async def __call__(self, scope: _Scope, receive: _Call, send: _Call) -> None:
        from starlette.responses import PlainTextResponse

        policy = _SOURCE_POLICY if scope.get("path") == ROUTE else _PAGE_POLICY
        has_started = False

        async def send_with_policy(message: _Scope) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                added = [(b"content-security-policy", policy.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message["headers"], *added, (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await self._app(scope, receive, send_with_policy)
        except Exception as error:  # without this, strangers could fill the server's log with tracebacks
            if scope["type"] != "http":
                raise
            print(printable(f"mose: error: {scope['path'][:200]}: {error!r:.200}"), file=sys.stderr)
            if not has_started:
                await PlainTextResponse(BAD_REQUEST, 400)(scope, receive, send_with_policy)


class _QuestionMiddleware:
    """Answers requests that Gradio can't handle (not JSON, lone surrogates, no valid session) with HTTP status 400.

    Requests that make Gradio write files (`/deep_link`, `/upload`) get this status too.

    Only the newest `MOST_UNREAD` messages that clients have not read are kept; Gradio would keep all of them.
    """

    def __init__(self, app: _Call, blocks: Any) -> None:
        self._app, self._blocks = app, blocks

    async def __call__(self, scope: _Scope, receive: _Call, send: _Call) -> None:
        from starlette.responses import PlainTextResponse

        messages: list[_Scope] = []

        async def receive_again() -> _Scope:
            return messages.pop(0) if messages else await receive()

        if scope.get("path", "").rstrip("/").endswith(("/deep_link", "/upload")):  # Gradio would write files for ever
            return await PlainTextResponse(BAD_REQUEST, 400)(scope, receive, send)
        if scope.get("method") == "POST" and ("/queue/join" in scope["path"] or "/call/" in scope["path"]):
            messages = [await receive()]
            while messages[-1].get("more_body"):
                messages.append(await receive())
            if not _is_question(b"".join(message.get("body", b"") for message in messages)):
                return await PlainTextResponse(BAD_REQUEST, 400)(scope, receive, send)
            queues = list(self._blocks._queue.pending_messages_per_session.values())
            for queue in queues:  # the oldest session first; the queue of a client that reads is empty
                while not queue.empty() and sum(one.qsize() for one in queues) > MOST_UNREAD:
                    queue.get_nowait()
        await self._app(scope, receive_again, send)


def _is_question(body: bytes) -> bool:
    try:
        question = json.loads(body)
        json.dumps(question, ensure_ascii=False).encode()  # ValueError for lone surrogates
        return re.fullmatch(r"[!-~]{1,100}", question["session_hash"]) is not None
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def repository_links(address: str) -> LinkTo:
    """Return a `LinkTo` of addresses below `address`, such as a repository's; UserError if it is not a web address."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        example = "https://github.com/OWNER/NAME/blob/REVISION/src"
        raise UserError("demo.source", f"--source must be a folder's web address, such as {example}, not {address!r}.")

    def link_to(path: str, hit: Hit) -> str:
        lines = f"L{hit.line}" + (f"-L{hit.last_line}" if hit.last_line > hit.line else "")
        return f"{address.rstrip('/')}/{quote(path)}#{lines}"

    return link_to


class LocalFiles:
    """A `LinkTo` that links hits to the indexed files on this machine; `page` shows these files as HTML."""

    def __init__(self, index: CodeIndex) -> None:
        self._index = index

    def __call__(self, path: str, hit: Hit) -> str | None:
        """Return the address of a hit's lines, relative to the demo page; None if the file does not exist."""
        if file_inside(self._index.folder, path) is None:
            return None
        return _page_address(path, hit.line, max(hit.last_line, hit.line))

    def page(self, path: str, first: int = 0, last: int = 0) -> str:
        """Return HTML of an indexed file (of a long one, the part around `first`); mark lines `first` to `last`."""
        lines = LINE_END.split(self._index.read_file(path))
        start = end = characters = 0  # the page shows lines[start:end]
        for end, line in enumerate(lines):
            characters += min(len(line), _LONGEST_LINE)
            if end - start == MOST_LINES or characters > MOST_CHARACTERS:
                if end >= first:
                    break
                start, characters = end, min(len(line), _LONGEST_LINE)
        else:
            end = len(lines)
        marked = [*range(max(first - start, 1), min(last, end) - start + 1)]
        options = {"linenos": "inline", "linenostart": start + 1, "linespans": "L", "hl_lines": marked}
        formatter = HtmlFormatter(**options, cssclass="code", style="default")
        shown = (printable(line)[:_LONGEST_LINE] for line in lines[start:end])
        code = highlighted("\n".join(shown), language_of(PurePath(path)) or "", formatter)
        earlier = f'<a href="{escape(_page_address(path, start))}">earlier lines</a> ' if start else ""
        later = f'<a href="{escape(_page_address(path, end + 1))}">later lines</a>' if end < len(lines) else ""
        title = escape(printable(path))
        dark = HtmlFormatter(style="github-dark").get_style_defs(".code")
        dark = f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}"
        style = f"<style>{formatter.get_style_defs('.code')}\n{dark}\n{_css('source.css')}</style>"
        width = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        head = f'<head><meta charset="utf-8">{width}<title>{title}</title>{style}</head>'
        return f'<!doctype html><html lang="en">{head}<body><h1>{title} {earlier}{later}</h1>{code}</body></html>'


def _page_address(path: str, first: int, last: int = 0) -> str:
    return f"{ROUTE.removeprefix('/')}?{urlencode({'path': path, 'first': first, 'last': last})}#L-{first}"


def _css(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
