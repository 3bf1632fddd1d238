import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections import defaultdict

import pytest

from modular_star_encoder.search import building
from modular_star_encoder.search.index import CodeIndex
from tests.search.conftest import build, stored_rows

pytestmark = pytest.mark.slow

FILES = 60
KILLS = 10


def fork_indexers(connection, folder, location, checkpoint, begun):
    """For each message, send the id of a new process that indexes the folder, and then how that process ended.

    The processes are forks of one that has imported everything and run nothing: quick to start, and fresh.
    """
    multiprocessing.set_start_method("fork", force=True)  # as it is where users start `mose index`
    building._ROWS_PER_BATCH = 6
    original = building._Writer.write

    def write(self):
        begun.set()
        original(self)

    building._Writer.write = write
    while connection.recv():
        process = os.fork()
        if process == 0:
            build(folder, location, checkpoint, processes=2)
            os._exit(0)
        connection.send(process)
        connection.send(os.waitpid(process, 0)[1])


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


def expected_rows(folder):
    return sorted((path.name, place) for path in folder.glob("*.py") for place in range(path.read_text().count("def ")))


def held_rows(location):
    rows = defaultdict(list)
    for row in stored_rows(location):
        rows[row["path"]].append((int(row["name"].split("_")[2]), row["text"].split("'")[1]))
    return rows


def test_killed_ten_times_at_random_the_next_run_completes_the_index(tmp_path, checkpoint):
    folder, location = tmp_path / "code", tmp_path / "index"
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    begun = context.Event()
    server = context.Process(target=fork_indexers, args=(there, str(folder), str(location), str(checkpoint), begun))
    server.start()
    generator = random.Random(0)
    killed_at_work = 0

    def start():
        begun.clear()
        here.send(True)
        process = here.recv()
        assert begun.wait(60)
        return process

    write_version(folder, 0)
    start()
    beginning = time.perf_counter()
    assert here.recv() == 0
    duration = time.perf_counter() - beginning  # of the writing, left alone
    for version in range(1, KILLS + 1):
        if version != 5:  # once the next run finds the same files, half done
            write_version(folder, version)
        process = start()
        time.sleep(generator.uniform(0, duration if version < KILLS else duration / 2))
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.kill(process, signal.SIGKILL)
        killed_at_work += os.WIFSIGNALED(here.recv())
        index = CodeIndex.open(location)
        assert index.store.count() == len(stored_rows(location))
        for path, rows in held_rows(location).items():  # every file whole, of one version
            ((_, held),) = {tuple(text.split()) for _, text in rows}
            assert sorted(place for place, _ in rows) == list(range(function_count(path, int(held))))
        index.search(["version"], method="hybrid")
    here.send(False)
    server.join()
    assert killed_at_work >= 7
    index = CodeIndex.open(location)
    report = index.update(processes=2, progress=False)
    assert report.embedded_files > 0
    held = held_rows(location)
    assert sorted((path, place) for path, rows in held.items() for place, _ in rows) == expected_rows(folder)
    assert {text for rows in held.values() for _, text in rows} == {f"version {KILLS}"}
    assert index.update(processes=1, progress=False).embedded_files == 0
