"""Completes prompts by any server with OpenAI's chat protocol.

Each completion has the id of its request's row. Completions are matched to rows by this id, never by text or position.
"""

import operator
import re
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Field as Constraint
from pydantic import validate_call

from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.http import (
    HTTPClient,
    HTTPRequestError,
    Response,
    check_url,
    token_from_environment,
    url_host,
)
from modular_star_encoder.utils.settings import Count, NonNegative, Positive

ERROR, TOO_LONG = "error", "too_long"
# Arguments of `OpenAIBackend` that do not change the answers, except through rounding in the server.
RUN_OPTIONS = frozenset({"base_url", "api_key_variable", "concurrency", "attempts", "pause", "timeout"})


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A prompt to complete, and the id of its row, which its completion will have."""

    id: str  # id of the row
    prompt: str  # the user's message, without a chat template


@dataclass(frozen=True, slots=True)
class Completion:
    """A model's answer to one request."""

    id: str  # id of the request
    text: str  # the answer
    finish_reason: str  # as in OpenAI's protocol, or `TOO_LONG` (the prompt leaves no room for an answer), or `ERROR`
    prompt_tokens: int = 0  # chat template included; 0 if the server does not report it
    completion_tokens: int = 0  # the final token included; 0 if the server does not report it
    error: str = ""  # why the request failed; empty otherwise


class OpenAIBackend:
    """Let a server complete prompts greedily: `vllm serve`, `transformers serve`, llama.cpp, Ollama, a hosted service.

    A request that fails temporarily is sent again (see `HTTPClient`). A failure that would also hit all later requests,
    such as a wrong key, stops the run. Nothing is sent before the first prompt. Protocol: OpenAI's API reference,
    `POST /chat/completions`.

    Args:
        model: The server's name of the model.
        revision: Revision of the model. It is not sent, only shown in the dataset's card.
        max_tokens: Largest number of tokens of an answer.
        base_url: Address of the API, such as `http://127.0.0.1:8000/v1`.
        api_key_variable: Environment variable with the API key; None if the server needs no key.
        concurrency, attempts, pause, timeout: See `HTTPClient`.
        body: Fields to add to or replace in the body of every request, such as `{"repetition_penalty": 1.0}`. A field
            with the value None is not sent.
    """

    @validate_call
    def __init__(
        self,
        model: str,
        max_tokens: int,
        *,
        base_url: str,
        revision: str | None = None,
        api_key_variable: str | None = None,
        concurrency: Annotated[Count, Constraint(le=1000)] = 16,
        attempts: Annotated[Count, Constraint(le=100)] = 6,
        pause: NonNegative = 1.0,
        timeout: Positive = 300.0,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        if fixed := sorted({"messages", "model", "n", "stream"} & set(body or {})):
            raise UserError("synthconl.backend.body", f"`body` must not contain {', '.join(fixed)}; remove it.")
        http: dict[str, Any] = {"concurrency": concurrency, "attempts": attempts, "pause": pause, "timeout": timeout}
        self._url = check_url(base_url) + "/chat/completions"
        http |= {"token": token_from_environment(api_key_variable), "total_time": attempts * (timeout + 60)}
        self._open_client = partial(HTTPClient, **http, max_bytes=2**24)
        self._model, self._revision, self._concurrency = model, revision, concurrency
        body = {"model": model, "temperature": 0, "max_tokens": max_tokens} | dict(body or {})
        self._body = {name: value for name, value in body.items() if value is not None}
        self._served: set[str] = set()

    def complete(self, requests: Iterable[CompletionRequest]) -> Generator[Completion]:
        """Yield one completion for each request, in the order in which they arrive.

        At most `concurrency` requests are pending at a time; a kill of the process loses only their answers. UserError
        if no further request can be answered, as with a wrong key or a server that is down. Before it is raised, the
        completions of the other pending requests are yielded.
        """
        failure: UserError | None = None
        asked: dict[Future[Response], CompletionRequest] = {}
        remaining = iter(requests)
        with self._open_client() as client:
            while True:
                while not failure and len(asked) < self._concurrency and (request := next(remaining, None)):
                    body = self._body | {"messages": [{"role": "user", "content": request.prompt}]}
                    asked[client.submit("POST", self._url, body=body, retry_if=_is_an_error)] = request
                if not asked:
                    break
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    try:
                        yield self._completion(asked.pop(future), future)
                    except UserError as error:
                        failure = failure or error
        if failure:
            raise failure

    def describe(self) -> dict[str, Any]:
        """Return {`backend`, `model`, `revision`, `served`}; `served` lists the model names in the server's answers."""
        served = sorted(self._served)
        return {"backend": "openai", "model": self._model, "revision": self._revision, "served": served}

    def _completion(self, request: CompletionRequest, future: "Future[Response]") -> Completion:
        try:
            content = future.result().json()
        except HTTPRequestError as error:
            if error.status in (400, 413, 422):  # the fault may be this prompt's
                too_long = re.search(r"context[ _](?:length|size|window)", error.text, re.IGNORECASE)
                return Completion(request.id, "", TOO_LONG if too_long else ERROR, error=error.reason)
            raise UserError(error.key, f"Model {self._model!r}: {error}") from error
        try:
            choice = content["choices"][0]
            message, usage = choice["message"], content.get("usage") or {}
            text, refusal = message.get("content") or "", message.get("refusal")
            reason = "content_filter" if refusal and not text else choice.get("finish_reason") or "stop"
            asked, written = (operator.index(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
            if not 0 <= min(asked, written) <= max(asked, written) < 2**32:
                raise ValueError("no numbers of tokens")
            self._served.add(str(content.get("model") or self._model))
        except (TypeError, LookupError, AttributeError, ValueError):
            message = f"{url_host(self._url)} does not answer as OpenAI's chat protocol says; check `base_url`."
            raise UserError("synthconl.backend.protocol", message) from None
        return Completion(request.id, str(text), str(reason), asked, written)


def _is_an_error(response: Response) -> bool:  # with status 200, as some gateways send
    content = response.json()
    return isinstance(content, dict) and "choices" not in content and "error" in content
