"""Source text as bytes with `\\n` line ends, and where they lie in the bytes of the original."""

import re
from bisect import bisect_left, bisect_right
from itertools import accumulate

from modular_star_encoder.data.grammars import UnparsableSourceError

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
