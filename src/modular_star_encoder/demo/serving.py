"""Serve the page: on this machine alone unless told otherwise, and with nothing from anywhere else in it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from modular_star_encoder.demo.page import ExitCosts, SearchPage, build_blocks, import_gradio
from modular_star_encoder.demo.session import SearchSession, code_styles
from modular_star_encoder.demo.source_view import ROUTE, LocalFiles, RepositoryLinks
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.utils.errors import UserError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

LOOPBACK = "127.0.0.1"
_LOOPBACK_NAMES = ["127.0.0.1", "localhost"]
_FONTS = ["system-ui", "sans-serif"]
_MONOSPACED = ["ui-monospace", "Menlo", "Consolas", "monospace"]
# Gradio's page runs inline scripts and builds templates with eval; all it is made of must come from its own server.
_PAGE_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"
_SOURCE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_Scope = MutableMapping[str, Any]
_Call = Callable[..., Awaitable[None]]


def serve(
    index: CodeIndex,
    *,
    checkpoint: str | None = None,
    host: str | None = LOOPBACK,
    port: int | None = None,
    source: str | None = None,
) -> None:
    """Serve the page of an index until Ctrl-C.

    Args:
        index: as `CodeIndex.open` gives it.
        checkpoint: where its checkpoint is now, if not where it was; if it is another one, the page says so.
        host: address to bind; None for GRADIO_SERVER_NAME (a Space sets it), else this machine alone.
        port: None for GRADIO_SERVER_PORT, else the first free one from 7860 on.
        source: address of the indexed folder in a repository, at a revision; None to show files from here.

    Raises:
        ImportError: Gradio isn't installed.
        ValueError: the host isn't this machine, the port is taken or none, or `source` is no address.
    """
    with served(index, checkpoint=checkpoint, host=host, port=port, source=source) as address:
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
    """Serve the page from threads of this process while the block runs; the arguments are those of `serve`.

    Yields:
        The page's address.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UserError("demo.port", f"A port is a number from 1 to 65535, not {port}.")
    host = host or os.environ.get("GRADIO_SERVER_NAME") or LOOPBACK
    _check_host(host)
    local = None if source else LocalFiles(index)
    link_to = RepositoryLinks(source) if source else local
    gradio = import_gradio()
    session = SearchSession(index, checkpoint)
    costs = ExitCosts.of(session.checkpoint, index.settings.checksum)
    blocks = build_blocks(SearchPage(session, costs, link_to))
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
            app_kwargs=_app_options(host, local),
            theme=gradio.themes.Base(primary_hue="teal", neutral_hue="slate", font=_FONTS, font_mono=_MONOSPACED),
            css=code_styles() + files("modular_star_encoder.demo").joinpath("page.css").read_text(encoding="utf-8"),
        )
    except OSError as error:
        blocks.close()
        taken = f"Port {port}" if port else "Every port that was tried"
        raise UserError(
            "demo.port_taken", f"{taken} on {host} is taken or not allowed. Name another with --port."
        ) from error
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def _check_host(host: str) -> None:
    """Gradio tries a hundred ports before it gives up a host that can't be bound, and knows no IPv6."""
    with socket.socket(socket.AF_INET) as trial:
        try:
            trial.bind((host, 0))
        except (OSError, UnicodeError) as error:
            raise UserError(
                "demo.host", f"--host must be an IPv4 address or name of this machine, not {host!r}."
            ) from error


def _app_options(host: str, local: LocalFiles | None) -> dict[str, Any]:
    """What is added to Gradio's application: who may ask, headers, and the pages of files."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    middleware = [Middleware(_PolicyMiddleware)]
    if host in _LOOPBACK_NAMES:
        # A hostile web page may give its own name to 127.0.0.1, and would then read this one.
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_NAMES))
    routes = [Route(ROUTE, _source_endpoint(local))] if local else []
    return {"middleware": middleware, "routes": routes, "openapi_url": None}


def _source_endpoint(local: LocalFiles) -> Callable[[Request], HTMLResponse]:
    """The endpoint that shows a file; Starlette runs it in a thread."""
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
    """Adds a content security policy to every response; the stream of results passes untouched."""

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
