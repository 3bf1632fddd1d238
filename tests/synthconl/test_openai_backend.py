import threading
import time
from itertools import islice

import pytest

from modular_star_encoder.synthconl.completions import BackendError, Completion, CompletionRequest
from modular_star_encoder.synthconl.openai_backend import OpenAIBackend
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


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_busy_endpoint_is_asked_again(status):
    with OpenAIServer(echo, first_times(2, (status, {"error": {"message": "Later."}}, {}))) as server:
        (completion,) = complete(server)
    assert (completion.id, completion.text) == ("row 0", "PROMPT 0")
    assert len(server.bodies) == 3


def test_an_endpoint_that_stays_busy_stops_the_run_with_its_own_words():
    with (
        OpenAIServer(echo, first_times(99, BUSY)) as server,
        pytest.raises(BackendError, match=r"does not answer after 3 attempts: status 429, Slow down\.$"),
    ):
        complete(server)
    assert len(server.bodies) == 3


def test_a_pause_that_the_endpoint_asks_for_is_kept():
    times = []

    def fault(number, *_):
        times.append(time.monotonic())
        return (429, {}, {"Retry-After": "0.3"}) if number == 0 else None

    with OpenAIServer(echo, fault) as server:
        complete(server, pause=30.0)
    assert 0.3 <= times[1] - times[0] < 5


def test_pauses_grow(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("modular_star_encoder.synthconl.openai_backend.asyncio.sleep", sleep)
    with OpenAIServer(echo, first_times(9, BUSY)) as server:
        complete(server, pause=8.0, attempts=10)
    for number, pause in enumerate(pauses):
        expected = min(8 * 2**number, 60)
        assert expected / 2 <= pause <= expected * 1.5
    assert len(pauses) == 9


def test_a_time_out_and_a_broken_connection_are_tried_again():
    def fault(number, *_):
        if number == 0:
            time.sleep(0.5)
        elif number == 1:
            raise ConnectionError("the handler gives up without a reply")

    with OpenAIServer(echo, fault) as server:
        (completion,) = complete(server, timeout=0.2)
    assert completion.text == "PROMPT 0"
    assert len(server.bodies) == 3


def test_an_endpoint_that_is_not_there_is_one_sentence():
    with OpenAIServer(echo) as server:
        pass
    with pytest.raises(BackendError, match=r"127\.0\.0\.1:\d+ does not answer after 1 attempt: no answer \(Connect"):
        complete(server, attempts=1)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, f"Incorrect API key provided: {KEY}."),
        (403, "x" * 290 + KEY),
        (404, "The model `model` does not exist."),
        (302, ""),
    ],
)
def test_what_no_further_request_could_mend_stops_at_once_without_telling_the_key(monkeypatch, status, message):
    monkeypatch.setenv("A_KEY", KEY)
    headers = []

    def fault(number, body, sent):
        headers.append(sent)
        return status, {"error": {"message": message}}, {}

    with OpenAIServer(echo, fault) as server, pytest.raises(BackendError) as error:
        complete(server, api_key_variable="A_KEY")
    sentence = str(error.value)
    assert f"refuses requests for model 'model': status {status}" in sentence
    assert message.replace(KEY, "***").rstrip(".")[:300] in sentence
    assert KEY[:5] not in sentence
    assert "\n" not in sentence
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
        with pytest.raises(BackendError, match="No more credit"):
            received.extend(backend.complete(requests(50)))
    assert len(received) == len(server.prompts) == 3
    assert len(server.bodies) == 4


def test_no_more_requests_than_allowed_are_under_way_at_once():
    under_way, most = set(), []
    lock = threading.Lock()

    def slowly(prompt):
        with lock:
            under_way.add(prompt)
            most.append(len(under_way))
        time.sleep(0.02)
        with lock:
            under_way.remove(prompt)
        return echo(prompt)

    with OpenAIServer(slowly) as server:
        assert len(complete(server, 30, concurrency=6)) == 30
    assert max(most) == 6


def test_leaving_early_does_not_wait_for_what_is_under_way():
    def slowly(prompt):
        if prompt != "prompt 0":
            time.sleep(3)
        return echo(prompt)

    with OpenAIServer(slowly) as server:
        start = time.monotonic()
        backend = OpenAIBackend("model", 5, base_url=server.base_url, concurrency=4)
        completions = backend.complete(requests(50))
        assert [completion.id for completion in islice(completions, 1)] == ["row 0"]
        completions.close()
        assert time.monotonic() - start < 2


def test_it_works_inside_a_running_event_loop():
    import asyncio

    async def notebook(server):
        return complete(server, 3)

    with OpenAIServer(echo) as server:
        assert len(asyncio.run(notebook(server))) == 3


def test_the_request_is_greedy_and_takes_further_fields():
    with OpenAIServer(echo) as server:
        complete(server, body={"max_tokens": None, "max_completion_tokens": 7, "repetition_penalty": 1.0})
    assert server.bodies == [
        {
            "model": "model",
            "temperature": 0,
            "max_completion_tokens": 7,
            "repetition_penalty": 1.0,
            "messages": [{"role": "user", "content": "prompt 0"}],
        }
    ]


@pytest.mark.parametrize("content", [b"<html>Welcome</html>", {"object": "list"}, {"choices": []}, [1]])
def test_another_protocol_is_one_sentence(content):
    with (
        OpenAIServer(echo, first_times(9, (200, content, {}))) as server,
        pytest.raises(BackendError, match="not in OpenAI's chat protocol"),
    ):
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
