import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.search import building
from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.index import CodeIndex, find_index
from modular_star_encoder.search.qdrant_store import QdrantStore
from modular_star_encoder.search.ranking import Cascade
from tests.errors import raises
from tests.search.conftest import FILES, build, embedded, stored_rows, write_code
from tests.tiny import save_tiny_checkpoint


@pytest.fixture
def pieces(monkeypatch):
    """The (path, name) of every snippet that is embedded."""
    made, original = [], Embedder.snippets

    def spy(self, snippets, *arguments, **options):
        made.extend((snippet.path, snippet.name) for snippet in snippets)
        return original(self, snippets, *arguments, **options)

    monkeypatch.setattr(Embedder, "snippets", spy)
    return made


@pytest.mark.parametrize("exit_layer", [1, 4])
def test_hits_are_the_nearest_by_cosine_at_each_exit_of_the_index(shared_index, checkpoint, exit_layer):
    rows = stored_rows(shared_index.store.location)
    assert len(rows) == 5
    model, tokenizer = load_checkpoint(checkpoint)
    texts = [text_prompt() + "push an item", *(code_prompt(row["language"]) + embedded(row) for row in rows)]
    vectors = encode_exits(model, tokenizer, texts, exit_layers=(exit_layer,), progress=False)[exit_layer]
    stored = np.array([row[f"vector_{exit_layer}"] for row in rows])
    np.testing.assert_allclose(stored, vectors[1:], atol=0.005)  # 8 bits
    scores = stored @ vectors[0]
    _, answer = shared_index.search(["add two numbers", "push an item"], exit_layer=exit_layer, method="vector")
    order = np.argsort(-scores)
    expected = [(rows[place]["name"], rows[place]["last_line"]) for place in order]
    assert [(hit.name, hit.last_line) for hit in answer.hits] == expected
    assert [hit.score for hit in answer.hits] == pytest.approx(scores[order], abs=1e-5)
    assert answer.margin == pytest.approx(scores[order][0] - scores[order][1], abs=1e-5)
    assert [hit.exit_layer for hit in answer.hits] == [exit_layer] * 5


def test_a_hit_leads_to_its_lines(shared_index, monkeypatch, tmp_path):
    monkeypatch.chdir(os.path.dirname(shared_index.folder))
    (answer,) = shared_index.search(["x"], languages=["go"])
    (hit,) = answer.hits
    assert (hit.path, hit.line, hit.last_line, hit.name, hit.language) == ("code/src/add.go", 3, 5, "Add", "go")
    monkeypatch.chdir(tmp_path)
    (answer,) = shared_index.search(["x"], path="settings.py")
    assert {hit.path for hit in answer.hits} == {os.path.join(shared_index.folder, "settings.py")}
    lines = Path(answer.hits[0].path).read_text().splitlines()
    for hit in answer.hits:
        assert hit.text.splitlines() == lines[hit.line - 1 : hit.last_line]


@pytest.mark.parametrize("method", ["hybrid", "lexical"])
def test_a_hit_inside_a_very_long_function_is_shown_from_the_lines_that_match(tmp_path, checkpoint, method):
    lines = ["def very_long(x):", *(f"    step_{n} = x * {n}" for n in range(400))]
    lines[250:250] = ["    # retry the upload", "    for attempt in range(5):", "        upload(2 ** attempt)"]
    write_code(tmp_path / "code", {"a.py": "\n".join(lines)})
    index = build(tmp_path / "code", tmp_path / "index", checkpoint)
    hit = index.search(["retry the upload"], top_k=1, method=method)[0].hits[0]
    assert (hit.name, hit.best_line) == ("very_long", 251)
    assert hit.line < 251 < hit.last_line
    assert hit.text.splitlines() == lines[hit.line - 1 : hit.last_line]
    hit = index.search(["very long"], top_k=1, method=method, path="a.py")[0].hits[0]
    assert hit.name == "very_long"


