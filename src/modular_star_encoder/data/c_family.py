"""C and C++: which of the two a header is, and trees in spite of macros, which nobody expands for the parser."""

import re

from tree_sitter import QueryCursor, Tree

from modular_star_encoder.data.grammars import Grammar, error_bytes, parse

_MAX_PASSES = 3
# `static void WINAPI run(…)`, `__vector int x`; and `typename`, which the grammar of C++ knows in declarations only.
_STRANGE_WORD = re.compile(rb"[A-Z][A-Z0-9_]+|__\w+|typename|template")
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

    Words that are syntax errors by themselves and lines that are nothing but a macro are blanked as long as that leaves
    fewer errors.

    Raises:
        UnparsableSourceError: As `parse` does.
    """
    tree = parse(source, grammar)
    errors = error_bytes(tree, grammar)
    for number in range(_MAX_PASSES):
        if not errors:
            break
        source = _blanked(source, tree, grammar, lines=number == 0)
        candidate = parse(source, grammar)
        remaining = error_bytes(candidate, grammar)
        if remaining >= errors:
            break
        tree, errors = candidate, remaining
    return tree


def _blanked(source: bytes, tree: Tree, grammar: Grammar, *, lines: bool) -> bytes:
    text = bytearray(source)
    for node in QueryCursor(grammar.errors).captures(tree.root_node).get("error", []):
        start, end = node.byte_range
        if _STRANGE_WORD.fullmatch(source, start, end):
            text[start:end] = b" " * (end - start)
    if lines:
        text = bytearray(_MACRO_LINE.sub(lambda match: b" " * len(match[0]), bytes(text)))
    return bytes(text)
