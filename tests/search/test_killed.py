from collections import defaultdict

import pytest

from modular_star_encoder.search import building
from modular_star_encoder.search.index import CodeIndex
from tests.processes import ended_by_sigkill, start_process
from tests.search.conftest import build, stored_rows
from tests.synthconl.samples import die_before_renaming

pytestmark = pytest.mark.slow

FILES = 60
KILLS = 10


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
    for number in range(version, FILES + version):
        path = folder / f"file_{number}.py"
        count = function_count(path.name, version)
        functions = [f"def f_{number}_{place}():\n    return 'version {version}'\n\n\n" for place in range(count)]
        path.write_text("".join(functions))


def held_rows(location):
    rows = defaultdict(list)
    for row in stored_rows(location):
        rows[row["path"]].append((int(row["name"].split("_")[2]), row["text"].split("'")[1]))
    return rows


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
