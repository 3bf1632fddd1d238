"""Parse source text to syntax trees: lines and offsets of a text, tree-sitter parsers, and syntax checks."""

import codecs
import re
import textwrap
import time
from bisect import bisect_left, bisect_right
from functools import cache, cached_property
from importlib import import_module
from itertools import accumulate
from pathlib import Path

from tree_sitter import Language as TreeSitterLanguage
from tree_sitter import Node, Parser, Point, Query, QueryCursor, Tree

from modular_star_encoder.data.languages.registry import Language, language_entry

MAX_PARSE_SECONDS = 5.0  # of processor time; a file of 1 MB takes about half a second on one core
MAX_NODES = 1_500_000  # of a syntax tree: that of 6 MB of usual code; a query over so many takes up to 5 s
MAX_LINE_BYTES = 10_000  # longer lines are data or minified code, nested deeply enough to exhaust the memory
_MAX_DEPTH = 500  # of a match in the syntax tree: a query, and finding a node's parent, take time in proportion to it


class UnparsableSourceError(ValueError):
    """Raised if a text can't be parsed as source code: it is not text, or parsing takes too much time or memory."""


class SourceText:
    """A source text as UTF-8 in `bytes`, without byte-order mark, and with `\\n` in place of `\\r\\n` and `\\r`."""

    def __init__(self, text: str) -> None:
        """Encode `text`; raise UnparsableSourceError if it has a lone surrogate, which UTF-8 can't hold."""
        try:
            self._original = text.encode()
        except UnicodeEncodeError:
            raise UnparsableSourceError("The text has a lone surrogate, which UTF-8 can't hold.") from None
        body = self._original.removeprefix(codecs.BOM_UTF8)
        self._skipped = len(self._original) - len(body)
        self.bytes = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    @cached_property
    def _removed(self) -> list[int]:
        """For each `\\r\\n` of the original text, the offset in `bytes` of the `\\n` that replaces it."""
        pairs = re.finditer(rb"\r\n", self._original[self._skipped :])
        return [pair.start() - number for number, pair in enumerate(pairs)]

    @cached_property
    def _line_starts(self) -> list[int]:
        return [0, *accumulate(len(line) + 1 for line in self.bytes.split(b"\n")[:-1])]

    def line(self, offset: int) -> int:
        """Return the number, counted from 1, of the line at an offset in `bytes`."""
        return bisect_right(self._line_starts, offset)

    def line_start(self, offset: int) -> int:
        """Return the offset in `bytes` at which the line of `offset` begins."""
        return self._line_starts[self.line(offset) - 1]

    def line_starts_between(self, start: int, end: int) -> list[int]:
        """Return the offsets in `bytes` between `start` and `end` (both excluded) at which lines begin."""
        return self._line_starts[self.line(start) : bisect_left(self._line_starts, end)]

    def original_span(self, start: int, end: int) -> tuple[int, int, str]:
        """Return (start, end, text) of `bytes[start:end]` in the original text, with offsets in its UTF-8 bytes."""
        first, last = (at + bisect_left(self._removed, at) + self._skipped for at in (start, end))
        return first, last, self._original[first:last].decode()


class _Parser:
    """A tree-sitter parser and its buffer. Only one thread at a time may use a parser, or the process crashes."""

    def __init__(self, grammar: TreeSitterLanguage) -> None:
        self._parser = Parser(grammar)
        # tree-sitter 0.26 never releases what a read callback returns, so every text passes through one buffer, in
        # views of few sizes: powers of two, and any below 16, since the first character of a view must be whole.
        self._buffer = bytearray(1 << 16)
        sizes = (*range(16), *(1 << power for power in range(4, 17)))
        self._views = {size: memoryview(self._buffer)[:size] for size in sizes}

    def parse(self, source: bytes) -> Tree | None:
        deadline = time.thread_time() + MAX_PARSE_SECONDS

        def read(offset: int, _: Point) -> memoryview:
            size = max(0, len(source) - offset)
            if size >= 16:
                size = min(len(self._buffer), 1 << (size.bit_length() - 1))
            self._buffer[:size] = source[offset : offset + size]
            return self._views[size]

        try:
            return self._parser.parse(read, progress_callback=lambda *_: time.thread_time() > deadline)
        except ValueError:
            self._parser.reset()  # otherwise the next parse would continue this one
            return None


