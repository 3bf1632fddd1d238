import errno
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from modular_star_encoder.search import building, local_store
from modular_star_encoder.search import index as search_index
from modular_star_encoder.search.index import CodeIndex, open_for_search
from modular_star_encoder.search.qdrant_store import QdrantStore
from modular_star_encoder.search.vector_store import file_id
from tests.errors import raises
from tests.search.conftest import FILES, build, stored_rows, write_code

ODD_NAMES = [
    b"caf\xe9.py",
    b"na\xefve.py",
    b"line\nbreak.py",
    b'it\'s "quoted"; DROP TABLE.py',
    "größe 🐍.py".encode(),
    b"\x1b[31mred.py",
]


def function(name):
    return f"def {name}():\n    return {name!r}\n"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A folder with one good file, whose function is called `good`, and much that isn't."""
    outside = write_code(tmp_path / "outside", {"secret.py": function("secret")})
    folder = write_code(tmp_path / "folder", {"good.py": function("good"), "locked/hidden.py": function("hidden")})
    (folder / "sub").mkdir()
    os.symlink("..", folder / "sub" / "loop")
    os.symlink(outside, folder / "linked")
    os.symlink(outside / "secret.py", folder / "linked.py")
    (folder / "folder.py").mkdir()
    with monkeypatch.context() as context:  # folders with paths up to the longest, and beyond
        context.chdir(folder)
        for _ in range(25):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
            Path("f" * 197 + ".py").write_text(function("good"))
    return folder


def test_nothing_in_a_folder_crashes_the_index_or_leads_out_of_it(hostile, tmp_path, checkpoint, monkeypatch):
    scandir = os.scandir

    def refusing(path):  # root may read every folder, so permissions alone would test nothing there
        if os.fspath(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    index = build(hostile, tmp_path / "index", checkpoint, processes=2)
    rows = stored_rows(tmp_path / "index")
    assert {row["name"] for row in rows} == {"good"}
    assert {row["path"] for row in rows if len(row["path"]) < 200} == {"good.py"}
    assert len({row["path"] for row in rows}) > 1
    assert {("locked", "unreadable folder"), ("linked.py", "symbolic link")} < set(index.report.skipped_files)
    assert index.report.skipped["unreadable"] == 1  # the file whose path is too long
    assert index.update(processes=1, progress=False).embedded_files == 0
    assert not any("secret" in hit.text for hit in index.search(["secret"], top_k=50)[0].hits)


def test_names_in_any_encoding_are_indexed_once_and_found_each_by_its_own_name(tmp_path, checkpoint):
    folder = os.fsencode(tmp_path) + b"/f\xffolder"
    os.mkdir(folder)
    names = {name: f"number_{number}" for number, name in enumerate(ODD_NAMES)}
    names[b"caf\\xe9.py"] = "escaped"  # what the name of another file looks like
    for name, defined in names.items():
        Path(os.fsdecode(os.path.join(folder, name))).write_text(function(defined))
    index = build(os.fsdecode(folder), tmp_path / "index", checkpoint)
    assert index.report.embedded_files == index.report.rows == 7
    assert index.update(processes=1, progress=False).embedded_files == 0
    hits = CodeIndex.open(tmp_path / "index").search(["number"], top_k=50)[0].hits
    assert {hit.name for hit in hits} == set(names.values())
    for name, defined in [*names.items(), (b"na\\xefve.py", names[b"na\xefve.py"])]:  # the last as hits show it
        found = index.related(os.fsdecode(name), 1, top_k=50)
        assert {hit.name for hit in found} == set(names.values()) - {defined}
        assert all(hit.path.encode("utf-8") for hit in found)
    assert len(index.search(["number"], path='it\'s "quoted"; DROP TABLE.py')[0].hits) == 1
    os.unlink(os.path.join(folder, ODD_NAMES[0]))
    report = index.update(processes=1, progress=False)
    assert (report.removed_files, report.embedded_files, report.rows) == (1, 0, 6)
    assert "escaped" in {row["name"] for row in stored_rows(tmp_path / "index")}


@pytest.mark.parametrize("blank", [None, "\n \n\t\n" * 50, "x = 1\n"])
def test_a_folder_without_code_is_an_empty_index(tmp_path, checkpoint, blank):
    (tmp_path / "code").mkdir()
    if blank:
        (tmp_path / "code" / "blank.py").write_text(blank)
    index = build(tmp_path / "code", tmp_path / "index", checkpoint)
    assert index.report.rows == 0
    for method in ("vector", "lexical", "hybrid"):
        assert index.search(["anything"], method=method)[0].hits == []
    (tmp_path / "code" / "a.py").write_text(function("a"))
    assert index.update(processes=1, progress=False).rows == 1
    (tmp_path / "code" / "a.py").unlink()
    assert index.update(processes=1, progress=False).rows == 0


def test_files_next_to_an_index_do_not_harm_it(index, tmp_path, code, checkpoint):
    for name in (".DS_Store", ".margins.json.123.tmp"):
        (tmp_path / "index" / name).write_text("{")
    assert CodeIndex.open(tmp_path / "index").search(["push"])[0].hits
    assert build(code, tmp_path / "index", checkpoint).report.embedded_files == 0
    (tmp_path / "index" / "index.json").unlink()
    with raises("search.index.foreign"):
        CodeIndex.open(tmp_path / "index")


@pytest.mark.parametrize("stamp", [None, 7, [], "abc", [1]])
def test_a_damaged_stamp_makes_its_file_be_read_again(index, stamp):
    index.store.keep_stamps({file_id("stack.py"): stamp})
    assert index.update(processes=1, progress=False).files == len(FILES)


@pytest.mark.parametrize("rebuild", [False, True])
def test_what_is_no_index_of_ours_is_never_replaced(tmp_path, code, checkpoint, rebuild):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "snippets.db").write_text("mine")
    client = QdrantClient(":memory:")
    client.create_collection("theirs", vectors_config=VectorParams(size=2, distance=Distance.COSINE))
    client.upsert("theirs", [PointStruct(id=1, vector=[1, 0], payload={"mine": 1})])
    for location in (tmp_path / "theirs", QdrantStore(client, "theirs")):
        with raises("search.index.foreign"):
            build(code, location, checkpoint, rebuild=rebuild)
    assert {path.name: path.read_text() for path in (tmp_path / "theirs").iterdir()} == {"snippets.db": "mine"}
    assert [point.payload for point in client.scroll("theirs")[0]] == [{"mine": 1}]


