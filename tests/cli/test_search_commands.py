import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qdrant_client import QdrantClient

from modular_star_encoder.inference import PROFILE_NAME
from modular_star_encoder.inference.checkpoints import slice_checkpoint
from modular_star_encoder.search import building
from modular_star_encoder.search import index as search_index
from tests.hub.stand_in_hub import Repository, StandInHub
from tests.search.conftest import build, write_code
from tests.tiny import REPOSITORY, ZERO, cache_repository, contents, save_tiny_checkpoint, tiny_profile


@pytest.fixture
def indexed(code, checkpoint, mose):
    """A folder with its index in `.mose`, of which one file was too large to read."""
    with open(code / "huge.py", "wb") as file:
        file.truncate(100_000_000)
    status, out, err = mose("index", code, "--model", checkpoint, "--exit-layers", "1,4")
    assert (status, "5 pieces of 4 files at exit 1, 4; embedded 4 files (5 pieces)" in out) == (0, True)
    assert "mose: note: 1 file left out: 1 too large; --show-skipped lists the files" in err
    return code


def test_an_index_is_brought_up_to_date_without_repeating_how_it_was_made(code, checkpoint, tmp_path, mose):
    made = ("--model", checkpoint, "--exit-layers", "1,4", "--languages", "python,go")
    for out in ((), ("--out", tmp_path / "index")):
        assert mose("index", code, *out, *made)[0] == 0
        write_code(code, {"stack.py": f"OUT_FOLDER = {str(out)!r}\n", "other.js": "function other() {\n}\n"})
        status, out_text, _ = mose("index", f"{code}/src/..", *out)
        assert (status, "at exit 1, 4; embedded 1 files (1 pieces), removed 0" in out_text) == (0, True)
    status, _, err = mose("index", code / "src", "--out", tmp_path / "index")
    assert (status, f"the folder {code}, not {code / 'src'}" in err) == (2, True)
    status, _, err = mose("index", code, "--model", checkpoint)
    assert (status, "was built with exit 1, 4, not 4; without javascript, " in err) == (2, True)
    assert mose("index", code, *made[:-1], "go,python")[0] == 0


def test_a_qdrant_collection_is_searched_by_its_location_without_the_folder(code, checkpoint, mose, monkeypatch):
    client = QdrantClient(":memory:")
    monkeypatch.setattr("qdrant_client.QdrantClient", lambda **_: client)
    place = "qdrant:i@http://localhost:6333"
    assert mose("index", code, "--model", checkpoint, "--out", place)[0] == 0
    shutil.rmtree(code)
    status, out, _ = mose("search", "add two numbers", "--index", place, "--languages", "go")
    assert (status, "add.go:3 " in out.splitlines()[0]) == (0, True)


def test_the_index_of_the_working_folder_is_asked(indexed, mose, monkeypatch):
    monkeypatch.chdir(indexed / "src")
    status, out, _ = mose("search", "add two numbers", "--languages", "go", "--exit-layer", "1")
    assert status == 0
    assert "add.go:3 " in out.splitlines()[0]
    cascade = ("search", "push", "pop an item", "--rerank-exit-layer", "4", "--candidates", "3")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "embedding up to 3 hits at exit 2" in mose("search", "push", "--rerank-exit-layer", "2", *cascade[-2:])[2]
    _, out, err = mose(*cascade)
    said = "embedding" in err, "exit 4 ranked the best hits again for 2 of 2 questions" in err, "# push" in out
    assert said == (False, True, True)
    status, out, _ = mose(*cascade, "--json")
    answers = json.loads(out)
    assert (status, [answer["question"] for answer in answers]) == (0, ["push", "pop an item"])
    assert all(answer["reranked"] and answer["method"] == "hybrid" for answer in answers)


@pytest.mark.parametrize(("milliseconds", "exit_layer"), [("2", 1), ("100", 4)])
def test_the_profile_of_a_moved_checkpoint_chooses_the_exit(code, checkpoint, tmp_path, mose, milliseconds, exit_layer):
    built_with, moved = tmp_path / "model", tmp_path / "moved"
    index = build(code, tmp_path / "index", shutil.copytree(checkpoint, built_with), exit_layers=(1, 4))
    tiny_profile(index.settings.checksum).save(built_with.rename(moved) / PROFILE_NAME)
    search = ("search", "push", "--index", tmp_path / "index", "--model", moved, "--json")
    status, out, _ = mose(*search, "--latency-ms", milliseconds)
    assert (status, json.loads(out)[0]["hits"][0]["exit_layer"]) == (0, exit_layer)
    profile = (moved / PROFILE_NAME).rename(tmp_path / "profile.json")
    status, out, _ = mose(*search, "--latency-ms", milliseconds, "--profile", profile)
    assert (status, json.loads(out)[0]["hits"][0]["exit_layer"]) == (0, exit_layer)
    status, _, err = mose(*search, "--latency-ms", "0.01", "--profile", profile)
    assert (status, "No exit meets --latency-ms 0.01 for" in err, "latency_ms" in err) == (2, True, False)


