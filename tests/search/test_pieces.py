import time

import pytest

from modular_star_encoder.data.languages import function_finder, parsing
from modular_star_encoder.data.languages.registry import SEARCH_LANGUAGES
from modular_star_encoder.search.pieces import MOST_LINES, file_pieces, is_boilerplate
from tests.data.polyglot import NAMES, SOURCES
from tests.search.conftest import FILES

DEFINITIONS = {
    "typescript": ("export const run = (a: number) => { return a }\ninterface Shape { area(): number }\n", "run Shape"),
    "tsx": ("export function View() { return <b>hello</b> }\n", "View"),
    "rust": ("/// A point.\nstruct Point { x: u8 }\nimpl Point { fn norm(&self) -> u8 { self.x } }\n", "Point norm"),
    "kotlin": ("object Registry { fun add(a: Int): Int { return a } }\n", "Registry add"),
    "scala": ("trait Shape { def area: Int }\nobject Unit { def one = 1 }\n", "Shape area Unit one"),
    "csharp": ("namespace N { class Stack { void Push(int a) { Add(a); } int Size { get; } } }\n", "Stack Push Size"),
    "swift": (
        "class Stack { func push(a: Int) { add(a) } }\nextension Stack { func pop() { cut() } }\n",
        "Stack push pop",
    ),
    "lua": ("function M.push(a) return a end\nM.pop = function(x) return x end\n", "push pop"),
    "bash": ("push() { echo 1; }\nfunction pop { echo 2; }\n", "push pop"),
    "elixir": ("defmodule A.Stack do\n  alias A.B\n  def push(a) when a > 1 do\n    a\n  end\nend\n", "Stack push"),
    "zig": ("pub const Stack = struct { pub fn push(a: u8) u8 { return a; } };\n", "Stack push"),
    "haskell": ("data Stack = Empty\npush :: Int -> Int\npush x = x\n", "Stack push"),
    "sql": ("CREATE TABLE users (id int);\n", "users"),
    "go": ("package a\n\ntype Stack struct { n int }\n\nfunc (s *Stack) Push() { s.n++ }\n", "Stack Push"),
    "c": ("struct point { int x; };\n#define TWICE(x) (2 * (x))\n", "point TWICE"),
    "cpp": ("enum class Colour { red };\nusing Number = int;\n", "Colour Number"),
}


@pytest.mark.parametrize("language", SEARCH_LANGUAGES)
def test_definitions_of_every_language_are_known(language):
    text, names = DEFINITIONS.get(language) or (SOURCES[language], " ".join(NAMES[language]))
    defined = {name for piece in file_pieces("a", language, text) for name in piece.defines}
    assert {name.rpartition(".")[2] for name in names.split()} <= defined


def test_every_line_with_content_is_in_one_piece():
    methods = "".join(f"    def method_{number}(self):\n        return {number}\n\n" for number in range(40))
    start = 'import os\n\nLIMIT = 100\n\n\n@decorated\nclass Large:\n    """Does much."""\n\n'
    text = f"{start}{methods}\n\ndef last():\n    pass\n"
    lines = text.split("\n")
    pieces = file_pieces("a.py", "python", text)
    covered = [number for piece in pieces for number in range(piece.first_line, piece.last_line + 1)]
    assert len(covered) == len(set(covered))
    assert not any(line.strip() for number, line in enumerate(lines, 1) if number not in covered)
    assert all(piece.text.split("\n") == lines[piece.first_line - 1 : piece.last_line] for piece in pieces)
    assert [piece.name for piece in pieces[:3]] == ["", "Large", "Large.method_0"]
    assert (pieces[1].first_line, pieces[1].line) == (6, 7)


DECORATED = {
    "python": "@route(\n    '/a',\n)\n@cached\nclass Shown:\n    x = 1\n",
    "typescript": "@Component({\n  a: 1,\n})\n@Other\nexport class Shown {}\n",
    "java": "@Entity\n@Table(\n  name = 'a'\n)\npublic class Shown {}\n",
    "csharp": "[Fact]\n[Route(\n'a')]\n\npublic class Shown {}\n",
    "kotlin": "@A\n@B(\n1\n)\nclass Shown { }\n",
    "swift": "@objc\n@available(\niOS 1, *\n)\nclass Shown { }\n",
    "scala": "@tailrec\n@A(\n1\n)\nprivate class Shown { }\n",
    "rust": "#[inline]\n#[cfg(\n  a\n)]\npub fn Shown() {}\n",
    "php": "<?php\n#[A]\n#[B(\n1)]\nclass Shown { }\n",
    "cpp": "// Says what.\n// And why.\n\n[[nodiscard]]\nint Shown() { return 1; }\n",
    "elixir": '@doc """\nDoes x.\n"""\n@spec shown(a) :: b\ndef shown(a), do: a\n',
}


@pytest.mark.parametrize("language", DECORATED)
def test_what_is_shown_begins_at_the_definition_and_what_is_embedded_at_its_decorators(language):
    text = DECORATED[language]
    piece = file_pieces("a", language, text)[-1]
    assert piece.first_line < 5
    assert (piece.line, [name.lower() for name in piece.defines]) == (5, ["shown"])


def test_a_small_class_is_one_piece():
    (stack,) = file_pieces("stack.py", "python", FILES["stack.py"])
    assert (stack.first_line, stack.last_line, stack.defines) == (1, 7, ("Stack", "push", "pop"))


