import builtins
import json
import os
import random
import runpy
import shutil
from itertools import islice
from types import FunctionType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modular_star_encoder.data.sources import dataset_rows
from modular_star_encoder.data.sources.dataset_rows import open_dataset_rows
from modular_star_encoder.synthconl import near_duplicate_job, row_files
from modular_star_encoder.synthconl.near_duplicate_job import drop_near_duplicates
from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings, find_near_duplicates, fingerprint
from tests.errors import raises
from tests.processes import ended_by_sigkill, start_process
from tests.synthconl import samples
from tests.tiny import contents

AGAINST = {"bench": ["x = 1", ""]}


@pytest.fixture(scope="module")
def rows():
    """Shuffled rows with two columns of text; some texts are blank or null."""
    rng = random.Random(0)
    first, second = samples.rows_with_near_duplicates(300, seed=1), samples.rows_with_near_duplicates(300, seed=2)
    first[7], second[8], second[9], first[10], second[10] = "", None, "x = 1", None, None
    rows = [
        {"id": f"id-{number:03d}", "code": one, "translation": other, "number": number, "unused": [number]}
        for number, (one, other) in enumerate(zip(first, second, strict=True))
    ]
    rng.shuffle(rows)
    return rows


def write_shards(folder, rows, sizes=(120, 0, 130, 50)):
    schema, remaining = pa.Table.from_pylist(rows).schema.with_metadata({"about": "rows of a test"}), iter(rows)
    for number, size in enumerate(sizes):
        path = folder / f"part-{number % 2}" / f"{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(islice(remaining, size)), schema), path, row_group_size=32)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory, rows):
    return write_shards(tmp_path_factory.mktemp("rows"), rows)


def written_order(source):
    return [
        row for path in sorted(source.rglob("*.parquet")) for row in pq.read_table(path, partitioning=None).to_pylist()
    ]


def drop(source, out, **options):
    options = {"columns": ["code", "translation"], "id_column": "id", "against": AGAINST, "progress": False, **options}
    return drop_near_duplicates(source, out, **options)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "rows"
    return drop(source, out), out


@pytest.mark.parametrize("match", ["either", "both"])
def test_the_stage_keeps_what_the_search_in_memory_keeps(source, tmp_path, match):
    settings = DuplicateSettings(match=match, recall="high")
    rows = written_order(source)
    columns = [[fingerprint((row[name] for row in rows), settings.banding)] for name in ("code", "translation")]
    order = np.argsort([row["id"] for row in rows])
    expected = find_near_duplicates(columns, settings, order=order, against=AGAINST)
    report = drop(source, tmp_path / "out", settings=settings)
    assert written_order(tmp_path / "out") == [row for row, kept in zip(rows, expected.kept, strict=True) if kept]
    assert report["counts"] == expected.counts
    assert (report["rows"], report["counts"]["kept"]) == (300, expected.kept.sum())
    assert (report["pairs_compared"], report["near_pairs"]) == (expected.compared, len(expected.pairs))
    assert report["largest_clusters"] == expected.cluster_sizes[:20].tolist()
    assert report["counts"]["near another row"] > (50 if match == "either" else -1)
    assert report["counts"]["near a text of bench"] == 1


def test_files_keep_their_names_columns_and_schema_however_many_rows_are_read_at_a_time(
    source, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(row_files, "_ROWS_PER_GROUP", 5)
    out = tmp_path / "out"
    assert drop(source, out) == finished[0]
    assert written_order(out) == written_order(finished[1])
    names = [path.relative_to(source) for path in sorted(source.rglob("*.parquet"))]
    assert [path.relative_to(out) for path in sorted(out.rglob("*.parquet"))] == names
    for name in names:
        before, after = pq.read_schema(source / name), pq.read_schema(out / name)
        assert after.equals(before, check_metadata=True)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "dropped.jsonl", "part-0", "part-1", "report.json"]


