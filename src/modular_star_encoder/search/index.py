"""An index of a code folder: build the index, update it when files change, search it at any of its exits."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np

from modular_star_encoder.data.languages.registry import SEARCH_LANGUAGES, check_languages
from modular_star_encoder.data.sources.ignore_files import beginning
from modular_star_encoder.data.sources.repositories import is_source_file
from modular_star_encoder.inference import is_repository, shipped_models
from modular_star_encoder.search.building import SEARCH_FILTERS, UpdateReport, search_files, update_store
from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.hits import Answer, Hit
from modular_star_encoder.search.local_store import LocalStore
from modular_star_encoder.search.pieces import best_line
from modular_star_encoder.search.ranking import Cascade, Method, Ranker, by_words
from modular_star_encoder.search.vector_store import (
    DEFAULT_CHECKPOINT,
    INDEX_FOLDER,
    MEMORY,
    QDRANT,
    REBUILD,
    Filter,
    Found,
    IndexSettings,
    VectorStore,
    content_hash,
    file_id,
    path_expression,
    readable_path,
)
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import cache_folder, user_path

_SECONDS_FOR_THE_FIRST_BUILD = 600
SECONDS_TO_REFRESH = 2.0
_SECONDS_FOR_THE_FIRST_ANSWER = 3.0  # to read files, of a folder of over 1,000 source files
LONGEST_QUESTION = 2000  # largest number of characters of a question on the demo page or to a tool of `mose mcp`
_MOST_PIECES = 1_000_000  # largest number of pieces of a file that `related` reads to find the code at a line


class CodeIndex:
    """An index of the functions, classes and other lines of a code folder, to find the code that answers a question.

    `build` makes or updates an index, and `open` opens one. Threads may share an index; their calls run in turn.
    Only one process at a time writes an index in a folder. While another process writes, `build` and `update` wait 3 s
    and then raise UserError, `refresh` does nothing, and `open_for_search` waits up to ten minutes for a first build.
    Searches do not wait. During an update, a search of a local index finds either the old or the new code of each file.
    On a Qdrant server, a search may find the old and the new code of one file together.

    Attributes:
        store: holds the code and its embeddings: a `LocalStore` (folder or memory) or a `QdrantStore`.
        settings: checkpoint, exits, folder and the other settings of the build.
        report: result of the last update in this process.

    Example:
        >>> index = CodeIndex.build("requests")
        >>> (answer,) = index.search(["parse header links"], top_k=3)
        >>> print(answer.hits[0])
        requests/utils.py:915  3.210  parse_header_links  (exit 0)
    """

    def __init__(self, store: VectorStore, settings: IndexSettings, embedder: Embedder | None = None) -> None:
        self.store, self.settings = store, settings
        self.report = UpdateReport()
        self._embedder = embedder
        self._device: str | None = None
        self._lock = threading.RLock()

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike[str],
        location: str | os.PathLike[str] | VectorStore | None = None,
        *,
        checkpoint: str | os.PathLike[str] | Embedder = DEFAULT_CHECKPOINT,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        dimension: int | None = None,
        languages: Sequence[str] | None = None,
        tests: bool = True,
        vendored: bool = False,
        rebuild: bool = False,
        device: str | None = None,
        processes: int = 2,
        progress: bool = True,
        seconds: float | None = None,
        questions: Sequence[str] = (),
    ) -> Self:
        """Build the index of a folder, or update an existing index by embedding only new and changed files.

        Without `location`, the index is `.mose` in the folder, as with `mose index`; the location `memory://` keeps the
        index in memory.
        After an interruption, the index has each file completely or not at all, and the next call continues.

        Args:
            folder: a folder of source code; `data.sources.repositories.folder_repositories` describes which files are
                read. Links are not followed.
            location: a folder for the index or a URI (see `open_store`), or a store; `.mose` in `folder` if None.
            checkpoint: folder or Hub repository, or its `Embedder`; by default mose-code, the model in this package.
            exit_layer: the exit to embed at; by default exit 0 if the checkpoint has it, else the deepest.
            exit_layers: several exits to embed at in one pass, instead of `exit_layer`; `search` then uses one of them.
            dimension: size of the embeddings to keep, one of the sizes that the model supports; the largest if None.
            languages: languages to read; all but `markdown` if None.
            tests: whether to read test code.
            vendored: whether to read copied libraries and generated code.
            rebuild: whether to replace an existing index. Data of other programs is never replaced.
            device: torch device of the model; if None, a GPU if there is one.
            processes: number of processes that parse files.
            progress: whether to show a progress bar.
            seconds: stop reading files after about this time, if over 1,000 files are new; None for no limit.
            questions: with `seconds`, the files that share words with these questions are read first.

        Returns the index; its `report` has the numbers of embedded files and rows. Raises UserError if an argument is
        invalid, or the index was built with other settings (the message names them); OSError if the checkpoint does
        not exist, or the index cannot be written.
        """
        _check_number("processes", processes, 0)
        folder = os.path.expanduser(folder)
        if not os.path.isdir(folder):
            raise UserError("search.folder.missing", f"{folder!r} is not a folder. Name a folder with source code.")
        store = open_store(os.path.join(folder, INDEX_FOLDER) if location is None else location)
        embedder = checkpoint if isinstance(checkpoint, Embedder) else Embedder(checkpoint, device)
        settings = IndexSettings(
            checkpoint=embedder.checkpoint,
            checksum=embedder.checksum,
            exit_layers=embedder.exits(exit_layer, exit_layers),
            dimension=embedder.check_dimension(dimension),
            prompts=embedder.prompts(),
            folder=os.path.realpath(folder),
            languages=check_languages(languages, SEARCH_LANGUAGES),
            tests=tests,
            vendored=vendored,
        )
        with store.locked():
            own = None if rebuild else IndexSettings.stored_in(store)
            if own is None:
                embedder.encoder(settings.exit_layers)  # fails on unreadable weights before `create` deletes an index
                store.create(settings.to_dict(store.location))
            else:
                own.refuse_others(settings, store.location)
            index = cls(store, own or settings, embedder)
            index._update(processes=processes, progress=progress, seconds=seconds, questions=questions)
        return index

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str] | VectorStore,
        *,
        checkpoint: str | os.PathLike[str] | Embedder | None = None,
        device: str | None = None,
    ) -> Self:
        """Open an index to search it; `location` is its folder, its URI (see `open_store`) or its store.

        If the checkpoint has moved since the build, `checkpoint` is its new folder or Hub repository. `device` is the
        torch device of the model; if None, a GPU if there is one. Raises UserError if there is no index at `location`,
        or if it was built with another checkpoint; OSError if the checkpoint does not exist.
        """
        store = open_store(location)
        if (settings := IndexSettings.stored_in(store)) is None:
            message = f"There is no index in {store.location}. Make one with `mose index FOLDER`."
            raise UserError("search.index.missing", message)
        index = cls(store, settings)
        index._device = device
        if checkpoint is not None:
            index._embedder = index._checked(checkpoint)
        return index

    @property
    def folder(self) -> str:
        """The absolute path of the indexed folder."""
        return self.settings.folder

    @property
    def embedder(self) -> Embedder:
        """The `Embedder` of the checkpoint that the index was built with; UserError if this checkpoint has changed.

        The checkpoint must be on this machine, so that a stranger's index can't make a search download a model.
        """
        if self._embedder is None:
            name, commit = self.settings.checkpoint, None
            if name not in shipped_models() and os.path.realpath(name) != name:
                from huggingface_hub import try_to_load_from_cache

                commit = self.settings.checksum
                config = try_to_load_from_cache(name, "config.json", revision=commit) if is_repository(name) else None
                if not isinstance(config, str):
                    message = f"The index {self.store.location} needs version {commit} of the model {name}, which is"
                    advice = f"not on this machine. If you trust this model, run `mose search` with --model {name}."
                    raise UserError("search.index.model", f"{message} {advice}")
                name = os.path.dirname(config)
            self._embedder = self._checked(name, commit)
        return self._embedder

    def update(self, *, processes: int = 2, progress: bool = True) -> UpdateReport:
        """Embed new and changed files, and remove deleted files from the index.

        Raises UserError if the index was rebuilt since it was opened, its checkpoint has changed, the code folder does
        not exist, or another process writes the index for more than 3 s; OSError if the index cannot be written.
        """
        _check_number("processes", processes, 0)
        with self._lock, self.store.locked():
            return self._update(processes=processes, progress=progress)

    def refresh(self, seconds: float | None = SECONDS_TO_REFRESH, questions: Sequence[str] = ()) -> UpdateReport:
        """Update the index before a search. Stop reading files after about `seconds`; None for no limit.

        If over 1,000 files are new, files with words of `questions` are read first. The report's `postponed_files`
        is the number of files that were not read in time. The index is not updated if it is in memory, on a server or
        read-only, if another process writes it, or if the code folder does not exist. For errors see `update`.
        """
        folder = self.store.folder
        if folder is None or not os.access(folder, os.W_OK) or not os.path.isdir(self.folder):
            return self.report
        try:
            with self._lock, self.store.locked(0):
                return self._update(progress=False, seconds=seconds, questions=questions)
        except UserError as error:
            if error.key != "files.locked":
                raise
            self.report.is_unfinished = not self.store.stamps()  # stored at the end of a build
        return self.report

    def _update(self, **options: Any) -> UpdateReport:
        self._check_unchanged()
        self.report = update_store(self.store, self.settings, self.embedder, **options)
        return self.report

    def search(
        self,
        questions: Sequence[str],
        *,
        top_k: int = 10,
        exit_layer: int | None = None,
        method: Method = "hybrid",
        cascade: Cascade | None = None,
        languages: Sequence[str] | None = None,
        path: str | None = None,
    ) -> list[Answer]:
        """Find the code that answers each question: a text in prose, a name, or code to which similar code is wanted.

        Args:
            questions: one or more questions.
            top_k: number of hits for each question.
            exit_layer: one of the index's exits; by default the deepest or, with a cascade, the shallowest.
            method: `hybrid` ranks by similarity, words and the rules of `search.ranking`; `lexical` leaves out
                similarity and needs no model; `vector` ranks by similarity alone.
            cascade: settings for ranking the best hits again at a deeper exit; None to rank once.
            languages: search only code in these languages.
            path: search only files that match this pattern, such as `*.py` or `src/**` (see `path_expression`).

        Returns one answer per question. Raises UserError if an argument is invalid, the index lacks `exit_layer`, the
        model lacks the cascade's exit, the checkpoint has changed, or the index was rebuilt after it was opened.
        """
        where = check_search(questions, top_k, method, languages, path)
        with self._lock, self.store.snapshot():
            self._check_unchanged()
            if method == "lexical":
                results = [by_words(self.store, question, top_k, where) for question in questions]
            else:
                ranker = self._ranker(exit_layer, cascade)
                embedded = zip(questions, ranker.embed(questions), strict=True)
                if method == "vector":
                    results = [ranker.by_similarity(vectors, top_k, where) for _, vectors in embedded]
                else:
                    results = [ranker.by_rules(question, vectors, top_k, where) for question, vectors in embedded]
            return [
                Answer(question, self._hits(one.found, question), one.margin, one.reranked, method)
                for question, one in zip(questions, results, strict=True)
            ]

    def related(self, path: str, line: int, *, top_k: int = 10, exit_layer: int | None = None) -> list[Hit]:
        """Find the `top_k` pieces of code, such as functions, that most resemble the piece at a line of a file.

        Args:
            path: path of an indexed file, relative to the indexed folder, with forward slashes.
            line: 1-based line number.
            top_k: number of hits.
            exit_layer: one of the index's exits; the deepest if None.

        Raises UserError if an argument is invalid, or the index has no code at `line` or lacks the exit.
        """
        _check_number("line", line, 1)
        _check_number("top_k", top_k, 1)
        zeros = np.zeros(self.settings.dimension, dtype=np.float32)
        with self._lock, self.store.snapshot():
            self._check_unchanged()
            exit_layer = self.settings.check_exit(exit_layer, self.store.location)
            pieces = self.store.nearest(zeros, exit_layer, _MOST_PIECES, Filter(file=file_id(path)))
            if not pieces:  # the path of a hit, which shows bytes that are not UTF-8 as `\x..`
                shown = re.compile(re.escape(readable_path(path).encode()) + rb"\Z")
                pieces = self.store.nearest(zeros, exit_layer, _MOST_PIECES, Filter(path=shown))
            here = [one for one in pieces if one.snippet.first_line <= line <= one.snippet.last_line]
            if not here:
                message = f"The index has no code at line {line} of {path!r}. Name a line of code in an indexed file."
                raise UserError("search.related.missing", message + self.report.gap())
            found = self.store.nearest(self.store.vectors(here[:1], exit_layer)[0], exit_layer, top_k + 1, Filter())
            others = [replace(one, exit_layer=exit_layer) for one in found if one.row_id != here[0].row_id]
            return self._hits(others[:top_k])

    def check_filter(self, languages: Sequence[str] | None, path: str | None) -> None:
        """Raise UserError if the index has code, but no file in `languages` whose path matches the pattern `path`."""
        where = Filter(check_languages(languages, ()), None if path is None else path_expression(path))
        zeros, exit_layer = np.zeros(self.settings.dimension, dtype=np.float32), self.settings.exit_layers[0]
        with self._lock, self.store.snapshot():
            fitting, every = (self.store.nearest(zeros, exit_layer, 1, one) for one in (where, Filter()))
            if every and not fitting:
                named = [f"the languages {', '.join(where.languages)}"] * bool(languages)
                named += [f"the path pattern {path!r}"] * (path is not None)
                example = f"{every[0].path} ({every[0].snippet.language})"
                message = f"No indexed file fits {' and '.join(named)}. The index has files such as {example}."
                raise UserError("search.filter", message + self.report.gap())

    def refuse_empty(self) -> None:
        """Raise UserError if the index has no code. The message names a file in another language, if there is one."""
        if self.store.count():
            return
        if self.report.is_unfinished:
            message = f"The index {self.store.location} has no code yet.{self.report.gap()} Search again later."
            raise UserError("search.index.unfinished", message)
        if self.report.postponed_files:
            message = f"No file of {self.folder} was read in time. Run `mose index {self.folder}` to read all files."
            raise UserError("search.folder.unread", message)
        kind, advice = "source", "Name another folder"
        if missing := {*SEARCH_LANGUAGES} - {*self.settings.languages}:
            kind = " or ".join(self.settings.languages)
            if other := next(iter(search_files(self.folder, missing)), None):
                advice = f"It has other code, such as {other.path} ({other.language})"
        raise UserError("search.folder.empty", f"{self.folder} holds no {kind} code. {advice}.")

    def read_file(self, path: str) -> str:
        """Return the current text of an indexed file; `path` is relative to the indexed folder, with forward slashes.

        Raises UserError if the file is not in the index, is now a link or unreadable, or must not be shown, as `.env`.
        """
        file = file_inside(self.folder, path)
        with self._lock:
            held = self.store.files()
        key, fault = "missing", "is not a file of the index. Name a file by its path in the indexed folder"
        # The index may be a stranger's, and name files that its reader would not read.
        if file is not None and file_id(path) in held and is_source_file(self.folder, file, self.settings.languages):
            # A link or a pipe may have replaced the file after the check.
            content = beginning(file, SEARCH_FILTERS.max_bytes + 1, links=False)
            unreadable = "", "not a regular file that can be read"
            text, reason = unreadable if content is None else SEARCH_FILTERS.decode(content)
            if not reason:
                return text
            key, fault = "left_out", f"can't be shown: {reason}"
        raise UserError(f"search.file.{key}", f"{path!r} {fault}.")

    def _ranker(self, exit_layer: int | None, cascade: Cascade | None) -> Ranker:
        if cascade is not None and exit_layer is None:
            exit_layer = self.settings.exit_layers[0]
        exit_layer = self.settings.check_exit(exit_layer, self.store.location)
        if cascade is not None:
            self.embedder.check_exit(cascade.exit_layer)
            if cascade.exit_layer <= exit_layer:
                message = f"Exit {cascade.exit_layer} cannot re-rank hits of exit {exit_layer}. Choose a deeper exit."
                raise UserError("search.cascade.exit_layer", message)
        return Ranker(self.store, self.settings, self.embedder, exit_layer, cascade)

    def _hits(self, found: Sequence[Found], question: str = "") -> list[Hit]:
        relative, hits = os.path.relpath(self.folder), []
        root = readable_path(self.folder if relative.startswith("..") else relative)
        for row in found:
            piece, path = row.snippet, os.path.normpath(os.path.join(root, row.path))
            text = "\n".join(piece.text.split("\n")[piece.line - piece.first_line :])
            hit = Hit(path, piece.line, piece.name, row.score, row.exit_layer, piece.last_line, piece.language, text)
            hits.append(replace(hit, reasons=row.reasons, best_line=best_line(piece, question)))
        return hits

    def _check_unchanged(self) -> None:
        """Raise UserError if the settings of the index, such as its checkpoint, have changed since it was opened."""
        if (stored := IndexSettings.stored_in(self.store)) != self.settings:
            changed = f"The index {self.store.location} was {'rebuilt' if stored else 'removed'}"
            raise UserError("search.index.rebuilt", f"{changed}: open it again.")

    def _checked(self, checkpoint: str | os.PathLike[str] | Embedder, checksum: str | None = None) -> Embedder:
        """Return the `Embedder` of a checkpoint; UserError if the index was built with other weights or prompts."""
        embedder = checkpoint if isinstance(checkpoint, Embedder) else Embedder(checkpoint, self._device)
        self.settings.refuse_checkpoint(embedder.checkpoint, checksum or embedder.checksum, self.store.location)
        for exit_layer in self.settings.exit_layers:  # damaged settings may name exits that do not exist
            embedder.check_exit(exit_layer)
        if dict(self.settings.prompts) != embedder.prompts():
            message = f"The index {self.store.location} has other prompts than its checkpoint. Rebuild it: {REBUILD}."
            raise UserError("search.index.prompts", message)
        return embedder


def file_inside(folder: str, path: str) -> Path | None:
    """Return the path of a regular file in `folder`; None if there is no such file or if a link leads to the file."""
    root = os.path.realpath(folder)
    try:
        file = Path(os.path.normpath(os.path.join(root, path)))
        is_plain = file.is_relative_to(root) and file.is_file() and os.path.realpath(file) == str(file)
    except (OSError, ValueError):  # ValueError: a NUL, or half of a surrogate pair
        return None
    return file if is_plain else None


def _check_number(name: str, value: Any, lowest: int) -> None:
    if not isinstance(value, Integral) or value < lowest:
        raise UserError(f"search.{name}", f"`{name}` must be a whole number of at least {lowest}, not {value!r}.")


def check_search(
    questions: Sequence[str], top_k: int, method: str, languages: Sequence[str] | None, path: str | None
) -> Filter:
    """Return the filter for `languages` and `path`. Raise UserError if an argument of `CodeIndex.search` is invalid."""
    key = fault = ""
    _check_number("top_k", top_k, 1)
    if isinstance(questions, str) or not all(isinstance(one, str) and one.strip() for one in questions or [""]):
        key, fault = "questions", "`questions` must be a list of one or more texts that are not blank."
    elif broken := [one for one in questions if one.encode(errors="replace").decode() != one]:
        key, fault = "questions", f"The question {broken[0]!a} must be Unicode text, without lone surrogates."
    elif method not in get_args(Method):
        key, fault = "method", f"`method` must be hybrid, vector or lexical, not {method!r}."
    if fault:
        raise UserError(f"search.{key}", fault)
    return Filter(check_languages(languages, ()), None if path is None else path_expression(path))


def open_store(location: str | os.PathLike[str] | VectorStore) -> VectorStore:
    """Open the store of an index: a folder, `memory://`, or `qdrant:NAME@URL` for a collection on a server.

    If `location` is a store, it is returned. Put the key of a Qdrant server in the environment variable QDRANT_API_KEY.
    """
    if isinstance(location, str | os.PathLike):
        location = os.fspath(location)
        if location.startswith(QDRANT):
            from modular_star_encoder.search.qdrant_store import QdrantStore, connect

            return QdrantStore(*connect(location), location)
        if "://" not in location or location == MEMORY:
            return LocalStore(None if location == MEMORY else location)
    elif hasattr(location, "replace_files"):
        return location
    message = f"{location!r} can't hold an index. Name a folder, or a Qdrant collection as qdrant:NAME@URL."
    raise UserError("search.index.location", f"{message} In Python, you can also pass a store.")


def find_index(folder: str | os.PathLike[str] = ".") -> str | None:
    """Return the path of the index in `folder` or its nearest parent, or None; UserError if its code is elsewhere.

    An index in a parent counts only if it is of a folder that contains `folder`.
    """
    start = user_path(folder).absolute()
    for parent in (start, *start.parents):
        location = str(parent / INDEX_FOLDER)
        if os.path.isdir(location) and (of := _indexed_folder(location)):
            own = os.path.realpath(parent)
            if os.path.commonpath([of, own]) != own:
                message = f"The index {location} belongs to the folder {of}, which is not inside {own}"
                raise UserError("search.index.outside", f"{message}. If you trust this index, add --index {location}.")
            if parent == start or Path(os.path.realpath(start)).is_relative_to(of):
                return location
    return None


def open_for_search(
    folder: str | None = None,
    location: str | None = None,
    *,
    checkpoint: str | None = None,
    exit_layer: int | None = None,
    budget: Mapping[str, Any] | None = None,
    cascade: Cascade | None = None,
    languages: Sequence[str] | None = None,
    refresh: bool = True,
    seconds: float | None = SECONDS_TO_REFRESH,
    questions: Sequence[str] = (),
    progress: bool = True,
) -> tuple[CodeIndex, int | None]:
    """Return an index, updated if `refresh`, and the exit at which to search it (None: default of `CodeIndex.search`).

    The index is at `location`, else in `folder`, else in the working folder or a parent. If there is no index, or its
    checkpoint is not `checkpoint`, an index in the user's cache is opened or built; it has only code in `languages`.
    `budget` has limits, such as `latency_ms`, from which the exit is chosen (see `Embedder.exits`). For `seconds` and
    `questions` see `CodeIndex.refresh`; without either of them, an index is built without a time limit.
    """
    index, found = None, location
    if found is None:
        found = find_index() if folder is None else _own_index(folder)
    if found is not None:
        try:
            index = CodeIndex.open(found, checkpoint=checkpoint)
        except UserError as error:
            if location is not None or error.key != "search.index.other_model":
                raise
            folder = _indexed_folder(found)
    if index is not None:
        if budget:
            (exit_layer,) = index.embedder.exits(None, index.settings.exit_layers, budget)
    else:
        embedder = Embedder(checkpoint or DEFAULT_CHECKPOINT)
        if cascade is not None:
            embedder.check_exit(cascade.exit_layer)
            exit_layer = embedder.trained_exits[0] if exit_layer is None and not budget else exit_layer
        (exit_layer,) = embedder.exits(exit_layer, budget=budget)
        limit = _SECONDS_FOR_THE_FIRST_ANSWER if questions and seconds is not None else None
        building = {"seconds": limit, "questions": questions, "progress": progress}
        index = _cached_index(folder or ".", embedder, exit_layer, languages, **building)
    if refresh and not index.report.files:
        index.refresh(seconds, questions)
    return index, exit_layer


def _own_index(folder: str) -> str | None:
    """Return the path of the index in a folder; None if the folder has no index, or has the index of another folder."""
    location = os.path.join(os.path.expanduser(folder), INDEX_FOLDER)
    is_own = os.path.isdir(location) and _indexed_folder(location) == os.path.realpath(os.path.expanduser(folder))
    return location if is_own else None


def _indexed_folder(location: str) -> str | None:
    settings = IndexSettings.stored_in(open_store(location))
    return None if settings is None else os.path.realpath(settings.folder)


def _cached_index(
    folder: str, embedder: Embedder, exit_layer: int, languages: Sequence[str] | None, **building: Any
) -> CodeIndex:
    """Open the index of `folder` in the user's cache; build it if it is missing, unfinished or of an older version."""
    location = _cached_location(folder, embedder.checkpoint, exit_layer, languages)
    rebuild = False
    try:
        index = CodeIndex.open(location, checkpoint=embedder)
        if index.store.stamps():  # stored at the end of a build
            return index
    except UserError as error:
        rebuild = error.key != "search.index.missing"
    if location == MEMORY:  # no later search would read on
        building["seconds"] = None
    building |= {"checkpoint": embedder, "exit_layer": exit_layer, "languages": languages, "rebuild": rebuild}
    with open_store(location).locked(_SECONDS_FOR_THE_FIRST_BUILD):  # another process may be building it
        return CodeIndex.build(folder, location, **building)


def folder_of(file: str | os.PathLike[str]) -> str:
    """Return the folder to search for code similar to `file`: its nearest parent folder with `.git` or a cached index.

    Without such a folder, return the working folder if `file` is inside it, else the folder of `file`.
    """
    above, here = Path(os.path.realpath(file)).parents, Path(os.path.realpath("."))
    for folder in above:
        if (folder / ".git").exists() or os.path.isdir(_cached_location(str(folder), DEFAULT_CHECKPOINT, 0, None)):
            return str(folder)
    return str(here if here in above else above[0])


def _cached_location(folder: str, *options: Any) -> str:
    """Return where in the user's cache the index of `folder` is stored; `memory://` if the cache can't be written."""
    if (cache := cache_folder("search", create=True)) is None:
        return MEMORY
    key = "\n".join(map(str, [os.path.realpath(os.path.expanduser(folder)), *options]))
    return str(cache / content_hash(key)[:16])
