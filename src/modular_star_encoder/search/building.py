"""Update an index: divide changed files into pieces, embed the pieces, and write batches of files as transactions."""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from operator import length_hint
from pathlib import Path
from typing import Any

from modular_star_encoder.data.languages.registry import language_of_text
from modular_star_encoder.data.sources import FileFilters, SourceFile
from modular_star_encoder.data.sources.ignore_files import beginning
from modular_star_encoder.data.sources.repositories import FileReader, SourcePath, folder_repositories
from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.pieces import Snippet, file_pieces, is_boilerplate, question_stems, snippet_words
from modular_star_encoder.search.vector_store import (
    IndexSettings,
    Row,
    Stamps,
    VectorStore,
    content_hash,
    file_id,
    readable_path,
)
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.reports import printable

_FILES_PER_CHUNK = 8
_ROWS_PER_BATCH, _ROWS_PER_BATCH_AT_EXIT_0 = 256, 2048  # rows written at once: few, lest an interruption lose much
_ROWS_PER_BATCH_IN_A_HURRY = 32
_ROWS_PER_EMBEDDING = 256  # rows embedded at once: few, so that the parsing processes don't wait for this one
_FILES_PER_REMOVAL = 1000
FEW_NEW_FILES = 1000  # a first search reads up to this many new files, however long it takes
_SMALL_FILE, _MOST_STEMS = 100_000, 64  # most bytes of a file and stems of questions that sorting compares
_FRESH_NS = 2_000_000_000  # a file that changed less than 2 s ago may change again without a new time of change

_Piece = tuple[Snippet, str]  # a piece and its words, with spaces between
_Changed = tuple[SourceFile, list[_Piece]]


@dataclass(slots=True)
class UpdateReport:
    """Numbers of files and rows that one update of an index read, embedded, removed or left out."""

    files: int = 0  # source files of the folder that were read or are known to be unchanged
    embedded_files: int = 0  # new or changed files that were embedded
    embedded_rows: int = 0  # rows of these files
    removed_files: int = 0  # files removed from the index, because they were deleted or are now left out
    rows: int = 0  # rows in the index after the update
    is_unfinished: bool = False  # another process is building the index, and this one did not update it
    postponed_files: int = 0  # files that may have changed but were not embedded, for lack of time
    skipped_files: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) of each file left out
    guessed_files: list[str] = field(default_factory=list)  # files read as Latin-1: not UTF-8, no encoding declared
    seconds: float = 0.0  # duration of the update

    @property
    def skipped(self) -> Counter[str]:
        """A counter {reason: number of files left out for this reason}."""
        return Counter(reason for _, reason in self.skipped_files)

    def notes(self) -> list[tuple[str, str]]:
        """Return (path as Unicode text, reason) for each file that was left out or read as Latin-1, sorted."""
        named = [*self.skipped_files, *((path, "read as Latin-1") for path in self.guessed_files)]
        return sorted((readable_path(path), reason) for path, reason in named)

    def lines(self, show_skipped: bool = False) -> list[str]:
        """Return notes: how many files were left out, read as Latin-1 or postponed; `show_skipped` lists the files."""
        if show_skipped:
            lines = [printable(f"{path}: {reason}") for path, reason in self.notes()]
        else:
            counts = sorted(self.skipped.items(), key=lambda one: (-one[1], one[0]))
            reasons = (f"{count:,} {reason.removesuffix(' code')}" for reason, count in counts)
            parts = [f"{_files(self.skipped.total())} left out: {', '.join(reasons)}"] if counts else []
            parts += [f"{_files(len(self.guessed_files))} read as Latin-1"] if self.guessed_files else []
            lines = [f"mose: note: {'; '.join(parts)}; --show-skipped lists the files"] if parts else []
        if self.postponed_files:
            late = f"{_files(self.postponed_files)} not read yet"
            lines.append(f"mose: note: {late}; later searches read more, and `mose index` reads all files")
        if self.is_unfinished:
            lines.append(f"mose: note: {self.gap().strip()}")
        return lines

    def gap(self) -> str:
        """Return a sentence, after a space, that says what the index lacks; "" if nothing was left for later."""
        if self.is_unfinished:
            return " Another process is building the index, which lacks files until then."
        return f" {_files(self.postponed_files)} not read yet." if self.postponed_files else ""

    def news(self, show_skipped: bool = False) -> list[str]:
        """Return `lines(show_skipped)`; but [] if `show_skipped` is false, no file was embedded and no gap is left."""
        return self.lines(show_skipped) if show_skipped or self.embedded_files or self.gap() else []

    def to_dict(self) -> dict[str, Any]:
        """Return the report's numbers as JSON values. The key `skipped` has {reason: number of files left out}."""
        values = asdict(self)
        del values["skipped_files"], values["guessed_files"], values["is_unfinished"]
        return {**values, "skipped": dict(self.skipped)}


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


SEARCH_FILTERS = FileFilters(
    max_bytes=5_000_000, max_line_length=None, any_encoding=True, marked_generated=False, minified=False
)
"""The rules for which files search reads. Search also leaves out files that git ignores."""