def test_every_row_dropped_has_a_line_that_says_why(source, finished):
    report, out = finished
    before = contents(out)
    assert drop(source, out) == report  # finished already
    assert contents(out) == before
    rows = {row["id"]: row for row in written_order(source)}
    kept = {row["id"] for row in written_order(out)}
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["id"] for line in lines} == rows.keys() - kept
    assert len(lines) == report["rows"] - report["counts"]["kept"]
    for line in lines:
        if line["reason"].startswith("near a text of"):
            assert AGAINST["bench"][line["nearest"]] in (rows[line["id"]]["code"], rows[line["id"]]["translation"])
        else:
            assert line["cluster"] in kept
            assert line["cluster"] < line["id"]
            row, nearest = rows[line["id"]], rows[line["nearest"]]
            near = [samples.true_jaccard(row[name] or "", nearest[name] or "") for name in ("code", "translation")]
            assert line["similarity"] == max(near) >= 0.7
    assert json.loads((out / "report.json").read_text())["counts"] == report["counts"]


def test_without_ids_the_first_row_of_the_first_file_stays_and_a_file_may_lose_all_rows(tmp_path):
    rows = [{"code": text} for text in samples.sliding_windows(30, step=2)]
    write_shards(tmp_path / "in", rows + rows[:3], sizes=(30, 3))
    settings = DuplicateSettings(giant_cluster=10)
    options = {"columns": ["code"], "id_column": None, "against": None, "settings": settings}
    with pytest.warns(UserWarning, match="more than 10 different rows"):
        report = drop(tmp_path / "in", tmp_path / "out", **options)
    kept = report["counts"]["kept"]
    assert 2 < kept < 30
    assert report["giant_clusters"] == [{"cluster": "part-0/0.parquet:0", "rows": 33, "kept": kept}]
    read = [row for _, row in open_dataset_rows(tmp_path / "out", ["code"])]
    assert read == written_order(tmp_path / "out")
    assert (read[0], len(read)) == (rows[0], kept)


def test_rows_that_are_read_one_by_one_are_written_in_one_row_group(tmp_path, monkeypatch):
    write_shards(tmp_path / "in", [{"code": f"x = {number}"} for number in range(30)], sizes=(30,))
    monkeypatch.setattr(dataset_rows, "_MAX_BATCH_BYTES", 1)
    drop(tmp_path / "in", tmp_path / "out", columns=["code"], id_column=None, against={})
    assert pq.read_metadata(tmp_path / "out/part-0/0.parquet").num_row_groups == 1


def test_string_views_lists_of_them_and_tensors_are_copied(tmp_path):
    code = pa.array(["x = 1", "def f():\n    return 'a longer text'", "x = 1", "y = 2"], pa.string_view())
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(16.0).reshape(4, 2, 2))
    lists = pa.array([["a"], [], None, ["b"]], pa.list_(pa.binary_view()))
    table = pa.table({"code": code, "vectors": tensors, "lists": lists})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/a.parquet")
    drop(tmp_path / "in", tmp_path / "out", columns=["code"], id_column=None, against={})
    expected = pa.concat_tables([table.slice(0, 2), table.slice(3)])
    assert pq.read_table(tmp_path / "out/a.parquet").equals(expected)


def one_row(path):
    pq.write_table(pa.table({"code": [f"x = '{path}'"]}), path)


def test_files_in_hidden_folders_are_no_rows(tmp_path):
    for name in ("a", ".near-duplicate-job", ".lock"):
        (tmp_path / "in" / name).mkdir(parents=True)
        one_row(tmp_path / "in" / name / "a.parquet")
    report = drop(tmp_path / "in", tmp_path / "out", columns=["code"], id_column=None, against={})
    assert report["rows"] == report["counts"]["kept"] == 1
    assert [path.parent.name for path in (tmp_path / "out").rglob("*.parquet")] == ["a"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    one_row(tmp_path / "a.parquet")
    with raises("synthconl.shards.missing", "a.parquet is a file"):
        drop(tmp_path / "a.parquet", tmp_path / "out", columns=["code"], id_column=None)


def two_of_one_name(path):
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, names=["code", "code"]), path)


def invalid_text(path):
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"code": text}), path)


