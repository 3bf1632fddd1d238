import warnings
from dataclasses import replace
from unittest.mock import Mock

import bm25s
import numpy as np
import pytest
from qdrant_client import QdrantClient
from qdrant_client.common.client_warnings import SEEN_MESSAGES

from modular_star_encoder.search import local_store
from modular_star_encoder.search.index import open_store
from modular_star_encoder.search.local_store import LocalStore
from modular_star_encoder.search.pieces import Snippet, snippet_words
from modular_star_encoder.search.qdrant_store import QdrantStore, connect
from modular_star_encoder.search.vector_store import Filter, Row, file_id, path_expression
from tests.errors import raises
from tests.utils.http_server import LocalServer

SETTINGS = {"exit_layers": [1, 4], "dimension": 8, "prompts": {"query": "é"}}


@pytest.fixture(params=["folder", "qdrant", "memory"])
def store(request, tmp_path):
    if request.param == "qdrant":
        made = QdrantStore(QdrantClient(":memory:"), "i")
    else:
        made = LocalStore(tmp_path / "index" if request.param == "folder" else None)
    assert made.settings() is None
    made.create(SETTINGS)
    return made


def rows(path, texts, version="1", language="python", seed=0, width=8, missing=0):
    """Rows of a file; with `missing`, only the first ones of those that it says it has."""
    generator = np.random.default_rng([seed, len(path)])
    made, key, file_rows = [], file_id(path), len(texts) + missing
    for place, text in enumerate(texts):
        snippet = Snippet(path, language, f"f{place}", place + 1, place + 1, text, place + 1, (f"f{place}", "g"))
        vectors = {k: generator.normal(size=width).astype(np.float32) for k in (1, 4)}
        vectors = {k: vector / np.linalg.norm(vector) for k, vector in vectors.items()}
        words = snippet_words(snippet)
        made.append(Row(place, key, version, file_rows, snippet, words, vectors))
    return made


def found_texts(found):
    return [one.snippet.text for one in found]


def test_a_file_is_replaced_whole(store):
    store.replace_files([], rows("a.py", ["one", "two", "three"]) + rows("b.py", ["four"]))
    store.replace_files([file_id("a.py")], rows("a.py", ["five"], "2"))
    assert (store.count(), store.files()) == (2, {file_id("a.py"): "2", file_id("b.py"): "1"})
    store.replace_files([file_id("b.py")], [])
    assert found_texts(store.nearest(np.ones(8, np.float32), 1, 9, Filter())) == ["five"]


def test_a_file_of_which_a_server_lacks_rows_or_has_two_contents_is_known():
    store = QdrantStore(QdrantClient(":memory:"), "i")
    store.create(SETTINGS)
    store.replace_files([], rows("short.py", ["one"], missing=1) + rows("whole.py", ["two"]))
    mixed = rows("mixed.py", ["three", "four"])
    store.replace_files([], [mixed[0], *rows("mixed.py", ["three", "five"], "2")[1:]])
    assert store.files() == {file_id("short.py"): None, file_id("whole.py"): "1", file_id("mixed.py"): None}


def test_the_nearest_are_those_of_an_exact_search_at_each_exit(store):
    made = rows("a.py", [f"text {number}" for number in range(50)])
    store.replace_files([], made)
    store.finish()
    query = np.random.default_rng(1).normal(size=8).astype(np.float32)
    for exit_layer in (1, 4):
        scores = np.stack([row.vectors[exit_layer] for row in made]) @ (query / np.linalg.norm(query))
        found = store.nearest(query, exit_layer, 5, Filter())
        assert found_texts(found) == [f"text {place}" for place in np.argsort(-scores)[:5]]
        assert [one.score for one in found] == pytest.approx(sorted(scores, reverse=True)[:5], abs=0.01)
        expected = [made[one.snippet.first_line - 1].vectors[4] for one in found]
        np.testing.assert_allclose(store.vectors(found, 4), expected, atol=0.01)
    assert store.vectors([], 4).size == 0


def test_words_are_ranked_by_their_rarity(store):
    store.replace_files([], rows("x.py", ["parseHeader value", "value value", "other_value"]))
    store.finish()
    assert found_texts(store.lexical(["header", "valu"], 2, Filter()))[0] == "parseHeader value"
    assert found_texts(store.lexical(["pars"], 9, Filter())) == ["parseHeader value"]
    assert store.lexical(["absent"], 9, Filter()) == store.lexical([], 9, Filter()) == []


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (Filter(("go",)), {"go"}),
        (Filter(("go", "python")), {"go", "odd", "plain"}),
        (Filter(path=path_expression("src/**")), {"go", "odd"}),
        (Filter(("python",), path_expression("it's*")), {"odd"}),
        (Filter(path=path_expression("nowhere/**")), set()),
        (Filter(file=file_id("src/b.go")), {"go"}),
        (Filter(("python",), file=file_id("src/b.go")), set()),
    ],
)
def test_filters_hold_for_vectors_and_words(store, where, expected):
    content = {"plain": ("a.py", "python"), "go": ("src/b.go", "go"), "odd": ("src/it's \\ [%_] é.py", "python")}
    for text, (path, language) in content.items():
        store.replace_files([], rows(path, [f"{text} shared"], language=language))
    found = store.nearest(np.ones(8, np.float32), 1, 9, where)
    assert {text.split()[0] for text in found_texts(found)} == expected
    assert {text.split()[0] for text in found_texts(store.lexical(["shar"], 9, where))} == expected


