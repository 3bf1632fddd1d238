"""An index of a code folder: built once, brought up to date as files change, asked at its exits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from modular_star_encoder.data.source_files import check_languages
from modular_star_encoder.evaluation.bm25 import identifier_tokens
from modular_star_encoder.search.building import UpdateReport, update_store
from modular_star_encoder.search.cascade import Cascade, FittedMargin, fit_threshold
from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.fusion import reciprocal_rank_fusion
from modular_star_encoder.search.globs import glob_expression
from modular_star_encoder.search.hits import Answer, Hit
from modular_star_encoder.search.settings import DEFAULT_CHECKPOINT, INDEX_FOLDER, IndexSettings
from modular_star_encoder.search.snippets import Windows
from modular_star_encoder.search.vector_store import Filter, Found, VectorStore, open_store

Method = Literal["vector", "lexical", "fused"]

_FUSED_DEPTH = 100
_SECONDS_FOR_THE_LOCK = 3


class CodeIndex:
    """An index; `build` and `open` make one.

    Attributes:
        store: where its rows are.
        settings: what it was made with.
        report: what the last update in this process did, or None.
    """

    def __init__(self, store: VectorStore, settings: IndexSettings, embedder: Embedder | None = None) -> None:
        self.store, self.settings = store, settings
        self.report: UpdateReport | None = None
        self._embedder = embedder
        self._device: str | None = None

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike[str],
        location: str | os.PathLike[str] | VectorStore | None = None,
        *,
        checkpoint: str | os.PathLike[str] = DEFAULT_CHECKPOINT,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        dimension: int | None = None,
        languages: Sequence[str] | None = None,
        windows: Windows | None = None,
        states: bool = False,
        tests: bool = False,
        vendored: bool = False,
        rebuild: bool = False,
        device: str | None = None,
        processes: int = 2,
        progress: bool = True,
    ) -> Self:
        """Index a folder, or bring its index up to date: only files that changed are embedded.

        Killed or interrupted at any moment, the index holds whole files, and the next call goes on.

        Args:
            folder: what to index. Links are not followed; which files are read is told by
                `data.repositories.folder_repositories`.
            location: a folder for the index or a URI (see `open_store`), or a store; `.mose` in `folder` if None.
            checkpoint: folder or Hub repository.
            exit_layer: the exit to embed at; the deepest if no exit is named.
            exit_layers: several, from one pass over the code. Questions choose one of them.
            dimension: components to keep, where the model was trained for it; all if None.
            languages: languages to read; all eight if None.
            windows: how files without functions are divided.
            states: keep the states of the shallowest exit, so that re-ranking resumes from them; large.
            tests, vendored: also read test code, and copies of other projects.
            rebuild: begin anew if there is an index already.
            device: where the model goes.
            processes: processes that parse.
            progress: whether to show a bar.

        Raises:
            ValueError: there is no such folder, or the index was built with another checkpoint, exit, dimension,
                folder or other setting; the message says which.
            OSError: no such checkpoint, or the index can't be written.
            ImportError: the store's extra isn't installed.
        """
        if not os.path.isdir(os.path.expanduser(folder)):
            raise ValueError(f"{os.fspath(folder)!r} is no folder: name one with source code.")
        store = _store(os.path.join(os.path.expanduser(folder), INDEX_FOLDER) if location is None else location)
        embedder = Embedder(checkpoint, device)
        exits = embedder.config.resolve_exits(exit_layer, exit_layers)
        windows = windows or Windows()
        settings = IndexSettings(
            checkpoint=embedder.checkpoint,
            fingerprint=embedder.fingerprint,
            exit_layers=exits,
            dimension=embedder.check_dimension(dimension),
            prompts=embedder.prompts(),
            folder=_relative_if_inside(os.path.realpath(os.path.expanduser(folder)), store.location),
            languages=check_languages(languages),
            window_lines=windows.lines,
            window_overlap=windows.overlap,
            states=states,
            tests=tests,
            vendored=vendored,
        )
        with _locked(store):
            stored = None if rebuild else store.settings()
            if stored is None:
                store.create(settings.to_dict())
            else:
                IndexSettings.from_dict(stored, store.location).refuse_others(settings, store.location)
            index = cls(store, settings, embedder)
            index.report = update_store(store, settings, embedder, processes=processes, progress=progress)
        return index

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str] | VectorStore,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        device: str | None = None,
    ) -> Self:
        """Open an index to ask it.

        Args:
            location: as for `build`.
            checkpoint: where the checkpoint of the index is now, if not where it was.
            device: where the model goes.

        Raises:
            ValueError: there is no index, or it was built with another checkpoint than that.
            OSError: the checkpoint isn't there.
            ImportError: the store's extra isn't installed.
        """
        store = _store(location)
        stored = store.settings()
        if stored is None:
            raise ValueError(f"There is no index in {store.location}: `mose index FOLDER` makes one.")
        index = cls(store, IndexSettings.from_dict(stored, store.location))
        index._device = device
        if checkpoint is not None:
            index._embedder = index._checked(checkpoint)
        return index

    @property
    def folder(self) -> str:
        """The absolute path of the folder that is indexed."""
        return self.settings.root(self.store.location)

    @property
    def embedder(self) -> Embedder:
        """The checkpoint, opened when it is needed first.

        Raises:
            ValueError: it isn't the one that the index was built with any more.
            OSError: it isn't there.
        """
        if self._embedder is None:
            self._embedder = self._checked(self.settings.checkpoint)
        return self._embedder

    def update(self, *, processes: int = 2, progress: bool = True) -> UpdateReport:
        """Bring the index up to date with its folder; see `build`."""
        with _locked(self.store):
            self.report = update_store(
                self.store, self.settings, self.embedder, processes=processes, progress=progress
            )
        return self.report

    def search(
        self,
        questions: Sequence[str],
        *,
        top_k: int = 10,
        exit_layer: int | None = None,
        method: Method = "vector",
        cascade: Cascade | None = None,
        languages: Sequence[str] | None = None,
        path: str | None = None,
    ) -> list[Answer]:
        """Answer questions in prose, or find code that resembles code.

        Args:
            questions: one or more.
            top_k: hits of each.
            exit_layer: one of the index's exits; the deepest if None, and with a cascade the shallowest.
            method: `vector` compares embeddings; `lexical` words, by BM25; `fused` both, by reciprocal rank fusion.
            cascade: rank the best of `exit_layer` again by a deeper exit.
            languages: count only rows in these.
            path: count only files of this pattern, such as `*.py` or `src/**` (see `glob_expression`).

        Returns:
            One answer per question.

        Raises:
            ValueError: no question, a blank one, an exit that the index (or for a cascade, the model) doesn't have, or
                another checkpoint than the index was built with.
        """
        if isinstance(questions, str) or not questions or not all(question.strip() for question in questions):
            raise ValueError("questions must be a list of at least one question, none of them blank.")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}.")
        if method not in ("vector", "lexical", "fused"):
            raise ValueError(f"method must be vector, lexical or fused, not {method!r}.")
        where = Filter(
            () if languages is None else check_languages(languages), None if path is None else glob_expression(path)
        )
        if method == "lexical":
            return [self._answer(question, self._lexical(question, top_k, where), 0) for question in questions]
        exit_layer = self._first_exit(exit_layer, cascade)
        exits = sorted({exit_layer, cascade.exit_layer if cascade else exit_layer})
        embeddings = self.embedder.questions(questions, exits, self.settings.dimension)
        depth = max(top_k, _FUSED_DEPTH) if method == "fused" else top_k
        answers = []
        for row, question in enumerate(questions):
            vectors = {one: values[row] for one, values in embeddings.items()}
            found, margin, reranked = self._nearest(vectors, exit_layer, depth, where, cascade)
            if method == "fused":
                found = _fused([found, self._lexical(question, depth, where)])
            ranked_by = cascade.exit_layer if cascade and reranked else exit_layer
            answers.append(self._answer(question, found[:top_k], ranked_by, margin, reranked))
        return answers

    def fit_margin(
        self,
        cascade: Cascade,
        *,
        exit_layer: int | None = None,
        queries: int = 200,
        tolerance: float = 0.005,
        progress: bool = True,
    ) -> FittedMargin:
        """The margin below which the deep exit is worth running, for `Cascade.margin`.

        Descriptions of the index's own functions are the held-out questions: they aren't part of what is embedded, and
        the function that each describes is the right answer. Quality is the reciprocal rank among the candidates.

        Args:
            cascade: its exit and candidates; its margin doesn't count.
            exit_layer: as for `search`.
            queries: how many descriptions, chosen by their ids: the same in every run.
            tolerance: mean reciprocal rank that may be lost.
            progress: whether to show a bar.

        Raises:
            ValueError: the index has no described function, or as `search`.
        """
        from tqdm.auto import tqdm

        asked = self.store.sample(queries)
        if not asked:
            raise ValueError(f"The index {self.store.location} has no function with a description to fit a margin on.")
        exit_layer = self._first_exit(exit_layer, cascade)
        always = Cascade(cascade.exit_layer, cascade.candidates)
        texts = [one.snippet.description for one in asked]
        embeddings = self.embedder.questions(texts, [exit_layer, cascade.exit_layer], self.settings.dimension)
        margins, shallow, deep = [], [], []
        for row, one in enumerate(tqdm(asked, desc="fitting", unit="question", disable=not progress, leave=False)):
            vectors = {k: values[row] for k, values in embeddings.items()}
            first, margin, _ = self._nearest(vectors, exit_layer, always.candidates, Filter(), None)
            again, _, _ = self._nearest(vectors, exit_layer, always.candidates, Filter(), always)
            margins.append(margin or 0.0)
            shallow.append(_reciprocal_rank(first, one))
            deep.append(_reciprocal_rank(again, one))
        return fit_threshold(margins, shallow, deep, tolerance=tolerance)

    def _first_exit(self, exit_layer: int | None, cascade: Cascade | None) -> int:
        """The exit whose embeddings are compared first."""
        if cascade is not None and exit_layer is None:
            exit_layer = self.settings.exit_layers[0]
        exit_layer = self.settings.check_exit(exit_layer, self.store.location)
        if cascade is not None:
            self.embedder.config.check_exit(cascade.exit_layer)
            if cascade.exit_layer <= exit_layer:
                raise ValueError(f"Exit {cascade.exit_layer} can't re-rank exit {exit_layer}: it isn't deeper.")
        return exit_layer

    def _nearest(
        self, vectors: dict[int, np.ndarray], exit_layer: int, limit: int, where: Filter, cascade: Cascade | None
    ) -> tuple[list[Found], float | None, bool]:
        """Rows by similarity, the margin of the first exit, and whether the deep one ranked them."""
        if cascade is None:
            found = self.store.nearest(vectors[exit_layer], exit_layer, max(limit, 2), where)
            return found[:limit], _margin(found), False
        has_deep = cascade.exit_layer in self.settings.exit_layers
        # States are those of the shallowest exit, whichever exit was compared.
        has_states = self.settings.states and not has_deep
        extras = [f"vector_{cascade.exit_layer}"] if has_deep else ["states"] if has_states else []
        count = max(limit, cascade.candidates)
        found = self.store.nearest(vectors[exit_layer], exit_layer, count, where, extras)
        margin = _margin(found)
        if len(found) < 2 or (cascade.margin is not None and margin is not None and margin >= cascade.margin):
            return found[:limit], margin, False
        first, rest = found[: cascade.candidates], found[cascade.candidates :]
        if has_deep:
            documents = np.stack([one.vectors[cascade.exit_layer] for one in first])
        else:
            states_of = self.settings.exit_layers[0] if has_states else None
            documents = self.embedder.deeper(first, cascade.exit_layer, self.settings.dimension, states_of)
        scores = documents @ vectors[cascade.exit_layer]
        order = np.argsort(-scores, kind="stable")
        reranked = [_scored(first[place], float(scores[place])) for place in order]
        return (reranked + rest)[:limit], margin, True

    def _lexical(self, question: str, limit: int, where: Filter) -> list[Found]:
        # A word counts once, however often it is repeated: as in `evaluation.bm25`.
        return self.store.lexical(sorted(set(identifier_tokens(question))), limit, where)

    def _answer(
        self, question: str, found: Sequence[Found], exit_layer: int, margin: float | None = None, deep: bool = False
    ) -> Answer:
        root = _shown_folder(self.folder)
        hits = [
            Hit(
                path=os.path.join(root, one.snippet.path),
                line=one.snippet.first_line,
                name=one.snippet.name,
                score=one.score,
                exit_layer=exit_layer,
                last_line=one.snippet.last_line,
                language=one.snippet.language,
                text=one.snippet.text,
            )
            for one in found
        ]
        return Answer(question, hits, margin, deep)

    def _checked(self, checkpoint: str | os.PathLike[str]) -> Embedder:
        embedder = Embedder(checkpoint, self._device)
        self.settings.refuse_checkpoint(embedder.checkpoint, embedder.fingerprint, self.store.location)
        if dict(self.settings.prompts) != embedder.prompts():
            raise ValueError(
                f"The index {self.store.location} was built with other prompts than this version uses: build it anew "
                "(--rebuild)."
            )
        return embedder


def find_index(folder: str | os.PathLike[str] = ".") -> str:
    """The index of a folder, or of the nearest one above it that has an index.

    Raises:
        ValueError: none has.
    """
    start = Path(folder).expanduser().absolute()
    for place in (start, *start.parents):
        if (place / INDEX_FOLDER).is_dir():
            return str(place / INDEX_FOLDER)
    raise ValueError(f"Neither {start} nor a folder above it has an index: `mose index FOLDER` makes one.")


@contextmanager
def _locked(store: VectorStore) -> Iterator[None]:
    """One writer at a time, of an index on this machine; the lock goes with the process that holds it."""
    folder = getattr(store, "folder", None)
    if folder is None:
        yield
        return
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    # Processes that parsed for a killed one hold its lock for a moment longer.
    lock = FileLock(folder / ".lock", timeout=_SECONDS_FOR_THE_LOCK)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"The index {store.location} is being written by another process: wait for it.") from error
    try:
        yield
    finally:
        lock.release()


def _store(location: Any) -> VectorStore:
    return open_store(location) if isinstance(location, str | os.PathLike) else location


def _relative_if_inside(folder: str, location: str) -> str:
    """`folder` as an index inside it finds it, so that both may move together; else its absolute path."""
    if "://" in location or location.startswith("qdrant:"):
        return folder
    index = os.path.realpath(os.path.expanduser(location))
    return os.path.relpath(folder, index) if os.path.commonpath([folder, index]) == folder else folder


def _shown_folder(folder: str) -> str:
    """The path that leads to a folder from here: relative below the working folder, else absolute."""
    relative = os.path.relpath(folder)
    if relative == ".":
        return ""
    return folder if relative.startswith("..") else relative


def _margin(found: Sequence[Found]) -> float | None:
    return found[0].score - found[1].score if len(found) > 1 else None


def _scored(found: Found, score: float) -> Found:
    return Found(found.row_id, found.text_hash, found.snippet, score)


def _fused(rankings: Sequence[Sequence[Found]]) -> list[Found]:
    known = {one.row_id: one for ranking in rankings for one in ranking}
    scores = reciprocal_rank_fusion([[one.row_id for one in ranking] for ranking in rankings])
    return [_scored(known[row], score) for row, score in scores.items()]


def _reciprocal_rank(found: Sequence[Found], wanted: Found) -> float:
    """Of the wanted row, or of one with the same code."""
    for rank, one in enumerate(found, start=1):
        if one.text_hash == wanted.text_hash:
            return 1 / rank
    return 0.0
