import asyncio
import contextlib
import gc
import gzip
import socket
import subprocess
import sys
import time
import warnings
from email.utils import formatdate

import pytest

from modular_star_encoder.utils import http
from modular_star_encoder.utils.http import HTTPClient, HTTPRequestError, check_url
from tests.errors import raises
from tests.loopback import LoopbackHandler, LoopbackServer
from tests.utils.http_server import LocalServer

TOKEN = "sk-a-very-secret-key"
BUSY = 503, {"error": {"message": "Slow down."}}, {}
CHUNKED = "\r\nTransfer-Encoding: chunked\r\n\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


@contextlib.contextmanager
def raw_server(write):
    """Context manager: the address of a server that answers by `write(send)`; `send` takes bytes."""

    class Handler(LoopbackHandler):
        wbufsize = 0  # a buffer would join the parts

        def do_GET(self):
            with contextlib.suppress(OSError):
                write(self.wfile.write)
            self.close_connection = True

    with LoopbackServer(Handler, None) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def send(answers, *, method="POST", body=None, retry_if=None, **options):
    """Return (the response to one request, all requests that arrived); the server repeats the last of `answers`."""
    with (
        LocalServer(lambda request: answers[min(request.number, len(answers) - 1)]) as server,
        HTTPClient(**{"pause": 0.001, "attempts": 3} | options) as client,
    ):
        try:
            return client.request(method, f"{server.url}/v1", body=body, retry_if=retry_if), server.requests
        except HTTPRequestError as error:
            error.requests = server.requests
            raise


def test_a_request_carries_its_body_and_token_and_returns_json():
    response, (request,) = send([(200, {"found": 1}, {})], body={"a": "ä"}, token=TOKEN)
    assert (response.status, response.json(), request.body) == (200, {"found": 1}, {"a": "ä"})
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert send([(200, b"[" * 10**5, {})])[0].json() is None
    assert send([(200, b"[" + b"[]," * 2**22 + b"1]", {})])[0].json() is None
    assert send([(429, {}, {"Retry-After": "nan"}), (200, {}, {})])[0].status == 200
    response, (request,) = send([(200, b"<html>", {})], method="GET")
    assert (response.content, response.json(), request.body) == (b"<html>", None, None)
    assert "authorization" not in request.headers
    answers = [(302, b"", {"Location": "/there"}), (200, {"there": 1}, {})]
    assert send(answers, method="GET", follow_redirects=True)[0].json() == {"there": 1}


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 503, 529, 200])
def test_failures_that_may_pass_and_successes_that_the_caller_calls_failures_are_retried(status):
    answers = [(status, {"error": "busy"}, {}), (status, {"error": ""}, {}), (200, {"ok": 1}, {})]
    response, requests = send(answers, retry_if=(lambda one: "error" in one.json()) if status == 200 else None)
    assert (response.json(), len(requests)) == ({"ok": 1}, 3)


def test_lasting_failures_are_one_sentence():
    with raises("http.no_answer", "127.0.0.1", "3 attempts", "status 503, Slow down") as caught:
        send([BUSY])
    assert (caught.value.status, caught.value.reason) == (503, "status 503, Slow down")
    assert len(caught.value.requests) == 3
    with HTTPClient(attempts=1) as client, raises("http.no_answer", "1 attempt:", "ConnectError"):
        client.request("GET", "http://127.0.0.1:9/")


@pytest.mark.parametrize(
    ("status", "message"), [(400, "x" * 290 + TOKEN), (401, f"Wrong key {TOKEN}"), (302, ""), (404, "")]
)
def test_a_refusal_stops_at_once_and_never_shows_the_token(status, message):
    with raises("http.status", f"status {status}", message.replace(TOKEN, "***")[:290]) as caught:
        send([(status, {"error": {"message": message}}, {"Location": "http://127.0.0.1:9/"})], token=TOKEN)
    assert len(caught.value.requests) == 1
    for shown in (str(caught.value), caught.value.text, caught.value.reason):
        assert TOKEN[:9] not in shown
        assert "\n" not in shown


@pytest.mark.parametrize("retry_after", ["0.2", lambda: formatdate(time.time() + 1.3, usegmt=True)])
def test_a_pause_that_the_server_names_is_kept(retry_after):
    start, value = time.monotonic(), retry_after if isinstance(retry_after, str) else retry_after()
    send([(429, {}, {"Retry-After": value}), (200, {}, {})], pause=30.0)
    assert 0.2 <= time.monotonic() - start < 5


