"""Completions from any endpoint that speaks OpenAI's chat protocol: vLLM, SGLang, llama.cpp, Ollama, hosted services.

Requests run concurrently on an event loop in a thread of its own. What an endpoint does not answer for a while (a full
queue, a restart, a time-out) is asked for again after a pause; what no further request could mend stops the run.

Source of the protocol: the reference of OpenAI's API, `POST /chat/completions`.
"""

import asyncio
import os
import random
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

try:
    import httpx2
except ImportError as error:
    raise ImportError("Asking an endpoint needs httpx2: pip install 'modular-star-encoder[dataset]'.") from error

from modular_star_encoder.synthconl.completions import ERROR, TOO_LONG, BackendError, Completion, CompletionRequest

_DOUBTFUL_REQUEST = (400, 413, 422)
# What OpenAI, vLLM, SGLang and llama.cpp say of prompts that are too long.
_CONTEXT = re.compile(r"context[ _](?:length|size|window)", re.IGNORECASE)
_PASSING_STATUS = (408, 409, 425, 429)
_LONGEST_PAUSE = 60.0
_LONGEST_MESSAGE = 300
_FIXED = ("messages", "model", "n", "stream")


class OpenAIBackend:
    """Asks an endpoint; up to `concurrency` requests are under way at once.

    Attributes:
        in_flight: `concurrency`.
    """

    def __init__(
        self,
        model: str,
        max_tokens: int,
        *,
        base_url: str,
        revision: str | None = None,
        api_key_variable: str | None = None,
        concurrency: int = 16,
        attempts: int = 6,
        pause: float = 1.0,
        timeout: float = 300.0,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the settings; nothing is sent.

        Args:
            model: Name of the model, as the endpoint knows it.
            max_tokens: Largest number of tokens of an answer.
            base_url: URL of the API, such as `http://127.0.0.1:8000/v1`.
            revision: Revision of the model that is served, if you know it: for the dataset's card.
            api_key_variable: Name of the environment variable with the key; None for an endpoint that needs none.
            concurrency: Number of requests under way at once.
            attempts: How often a request is sent when the endpoint is busy, fails or does not answer.
            pause: Seconds before the second attempt, on average; twice as many before each further one, up to 60. What
                the endpoint asks for (`Retry-After`) comes first.
            timeout: Seconds without an answer after which an attempt has failed.
            body: More fields of a request's body (`{"repetition_penalty": 1.0}`), or others: a field that is None here
                is not sent.

        Raises:
            ValueError: If a setting is out of range, or the environment variable is not set.
        """
        if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).hostname:
            raise ValueError(f"base_url must be a URL such as http://127.0.0.1:8000/v1, not {base_url!r}.")
        if concurrency < 1 or attempts < 1 or pause < 0 or timeout <= 0:
            raise ValueError("concurrency and attempts must be at least 1, pause at least 0, and timeout above 0.")
        fixed = sorted(set(body or {}) & set(_FIXED))
        if fixed:
            raise ValueError(f"The body of a request can't set {', '.join(fixed)}.")
        self._key = _api_key(api_key_variable)
        self._address = base_url.rstrip("/") + "/chat/completions"
        self._host = urlsplit(base_url).netloc.rpartition("@")[2]
        self._model, self._revision = model, revision
        self._body = {"model": model, "temperature": 0, "max_tokens": max_tokens} | dict(body or {})
        self._attempts, self._pause, self._timeout = attempts, pause, timeout
        self._served: set[str] = set()
        self.in_flight = concurrency

    def complete(self, requests: Iterable[CompletionRequest]) -> Iterator[Completion]:
        """See `CompletionBackend`. When one request fails for good, those under way are waited for and yielded."""
        failures: list[BackendError] = []
        with _event_loop() as loop, self._client(loop) as client:
            waiting: set[Future[Completion]] = set()
            for request in requests:
                waiting.add(asyncio.run_coroutine_threadsafe(self._answer(client, request), loop))
                if len(waiting) >= self.in_flight:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from _results(done, failures)
                    if failures:
                        break
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from _results(done, failures)
        if failures:
            raise failures[0]

    def describe(self) -> dict[str, Any]:
        """The model, its revision as told, and the names of what the endpoint says it has served."""
        served = sorted(self._served)
        return {"backend": "openai", "model": self._model, "revision": self._revision, "served": served}

    @contextmanager
    def _client(self, loop: asyncio.AbstractEventLoop) -> Iterator[httpx2.AsyncClient]:
        client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=self._timeout,
            limits=httpx2.Limits(max_connections=self.in_flight, max_keepalive_connections=self.in_flight),
        )
        try:
            yield client
        finally:
            asyncio.run_coroutine_threadsafe(_abandon(client), loop).result()

    async def _answer(self, client: httpx2.AsyncClient, request: CompletionRequest) -> Completion:
        body = self._body | {"messages": [{"role": "user", "content": request.prompt}]}
        body = {name: value for name, value in body.items() if value is not None}
        problem, asked_for = "", None
        for attempt in range(self._attempts):
            if attempt:
                # Half of it is random, lest all requests come back at once.
                pause = min(self._pause * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.5)  # noqa: S311
                await asyncio.sleep(pause if asked_for is None else asked_for)
            try:
                reply = await client.post(self._address, json=body)
            except httpx2.TransportError as error:
                problem, asked_for = f"no answer ({type(error).__name__})", None
                continue
            if reply.is_success:
                completion = self._completion(request, reply)
                if completion:
                    return completion
            elif reply.status_code in _DOUBTFUL_REQUEST:
                said = self._said(reply)
                return Completion(request.id, "", TOO_LONG if _CONTEXT.search(reply.text) else ERROR, error=said)
            elif reply.status_code < 500 and reply.status_code not in _PASSING_STATUS:
                raise BackendError(f"{self._host} refuses requests for model {self._model!r}: {self._said(reply)}.")
            problem, asked_for = self._said(reply), _retry_after(reply)
        tries = "attempt" if self._attempts == 1 else "attempts"
        raise BackendError(f"{self._host} does not answer after {self._attempts} {tries}: {problem}.")

    def _completion(self, request: CompletionRequest, reply: httpx2.Response) -> Completion | None:
        """The completion in a reply; None if it says it is an error after all, as gateways do.

        Raises:
            BackendError: If the reply is not of the protocol.
        """
        content = _json(reply)
        if isinstance(content, dict) and "choices" not in content and "error" in content:
            return None
        try:
            choice = content["choices"][0]
            message, usage = choice["message"], content.get("usage") or {}
            text, refusal = message.get("content") or "", message.get("refusal")
            reason = "content_filter" if refusal and not text else choice.get("finish_reason") or "stop"
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            self._served.add(str(content.get("model") or self._model))
        except (TypeError, LookupError, AttributeError, ValueError):
            raise BackendError(f"{self._host} answers, but not in OpenAI's chat protocol: is base_url right?") from None
        return Completion(request.id, str(text), str(reason), *counts)

    def _said(self, reply: httpx2.Response) -> str:
        """Status and message of a reply in one line, without the key, which some endpoints repeat."""
        content = _json(reply)
        error = content.get("error", content) if isinstance(content, dict) else None
        message = error.get("message", "") if isinstance(error, dict) else error or ""
        message = " ".join(str(message).split())
        if self._key:
            message = message.replace(self._key, "***")
        message = message[:_LONGEST_MESSAGE].rstrip(".")
        return f"status {reply.status_code}" + (f", {message}" if message else "")


def _api_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"The environment variable {variable} must hold the API key of the endpoint.")
    return key


def _json(reply: httpx2.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return None


def _retry_after(reply: httpx2.Response) -> float | None:
    """The seconds that the endpoint asks to wait; None if it does not say, or says it as a date."""
    try:
        seconds = float(reply.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(max(seconds, 0.0), _LONGEST_PAUSE)


def _results(done: Iterable[Future[Completion]], failures: list[BackendError]) -> Iterator[Completion]:
    for future in done:
        try:
            completion = future.result()
        except BackendError as error:
            failures.append(error)
        else:
            yield completion


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread: the caller may be in one already, as notebooks are, and threads can't be cancelled."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _abandon(client: httpx2.AsyncClient) -> None:
    """Cancel what is under way, and close the connections."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()
