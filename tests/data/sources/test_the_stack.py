import gzip
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from modular_star_encoder.data.sources import FileFilters, dataset_files
from modular_star_encoder.data.sources.dataset_files import the_stack_repositories, unpack
from tests.errors import raises
from tests.utils.http_server import LocalServer


def blob(number):
    return f"{number:040x}"


def record(number, **changes):
    """A file as The Stack v2 lists it."""
    values = {"blob_id": blob(number), "path": f"/src/{number}.py", "language": "Python", "length_bytes": 20}
    values |= {"detected_licenses": ["MIT"], "license_type": "permissive", "src_encoding": "UTF-8"}
    return {**values, "is_vendor": False, "is_generated": False, **changes}


@pytest.fixture
def server():
    """Serves contents at /content/<blob>; `answers` maps a blob to bytes or to the statuses of its first answers."""

    def answer(request):
        name = request.path.partition("?")[0].removeprefix("/content/")
        server.requested[name] += 1
        time.sleep(0.002)
        given = server.answers.get(name, gzip.compress(f"x = {int(name, 16)}".encode()))
        if isinstance(given, list):
            given = given.pop(0) if len(given) > 1 else given[0]
        return (given, b"", {}) if isinstance(given, int) else (200, given, {})

    with LocalServer(answer) as server:
        server.answers, server.requested = {}, Counter()
        yield server


@pytest.fixture
def reader_of(tmp_path, server):
    """Makes a reader of repositories, given as lists of their records."""

    def make(*repositories, url=None, threads=4, attempts=3, **options):
        rows = [{"repo_name": f"owner/r{number}", "files": files} for number, files in enumerate(repositories)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "ids.parquet", row_group_size=3)
        url = url or f"{server.url}/content/{{blob_id}}?signature=secret"
        http = {"concurrency": threads, "attempts": attempts, "pause": 0.001}
        return the_stack_repositories(tmp_path / "ids.parquet", url, http=http, progress=False, **options)

    return make


def texts(reader):
    return [file.text for file in reader]


def test_the_files_of_a_repository_are_fetched_unpacked_and_decoded(reader_of, server):
    server.answers |= {blob(2): gzip.compress("# caf\xe9".encode("latin-1")), blob(3): b"int not_compressed;"}
    other = record(3, path="/a.hpp", language="C++", detected_licenses=[], license_type="no_license")
    reader = reader_of([record(1), record(2, src_encoding="ISO-8859-1")], [other])
    expected = [
        ("owner/r0", "src/1.py", "python", "x = 1", "MIT"),
        ("owner/r0", "src/2.py", "python", "# café", "MIT"),
        ("owner/r1", "a.hpp", "cpp", "int not_compressed;", "no_license"),
    ]
    for _ in range(2):
        seen = [(file.repository, file.path, file.language, file.text, file.license) for file in reader]
        assert seen == expected
        assert reader.skipped == {}


def test_the_order_is_that_of_the_rows_whatever_arrives_first(reader_of, server):
    reader = reader_of(*([record(10 * row + file) for file in range(10)] for row in range(20)), threads=8)
    assert texts(reader) == [f"x = {number}" for number in range(200)]
    assert 1 < server.most_at_once <= 8


def test_files_that_the_row_rules_out_are_not_fetched(reader_of, server):
    changes = [{}, {"language": "Rust"}, {"is_vendor": True}, {"is_generated": True}, {"length_bytes": 2_000_000}]
    changes += [{"path": "/tests/a.py"}, {"blob_id": "../../etc/passwd"}, {"blob_id": None}]
    files = [record(number, **change) for number, change in enumerate(changes, 1)]
    reader = reader_of(files, [], filters=FileFilters(generated=False))
    assert texts(reader) == ["x = 1"]
    once = ("another language", "vendored code", "generated code", "too large", "test code")
    assert reader.skipped == dict.fromkeys(once, 1) | {"no valid blob_id": 2}
    assert list(server.requested) == [blob(1)]


def test_missing_contents_are_requested_once_and_failures_of_the_server_a_few_times(reader_of, server):
    server.answers.update({blob(1): 404, blob(2): 403, blob(3): [503, 500, gzip.compress(b"late = 1")], blob(4): 503})
    reader = reader_of([record(number) for number in range(1, 6)], attempts=3)
    assert texts(reader) == ["late = 1", "x = 5"]
    assert reader.skipped == {"content missing or forbidden": 2, "content not fetched": 1}
    assert server.requested == {blob(1): 1, blob(2): 1, blob(3): 3, blob(4): 3, blob(5): 1}


def test_damaged_unsuitable_and_large_contents_are_counted_and_not_unpacked_beyond_the_limit(reader_of, server):
    one, two, three, four = map(gzip.compress, (b"x = 1", b"\xff\xff", b"x = 3", b"x\n" * 1_000_000))
    server.answers.update({blob(1): one[:-4] + b"1234", blob(2): two, blob(3): three[:12], blob(4): four})
    reader = reader_of([record(number) for number in range(1, 6)], filters=FileFilters(max_bytes=1000))
    assert texts(reader) == ["x = 5"]
    assert reader.skipped == {"damaged content": 2, "not in its declared encoding": 1, "too large": 1}
    assert len(unpack(gzip.compress(b"\0" * 50_000_000), 1000)) == 1001
    assert unpack(gzip.compress(b"x" * 1000), 1000) == b"x" * 1000


