"""Divide files into functions or windows, and update a store: embed changed files, remove deleted ones.

Files are written in batches, one transaction each. An interrupted run leaves whole files, and the next one continues.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from operator import length_hint
from time import perf_counter
from typing import Any

from tqdm.auto import tqdm

from modular_star_encoder.data.functions import extract_functions
from modular_star_encoder.data.sources import FileFilters, SourceFile
from modular_star_encoder.data.sources.repositories import FileReader, folder_repositories
from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.settings import IndexSettings, Windows
from modular_star_encoder.search.vector_store import (
    Row,
    Snippet,
    StoredFile,
    VectorStore,
    content_hash,
    file_id,
    readable_path,
    row_id,
    words_of,
)
from modular_star_encoder.utils.crash_safe import crash_safe_map

_LINE_END = re.compile(r"\r\n|\r|\n")
_FILES_PER_CHUNK = 8
_ROWS_PER_BATCH = 256
_FILES_PER_REMOVAL = 1000

_Changed = tuple[SourceFile, list[Snippet]]


@dataclass(slots=True)
class UpdateReport:
    """What an update did.

    Attributes:
        files: source files that were read.
        embedded_files, embedded_rows: of these, the files that were new or had changed, and their rows.
        removed_files: files of the index that are gone or can't be read any more.
        rows: of the index, now.
        skipped: files left out, by reason.
        seconds: it took.
    """

    files: int = 0
    embedded_files: int = 0
    embedded_rows: int = 0
    removed_files: int = 0
    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}  # asdict breaks counters
        return {**values, "skipped": dict(self.skipped)}


def update_store(
    store: VectorStore, settings: IndexSettings, embedder: Embedder, *, processes: int = 2, progress: bool = True
) -> UpdateReport:
    """Bring a store up to date with its folder.

    Args:
        store: one that was created with `settings`.
        settings: what to read and how to embed it.
        embedder: of the settings' checkpoint.
        processes: processes that parse; with 0 or 1 this one does, and a file that crashes a parser ends the update.
        progress: whether to show a bar with rate and remaining time.

    Raises:
        ValueError: the folder doesn't exist.
    """
    start = perf_counter()
    filters = FileFilters(tests=settings.tests, vendored=settings.vendored)
    reader = folder_repositories(
        settings.root(store.location), languages=settings.languages, depth=0, filters=filters, may_be_empty=True
    )
    writer = _Writer(store, settings, embedder, store.files())
    with (
        warnings.catch_warnings(),
        tqdm(total=length_hint(reader), desc="indexing", unit="file", disable=not progress, leave=False) as bar,
    ):
        # Processes that parse never touch LanceDB, which warns of those that would.
        warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
        chunks = crash_safe_map(
            partial(_extract, windows=settings.windows),
            writer.changed(reader, bar),
            processes=processes,
            chunk_size=_FILES_PER_CHUNK,
            crashed=lambda file: [(file, _readable(list(file_windows(file, settings.windows))))],
        )
        for chunk in chunks:
            for file, snippets in chunk:
                writer.add(file, snippets)
                bar.update()
            bar.set_postfix(rows=writer.report.embedded_rows)
        writer.write()
    writer.remove_vanished()
    store.finish()
    report = writer.report
    report.rows, report.skipped, report.seconds = store.count(), reader.skipped, perf_counter() - start
    return report


class _Writer:
    """Collects the rows of changed files and writes them, whole files at a time."""

    def __init__(
        self, store: VectorStore, settings: IndexSettings, embedder: Embedder, held: dict[str, StoredFile]
    ) -> None:
        self.report = UpdateReport()
        self._store, self._settings, self._embedder, self._held = store, settings, embedder, held
        self._seen: set[str] = set()
        self._files: list[_Changed] = []
        self._rows = 0

    def changed(self, reader: FileReader, bar: Any) -> Iterator[SourceFile]:
        """The files of a reader that the store doesn't hold as they are."""
        for file in reader:
            key = file_id(file.path)
            self._seen.add(key)
            self.report.files += 1
            held = self._held.get(key)
            if held is not None and held.file_hash == content_hash(file.text):
                bar.update()
            else:
                yield file

    def add(self, file: SourceFile, snippets: list[Snippet]) -> None:
        """Take the snippets of one file."""
        self._files.append((file, snippets))
        self._rows += len(snippets)
        if self._rows >= _ROWS_PER_BATCH:
            self.write()

    def write(self) -> None:
        """Embed and write what was collected, in one transaction."""
        if not self._files:
            return
        snippets = [snippet for _, found in self._files for snippet in found]
        settings = self._settings
        vectors, states = self._embedder.snippets(
            snippets, settings.exit_layers, settings.dimension, states=settings.states
        )
        rows: list[Row] = []
        for file, found in self._files:
            key, file_hash = file_id(file.path), content_hash(file.text)
            for place, snippet in enumerate(found):
                number = len(rows)
                rows.append(
                    Row(
                        row_id=row_id(key, place),
                        file_id=key,
                        file_hash=file_hash,
                        file_rows=len(found),
                        text_hash=content_hash(snippet.text),
                        snippet=snippet,
                        words=words_of(snippet),
                        vectors={exit_layer: values[number] for exit_layer, values in vectors.items()},
                        states=None if states is None else states[number],
                    )
                )
        keys = {file_id(file.path) for file, _ in self._files}
        self._store.replace_files(keys & self._held.keys(), rows)
        self.report.embedded_files += len(self._files)
        self.report.embedded_rows += len(rows)
        self._files, self._rows = [], 0

    def remove_vanished(self) -> None:
        """Remove the files that the reader, read to its end, did not yield."""
        gone = sorted(self._held.keys() - self._seen)
        for start in range(0, len(gone), _FILES_PER_REMOVAL):
            self._store.replace_files(gone[start : start + _FILES_PER_REMOVAL], [])
        self.report.removed_files = len(gone)


def _extract(files: list[SourceFile], windows: Windows) -> list[_Changed]:
    return [(file, _readable(file_snippets(file, windows))) for file in files]


def _readable(snippets: list[Snippet]) -> list[Snippet]:
    return [replace(snippet, path=readable_path(snippet.path)) for snippet in snippets]


def file_snippets(file: SourceFile, windows: Windows) -> list[Snippet]:
    """The functions of a file in their order, documented or not, or its windows if it has none; never empty."""
    found = [
        Snippet(
            path=file.path,
            language=function.language,
            name=function.name,
            first_line=function.line,
            last_line=_last_line(function.line, function.source),
            description=function.description,
            text=function.code,
        )
        for function in extract_functions(file, documented_only=False)
    ]
    return found or list(file_windows(file, windows))


def _last_line(first_line: int, source: str) -> int:
    """The line of the last character of a text that begins on `first_line`."""
    return first_line + len(_LINE_END.findall(source))


def file_windows(file: SourceFile, windows: Windows) -> Iterator[Snippet]:
    """The windows of a file that isn't blank, whatever it holds."""
    lines = _LINE_END.split(file.text)
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    for start in range(0, len(lines), windows.lines - windows.overlap):
        chosen = lines[start : start + windows.lines]
        is_last = start + windows.lines >= len(lines)
        if any(line.strip() for line in chosen):
            last = start + len(chosen)
            yield Snippet(file.path, file.language, "", start + 1, last, "", "\n".join(chosen))
        if is_last:
            return