def forged(clone, model, **settings):
    """A folder with an index that has these settings, but was built with others."""
    build(write_code(clone, {"a.py": function("good")}), clone / ".mose", model)
    manifest = clone / ".mose" / "index.json"
    content = json.loads(manifest.read_text())
    content["settings"] |= settings
    manifest.write_text(json.dumps(content))
    (clone / ".mose" / "stamps.json").unlink(missing_ok=True)


@pytest.mark.parametrize("of", ["../../outside", "/"])
def test_an_index_that_came_with_a_folder_reads_nothing_outside_it(hostile, tmp_path, checkpoint, monkeypatch, of):
    forged(tmp_path / "clone", checkpoint, folder=of)
    monkeypatch.chdir(tmp_path / "clone")
    with raises("search.index.outside"):
        open_for_search()
    assert {row["name"] for row in stored_rows(tmp_path / "clone" / ".mose")} == {"good"}


@pytest.mark.parametrize("model", ["owner/model", "sub/model"])
def test_the_index_of_a_folder_loads_no_model_from_the_folder_or_the_hub(tmp_path, checkpoint, monkeypatch, model):
    """A model of the Hub is found in this machine's cache, in the version of the index."""
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *place, **_: asked.append(place) or [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    forged(tmp_path / "clone", checkpoint, checkpoint=model, checksum="a1" * 20)
    shutil.copytree(checkpoint, tmp_path / "clone" / "sub" / "model")
    monkeypatch.chdir(tmp_path / "clone")
    with raises("search.index.model", model, "--model"):
        open_for_search()
    assert not asked
    shutil.copytree(checkpoint, tmp_path / "hub" / f"models--{model.replace('/', '--')}" / "snapshots" / ("a1" * 20))
    if model == "owner/model":
        index, _ = open_for_search()
        assert index.search(["good"])[0].hits[0].name == "good"
    assert not asked


def test_the_segments_of_an_index_are_files_of_its_own_folder(index, tmp_path):
    theirs = shutil.copytree(tmp_path / "index", tmp_path / "theirs")
    (segment,) = theirs.glob("rows-*")
    manifest = tmp_path / "index" / "index.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "segments": {f"../theirs/{segment.stem}": []}}))
    with raises("search.index.unreadable", "names segments"):
        CodeIndex.open(tmp_path / "index").search(["push"])


def test_an_update_follows_no_link_in_its_index_removes_only_its_own_files_and_reads_none(code, tmp_path, checkpoint):
    victim, folder = tmp_path / "victim", code
    victim.write_text("mine")
    (folder / ".mose").mkdir()
    os.symlink(victim, folder / ".mose" / ".gitignore")
    (folder / ".mose" / "rows-2024.csv").write_text("mine")
    build(folder, None, checkpoint)
    (folder / ".mose" / "b.py").write_text(function("b"))
    assert build(folder, None, checkpoint).report.files == len(FILES)
    assert victim.read_text() == (folder / ".mose" / "rows-2024.csv").read_text() == "mine"
    assert (folder / ".mose" / ".gitignore").read_text() == "*\n"


@pytest.mark.parametrize("content", ["gone", "link", "folder"])
@pytest.mark.parametrize(("module", "moment"), [(building, "_divided"), (search_index, "update_store")])
def test_an_index_replaced_during_an_update_is_not_written(
    code, tmp_path, checkpoint, change_before, content, module, moment
):
    (outside := tmp_path / "outside").mkdir()
    (outside / ".gitignore").write_text("mine")

    def replace():
        (code / ".mose").rename(tmp_path / "old")
        if content == "link":
            (code / ".mose").symlink_to(outside)
        elif content == "folder":
            (code / ".mose").mkdir()

    change_before(replace, module, moment)
    with raises("search.index.replaced", code / ".mose"):
        build(code, code / ".mose", checkpoint)
    assert [one.name for one in outside.iterdir()] == [".gitignore"]
    assert content == "gone" or not (code / ".mose" / "index.json").exists()


def test_a_segment_whose_header_is_too_large_is_damage(index, tmp_path, monkeypatch):
    monkeypatch.setattr(local_store, "MAX_JSON_BYTES", 20)
    with raises("search.index.unreadable", "more than 20"):
        CodeIndex.open(tmp_path / "index").store.count()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lengths", lambda array: np.zeros((5_000_000_000, 0), array.dtype)),
        ("vectors_4", lambda array: array[:, :0]),
        ("scales_4", lambda array: array[:1]),
        ("other", lambda _: np.zeros(1, np.uint32)),
        ("word_starts", lambda array: np.append(array[:-1], array.dtype.type(400_000_000))),
        ("row_starts", lambda array: np.append(array[:-1], array.dtype.type(-1))),
    ],
)
def test_a_segment_whose_arrays_do_not_fit_together_is_damage(index, tmp_path, name, change):
    (path,) = (tmp_path / "index").glob("rows-*")
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        files = file.metadata()
    save_file(arrays | {name: change(arrays.get(name))}, path, files)
    with raises("search.index.unreadable", name):
        CodeIndex.open(tmp_path / "index").store.count()


LARGE = json.dumps(["a.py", "python", "f", 1, 1, "x" * (1 << 25), 1, ["f"]]).encode()


@pytest.mark.parametrize("row", [LARGE, b"[" * 200_000], ids=["too large", "too deep"])
def test_a_row_that_unpacks_to_too_much_is_damage(row):
    packed = np.frombuffer(zlib.compress(row), np.uint8)
    arrays = {"rows": packed, "row_starts": np.array([0, len(packed)]), "lengths": np.zeros(1, np.int64)}
    segment = local_store._Segment("rows-1", arrays, [])
    with raises("search.index.unreadable"):
        segment.snippet(0)
