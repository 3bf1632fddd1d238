"""One contract for all back ends, against answers that were computed token by token; and OpenAI's protocol.

Retries, limits and hidden tokens of `utils.http` have tests of their own.
"""

import threading
import time
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modular_star_encoder.synthconl.backends import Completion, CompletionRequest, OpenAIBackend, open_backend
from modular_star_encoder.synthconl.translation import PROMPT
from tests.errors import raises
from tests.synthconl.openai_server import OpenAIServer

MAX_TOKENS = 6
POSITIONS = 160
TOO_LONG = "x " * POSITIONS
BACKENDS = ("openai", "transformers")
KEY = "sk-a-very-secret-key"
TEMPLATE = "{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}<assistant>"
CODE = "def add(first, second):\n    return first + second\n\nfunc Add(a int, b int) int {\n\treturn a + b\n}\n"


def save_stand_in(folder: Path, positions: int) -> Path:
    """Write a checkpoint. A tenth of the tokens end a text, so that some texts end before they are cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<user>", "<end>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((PROMPT, CODE), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, *range(100, 100 + len(fast) // 10)]
    # As Qwen's checkpoints have, and stronger: what a greedy back end must not follow.
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=9.0)
    model.save_pretrained(folder)
    return folder


class Oracle:
    """What a checkpoint's greedy answer is, token by token and one prompt at a time, without `generate`."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self._model = LlamaForCausalLM.from_pretrained(folder).eval()
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self._max_tokens = max_tokens
        self.answer = cache(self._answer)

    @torch.inference_mode()
    def _answer(self, prompt: str) -> tuple[str, str, int, int]:
        """Text, finish reason, tokens of the prompt, tokens written."""
        # The chat template, written out.
        prompt = self._tokenizer(f"<user>{prompt}<end><assistant>", add_special_tokens=False)["input_ids"]
        written: list[int] = []
        ends = self._model.generation_config.eos_token_id
        while len(written) < self._max_tokens and not (written and written[-1] in ends):
            written.append(int(self._model(torch.tensor([[*prompt, *written]])).logits[0, -1].argmax()))
        stopped = written[-1] in ends
        text = self._tokenizer.decode(written[:-1] if stopped else written, skip_special_tokens=True)
        return text, "stop" if stopped else "length", len(prompt), len(written)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("model"), positions=POSITIONS)


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model, MAX_TOKENS)


@pytest.fixture(scope="module")
def server(oracle):
    def answer(prompt):
        if prompt == TOO_LONG:
            return Completion("", "", "too_long", error=f"{POSITIONS - MAX_TOKENS} fit")
        return Completion("", *oracle.answer(prompt))

    with OpenAIServer(answer) as server:
        yield server


@pytest.fixture(params=BACKENDS)
def backend(request, model, server):
    options = {
        "openai": {"base_url": server.base_url, "concurrency": 5},
        "transformers": {"batch_size": 3},
    }
    return open_backend(request.param, str(model), MAX_TOKENS, options[request.param])


