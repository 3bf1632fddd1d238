import numpy as np
import pytest

from modular_star_encoder.evaluation.retrievers import ExitVariant
from modular_star_encoder.evaluation.run import open_retriever
from modular_star_encoder.inference.encoders import EndpointEncoder, Text
from tests.errors import raises
from tests.utils.http_server import LocalServer

KEY = "sk-very-secret"


def embedding(text):
    return [len(text), text.count("a"), 1]


@pytest.fixture
def server(monkeypatch):
    """Embeds texts, after the replies in `server.replies`."""

    def answer(request):
        if server.replies:
            return server.replies.pop(0)
        rows = [{"index": i, "embedding": embedding(text)} for i, text in enumerate(request.body["input"])]
        return 200, {"data": rows[::-1]}, {}  # in any order

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with LocalServer(answer) as server:
        server.replies = []
        yield server


def encode(server, texts, **options):
    encoder = EndpointEncoder("large", f"{server.url}/v1", pause=0, **options)
    return encoder.encode([("", text) for text in texts], (None,), progress=False)[None]


def test_texts_go_in_batches_and_embeddings_come_back_in_order(server):
    texts = ["banana", "a", "cc", "dada", "e"]
    assert encode(server, texts, batch_size=2).tolist() == [embedding(text) for text in texts]
    assert [request.body["input"] for request in server.requests] == [["banana", "a"], ["cc", "dada"], ["e"]]
    assert {(one.path, one.body["model"], one.headers["authorization"]) for one in server.requests} == {
        ("/v1/embeddings", "large", f"Bearer {KEY}")
    }


def test_empty_texts_and_long_ones_are_made_acceptable(server):
    encode(server, ["", "x" * 50], max_characters=10)
    assert server.requests[0].body["input"] == [" ", "x" * 10]


def test_overloaded_servers_are_retried(server):
    server.replies = [(429, {}, {}), (503, b"busy", {"Retry-After": "0"}), (500, {}, {})]
    assert len(encode(server, ["a"])) == 1
    server.replies = [(429, {}, {})] * 3
    with raises("http.no_answer", "after 3 attempts", "status 429"):
        encode(server, ["a"], retries=2)
    with raises("http.no_answer", "after 2 attempts"):
        EndpointEncoder("m", "http://127.0.0.1:9", retries=1, pause=0).encode([("", "a")], (None,), progress=False)


@pytest.mark.parametrize(
    ("answer", "key", "value"),
    [
        ((401, {"error": {"message": f"Incorrect API key: {KEY}."}}, {}), "http.status", "401, Incorrect API key"),
        ((302, {}, {"Location": "http://127.0.0.1:9/elsewhere"}), "http.status", "302"),
        ((200, b"<html>", {}), "encoder.endpoint.answer", "1 texts"),
        ((200, {"data": []}, {}), "encoder.endpoint.answer", "1 texts"),
        ((200, {"data": [{"index": 1, "embedding": [1]}]}, {}), "encoder.endpoint.answer", "1 texts"),
        ((200, {"data": [{"index": 0, "embedding": ["x"]}]}, {}), "encoder.endpoint.answer", "1 texts"),
        ((200, [], {}), "encoder.endpoint.answer", "1 texts"),
    ],
)
def test_refusals_and_wrong_answers_are_not_retried_and_never_show_the_key(server, answer, key, value):
    server.replies = [answer]
    with raises(key, value) as error:
        encode(server, ["a"])
    assert KEY not in str(error.value)
    assert len(server.requests) == 1


def test_the_key_is_optional_and_sent_without_its_newline(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    encode(server, ["a"])
    assert "authorization" not in server.requests[0].headers
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    encode(server, ["a"])
    assert server.requests[1].headers["authorization"] == f"Bearer {KEY}"
    for wrong in (f"{KEY}\n{KEY}", f"{KEY}…"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with raises("http.token.characters", "OPENAI_API_KEY") as error:
            encode(server, ["a"])
        assert KEY not in str(error.value)
    assert len(server.requests) == 2


def test_an_endpoint_is_a_retriever(server):
    retriever = open_retriever(f"openai:large@{server.url}/v1")
    texts = [Text("banana"), Text("a", "python")]
    retriever.prepare(texts, retriever.variants, progress=False)
    scores = next(retriever.scores(texts, texts, ExitVariant()).blocks()).scores
    vectors = np.array([embedding(text.text) for text in texts])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert scores == pytest.approx(units @ units.T, abs=1e-6)
    assert retriever.name == "large"
    assert KEY not in repr(vars(retriever.encoder))


def test_an_address_must_be_http():
    with raises("http.url", "file:///etc/passwd"):
        open_retriever("openai:large@file:///etc/passwd")