@pytest.mark.parametrize(
    ("files", "named"),
    [
        *(([record(1, **{name: [7]})], name) for name in ("path", "blob_id", "src_encoding", "detected_licenses")),
        ([record(1, length_bytes="20")], "length_bytes"),
        ([{name: value for name, value in record(1).items() if name != "path"}], "path"),
        (["a"], "files"),
        ("a", "files"),
    ],
)
def test_a_column_of_another_type_is_named(reader_of, files, named):
    with raises("data.source.column", repr(named)):
        texts(reader_of(files))


@pytest.mark.slow
def test_without_any_access_reading_stops_and_after_a_success_it_does_not(reader_of, server):
    server.answers.update({blob(number): 403 for number in range(1, 1000)})
    with raises("data.contents.no_access", 200, 403) as caught:
        texts(reader_of([record(number) for number in range(1, 1000)]))
    assert "secret" not in str(caught.value)
    assert server.requested.total() < 300
    reader = reader_of([record(number) for number in range(400)])
    assert texts(reader) == ["x = 0"]
    assert reader.skipped == {"content missing or forbidden": 399}


def test_only_a_few_contents_are_fetched_ahead(reader_of, server):
    reader = reader_of([record(number) for number in range(500)], threads=2)
    iterator = iter(reader)
    next(iterator)
    time.sleep(0.3)
    iterator.close()
    assert server.requested.total() <= 12


def test_contents_may_come_from_a_folder_and_wrong_sources_are_refused_in_one_sentence(reader_of, tmp_path):
    (tmp_path / blob(1)).write_bytes(gzip.compress(b"local = 1"))
    reader = reader_of([record(1), record(2)], url=f"file://{tmp_path}/{{blob_id}}")
    assert texts(reader) == ["local = 1"]
    assert reader.skipped == {"content missing or forbidden": 1}
    wrong = ["https://example.org/content", "nosuch://bucket/{blob_id}", f"simplecache::file://{tmp_path}/{{blob_id}}"]
    wrong += ["http://☃/{blob_id}?secret", "http://h:99999/{blob_id}?secret", "http://[::/{blob_id}?secret"]
    for url in wrong:
        with raises("data.contents.url") as caught:
            reader_of([record(1)], url=url)
        assert "secret" not in str(caught.value)
    with raises("http.settings"):
        reader_of([record(1)], threads=0)


def test_pipes_are_not_contents_and_of_a_huge_file_only_the_beginning_is_read(reader_of, tmp_path):
    os.mkfifo(tmp_path / blob(1))
    (tmp_path / blob(2)).mkdir()
    with open(tmp_path / blob(3), "wb") as file:
        file.truncate(2**42)
    (tmp_path / blob(4)).write_bytes(b"x = 4")
    for scheme in ("file://", "local://", ""):
        reader = reader_of([record(number) for number in range(1, 5)], url=f"{scheme}{tmp_path}/{{blob_id}}")
        assert texts(reader) == ["x = 4"]
        assert reader.skipped == {"content missing or forbidden": 2, "too large": 1}


def test_connections_are_closed_when_reading_fails(reader_of, server, monkeypatch):
    monkeypatch.setattr(dataset_files, "_MAX_FAILURES_AT_FIRST", 3)
    closed = []
    monkeypatch.setattr(dataset_files.HTTPClient, "__exit__", lambda client, *_: closed.append(client.close()))
    server.answers.update({blob(number): 403 for number in range(10)})
    with raises("data.contents.no_access") as caught:
        texts(reader_of([record(number) for number in range(10)]))
    assert closed == [None]
    del caught  # until here it held the frames of the generators


INTERRUPTED = """
import os, signal, socket, sys, threading, time
from fsspec.implementations.memory import MemoryFileSystem
from modular_star_encoder.data.sources import dataset_files

def wait(*_, **__):
    time.sleep(60)

def interrupt():
    print(time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGINT)

def received(future):
    threading.Timer(0.3, interrupt).start()
    return future.result()

rows, url = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may ignore it
dataset_files._received = received
socket.getaddrinfo = MemoryFileSystem.cat_file = wait
list(dataset_files.the_stack_repositories(rows, url, progress=False))
"""


@pytest.mark.parametrize("url", [None, "http://slow.example/{blob_id}", "memory://{blob_id}"])
def test_ctrl_c_ends_a_process_that_waits_for_a_server_a_look_up_or_a_file_system(reader_of, server, tmp_path, url):
    reader_of([record(number) for number in range(100)])  # writes the rows
    released = threading.Event()
    server.answer = lambda _: (released.wait(60), (404, b"", {}))[1]
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "ids.parquet"), url or f"{server.url}/{{blob_id}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=40)
        assert time.time() - float(done.stdout) < 3
    finally:
        released.set()
    assert done.stderr.endswith("KeyboardInterrupt\n")