def requests(count):
    """Prompts of many lengths, every third one the same as an earlier one."""
    numbers = [i - i % 3 // 2 for i in range(count)]
    return [CompletionRequest(f"row {i}", "add " * (7 * n % 23) + str(n)) for i, n in enumerate(numbers)]


def test_every_request_is_answered_once_under_its_own_id(backend, model, oracle):
    asked = requests(17)
    answered = list(backend.complete(asked))
    assert len({request.prompt for request in asked}) < len(asked) == len(answered)
    by_id = {completion.id: completion for completion in answered}
    expected = {request.id: oracle.answer(request.prompt) for request in asked}
    for row, one in by_id.items():
        assert (one.text, one.finish_reason, one.prompt_tokens, one.completion_tokens) == expected[row]
        assert one.error == ""
    assert {one.finish_reason for one in answered} == {"stop", "length"}
    assert len({text for text, *_ in expected.values()}) > 5
    described = backend.describe()
    assert described["model"] == str(model)
    assert described["backend"] == "openai" or described[described["backend"]]  # the version


def test_a_prompt_that_is_too_long_is_an_error_of_its_own(backend, oracle):
    asked = requests(6)
    asked.insert(2, CompletionRequest("long", TOO_LONG))
    answered = {completion.id: completion for completion in backend.complete(asked)}
    assert answered["long"].finish_reason == "too_long"
    assert str(POSITIONS - MAX_TOKENS) in answered["long"].error
    assert answered["row 2"].text == oracle.answer(asked[3].prompt)[0]
    assert len(answered) == 7


def test_requests_are_taken_as_they_are_needed(backend):
    taken = []

    def endless():
        while True:
            taken.append(CompletionRequest(f"row {len(taken)}", "add"))
            yield taken[-1]

    assert list(backend.complete([])) == []
    completions = backend.complete(endless())
    assert len(list(islice(completions, 4))) == 4
    assert len(taken) <= backend.in_flight + 4
    completions.close()


def test_a_folder_without_a_model_and_a_model_without_room_for_an_answer_are_one_sentence(model, tmp_path):
    with raises("synthconl.backend.model", tmp_path) as error:
        list(open_backend("transformers", str(tmp_path), 4, {}).complete(requests(1)))
    assert "\n" not in str(error.value)
    with raises("synthconl.backend.max_tokens", POSITIONS):
        list(open_backend("transformers", str(model), POSITIONS, {}).complete(requests(1)))


@pytest.mark.parametrize(
    ("name", "options", "key", "values"),
    [
        ("openai", {}, "synthconl.backend.options", ["'openai'", "base_url"]),
        ("openai", {"base_url": "localhost:8000"}, "http.url", ["localhost:8000"]),
        ("openai", {"base_url": "http://h/v1", "concurrency": 0}, "synthconl.backend.options", ["concurrency", "0"]),
        ("openai", {"base_url": ["http://h/v1"]}, "synthconl.backend.options", ["base_url"]),
        ("openai", {"base_url": "http://h/v1", "timeout": float("inf")}, "synthconl.backend.options", ["timeout"]),
        ("openai", {"base_url": "http://h/v1", "body": {"stream": True}}, "synthconl.backend.body", ["stream"]),
        ("openai", {"base_url": "http://h/v1", "api_key_variable": "NO_KEY"}, "http.token.missing", ["NO_KEY"]),
        ("transformers", {"batch": 3}, "synthconl.backend.options", ["batch"]),
        ("transformers", {"batch_size": 0}, "synthconl.backend.options", ["batch_size", "0"]),
    ],
)
def test_options_are_checked_before_anything_is_loaded(name, options, key, values):
    with raises(key, *values):
        open_backend(name, "model", 4, options)


def echo(prompt):
    return Completion("", f"<{prompt}>", "stop", 3, 4)


def complete(server, count=1, **options):
    options = {"pause": 0.01, "attempts": 3} | options
    return list(OpenAIBackend("model", 5, base_url=server.base_url, **options).complete(requests(count)))


def first_times(number, *reply):
    """A fault of the first `number` requests."""
    return lambda count, *_: (*reply, {}) if count < number else None


BUSY = 429, {"error": {"message": "Slow down."}}


def test_a_busy_endpoint_is_asked_again_and_one_that_stays_busy_stops_the_run():
    for fault in (BUSY, (200, {"error": {"message": "Overloaded"}})):
        with OpenAIServer(echo, first_times(2, *fault)) as server:
            (completion,) = complete(server)
            assert (completion.id, completion.text, len(server.bodies)) == ("row 0", "<0>", 3)
    with OpenAIServer(echo, first_times(99, *BUSY)) as server, raises("http.no_answer", "'model'", "429, Slow down"):
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
    assert KEY[:5] not in str(error.value)
    assert "\n" not in str(error.value)
    assert [sent["authorization"] for sent in headers] == [f"Bearer {KEY}"]


def test_the_request_is_greedy_takes_further_fields_and_sends_no_key_without_one():
    headers = []
    with OpenAIServer(echo, lambda number, body, sent: headers.append(sent)) as server:
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


@pytest.mark.parametrize("content", [b"<html>Welcome</html>", {"object": "list"}, {"choices": []}, [1]])
def test_another_protocol_is_one_sentence(content):
    fault = first_times(9, 200, content)
    with OpenAIServer(echo, fault) as server, raises("synthconl.backend.protocol", "127.0.0.1"):
        complete(server)


@pytest.mark.parametrize(
    ("message", "expected"),
    [({"content": None, "refusal": "I can't do that."}, ("", "content_filter")), ({"content": "x"}, ("x", "length"))],
)
def test_refusals_and_missing_counts_are_understood(message, expected):
    reply = {"choices": [{"message": message, "finish_reason": "length"}]}
    with OpenAIServer(echo, first_times(1, 200, reply)) as server:
        (completion,) = complete(server)
    assert (completion.text, completion.finish_reason) == expected
    assert completion.prompt_tokens == completion.completion_tokens == 0