def test_pauses_double_up_to_a_minute(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("modular_star_encoder.utils.http.asyncio.sleep", sleep)
    with raises("http.no_answer", "10 attempts"):
        send([BUSY], pause=8.0, attempts=10)
    assert len(pauses) == 9
    for number, pause in enumerate(pauses):
        assert 0.5 <= pause / min(8 * 2**number, 60) <= 1.5


def test_slow_broken_and_large_answers_are_stopped():
    def answer(request):
        if request.number == 0:
            time.sleep(0.5)
        elif request.number == 1:
            raise ConnectionError("the handler gives up without a reply")
        return 200, b"x" * 100, {}

    with LocalServer(answer) as server:
        with HTTPClient(pause=0.001, timeout=0.2, max_bytes=100) as client:
            assert client.request("GET", server.url).content == b"x" * 100
        with HTTPClient(max_bytes=99) as client, raises("http.too_large", "99"):
            client.request("GET", server.url)
    with raises("http.too_slow", "0.3", "status 503"):
        send([BUSY], pause=1.0, total_time=0.3)


@pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "zstd"])
def test_a_body_that_may_unpack_to_gigabytes_is_not_read(encoding):
    with raises("http.encoding", encoding):
        send([(200, gzip.compress(gzip.compress(bytes(10**6))), {"Content-Encoding": encoding})])
    bomb = gzip.compress(bytes(10**7))
    with raises("http.too_large"):
        send([(200, bomb, {"Content-Encoding": "gzip"})], max_bytes=10**6)


@pytest.mark.parametrize("parts", [[INTERIM * 1000], [INTERIM[:9], INTERIM[9:]]], ids=["many", "in two reads"])
def test_a_server_that_says_continue_for_ever_is_left(monkeypatch, parts):
    limit = 30 * len(b"".join(parts)) // len(INTERIM)
    monkeypatch.setattr(http, "_MAX_INTERIM", limit)

    def write(send):
        for part in parts * 60:
            send(part)
            time.sleep(0.02)  # so that one read finds one part
        send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    client, fault = HTTPClient(total_time=30, attempts=1), raises("http.too_large", f"{limit:,} interim")
    with raw_server(write) as url, client, fault:
        client.request("GET", url)


def endless(head, part=b"1000\r\n" + b"x" * 0x1000 + b"\r\n", pause=0.0):
    """Writes a response that never ends: a head and the same part again and again."""

    def write(send):
        send(head)
        while True:
            send(part)
            time.sleep(pause)

    return write


def test_the_body_of_a_redirect_or_an_error_is_read_only_a_little():
    with (
        LocalServer(lambda _: (200, {"there": 1}, {})) as there,
        raw_server(endless(f"HTTP/1.1 302 Found\r\nLocation: {there.url}{CHUNKED}".encode())) as redirecting,
        raw_server(endless(f"HTTP/1.1 401 Unauthorized{CHUNKED}".encode())) as refusing,
        HTTPClient(total_time=5, follow_redirects=True) as client,
    ):
        assert client.request("GET", redirecting).json() == {"there": 1}
        with raises("http.status", "status 401"):
            client.request("GET", refusing)
    token = "secret" * 40
    with raises("http.status") as caught:
        send([(400, b"no " + token.encode() * 300, {})], token=token)
    assert "secret" not in caught.value.text


def test_redirects_are_few_and_only_to_web_addresses_and_another_host_gets_no_token():
    with LocalServer(lambda request: (200, {"sent": request.headers.get("authorization")}, {})) as there:
        answers = [(302, b"", {"Location": "/here"}), (302, b"", {"Location": there.url})]
        response, requests = send(answers, method="GET", token=TOKEN, follow_redirects=True)
    assert response.json() == {"sent": None}
    assert [request.headers["authorization"] for request in requests] == [f"Bearer {TOKEN}"] * 2
    for location, count in (("/again", 11), ("file:///etc/passwd", 1), ("ftp://127.0.0.1/", 1)):
        with raises("http.redirect", "10 times") as caught:
            send([(302, b"", {"Location": location})], method="GET", follow_redirects=True)
        assert len(caught.value.requests) == count
    for location in ("http://[::bad/", "http://127.0.0.1:999999/", "http://\u2603/".encode().decode("latin-1")):
        with pytest.raises(HTTPRequestError):
            send([(302, b"", {"Location": location})], method="GET", follow_redirects=True)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n"])
def test_by_default_a_request_has_a_limit_of_time_that_fits_its_attempts(monkeypatch, head):
    monkeypatch.setattr(http, "_LONGEST_PAUSE", 0.2)
    client, fault = HTTPClient(attempts=2, timeout=0.3), raises("http.too_slow", "1 seconds")
    with raw_server(endless(head, b"x", 0.05)) as url, client, fault:
        client.request("GET", url)


@pytest.mark.parametrize("length", ["99", "-5", "9" * 5000])
def test_a_body_of_another_length_than_announced_is_a_failure(length):
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{{}}".encode()
    client, fault = HTTPClient(pause=0.001, attempts=2, timeout=1), raises("http.no_answer")
    with raw_server(lambda send: send(answer)) as url, client, fault:
        client.request("GET", url)