class Grammar:
    """The tree-sitter parsers and queries of one language; each query is compiled when it is first used."""

    def __init__(self, language: Language) -> None:
        self.language = language
        if language.grammar:
            self._grammar = TreeSitterLanguage(getattr(import_module(language.grammar), language.grammar_function)())
        else:
            self._grammar = import_module("tree_sitter_language_pack").get_language(language.name)
        self._idle_parsers: list[_Parser] = []

    def parse(self, source: bytes) -> Tree | None:
        """Return the syntax tree of `source`, or None if parsing takes too long; threads may parse at the same time."""
        try:
            parser = self._idle_parsers.pop()
        except IndexError:
            parser = _Parser(self._grammar)
        tree = parser.parse(source)
        self._idle_parsers.append(parser)  # not after an exception, which leaves the parser in the middle of a text
        return tree

    @cached_property
    def query(self) -> Query:
        """The query that captures functions, other definitions, comments and strings."""
        return Query(self._grammar, "\n".join(self._lines))

    @cached_property
    def definitions(self) -> Query:
        """The query that captures functions and other definitions only; it takes half the time of `query`."""
        lines = (line for line in self._lines if not line.endswith(("@comment", "@verbatim")))
        return Query(self._grammar, "\n".join(lines))

    @cached_property
    def errors(self) -> Query:
        """The query that captures syntax errors as `@error` and missing tokens as `@missing`."""
        return Query(self._grammar, "(ERROR) @error (MISSING) @missing")

    @cached_property
    def _lines(self) -> list[str]:
        file = Path(__file__).parent / "queries" / f"{self.language.query or self.language.name}.scm"
        return file.read_text(encoding="utf-8").splitlines()


@cache
def load_grammar(language: str) -> Grammar:
    """Return the grammar of one of `ALL_LANGUAGES`; it is loaded once per process."""
    return Grammar(language_entry(language))


def parse(source: bytes, grammar: Grammar) -> Tree:
    """Return the syntax tree of `source`; in C and C++, macros cause fewer syntax errors than in `parse_once`."""
    end = time.thread_time() + MAX_PARSE_SECONDS / 2
    tree = best = parse_once(source, grammar)
    fewest = error_bytes(tree, grammar) if grammar.language.has_macros else 0
    for number in range(_MAX_PASSES if fewest else 0):
        blanked = _without_macro_words(source, tree, grammar)
        if number == 0:
            blanked = _MACRO_LINE.sub(lambda match: b" " * len(match[0]), blanked)
        if blanked == source or time.thread_time() > end:
            break
        source, tree = blanked, parse_once(blanked, grammar)
        if (errors := error_bytes(tree, grammar)) < fewest:
            best, fewest = tree, errors
    if _has_wide_error(best):
        raise UnparsableSourceError("The text has thousands of unclosed brackets.")
    return best


def parse_once(source: bytes, grammar: Grammar) -> Tree:
    """Return the syntax tree of UTF-8 `source`. Nodes have offsets, but no `text`; invalid code is in ERROR nodes."""
    fault = f"The text holds null bytes, or a line longer than {MAX_LINE_BYTES:,} bytes."
    if b"\0" not in source and max(map(len, source.split(b"\n"))) <= MAX_LINE_BYTES:
        if (tree := grammar.parse(source)) is not None and tree.root_node.descendant_count <= MAX_NODES:
            return tree
        fault = f"Parsing takes longer than {MAX_PARSE_SECONDS:g} s, or the tree has more than {MAX_NODES:,} nodes."
    raise UnparsableSourceError(fault)


def matches(query: Query, tree: Tree) -> list[dict[str, list[Node]]]:
    """Return the captures of each match of `query`, by name, except matches that begin over 500 nodes deep."""
    cursor = QueryCursor(query)
    cursor.set_max_start_depth(_MAX_DEPTH)
    return [captures for _, captures in cursor.matches(tree.root_node)]


