"""An HTTP client with time-outs, size limits and retries, and checks of web addresses and of access to the Hub.

Requests run on an event loop in a thread of the client. The message of every error is one sentence without secrets.
"""

import asyncio
import contextlib
import http.client
import http.cookiejar
import json
import os
import random
import re
import ssl
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import parse_json

try:  # huggingface_hub 2 installs httpx2, and 1 installs httpx
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

_PASSING_STATUSES = frozenset({408, 409, 425, 429})
_ENCODINGS = "gzip, deflate"
_DECODED = frozenset({"", "identity", "gzip", "deflate"})
_LONGEST_PAUSE = 60.0
_MAX_INTERIM = 100_000  # answers such as `100 Continue` over one connection, which httpcore reads without a limit
_INTERIM = re.compile(rb"HTTP/\d\.\d 1\d\d")
_MAX_UNWANTED = 2**16  # bytes that are read of the body of an error or redirect
_MAX_REDIRECTS = 10
_SECONDS_TO_CLOSE = 1.0
_WEB = ("http", "https")
T = TypeVar("T")
LOG_IN = "The Hub needs a token: log in with `hf auth login`, or set HF_TOKEN."


class HTTPRequestError(UserError):
    """Raised when a request has failed and is not sent again.

    Attributes describe the last response: `status` (None if no response came), `reason`, such as "status 401, Incorrect
    API key provided", and `text`, the start of the body with `***` in place of the token.
    """

    def __init__(self, key: str, message: str, *, status: int | None = None, reason: str = "", text: str = "") -> None:
        super().__init__(key, message)
        self.status, self.reason, self.text = status, reason, text


@dataclass(frozen=True, slots=True)
class Response:
    """A successful response: status, headers (names in lower case) and the whole body, decompressed."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """Return the body's JSON value, or None if the body is not JSON in UTF-8, too large or nested too deeply."""
        try:
            return parse_json(self.content.decode("utf-8-sig"), finite=False)
        except ValueError:
            return None


_Check = Callable[[Response], bool]


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that looks up addresses in daemon threads, so that a slow look-up does not delay Python's exit."""

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        return asyncio.wrap_future(in_daemon_thread(func, *args), loop=self)


