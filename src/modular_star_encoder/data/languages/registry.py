"""The settings of each language, from `languages.toml`; `queries/README.md` explains the tree-sitter queries."""

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from modular_star_encoder.utils.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """The settings of one programming language: its table in `languages.toml`."""

    name: str  # as this package writes it, in lower case
    suffixes: Sequence[str]  # of its files, such as `.py`
    interpreters: Sequence[str] = ()  # programs that `#!` names in the first line of a script, without a version
    query: str = ""  # name of the query's file in `queries`, without suffix; by default the language's name
    grammar: str = ""  # Python module of its tree-sitter grammar; by default that of tree-sitter-language-pack
    grammar_function: str = "language"  # the module's function that returns the grammar
    display_name: str = ""  # how prompts and data sets write the language, if not as `name`
    opening: str = ""  # what a file must begin with, such as PHP's `<?php`
    frames: Sequence[Sequence[str]] = ()  # (text before, text after) that make a snippet a file: a method needs a class
    has_macros: bool = False  # whether macros of the preprocessor may look like syntax errors
    keywords: Sequence[str] = ()  # words that error recovery may take for the name of a function
    definers: Sequence[str] = ()  # words that the capture `@keyword` may be; a query can't compare words itself
    separator: str = "."  # between the parts of a qualified name
    has_type_arguments: bool = False  # whether a name may end with type arguments: `Stack<T>`
    has_member_names: bool = False  # whether a function may be assigned to a member: `Stack.prototype.push`
    has_docstrings: bool = False  # whether documentation is a string inside the function
    line_comment: str = r"\s*//+[!<]*"  # pattern of the marker that begins a line comment
    directive: str = r"(?!)"  # pattern of the beginning of comments for tools, besides those in all languages
    documented_by_blocks: bool = False  # whether only `/** */` comments document a function
    gap: str = r"\s*"  # pattern of the text allowed between a comment and its function
    markup: Sequence[str] = ("html",)  # in comments: `html`, `doxygen`, `rdoc`
    constructors: Sequence[str] = ()  # names of functions that construct or destroy objects
    constructors_named_like_class: bool = False
    special_methods: Sequence[str] = ()  # names of methods to which the language gives a meaning
    special_method: str = r"(?!)"  # pattern of further names of special methods
    test_folder: str = r"(?!)"  # pattern of folders with tests, besides the patterns of all languages
    test_file: str = r"(?!)"  # pattern of test files, without suffix

    def dotted_name(self, name: str) -> str:
        """Return the name of a function or scope with dots between its parts: `A::b` becomes `A.b`."""
        if self.has_member_names:
            return _member_name(name)
        return (name.partition("<")[0] if self.has_type_arguments else name).replace(self.separator, ".")


_NO_SCOPE = ("exports", "module", "prototype", "this")


def _member_name(text: str) -> str:
    """Return a dotted name: `"Stack.push"` for `Stack.prototype.push`, `"push"` for `exports.push` and for `'push'`."""
    text = re.sub(r"\s*\.\s*", ".", text.strip("'\""))
    if "." not in text or text.startswith("["):
        return text
    if not re.fullmatch(r"[\w$#]+(?:\.[\w$#]+)*", text):  # `get("stack").push`
        return text.rpartition(".")[2]
    parts = text.split(".")
    return ".".join([part for part in parts if part not in _NO_SCOPE] or parts[-1:])


_TABLES = tomllib.loads((Path(__file__).parent / "languages.toml").read_text(encoding="utf-8"))
_ENTRIES = tuple(Language(name=name, **table) for name, table in _TABLES.items())
_LANGUAGE = {one.name: one for one in _ENTRIES}
ALL_LANGUAGES = tuple(_LANGUAGE)
SEARCH_LANGUAGES = tuple(name for name in ALL_LANGUAGES if name != "markdown")  # by default
LANGUAGES = SEARCH_LANGUAGES[:8]  # of ModularStarEncoder, for training and the data sets

LANGUAGE_OF_SUFFIX = {suffix: one.name for one in _ENTRIES for suffix in one.suffixes}
_LANGUAGE_OF_INTERPRETER = {name: one.name for one in _ENTRIES for name in one.interpreters}
_SHEBANG = re.compile(rb"#![^\n]*?(?:/|\benv (?:-\S+ )?)(?!env\b)([a-z]+)[\d.]*(?:\s|$)")
_LANGUAGE_OF_NAME = {
    name: one.name
    for one in map(_LANGUAGE.__getitem__, SEARCH_LANGUAGES)
    for name in (one.name, one.display_name)
    if name
}

# The signs of C++ by which GitHub's linguist classifies headers (its heuristics.yml, `.h`).
_CPP_LINE = re.compile(
    r"^[ \t]*(?:template[ \t]*<|(?:class|(?:using[ \t]+)?namespace)[ \t]+\w+|(?:private|public|protected)[ \t]*:"
    r"|(?:try|constexpr)\b|catch[ \t]*\(|#[ \t]*include[ \t]*<(?:cstdint|string|vector|map|list|iostream|memory)>)"
    r"|\bstd::\w",
    re.MULTILINE,
)


def language_entry(name: str) -> Language:
    """Return the settings of a language (`languages.toml`); UserError (`data.language.unknown`) if it is unknown."""
    if name not in _LANGUAGE:
        raise UserError("data.language.unknown", f"Unknown language {name!r}. Available: {', '.join(_LANGUAGE)}.")
    return _LANGUAGE[name]


def check_languages(languages: Iterable[str] | None, default: tuple[str, ...] = LANGUAGES) -> tuple[str, ...]:
    """Return the language names in `languages`, each once; `default` if None. UserError if a language is unknown."""
    if languages is None:
        return default
    chosen = [languages] if isinstance(languages, str) else languages
    return tuple(language_entry(name).name for name in dict.fromkeys(chosen) or [""])


def language_of(path: PurePath) -> str | None:
    """Return the language of a path's suffix, in any letter case, or None if it is unknown. `.h` and `.C` mean C."""
    return LANGUAGE_OF_SUFFIX.get(path.suffix.lower())


def language_of_script(beginning: bytes) -> str | None:
    """Return the language of the interpreter in a file's first line, such as `#!/usr/bin/env python3`, or None."""
    interpreter = _SHEBANG.match(beginning)
    return _LANGUAGE_OF_INTERPRETER.get(interpreter[1].decode()) if interpreter else None


def language_of_text(language: str, path: str, text: str) -> str:
    """Return "cpp" for a `.h` or `.C` file with C++ in its `text`, otherwise `language`, the language of the suffix."""
    return "cpp" if language == "c" and path.endswith((".h", ".H", ".C")) and _CPP_LINE.search(text) else language


def language_named(name: Any) -> str | None:
    """Return this package's name for a language that a data set calls `name`: "cpp" for "C++"; None if unknown."""
    return _LANGUAGE_OF_NAME.get(name.lower()) if isinstance(name, str) else None


def display_name(name: str) -> str:
    """Return a language's name as prompts write it: in lower case, and `"c++"` for `"cpp"`."""
    name = name.strip().lower()
    return (_LANGUAGE[name].display_name if name in _LANGUAGE else "") or name