def test_only_files_that_changed_are_embedded_and_vanished_ones_removed(code, index, tmp_path, checkpoint, pieces):
    before = {row["row_id"]: row for row in stored_rows(tmp_path / "index")}
    assert index.report.embedded_files == index.report.files == 4
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert build(code, tmp_path / "index", moved).report.embedded_files == 0
    (code / "stack.py").touch()
    assert index.update(processes=1, progress=False).embedded_files == 0
    (code / "stack.py").write_text("def peek(self):\n    return self.items[-1]\n")
    (code / "src" / "add.go").unlink()
    (code / "new.py").write_text("NEW_OPTION = 1\n")
    report = index.update(processes=1, progress=False)
    assert (report.files, report.embedded_files, report.removed_files, report.rows) == (4, 2, 1, 5)
    assert sorted(pieces) == [("new.py", ""), ("stack.py", "peek")]
    after = {row["row_id"]: row for row in stored_rows(tmp_path / "index")}
    kept = [key for key, row in after.items() if row["path"] in ("settings.py", "src/parseHeader.js")]
    assert len(kept) == 3
    assert all(after[key] == before[key] for key in kept)
    build(code, tmp_path / "anew", checkpoint)
    anew = {row["row_id"]: row for row in stored_rows(tmp_path / "anew")}
    assert after.keys() == anew.keys()
    for key, row in after.items():
        assert row["text"] == anew[key]["text"]
        np.testing.assert_allclose(row["vector_4"], anew[key]["vector_4"], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"exit_layers": None, "exit_layer": 2}, "exit 1, 4, not 2"),
        ({"languages": ["go"]}, "also with python, javascript"),
        ({"tests": False}, "tests read: yes, not no"),
        ({"folder": os.curdir}, os.getcwd()),
    ],
)
def test_an_index_of_other_settings_is_not_updated(shared_index, checkpoint, changes, named):
    before = stored_rows(shared_index.store.location)
    options = {"folder": shared_index.folder, "exit_layers": (1, 4), **changes}
    with raises("search.index.other_settings", named):
        build(location=shared_index.store.location, checkpoint=checkpoint, **options)
    assert stored_rows(shared_index.store.location) == before


def test_another_checkpoint_is_refused_by_update_and_search(shared_index, tmp_path):
    other = save_tiny_checkpoint(tmp_path / "other", rope_parameters={"rope_theta": 5.0})
    with raises("search.index.other_model", other):
        build(shared_index.folder, shared_index.store.location, other, exit_layers=(1, 4))
    with raises("search.index.other_model", other):
        CodeIndex.open(shared_index.store.location, checkpoint=other)


def test_a_checkpoint_that_was_trained_on_is_refused_when_it_is_first_used(code, tmp_path, checkpoint, monkeypatch):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    build(code, tmp_path / "index", copy)
    trained = save_tiny_checkpoint(tmp_path / "trained", initializer_range=0.1)
    shutil.copy(trained / "model.safetensors", copy / "model.safetensors")
    index = CodeIndex.open(tmp_path / "index")
    with raises("search.index.other_model", copy):
        index.search(["push"])
    monkeypatch.setattr(Embedder, "encoder", None)
    assert index.search(["push"], method="lexical")[0].hits  # without the model


def test_embeddings_are_of_the_deepest_exit_and_cut_where_the_model_was_trained_to_be(code, tmp_path):
    nested = save_tiny_checkpoint(tmp_path / "nested", nested_dimensions=[8, 16], output_all_exits=True)
    index = build(code, tmp_path / "index", nested, dimension=8)
    assert index.settings.exit_layers == (4,)
    vectors = np.stack([row["vector_4"] for row in stored_rows(tmp_path / "index")])
    assert vectors.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.01)
    whole = build(code, tmp_path / "whole", nested)
    assert len(stored_rows(tmp_path / "whole")[0]["vector_4"]) == 16
    scores = [[hit.score for hit in made.search(["push"], method="vector")[0].hits] for made in (index, whole)]
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)
    with raises("search.dimension", "8 or 16", 7):
        build(code, tmp_path / "cut", nested, dimension=7)


@pytest.mark.parametrize("kind", ["folder", "damaged folder", "qdrant"])
def test_an_open_index_notices_that_it_was_built_anew(code, tmp_path, checkpoint, kind):
    client = QdrantClient(":memory:")
    first, second = (QdrantStore(client, "i") if kind == "qdrant" else tmp_path / "index" for _ in range(2))
    build(code, first, checkpoint, exit_layer=1)
    index = CodeIndex.open(first)
    (before,) = index.search(["push"])
    build(code, second, checkpoint, exit_layer=1, rebuild=True)  # nothing else than before
    assert index.search(["push"]) == [before]
    if kind == "damaged folder":
        (tmp_path / "index" / "index.json").write_bytes(b"junk")
    build(code, second, checkpoint, exit_layers=(1, 4), rebuild=True)
    (code / "new.py").write_text("NEW = 1\n")
    for options in ({"exit_layer": 1}, {"method": "lexical"}, {"cascade": Cascade(4)}):
        with raises("search.index.rebuilt", index.store.location):
            index.search(["push"], **options)
    with raises("search.index.rebuilt", index.store.location):
        index.update(processes=1, progress=False)
    assert CodeIndex.open(second).store.count() == 5


