import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from modular_star_encoder.evaluation.retrievers import Variant
from modular_star_encoder.evaluation.run import open_system
from modular_star_encoder.inference import encoders as endpoint
from modular_star_encoder.inference.encoders import EndpointEncoder, Text

KEY = "sk-very-secret"


def embedding(text):
    return [len(text), text.count("a"), 1]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        status, answer, headers = self.server.answers.pop(0) if self.server.answers else (200, None, {})
        if answer is None:
            rows = [{"index": i, "embedding": embedding(text)} for i, text in enumerate(body["input"])]
            answer = {"data": rows[::-1]}  # in any order
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.answers = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    pauses = []
    monkeypatch.setattr(endpoint.time, "sleep", pauses.append)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.pauses = pauses
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def encode(server, texts, **options):
    encoder = EndpointEncoder("large", server.url, **options)
    return encoder.encode([("", text) for text in texts], (None,), progress=False)[None]


def test_texts_go_in_batches_and_embeddings_come_back_in_order(server):
    texts = ["banana", "a", "cc", "dada", "e"]
    assert encode(server, texts, batch_size=2).tolist() == [embedding(text) for text in texts]
    assert [body["input"] for _, body, _ in server.requests] == [["banana", "a"], ["cc", "dada"], ["e"]]
    assert {(path, body["model"], key) for path, body, key in server.requests} == {
        ("/v1/embeddings", "large", f"Bearer {KEY}")
    }


def test_empty_texts_and_long_ones_are_made_acceptable(server):
    encode(server, ["", "x" * 50], max_characters=10)
    assert server.requests[0][1]["input"] == [" ", "x" * 10]


def test_overloaded_servers_are_asked_again_with_growing_pauses_or_theirs(server):
    server.answers = [(429, {}, {}), (503, b"busy", {"Retry-After": "7"}), (500, {}, {})]
    assert len(encode(server, ["a"])) == 1
    assert server.pauses == [1, 7, 4]


def test_what_stays_overloaded_or_cannot_be_reached_is_one_sentence(server):
    server.answers = [(429, {}, {})] * 3
    with pytest.raises(OSError, match=r"no embeddings after 3 attempts \(status 429\)"):
        encode(server, ["a"], retries=2)
    with pytest.raises(OSError, match="after 2 attempts"):
        EndpointEncoder("m", "http://127.0.0.1:9", retries=1).encode([("", "a")], (None,), progress=False)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {"error": {"message": f"Incorrect API key provided: {KEY}."}}, {}), "status 401: Incorrect API key"),
        ((400, b"what?", {}), "status 400: no reason given"),
        ((302, {}, {"Location": "http://127.0.0.1:9/elsewhere"}), "status 302"),
        ((200, b"<html>", {}), "did not answer with JSON"),
        ((200, {"data": []}, {}), "one embedding for each of 1 texts"),
        ((200, {"data": [{"index": 1, "embedding": [1]}]}, {}), "one embedding for each"),
        ((200, {"data": [{"index": 0, "embedding": ["x"]}]}, {}), "one embedding for each"),
        ((200, [], {}), "one embedding for each"),
    ],
)
def test_refusals_and_wrong_answers_are_told_at_once_and_never_show_the_key(server, answer, message):
    server.answers = [answer]
    with pytest.raises(ValueError, match=message) as error:
        encode(server, ["a"])
    assert KEY not in str(error.value)
    assert len(server.requests) == 1


def test_without_a_key_none_is_sent(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    encode(server, ["a"])
    assert server.requests[0][2] is None


def test_a_key_read_from_a_file_is_sent_without_its_newline_and_no_other_text_is(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    encode(server, ["a"])
    assert server.requests[0][2] == f"Bearer {KEY}"
    for wrong in (f"{KEY}\n{KEY}", f"{KEY}…"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters that no key has") as error:
            encode(server, ["a"])
        assert KEY not in str(error.value)
    assert len(server.requests) == 1


def test_an_endpoint_is_a_system_like_others(server):
    system = open_system(f"openai:large@{server.url}")
    texts = [Text("banana"), Text("a", "python")]
    system.prepare(texts, system.variants, progress=False)
    scores = next(system.scores(texts, texts, Variant()).blocks()).scores
    units = np.array([embedding(text.text) for text in texts]) / np.linalg.norm(
        [embedding(text.text) for text in texts], axis=1, keepdims=True
    )
    assert scores == pytest.approx(units @ units.T, abs=1e-6)
    assert system.name == "large"
    assert KEY not in repr(vars(system.encoder))


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ValueError, match="must begin with https"):
        open_system("openai:large@file:///etc/passwd")