def test_a_missing_profile_is_reported_with_the_commands_that_make_and_use_one(code, mose):
    for options in ((), ("--profile", "nowhere.json")):
        status, _, err = mose("search", "push", code, "--latency-ms", "20", *options)
        assert (status, "`mose profile mose-code --out profile.json`, and add --profile profile.json" in err) == (
            2,
            True,
        )
    status, _, err = mose("search", "push", code, "--profile", "nowhere.json")
    assert (status, "--profile needs --latency-ms" in err) == (2, True)


def test_a_folder_is_searched_without_an_index_by_the_same_rankings(code, checkpoint, shared_index, mose):
    """Words, filters and re-ranking give what an index gives, and the folder stays as it was."""
    before = sorted(code.rglob("*"))
    ways = (
        ("--exit-layer", "1"),
        ("--exit-layer", "4", "--method", "vector"),
        ("--method", "lexical"),
        ("--exit-layer", "1", "--languages", "go,python", "--path", "s*"),
        ("--rerank-exit-layer", "4", "--candidates", "3"),
    )
    for way in ways:
        places = []
        for where in (("--folder", code, "--model", checkpoint), ("--index", shared_index.store.location)):
            status, out, _ = mose("search", "push an item", "--json", *where, *way)
            assert status == 0
            places.append([(Path(hit["path"]).name, hit["line"]) for hit in json.loads(out)[0]["hits"]])
        assert places[0] == places[1] != []
    assert sorted(code.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("exit_layer", [None, 0, 2])
def test_a_checkpoint_on_the_hub_is_searched_by_its_name(code, tmp_path, exit_layer):
    """Also a slice of it. A search imports no torch, and need not name the checkpoint of its index."""
    folder = save_tiny_checkpoint(tmp_path / "whole", **ZERO)
    if exit_layer is not None:
        folder = slice_checkpoint(folder, exit_layer, tmp_path / "slice")
    script = "import sys; from modular_star_encoder.cli.main import main; status = main(sys.argv[1:]); "
    script += "sys.exit(3 if sys.argv[1] == 'search' and 'torch' in sys.modules else status)"
    with StandInHub() as hub:
        hub.repositories["me/tiny"] = Repository(False)
        files = {path.name: (path.read_bytes(), False) for path in folder.iterdir() if path.is_file()}
        commit = hub.repositories["me/tiny"].commit("main", {**files, "large.bin": (b"x", False)}, "tiny")
        environment = os.environ | hub.environment(tmp_path / "home")
        options = () if exit_layer is None else ("--model", "me/tiny", "--exit-layer", str(exit_layer))
        for words in (("index", ".", "--model", "me/tiny", *options), ("search", "push an item", "--json", *options)):
            run = subprocess.run([sys.executable, "-c", script, *words], cwd=code, env=environment, capture_output=True)
            assert run.returncode == 0, run.stderr.decode()[-2000:]
    assert json.loads(run.stdout)[0]["hits"][0]["exit_layer"] == (exit_layer or 0)
    assert json.loads((code / ".mose" / "index.json").read_text())["settings"]["checksum"] == commit
    assert not list((tmp_path / "home").rglob("large.bin"))


@pytest.mark.parametrize("options", [("--path", "["), ("--languages", "cobol"), ("--rerank-exit-layer", "5")])
def test_a_request_is_checked_before_a_folder_is_indexed(code, mose, cache, options):
    assert mose("search", "push", code, *options)[0] == 2
    assert not cache.exists()


def test_a_search_uses_the_own_index_of_a_folder_and_names_its_model(indexed, checkpoint, mose, cache, tmp_path):
    said = f"mose: note: exit 4 of {checkpoint}, the index's own model, ranked the hits\n"
    for options, expected in (((), said), (("--model", checkpoint), "")):
        status, out, err = mose("search", "push", "--json", indexed, *options)
        assert (status, json.loads(out)[0]["hits"][0]["exit_layer"], err) == (0, 4, expected)
    assert not cache.exists()
    moved = write_code(tmp_path / "other", {"one.py": "def only_here():\n    return 1\n"})
    build(indexed, moved / ".mose", checkpoint)
    assert mose("search", "only_here", moved)[1].startswith(str(moved / "one.py"))


@pytest.mark.parametrize("is_on_the_hub", [False, True])
def test_another_model_has_its_own_index_in_the_cache(indexed, mose, monkeypatch, tmp_path, cache, is_on_the_hub):
    model = save_tiny_checkpoint(tmp_path / "m", rope_parameters={"rope_theta": 5.0})
    if is_on_the_hub:
        cache_repository(model, tmp_path / "hub", monkeypatch)
        model = REPOSITORY
    before = contents(indexed / ".mose")
    monkeypatch.chdir(indexed / "src")
    for where in ((), (indexed,)):  # the index of the folder is at exits 1 and 4
        status, out, _ = mose("search", "push", *where, "--model", model, "--exit-layer", "2", "--json")
        assert (status, json.loads(out)[0]["hits"][0]["exit_layer"]) == (0, 2)
    assert contents(indexed / ".mose") == before
    assert len(list(cache.glob("*/*/*/index.json"))) == 1
    status, _, err = mose("search", "push", "--index", indexed / ".mose", "--model", model)
    assert (status, f"`mose index FOLDER --model {model} --rebuild`" in err) == (2, True)
    assert mose("index", indexed, "--model", model, "--rebuild")[0] == 0
    (manifest,) = cache.glob("*/*/*/index.json")
    shutil.rmtree(manifest.parent)
    status, out, _ = mose("search", "push", indexed, "--model", model, "--json")
    assert (status, json.loads(out)[0]["hits"][0]["exit_layer"], list(manifest.parent.parent.iterdir())) == (0, 4, [])


def test_an_empty_folder_is_no_success(tmp_path, mose):
    (tmp_path / "empty").mkdir()
    for words in (("index",), ("index", "--json"), ("search", "push")):
        status, _, err = mose(*words, tmp_path / "empty")
        assert (status, err.splitlines()[-1].startswith("mose: error: ")) == (2, True)
        assert str(tmp_path / "empty") in err


def test_the_index_of_a_folder_in_the_cache_is_never_stale(code, checkpoint, mose, monkeypatch, cache):
    search = ("search", "brand_new", code, "--model", checkpoint, "--top-k", "1")
    assert "brand_new" not in mose(*search)[1]
    write_code(code, {"stack.py": "def brand_new():\n    return 1\n"})
    assert "brand_new" in mose(*search)[1]
    assert len(list(cache.glob("*/*/*/index.json"))) == 1
    (manifest,) = cache.glob("*/*/*/index.json")
    manifest.write_text(manifest.read_text().replace('"checksum": "', '"checksum": "of-an-older-model-'))
    assert "brand_new" in mose(*search)[1]
    cache.chmod(0o500)
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr(building, "FEW_NEW_FILES", 0)
    monkeypatch.setattr(search_index, "_SECONDS_FOR_THE_FIRST_ANSWER", 0)  # not without a cache, where none reads on
    assert "brand_new" in mose(*search)[1]
    cache.chmod(0o700)


def test_the_last_argument_may_be_the_folder_and_nothing_else_is_needed(code, mose, monkeypatch):
    explained = ("search", "split a header into names", code, "--explain", "--top-k", "1")
    status, out, _ = mose(*explained)
    assert (status, "parseHeader.js:2 " in out, "similarity and words" in out) == (0, True, True)
    assert "similarity and words" in json.loads(mose(*explained, "--json")[1])[0]["hits"][0]["reasons"]
    monkeypatch.chdir(code)
    assert mose("search", "split a header into names", "--top-k", "1")[1].startswith("src/parseHeader.js:2 ")
    assert mose("search", "split a header into names", "--top-k", "1", "src")[1].startswith("src/parseHeader.js:2 ")


def test_a_question_that_is_the_name_of_a_folder_is_asked_with_a_note(code, mose, monkeypatch):
    monkeypatch.chdir(code)
    status, out, err = mose("search", "src", "--json")
    assert (status, json.loads(out)[0]["question"]) == (0, "src")
    assert "mose: note: searching for 'src' in this folder" in err
    assert "mose: note: searching" not in mose("search", "push", "src", "--json")[2]


def test_changes_are_reported_and_skipped_files_listed(indexed, checkpoint, mose, monkeypatch):
    (indexed / "li\x1bst.py").symlink_to("stack.py")
    listed = ["huge.py: too large", "li\N{REPLACEMENT CHARACTER}st.py: symbolic link"]
    assert mose("index", indexed, "--show-skipped")[1].splitlines()[1:] == listed
    (indexed / "stack.py").write_text("def peek(items):\n    return items[-1]\n")
    report = json.loads(mose("index", indexed, "--show-skipped", "--json")[1])
    counts = {"files": 4, "embedded_files": 1, "embedded_rows": 1, "removed_files": 0, "rows": 5}
    assert report.items() >= {"index": str(indexed / ".mose"), **counts}.items()
    assert report["skipped_files"] == {"huge.py": "too large", "li\x1bst.py": "symbolic link"}
    monkeypatch.chdir(indexed)
    _, out, err = mose("search", "push", "--show-skipped", "--json")
    assert (err.splitlines()[:-1], len(json.loads(out))) == (listed, 1)  # the last names the model
    shutil.rmtree(indexed / ".mose")
    _, _, err = mose("search", "push", "--folder", ".", "--model", checkpoint)
    assert "mose: note: 2 files left out: 1 symbolic link, 1 too large; --show-skipped lists the files" in err
    assert "left out" not in mose("search", "push", "--folder", ".", "--model", checkpoint)[2]


def test_markdown_is_read_on_request(code, checkpoint, tmp_path, mose):
    write_code(code, {"README.md": "# Usage\n\nHow to push an item.\n"})
    made = ("--model", checkpoint, "--exit-layer", "1", "--out")
    assert "of 4 files" in mose("index", code, *made, tmp_path / "plain")[1]
    assert "of 5 files" in mose("index", code, *made, tmp_path / "docs", "--docs")[1]
    assert "of 1 files" in mose("index", code, *made, tmp_path / "only", "--languages", "markdown")[1]
    assert "was built without markdown. " in mose("index", code, *made, tmp_path / "plain", "--docs")[2]
    hits = json.loads(mose("search", "usage", "--index", tmp_path / "docs", "--json", "--method", "lexical")[1])[0][
        "hits"
    ]
    assert (hits[0]["name"], hits[0]["line"]) == ("Usage", 1)


def test_related_needs_no_index_and_no_working_folder(code, mose, monkeypatch, tmp_path, cache):
    monkeypatch.chdir(write_code(tmp_path / "elsewhere"))
    (code / ".git").mkdir()
    for _ in range(2):
        status, out, _ = mose("related", code / "src" / "add.go:4", "--json", "--top-k", "9")
        assert (status, {Path(hit["path"]).name for hit in json.loads(out)["hits"]}) == (
            0,
            {"stack.py", "parseHeader.js", "settings.py"},
        )
        (code / ".git").rename(code / "gone") if (code / ".git").exists() else None
    monkeypatch.chdir(code / "src")
    status, _, err = mose("related", "add.go:1", "--top-k", "2")
    assert (status, "no code at line 1 of 'src/add.go'" in err) == (2, True)
    assert mose("search", "push", code)[0] == 0
    assert len(list(cache.glob("*/*/*/index.json"))) == 1


def test_json_and_text_show_a_terminal_no_character_that_steers_it(code, mose):
    write_code(code, {"a\u202e\x1b[2Jb.py": "def turned():\n    return '\u2066\x9b'\n", "c\x1b[2J.py": "x = 1\n"})
    name = "a\u202e\x1b[2Jb.py"
    shown = [mose("index", code, "--json", "--show-skipped")[1], mose("search", "turned", code, "--json")[1]]
    assert json.loads(shown[1])[0]["hits"][0]["path"].endswith(name)
    assert json.loads(shown[1])[0]["hits"][0]["text"] == "def turned():\n    return '\u2066\x9b'"
    shown += [mose("search", "turned", code)[1], *mose("index", code, "--show-skipped")[1:]]
    shown += [mose("index", write_code(code / "d\udce9\x1b[2J"))[1], mose("search", "turned \x1b[2J", "b", code)[1]]
    shown += [mose("related", f"{code / name}:1", *options)[1] for options in ((), ("--json",))]
    for text in shown:
        assert text.translate({10: "", 13: ""}).isprintable()  # 13: of the progress bar


def test_the_skill_file_shows_the_schema_of_json(code, mose):
    skill = Path("examples/search/SKILL.md").read_text()
    (answer,) = json.loads(mose("search", "push", code, "--json")[1])
    shown = json.loads(skill[skill.index('    {"question"') : skill.index("Hits are sorted")])
    assert (list(shown), list(shown["hits"][0])) == (list(answer), list(answer["hits"][0]))
