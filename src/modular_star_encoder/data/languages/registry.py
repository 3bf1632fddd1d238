"""List the programming languages: one entry for each, with everything that the package knows about it.

A new language is one more entry of `_ENTRIES` and a query in `queries/NAME.scm`; `queries/README.md` lists the captures
of a query. Its tree-sitter grammar is a dependency of this package, or is in tree-sitter-language-pack.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from modular_star_encoder.utils.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """What the package knows about one language."""

    name: str  # ours, in `SEARCH_LANGUAGES`, rows and settings
    suffixes: tuple[str, ...]  # of its files, with the dot
    interpreters: tuple[str, ...] = ()  # programs that `#!` names in the first line of a script, without a version
    query: str = ""  # name of its file in `queries`, without suffix; empty if it is named like the language
    grammar: str = ""  # module of its tree-sitter grammar; empty for the language pack's grammar of this name
    grammar_function: str = "language"  # the module's function that returns the grammar
    display_name: str = ""  # how prompts and data sets write it, if not like `name`
    opening: bytes = b""  # what a file must begin with, such as PHP's `<?php`
    frames: tuple[tuple[bytes, bytes], ...] = ()  # text around a snippet that makes it a file: a method needs a class
    has_macros: bool = False  # whether words of the preprocessor may break the syntax
    keywords: frozenset[str] = frozenset()  # words that error recovery may take for the name of a function
    definers: frozenset[str] = frozenset()  # words allowed as `@keyword` (trees are parsed without text,
    # so that queries can't hold predicates)
    dotted_name: Callable[[str], str] = str  # turns a function's name in the tree into its dotted name
    has_docstrings: bool = False  # whether documentation is a string inside the function
    line_comment: str = r"\s*//+[!<]*"  # pattern of its marker
    directive: str = r"(?!)"  # pattern that begins a comment for tools, besides the patterns of all languages
    documented_by_blocks: bool = False  # whether only `/** */` documents
    gap: bytes = rb"\s*"  # pattern of the text allowed between a comment and its function
    markup: frozenset[str] = frozenset({"html"})  # in comments: `html`, `doxygen`, `rdoc`
    constructors: frozenset[str] = frozenset()  # names of functions that construct or destroy objects
    constructors_named_like_class: bool = False
    special_methods: frozenset[str] = frozenset()  # names to which the language gives a meaning
    special_method: str = r"(?!)"  # pattern of further such names
    test_folder: str = r"(?!)"  # pattern of folders with tests, besides the patterns of all languages
    test_file: str = r"(?!)"  # pattern of test files, without suffix


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _member_name(text: str) -> str:
    """Return a dotted name: `"Stack.push"` for `Stack.prototype.push`, `"push"` for `exports.push` and for `'push'`."""
    text = re.sub(r"\s*\.\s*", ".", text.strip("'\""))
    if "." not in text or text.startswith("["):
        return text
    if not re.fullmatch(r"[\w$#]+(?:\.[\w$#]+)*", text):  # `get("stack").push`
        return text.rpartition(".")[2]
    parts = text.split(".")
    return ".".join([part for part in parts if part not in _words("exports module prototype this")] or parts[-1:])


_SCRIPT_TEST_FOLDER, _SCRIPT_TEST_FILE = r"__(tests?|mocks|fixtures)__|spec", r".*[.-](test|spec)"
_CLASS_FRAME = (b"class A {\n", b"\n}")
_INTERFACE_FRAME = (b"interface A {\n", b"\n}")
_CAMEL_CASE_TEST = r"Test[A-Z0-9].*|.*[a-z0-9](Tests?|TestCase)"
_C_KEYWORDS = _words("if else for while switch return do catch sizeof defined")
_C_GAP = rb'\s*(?:extern\s+"C"\s*)?'

_TYPESCRIPT = Language(
    name="typescript",
    suffixes=(".ts", ".mts", ".cts"),
    documented_by_blocks=True,
    test_folder=_SCRIPT_TEST_FOLDER,
    test_file=_SCRIPT_TEST_FILE,
)

_ENTRIES = (
    Language(
        name="python",
        suffixes=(".py",),
        interpreters=("python", "pypy"),
        grammar="tree_sitter_python",
        frames=((b"if 1:\n", b"\n"),),
        has_docstrings=True,
        constructors=_words("__init__ __new__ __del__"),
        special_method=r"(?=__).*(?<=__)",
    ),
    Language(
        name="javascript",
        suffixes=(".js", ".mjs", ".cjs", ".jsx"),
        interpreters=("node",),
        grammar="tree_sitter_javascript",
        frames=(_CLASS_FRAME, (b"({\n", b"\n})"), (b"(\n", b"\n)")),
        dotted_name=_member_name,
        documented_by_blocks=True,
        gap=rb"\s*(?:export\s+(?:default\s+)?)?(?:(?:var|let|const)\s+)?",
        constructors=_words("constructor"),
        special_methods=_words("toString toLocaleString valueOf"),
        test_folder=_SCRIPT_TEST_FOLDER,
        test_file=_SCRIPT_TEST_FILE,
    ),
    Language(
        name="go",
        suffixes=(".go",),
        grammar="tree_sitter_go",
        directive=r"//(?:[a-z0-9]+:[a-z0-9]|export |extern |line |nolint)",
        markup=frozenset(),
        special_methods=_words("String GoString Error init main"),
        test_folder=r"testdata",
    ),
    Language(
        name="java",
        suffixes=(".java",),
        grammar="tree_sitter_java",
        frames=(_CLASS_FRAME, _INTERFACE_FRAME, (b"enum A { B;\n", b"\n}")),
        documented_by_blocks=True,
        constructors_named_like_class=True,
        special_methods=_words("toString hashCode equals clone finalize notify notifyAll"),
        test_file=_CAMEL_CASE_TEST,
    ),
    Language(
        name="php",
        suffixes=(".php",),
        interpreters=("php",),
        grammar="tree_sitter_php",
        grammar_function="language_php",
        opening=b"<?php\n",
        frames=(_CLASS_FRAME, _INTERFACE_FRAME),
        documented_by_blocks=True,
        constructors=_words("__construct __destruct"),
        special_methods=_words(
            "__call __callStatic __get __set __isset __unset __sleep __wakeup __serialize __unserialize __toString "
            "__invoke __set_state __clone __debugInfo"
        ),
        test_file=_CAMEL_CASE_TEST,
    ),
    Language(
        name="ruby",
        suffixes=(".rb",),
        interpreters=("ruby",),
        grammar="tree_sitter_ruby",
        dotted_name=lambda name: name.replace("::", "."),
        line_comment=r"\s*#+",
        gap=rb"\s*(?:[a-z]\w*[ \t(]+)?",
        markup=frozenset({"html", "rdoc"}),
        constructors=_words("initialize initialize_copy"),
        special_methods=_words("to_s to_str to_text inspect display dup clone hash eql? equal? between?"),
        special_method=r"[\W_]*",
        test_folder=r"spec",
        test_file=r".*_spec",
    ),
    Language(
        name="c",
        suffixes=(".c", ".h"),  # C++ uses .h too; see `language_of_text`
        grammar="tree_sitter_c",
        has_macros=True,
        keywords=_C_KEYWORDS,
        gap=_C_GAP,
        markup=frozenset({"html", "doxygen"}),
        special_methods=_words("main"),
    ),
    Language(
        name="cpp",
        suffixes=(".cc", ".cpp", ".cxx", ".hpp", ".hh", ".hxx"),
        grammar="tree_sitter_cpp",
        display_name="c++",
        frames=((b"class A {\n", b"\n};"),),
        has_macros=True,
        keywords=_C_KEYWORDS,
        dotted_name=lambda name: name.partition("<")[0],
        gap=_C_GAP,
        markup=frozenset({"html", "doxygen"}),
        constructors_named_like_class=True,
        special_methods=_words("main"),
        special_method=r"operator(?:[\W\d].*)?",
    ),
    _TYPESCRIPT,
    replace(_TYPESCRIPT, name="tsx", query="typescript", suffixes=(".tsx",)),
    Language(
        name="rust",
        suffixes=(".rs",),
        line_comment=r"\s*//[/!]?",
        gap=rb"\s*(?:#\[[^\]]*\]\s*)*",
        dotted_name=lambda name: name.partition("<")[0],
    ),
    Language(
        name="kotlin",
        suffixes=(".kt", ".kts"),
        documented_by_blocks=True,
        test_file=_CAMEL_CASE_TEST,
    ),
    Language(
        name="scala",
        suffixes=(".scala", ".sc"),
        documented_by_blocks=True,
        test_file=r".*[a-z0-9](Spec|Suite|Test)",
    ),
    Language(
        name="csharp",
        suffixes=(".cs",),
        display_name="c#",
        line_comment=r"\s*///?",
        test_file=_CAMEL_CASE_TEST,
    ),
    Language(
        name="swift",
        suffixes=(".swift",),
        interpreters=("swift",),
        line_comment=r"\s*///?",
        test_file=_CAMEL_CASE_TEST,
    ),
    Language(
        name="lua",
        suffixes=(".lua",),
        interpreters=("lua", "luajit"),
        dotted_name=lambda name: name.replace(":", "."),
        line_comment=r"\s*--+",
        test_file=r".*_spec",
    ),
    Language(
        name="bash",
        suffixes=(".sh", ".bash"),
        interpreters=("bash", "sh", "dash", "ksh", "zsh"),
        line_comment=r"\s*#+",
        test_file=r".*_test",
    ),
    Language(
        name="elixir",
        suffixes=(".ex", ".exs"),
        interpreters=("elixir",),
        definers=_words("def defp defmacro defmacrop defguard defdelegate defmodule defprotocol defimpl"),
        line_comment=r"\s*#+",
        gap=rb"\s*(?:@(?:doc|spec)\b[^\n]*\s*)*",
        test_file=r".*_test",
    ),
    Language(
        name="zig",
        suffixes=(".zig",),
        line_comment=r"\s*//[/!]?",
    ),
    Language(
        name="haskell",
        suffixes=(".hs",),
        line_comment=r"\s*--+ ?[|^]?",
        test_file=r".*Spec",
    ),
    Language(
        name="sql",
        suffixes=(".sql",),
        line_comment=r"\s*--+",
    ),
    Language(
        name="markdown",
        suffixes=(".md", ".markdown"),
    ),
)

_LANGUAGE = {one.name: one for one in _ENTRIES}
ALL_LANGUAGES = tuple(_LANGUAGE)
"""Our names of all languages."""
SEARCH_LANGUAGES = ALL_LANGUAGES[:-1]
"""The languages that search reads unless others are named: all but Markdown."""
LANGUAGES = SEARCH_LANGUAGES[:8]
"""The languages of ModularStarEncoder, which training and the data sets use."""

LANGUAGE_OF_SUFFIX = {suffix: one.name for one in _ENTRIES for suffix in one.suffixes}
_LANGUAGE_OF_INTERPRETER = {name: one.name for one in _ENTRIES for name in one.interpreters}
_SHEBANG = re.compile(rb"#![^\n]*?(?:/|\benv (?:-\S+ )?)(?!env\b)([a-z]+)[\d.]*(?:\s|$)")
_LANGUAGE_OF_NAME = {name: one.name for one in _ENTRIES[:-1] for name in (one.name, one.display_name) if name}

# The signs of C++ by which GitHub's linguist classifies headers (its heuristics.yml, `.h`).
_CPP_LINE = re.compile(
    r"^[ \t]*(?:template[ \t]*<|(?:class|(?:using[ \t]+)?namespace)[ \t]+\w+|(?:private|public|protected)[ \t]*:"
    r"|(?:try|constexpr)\b|catch[ \t]*\(|#[ \t]*include[ \t]*<(?:cstdint|string|vector|map|list|iostream|memory)>)"
    r"|\bstd::\w",
    re.MULTILINE,
)


def language_entry(name: str) -> Language:
    """Return the entry of a language; UserError (`data.language.unknown`) if `name` is unknown."""
    if name not in _LANGUAGE:
        raise UserError("data.language.unknown", f"Unknown language {name!r}. Available: {', '.join(_LANGUAGE)}.")
    return _LANGUAGE[name]


def check_languages(languages: Iterable[str] | None, default: tuple[str, ...] = LANGUAGES) -> tuple[str, ...]:
    """Return `languages` (a list or one name) without repetitions, `default` if None; UserError for an empty list."""
    if languages is None:
        return default
    chosen = [languages] if isinstance(languages, str) else languages
    return tuple(language_entry(name).name for name in dict.fromkeys(chosen) or [""])


def language_of(path: PurePath) -> str | None:
    """Return the language that a path's suffix, in any letter case, stands for, or None; `.h` and `.C` stand for C."""
    return LANGUAGE_OF_SUFFIX.get(path.suffix.lower())


def language_of_script(beginning: bytes) -> str | None:
    """Return the language that a file's first line names, such as `#!/usr/bin/env python3`, or None."""
    interpreter = _SHEBANG.match(beginning)
    return _LANGUAGE_OF_INTERPRETER.get(interpreter[1].decode()) if interpreter else None


def language_of_text(language: str, path: str, text: str) -> str:
    """Return `cpp` if a `.h` or `.C` file holds C++, and otherwise `language`, which the path suggests."""
    return "cpp" if language == "c" and path.endswith((".h", ".H", ".C")) and _CPP_LINE.search(text) else language


def language_named(name: Any) -> str | None:
    """Return our name of the language that a data set calls `name` (`"cpp"` for `"C++"`), or None if we have none."""
    return _LANGUAGE_OF_NAME.get(name.lower()) if isinstance(name, str) else None


def display_name(name: str) -> str:
    """Return how prompts write a language: lower case, and `"c++"` for `"cpp"`; unknown names as they are."""
    name = name.strip().lower()
    return (_LANGUAGE[name].display_name if name in _LANGUAGE else "") or name
