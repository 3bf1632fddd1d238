"""What the back end adds to `utils.http`, whose retries, limits and hidden tokens have tests of their own."""

import threading
import time
from itertools import islice

import pytest

from modular_star_encoder.synthconl.backends import BackendError, Completion, CompletionRequest, OpenAIBackend
from tests.errors import raises
from tests.synthconl.openai_server import OpenAIServer

KEY = "sk-a-very-secret-key"


def echo(prompt):
    return Completion("", prompt.upper(), "stop", 3, 4)


def requests(count):
    return [CompletionRequest(f"row {i}", f"prompt {i}") for i in range(count)]


def complete(server, count=1, **options):
    options = {"pause": 0.01, "attempts": 3} | options
    return list(OpenAIBackend("model", 5, base_url=server.base_url, **options).complete(requests(count)))


def first_times(number, reply):
    """A fault of the first `number` requests."""
    return lambda count, *_: reply if count < number else None


BUSY = 429, {"error": {"message": "Slow down."}}, {}


def test_a_busy_endpoint_is_asked_again_and_one_that_stays_busy_stops_the_run():
    with OpenAIServer(echo, first_times(2, BUSY)) as server:
        (completion,) = complete(server)
        assert (completion.id, completion.text, len(server.bodies)) == ("row 0", "PROMPT 0", 3)
    with OpenAIServer(echo, first_times(99, BUSY)) as server, raises("http.no_answer", "'model'", "429, Slow down"):
        complete(server)
    with raises("http.no_answer", "'model'", "1 attempt", "Connect"):
        complete(server, attempts=1)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, f"Incorrect API key provided: {KEY}."), (404, "The model `model` does not exist."), (302, "")],
)
def test_a_refusal_stops_at_once_and_hides_the_key(monkeypatch, status, message):
    monkeypatch.setenv("A_KEY", KEY)
    headers = []

    def fault(number, body, sent):
        headers.append(sent)
        return status, {"error": {"message": message}}, {}

    expected = message.replace(KEY, "***").rstrip(".")
    with OpenAIServer(echo, fault) as server, raises("http.status", "'model'", f"status {status}", expected) as error:
        complete(server, api_key_variable="A_KEY")
    assert isinstance(error.value, BackendError)
    assert KEY[:5] not in str(error.value)
    assert "\n" not in str(error.value)
    assert [sent["authorization"] for sent in headers] == [f"Bearer {KEY}"]


def test_without_a_key_none_is_sent():
    headers = []
    with OpenAIServer(echo, lambda number, body, sent: headers.append(sent)) as server:
        complete(server)
    assert headers[0]["content-type"] == "application/json"
    assert "authorization" not in headers[0]


def test_what_is_under_way_when_a_request_fails_is_still_received():
    arrived = threading.Semaphore(0)

    def fault(number, *_):
        if number == 3:
            for _ in range(3):
                arrived.acquire(timeout=5)
            return 401, {"error": {"message": "No more credit."}}, {}
        arrived.release()
        time.sleep(0.2)
        return None

    received = []
    with OpenAIServer(echo, fault) as server:
        backend = OpenAIBackend("model", 5, base_url=server.base_url, concurrency=4)
        with raises("http.status", "No more credit"):
            received.extend(backend.complete(requests(50)))
    assert len(received) == len(server.prompts) == 3
    assert len(server.bodies) == 4


def test_leaving_early_does_not_wait_for_what_is_under_way():
    def slowly(prompt):
        if prompt != "prompt 0":
            time.sleep(3)
        return echo(prompt)

    with OpenAIServer(slowly) as server:
        start = time.monotonic()
        completions = OpenAIBackend("model", 5, base_url=server.base_url, concurrency=4).complete(requests(50))
        assert [completion.id for completion in islice(completions, 1)] == ["row 0"]
        completions.close()
        assert time.monotonic() - start < 2


def test_the_request_is_greedy_and_takes_further_fields():
    with OpenAIServer(echo) as server:
        complete(server, body={"max_tokens": None, "max_completion_tokens": 7, "repetition_penalty": 1.0})
    messages = [{"role": "user", "content": "prompt 0"}]
    fields = {"model": "model", "temperature": 0, "max_completion_tokens": 7, "repetition_penalty": 1.0}
    assert server.bodies == [{**fields, "messages": messages}]


@pytest.mark.parametrize("content", [b"<html>Welcome</html>", {"object": "list"}, {"choices": []}, [1]])
def test_another_protocol_is_one_sentence(content):
    reply = 200, content, {}
    with OpenAIServer(echo, first_times(9, reply)) as server, raises("synthconl.backend.protocol", "127.0.0.1"):
        complete(server)


def test_an_error_in_a_reply_of_status_200_is_tried_again():
    with OpenAIServer(echo, first_times(1, (200, {"error": {"message": "Overloaded"}}, {}))) as server:
        assert complete(server)[0].text == "PROMPT 0"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None, "refusal": "I can't do that."}, ("", "content_filter")),
        ({"content": "x"}, ("x", "length")),
        ({}, ("", "length")),
    ],
)
def test_refusals_and_missing_counts_are_understood(message, expected):
    reply = 200, {"choices": [{"message": message, "finish_reason": "length"}]}, {}
    with OpenAIServer(echo, first_times(1, reply)) as server:
        (completion,) = complete(server)
    assert (completion.text, completion.finish_reason) == expected
    assert completion.prompt_tokens == completion.completion_tokens == 0
