"""One contract for all back ends, against answers that were computed token by token."""

import sys
from itertools import islice

import pytest

from modular_star_encoder.synthconl.backends import BackendError, CompletionRequest, open_backend
from tests.errors import raises
from tests.synthconl import fake_vllm
from tests.synthconl.openai_server import ModelAnswers, OpenAIServer
from tests.synthconl.stand_in import Oracle, save_stand_in

MAX_TOKENS = 6
POSITIONS = 160
TOO_LONG = "x " * POSITIONS
BACKENDS = ("openai", "transformers", "vllm")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("model"), positions=POSITIONS)


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model, MAX_TOKENS)


@pytest.fixture(scope="module")
def server(model):
    with OpenAIServer(ModelAnswers(model, MAX_TOKENS, batch_size=3)) as server:
        yield server


@pytest.fixture(params=BACKENDS)
def backend(request, model, server, monkeypatch):
    options = {
        "openai": {"base_url": server.base_url, "concurrency": 5},
        "transformers": {"batch_size": 3},
        "vllm": {"batch_size": 5, "max_model_len": POSITIONS},
    }
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    return open_backend(request.param, str(model), MAX_TOKENS, options[request.param])


def requests(count):
    """Prompts of many lengths, every third one the same as an earlier one."""
    return [
        CompletionRequest(f"row {i}", "add " * (7 * (i - i % 3 // 2) % 23) + str(i - i % 3 // 2)) for i in range(count)
    ]


def test_every_request_is_answered_once_under_its_own_id(backend, oracle):
    asked = requests(17)
    answered = list(backend.complete(asked))
    assert len({request.prompt for request in asked}) < len(asked) == len(answered)
    by_id = {completion.id: completion for completion in answered}
    reasons = set()
    for request in asked:
        completion = by_id[request.id]
        counts = (completion.prompt_tokens, completion.completion_tokens)
        assert (completion.text, completion.finish_reason, *counts) == oracle.answer(request.prompt)
        assert completion.error == ""
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}
    assert len({oracle.answer(request.prompt)[0] for request in asked}) > 5


def test_a_prompt_that_is_too_long_is_an_error_of_its_own(backend, oracle):
    asked = requests(6)
    asked.insert(2, CompletionRequest("long", TOO_LONG))
    answered = {completion.id: completion for completion in backend.complete(asked)}
    assert answered["long"].finish_reason == "too_long"
    assert f"{POSITIONS - MAX_TOKENS} fit" in answered["long"].error
    assert answered["row 2"].text == oracle.answer(asked[3].prompt)[0]
    assert len(answered) == 7


def test_requests_are_taken_as_they_are_needed(backend):
    taken = []

    def endless():
        while True:
            taken.append(CompletionRequest(f"row {len(taken)}", "add"))
            yield taken[-1]

    completions = backend.complete(endless())
    assert len(list(islice(completions, 4))) == 4
    assert len(taken) <= backend.in_flight + 4
    completions.close()


def test_no_requests_no_completions(backend):
    assert list(backend.complete([])) == []


def test_a_back_end_says_what_it_is(backend, model):
    assert list(backend.complete(requests(1)))
    described = backend.describe()
    assert described["model"] == str(model)
    assert described["backend"] in BACKENDS
    if described["backend"] != "openai":
        assert described[described["backend"]]


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_a_folder_without_a_model_is_one_sentence(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    with raises("synthconl.backend.model", tmp_path) as error:
        list(open_backend(name, str(tmp_path), 4, {}).complete(requests(1)))
    assert isinstance(error.value, BackendError)
    assert "\n" not in str(error.value)


def test_vllm_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"modular-star-encoder\[vllm\]"):
        open_backend("vllm", "model", 4, {})


@pytest.mark.parametrize(
    ("name", "options", "key", "values"),
    [
        ("gpt", {}, "synthconl.backend.unknown", ["'gpt'", "vllm, openai, transformers"]),
        ("openai", {}, "synthconl.backend.options", ["'openai'", "'base_url'"]),
        ("openai", {"base_url": "localhost:8000"}, "http.url", ["localhost:8000"]),
        ("openai", {"base_url": "http://h/v1", "concurrency": 0}, "http.settings", ["0"]),
        ("openai", {"base_url": "http://h/v1", "body": {"stream": True}}, "synthconl.backend.body", ["stream"]),
        ("openai", {"base_url": "http://h/v1", "api_key_variable": "NO_KEY"}, "http.token.missing", ["NO_KEY"]),
        ("transformers", {"batch": 3}, "synthconl.backend.options", ["'batch'"]),
        ("transformers", {"batch_size": 0}, "synthconl.backend.batch_size", ["0"]),
        ("vllm", {"max_model_len": 4}, "synthconl.backend.max_tokens", ["4"]),
    ],
)
def test_options_are_checked_before_anything_is_loaded(name, options, key, values, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    with raises(key, *values):
        open_backend(name, "model", 4, options)
