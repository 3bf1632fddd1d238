"""C and C++: which of the two a header is, and trees in spite of macros, which nobody expands for the parser."""

import re

from tree_sitter import QueryCursor, Tree

from modular_star_encoder.data.grammars import Grammar, error_bytes, parse

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
