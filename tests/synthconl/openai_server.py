"""A loopback server of OpenAI's chat protocol, whose answers come from a function."""

import json
import threading
from collections.abc import Callable
from typing import Any

from modular_star_encoder.synthconl.backends import TOO_LONG, Completion
from tests.loopback import LoopbackHandler, LoopbackServer

Answer = Callable[[str], Completion]
Fault = Callable[[int, dict[str, Any], dict[str, str]], tuple[int, Any, dict[str, str]] | None]


class OpenAIServer(LoopbackServer):
    """Serves while it is used as a context manager.

    `fault` sees the number of a request, its body and its headers, and may give another reply.
    """

    def __init__(self, answer: Answer, fault: Fault | None = None) -> None:
        super().__init__(_Handler, self)
        self.answer, self.fault = answer, fault
        self.prompts: list[str] = []  # of the requests that were answered with a completion
        self.bodies: list[dict[str, Any]] = []  # of all requests
        self.lock = threading.Lock()
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(LoopbackHandler):
    def do_POST(self) -> None:
        owner: OpenAIServer = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            number = len(owner.bodies)
            owner.bodies.append(body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = owner.fault(number, body, headers) if owner.fault else None
        if reply is None and self.path != "/v1/chat/completions":
            reply = 404, {"error": {"message": "Not found"}}, {}
        if reply is None:
            prompt = body["messages"][0]["content"]
            completion = owner.answer(prompt)
            if completion.error:
                code = "context_length_exceeded" if completion.finish_reason == TOO_LONG else None
                reply = 400, {"error": {"message": completion.error, "code": code}}, {}
            else:
                with owner.lock:
                    owner.prompts.append(prompt)
                reply = 200, _content(body["model"], completion), {}
        self.reply(*reply)


def _content(model: str, completion: Completion) -> dict[str, Any]:
    message = {"role": "assistant", "content": completion.text}
    usage = {"prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens}
    choice = {"index": 0, "message": message, "finish_reason": completion.finish_reason}
    return {"id": "chatcmpl-0", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}