def search_files(folder: str, languages: Collection[str], **kinds: bool) -> FileReader:
    """Return a reader of those files of a folder that search reads; `kinds` replace fields of `SEARCH_FILTERS`."""
    options: dict[str, Any] = {"filters": replace(SEARCH_FILTERS, **kinds), "depth": 0, "may_be_empty": True}
    return folder_repositories(folder, languages=languages, obey_ignore_files=True, **options)


def update_store(
    store: VectorStore,
    settings: IndexSettings,
    embedder: Embedder,
    *,
    processes: int = 2,
    progress: bool = True,
    seconds: float | None = None,
    questions: Sequence[str] = (),
) -> UpdateReport:
    """Bring `store`, which has these `settings`, up to date with `settings.folder`; UserError if the folder is gone.

    A file is not read again if its size, times of change and inode are as before. After `seconds`, unread files keep
    their old rows and count as postponed. If over 1,000 files are new, those with words of `questions` are read first.
    A new index of up to 1,000 files has no time limit. With 0 or 1 `processes`, a parser's crash ends this process.
    """
    start, vendored = time.perf_counter(), settings.vendored
    kinds = {"tests": settings.tests, "vendored": vendored, "marked_generated": vendored}
    reader = search_files(settings.folder, settings.languages, **kinds)
    _check_in_place(settings.folder)
    known = store.stamps()
    has_many = length_hint(reader) - len(known) > FEW_NEW_FILES
    if not known and not has_many:
        seconds = None
    writer = _Writer(store, settings, embedder, seconds)
    if seconds is not None and questions and has_many:
        reader.sort(partial(_keys, known=known, questions=questions, end=time.monotonic() + seconds / 3))
    with (
        _bar(length_hint(reader), progress) as advance,
        closing(_divided(writer.changed(reader, advance), processes, settings, writer.end)) as divided,
    ):
        reader.is_known = lambda path, location: writer.is_known(path, location) and (advance() or True)
        for file, pieces in chain.from_iterable(divided):
            writer.add(file, pieces)
            advance()
        _check_in_place(settings.folder)  # before files that were not found are removed from the index
        writer.finish()
    report = writer.report
    report.rows, report.seconds = store.count(), time.perf_counter() - start
    report.skipped_files += reader.skipped_files
    report.guessed_files = reader.guessed_files
    return report


def _check_in_place(folder: str) -> None:
    if not os.path.isdir(folder) or os.path.realpath(folder) != folder:
        message = f"The folder {folder} was moved, removed or replaced by a link. Index the folder at its present path."
        raise UserError("search.folder.replaced", message)


@contextmanager
def _bar(total: int, is_shown: bool) -> Iterator[Callable[[], Any]]:
    if is_shown:
        from tqdm.auto import tqdm  # imports asyncio, which searches without a bar do not need

        with tqdm(total=total, desc="indexing", unit="file", leave=False) as bar:
            yield bar.update
    else:
        yield lambda: None


def _divided(
    files: Iterator[SourceFile], processes: int, settings: IndexSettings, end: float | None
) -> Generator[list[_Changed]]:
    """Divide files into pieces in worker processes; yield lists of (file, its pieces) for a few files at a time."""
    for first in files:  # runs once, because `rest` takes the others; without files, nothing is imported
        from threadpoolctl import threadpool_limits

        from modular_star_encoder.utils.crash_safe import crash_safe_map

        rest = chain([first], files)
        # At exit 0, numpy gets one thread, because parsing makes better use of the other cores.
        with threadpool_limits(1 if settings.exit_layers == (0,) else None, user_api="blas"):
            options: dict[str, Any] = {"processes": processes, "chunk_size": _FILES_PER_CHUNK if end is None else 1}
            yield from crash_safe_map(_pieces, rest, crashed=_blocks, end=end, **options)


