"""The functions of a corpus as texts of their own: snippets of code without licence headers and imports."""

from collections import Counter
from collections.abc import Iterator
from typing import Self

from modular_star_encoder.data.functions import SUPPORTED_LANGUAGES, extract_functions
from modular_star_encoder.data.source_files import SourceFile, SourceReader
from modular_star_encoder.data.surviving_pool import map_in_processes

_FILES_PER_CHUNK = 64
_PROCESSES = 2

_Chunk = tuple[list[SourceFile], Counter[str]]


class FunctionFiles(SourceReader):
    """Yields every function of a reader's files, documented or not, as a file whose path ends in `#L{line}`.

    A function inside another one is part of that and no text of its own. Units are those of the reader. `skipped`
    counts the files that the reader leaves out, those that do not parse, and those that kill the parser.
    """

    def __init__(self, files: SourceReader) -> None:
        super().__init__()
        self._files = files
        self.repositories = files.repositories

    def skip(self, units: int) -> Self:
        """See `SourceReader`."""
        return type(self)(self._files.skip(units))

    def shard(self, index: int, count: int) -> Self:
        """See `SourceReader`."""
        return type(self)(self._files.shard(index, count))

    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        chunks = map_in_processes(
            _functions, self._files, processes=_PROCESSES, chunk_size=_FILES_PER_CHUNK, crashed=_crashed
        )
        for functions, counts in chunks:
            skipped.update(counts)
            yield from functions
        skipped.update(self._files.skipped)


def _functions(files: list[SourceFile]) -> _Chunk:
    found: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    for file in files:
        if file.language not in SUPPORTED_LANGUAGES:
            skipped["unsupported language"] += 1
            continue
        counts: Counter[str] = Counter()
        end = 0
        for one in extract_functions(file, counts, documented_only=False):
            if one.start_byte >= end:
                end = one.end_byte
                path = f"{one.path}#L{one.line}"
                found.append(SourceFile(one.repository, path, one.language, one.source, one.license))
        skipped["does not parse"] += counts["files that do not parse"]
    return found, +skipped


def _crashed(_: SourceFile) -> _Chunk:
    return [], Counter({"crashes the parser": 1})
