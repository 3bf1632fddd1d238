import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from mcp import Client, StdioServerParameters

from modular_star_encoder.cli.main import main
from modular_star_encoder.search.mcp_server import MOST_CHARACTERS, MOST_LINES, build_server, serve
from tests.errors import raises
from tests.search.conftest import build, write_code
from tests.tiny import contents


def ask(server, *calls):
    """What the official client gets from each call: (text, whether it is an error)."""

    async def run():
        async with Client(server) as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == {"search", "related", "read"}
            results = [await client.call_tool(name, arguments) for name, arguments in calls]
            return [(one.content[0].text, bool(one.is_error)) for one in results]

    return asyncio.run(run())


def test_an_agent_searches_reads_and_finds_what_is_alike(index, code):
    write_code(code, {"new.py": "def brand_new_function():\n    return 'fresh'\n"})
    found, alike, lines, missed = ask(
        build_server(index),
        ("search", {"question": "brand_new_function", "top_k": 1}),
        ("related", {"path": "stack.py", "line": 3, "top_k": 2}),
        ("read", {"path": "src/add.go", "first_line": 3, "last_line": 4}),
        ("search", {"question": "add", "path": "nope/**"}),
    )
    assert (missed[1], "'nope/**'" in missed[0]) == (True, True)
    assert found == ("new.py:1-2 brand_new_function\ndef brand_new_function():\n    return 'fresh'", False)
    assert ("stack.py:1" in alike[0], alike[0].count("\n\n")) == (False, 1)
    assert lines == ("3\tfunc Add(a int, b int) int {\n4\t    return a + b", False)


UNREAD = ["../secret.py", "/etc/hostname", "link.py", "linked/secret.py", "nothing.py", "src", "pipe.py", "a\0.py", ""]
TOOLS = ("read", {}), ("related", {"line": 1})
UNREAD += [".env", ".mose/secret.py", ".git/config", ".git/secret.py", "ignored.py", "\ud800.py", "src/../.env"]


def test_only_what_the_index_may_hold_is_read_or_shown(code, checkpoint):
    write_code(code, {".gitignore": "ignored.py\n"})
    for path in ("../secret.py", ".env", ".git/config", ".git/secret.py", "ignored.py"):
        write_code(code, {path: "SECRET = 'secret of the machine'\n"})
    os.symlink(code.parent / "secret.py", code / "link.py")
    os.symlink(code.parent, code / "linked")
    os.mkfifo(code / "pipe.py")
    index = build(code, code / ".mose", checkpoint)
    write_code(code, {".mose/secret.py": "SECRET = 'secret of the machine'\n"})
    calls = [(tool, {"path": path, **more}) for path in UNREAD for tool, more in TOOLS]
    calls += [("search", {"question": "secret of the machine", "top_k": 20, "path": path}) for path in (None, "**")]
    for (tool, arguments), (text, is_error) in zip(calls, ask(build_server(index), *calls), strict=True):
        assert is_error is (tool != "search"), (tool, arguments)
        assert "SECRET" not in text, (tool, arguments)
        assert not is_error or repr(arguments["path"]).encode(errors="replace").decode() in text


@pytest.mark.parametrize(
    ("tool", "name", "length"),
    [("search", "question", 2000), ("search", "path", 4096), ("related", "path", 4096), ("read", "path", 4096)],
)
def test_a_long_argument_is_refused_with_its_limit(index, tool, name, length):
    others = {"search": {"question": "x"}, "related": {"line": 1}, "read": {}}[tool]
    longest, longer = ask(build_server(index), *((tool, {**others, name: "x" * size}) for size in (length, length + 1)))
    assert f"at most {length} characters" not in longest[0]
    assert (longer[1], f"at most {length} characters" in longer[0], len(longer[0]) < 500) == (True, True, True)


def test_names_and_code_that_steer_a_terminal_are_shown_harmlessly(code, tmp_path, checkpoint):
    name = "a\x1b[2J\u202e\nb.py"
    write_code(code, {name: "def turned():\n    return '\u202e\x1b]0;title\x07\u2066'\n"})
    index = build(code, tmp_path / "index", checkpoint)
    calls = [("read", {"path": path}) for path in (name, name + "\x1b")]
    for text, _ in ask(build_server(index), ("search", {"question": "turned", "top_k": 1}), *calls):
        assert "\u202e" not in text
        assert text.replace("\n", "").replace("\t", "").isprintable(), text


def test_mcp_serves_the_own_index_of_a_folder_and_writes_none_there(
    code, tmp_path, checkpoint, monkeypatch, capsys, cache
):
    served = []
    monkeypatch.setattr("modular_star_encoder.search.mcp_server.serve", served.append)
    before = contents(code)
    (tmp_path / "empty").mkdir()  # code may be written there later
    for folder in (code, code, tmp_path / "empty"):
        assert main(["mcp", str(folder)]) == 0
    assert contents(code) == before
    assert [one.store.count() for one in served] == [5, 5, 0]
    assert {one.store.folder.parent for one in served} == {cache / "modular-star-encoder" / "search"}
    build(code, None, checkpoint)
    assert main(["mcp", str(code)]) == 0
    assert served[-1].store.folder == code / ".mose"
    build(write_code(tmp_path / "outside"), code / ".mose", checkpoint, rebuild=True)  # as if it came with the folder
    assert main(["mcp", str(code)]) == 0
    assert served[-1].folder == str(code)
    assert capsys.readouterr() == ("", "")


