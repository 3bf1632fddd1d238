"""Documented functions: (description, code) rows out of source files, filtered by CodeSearchNet's rules.

The description is the first paragraph of what the author says of a function: its docstring in Python, elsewhere the
comment before it. The code is the function without any docstring: with its own, even BM25 finds it by the words of the
query.

Source of the rules: Husain et al., "CodeSearchNet Challenge", 2019 (arXiv 1909.09436), section 2.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import length_hint
from typing import Self

from tqdm.auto import tqdm

from modular_star_encoder.data.languages.function_finder import find_functions
from modular_star_encoder.data.languages.parsing import UnparsableSourceError
from modular_star_encoder.data.languages.registry import LANGUAGES, language_entry, language_of_text
from modular_star_encoder.data.sources.source_files import SourceFile, SourceReader
from modular_star_encoder.utils.crash_safe import crash_safe_map


@dataclass(frozen=True, slots=True)
class DocumentedFunction:
    """A function and its author's description.

    Attributes:
        repository: Name of its repository.
        path: Path of its file, with forward slashes.
        line: 1-based line of the file at which the function, with its decorators, begins; 0 if unknown.
        language: Lower-case name of the programming language.
        name: Dotted name inside the file, such as `"Stack.push"`.
        description: First paragraph of the documentation, in one line; empty for the undocumented that a search keeps.
        code: Decorators, signature and body, dedented, with `\\n` line ends, without docstrings and the comments before
            it.
        source: The whole function as in its file, with docstrings, line ends and indentation, without the comments
            before it. SynthCoNL's column `func1_CSN` is this text.
        start_byte: Its first byte in the UTF-8 encoding of the file's text; None if unknown.
        end_byte: The byte after its last: `text.encode()[start_byte:end_byte].decode() == source`.
        license: The licence according to the origin of the file, if any.
    """

    repository: str
    path: str
    line: int
    language: str
    name: str
    description: str
    code: str
    source: str = ""
    start_byte: int | None = None
    end_byte: int | None = None
    license: str | None = None


def function_id(function: DocumentedFunction) -> str:
    """An identifier of `function`: 32 hexadecimal digits, the same on every machine and in every run.

    It is the beginning of the SHA-256 of the repository, the path, the language, the place (line and first byte) and
    the source: a function that moves or changes becomes another one. Its name, description and licence do not count.
    """
    place = f"{function.line}:{'' if function.start_byte is None else function.start_byte}"
    # Lengths go before the parts, so that no two lists of parts make the same text.
    parts = (function.repository, function.path, function.language, place, function.source or function.code)
    encoded = [part.encode(errors="surrogatepass") for part in parts]
    digest = hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in encoded))
    return digest.hexdigest()[:32]


def code_key(code: str) -> str:
    """`code` with one space for every run of white space: equal for functions that differ in layout only."""
    return " ".join(code.split())


def description_key(description: str) -> str:
    """The lower-cased letters and digits of `description`: equal for near-identical descriptions."""
    return "".join(filter(str.isalnum, description.lower()))


MIN_DESCRIPTION_WORDS = 3
MAX_DESCRIPTION_WORDS = 256
MIN_CODE_LINES = 3


def is_well_described(function: DocumentedFunction) -> bool:
    """Whether the description has 3 to 256 words."""
    words = sum(any(map(str.isalnum, word)) for word in function.description.split())
    return MIN_DESCRIPTION_WORDS <= words <= MAX_DESCRIPTION_WORDS


def is_described_in_ascii(function: DocumentedFunction) -> bool:
    """Whether more than half of the letters of the description are ASCII: a coarse test of "written in English"."""
    letters = [character for character in function.description if character.isalpha()]
    return 2 * sum(map(str.isascii, letters)) > len(letters)


def is_long_enough(function: DocumentedFunction) -> bool:
    """Whether the code, without its docstring, has at least 3 lines that are not blank."""
    return sum(bool(line.strip()) for line in function.code.splitlines()) >= MIN_CODE_LINES


def is_no_constructor(function: DocumentedFunction) -> bool:
    """Whether the function does not construct or destroy an object."""
    entry = language_entry(function.language)
    outer, _, name = function.name.rpartition(".")
    named_like_class = entry.constructors_named_like_class and name.lstrip("~") == outer.rpartition(".")[2]
    return name not in entry.constructors and not named_like_class


def is_no_special_method(function: DocumentedFunction) -> bool:
    """Whether the language gives no meaning to the name, as to `__str__`, `toString`, `==`, `main`."""
    entry, name = language_entry(function.language), _own_name(function)
    return name not in entry.special_methods and not re.fullmatch(entry.special_method, name, re.DOTALL)


def is_no_test(function: DocumentedFunction) -> bool:
    """Whether the function's own name does not contain "test", in any case."""
    return "test" not in _own_name(function).lower()


def _own_name(function: DocumentedFunction) -> str:
    return function.name.rpartition(".")[2]


FILTERS: dict[str, Callable[[DocumentedFunction], bool]] = {
    "description not of 3 to 256 words": is_well_described,
    "description mostly not ASCII": is_described_in_ascii,
    "code of fewer than 3 lines": is_long_enough,
    "constructor": is_no_constructor,
    "special method": is_no_special_method,
    "name contains test": is_no_test,
}
"""In the order of application: the reason to drop a function, and the test that it fails."""


_FILES_PER_CHUNK = 64

_Chunk = tuple[list[DocumentedFunction], Counter[str]]


@dataclass(frozen=True, slots=True)
class FunctionCollection:
    """The functions that passed every filter, in the order of their files, and how many were dropped by which."""

    functions: list[DocumentedFunction]
    counts: Counter[str] = field(default_factory=Counter)