def test_settings_and_rows_come_back_as_they_were_and_create_replaces_them(store):
    (row,) = rows("a.py", ["one"])
    store.replace_files([], [row])
    (found,) = store.lexical(["one"], 1, Filter())
    assert (found.path, found.snippet) == (row.snippet.path, row.snippet)
    assert store.vectors(store.lexical(["defines:g"], 1, Filter()), 4)[0] == pytest.approx(row.vectors[4], abs=0.01)
    assert store.settings() == SETTINGS
    store.create({**SETTINGS, "dimension": 4})
    assert (store.count(), store.settings()["dimension"]) == (0, 4)


def test_many_rows_are_searched_by_signs_first_and_almost_the_same_are_found(monkeypatch):
    monkeypatch.setattr(local_store, "APPROXIMATE_ROWS", 1000)
    monkeypatch.setattr(local_store, "_BEST_BY_SIGNS", 300)
    store = LocalStore()
    store.create(SETTINGS)
    made = rows("a.py", [f"text {number}" for number in range(3000)], width=64)
    store.replace_files([], made)
    vectors = np.stack([row.vectors[1] for row in made])
    right = 0
    for query in vectors[:50]:
        exact = {f"text {place}" for place in np.argsort(-(vectors @ query))[:10]}
        right += len(exact & set(found_texts(store.nearest(query, 1, 10, Filter()))))
    assert 0.8 * 500 <= right < 500  # the signs alone lose some
    assert len(store.nearest(vectors[0], 1, 5000, Filter())) == 3000  # `related` asks for all rows of a file
    rare = rows("b.go", ["new"], language="go", seed=1, width=64)
    store.replace_files([], rare)
    assert found_texts(store.nearest(-rare[0].vectors[1], 1, 1, Filter(("go",)))) == ["new"]


def test_scores_of_words_are_those_of_lucene_s_bm25_also_over_several_segments():
    documents = [["a", "b", "a"], ["b", "c"], ["c", "c", "d", "e"]]
    index = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    index.index(documents, show_progress=False)
    store = LocalStore()
    store.create(SETTINGS)
    for number, words in enumerate(documents):
        (row,) = rows(f"{number}.py", [str(number)])
        store.replace_files([], [replace(row, words=" ".join(words))])
    for words in (["a"], ["b", "c"], ["d", "unknown"]):
        expected = index.get_scores([word for word in words if word != "unknown"])
        found = {int(one.snippet.text): one.score / 2.2 for one in store.lexical(words, 9, Filter())}
        assert found == pytest.approx({place: score for place, score in enumerate(expected) if score}, rel=1e-5)


def test_merging_changes_no_answer_and_leaves_one_segment(tmp_path):
    store = LocalStore(tmp_path / "index")
    store.create(SETTINGS)
    for number in range(6):
        texts = [f"shared word{number} {place}" for place in range(3)]
        store.replace_files([], rows(f"f{number}.py", texts, seed=number))
    store.replace_files([file_id("f1.py")], rows("f1.py", ["shared other"], "2"))
    store.replace_files([file_id("f2.py")], [])
    query = np.ones(8, np.float32)
    asked = (lambda: store.nearest(query, 4, 20, Filter()), lambda: store.lexical(["shar", "word3"], 20, Filter()))
    before = [[one.snippet for one in ask()] for ask in asked]
    files = store.files()
    store.finish()
    assert [[one.snippet for one in ask()] for ask in asked] == before
    assert (store.files(), store.count(), len(before[0])) == (files, 13, 13)
    assert len(list((tmp_path / "index").glob("rows-*"))) == 1
    other = LocalStore(tmp_path / "index")
    assert [[one.snippet for one in ask()] for ask in asked] == before
    store.replace_files(list(files), [])
    store.finish()
    assert (store.count(), other.count(), list((tmp_path / "index").glob("rows-*"))) == (0, 0, [])


def test_a_growing_index_is_merged_into_segments_that_16_bits_number(tmp_path, monkeypatch):
    for name, value in {"MOST_ROWS": 6, "LARGE_SEGMENT": 5, "_SMALL_SEGMENTS": 4}.items():
        monkeypatch.setattr(local_store, name, value)
    store = LocalStore(tmp_path / "index")
    store.create(SETTINGS)
    store.replace_files([], rows("long.py", [f"shared long {place}" for place in range(15)]))
    for number in range(20):
        store.replace_files([], rows(f"f{number}.py", [f"shared {number} {place}" for place in range(2)], seed=number))
        assert sum(one.size < 5 for one in store._alive()) < 4
    store.finish()
    sizes = sorted(one.size for one in store._alive())
    assert (sum(sizes), sizes[-1], len(sizes)) == (55, 6, 10)
    assert store.files()[file_id("long.py")] == "1"
    everything = {f"shared {number} {place}" for number in range(20) for place in range(2)}
    found = found_texts(store.lexical(["shar"], 99, Filter()))
    assert (len(found), everything < set(found)) == (55, True)
    store.replace_files([file_id("long.py")], [])
    assert store.count() == 40


