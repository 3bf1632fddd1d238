"""Common parts of all readers of source code: files, readers, filters by path and by text, decoding of bytes."""

import codecs
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath

from modular_star_encoder.data.languages.registry import language_entry


@dataclass(frozen=True, slots=True)
class SourceFile:
    """The text of one source file, and where it is from."""

    repository: str
    path: str  # with forward slashes, relative to the repository or to site-packages
    language: str  # lower-case name
    text: str  # without a byte-order mark; with the line ends of the file
    license: str | None = None  # of the file, as its data set reports it


class SourceReader:
    """Iterates over the `SourceFile`s of a corpus, in a fixed order, without holding the corpus in memory.

    Attributes:
        skipped: {reason: number of files that the last iteration left out for this reason}.
        repositories: names of the repositories in the order of reading; None if they are known only after reading.
    """

    unicode_names = False  # whether to escape lone surrogates such as `\udcff` in names, which UTF-8 cannot hold

    def __init__(
        self, read: Callable[[Counter[str]], Iterator[SourceFile]], repositories: tuple[str, ...] | None = None
    ) -> None:
        """`read(skipped)` yields the files of one iteration, and counts the files left out in `skipped`, by reason."""
        self._read, self.repositories = read, repositories
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[SourceFile]:
        self.skipped = Counter()  # a new one, because an abandoned iteration may still add to its own
        for file in self._read(self.skipped):
            if self.unicode_names:
                names = {"repository": file.repository, "path": file.path}
                file = replace(file, **{k: v.encode(errors="backslashreplace").decode() for k, v in names.items()})
            yield file


INSTALL_FOLDERS = {"site-packages", "dist-packages"}
CLOSED_FOLDERS = {"__pycache__", "node_modules"} | INSTALL_FOLDERS

_VENDOR_FOLDERS = {"_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"}
_VENDOR_FOLDERS_EXCEPT_IN_PYTHON = {"bower_components", "third-party", "thirdparty", "3rdparty", "Godeps"}
_TEST_FOLDER = re.compile(r"(.*_)?(tests?|testing)", re.IGNORECASE)
_TEST_FILE = re.compile(r"test_.*|.*_tests?|conftest", re.IGNORECASE)
_GENERATED_PHRASES = re.compile(
    r"auto-?generated|automatically generated|generated automatically|this file is generated|@generated\b",
    re.IGNORECASE,
)
# Go's convention (https://go.dev/s/generatedcode), which others follow; licences often come before it.
_GENERATED_LINE = re.compile(r"\W*(code )?generated .*do not edit\W*", re.IGNORECASE)
_GENERATED_MARK = re.compile(  # not after a quotation mark, because then the program prints it
    r"^[^\n\"']*(@generated\b|generated\b.{,300}?\bdo not (edit|modify))", re.IGNORECASE | re.DOTALL | re.MULTILINE
)
_PHRASE_LINES, _MARK_LINES, _MARKER_LINES = 5, 10, 40
_MINIFIED_LINE, _MINIFIED_AVERAGE, _LONGEST_COUNTED = 1000, 200, 10_000

# StarCoder2's patterns for Base64, hexadecimal and Unicode escapes, each with a string that every match contains.
_ENCODED_DATA = (
    ("", re.compile(r"[a-zA-Z0-9+/\n=]{64,}")),
    ("", re.compile(r"(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}(?:,|\b\s*)){8,}")),
    ("\\u", re.compile(r"(?:\\u[0-9a-fA-F]{4}){8,}")),
)
_MAX_ENCODED_CHARACTERS, _MAX_ENCODED_SHARE = 1024, 0.5


def is_vendored(path: PurePath, language: str) -> bool:
    """Return whether a folder in `path` has a name used for copies of other projects, such as `vendor`."""
    more = set() if language == "python" else _VENDOR_FOLDERS_EXCEPT_IN_PYTHON
    return not (_VENDOR_FOLDERS | INSTALL_FOLDERS | more).isdisjoint(path.parts[:-1])


def is_test(path: PurePath, language: str) -> bool:
    """Return whether the file or a folder in `path` has a name that `language` uses for tests."""
    entry, folders = language_entry(language), path.parts[:-1]
    return any(re.fullmatch(pattern, path.stem) for pattern in (_TEST_FILE, entry.test_file)) or any(
        re.fullmatch(pattern, folder) for pattern in (_TEST_FOLDER, entry.test_folder) for folder in folders
    )


def is_closed(path: PurePath) -> bool:
    """Return whether a folder in `path` is hidden or one of `CLOSED_FOLDERS`; readers do not enter such folders."""
    return any(name.startswith(".") or name in CLOSED_FOLDERS for name in path.parts[:-1])


def is_generated(text: str) -> bool:
    """Return whether lines 1–5 say that `text` is generated, or `generated … do not edit` is one of lines 1–40."""
    lines = text.split("\n", _MARKER_LINES)[:_MARKER_LINES]
    return any(map(_GENERATED_PHRASES.search, lines[:_PHRASE_LINES])) or any(map(_GENERATED_LINE.fullmatch, lines))


def is_marked_generated(text: str) -> bool:
    """Return whether the beginning of `text` says that the text is generated and should not be edited.

    It does if lines 1–10 hold `@generated` or `generated … do not edit`, or if `generated … do not edit` is one of
    lines 1–40.
    """
    lines = text.split("\n", _MARKER_LINES)[:_MARKER_LINES]
    if not any("generated" in line.lower() for line in lines):
        return False
    mark = _GENERATED_MARK.search("\n".join(lines[:_MARK_LINES]))
    return mark is not None or any(map(_GENERATED_LINE.fullmatch, lines))


