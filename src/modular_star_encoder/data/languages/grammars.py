"""The tree-sitter grammars of the eight languages, and the queries that find functions in their trees.

Captures of a query:

- `@function`: the smallest text that is the function with its name, decorators and template parameters;
- `@name`: its name, or that of a scope; C and C++ give the `@declarator` that holds it, Go the `@receiver`'s type too;
- `@body`: what makes it a definition; of several patterns that find one body, the widest `@function` counts;
- `@scope`: what lends its name to the functions inside;
- `@untyped`: the body of a C++ function without a type, which is a constructor or a macro;
- `@comment`: every comment; and `@verbatim`: what may span lines whose white space is content.
"""

import re
import time
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from tree_sitter import Language, Parser, Point, Query, QueryCursor, Tree

MAX_PARSE_SECONDS = 5.0
"""Processor time after which a parse is given up. A file of 1 MB takes about half a second on one core."""
MAX_LINE_BYTES = 10_000
"""A text with a longer line is not parsed: it is data or minified, and nested deeply enough to exhaust the memory."""

# tree-sitter 0.26 never releases what a read callback returns, so every text passes through one buffer, in views of few
# sizes: powers of two, and any below 16, since the first character of a view must be whole.
_BUFFER = bytearray(1 << 16)
_VIEWS = {size: memoryview(_BUFFER)[:size] for size in (*range(16), *(1 << power for power in range(4, 17)))}

_FUNCTION_VALUES = (
    "(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)"
)
_DECLARATOR = f"(variable_declarator name: (identifier) @name value: [{_FUNCTION_VALUES}])"
_ASSIGNMENT = f"(assignment_expression left: [(identifier) (member_expression)] @name right: [{_FUNCTION_VALUES}])"

_JAVASCRIPT = f"""
(function_declaration name: (_) @name body: (_) @body) @function
(generator_function_declaration name: (_) @name body: (_) @body) @function
(function_expression name: (_) @name body: (_) @body) @function
(generator_function name: (_) @name body: (_) @body) @function
(method_definition name: (_) @name body: (_) @body) @function
{_DECLARATOR} @function
(lexical_declaration . {_DECLARATOR} .) @function
(variable_declaration . {_DECLARATOR} .) @function
{_ASSIGNMENT} @function
(expression_statement {_ASSIGNMENT}) @function
(pair key: (_) @name value: [{_FUNCTION_VALUES}]) @function
(field_definition property: (_) @name value: [{_FUNCTION_VALUES}]) @function
(export_statement "default" @name value: [
    (function_expression !name body: (_) @body)
    (generator_function !name body: (_) @body)
    (arrow_function body: (_) @body)
] @function)
(class_declaration name: (_) @name) @scope
(variable_declarator name: (identifier) @name value: [(object) (class)]) @scope
(assignment_expression left: [(identifier) (member_expression)] @name right: [(object) (class)]) @scope
(pair key: (_) @name value: (object)) @scope
(comment) @comment
[(template_string) (string)] @verbatim
"""

_PYTHON = """
(function_definition name: (_) @name body: (_) @body) @function
(decorated_definition definition: (function_definition name: (_) @name body: (_) @body)) @function
(class_definition name: (_) @name body: (_) @body) @scope
(string) @verbatim
"""

_JAVA = """
(method_declaration name: (_) @name body: (_) @body) @function
(constructor_declaration name: (_) @name body: (_) @body) @function
(compact_constructor_declaration name: (_) @name body: (_) @body) @function
(class_declaration name: (_) @name) @scope
(interface_declaration name: (_) @name) @scope
(enum_declaration name: (_) @name) @scope
(record_declaration name: (_) @name) @scope
(annotation_type_declaration name: (_) @name) @scope
[(block_comment) (line_comment)] @comment
(string_literal (multiline_string_fragment)) @verbatim
"""

_GO = """
(function_declaration name: (_) @name body: (_) @body) @function
(method_declaration
    receiver: (parameter_list (parameter_declaration type: (_) @receiver)) name: (_) @name body: (_) @body) @function
(comment) @comment
(raw_string_literal) @verbatim
"""