@pytest.fixture
def two_stores(tmp_path):
    """Two open stores of one folder, with rows of two files in two segments."""
    one, other = LocalStore(tmp_path / "index"), LocalStore(tmp_path / "index")
    one.create(SETTINGS)
    for path in ("a.py", "b.py"):
        one.replace_files([], rows(path, [f"first {path}"]))
    return one, other


def test_an_open_store_sees_what_another_writes_except_in_a_snapshot(two_stores):
    one, other = two_stores
    with other.snapshot():
        one.replace_files([file_id("a.py")], rows("a.py", ["second"], "2"))
        one.finish()  # removes the files of both segments
        found = other.nearest(np.ones(8, np.float32), 1, 9, Filter())
        assert sorted(found_texts(found)) == ["first a.py", "first b.py"]
        assert other.lexical(["second"], 9, Filter()) == []
    assert found_texts(other.lexical(["second"], 9, Filter())) == ["second"]
    assert found_texts(other.lexical(["first"], 9, Filter())) == ["first b.py"]


def test_a_reader_survives_a_merge_between_its_manifest_and_its_segments(two_stores, monkeypatch):
    one, other = two_stores
    before, read = other._read(), other._read
    one.finish()
    answers = iter([before])
    monkeypatch.setattr(other, "_read", lambda: next(answers, None) or read())
    assert other.count() == 2


def test_a_folder_of_other_things_than_a_killed_first_indexing_left_is_no_index(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with raises("search.index.foreign", f'mose search "QUESTION" {tmp_path}'):
        LocalStore(tmp_path)
    with raises("search.index.foreign", "thesis.tex"):
        LocalStore(tmp_path / "thesis.tex")
    with raises("search.index.location", "s3://"):
        open_store("s3://bucket/index")
    assert open_store(tmp_path / "new").settings() is None
    assert not (tmp_path / "new").exists()
    (tmp_path / "thesis.tex").unlink()  # what a killed first indexing left is no obstacle
    for name in ("..gitignore.12.tmp", ".index.json.7.ab12.tmp", ".stamps.json.7.tmp", ".lock", f"rows-{'0' * 32}"):
        (tmp_path / name).touch()
    assert LocalStore(tmp_path).settings() is None
    (tmp_path / ".thesis.tex.7.tmp").touch()
    with raises("search.index.foreign"):
        LocalStore(tmp_path)


def test_of_the_warnings_of_qdrant_only_that_of_its_local_mode_about_indexes_is_silent():
    SEEN_MESSAGES.clear()  # it warns once
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        QdrantStore(QdrantClient(":memory:"), "i").create(SETTINGS)
    assert caught == []
    client = Mock(collection_exists=lambda _: False)
    client.create_payload_index = lambda *_: warnings.warn("another", UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="another"):
        QdrantStore(client, "i").create(SETTINGS)


@pytest.mark.parametrize(
    ("location", "key"),
    [(one, "location") for one in ("qdrant:", "qdrant:name", "qdrant:name@localhost", "qdrant:@http://localhost")]
    + [("qdrant:code@http://me:secret@localhost:1", "password")],
)
def test_a_server_is_named_by_collection_and_url_without_a_password(location, key):
    with raises(f"search.qdrant.{key}") as refused:
        open_store(location)
    assert "secret" not in str(refused.value)
    assert connect("qdrant:code@http://localhost:1")[1] == "code"


def test_a_server_that_refuses_or_is_gone_is_reported_in_one_sentence():
    with LocalServer(lambda request: (403, b"no\nentry", {})) as server:
        store = open_store(f"qdrant:i@http://127.0.0.1:{server.server_port}")
        with pytest.raises(OSError, match=r"^.*qdrant:i@http://127.0.0.1:\d+ .*403.*$"):
            store.settings()
    for ask in (store.settings, store.count, store.files, lambda: store.replace_files(["a"], [])):
        with pytest.raises(OSError, match=r"qdrant:i@http://127.0.0.1:\d+ .*Connection refused"):
            ask()


PATHS = ["a.py", "src/a.py", "src/deep/b.py", "src/it's (1).go", "src/[x].js", "source/a.py", "src/a.pyi", "src/a+b.c"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.py", {"a.py", "src/a.py", "src/deep/b.py", "source/a.py"}),
        ("./a.py", {"a.py"}),
        ("src/**/*.py", {"src/a.py", "src/deep/b.py"}),
        ("src/**", set(PATHS) - {"a.py", "source/a.py"}),
        ("src/deep/", {"src/deep/b.py"}),
        ("[!a].py", {"src/deep/b.py"}),
        ("it's (1).go", {"src/it's (1).go"}),
        ("a+b.c", {"src/a+b.c"}),
        ("src", set()),
    ],
)
def test_patterns_choose_paths(pattern, expected):
    assert {path for path in PATHS if path_expression(pattern).match(path.encode())} == expected