class _Writer:
    """Collects the pieces of changed files, embeds them, and writes all rows of a file in one transaction."""

    def __init__(self, store: VectorStore, settings: IndexSettings, embedder: Embedder, seconds: float | None) -> None:
        self.report = UpdateReport()
        self.end = None if seconds is None else time.monotonic() + seconds
        self._store, self._settings, self._embedder = store, settings, embedder
        self._held = store.files()
        self._seen: set[str] = set()
        self._stamps_before = store.stamps()
        self._stamps: Stamps = {}
        self._files: list[_Changed] = []  # files that are not embedded yet
        self._pieces = 0  # number of pieces of these files
        self._keys: list[str] = []  # ids of the files that `_rows` holds, embedded but not written yet
        self._rows: list[Row] = []
        deep = _ROWS_PER_BATCH if seconds is None else _ROWS_PER_BATCH_IN_A_HURRY
        self._batch = _ROWS_PER_BATCH_AT_EXIT_0 if settings.exit_layers == (0,) else deep

    def is_known(self, path: str, location: Path) -> bool:
        """Return whether to skip a file because it has not changed since the last update or because time is up."""
        key = file_id(path)
        try:
            status = os.stat(location)
        except OSError:
            return False
        # An archive may restore size and time of change; then the time of the status change or the inode differs.
        stamp = content_hash(repr((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)))[:16]
        before, content = self._stamps_before.get(key, (None, None))
        is_same = content == self._held.get(key) if content else key not in self._held and self.end is not None
        if before == stamp and is_same:
            self._stamps[key] = [stamp, content]
            self.report.files += content is not None
        elif self._is_late():
            self.report.postponed_files += 1
        else:
            if abs(time.time_ns() - status.st_mtime_ns) > _FRESH_NS:
                self._stamps[key] = [stamp, None]
            return False
        self._seen.add(key)
        return True

    def _is_late(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    def changed(self, reader: FileReader, advance: Callable[[], Any]) -> Iterator[SourceFile]:
        """Yield the files of `reader` that are new or have changed; for each unchanged file, call `advance` instead."""
        for file in reader:
            key = file_id(file.path)
            self._seen.add(key)
            self.report.files += 1
            content = content_hash(file.text)
            if key in self._stamps:
                self._stamps[key][-1] = content
            if self._held.get(key) == content:
                advance()
            else:
                self.report.postponed_files += 1  # until `add` gets it in time
                yield file

    def add(self, file: SourceFile, pieces: list[_Piece]) -> None:
        """Collect the pieces of one file; when a batch is full, embed the collected pieces and write their rows."""
        if self._is_late():
            return
        self.report.postponed_files -= 1
        if not pieces:
            self.report.skipped_files.append((file.path, "no words"))
        self._files.append((file, pieces))
        self._pieces += len(pieces)
        if self._pieces >= min(self._batch, _ROWS_PER_EMBEDDING):
            self._embed()
        if len(self._rows) >= self._batch:
            self.write()

    def write(self) -> None:
        """Embed the collected pieces, and write the rows of their files in one transaction."""
        self._embed()
        if self._keys:
            self._store.replace_files(self._held.keys() & self._keys, self._rows)
        self.report.embedded_files += len(self._keys)
        self.report.embedded_rows += len(self._rows)
        self._keys, self._rows = [], []

    def _embed(self) -> None:
        snippets = [snippet for _, found in self._files for snippet, _ in found]
        settings = self._settings
        vectors = self._embedder.snippets(snippets, settings.exit_layers, settings.dimension) if snippets else {}
        number = 0
        for file, found in self._files:
            key, file_hash = file_id(file.path), content_hash(file.text)
            self._keys.append(key)
            for place, (snippet, words) in enumerate(found):
                embeddings = {exit_layer: values[number] for exit_layer, values in vectors.items()}
                self._rows.append(Row(place, key, file_hash, len(found), snippet, words, embeddings))
                number += 1
        self._files, self._pieces = [], 0

    def finish(self) -> None:
        """Write the collected rows, remove deleted files from the index, and store the files' `Stamps`."""
        gone = sorted(self._held.keys() - self._seen)
        for start in range(0, len(gone), _FILES_PER_REMOVAL):
            self._store.replace_files(gone[start : start + _FILES_PER_REMOVAL], [])
        self.report.removed_files = len(gone)
        self.write()
        if self.end is None:  # with a time limit, a later update optimises the store
            self._store.finish()
        if self._stamps != self._stamps_before:
            self._store.keep_stamps(self._stamps)


def _keys(files: Sequence[SourcePath], known: Stamps, questions: Sequence[str], end: float) -> list[tuple[Any, ...]]:
    """Return a sort key per file: known files first, then small files with rare words of `questions`, then others.

    After the time `end`, no more files are read, and only their paths are compared with `questions`.
    """
    stems = sorted(question_stems(" ".join(questions)), key=len)[-_MOST_STEMS:]
    found: list[tuple[bool, bool, list[str]]] = []  # (is new, is large, stems in the file)
    for file in files:
        is_new = file_id(file.path) not in known
        is_read = is_new and time.monotonic() < end
        content = (beginning(file.location, _SMALL_FILE + 1, links=False) if is_read else None) or b""
        text = f"{file.path}\n{content.decode(errors='replace')}".lower() if is_new else ""
        # Large files come last, because one file may take all the time.
        found.append((is_new, len(content) > _SMALL_FILE, [stem for stem in stems if stem in text]))
    counts = Counter(chain.from_iterable(some for *_, some in found))
    rarity = {stem: math.log(len(files) / count) for stem, count in counts.items()}
    return [(is_new, is_large, -sum(map(rarity.__getitem__, some))) for is_new, is_large, some in found]


def _pieces(files: list[SourceFile]) -> list[_Changed]:
    return [_divide(one, language_of_text(one.language, one.path, one.text)) for one in files]


def _blocks(file: SourceFile) -> list[_Changed]:  # for a file that crashes the parser: blocks of lines
    return [_divide(file, "")]


def _divide(file: SourceFile, language: str) -> _Changed:
    """Return a file and its pieces; boilerplate pieces are left out if the file has other pieces."""
    found = file_pieces(readable_path(file.path), language, file.text)
    kept = [piece for piece in found if not is_boilerplate(piece)] or found
    return file, [(piece, snippet_words(piece)) for piece in kept]