def damaged_row_group(path):
    pq.write_table(pa.table({"code": [f"x = {number}" * 50 for number in range(300)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes(300) + content[308:])


@pytest.mark.parametrize(
    ("name", "make", "key"),
    [
        ("report.json/a.parquet", one_row, "near_duplicates.name"),
        ("dropped.jsonl/a.parquet", one_row, "near_duplicates.name"),
        ("a.parquet", os.mkfifo, "shards.unreadable"),
        ("a.parquet", two_of_one_name, "shards.unreadable"),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1, but no more"), "shards.unreadable"),
        ("a.parquet", invalid_text, "shards.unreadable"),
        ("a.parquet", damaged_row_group, "shards.unreadable"),
        ("a.txt", one_row, "shards.missing"),
    ],
)
def test_names_of_reports_and_pipes_and_damaged_files_and_columns_of_one_name_are_errors(tmp_path, name, make, key):
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    make(path)
    with raises(f"synthconl.{key}", tmp_path / "in" if key == "shards.missing" else path):
        drop(tmp_path / "in", tmp_path / "out", columns=["code"], id_column=None)
    assert make in (invalid_text, damaged_row_group) or not (tmp_path / "out").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_text(path):
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(len(table)))[::-1]), path)


def of_another_file(path):
    shutil.copy(next(one for one in path.parent.glob("*.arrow") if one.stat().st_size != path.stat().st_size), path)


EVERYWHERE = {
    "empty": lambda path: path.write_bytes(b""),
    "pipe": lambda path: path.unlink() or os.mkfifo(path),
    "moved out": lambda path: path.symlink_to(path.rename(path.parents[2] / "moved")),
}
DAMAGES = {
    ".near-duplicate-job/*.arrow": EVERYWHERE | {"flipped": flip, "of another file": of_another_file},
    "part-0/0.parquet": EVERYWHERE | {"one row": one_row, "other text": other_text},
}