def extract_functions(
    file: SourceFile, counts: Counter[str] | None = None, documented_only: bool = True
) -> list[DocumentedFunction]:
    """The documented functions of `file`, in the order of the text, methods and nested functions included.

    No filter is applied, but functions without a body, with only a docstring in it, or with a syntax error are left
    out. A file that does not parse yields no function. A `.h` that was read as C and is C++ yields functions in C++.

    Args:
        file: The source file.
        counts: When given, `"files that do not parse"` and the counts of `find_functions` are added to it.
        documented_only: Whether to leave out functions without a description.

    Raises:
        UserError: `data.language.unknown` if the language of the file is not one of `LANGUAGES`.
    """
    language = language_of_text(file.language, file.path, file.text)
    try:
        found = find_functions(file.text, language, documented_only=documented_only, counts=counts)
    except UnparsableSourceError:
        if counts is not None:
            counts["files that do not parse"] += 1
        return []
    origin = partial(DocumentedFunction, repository=file.repository, path=file.path, language=language)
    return [origin(license=file.license, **asdict(one)) for one in found]


def collect_functions(files: Iterable[SourceFile], processes: int = 2, progress: bool = True) -> FunctionCollection:
    """Extract, filter and de-duplicate the documented functions of `files`.

    Of functions whose code differs in white space only, the first is kept. The result does not depend on `processes`.

    Args:
        files: Source files; those in unsupported languages are counted and skipped.
        processes: Number of worker processes; with 0 or 1 the work is done in this process.
        progress: Whether to show a progress bar.

    Returns:
        The functions, in the order of `files`, and counts: `"files"`, `"documented functions"`, one for each reason to
        drop a function, those of `extract_functions`, `"functions kept"`, and `"files that crash the parser"`.
    """
    counts: Counter[str] = Counter()
    kept: list[DocumentedFunction] = []
    seen: set[str] = set()
    total = length_hint(files) or None
    with tqdm(desc="Extracting functions", total=total, unit=" files", disable=not progress) as bar:
        for functions, chunk_counts in filtered_functions(files, processes):
            counts += chunk_counts
            for function in functions:
                key = code_key(function.code)
                if key in seen:
                    counts["dropped: same code as an earlier function"] += 1
                else:
                    seen.add(key)
                    kept.append(function)
            bar.update(chunk_counts["files"])
    counts["functions kept"] = len(kept)
    return FunctionCollection(kept, counts)


def filtered_functions(
    files: Iterable[SourceFile], processes: int = 2
) -> Iterator[tuple[list[DocumentedFunction], Counter[str]]]:
    """Yield the documented functions that pass `FILTERS`, and counts, for some files at a time, in order.

    As `collect_functions`, for corpora whose functions do not fit into memory; equal functions are not dropped.
    """
    yield from crash_safe_map(_extract_chunk, files, processes=processes, chunk_size=_FILES_PER_CHUNK, crashed=_crashed)


def _extract_chunk(files: list[SourceFile]) -> _Chunk:
    counts: Counter[str] = Counter(files=len(files))
    kept: list[DocumentedFunction] = []
    for file in files:
        if file.language not in LANGUAGES:
            counts["files in an unsupported language"] += 1
            continue
        for function in extract_functions(file, counts):
            counts["documented functions"] += 1
            reason = next((name for name, keeps in FILTERS.items() if not keeps(function)), None)
            if reason:
                counts[f"dropped: {reason}"] += 1
            else:
                kept.append(function)
    return kept, counts


def _crashed(_: SourceFile) -> _Chunk:
    return [], Counter({"files": 1, "files that crash the parser": 1})


_PROCESSES = 2

_SnippetChunk = tuple[list[SourceFile], Counter[str]]


class FunctionFiles(SourceReader):
    """Yields every function of a reader's files, documented or not, as a file whose path ends in `#L{line}`.

    A function inside another one belongs to that one. Units are those of the reader. `skipped` counts the files that
    the reader leaves out, those that do not parse, and those that crash the parser.
    """

    def __init__(self, files: SourceReader) -> None:
        super().__init__()
        self._files = files

    @property
    def repositories(self) -> tuple[str, ...] | None:
        """Those of the files' reader."""
        return self._files.repositories

    def skip(self, units: int) -> Self:
        """See `SourceReader`."""
        return type(self)(self._files.skip(units))

    def shard(self, index: int, count: int) -> Self:
        """See `SourceReader`."""
        return type(self)(self._files.shard(index, count))

    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        chunks = crash_safe_map(
            _functions,
            self._files,
            processes=_PROCESSES,
            chunk_size=_FILES_PER_CHUNK,
            crashed=_crashed_snippets,
        )
        for functions, counts in chunks:
            skipped.update(counts)
            yield from functions
        skipped.update(self._files.skipped)


def _functions(files: list[SourceFile]) -> _SnippetChunk:
    found: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    for file in files:
        if file.language not in LANGUAGES:
            skipped["unsupported language"] += 1
            continue
        counts: Counter[str] = Counter()
        end = 0
        for one in extract_functions(file, counts, documented_only=False):
            if (one.start_byte or 0) >= end:
                end = one.end_byte or 0
                path = f"{one.path}#L{one.line}"
                found.append(SourceFile(one.repository, path, one.language, one.source, one.license))
        skipped["does not parse"] += counts["files that do not parse"]
    return found, +skipped


def _crashed_snippets(_: SourceFile) -> _SnippetChunk:
    return [], Counter({"crashes the parser": 1})