class HTTPClient:
    """Sends requests to http and https addresses. Use it as a context manager: leaving it cancels pending requests.

    After a temporary failure (status 408, 409, 425, 429 or 5xx, a time-out, a broken connection) a request is sent
    again. The response's header `Retry-After` sets the pause (at most 60 seconds). Without it, the first pause
    is `pause` seconds, each later one twice as long up to 60, with a random change of up to half. No cookies are kept.

    Args:
        token: bearer token for every request; empty for none. Error messages do not show it.
        concurrency: largest number of requests at the same time; further requests wait.
        attempts: largest number of times that one request is sent.
        pause: seconds before the second attempt.
        timeout: seconds without any data after which an attempt has failed.
        total_time: limit in seconds for one request with all its attempts and pauses; by default,
            `attempts` × (`timeout` + 60).
        max_bytes: largest size in bytes of a response's body after decompression of gzip or deflate.
        follow_redirects: whether to follow up to 10 redirects, also to other hosts, which do not get the token.
    """

    def __init__(
        self,
        *,
        token: str = "",
        concurrency: int = 16,
        attempts: int = 6,
        pause: float = 1.0,
        timeout: float = 60.0,
        total_time: float | None = None,
        max_bytes: int = 2**26,
        follow_redirects: bool = False,
    ) -> None:
        check_http_settings(concurrency=concurrency, attempts=attempts, pause=pause, timeout=timeout)
        self._token, self._attempts, self._pause = token, attempts, pause
        self._total_time = attempts * (timeout + _LONGEST_PAUSE) if total_time is None else total_time
        self._max_bytes, self._follow_redirects = max_bytes, follow_redirects
        self._slots = asyncio.Semaphore(concurrency)
        self._client = _client(
            headers={"Accept-Encoding": _ENCODINGS} | ({"Authorization": f"Bearer {token}"} if token else {}),
            timeout=timeout,
            cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self._loop, self._closing, self._is_closed = _Loop(), threading.Lock(), False
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all pending requests, and close the connections. Later requests are cancelled at once."""
        with self._closing:
            if self._is_closed or sys.is_finalizing():  # when Python ends, daemon threads no longer run
                return
            self._is_closed = True

        async def abandon() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                if getattr(task.get_coro(), "cr_code", None) is HTTPClient._send.__code__:  # each cancels its own tasks
                    task.cancel()
            try:
                async with asyncio.timeout(_SECONDS_TO_CLOSE):
                    await asyncio.gather(*others, return_exceptions=True)
                    await self._client.aclose()
            finally:
                self._loop.stop()  # only now, so that no cancelled request is left without an end

        asyncio.run_coroutine_threadsafe(abandon(), self._loop)
        self._thread.join(2 * _SECONDS_TO_CLOSE)
        if not self._thread.is_alive():
            self._loop.close()

    def request(self, method: str, url: str, *, body: Any = None, retry_if: _Check | None = None) -> Response:
        """Send a request, wait and return its response; arguments and errors are those of `submit`."""
        return self.submit(method, url, body=body, retry_if=retry_if).result()

    def submit(self, method: str, url: str, *, body: Any = None, retry_if: _Check | None = None) -> "Future[Response]":
        """Start a request; return a future that gives its response, or raises HTTPRequestError if the request fails.

        A request fails if no attempt gets a status below 300. `body` is sent as JSON. If `retry_if(response)` is true,
        the request is sent again, because some gateways report a failure with a success status.
        """
        with self._closing:  # what is submitted before `close` begins is cancelled by it
            if not self._is_closed:
                return asyncio.run_coroutine_threadsafe(self._send(method, url, body, retry_if), self._loop)
        (future := Future[Response]()).cancel()
        return future

    async def _send(self, method: str, url: str, body: Any, retry_if: _Check | None) -> Response:
        key, fault = "no_answer", f"does not answer after {self._attempts} attempt{'s' * (self._attempts > 1)}"
        failed: dict[str, Any] = {"reason": "no answer"}
        retry_after = ""
        async with self._slots:
            try:
                async with asyncio.timeout(self._total_time):
                    for attempt in range(self._attempts):
                        if attempt:
                            await asyncio.sleep(self._seconds_to_wait(attempt, retry_after))
                        try:
                            response = await self._receive(method, url, body)
                        except httpx.RequestError as error:
                            failed, retry_after = {"reason": f"no answer ({type(error).__name__})"}, ""
                            continue
                        if response.status < 300 and not (retry_if and retry_if(response)):
                            return response
                        failed, retry_after = self._failure(response), response.headers.get("retry-after", "")
                        if 300 <= response.status < 500 and response.status not in _PASSING_STATUSES:
                            key, fault = "status", "refuses the request"
                            break
            except TimeoutError:
                key, fault = "too_slow", f"took more than {self._total_time:g} seconds"
        # Only the host is named, because the rest of the address may contain a secret.
        raise HTTPRequestError(f"http.{key}", f"{url_host(url)} {fault}: {failed['reason']}.", **failed)

    async def _receive(self, method: str, url: str, body: Any) -> Response:
        content: dict[str, Any] = {}
        if body is not None:
            # JSON has an escape for half a surrogate pair, which UTF-8 can't encode.
            text = json.dumps(body, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
            content = {"content": text, "headers": {"Content-Type": "application/json"}}
        trace = {"trace": partial(_limit_interim, url_host(url))}
        request = self._client.build_request(method, url, extensions=trace, **content)
        for _ in range(_MAX_REDIRECTS + 1):
            async with contextlib.aclosing(await self._client.send(request, stream=True)) as stream:
                received = await self._content(stream, url_host(url))
            if not (self._follow_redirects and stream.next_request):
                return Response(stream.status_code, dict(stream.headers), received)
            request = stream.next_request
            if not is_web_address(str(request.url)):
                break
        message = f"{url_host(url)} redirects more than {_MAX_REDIRECTS} times, or to an address without http or https."
        raise HTTPRequestError("http.redirect", message, status=stream.status_code)

    async def _content(self, stream: httpx.Response, host: str) -> bytes:
        """Return the body of a response; for an error or a redirect, at most `_MAX_UNWANTED` bytes of the body."""
        content = bytearray()
        if (encoding := stream.headers.get("content-encoding", "").strip().lower()) not in _DECODED:
            # httpx decodes a whole chunk at once. With two encodings, or a rare one, it may grow to gigabytes.
            message = f"{host} sends content encoded as {encoding[:40]!r}; only {_ENCODINGS} can be read."
            raise HTTPRequestError("http.encoding", message, status=stream.status_code)
        async for part in stream.aiter_bytes():
            content += part
            if stream.status_code >= 300 and len(content) > _MAX_UNWANTED:
                return bytes(content[:_MAX_UNWANTED].rpartition(b" ")[0])  # not half a secret
            if len(content) > self._max_bytes:
                message = f"{host} sends more than the limit of {self._max_bytes:,} bytes."
                raise HTTPRequestError("http.too_large", message, status=stream.status_code)
        return bytes(content)

    def _failure(self, response: Response) -> dict[str, Any]:
        text = hide_secrets(response.content.decode(errors="replace"), self._token)
        content = response.json()
        error = content.get("error", content) if isinstance(content, dict) else None
        message = error.get("message", "") if isinstance(error, dict) else error or ""
        message = hide_secrets(" ".join(str(message).split()), self._token)[:300].rstrip(".")
        reason = f"status {response.status}" + (f", {message}" if message else "")
        return {"reason": reason, "status": response.status, "text": text[:4096]}

    def _seconds_to_wait(self, attempt: int, retry_after: str) -> float:
        for seconds in (float, lambda date: parsedate_to_datetime(date).timestamp() - time.time()):
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                return min(max(0.0, seconds(retry_after)), _LONGEST_PAUSE)  # in this order, NaN gives 0
        return min(self._pause * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.5)  # noqa: S311


async def _limit_interim(host: str, event: str, info: Mapping[str, Any]) -> None:
    """httpcore calls this at each step; raise HTTPRequestError after `_MAX_INTERIM` responses of status 1xx."""
    if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
        connection = info["return_value"]
        read, count, end = connection.read, 0, b""

        async def limited(*arguments: Any, **options: Any) -> bytes:
            nonlocal count, end
            content: bytes = await read(*arguments, **options)
            begun = end + content  # a status line may come in two reads
            count, end = count + len(_INTERIM.findall(begun)), begun[-11:]
            if count > _MAX_INTERIM:
                message = f"{host} sends more than the limit of {_MAX_INTERIM:,} interim responses (status 1xx)."
                raise HTTPRequestError("http.too_large", message)
            return content

        connection.read = limited


def in_daemon_thread(
    function: Callable[..., T], *arguments: Any, slots: contextlib.AbstractContextManager[Any] | None = None
) -> "Future[T]":
    """Call `function(*arguments)` in a new thread once `slots` (a semaphore) is free; return the future of the result.

    Unlike the threads of an executor, this thread does not delay the end of the process.
    """
    future: Future[T] = Future()

    def call() -> None:
        with slots or contextlib.nullcontext():
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _client(**options: Any) -> httpx.AsyncClient:
    """Return an `httpx.AsyncClient`; UserError (`http.proxy`) if an environment variable names an invalid proxy."""
    name, needed = "NO_PROXY", "host names such as localhost,.example.org"
    for scheme, proxy in urllib.request.getproxies().items():
        url = proxy if ":/" in proxy else f"http://{proxy}"
        if scheme in (*_WEB, "all") and not is_web_address(url, (*_WEB, "socks5", "socks5h")):
            name, needed = f"{scheme.upper()}_PROXY", "an address such as http://127.0.0.1:3128"
    with contextlib.suppress(httpx.InvalidURL):  # its message may show a password
        if name == "NO_PROXY":
            return httpx.AsyncClient(**options)
    message = f"The environment variable {name} (or {name.lower()}) must contain {needed}; correct it or unset it."
    raise UserError("http.proxy", message)


def check_http_settings(*, concurrency: int, attempts: int, pause: float, timeout: float) -> None:
    """Raise UserError (`http.settings`) if one of these arguments of `HTTPClient` is out of its range."""
    if concurrency < 1 or attempts < 1 or pause < 0 or timeout <= 0:
        given = f"not concurrency={concurrency}, attempts={attempts}, pause={pause} and timeout={timeout}"
        message = "`concurrency` and `attempts` must be at least 1, `pause` at least 0, and `timeout` above 0"
        raise UserError("http.settings", f"{message}, {given}.")


def is_web_address(url: str, schemes: Sequence[str] = _WEB) -> bool:
    """Return whether a request can be sent to `url`: whether it is a valid address with one of `schemes`."""
    with contextlib.suppress(ValueError, httpx.InvalidURL):  # raised, for example, for a port that is not a number
        parts, host = urlsplit(url), httpx.URL(url).host
        return parts.scheme in schemes and bool(host) and parts.port != 0 and url.isprintable() and " " not in url
    return False


def check_url(url: str) -> str:
    """Return `url` without slashes at its end; UserError (`http.url`) if it is not http or https, or has an `@`."""
    if is_web_address(url) and "@" not in url.partition("?")[0]:  # reports and cards show addresses
        return url.rstrip("/")
    shown = re.sub(r"((?<=://)|^).*@", "***@", url, count=1) if isinstance(url, str) and "@" in url else url
    message = "must be an http or https address without user name and password, such as https://api.openai.com/v1"
    raise UserError("http.url", f"{shown!r:.200} {message}. Put an API key in an environment variable.")


def url_host(url: str) -> str:
    """Return the host and port of a web address, without user name and password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def token_from_environment(variable: str | None, *, required: bool = True) -> str:
    """Return the token in the environment variable that `variable` names; "" if `variable` is None.

    If the environment variable is unset or empty, raise UserError (`http.token.missing`) if `required`, else return "".
    UserError (`http.token.characters`) if the token has characters other than printable ASCII.
    """
    token = os.environ.get(variable, "").strip() if variable else ""
    fault = "" if token.isascii() and token.isprintable() else "characters"
    if fault or (variable and required and not token):
        found = "has characters other than printable ASCII" if fault else "is empty or not set"
        message = f"The environment variable {variable} {found}. Set it to the endpoint's API key."
        raise UserError(f"http.token.{fault or 'missing'}", message)
    return token


def hide_secrets(text: str, token: str = "") -> str:
    """Return `text` with `***` in place of `token`, of Hub tokens, and of words with `sk-`, such as OpenAI's keys."""
    text = re.sub(r"\bhf_\w{20,}", "***", text.replace(token, "***") if token else text)
    return " ".join("***" if "sk-" in word else word for word in text.split(" ")) if "sk-" in text else text


def check_repository_id(repository: str) -> None:
    """Raise UserError (`hub.repository_id`) if `repository` is not a Hub id of the form owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with contextlib.suppress(HFValidationError):
        validate_repo_id(repository)
        if "/" in repository:
            return
    raise UserError("hub.repository_id", f"{repository!r} is not the id of a Hub repository of the form owner/name.")


def check_hub(endpoint: str | None = None, *, seconds: float = 5.0) -> None:
    """Raise OSError if HF_HUB_OFFLINE is set or the Hub at `endpoint` (or HF_ENDPOINT) does not answer in `seconds`.

    Without this check, huggingface_hub would wait for an answer without a limit. Behind a proxy, only HF_HUB_OFFLINE is
    checked.
    """
    address = endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not is_web_address(address):
        raise OSError("The variable HF_ENDPOINT is not an address such as https://huggingface.co: correct or unset it.")
    url, reason = urlsplit(address), ""

    def ask() -> None:
        kind = http.client.HTTPConnection if url.scheme == "http" else http.client.HTTPSConnection
        with (  # after one of these errors, the host has answered; huggingface_hub has its own certificates
            contextlib.suppress(ssl.SSLError, http.client.HTTPException),
            contextlib.closing(kind(url.hostname or "", url.port, timeout=seconds)) as connection,
        ):
            connection.request("HEAD", url.path or "/")
            connection.getresponse()

    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        reason = "HF_HUB_OFFLINE is set"
    elif not {url.scheme, "all"} & urllib.request.getproxies().keys():
        try:
            in_daemon_thread(ask).result(seconds)  # `timeout` does not limit the look-up of the host's address
        except TimeoutError:
            reason = f"no answer within {seconds:g} seconds"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if reason:
        how = "check the network and the environment variables HTTPS_PROXY, HF_ENDPOINT and HF_HUB_OFFLINE"
        raise OSError(f"{url.hostname} can't be reached ({reason}): {how}.")


_NOT_OF_THE_HUB = (OSError, MemoryError, ImportError, AssertionError, ArithmeticError, UserError)


@contextlib.contextmanager
def wrap_hub_errors(repository: str) -> Iterator[None]:
    """Context manager for uploads: turn errors of the Hub or network into OSError, whose message hides the token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # huggingface_hub uses httpx or httpx2, depending on its version; both may be installed.
    modules = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    network_errors = tuple(module.TransportError for module in modules if module)
    try:
        yield
    except Exception as error:  # of any class: huggingface_hub checks few of the types in an answer
        modules_passed = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
        # huggingface_hub wraps the error of a single file in a RuntimeError.
        cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
        reason = hide_secrets(str(cause).strip(), get_token() or "")
        if isinstance(cause, LocalTokenNotFoundError):
            message = LOG_IN
        elif isinstance(cause, HfHubHTTPError) and cause.response.status_code == 412:  # there is a newer commit
            message = f"{repository} was changed by someone else; nothing was uploaded. Check it and upload again."
        elif isinstance(cause, network_errors):
            message = f"The Hub can't be reached ({type(cause).__name__}); upload again later."
        elif isinstance(error, HfHubHTTPError | RuntimeError):
            reason = reason.partition("\n")[0]
            message = f"The Hub refuses the upload to {repository}: {reason}"
        elif isinstance(error, _NOT_OF_THE_HUB) or not any(
            name.startswith("huggingface_hub") for name in modules_passed
        ):
            raise  # a fault of a local file, of this machine, or of ours
        elif isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            message = f"A request to the Hub about {repository} failed: {' '.join(reason.split())}"
        else:
            message = "The Hub sent an answer of an unknown form. Check the address in HF_ENDPOINT."
        raise OSError(message) from error
