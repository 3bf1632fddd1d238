import os
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from filelock import FileLock

from modular_star_encoder.cli.main import main
from modular_star_encoder.data.sources import repositories
from modular_star_encoder.search import building
from modular_star_encoder.search.index import CodeIndex, open_for_search
from tests.errors import raises
from tests.processes import ended_by_sigkill, start_process
from tests.search.conftest import FILES, build, stored_rows, write_code
from tests.synthconl.samples import die_before_renaming

LONG_AGO = 1_600_000_000


@pytest.fixture
def old_code(code):
    """Files that were written long ago."""
    for path in FILES:
        os.utime(code / path, (LONG_AGO, LONG_AGO))
    return code


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are read."""
    names, real = [], repositories.beginning
    monkeypatch.setattr(
        repositories, "beginning", lambda file, size, **links: names.append(file.name) or real(file, size, **links)
    )
    return names


def found(index, question="pushing an item"):
    return {os.path.basename(hit.path) for hit in index.search([question], top_k=99)[0].hits}


@pytest.mark.parametrize("fact", ["an old time", "a time to come", "the inode"])
def test_a_file_replaced_by_one_of_its_size_and_time_is_read_once(
    old_code, tmp_path, checkpoint, monkeypatch, read, fact
):
    path, other, real = old_code / "stack.py", tmp_path / "other.py", os.stat
    changed = LONG_AGO + 10**9 * (fact == "a time to come")

    def without_time_of_status_change(*given, **options):  # as on a platform that has none
        status = real(*given, **options)
        facts = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**facts | {"st_ctime_ns": 0})

    if fact == "the inode":
        monkeypatch.setattr(os, "stat", without_time_of_status_change)
    os.utime(path, (changed, changed))
    index = build(old_code, tmp_path / "index", checkpoint)
    for embedded_files in (1, 0):  # first with another text, then with the same
        other.write_text(FILES["stack.py"].replace("push", "shov"))
        os.utime(other, (changed, changed))
        other.replace(path)
        read.clear()
        assert (index.refresh().embedded_files, read) == (embedded_files, ["stack.py"])
        assert (index.refresh().embedded_files, read) == (0, ["stack.py"])


def test_only_files_of_another_size_or_time_are_read_again(old_code, tmp_path, checkpoint, read):
    (old_code / "empty.py").touch()
    os.utime(old_code / "empty.py", (LONG_AGO, LONG_AGO))
    index = build(old_code, tmp_path / "index", checkpoint)
    assert len(read) == 5
    read.clear()
    assert (index.refresh().files, index.report.embedded_files, index.report.rows, read) == (4, 0, 5, [])
    assert index.update(processes=1, progress=False).skipped == {"empty": 1}
    assert read == ["empty.py"]  # to say why it is left out
    text = (old_code / "stack.py").read_text()
    (old_code / "stack.py").write_text(text.replace("push", "shov"))  # of the same size
    (old_code / "settings.py").touch()
    (old_code / "src" / "add.go").unlink()
    read.clear()
    report = index.refresh()
    assert (sorted(read), report.embedded_files, report.removed_files) == (["settings.py", "stack.py"], 1, 1)
    assert (found(index) & {"add.go", "stack.py"}, index.search(["shov"])[0].hits[0].name) == ({"stack.py"}, "Stack")
    read.clear()
    index.refresh()  # what has just changed may change again within the same time stamp
    assert sorted(read) == ["settings.py", "stack.py"]


def test_a_stamp_counts_only_for_the_content_that_the_index_holds(old_code, index, read):
    stamps = index.store.stamps()
    (old_code / "stack.py").write_text("def other():\n    return 1\n")
    index.refresh()
    index.store.keep_stamps(stamps)  # as if the process had been killed before it kept its own
    (old_code / "stack.py").write_text(FILES["stack.py"])
    os.utime(old_code / "stack.py", (LONG_AGO, LONG_AGO))
    assert index.refresh().embedded_files == 1


def test_files_for_which_there_is_no_time_stay_as_they_were(old_code, index, read):
    write_code(old_code, {"stack.py": "def pile():\n    return []\n", "new.py": "NEW = 1 + len('something')\n"})
    read.clear()
    report = index.refresh(0)
    assert (report.postponed_files, report.embedded_files, report.removed_files, report.rows) == (2, 0, 0, 5)
    assert (read, "stack.py" in found(index), "new.py" in found(index)) == ([], True, False)
    report = index.refresh(60)
    assert (report.postponed_files, report.embedded_files, found(index) >= {"stack.py", "new.py"}) == (0, 2, True)


def test_new_files_with_words_of_the_question_are_read_first(old_code, tmp_path, checkpoint, monkeypatch, read):
    few = build(old_code, tmp_path / "few", checkpoint, seconds=0, questions=["add"])
    assert few.report.postponed_files == 0
    few.refuse_empty()
    monkeypatch.setattr(building, "FEW_NEW_FILES", 3)
    none = build(old_code, tmp_path / "none", checkpoint, seconds=0, questions=["add"])
    assert (none.report.postponed_files, none.report.rows) == (4, 0)
    with raises("search.folder.unread", "mose index"):
        none.refuse_empty()
    read.clear()
    first = build(old_code, tmp_path / "first", checkpoint, seconds=60, questions=["how is an Item PUSHED"])
    assert (read[0], first.report.postponed_files, first.report.rows) == ("stack.py", 0, 5)
    monkeypatch.setattr(building, "_SMALL_FILE", 100)  # one large file could take all the time
    read.clear()
    build(old_code, tmp_path / "small", checkpoint, seconds=60, questions=["how is an Item PUSHED"])
    assert (read[0], sorted(read[1:])) == ("add.go", ["parseHeader.js", "settings.py", "stack.py"])
    monkeypatch.setattr(building, "_SMALL_FILE", 100_000)
    read.clear()
    assert none.refresh(60, ["split the values of a header"]).postponed_files == 0
    assert (read[0], len(read), none.report.rows) == ("parseHeader.js", 4, 5)


def slow_pieces(files):
    time.sleep(30 * any("slow" in file.text for file in files))
    return building._blocks(files[0])


def test_a_search_waits_for_no_file_that_is_slow_to_parse(old_code, tmp_path, checkpoint, monkeypatch):
    index = build(old_code, tmp_path / "index", checkpoint)
    monkeypatch.setattr(building, "_pieces", slow_pieces)
    write_code(old_code, {"a.py": "def brand_new():\n    return 1\n", "stack.py": "slow = 1\n", "z.py": "slow = 2\n"})
    start = time.monotonic()
    report = index.refresh(3)
    assert time.monotonic() - start < 20
    assert (report.postponed_files, report.embedded_files, report.removed_files) == (2, 1, 0)
    assert {"a.py", "stack.py"} <= found(index)


def test_a_search_answers_while_another_process_writes_or_nobody_can(old_code, index, tmp_path, monkeypatch):
    (old_code / "new.py").write_text("NEW = 1 + len('something')\n")
    with FileLock(tmp_path / "index" / ".lock"):
        index.refresh()
        with raises("files.locked", tmp_path / "index"):
            index.update(progress=False)
    assert "new.py" not in found(index)
    with monkeypatch.context() as context:
        context.setattr(os, "access", lambda *_: False)
        index.refresh()
    assert "new.py" not in found(index)
    index.refresh()
    assert "new.py" in found(index)
    shutil.rmtree(old_code)
    index.refresh()
    assert "new.py" in found(CodeIndex.open(tmp_path / "index"))


def test_a_search_during_a_build_says_that_the_index_is_incomplete(old_code, index, tmp_path):
    with FileLock(tmp_path / "index" / ".lock"):
        assert index.refresh().news() == []  # an update, not a build
        index.store.create(index.settings.to_dict(index.store.location))
        assert "Another process is building the index" in index.refresh().news()[-1]
        with raises("search.index.unfinished"):
            index.refuse_empty()
    assert index.refresh().embedded_files == 4
    assert "Another process" not in "".join(index.report.news())


def test_a_rebuilt_index_has_the_files_that_the_old_settings_left_out(old_code, tmp_path, checkpoint):
    write_code(old_code, {"made.py": "# Code generated by a tool. DO NOT EDIT.\n" + FILES["stack.py"]})
    os.utime(old_code / "made.py", (LONG_AGO, LONG_AGO))
    assert "made.py" not in found(build(old_code, tmp_path / "index", checkpoint))
    options = {"vendored": True, "rebuild": True, "seconds": 60}
    assert "made.py" in found(build(old_code, tmp_path / "index", checkpoint, **options))


def test_mose_search_refreshes_first_unless_asked_not_to(old_code, cache, monkeypatch, capsys):
    monkeypatch.chdir(old_code)
    for where in ([], ["--folder", "."]):
        search = ["search", "where is marmalade made", *where]
        assert main([*(["index", "."] if not where else search)]) == 0
        (old_code / "jam.py").write_text("def marmalade():\n    return 'orange'\n")
        capsys.readouterr()
        assert main([*search, "--no-refresh"]) == 0
        assert "jam.py" not in capsys.readouterr().out
        with monkeypatch.context() as context:
            context.setattr("modular_star_encoder.search.index.SECONDS_TO_REFRESH", 0)
            assert main(search) == 0
        printed = capsys.readouterr()
        assert ("jam.py" in printed.out, "1 file not read" in printed.err) == (False, True)
        assert main(search) == 0
        assert "jam.py" in capsys.readouterr().out
        (old_code / "jam.py").unlink()


def test_threads_share_an_index_while_its_files_change(code, index):
    def ask(number):
        write_code(code, {f"new{number}.py": f"def brand_new_{number}():\n    return {number}\n"})
        index.refresh()
        index.embedder.forget()
        return index.search([f"brand_new_{number}"], top_k=1)[0].hits[0].name, len(index.related("stack.py", 3))

    with ThreadPoolExecutor(4) as pool:
        names, alike = zip(*pool.map(ask, range(8)), strict=True)
    assert names == tuple(f"brand_new_{number}" for number in range(8))
    assert min(alike) >= 4


@pytest.mark.slow
def test_two_indexings_at_once_leave_a_whole_index_and_searches_meanwhile_find_whole_files(tmp_path):
    code, parts, files = tmp_path / "code", 60, 60  # more rows than a transaction takes
    command = [sys.executable, "-m", "modular_star_encoder.cli.main", "index", str(code)]
    for version in range(3):
        text = "".join(f"def part_{place}():\n    return 'version {version}'\n\n\n" for place in range(parts))
        for number in range(files):
            write_code(tmp_path, {"new": f"# {number}\n{text}"})
            code.mkdir(exist_ok=True)
            os.replace(tmp_path / "new", code / f"file_{number}.py")  # no indexing reads half of it
        writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        index = CodeIndex.open(code / ".mose") if version else None
        while any(writer.poll() is None for writer in writers):
            for number in range(0, files if index else 0, 7):
                hits = index.search(["part version"], top_k=999, path=f"file_{number}.py")[0].hits
                versions = Counter(hit.text.split("version ")[1][0] for hit in hits)
                assert versions in ({str(version - 1): parts}, {str(version): parts})
        for writer in writers:
            error = writer.communicate()[1]
            assert writer.returncode == 0 or (writer.returncode == 2 and "Another process is writing" in error)
        assert CodeIndex.open(code / ".mose").store.count() == files * parts
    assert {hit.text.split("version ")[1][0] for hit in index.search(["part version"], top_k=9999)[0].hits} == {"2"}


def test_a_second_search_of_an_unindexed_folder_waits_for_the_first(code, checkpoint, cache):
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_for_search(code, checkpoint=checkpoint, exit_layer=1), range(4)))
    assert [index.store.count() for index, _ in opened] == [5] * 4


MANY, KILLS = 60, 10


def index_and_die(folder, location, checkpoint, renames):
    building._ROWS_PER_BATCH = 6
    die_before_renaming(renames)
    build(folder, location, checkpoint, processes=2)


def function_count(name, version):
    return 1 + (int(name.removesuffix(".py").split("_")[1]) + version) % 3


def write_version(folder, version):
    """Give every file other functions, and another number of them; one file vanishes and one appears."""
    for path in folder.glob("*.py"):
        path.unlink()
    for number in range(version, MANY + version):
        path = folder / f"file_{number}.py"
        count = function_count(path.name, version)
        functions = [f"def f_{number}_{place}():\n    return 'version {version}'\n\n\n" for place in range(count)]
        path.write_text("".join(functions))


def held_rows(location):
    rows = defaultdict(list)
    for row in stored_rows(location):
        rows[row["path"]].append((int(row["name"].split("_")[2]), row["text"].split("'")[1]))
    return rows


@pytest.mark.slow
def test_killed_before_renaming_after_renaming_the_index_is_whole_and_the_next_run_completes_it(tmp_path, checkpoint):
    folder, location = tmp_path / "code", tmp_path / "index"
    folder.mkdir()
    write_version(folder, 0)
    build(folder, location, checkpoint)
    for version in range(1, KILLS + 1):
        if version != 5:  # once the next run finds the same files, half done
            write_version(folder, version)
        # What is on disk changes by renaming, so these are the states that a death can leave.
        assert ended_by_sigkill(start_process(index_and_die, folder, location, checkpoint, version))
        index = CodeIndex.open(location)
        assert index.store.count() == len(stored_rows(location))
        for path, rows in held_rows(location).items():  # every file whole, of one version
            ((_, held),) = {tuple(text.split()) for _, text in rows}
            assert sorted(place for place, _ in rows) == list(range(function_count(path, int(held))))
        index.search(["version"], method="hybrid")
    report = CodeIndex.open(location).update(processes=2, progress=False)
    assert report.embedded_files > 0
    held = held_rows(location)
    assert sorted((path, place) for path, rows in held.items() for place, _ in rows) == sorted(
        (path.name, place) for path in folder.glob("*.py") for place in range(path.read_text().count("def "))
    )
    assert {text for rows in held.values() for _, text in rows} == {f"version {KILLS}"}
    assert CodeIndex.open(location).update(processes=1, progress=False).embedded_files == 0
