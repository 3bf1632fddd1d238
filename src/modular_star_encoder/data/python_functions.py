"""The functions of one Python file, found with `ast` and cut out of the file's bytes.

Columns in `ast` count UTF-8 bytes, and its lines end at `\\n`, `\\r\\n` and `\\r` only (`str.splitlines` also splits at
form feeds and other separators), so spans are computed on the encoded text.
"""

import ast
import inspect
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = _Function | ast.ClassDef

_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)?")
# What may follow a docstring on its last line, and the blank lines after it.
_REST_OF_DOCSTRING_LINE = re.compile(
    rb"[ \t\f]*;?[ \t\f]*(?:#[^\r\n]*)?(?:(?:\r\n|\r|\n)(?:[ \t\f]*(?:\r\n|\r|\n))*|\Z)"
)
_COMMENT_OR_STRING = re.compile(
    r"""\#[^\n]*
    | '{3} (?: [^\\] | \\. )*? '{3}
    | "{3} (?: [^\\] | \\. )*? "{3}
    | ' (?: [^'\\\n] | \\. )* '
    | " (?: [^"\\\n] | \\. )* "
    """,
    re.VERBOSE | re.DOTALL,
)


class UnparsableSourceError(ValueError):
    """The text is not valid source code for the Python that runs this program."""


@dataclass(frozen=True, slots=True)
class FoundFunction:
    """A function: 1-based first line, dotted name, description ("" without docstring), code without docstrings."""

    line: int
    name: str
    description: str
    code: str


def find_functions(text: str, documented_only: bool = False) -> list[FoundFunction]:
    """Return the functions of the Python source `text` whose body is more than a docstring, in order.

    Args:
        text: The content of a file.
        documented_only: Whether to leave out functions without a docstring.

    Raises:
        UnparsableSourceError: If `text` does not parse, holds null bytes, or is nested too deeply.
    """
    text = text.removeprefix("\ufeff")
    try:
        source = text.encode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the author's business
            tree = ast.parse(text)  # not `source`: bytes would be decoded by the file's coding comment
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnparsableSourceError(f"Not valid Python: {error}.") from None
    cutter = _Cutter(source)
    found = []
    for name, node in _functions(tree):
        docstring = ast.get_docstring(node, clean=False)
        wanted = not documented_only if docstring is None else len(node.body) > 1
        if wanted:
            line, code = cutter.code(node)
            found.append(FoundFunction(line, name, _first_paragraph(docstring or ""), code))
    return found


def _functions(tree: ast.Module) -> Iterator[tuple[str, _Function]]:
    """Yield (dotted name, node) of every function, in the order of the text.

    A stack rather than recursion: expressions that the parser accepts may be nested deeper than Python recurses.
    """
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, _Definition):
            name = prefix + node.name
            if isinstance(node, _Function):
                yield name, node
            prefix = name + "."
        stack += reversed([(prefix, child) for child in ast.iter_child_nodes(node)])


def _first_paragraph(docstring: str) -> str:
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    # An escape in a docstring can make half a surrogate pair, which no tokenizer takes.
    return " ".join(paragraph.encode(errors="replace").decode().split())


class _Cutter:
    """Cuts functions out of one file's bytes."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.line_starts = [0, *accumulate(map(len, _LINE.findall(source)))]

    def code(self, node: _Function) -> tuple[int, str]:
        """Return the 1-based first line of the function and its dedented code without docstrings."""
        first = self._offset(node.lineno, node.col_offset)
        if node.decorator_list:
            decorator = node.decorator_list[0]
            first = self.source.rindex(b"@", 0, self._offset(decorator.lineno, decorator.col_offset))
        line = bisect_right(self.line_starts, first)
        indent = self.source[self.line_starts[line - 1] : first].rpartition(b"\f")[2].decode()
        start = first
        pieces = []
        for cut_start, cut_end, replacement in sorted(self._docstring_cuts(node)):
            pieces += [self.source[start:cut_start], replacement]
            start = cut_end
        pieces.append(self.source[start : self._offset(node.end_lineno, node.end_col_offset)])
        code = re.sub(r"\r\n?", "\n", b"".join(pieces).decode())
        return line, _dedent(code, indent).rstrip()

    def _docstring_cuts(self, function: _Function) -> Iterator[tuple[int, int, bytes]]:
        """Yield (start, end, replacement) for the docstrings of `function` and of all that is defined inside it."""
        for node in ast.walk(function):
            if isinstance(node, _Definition) and ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                start = self._offset(docstring.lineno, docstring.col_offset)
                end = self._offset(docstring.end_lineno, docstring.end_col_offset)
                if len(node.body) == 1:
                    yield start, end, b"pass"
                    continue
                rest = _REST_OF_DOCSTRING_LINE.match(self.source, end)
                if rest:
                    yield self.line_starts[docstring.lineno - 1], rest.end(), b""
                else:  # `def f(): "docstring"; return 1`
                    yield start, self._offset(node.body[1].lineno, node.body[1].col_offset), b""

    def _offset(self, line: int | None, column: int | None) -> int:
        if line is None or column is None:
            raise AssertionError("a parsed node has positions")
        return self.line_starts[line - 1] + column


def _dedent(code: str, indent: str) -> str:
    """Remove `indent` from the lines of `code`, except from those that begin inside a string."""
    if not indent:
        return code
    protected: set[int] = set()
    if '"""' in code or "'''" in code or "\\\n" in code:
        for match in _COMMENT_OR_STRING.finditer(code):
            if not match[0].startswith("#") and "\n" in match[0]:
                first = code.count("\n", 0, match.start())
                protected |= set(range(first + 1, first + 1 + match[0].count("\n")))
    lines = code.split("\n")
    return "\n".join(line if i in protected else line.removeprefix(indent) for i, line in enumerate(lines))