_PHP = """
(function_definition name: (_) @name body: (_) @body) @function
(method_declaration name: (_) @name body: (_) @body) @function
(class_declaration name: (_) @name) @scope
(interface_declaration name: (_) @name) @scope
(trait_declaration name: (_) @name) @scope
(enum_declaration name: (_) @name) @scope
(comment) @comment
[(heredoc) (nowdoc) (string) (encapsed_string)] @verbatim
"""

_RUBY = """
(method name: (_) @name) @function
(singleton_method name: (_) @name) @function
(class name: (_) @name) @scope
(module name: (_) @name) @scope
(comment) @comment
[(heredoc_body) (string)] @verbatim
"""

_C = """
(function_definition type: (_) declarator: (_) @declarator body: (_) @body) @function
(comment) @comment
(string_literal) @verbatim
"""

# Without a type, a plain name is a constructor if the class around it has the same name, and a macro otherwise. What
# stands between `class` and the name, as in `class EXPORT Name {…}`, makes the class look like a function.
_CPP = """
(function_definition declarator: (_) @declarator body: (_) @body) @function
(template_declaration (function_definition declarator: (_) @declarator body: (_) @body)) @function
(template_declaration (template_declaration
    (function_definition declarator: (_) @declarator body: (_) @body))) @function
(function_definition
    !type declarator: (function_declarator declarator: [(identifier) (field_identifier)]) body: (_) @untyped)
(class_specifier name: (_) @name body: (_)) @scope
(struct_specifier name: (_) @name body: (_)) @scope
(union_specifier name: (_) @name body: (_)) @scope
(function_definition type: [(class_specifier) (struct_specifier)] declarator: (identifier) @name) @scope
(comment) @comment
[(raw_string_literal) (string_literal)] @verbatim
"""

_QUERIES = {
    "python": _PYTHON,
    "java": _JAVA,
    "go": _GO,
    "php": _PHP,
    "ruby": _RUBY,
    "javascript": _JAVASCRIPT,
    "c": _C,
    "cpp": _CPP,
}

SUPPORTED_LANGUAGES = tuple(_QUERIES)
"""The languages whose functions are found; those of ModularStarEncoder, under the names of `source_files`."""


class UnparsableSourceError(ValueError):
    """The text is no source code that can be parsed: not text, or too much work."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A parser, the query that finds functions in its trees, and the one that finds `@error` and `@missing` nodes."""

    parser: Parser
    query: Query
    errors: Query


@cache
def load_grammar(language: str) -> Grammar:
    """Return the grammar of a language: one object per process, which threads must not share.

    Raises:
        ValueError: If the language is not supported.
    """
    if language not in _QUERIES:
        raise ValueError(f"Language {language!r} is not supported; use one of {', '.join(SUPPORTED_LANGUAGES)}.")
    module = import_module(f"tree_sitter_{language}")
    pointer = module.language_php() if language == "php" else module.language()
    grammar = Language(pointer)
    return Grammar(
        Parser(grammar), Query(grammar, _QUERIES[language]), Query(grammar, "(ERROR) @error (MISSING) @missing")
    )


def parse(source: bytes, grammar: Grammar) -> Tree:
    """Return the syntax tree of UTF-8 `source`, whose line ends are `\\n`; what is not valid becomes ERROR nodes.

    The `text` of its nodes must not be read: slice `source`.

    Raises:
        UnparsableSourceError: If `source` holds null bytes or a line longer than `MAX_LINE_BYTES`, or takes longer
            than `MAX_PARSE_SECONDS`: recovering from errors is quadratic, and worse in some grammars.
    """
    if b"\0" in source:
        raise UnparsableSourceError("The text holds null bytes.")
    if len(source) > MAX_LINE_BYTES and max(map(len, source.split(b"\n"))) > MAX_LINE_BYTES:
        raise UnparsableSourceError(f"A line is longer than {MAX_LINE_BYTES:,} bytes.")
    deadline = time.thread_time() + MAX_PARSE_SECONDS

    def read(offset: int, _: Point) -> memoryview:
        size = max(0, len(source) - offset)
        if size >= 16:
            size = min(len(_BUFFER), 1 << (size.bit_length() - 1))
        _BUFFER[:size] = source[offset : offset + size]
        return _VIEWS[size]

    try:
        return grammar.parser.parse(read, progress_callback=lambda *_: time.thread_time() > deadline)
    except ValueError:
        grammar.parser.reset()  # or the next parse would go on with this one
        raise UnparsableSourceError(f"Parsing takes longer than {MAX_PARSE_SECONDS:g} s.") from None


