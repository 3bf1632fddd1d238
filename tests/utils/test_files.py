import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import pytest

from modular_star_encoder.utils import files
from modular_star_encoder.utils.crash_safe import crash_safe_map
from modular_star_encoder.utils.files import folder_lock, staged_file, staged_folder, write_json
from tests.errors import raises


def test_what_was_written_is_read_back_and_a_failed_write_leaves_it_alone(tmp_path, monkeypatch):
    path, content = tmp_path / "results.json", {"mrr": 0.5, "größe": [1, 2]}
    write_json(path, content)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"mrr": float("nan")})

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"mrr": 0.6})
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_resumable_write_removes_what_a_killed_one_left(tmp_path):
    (tmp_path / ".rows.tmp").mkdir()
    (tmp_path / ".rows.tmp" / "half").touch()
    with staged_folder(tmp_path / "rows", resumable=True) as folder:
        assert list(folder.iterdir()) == []
        (folder / "whole").write_text("1")
    with staged_file(tmp_path / "rows.txt", resumable=True) as path:
        path.write_text("2")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["rows", "rows.txt", "whole"]


def test_a_folder_with_content_is_not_replaced_even_if_another_run_wrote_it_meanwhile(tmp_path):
    with raises("files.folder.not_empty", tmp_path / "out"), staged_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs.txt").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "theirs.txt"]
    with raises("files.folder.not_empty", tmp_path), staged_folder(tmp_path):
        pass


def test_an_empty_folder_may_be_a_link_but_neither_current_nor_a_mount_point(tmp_path, monkeypatch):
    (folder := tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        with raises("files.folder.in_use", folder), staged_folder("."):
            pass
        patch.chdir(tmp_path)
        patch.setattr("os.path.ismount", lambda path: path == folder)
        with raises("files.folder.in_use", folder), staged_folder("link"):
            pass
    with staged_folder(tmp_path / "link") as staging:
        (staging / "a").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "folder", "link"]
    assert (tmp_path / "link").is_symlink()


def test_a_file_that_could_not_be_written_is_reported_beforehand(tmp_path):
    files.check_writable(tmp_path / "results.json")
    with raises("files.not_writable", tmp_path / "no"):
        files.check_writable(tmp_path / "no" / "results.json")
    with raises("files.not_writable", "is a folder"):
        files.check_writable(tmp_path)