# A shell may start us with SIGINT ignored.
START = """import signal, sys
from modular_star_encoder.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())"""


@contextmanager
def started(code):
    """Start `mose mcp` on a folder, with pipes, and end it if it runs for over 60 s."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", START, "mcp", str(code)], **pipes, text=True) as server:
        timer = threading.Timer(60, server.kill)  # without an answer, reading would wait without end
        timer.start()
        yield server
        timer.cancel()


def answer(server, method, params):
    print(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())["result"]


INITIAL = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}


@pytest.mark.slow
def test_a_message_with_half_a_character_is_answered(code):
    with started(code) as server:
        answer(server, "initialize", INITIAL)
        result = answer(server, "tools/call", {"name": "read", "arguments": {"path": "\ud800.py"}})
        server.stdin.close()
        server.wait()
    assert (result["isError"], "�.py" in result["content"][0]["text"]) == (True, True)


@pytest.mark.slow
def test_worker_processes_of_a_server_parse_new_files(code):
    with started(code) as server:
        answer(server, "initialize", INITIAL)
        write_code(code, {"new.py": "LIMIT = 3\n\n\ndef brand_new_function():\n    return 'fresh'\n"})
        question = {"name": "search", "arguments": {"question": "brand_new_function", "top_k": 1}}
        text = answer(server, "tools/call", question)["content"][0]["text"]
        server.stdin.close()
        assert (text.split("\n")[0], server.stderr.read()) == ("new.py:4-5 brand_new_function", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_whose_stdin_is_open(code, number):
    with started(code) as server:
        answer(server, "initialize", INITIAL)
        server.send_signal(number)
        assert (server.wait(), server.stderr.read()) == (130, "mose: interrupted\n")


def test_answers_are_cut(index, code):
    write_code(code, {"long.py": "def long():\n" + "    x = 'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy'\n" * 1000})
    ((text, is_error),) = ask(build_server(index), ("read", {"path": "long.py"}))
    assert (is_error, len(text) < MOST_CHARACTERS + 10, text.endswith("… cut")) == (False, True, True)
    write_code(code, {"short.py": "x\n" * 1000})
    wrong = {"first_line": 1001}, {"first_line": 2, "last_line": 1}, {"last_line": -1}
    calls = [("read", {"path": "short.py", **lines}) for lines in ({"last_line": 999}, *wrong)]
    (text, _), *others = ask(build_server(index), *calls)
    assert len(text.splitlines()) == MOST_LINES
    assert [("short.py has 1,000 lines" in text, error) for text, error in others] == [(True, True)] * 3


def test_a_path_may_be_absolute_or_begin_with_a_dot(index, code):
    calls = [
        (tool, {"path": path, **more})
        for path in ("stack.py", "./stack.py", str(code / "stack.py"))
        for tool, more in (("read", {}), ("related", {"line": 3}))
    ]
    answers = ask(build_server(index), *calls)
    assert answers == answers[:2] * 3
    assert not any(is_error for _, is_error in answers)


def test_an_index_that_is_removed_while_it_is_served_is_reported_with_advice(index):
    shutil.rmtree(index.store.folder)
    ((text, is_error),) = ask(build_server(index), ("search", {"question": "add"}))
    assert (is_error, "was removed" in text, "restart `mose mcp`" in text) == (True, True, True)


def test_an_answer_says_that_another_process_is_building_the_index(index):
    (index.store.folder / "stamps.json").unlink(missing_ok=True)
    with FileLock(index.store.folder / ".lock"):
        ((text, is_error),) = ask(build_server(index), ("search", {"question": "add"}))
    assert (is_error, "add.go" in text, "Another process is building the index" in text) == (False, True, True)


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_closed_stream_is_refused(index, monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)
    with raises("mcp.closed"):
        serve(index)


def test_code_is_related_to_its_like_and_not_to_itself(tmp_path, checkpoint):
    same = "def {}(items):\n    return sorted(items, key=len)\n"
    files = {"a.py": same.format("first"), "b.py": same.format("first"), "c.py": "LIMIT_OF_ALL = 12345\n"}
    index = build(write_code(tmp_path / "code", files), tmp_path / "index", checkpoint)
    assert os.path.basename(index.related("a.py", 2)[0].path) == "b.py"
    assert len(index.related("a.py", 1)) == 2
    with pytest.raises(ValueError, match=r"line 9 of 'a\.py'"):
        index.related("a.py", 9)


@pytest.mark.slow
def test_the_configuration_in_the_docs_serves_a_folder(code):
    page = Path("docs/search.md").read_text()
    block = json.loads(page.split("```json\n")[1].split("```")[0].replace("/path/to/repository", str(code)))
    (configured,) = block["mcpServers"].values()
    assert configured["command"] == "mose"
    arguments = ["-m", "modular_star_encoder.cli.main", *configured["args"]]
    server = StdioServerParameters(command=sys.executable, args=arguments)
    ((text, is_error),) = ask(server, ("search", {"question": "split a header into names and values", "top_k": 1}))
    assert (is_error, text.split(" ")[0]) == (False, "src/parseHeader.js:2-4")
