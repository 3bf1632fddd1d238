import asyncio
import json
import os
import sys

import pytest
from mcp import Client, StdioServerParameters

from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.mcp_server import MOST_CHARACTERS, build_server
from tests.search.conftest import build, write_code


def ask(server, *calls):
    """What the official client gets from each call: (text, whether it is an error)."""

    async def run():
        async with Client(server) as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == {"search", "related", "read"}
            results = [await client.call_tool(name, arguments) for name, arguments in calls]
            return [(one.content[0].text, bool(one.is_error)) for one in results]

    return asyncio.run(run())


@pytest.fixture
def index(code, tmp_path, checkpoint):
    return build(code, tmp_path / "index", checkpoint)


def test_an_agent_searches_reads_and_finds_what_is_alike(index, code):
    write_code(code, {"new.py": "def brand_new_function():\n    return 'fresh'\n"})
    found, alike, lines = ask(
        build_server(index),
        ("search", {"question": "brand_new_function", "top_k": 1}),
        ("related", {"path": "stack.py", "line": 3, "top_k": 2}),
        ("read", {"path": "src/add.go", "first_line": 3, "last_line": 4}),
    )
    assert found == ("new.py:1-2 brand_new_function\ndef brand_new_function():\n    return 'fresh'", False)
    assert "stack.py:1" not in alike[0]
    assert alike[0].count("\n\n") == 1
    assert lines == ("3\tfunc Add(a int, b int) int {\n4\t    return a + b", False)


@pytest.mark.parametrize("path", ["../secret.py", "/etc/hostname", "link.py", "linked/secret.py", "nothing.py", "src"])
def test_nothing_outside_the_folder_is_read(index, code, path):
    (code.parent / "secret.py").write_text("SECRET = 1\n")
    os.symlink(code.parent / "secret.py", code / "link.py")
    os.symlink(code.parent, code / "linked")
    ((text, is_error),) = ask(build_server(index), ("read", {"path": path}))
    assert is_error
    assert "SECRET" not in text


def test_answers_are_cut(index, code):
    write_code(code, {"long.py": "def long():\n" + "    x = 'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy'\n" * 1000})
    ((text, is_error),) = ask(build_server(index), ("read", {"path": "long.py"}))
    assert (is_error, len(text) < MOST_CHARACTERS + 10, text.endswith("… cut")) == (False, True, True)


def test_code_is_related_to_its_like_and_not_to_itself(tmp_path, checkpoint):
    same = "def {}(items):\n    return sorted(items, key=len)\n"
    files = {"a.py": same.format("first"), "b.py": same.format("first"), "c.py": "LIMIT_OF_ALL = 12345\n"}
    index = build(write_code(tmp_path / "code", files), tmp_path / "index", checkpoint)
    assert os.path.basename(index.related("a.py", 2)[0].path) == "b.py"
    assert len(index.related("a.py", 1)) == 2
    with pytest.raises(ValueError, match=r"line 9 of 'a\.py'"):
        index.related("a.py", 9)


@pytest.mark.slow
def test_the_command_serves_a_folder(code):
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "modular_star_encoder.cli.main", "mcp", str(code)]
    )
    ((text, is_error),) = ask(server, ("search", {"question": "split a header into names and values", "top_k": 1}))
    assert (is_error, text.split(" ")[0]) == (False, "src/parseHeader.js:2-4")
    assert CodeIndex.open(code / ".mose").store.count() == 5
    assert json.loads((code / ".mose" / "index.json").read_text())["settings"]["exit_layers"] == [0]