def is_minified(text: str) -> bool:
    """Return whether `text` has a line of over 1,000 characters, and lines of over 200 characters on average."""
    if len(text) <= _MINIFIED_AVERAGE * (text.count("\n") + 1):
        return False
    lengths = [min(length, _LONGEST_COUNTED) for length in _line_lengths(text)]
    return max(lengths) > _MINIFIED_LINE and sum(lengths) > _MINIFIED_AVERAGE * len(lengths)


def _line_lengths(text: str) -> list[int]:
    return [len(line) for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]


def alphabetic_share(text: str) -> float:
    """Return the share of letters among the characters of `text`, from 0.0 to 1.0; 0.0 if `text` is empty."""
    # Deleting from bytes runs in C: fifteen times as fast as testing every character.
    if text.isascii():
        letters = len(text) - len(text.encode().translate(None, string.ascii_letters.encode()))
    else:
        letters = sum(map(str.isalpha, text))
    return letters / max(1, len(text))


def holds_encoded_data(text: str) -> bool:
    """Return whether Base64, hexadecimal data or Unicode escapes fill half of `text` or 1,024 characters in a row."""
    for hint, pattern in _ENCODED_DATA:
        lengths = [match.end() - match.start() for match in pattern.finditer(text)] if hint in text else []
        if lengths and (max(lengths) > _MAX_ENCODED_CHARACTERS or sum(lengths) > _MAX_ENCODED_SHARE * len(text)):
            return True
    return False


# Byte-order marks, the longer ones first: UTF-32's begins with UTF-16's.
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
# Encodings of domain names, and those that can yield lone surrogates.
_NO_SOURCE = ("idna", "punycode", "unicode-escape", "raw-unicode-escape", "utf-7")


def decode_source(content: bytes) -> tuple[str, str | None]:
    """Return (text without byte-order mark, encoding) for the bytes of a source file.

    A byte-order mark or a coding line (PEP 263) names the encoding; without them it is UTF-8. If the bytes are valid
    neither in the named encoding nor in UTF-8, they are read as Latin-1, and the second value is None.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFilters:
    """Decides which files a reader leaves out. By default, ordinary source text is kept."""

    max_bytes: int = 1_000_000
    max_line_length: int | None = 1000  # in characters: files with longer lines are minified or hold data
    max_average_line_length: float | None = None
    min_alphabetic_share: float = 0.0  # share of letters among the characters
    any_encoding: bool = False  # whether files that are not UTF-8 are read, by `decode_source`
    # Whether files of these kinds are kept:
    generated: bool = True  # written by a program
    marked_generated: bool = True  # marked as generated and not to be edited
    minified: bool = True
    encoded_data: bool = True  # with long Base64 or hexadecimal data
    vendored: bool = False  # copies of other projects
    tests: bool = False

    def reason_by_path(self, path: PurePath, language: str) -> str | None:
        """Return why the file at `path`, relative to its repository, is left out; None if it is kept."""
        if not self.vendored and is_vendored(path, language):
            return "vendored code"
        return "test code" if not self.tests and is_test(path, language) else None

    def reason_by_text(self, text: str) -> str | None:
        """Return why a file with the content `text` is left out; None if it is kept."""
        # A character has one to four bytes, so most texts need not be encoded to compare their size.
        size = len(text) if 4 * len(text) <= self.max_bytes else len(text.encode(errors="surrogatepass"))
        if size > self.max_bytes:
            return "too large"
        if "\0" in text:
            return "contains null bytes"
        if not text.strip():
            return "empty"
        longest, average = self.max_line_length, self.max_average_line_length
        lengths = _line_lengths(text) if (longest, average) != (None, None) else []
        if longest is not None and max(lengths) > longest:
            return "very long lines"
        if average is not None and sum(lengths) > average * len(lengths):
            return "long lines on average"
        if self.min_alphabetic_share and alphabetic_share(text) < self.min_alphabetic_share:
            return "few letters"
        marked = not self.marked_generated and is_marked_generated(text)
        if marked or (not self.generated and is_generated(text)):
            return "generated code"
        if not self.minified and is_minified(text):
            return "minified code"
        return "encoded data" if not self.encoded_data and holds_encoded_data(text) else None

    def decode(self, content: bytes, encoding: str = "utf-8-sig") -> tuple[str, str | None]:
        """Decode the `content` of a file: return (text, None), or ("", reason) if the file is left out."""
        if len(content) > self.max_bytes:
            return "", "too large"
        fault = "not UTF-8" if encoding == "utf-8-sig" else "not in its declared encoding"
        try:
            if codecs.lookup(encoding).name in _NO_SOURCE:
                return "", fault
            text = decode_source(content)[0] if self.any_encoding else content.decode(encoding).removeprefix("\ufeff")
        except LookupError:
            return "", "unknown encoding"
        except ValueError:  # UnicodeError, or a null byte in the name of the encoding
            return "", fault
        reason = self.reason_by_text(text)
        return ("", reason) if reason else (text, None)


STARCODER2_FILTERS = FileFilters(
    max_average_line_length=100, min_alphabetic_share=0.25, generated=False, encoded_data=False
)
"""StarCoder2's rules for single files, without the list of code generators of go-enry; files may have up to 1 MB."""
