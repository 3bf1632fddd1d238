"""OpenAI's protocol: every request answered under its own id, failures in one sentence.

Retries, limits and hidden tokens of `utils.http` have tests of their own.
"""

import threading
import time
from itertools import islice

import pytest

from modular_star_encoder.synthconl import translation
from modular_star_encoder.synthconl.translation import PROMPT, Completion, CompletionRequest, OpenAIBackend
from tests.errors import raises
from tests.synthconl.openai_server import OpenAIServer
from tests.synthconl.samples import echo

KEY = "sk-a-very-secret-key"


def requests(count):
    """Prompts of many lengths; every third prompt repeats an earlier one."""
    numbers = [i - i % 3 // 2 for i in range(count)]
    return [CompletionRequest(f"row {i}", "add " * (7 * n % 23) + str(n)) for i, n in enumerate(numbers)]


def complete(server, count=1, **options):
    options = {"pause": 0.01, "attempts": 3} | options
    return list(OpenAIBackend("model", 5, base_url=server.base_url, **options).complete(requests(count)))


def test_every_request_is_answered_once_under_its_own_id_and_one_that_is_too_long_is_an_error_of_its_own():
    def answer(prompt):
        return Completion("", "", "too_long", error="9 tokens fit") if prompt.endswith(" 6") else echo(prompt)

    with OpenAIServer(answer) as server:
        answered = complete(server, 17, concurrency=5)
    expected = {one.id: answer(one.prompt) for one in requests(17)}
    assert len({one.prompt for one in requests(17)}) < len(answered) == len(expected) == 17
    for one in answered:
        text, reason, tokens = expected[one.id].text, expected[one.id].finish_reason, expected[one.id].prompt_tokens
        assert (one.text, one.finish_reason, one.prompt_tokens) == (text, reason, tokens)
        assert ("9 tokens fit" in one.error) == (reason == "too_long")
    assert {one.finish_reason for one in answered} == {"stop", "too_long"}


def test_requests_are_taken_as_they_are_needed():
    taken = []

    def endless():
        while True:
            taken.append(CompletionRequest(f"row {len(taken)}", "add"))
            yield taken[-1]

    with OpenAIServer(echo) as server:
        backend = OpenAIBackend("model", 5, base_url=server.base_url, concurrency=5)
        assert list(backend.complete([])) == []
        completions = backend.complete(endless())
        assert len(list(islice(completions, 4))) == 4
        assert len(taken) <= 5 + 4
        completions.close()


@pytest.mark.parametrize(
    ("options", "changes", "key", "values"),
    [
        ({"base_url": None}, {}, "synthconl.backend.options", ["base_url"]),
        ({"base_url": "localhost:8000"}, {}, "http.url", ["localhost:8000"]),
        ({"concurrency": 0}, {}, "synthconl.backend.options", ["concurrency", "0"]),
        ({"batch": 3}, {}, "synthconl.backend.options", ["batch"]),
        ({"body": {"stream": True}}, {}, "synthconl.backend.body", ["stream"]),
        ({"body": {"top_p": float("nan")}}, {}, "synthconl.backend.body", ["`body`", "JSON"]),
        ({"base_url": "http://☃.com"}, {}, "http.url", ["☃"]),
        ({"api_key_variable": "MOSE_NO"}, {}, "http.token.missing", ["MOSE_NO"]),
        ({"api_key_variable": "HOME"}, {}, "http.token.variable", ["HOME", "MOSE_API_KEY"]),
        ({}, {"backend": "gpt"}, "settings.value", ["'gpt'"]),
        ({}, {"prompt": "Translate {code}"}, "synthconl.prompt", ["Found: code"]),
        ({}, {"prompt": PROMPT + "{"}, "synthconl.prompt", ["'{'"]),
        ({}, {"prompt": PROMPT + "{code.__class__}"}, "synthconl.prompt", ["code.__class__"]),
        ({}, {"prompt": PROMPT + "{code: the code}"}, "synthconl.prompt", ["Found: code, code: the code, "]),
        ({}, {"prompt": PROMPT + "{code!r:>{width}}"}, "synthconl.prompt", ["code!r:>{width}"]),
    ],
)
def test_settings_and_options_are_checked_before_anything_is_sent(options, changes, key, values):
    options = {name: value for name, value in {"base_url": "http://h/v1", **options}.items() if value is not None}
    with raises(key, *values):
        translation.TranslationSettings(**{"backend": "openai", "model": "model", "options": options, **changes}).open()


def first_times(number, *reply):
    """A fault of the first `number` requests."""
    return lambda count, *_: (*reply, {}) if count < number else None


def test_an_endpoint_that_answers_with_an_error_is_asked_again_and_one_that_is_away_stops_the_run():
    with OpenAIServer(echo, first_times(2, 200, {"error": {"message": "Overloaded"}})) as server:
        (completion,) = complete(server)
        assert (completion.id, completion.text, len(server.bodies)) == ("row 0", "<0>", 3)
    with raises("http.no_answer", "'model'", "1 attempt", "Connect"):
        complete(server, attempts=1)


def test_the_request_is_greedy_takes_further_fields_and_sends_only_the_named_key(monkeypatch):
    monkeypatch.setenv("MOSE_KEY", KEY)
    headers = []
    with OpenAIServer(echo, lambda number, body, sent: headers.append(sent)) as server:
        complete(server, api_key_variable="MOSE_KEY")
        assert headers.pop()["authorization"] == f"Bearer {KEY}"
        server.requests.clear()
        complete(server, body={"max_tokens": None, "max_completion_tokens": 7, "repetition_penalty": 1.0})
    messages = [{"role": "user", "content": "0"}]
    fields = {"model": "model", "temperature": 0, "max_completion_tokens": 7, "repetition_penalty": 1.0}
    assert server.bodies == [{**fields, "messages": messages}]
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


def test_few_and_short_names_of_models_are_kept():
    def fault(number, *_):
        return 200, {"model": f"{number}" + "m" * 10_000, "choices": [{"message": {"content": "x"}}]}, {}

    with OpenAIServer(echo, fault) as server:
        backend = OpenAIBackend("model", 5, base_url=server.base_url)
        list(backend.complete(requests(200)))
    assert {len(name) for name in backend.describe()["served"]} == {200}
    assert len(backend.describe()["served"]) == 100


@pytest.mark.parametrize("content", [b"<html>Welcome</html>", {"object": "list"}, {"choices": None}, [1]])
def test_another_protocol_is_one_sentence(content):
    fault = first_times(9, 200, content)
    with OpenAIServer(echo, fault) as server, raises("synthconl.backend.protocol", "127.0.0.1"):
        complete(server)


PARTS = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("message", "text", "finish_reason"),
    [
        ({"content": None, "refusal": "I can't do that."}, "", "content_filter"),
        ({"content": "x"}, "x", "length"),
        ({"content": PARTS}, "ab", "length"),
    ],
)
def test_refusals_missing_counts_and_parts_of_a_text_are_understood(message, text, finish_reason):
    reply = {"choices": [{"message": message, "finish_reason": "length"}]}
    with OpenAIServer(echo, first_times(1, 200, reply)) as server:
        assert complete(server) == [Completion("row 0", text, finish_reason, 0, 0)]


CHOICES = [[], *([{"message": {"content": "x"}, "finish_reason": reason}] for reason in ("error", "too_long"))]


@pytest.mark.parametrize("choices", CHOICES)
def test_an_answer_without_a_completion_is_an_error_of_its_prompt_alone_with_a_reason(choices):
    with OpenAIServer(echo, first_times(1, 200, {"choices": choices})) as server:
        failed, *others = sorted(complete(server, 3), key=lambda one: one.finish_reason)
    assert (failed.finish_reason, failed.text, bool(failed.error)) == ("error", "", True)
    assert {one.finish_reason for one in others} == {"stop"}


@pytest.mark.parametrize("choices", [None, []])
def test_an_error_in_place_of_choices_is_temporary(choices):
    overloaded = {"choices": choices, "error": {"message": "Overloaded."}}
    with OpenAIServer(echo, first_times(1, 200, overloaded)) as server:
        assert [one.finish_reason for one in complete(server)] == ["stop"]