def test_markdown_is_pieces_by_heading():
    filler = "A sentence about it.\n" * 20
    text = f"Before.\n\n# Guide\n\n{filler}\n## Install `it`\n\n```\n# no heading\n```\n\n## Use\n\nwords\n"
    found = file_pieces("a.md", "markdown", text)
    assert [piece.name for piece in found] == ["Guide", "Guide.Install `it`", "Guide.Use"]
    assert [piece.line for piece in found] == [3, 26, 32]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_without_definitions_are_blocks_and_only_line_ends_end_lines(end):
    found = file_pieces("settings.py", "python", FILES["settings.py"].replace("\n", end))
    assert [(one.first_line, one.last_line) for one in found] == [(1, MOST_LINES), (MOST_LINES + 1, 100)]
    assert found[1].text.split("\n") == [f"OPTION_{number} = {number}" for number in range(MOST_LINES + 1, 101)]
    others = f"LONG_A = 1\x0c{end}LONG_B = '\u2028'{end}"
    assert [one.last_line for one in file_pieces("a.py", "python", others)] == [2]


def test_a_long_function_is_divided_and_every_part_bears_its_name():
    text = "def long():\n" + "".join(f"    step({number})\n" for number in range(200))
    pieces = file_pieces("a.py", "python", text)
    assert [piece.name for piece in pieces] == ["long"] * 4
    assert [piece.defines for piece in pieces] == [("long",), (), (), ()]


@pytest.mark.parametrize(
    ("language", "text"), [("python", "x = '\0'\nabcdefgh = 1"), ("", "Some prose, of no language.")]
)
def test_a_file_that_cannot_be_parsed_is_blocks_of_lines(language, text):
    (piece,) = file_pieces("a", language, text)
    assert (piece.name, piece.text) == ("", text)


@pytest.mark.parametrize("limit", [(function_finder, "MAX_DEFINITIONS"), (parsing, "MAX_NODES")])
@pytest.mark.parametrize(("language", "line"), [("python", "def a():0\n"), ("markdown", "# a\n")])
def test_a_file_of_very_many_definitions_is_blocks_of_lines(monkeypatch, language, line, limit):
    assert len(file_pieces("a", language, line * 120)) == 120
    monkeypatch.setattr(*limit, 100)
    assert [piece.last_line for piece in file_pieces("a", language, line * 120)] == [60, 120]


@pytest.mark.parametrize("language", ["javascript", "typescript", "tsx"])
def test_functions_of_one_statement_are_pieces_of_their_own(language):
    body = "{\n" + "  call();\n" * 30 + "}"
    pieces = file_pieces("a", language, f"const add = () => {body},\n  subtract = () => {body};\n")
    assert [(one.name, one.defines) for one in pieces] == [("add", ("add",)), ("subtract", ("subtract",))]


def test_a_file_of_half_a_million_definitions_takes_seconds():
    for language, line in (("python", "def a():0\n"), ("markdown", "# a\n")):
        start = time.thread_time()
        assert len(file_pieces("a", language, line * 490_000)) == 490_000 // MOST_LINES + 1
        assert time.thread_time() - start < 9


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("rust", "impl Abcdefgh {\n" * 1_100 + "}\n" * 1_100),
        ("javascript", "function f(){\n" * 12_000 + "}\n" * 12_000),
        ("javascript", "{\n" * 20_000 + "function f(){}\n" * 9_000 + "}\n" * 20_000),
        ("", "int abcdefgh;\n" + ("/* " * 833 + "\n") * 58),
        ("", "int abcdefgh;\n" + ("{- " * 833 + "\n") * 58 + "*/"),
        ("cpp", "int (f( {\n" + ("ABCDE" + " " * 2_470 + "x" + "\n" * 12) * 400),
    ],
    ids=["nested scopes", "nested functions", "nested blocks", "comments", "other comments", "macros"],
)
def test_a_file_made_to_be_slow_is_divided_within_seconds(language, text):
    start = time.thread_time()
    pieces = file_pieces("a", language, text)
    assert pieces
    assert not any(map(is_boilerplate, pieces))
    assert time.thread_time() - start < 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import os\nfrom sys import path\n", True),
        ("# Copyright 2020 The Authors.\n# Licensed under the MIT License.\n", True),
        ("import os\nLIMIT = 10 * os.cpu_count()\n", False),
        ("# How the parser works.\n", False),
        ("# Copyright 2020 The Authors.\n\nfrom a import (\n    b,\n)\n", True),
        ("/*\nCopyright 2020\nThe Authors\n*/\nimport {\n  a,\n  b\n} from 'c';\n", True),
        ("/* How the parser works. */\nimport a from 'b'\n", False),
        ("const fs = require('fs');\nexport * from './a'\n", True),
        ("use std::{\n    fmt::{self, Debug},\n    io,\n};\npub mod a;\n", True),
        ('package a\n\nimport (\n\t"fmt"\n)\n', True),
        ("#pragma once\n#include <vector>\n", True),
        ("from the left, the parser reads words and\nmore words.\n", False),
    ],
)
def test_imports_and_licences_alone_are_boilerplate(text, expected):
    (piece,) = file_pieces("a", "", text)
    assert is_boilerplate(piece) == expected


def test_the_names_of_deeply_nested_classes_do_not_grow_with_their_depth():
    classes = "".join(" " * depth + f"class {'A' * 150}{depth}:\n" for depth in range(90))
    pieces = file_pieces("a", "python", classes + "".join(" " * 90 + f"def f{i}(x): return x\n" for i in range(60)))
    assert pieces[-1].name.endswith("A89.f59")
    assert max(len(piece.name) for piece in pieces) <= 400