def error_bytes(tree: Tree, grammar: Grammar, start: int = 0, end: int | None = None) -> int:
    """Return how many bytes of a tree's text lie under ERROR nodes; every missing token counts as one byte.

    Args:
        tree: The tree.
        grammar: The grammar that made it.
        start: First byte that counts.
        end: The byte after the last that counts; None for all.
    """
    root = tree.root_node
    if not root.has_error:
        return 0
    end = root.end_byte if end is None else end
    captures = QueryCursor(grammar.errors).captures(root)
    total, at = 0, start
    for first, last in sorted(node.byte_range for node in captures.get("error", [])):
        total += max(0, min(last, end) - max(first, at))
        at = max(at, last)
    return total + len(captures.get("missing", []))


_MAX_PASSES = 3
# `static void WINAPI run(…)`, `int argc UNUSED`; and `typename`, which the grammar of C++ knows in declarations only.
_STRANGE_WORD = re.compile(rb"[A-Z][A-Z0-9_]+|__\w+|typename|template")
_WORD_BEFORE = re.compile(rb"\b([^\W\d]\w*)\s+\Z")
_WORD_AFTER = re.compile(rb"\s+([^\W\d]\w*)")
_MAX_WORD_BYTES = 80
# `LIBRARY_NAMESPACE_BEGIN`, `REGISTER_TYPE(name)` on lines of their own, without a semicolon.
_MACRO_LINE = re.compile(rb"^[ \t]*[A-Z][A-Z0-9_]{3,}[ \t]*(?:\([^()\n]*\))?[ \t]*$", re.MULTILINE)

# The signs of C++ by which GitHub's linguist tells the headers apart (its heuristics.yml, `.h`).
_CPP_LINE = re.compile(
    r"^[ \t]*(?:template[ \t]*<|(?:class|(?:using[ \t]+)?namespace)[ \t]+\w+|(?:private|public|protected)[ \t]*:"
    r"|(?:try|constexpr)\b|catch[ \t]*\(|#[ \t]*include[ \t]*<(?:cstdint|string|vector|map|list|iostream|memory)>)"
    r"|\bstd::\w",
    re.MULTILINE,
)


def is_cpp_header(text: str) -> bool:
    """Whether the text of a `.h`, which may be either, is C++."""
    return _CPP_LINE.search(text) is not None


def parse_around_macros(source: bytes, grammar: Grammar) -> Tree:
    """Return the tree of `source` with the macros that break it read as white space: all offsets stay the same.

    Words like macros are blanked where they are a syntax error or stand beside one, for which the parser may have taken
    their neighbour, and so are lines that are nothing but a macro. The tree with the fewest errors counts.

    Raises:
        UnparsableSourceError: As `parse` does.
    """
    tree = best = parse(source, grammar)
    fewest = error_bytes(tree, grammar)
    for number in range(_MAX_PASSES if fewest else 0):
        blanked = _without_strange_words(source, tree, grammar)
        if number == 0:
            blanked = _MACRO_LINE.sub(lambda match: b" " * len(match[0]), blanked)
        if blanked == source:
            break
        source = blanked
        tree = parse(source, grammar)
        errors = error_bytes(tree, grammar)
        if errors < fewest:
            best, fewest = tree, errors
    return best


def _without_strange_words(source: bytes, tree: Tree, grammar: Grammar) -> bytes:
    text = bytearray(source)
    for node in QueryCursor(grammar.errors).captures(tree.root_node).get("error", []):
        start, end = node.byte_range
        neighbours = (
            (start, end),
            _span(_WORD_AFTER.match(source, end)),
            _span(_WORD_BEFORE.search(source, max(0, start - _MAX_WORD_BYTES), start)),
        )
        for first, last in neighbours:
            if _STRANGE_WORD.fullmatch(source, first, last):
                text[first:last] = b" " * (last - first)
                break
    return bytes(text)


def _span(match: re.Match[bytes] | None) -> tuple[int, int]:
    return match.span(1) if match else (0, 0)
