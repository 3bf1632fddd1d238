"""The text of a function, without its indentation and, in Python, without docstrings."""

import re
from collections.abc import Iterable, Iterator

from tree_sitter import Node

from modular_star_encoder.data.documentation import docstring_of
from modular_star_encoder.data.source_text import SourceText

Cut = tuple[int, int, bytes]
"""(first byte, byte after the last, what takes its place)."""

_STRINGS = {"string", "concatenated_string", "parenthesized_expression"}
# What may follow a docstring on its last line, and the blank lines after it.
_REST_OF_DOCSTRING_LINE = re.compile(rb"[ \t\f]*;?[ \t\f]*(?:#[^\n]*)?(?:\n(?:[ \t\f]*\n)*|\Z)")
_INDENT = re.compile(rb"[ \t\f]*")


def python_docstring(body: Node, source: SourceText) -> tuple[Node, str] | None:
    """Return (statement, value) of the docstring with which the body of a definition begins, or None."""
    statement = next(_statements(body), None)
    if statement is None or statement.type != "expression_statement" or statement.named_child_count != 1:
        return None
    literal = statement.named_child(0)
    value = (
        docstring_of(source.bytes[literal.start_byte : literal.end_byte].decode()) if literal.type in _STRINGS else None
    )
    return None if value is None else (statement, value)


def is_docstring_only(body: Node, source: SourceText) -> bool:
    """Whether the body of a Python definition is one statement, which is a docstring."""
    statements = _statements(body)
    next(statements, None)
    return next(statements, None) is None and python_docstring(body, source) is not None


def end_of_last_statement(node: Node) -> int:
    """Return where the last token of a Python definition ends; comments may follow it inside the node."""
    while node.child_count:
        children = (node.child(index) for index in reversed(range(node.child_count)))
        last = next((child for child in children if not child.is_extra), None)
        if last is None:
            break
        node = last
    return node.end_byte


def docstring_cut(body: Node, source: SourceText) -> Cut | None:
    """Return the cut that removes the docstring of a Python definition, if it has one."""
    found = python_docstring(body, source)
    if found is None:
        return None
    docstring, _ = found
    if is_docstring_only(body, source):
        return docstring.start_byte, docstring.end_byte, b"pass"
    rest = _REST_OF_DOCSTRING_LINE.match(source.bytes, docstring.end_byte)
    if rest:
        return source.line_start(docstring.start_byte), rest.end(), b""
    following = list(_statements(body))[1]  # `def f(): "docstring"; return 1`
    return docstring.start_byte, following.start_byte, b""


def indent_cuts(source: SourceText, start: int, end: int, fixed_lines: set[int]) -> Iterator[Cut]:
    """Yield the cuts that take the indentation of the first line away from the others of a span.

    Args:
        source: The text.
        start: First byte of the span.
        end: The byte after its last.
        fixed_lines: Where lines begin that lie inside a string: their white space is content.
    """
    first = source.line_start(start)
    found = _INDENT.match(source.bytes, first, start)
    indent = found[0].rpartition(b"\f")[2] if found else b""
    if indent:
        for at in source.line_starts_between(start, end):
            if at not in fixed_lines and source.bytes.startswith(indent, at):
                yield at, at + len(indent), b""


def cut_out(source: bytes, start: int, end: int, cuts: Iterable[Cut]) -> str:
    """Return the text from `start` to `end` without what is cut; of cuts that overlap, the first and widest counts."""
    pieces = []
    at = start
    for cut_start, cut_end, replacement in sorted(cuts, key=lambda cut: (cut[0], -cut[1])):
        if at <= cut_start < end:
            pieces += [source[at:cut_start], replacement]
            at = min(cut_end, end)
    pieces.append(source[at:end])
    return b"".join(pieces).decode().rstrip()


def _statements(body: Node) -> Iterator[Node]:
    """Yield the statements of a block, without comments and the like."""
    return (child for child in body.named_children if not child.is_extra)
