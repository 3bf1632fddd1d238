import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.evaluation.retrievers import EmbeddingCache, EmbeddingRetriever, ExitVariant
from modular_star_encoder.evaluation.run import open_retriever
from modular_star_encoder.inference import encoders
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.inference.encoders import ExitEncoder, SentenceTransformerEncoder, Text, load_encoder
from modular_star_encoder.utils.errors import UserError
from tests.errors import raises
from tests.tiny import change_json, tiny_model, tiny_tokenizer
from tests.utils.http_server import LocalServer

PROSE = [Text(f"{verb} the file") for verb in ("open", "close", "read", "write")]
CODE = [Text(f"def {verb}(file):\n    return {verb}er", "python") for verb in ("open", "close", "read", "write")]


def check_scores(retriever, queries, documents, expected, variant=None):
    (block,) = retriever.scores(queries, documents, variant or ExitVariant()).blocks()
    assert block.scores == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An encoder of transformers without anything of sentence-transformers."""
    folder = tmp_path_factory.mktemp("encoders") / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=300, **sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_all_exits_come_from_one_pass_and_a_second_benchmark_costs_nothing(model, tokenizer, tmp_path, monkeypatch):
    calls = []

    def counted(model, tokenizer, texts, **options):
        calls.append((len(texts), options["exit_layers"]))
        assert sorted(map(len, texts), reverse=True)[0] == len(texts[0])  # the longest, which needs most memory, first
        return encode_exits(model, tokenizer, texts, **options)

    monkeypatch.setattr(encoders, "encode_exits", counted)
    for _ in range(2):
        retriever = EmbeddingRetriever(ExitEncoder(model, tokenizer, "tiny"), EmbeddingCache(tmp_path))
        retriever.prepare([*PROSE, *CODE, *PROSE], retriever.variants, progress=False)
        assert calls == [(8, (1, 2, 4))]
    retriever.prepare([*PROSE, Text("new")], (ExitVariant(2),), progress=False)
    assert calls[1:] == [(1, (2,))]


def test_other_weights_settings_or_tokenizers_do_not_find_them(model):
    tokenizer = tiny_tokenizer()
    first = ExitEncoder(model, tokenizer, "tiny")
    assert first.checksum == ExitEncoder(model, tokenizer, "called otherwise").checksum
    assert first.checksum != ExitEncoder(model, tokenizer, "tiny", max_length=5).checksum
    tokenizer(["a b c d"], truncation=True, padding=True, max_length=3)  # this use is no change, a new token is one
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3
    assert first.checksum == ExitEncoder(model, tokenizer, "tiny").checksum
    tokenizer.add_tokens(["another"])
    assert first.checksum != (with_another := ExitEncoder(model, tokenizer, "tiny")).checksum
    next(model.parameters()).data[0] += 1
    assert with_another.checksum != ExitEncoder(model, tokenizer, "tiny").checksum


def test_exits_and_nested_dimensions_are_variants_with_the_published_prompts(tokenizer):
    model = tiny_model()
    model.config.nested_dimensions = [4, 8]
    retriever = EmbeddingRetriever(ExitEncoder(model, tokenizer, "tiny", exit_layers=(2, 4)))
    assert retriever.variants == tuple(ExitVariant(k, size) for k in (2, 4) for size in (16, 8, 4))
    retriever.prepare([*PROSE, *CODE], retriever.variants, progress=False)
    queries = encode_exits(model, tokenizer, [text_prompt() + text.text for text in PROSE], progress=False)
    codes = encode_exits(model, tokenizer, [code_prompt("python") + text.text for text in CODE], progress=False)
    for k in (2, 4):
        check_scores(retriever, PROSE, CODE, queries[k] @ codes[k].T, ExitVariant(k, 16))
    cut = queries[4][:, :4] / np.linalg.norm(queries[4][:, :4], axis=1, keepdims=True)
    check_scores(retriever, PROSE, PROSE, cut @ cut.T, ExitVariant(4, 4))


def test_a_sentence_transformer_gets_its_own_prompts(plain):
    model = SentenceTransformer(plain, device="cpu", prompts={"query": "find: ", "document": "code: "})
    retriever = EmbeddingRetriever(SentenceTransformerEncoder(model, "bert"))
    retriever.prepare([*PROSE, *CODE], retriever.variants, progress=False)
    queries = model.encode_query([text.text for text in PROSE], normalize_embeddings=True)
    codes = model.encode_document([text.text for text in CODE], normalize_embeddings=True)
    check_scores(retriever, PROSE, CODE, queries @ codes.T)


@pytest.mark.parametrize(
    "module", ["null", '{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.WordEmbeddings"}']
)
def test_a_folder_of_wrong_modules_is_one_sentence(tmp_path, module):
    (tmp_path / "modules.json").write_text(f"[{module}]")
    with raises("checkpoint.damaged", tmp_path):
        load_encoder(str(tmp_path))


def _pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def test_sharded_weights_may_have_pickled_ones_beside_them(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "copy")
    BertModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="5KB")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert len(load_encoder(str(folder)).encode([("", "a")], (None,))[None]) == 1


def _dense(folder):
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 100000, "out_features": 100000}')
    save_file({"linear.weight": torch.zeros(1)}, folder / "2_Dense" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_pickle_weights, "pytorch_model.bin is pickled"),
        (lambda folder: os.mkfifo(folder / "sentence_bert_config2.json"), "is not a file"),
        (partial(change_json, num_labels=30_000_000), "num_labels above"),
        (partial(change_json, num_hidden_layers=10**6), "num_hidden_layers above"),
        (partial(change_json, vocab_size=10**6, hidden_size=2304), "do not fit its configuration"),
        (_dense, "do not fit its configuration"),
    ],
)
def test_files_of_other_models_are_bounded_and_nothing_is_unpickled(plain, tmp_path, monkeypatch, change, fault):
    folder = tmp_path / "copy"
    SentenceTransformer(plain, device="cpu").save(str(folder))
    change(folder)
    monkeypatch.setattr("sentence_transformers.SentenceTransformer.__init__", None)
    with pytest.raises((FileNotFoundError, UserError), match=fault):
        load_encoder(str(folder))


def test_a_padding_token_that_is_in_no_vocabulary_is_one_sentence(plain, tmp_path):
    copy = shutil.copytree(plain, tmp_path / "copy")
    change_json(copy, "tokenizer_config.json", pad_token="")
    with raises("checkpoint.tokenizer", copy, "The pad_token ''"):
        load_encoder(str(copy))


def test_code_in_a_folder_is_neither_run_nor_offered(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run the code"))
    (tmp_path / "config.json").write_text('{"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text("raise SystemExit")
    (tmp_path / "modules.json").write_text("[]")
    with raises("checkpoint.damaged", tmp_path):
        load_encoder(str(tmp_path))


def test_a_folder_is_opened_as_what_it_is(checkpoint, plain):
    ours, theirs = load_encoder(str(checkpoint)), load_encoder(plain)
    assert (ours.exit_layers, ours.name.split("/")[-1]) == ((1, 2, 4), "model")
    assert isinstance(theirs, SentenceTransformerEncoder)
    assert load_encoder(str(checkpoint), (1, 2)).exit_layers == (1, 2)
    assert open_retriever("bm25").name == "BM25"
    for name in (plain, "bm25"):
        with raises("encoder.no_exits", name):
            open_retriever(name, exit_layers=(1,))
    with pytest.raises(ValueError, match="its exits are 1, 2, 4"):
        load_encoder(str(checkpoint), (3,))
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        open_retriever("./nothing-here")


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

    monkeypatch.setenv("MOSE_API_KEY", KEY)
    with LocalServer(answer) as server:
        server.replies = []
        yield server


def encode(server, *calls):
    """The embeddings of the last of several calls, each with a list of texts."""
    encoder = encoders.EndpointEncoder("large", f"{server.url}/v1", pause=0)
    return [encoder.encode([("", text) for text in texts], (None,), progress=False)[None] for texts in calls][-1]


def test_texts_go_in_batches_and_embeddings_come_back_in_order(server, monkeypatch):
    monkeypatch.setattr(encoders, "TEXTS_PER_REQUEST", 2)
    monkeypatch.setattr(encoders, "MAX_CHARACTERS", 10)
    texts = ["banana", "a", "cc", "dada", "e"]
    assert encode(server, texts).tolist() == [embedding(text) for text in texts]
    encode(server, ["", "x" * 50])
    assert server.requests.pop().body["input"] == [" ", "x" * 10]
    assert [request.body["input"] for request in server.requests] == [["banana", "a"], ["cc", "dada"], ["e"]]
    for one in server.requests:
        assert (one.path, one.body["model"]) == ("/v1/embeddings", "large")
        assert one.headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("answer", "key", "value"),
    [
        ((401, {"error": {"message": f"Incorrect API key: {KEY}."}}, {}), "http.status", "401, Incorrect API key"),
        *(
            ((200, answer, {}), "encoder.endpoint.answer", "1 texts")
            for answer in (b"<html>", [], {"data": []}, {"data": [{"index": 1, "embedding": [1]}]})
        ),
        *(
            ((200, {"data": [{"index": 0, "embedding": embedding}]}, {}), "encoder.endpoint.answer", "1 texts")
            for embedding in (["x"], [10**400], [])
        ),
    ],
)
def test_refusals_and_wrong_answers_are_not_retried_and_never_show_the_key(server, answer, key, value):
    server.replies = [answer]
    with raises(key, value) as error:
        encode(server, ["a"])
    assert KEY not in str(error.value)
    assert len(server.requests) == 1


def test_numbers_too_large_for_float32_are_infinite_without_a_warning(server, recwarn):
    server.replies = [(200, {"data": [{"index": 0, "embedding": [1e39, 1]}]}, {})]
    assert encode(server, ["a"]).tolist() == [[float("inf"), 1]]
    assert not recwarn.list


def test_all_answers_have_embeddings_of_one_size(server):
    server.replies = [(200, {"data": [{"index": 0, "embedding": [1] * size}]}, {}) for size in (2, 2, 2, 3)]
    encode(server, ["a"], ["a"])
    with raises("encoder.endpoint.answer"):
        encode(server, ["a"], ["a"])


def test_the_key_of_openai_is_sent_to_no_other_address(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.delenv("MOSE_API_KEY")
    encode(server, ["a"])
    assert "authorization" not in server.requests.pop().headers


def test_an_endpoint_is_a_retriever(server):
    retriever = open_retriever(f"openai:large@{server.url}/v1")
    texts = [Text("banana"), Text("a", "python")]
    retriever.prepare(texts, retriever.variants, progress=False)
    vectors = np.array([embedding(text.text) for text in texts])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    check_scores(retriever, texts, texts, units @ units.T)
    assert retriever.name == "large"
    assert KEY not in repr(vars(retriever.encoder))
    with raises("http.url", "file:///etc/passwd"):
        open_retriever("openai:large@file:///etc/passwd")
