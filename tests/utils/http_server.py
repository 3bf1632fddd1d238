"""A local HTTP server whose answers come from a function of the test."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.loopback import LoopbackHandler, LoopbackServer


@dataclass
class Request:
    """A request as it arrived: its number from 0, path with query, headers (names in lower case) and JSON body."""

    number: int
    path: str
    headers: dict[str, str]
    body: Any


class LocalServer(LoopbackServer):
    """Answers every request by `answer(request)`: (status, content as bytes or JSON, headers).

    Attributes:
        url: its address, without a slash at the end.
        requests: what has arrived.
        most_at_once: the largest number of requests that were under way together.
    """

    def __init__(self, answer: Callable[[Request], tuple[int, Any, dict[str, str]]]) -> None:
        super().__init__(_Handler, self)
        self.answer, self.url = answer, f"http://127.0.0.1:{self.server_port}"
        self.requests: list[Request] = []
        self.under_way = self.most_at_once = 0
        self.lock = threading.Lock()

    def respond(self, request: Request) -> tuple[int, Any, dict[str, str]]:
        return self.answer(request)


class _Handler(LoopbackHandler):
    def do_GET(self):
        server, length = self.server.owner, int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        headers = {name.lower(): value for name, value in self.headers.items()}
        with server.lock:
            request = Request(len(server.requests), self.path, headers, body)
            server.requests.append(request)
            server.under_way += 1
            server.most_at_once = max(server.most_at_once, server.under_way)
        try:
            reply = server.respond(request)
        finally:
            with server.lock:
                server.under_way -= 1
        self.reply(*reply)

    do_POST = do_GET