def test_a_checkpoint_that_cannot_be_loaded_costs_no_index(code, index, tmp_path, checkpoint):
    before = stored_rows(tmp_path / "index")
    weights = shutil.copytree(checkpoint, tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises((ValueError, OSError)):
        build(code, tmp_path / "index", tmp_path / "cut", rebuild=True)
    assert stored_rows(tmp_path / "index") == before
    assert CodeIndex.open(tmp_path / "index").search(["push"])[0].hits


def test_an_index_inside_its_folder_moves_with_it_and_is_found_from_below(code, tmp_path, checkpoint):
    build(code, None, checkpoint)
    moved = shutil.move(code, tmp_path / "moved")
    index = CodeIndex.open(find_index(moved / "src"))
    assert index.folder == str(moved)
    assert os.path.exists(index.search(["push"], top_k=1)[0].hits[0].path)
    assert index.update(processes=1, progress=False).embedded_files == 0
    assert (moved / ".mose" / ".gitignore").read_text() == "*\n"
    assert find_index(tmp_path) is None
    build(moved, moved / "index", checkpoint)
    assert not (moved / "index" / ".gitignore").exists()  # it may be meant to be committed


def test_an_index_in_a_parent_counts_only_if_it_holds_the_folder(code, tmp_path, checkpoint):
    (code / "src" / ".mose").mkdir()
    (code / "src" / ".mose" / ".lock").touch()  # left by an interrupted build
    (tmp_path / "other").mkdir()
    build(code, tmp_path / ".mose", checkpoint)
    places = code, code / "src", tmp_path, tmp_path / "other"
    assert [find_index(place) for place in places] == [str(tmp_path / ".mose")] * 3 + [None]


def test_an_index_behind_a_link_is_of_the_folder_that_was_named(code, tmp_path, checkpoint):
    write_code(tmp_path / "elsewhere", {"private.py": "def private():\n    return 1\n"})
    (code / ".index").mkdir()
    link = tmp_path / "elsewhere" / "index"
    link.symlink_to(code / ".index")
    assert build(code, link, checkpoint).folder == CodeIndex.open(link).folder == str(code)
    assert {row["path"] for row in stored_rows(code / ".index")} == set(FILES)


@pytest.mark.parametrize("full", ["safetensors.numpy.save_file", "os.replace"])
def test_a_disk_that_is_full_at_the_first_rows_leaves_no_index(code, checkpoint, monkeypatch, full):
    real = os.replace
    error = OSError(errno.ENOSPC, "No space left on device")

    def no_space(*arguments, **options):
        if full == "os.replace" and not any((code / ".mose").glob("rows-*.safetensors")):
            return real(*arguments)
        raise error

    monkeypatch.setattr(full, no_space)
    with pytest.raises(OSError, match="No space") as caught:
        build(code, None, checkpoint)
    assert caught.value is error
    assert os.listdir(code / ".mose") == [".lock"]


def test_ctrl_c_leaves_an_index_that_answers_and_is_completed(code, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("modular_star_encoder.search.building._ROWS_PER_BATCH", 1)
    original, calls = Embedder.snippets, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(Embedder, "snippets", interrupted)
    divided = building._divided

    def interrupted_again(*arguments):
        try:
            yield from divided(*arguments)
        finally:
            raise KeyboardInterrupt("again")

    monkeypatch.setattr(building, "_divided", interrupted_again)
    with pytest.raises(KeyboardInterrupt, match="again"):  # else Python prints it: "Exception ignored in"
        build(code, tmp_path / "index", checkpoint)
    monkeypatch.setattr(building, "_divided", divided)
    index = CodeIndex.open(tmp_path / "index")
    assert index.search(["push"])[0].hits
    assert index.search(["option return parse"], method="hybrid")[0].hits
    report = index.update(processes=1, progress=False)
    assert (report.files, report.embedded_files, report.rows) == (4, 2, 5)


@pytest.mark.parametrize(
    ("options", "key", "named"),
    [
        ({"questions": []}, "search.questions", ""),
        ({"questions": "push"}, "search.questions", ""),
        ({"questions": [" "]}, "search.questions", ""),
        ({"questions": [b"x"]}, "search.questions", ""),
        ({"top_k": "3"}, "search.top_k", "'3'"),
        ({"questions": ["push \udcff"]}, "search.questions", "Unicode"),
        ({"top_k": 0}, "search.top_k", "not 0"),
        ({"exit_layer": 2}, "search.index.exit_layer", "exit 1, 4, not 2"),
        ({"method": "magic"}, "search.method", "magic"),
        ({"languages": ["cobol"]}, "data.language.unknown", "cobol"),
        ({"path": "[a"}, "search.path.bracket", "[a"),
        ({"path": " "}, "search.path.blank", ""),
        ({"path": "\ud800*.py"}, "search.path.surrogates", ""),
    ],
)
def test_bad_questions_are_refused(shared_index, options, key, named):
    with raises(key, named):
        shared_index.search(**{"questions": ["push"], **options})


def test_arguments_of_a_wrong_kind_are_named(shared_index, code, tmp_path, checkpoint):
    for name, value in (("line", "1"), ("top_k", -3)):
        with raises(f"search.{name}", f"`{name}`", repr(value)):
            shared_index.related("stack.py", **{"line": 2, name: value})
    for name, value, key in (("exit_layers", [], "exit_layer"), ("processes", -1, "processes")):
        with raises(f"search.{key}", f"`{name}`"):
            build(code, tmp_path / "index", checkpoint, **{name: value})
    assert not (tmp_path / "index").exists()
    with raises("search.index.location", "5"):
        CodeIndex.open(5)


def test_a_server_serves_the_same_answers(code, checkpoint, shared_index):
    store = QdrantStore(QdrantClient(":memory:"), "code")
    index = build(code, store, checkpoint, exit_layers=(1, 4))
    for options in ({"exit_layer": 1}, {"exit_layer": 4, "languages": ["python"]}, {"path": "src/**"}):
        (here,), (there,) = (one.search(["push an item"], method="vector", **options) for one in (index, shared_index))
        scores = {(hit.name, hit.line): hit.score for hit in there.hits}
        assert {(hit.name, hit.line): hit.score for hit in here.hits} == pytest.approx(scores, abs=5e-3)
    write_code(code, {"stack.py": "def peek(self):\n    return self.items[-1]\n"})
    assert index.update(processes=1, progress=False).embedded_files == 1
    assert CodeIndex.open(store).search(["x"], path="stack.py")[0].hits[0].name == "peek"


def test_a_copy_of_a_snippet_is_embedded_once_and_is_a_row_of_its_own(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(building, "_ROWS_PER_BATCH", 1)  # copies are known across batches too
    encoded, original = [], Embedder.encoder

    def recording(self, *given):
        encode = original(self, *given)
        return lambda texts: encoded.extend(texts) or encode(texts)

    monkeypatch.setattr(Embedder, "encoder", recording)
    same = "def same():\n    return 1\n"
    write_code(tmp_path / "code", {"x/lib/a.py": same, "lib/b.py": "def other():\n    return 2\n", "y/lib/a.py": same})
    build(tmp_path / "code", tmp_path / "index", checkpoint, exit_layers=(1, 4))
    assert ["def same" in text for text in encoded] == [False, True]
    rows = {row["path"]: row for row in stored_rows(tmp_path / "index")}
    assert len(rows) == 3
    for column in ("vector_1", "vector_4"):
        assert rows["x/lib/a.py"][column] == rows["y/lib/a.py"][column] != rows["lib/b.py"][column]
    assert rows["x/lib/a.py"]["vector_1"] != rows["x/lib/a.py"]["vector_4"]


@pytest.mark.parametrize("damaged", ["rows-*", "index.json"])
def test_a_damaged_index_is_told_in_one_sentence_and_can_be_built_anew(code, index, tmp_path, checkpoint, damaged):
    for path in (tmp_path / "index").glob(damaged):
        path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])
    for method in ("vector", "lexical"):
        with pytest.raises((ValueError, OSError), match=r"The index .* can't be read"):
            CodeIndex.open(tmp_path / "index").search(["push"], method=method)
    assert build(code, tmp_path / "index", checkpoint, rebuild=True).report.rows == 5
    assert CodeIndex.open(tmp_path / "index").search(["push"])[0].hits
