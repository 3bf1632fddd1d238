"""Decode the bytes of a source file whose encoding is not given."""

import codecs
import re

# The longer marks first: UTF-16 begins like UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# PEP 263, in the first two lines; editors read it in the comments of other languages too.
_CODING_LINE = re.compile(
    rb"(?:[^\r\n]*(?:\r\n|\r|\n))?[ \t\f]*(?:#|//|/\*|--|;|%)[^\r\n]*?coding[:=][ \t]*([-\w.]+)", re.ASCII
)
_NO_SOURCE = ("idna", "punycode")  # of domain names


def decode_source(content: bytes) -> tuple[str, str | None]:
    """Return (text without byte-order mark, encoding) for the bytes of a source file.

    The encoding is that of a byte-order mark, else that of a coding line (PEP 263) if it fits the bytes, else UTF-8. If
    UTF-8 does not fit either, the text is read as Latin-1, which may be wrong, and the encoding is None.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, errors="replace"), encoding
    declared = _CODING_LINE.match(content)
    for encoding in (declared[1].decode() if declared else "utf-8", "utf-8"):
        try:
            if codecs.lookup(encoding).name not in _NO_SOURCE:
                return content.decode(encoding), encoding
        except (UnicodeError, LookupError):  # LookupError: unknown, or not an encoding of text
            continue
    return content.decode("latin-1"), None