def test_cookies_are_not_kept():
    with LocalServer(lambda _: (200, {}, {"Set-Cookie": "name=value"})) as server, HTTPClient() as client:
        for _ in range(2):
            client.request("GET", server.url)
    assert not any("cookie" in request.headers for request in server.requests)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HTTPS_PROXY", "::::"), ("HTTP_PROXY", "htp:/x"), ("ALL_PROXY", "http://u:secret@[x"), ("NO_PROXY", "[::")],
)
def test_a_proxy_that_can_not_be_used_is_named_by_its_variable(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    if variable == "NO_PROXY":  # newer clients ignore a malformed host
        monkeypatch.setattr(http.httpx, "AsyncClient", lambda **_: http.httpx.URL("http://[::"))
    with raises("http.proxy", variable) as caught:
        HTTPClient()
    assert "secret" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv(variable, "127.0.0.1:3128")
    HTTPClient().close()


def test_a_client_that_was_not_closed_does_not_delay_the_end_of_the_process():
    imported = "from modular_star_encoder.utils.http import HTTPClient"
    pages = "def pages():\n    with HTTPClient():\n        yield"
    lines = (imported, pages, "cycle = [pages()]", "next(cycle[0])", "cycle.append(cycle)", "del cycle")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], timeout=30, capture_output=True, check=True)
    assert done.stderr == b""


def test_closing_while_connections_are_made_leaves_nothing_behind():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(20):
            client = HTTPClient()
            futures = [client.submit("GET", "http://localhost:9/") for _ in range(16)]
            time.sleep(0.001 * number)
            client.close()
            assert all(future.done() for future in futures)
        del client, futures
        gc.collect()
    assert not [str(one.message) for one in caught if "never awaited" in str(one.message)]


def test_requests_that_other_threads_send_while_a_client_closes_are_cancelled(monkeypatch):
    client, late = HTTPClient(), []

    async def close():
        late.append(client.submit("GET", "http://localhost:9/"))

    monkeypatch.setattr(client._client, "aclose", close)
    client.close()
    late.append(client.submit("GET", "http://localhost:9/"))
    assert [future.cancelled() for future in late] == [True, True]
    assert not client._thread.is_alive()


def test_closing_cancels_what_is_under_way_also_inside_a_running_event_loop():
    async def notebook():
        with LocalServer(lambda request: (time.sleep(3), (200, {}, {}))[1]) as server:
            client = HTTPClient()
            future = client.submit("GET", server.url)
            time.sleep(0.1)
            start = time.monotonic()
            client.close()
            client.close()
            assert future.cancelled()
            assert time.monotonic() - start < 2
        return send([(200, {"ok": 1}, {})])[0].json()

    assert asyncio.run(notebook()) == {"ok": 1}


def test_addresses_settings_and_tokens_are_checked(monkeypatch):
    assert check_url("https://api.example/v1/") == "https://api.example/v1"
    for wrong in ("file:///etc/passwd", "api.example/v1", "https://", "http://h:0", "http://a b/", "http://☃.com"):
        with raises("http.url", wrong):
            check_url(wrong)
    secrets = "http://user:s3cret@host/v1", "htp://user:s3cret@host", "user:s3cret@host", "http://me:12/s3cret@host/v1"
    for secret in secrets:
        with raises("http.url", "***@host") as caught:
            check_url(secret)
        assert "s3cret" not in str(caught.value)
    hosts = ("a\x01b", "h/\x01", "a\n", "\ud800", "h/\ud800", "１２７.0.0.1", "h:１", "[::", "h/" + "x" * 70_000)
    for wrong in hosts:
        with raises("http.url") as caught:
            check_url(f"http://{wrong}")
        assert len(str(caught.value)) < 400
    with raises("http.settings", -1):
        HTTPClient(pause=-1)
    monkeypatch.setenv("A_KEY", f"{TOKEN}\r\n")  # files of keys end in a newline
    assert http.token_from_environment("A_KEY") == TOKEN
    assert http.token_from_environment(None) == http.token_from_environment("NO_KEY", required=False) == ""
    with raises("http.token.missing", "NO_KEY"):
        http.token_from_environment("NO_KEY")
    for wrong in (f"{TOKEN}\n{TOKEN}", f"{TOKEN}…"):
        monkeypatch.setenv("A_KEY", wrong)
        with raises("http.token.characters", "A_KEY") as caught:
            http.token_from_environment("A_KEY")
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("client", ["httpx", "httpx2"])
def test_network_errors_of_both_clients_of_the_hub_become_one_sentence(client):
    error = pytest.importorskip(client).ConnectError("refused")
    with pytest.raises(OSError, match="can't be reached") as raised, http.wrap_hub_errors("me/tiny"):
        raise error
    assert raised.value.__cause__ is error
    with pytest.raises(OSError, match="can't be reached"), http.wrap_hub_errors("me/tiny"):
        raise RuntimeError("a file failed") from error


def test_a_hub_that_is_switched_off_refuses_or_never_answers_is_named_in_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        http.check_hub("http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(OSError, match=r"127\.0\.0\.1 can't be reached .*refused"):
        http.check_hub("http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are made, but nobody reads
        for scheme in ("http", "https"):
            with pytest.raises(OSError, match=r"no answer within 0\.3 seconds"):
                http.check_hub(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", seconds=0.3)
