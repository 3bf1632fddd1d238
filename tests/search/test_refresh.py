import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from modular_star_encoder.cli.main import main
from modular_star_encoder.data.sources import repositories
from modular_star_encoder.search.index import CodeIndex, open_for_search
from tests.errors import raises
from tests.search.conftest import FILES, build, write_code

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


def test_a_file_that_has_just_changed_is_read_again(code, tmp_path, checkpoint, read):
    index = build(code, tmp_path / "index", checkpoint)
    read.clear()
    index.refresh()
    assert len(read) == 4


def test_a_stamp_counts_only_for_the_content_that_the_index_holds(old_code, tmp_path, checkpoint, read):
    index = build(old_code, tmp_path / "index", checkpoint)
    stamps = index.store.stamps()
    (old_code / "stack.py").write_text("def other():\n    return 1\n")
    index.refresh()
    index.store.keep_stamps(stamps)  # as if the process had been killed before it kept its own
    (old_code / "stack.py").write_text(FILES["stack.py"])
    os.utime(old_code / "stack.py", (LONG_AGO, LONG_AGO))
    assert index.refresh().embedded_files == 1


def test_files_for_which_there_is_no_time_stay_as_they_were(old_code, tmp_path, checkpoint, read):
    index = build(old_code, tmp_path / "index", checkpoint)
    write_code(old_code, {"stack.py": "def pile():\n    return []\n", "new.py": "NEW = 1 + len('something')\n"})
    read.clear()
    report = index.refresh(0)
    assert (report.postponed_files, report.embedded_files, report.removed_files, report.rows) == (2, 0, 0, 5)
    assert (read, "stack.py" in found(index), "new.py" in found(index)) == ([], True, False)
    report = index.refresh(60)
    assert (report.postponed_files, report.embedded_files, found(index) >= {"stack.py", "new.py"}) == (0, 2, True)


def test_a_search_answers_while_another_process_writes_or_nobody_can(old_code, tmp_path, checkpoint, monkeypatch):
    index = build(old_code, tmp_path / "index", checkpoint)
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


def test_mose_search_refreshes_first_unless_asked_not_to(old_code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(old_code)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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


def test_threads_share_an_index_while_its_files_change(code, tmp_path, checkpoint):
    index = build(code, tmp_path / "index", checkpoint)

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


def test_a_second_search_of_an_unindexed_folder_waits_for_the_first(code, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_for_search(code, checkpoint=checkpoint, exit_layer=1), range(4)))
    assert [index.store.count() for index, _ in opened] == [5] * 4
