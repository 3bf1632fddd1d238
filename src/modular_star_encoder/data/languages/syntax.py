"""Is a text valid code in a language, and does it hold a function? Questions about snippets, not files.

A method of Java, PHP or JavaScript stands in a class, and none of them is a valid file without one: a snippet is tried
as it is and in the frames of its language, and the best result counts.
"""

import re
import textwrap
from bisect import bisect_left, bisect_right
from itertools import accumulate

from tree_sitter import QueryCursor, Tree

from modular_star_encoder.data.languages.grammars import (
    UnparsableSourceError,
    error_bytes,
    load_grammar,
    parse,
    parse_around_macros,
)

_FRAMES: dict[str, tuple[tuple[bytes, bytes], ...]] = {
    "python": ((b"if 1:\n", b"\n"),),
    "java": ((b"class A {\n", b"\n}"), (b"interface A {\n", b"\n}"), (b"enum A { B;\n", b"\n}")),
    "go": (),
    "php": ((b"class A {\n", b"\n}"), (b"interface A {\n", b"\n}")),
    "ruby": (),
    "javascript": ((b"class A {\n", b"\n}"), (b"({\n", b"\n})"), (b"(\n", b"\n)")),
    "c": (),
    "cpp": ((b"class A {\n", b"\n};"),),
}


def syntax_error_share(code: str, language: str) -> float:
    """Return the share of the bytes of `code` that are no valid `language`: 0.0 for valid code, 1.0 at the most.

    The bytes are those under ERROR nodes of the tree-sitter grammar; a missing token counts as one. Text that cannot be
    parsed at all (see `grammars.parse`) and blank text are 1.0. Grammars forgive much, Ruby's most of all: plain prose
    may parse, which `holds_function` tells from code.

    Args:
        code: A function, a method without its class, or any other piece of code; PHP may lack its `<?php`.
        language: One of `grammars.SUPPORTED_LANGUAGES`.

    Raises:
        ValueError: If the language is not supported.
    """
    return _best_parse(code, language)[0]


def holds_function(code: str, language: str) -> bool:
    """Whether `code` defines a function with a name and a body in `language`.

    Args:
        code: As for `syntax_error_share`.
        language: As for `syntax_error_share`.

    Raises:
        ValueError: If the language is not supported.
    """
    return _best_parse(code, language)[1]


def _best_parse(code: str, language: str) -> tuple[float, bool]:
    """Return (error share, whether there is a function) of `code` in the frame that suits it best."""
    grammar = load_grammar(language)
    body = textwrap.dedent(code.replace("\r\n", "\n").replace("\r", "\n")).strip("\n").encode(errors="replace")
    if not body.strip():
        return 1.0, False
    parser = parse_around_macros if language in ("c", "cpp") else parse
    best = (1.0, False)
    for before, after in _frames(body, language):
        try:
            tree = parser(before + body + after, grammar)
        except UnparsableSourceError:
            break
        if before and after and not _is_one_frame(tree):
            continue
        # An error may lie in the frame alone, as with a brace too few.
        errors = max(int(tree.root_node.has_error), error_bytes(tree, grammar, len(before), len(before) + len(body)))
        found = "function" in QueryCursor(grammar.query).captures(tree.root_node)
        best = min(best, (min(1.0, errors / len(body)), found), key=lambda one: (one[0], not one[1]))
        if best == (0.0, True):
            break
    return best


def _frames(body: bytes, language: str) -> list[tuple[bytes, bytes]]:
    if language != "php":
        return [(b"", b""), *_FRAMES[language]]
    if body.lstrip().startswith(b"<?"):
        return [(b"", b"")]
    return [(b"<?php\n" + before, after) for before, after in [(b"", b""), *_FRAMES[language]]]


def _is_one_frame(tree: Tree) -> bool:
    """Whether the code has not closed its frame and opened another."""
    return sum(node.type != "php_tag" for node in tree.root_node.named_children) == 1


_BYTE_ORDER_MARK = "\ufeff"


class SourceText:
    """The text of a file with `\\n` for every `\\r\\n` and `\\r`, encoded in UTF-8.

    Grammars differ in what they make of `\\r`, and code is stored with `\\n`; yet offsets are those of the file.

    Attributes:
        bytes: The encoded text, without a byte-order mark.
    """

    def __init__(self, text: str) -> None:
        """Encode `text`.

        Raises:
            UnparsableSourceError: If `text` holds half a surrogate pair, which has no encoding.
        """
        try:
            self._original = text.encode()
        except UnicodeEncodeError:
            raise UnparsableSourceError("The text holds half a surrogate pair.") from None
        self._skipped = len(_BYTE_ORDER_MARK.encode()) if text.startswith(_BYTE_ORDER_MARK) else 0
        body = self._original[self._skipped :]
        self._removed: list[int] = []
        if b"\r" in body:
            pairs = [match.start() for match in re.finditer(rb"\r\n", body)]
            self._removed = [start - number for number, start in enumerate(pairs)]
            body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        self.bytes = body
        self._line_starts = [0, *accumulate(len(line) + 1 for line in body.split(b"\n")[:-1])]

    def line(self, offset: int) -> int:
        """Return the 1-based line of an offset of `bytes`."""
        return bisect_right(self._line_starts, offset)

    def line_start(self, offset: int) -> int:
        """Return the offset at which the line of `offset` begins."""
        return self._line_starts[self.line(offset) - 1]

    def line_starts_between(self, start: int, end: int) -> list[int]:
        """Return where the lines begin that follow the one of `start` and begin before `end`."""
        return self._line_starts[self.line(start) : bisect_left(self._line_starts, end)]

    def original_span(self, start: int, end: int) -> tuple[int, int, str]:
        """Return (first byte, byte after the last, text) of a span of `bytes` in the UTF-8 encoding of the original."""
        first, last = (at + bisect_left(self._removed, at) + self._skipped for at in (start, end))
        return first, last, self._original[first:last].decode()