def error_bytes(tree: Tree, grammar: Grammar, start: int = 0, end: int | None = None) -> int:
    """Return the number of bytes from `start` to `end` in ERROR nodes, plus the number of the tree's missing tokens."""
    root = tree.root_node
    end = root.end_byte if end is None else end
    captures = QueryCursor(grammar.errors).captures(root) if root.has_error else {}
    total, at = 0, start
    for first, last in sorted(node.byte_range for node in captures.get("error", [])):
        total += max(0, min(last, end) - max(first, at))
        at = max(at, last)
    return total + len(captures.get("missing", []))


def _has_wide_error(tree: Tree) -> bool:
    """Return whether an ERROR node has over 10,000 tokens as children, which makes queries take minutes."""
    nodes = [tree.root_node] if tree.root_node.has_error else []
    while nodes:
        node = nodes.pop()
        if node.is_error and node.child_count - node.named_child_count > _MAX_TOKENS:
            return True
        nodes += [child for child in node.children if child.has_error]
    return False


_MAX_TOKENS = 10_000
_MAX_PASSES = 3
# `static void WINAPI run(…)`, `int argc UNUSED`; and `typename`, which the grammar of C++ knows in declarations only.
_MACRO_WORD = re.compile(rb"[A-Z][A-Z0-9_]+|__\w+|typename|template")
_WORD_BEFORE = re.compile(rb"\b([^\W\d]\w*)\s+\Z")
_WORD_AFTER = re.compile(rb"\s+([^\W\d]\w*)")
_MAX_WORD_BYTES = 80
# `LIBRARY_NAMESPACE_BEGIN`, `REGISTER_TYPE(name)` on lines of their own, without a semicolon.
_MACRO_LINE = re.compile(rb"^[ \t]*[A-Z][A-Z0-9_]{3,}[ \t]*(?:\([^()\n]*\)[ \t]*)?$", re.MULTILINE)


def _without_macro_words(source: bytes, tree: Tree, grammar: Grammar) -> bytes:
    """Return `source` with blanks in place of words that look like macros, in or next to a syntax error."""
    text = bytearray(source)
    for node in QueryCursor(grammar.errors).captures(tree.root_node).get("error", []):
        start, end = node.byte_range
        before = _WORD_BEFORE.search(source, max(0, start - _MAX_WORD_BYTES), start)
        after = _WORD_AFTER.match(source, end)
        for first, last in ((start, end), *(match.span(1) for match in (after, before) if match)):
            if _MACRO_WORD.fullmatch(source, first, last):
                text[first:last] = b" " * (last - first)
                break
    return bytes(text)


def check_syntax(code: str, language: str) -> tuple[float, bool]:
    """Return (share of `code` in syntax errors, 1.0 if `code` can't be parsed; whether `code` has a function)."""
    grammar = load_grammar(language)
    body = textwrap.dedent(code.replace("\r\n", "\n").replace("\r", "\n")).strip("\n").encode(errors="replace")
    best = (1.0, False)
    opening = grammar.language.opening.encode()
    frames = [(b"", b"")]
    if not (opening and body.lstrip().startswith(opening[:2])):
        own = [(before.encode(), after.encode()) for before, after in grammar.language.frames]
        frames = [(opening + before, after) for before, after in (*frames, *own)]
    for before, after in frames if body.strip() else ():
        try:
            tree = parse(before + body + after, grammar)
        except UnparsableSourceError:
            break
        # The code may have closed the class around it and opened another one.
        if before and after and sum(node.type != "php_tag" for node in tree.root_node.named_children) != 1:
            continue
        # An error may be only in the text around the code, for example if a brace is missing.
        errors = max(int(tree.root_node.has_error), error_bytes(tree, grammar, len(before), len(before) + len(body)))
        found = any("function" in captures for captures in matches(grammar.query, tree))
        best = min(best, (min(1.0, errors / len(body)), found), key=lambda one: (one[0], not one[1]))
        if best == (0.0, True):
            break
    return best