@pytest.fixture
def begun(source, tmp_path, monkeypatch):
    """The folder of a job that was interrupted after it wrote its first file of rows."""
    write_kept, out = near_duplicate_job.write_kept, tmp_path / "out"

    def interrupted(shard, target, kept):
        if (out / "part-0").exists():
            raise KeyboardInterrupt
        write_kept(shard, target, kept)

    with monkeypatch.context() as patch:
        patch.setattr(near_duplicate_job, "write_kept", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drop(source, out)
    return out


@pytest.mark.parametrize(("pattern", "name"), [(pattern, name) for pattern, some in DAMAGES.items() for name in some])
def test_a_damaged_or_foreign_file_of_a_begun_job_is_named_and_nothing_is_written(source, begun, pattern, name):
    path = max(begun.glob(pattern), key=lambda one: one.stat().st_size)
    DAMAGES[pattern][name](path)
    before = sorted(begun.rglob("*"))
    with raises("synthconl.near_duplicates.damaged", path, f"remove the folder {begun} and start again"):
        drop(source, begun)
    assert sorted(begun.rglob("*")) == before


@pytest.mark.parametrize("name", [".near-duplicate-job", "part-1"])
def test_a_job_writes_through_no_link_out_of_its_folder(source, begun, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    if (begun / name).exists():
        shutil.rmtree(begun / name)
    (begun / name).symlink_to(tmp_path / "elsewhere")
    with raises("synthconl.near_duplicates.damaged", name, begun):
        drop(source, begun)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_report_without_counts_is_damaged(source, finished, tmp_path):
    out = shutil.copytree(finished[1], tmp_path / "out")
    for change in ({}, {"counts": {"kept": "all"}}):
        content = {name: value for name, value in finished[0].items() if name != "counts"}
        (out / "report.json").write_text(json.dumps(content | change))
        with raises("synthconl.near_duplicates.damaged", out, "report.json", "counts"):
            drop(source, out)


@pytest.mark.slow
def test_killed_at_every_renaming_and_restarted_it_gives_the_same(source, finished, tmp_path):
    arguments, deaths = (samples.drop_and_die, source, tmp_path / "out", AGAINST), 0
    # The first two renamings are of one step, which a death between them repeats.
    while ended_by_sigkill(process := start_process(*arguments, 2 + deaths % 2)):
        deaths += 1
        assert deaths < 30
    assert process.exitcode == 0
    assert deaths >= 6
    assert contents(tmp_path / "out") == contents(finished[1])


@pytest.mark.parametrize(
    ("options", "key", "values"),
    [
        ({"columns": ["code", "text"]}, "shards.column_missing", ["'text'", "id, code, translation, number, unused"]),
        ({"columns": ["number"]}, "shards.column_type", ["'number'", "part-0/0.parquet", "int64"]),
        ({"columns": "code"}, "near_duplicates.columns", ["'code'"]),
        ({"id_column": "unused"}, "shards.column_type", ["'unused'"]),
    ],
)
def test_wrong_columns_are_reported_before_anything_is_written(source, tmp_path, options, key, values):
    with raises(f"synthconl.{key}", *values):
        drop(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ids", "fault"), [((1, 2, 1), "a repeated id: 1"), (("a", None, "b"), "missing ids: 1")])
def test_ids_must_be_there_and_differ(tmp_path, ids, fault):
    write_shards(tmp_path / "in", [{"id": one, "code": "x = 1"} for one in ids], sizes=(2, 1))
    with raises("synthconl.shards.ids", "'id'", fault):
        drop(tmp_path / "in", tmp_path / "out", columns=["code"])


@pytest.mark.parametrize("kinds", [("uint64", "uint64"), ("int32", "string"), ("string", "large_string")])
def test_ids_may_be_of_any_integer_or_text_type(tmp_path, kinds):
    (tmp_path / "in").mkdir()
    for number, kind in enumerate(kinds):
        values = pa.array([2**31 - 2 - number], pa.int64()).cast(kind)
        pq.write_table(pa.table({"id": values, "code": ["x = 1"]}), tmp_path / "in" / f"{number}.parquet")
    drop(tmp_path / "in", tmp_path / "out", columns=["code"], against=None)
    assert [str(row["id"]) for row in written_order(tmp_path / "out")] == ["2147483645"]


def test_folders_of_other_files_or_another_job_are_not_written(source, rows, finished, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, source, source / "out"):
        with raises("synthconl.near_duplicates.out", out):
            drop(source, out)
    (tmp_path / "inside").symlink_to(source / "part-0")
    (tmp_path / "source").symlink_to(source)
    links = [(source, "inside/out"), (source, "source"), (tmp_path / "source", source / "out")]
    for folder, out in (*links, (tmp_path / "source/part-0", source / "part-0/out")):
        with raises("synthconl.near_duplicates.out", tmp_path / out, folder):
            drop(folder, tmp_path / out)
    assert not list(source.rglob("out"))
    for options, changed in (
        ({"against": {"bench": ["x = 1", "y"]}}, "against"),
        ({"settings": DuplicateSettings(threshold=0.8)}, "settings"),
    ):
        with raises("synthconl.near_duplicates.other_job", finished[1], changed):
            drop(source, finished[1], **options)
    with raises("synthconl.near_duplicates.other_job", finished[1], "files"):
        drop(write_shards(tmp_path / "in", rows[::-1]), finished[1])


def test_shares_may_be_fingerprinted_before_by_several_callers(source, finished, tmp_path, monkeypatch):
    report, out = finished
    for number in (2, 0, 1):
        assert drop(source, tmp_path / "rows", share=(number, 3)) == {}
    monkeypatch.setattr("modular_star_encoder.synthconl.near_duplicate_job.read_texts", None)  # nothing is left to read
    assert drop(source, tmp_path / "rows") == report
    assert contents(tmp_path / "rows") == contents(out)
    assert drop(source, tmp_path / "rows", share=(0, 3)) == {}  # a late task does no harm
    assert contents(tmp_path / "rows") == contents(out)


def test_datatroves_tasks_write_the_same_files(source, finished, tmp_path):
    local = pytest.importorskip("datatrove.executor.local")
    step = runpy.run_path("examples/slurm/deduplicate.py")["Deduplicate"]
    # On Slurm, datatrove stores the class without the names of its module.
    step.run = FunctionType(step.run.__code__, {"__builtins__": builtins}, argdefs=step.run.__defaults__)
    options = {"columns": ["code", "translation"], "id_column": "id", "against": AGAINST}
    for shared, tasks in ((True, 3), (False, 1)):
        steps = [step(source, tmp_path / "rows", shared, **options)]
        local.LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(tmp_path / f"logs-{shared}")).run()
    assert contents(tmp_path / "rows") == contents(finished[1])