def test_the_next_call_removes_what_an_ended_process_left_and_nothing_of_a_running_one_or_of_another_machine(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def names_of(process, machine):
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: process)
            patch.setattr("platform.node", lambda: machine)
            with staged_folder(tmp_path / "out") as staged, files.scratch_folder("card") as scratch:
                return {staged.name, scratch.name}

    running, elsewhere = names_of(os.getppid(), "here"), names_of(ended.pid, "there")
    for name in running | elsewhere | names_of(ended.pid, "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("platform.node", lambda: "here")
    with staged_folder(tmp_path / "out"), files.scratch_folder("card"):
        pass
    assert {*os.listdir(tmp_path)} == running | elsewhere | {"out"}


def test_without_a_known_home_folder_names_stay_as_they_are_and_there_is_no_cache(monkeypatch):
    assert str(files.user_path("~nobody-here/x", "y")) == "~nobody-here/x/y"
    monkeypatch.setenv("HOME", "/home/me")
    assert str(files.user_path("~/x")) == "/home/me/x"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(files.cache_folder("search")) == "/cache/modular-star-encoder/search"
    for unknown in ("~nobody-here/y", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unknown)
        assert files.cache_folder("search") is None


def test_folders_nested_too_deeply_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FOLDER_DEPTH", 2)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("c.csv", "a/b/d.csv", "e.txt"):
        (tmp_path / name).touch()
    assert files.files_below(tmp_path, "*.csv") == [tmp_path / "a" / "b" / "d.csv", tmp_path / "c.csv"]
    (tmp_path / "a" / "b" / "c").mkdir()
    with raises("files.folder.too_deep", tmp_path, "2"):
        files.files_below(tmp_path)


def test_links_out_of_a_folder_are_an_error_except_into_the_hub_s_cache(tmp_path):
    (folder := tmp_path / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for file in (folder / "a.csv", tmp_path / "b.csv", tmp_path / "blobs" / "c"):
        file.touch()
    for name, target in {"inside": "a.csv", "blob": "../../blobs/c", "loop": "loop.csv"}.items():
        (folder / f"{name}.csv").symlink_to(target)
    (folder / "data").mkdir()
    (folder / "data" / "deep.csv").symlink_to("../../../blobs/c")
    assert [path.stem for path in files.files_below(folder, "*.csv")] == ["a", "blob", "deep", "inside", "loop"]
    assert len(files.files_below(folder / "data", "*.csv")) == 1
    for name, target in {"outside": "../../b.csv", "device": "/dev/zero"}.items():
        (folder / f"{name}.csv").symlink_to(target)
    with raises("files.folder.links", "2 links", folder / "device.csv"):
        files.files_below(folder, "*.csv")
    assert files.files_below(folder, links=False) == [folder / "a.csv"]


@pytest.mark.parametrize("text", ["[" * 100_000, "1e999", "NaN", "9" * 30, "{", "\ud800", f"[{'[],' * 600}0]"])
def test_json_beyond_the_limits_is_a_value_error(tmp_path, text, monkeypatch):
    monkeypatch.setattr("modular_star_encoder.utils.files.MAX_JSON_VALUES", 1000)
    (tmp_path / "a.json").write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError):  # noqa: PT011 (the library's sentences differ)
        files.read_json(tmp_path / "a.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        files.read_json(tmp_path / "pipe")


@dataclass
class Record:
    count: int
    names: tuple[str, ...] = ()
    share: float | None = None


def test_a_field_of_another_type_is_a_type_error():
    files.check_types(Record(1, ("a",), 1))
    for wrong in (Record(True), Record(1.0), Record(1, ["a"]), Record(1, (2,)), Record(1, (), float("nan"))):
        with pytest.raises(TypeError):
            files.check_types(wrong)


def squares(numbers):
    for number in numbers:
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1000:
            raise ValueError("a thousand")
        if number == 2000:
            time.sleep(60)
    return [number * number for number in numbers]


def mapped(numbers, processes=2, **options):
    options |= {"processes": processes, "chunk_size": 3, "crashed": lambda number: [("crashed", number)]}
    return [result for results in crash_safe_map(squares, iter(numbers), **options) for result in results]


def test_results_come_in_order_for_any_number_of_processes_and_the_caller_gets_an_error():
    assert mapped(range(24)) == mapped(range(24), processes=1) == [number * number for number in range(24)]
    with pytest.raises(ValueError, match="a thousand"):
        mapped([1, 2, 1000])


def test_a_caller_that_stops_waits_for_no_busy_worker():
    results = crash_safe_map(squares, iter([0, 1, 2, 2000]), processes=2, chunk_size=3, crashed=None)
    assert next(results) == [0, 1, 4]
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOSPC, errno.ENOENT, errno.EMFILE])
def test_why_no_worker_starts_is_named(monkeypatch, number):
    def semaphore(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("_multiprocessing.SemLock", semaphore)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        mapped([1], processes=2)
    assert ("/dev/shm" in str(error.value)) == (number != errno.EMFILE)


@pytest.mark.slow
@pytest.mark.parametrize("deadly", [{0}, {23}, {5, 6, 20}])
def test_an_item_that_kills_its_process_costs_no_other(deadly):
    numbers = [-number - 1 if number in deadly else number for number in range(24)]
    assert mapped(numbers) == [("crashed", number) if number < 0 else number * number for number in numbers]


@pytest.mark.slow
def test_a_map_ends_in_time_although_one_item_crashes_and_another_is_slow():
    start = time.monotonic()
    found = mapped([-1, 1, 2, 2000], end=start + 8)
    assert found == [("crashed", -1), 1, 4][: len(found)]
    assert time.monotonic() - start < 50


def test_a_folder_that_another_process_writes_is_refused_and_one_s_own_lock_is_taken_again(tmp_path):
    held = f"with folder_lock(Path({str(tmp_path)!r})): print(flush=True), input()"
    program = f"from modular_star_encoder.utils.files import *\n{held}"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with raises("files.locked", tmp_path), folder_lock(tmp_path, 0):
            pass
        other.communicate(b"\n")
    with folder_lock(tmp_path, 0), folder_lock(tmp_path, 0):
        pass
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".lock").symlink_to("nothing")
    (tmp_path / "folder" / ".lock").mkdir(parents=True)
    for name in ("linked", "folder"):
        with raises("files.lock", tmp_path / name / ".lock"), folder_lock(tmp_path / name, 0):
            pass
