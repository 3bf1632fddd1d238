"""Score documents for queries: the interface of retrievers, cosine similarities in blocks, and a cache of embeddings.

A retriever's *variants* are the exits of a model and, at each exit, the sizes to which embeddings can be truncated. The
cosine similarity of two unit vectors is the float64 sum of the products of their components, added in a fixed order
(numpy's pairwise sum) and rounded to float32. A matrix product is faster, but sums in varying order. So a score from a
matrix product is kept only if rounding errors cannot change the float32 number, else summed again in the fixed order.
Equal vectors therefore always have equal scores.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.inference.encoders import Encoder, Prompted, Text
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_file

BLOCK = 1 << 22  # scores per block: 32 MiB in float64
HELD = 1 << 25  # largest number of components of document vectors in memory at once: 256 MiB in float64
_PAIRS = 4096  # pairs of vectors in memory at once
_NOTHING = 2.0**-24  # smaller similarities become 0, because float32 steps there are finer than errors of float64 sums


class ExitVariant(NamedTuple):
    """An exit (None if the retriever has no exits) and an embedding size (None if embeddings are not truncated)."""

    exit_layer: int | None = None
    dimensions: int | None = None


class Block(NamedTuple):
    """Scores (R, C) float32 of R queries, the first with number `row`, for C documents, the first with `column`."""

    row: int
    column: int
    scores: np.ndarray


class Scores(Protocol):
    """The scores (Q, D) of Q queries and D documents, computed in blocks because they may not fit into memory."""

    shape: tuple[int, int]

    def blocks(self) -> Iterator[Block]:
        """Yield blocks of scores in any order; the blocks together hold each (query, document) pair exactly once."""

    def of_pairs(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return the scores (P,) float32 of P pairs; pair i is query `queries[i]` and document `documents[i]`."""


class RowScores:
    """`Scores` that a function computes: `rows(start, end)` returns the scores of the queries start, …, end - 1."""

    def __init__(self, shape: tuple[int, int], rows: Callable[[int, int], np.ndarray]) -> None:
        self.shape, self._rows = shape, rows

    def blocks(self) -> Iterator[Block]:
        step = max(1, BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield Block(start, 0, self._rows(start, min(start + step, self.shape[0])).astype(np.float32, copy=False))

    def of_pairs(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        scores = np.empty(len(queries), dtype=np.float32)
        for block in self.blocks():
            inside = np.flatnonzero((queries >= block.row) & (queries < block.row + len(block.scores)))
            scores[inside] = block.scores[queries[inside] - block.row, documents[inside]]
        return scores


class Retriever(Protocol):
    """The interface of classes that score documents for queries, such as `BM25`."""

    name: str  # name in tables
    checksum: str  # changes whenever a score may change; part of the key of stored results
    variants: tuple[ExitVariant, ...] = (ExitVariant(),)  # the available exits and embedding sizes

    def prepare(self, texts: Sequence[Text], variants: Sequence[ExitVariant], *, progress: bool = True) -> None:
        """Prepare all texts for later calls of `scores`, for example by embedding them; by default, do nothing."""
        return None

    def scores(self, queries: Sequence[Text], documents: Sequence[Text], variant: ExitVariant) -> Scores:
        """Return the scores (Q, D) of a variant, such as one exit; call `prepare` with all texts first."""


class EmbeddingRetriever(Retriever):
    """Scores documents by the cosine similarity of embeddings; `cache` stores the embeddings (in memory by default)."""

    chunk = 4096  # texts per shard of the cache; an interruption loses at most one shard

    def __init__(self, encoder: Encoder, cache: EmbeddingCache | None = None) -> None:
        self.encoder, self.cache = encoder, EmbeddingCache() if cache is None else cache
        self.name, self.checksum = encoder.name, encoder.checksum
        self.variants = tuple(ExitVariant(k, size) for k in encoder.exit_layers for size in encoder.dimensions)

    def prepare(self, texts: Sequence[Text], variants: Sequence[ExitVariant], *, progress: bool = True) -> None:
        """Embed the texts that the cache lacks at the exits of `variants`; store the embeddings in the cache."""
        prompted = [(self.encoder.prompt(text), text.text) for text in dict.fromkeys(texts)]
        self.embed(prompted, [variant.exit_layer for variant in variants], progress=progress)

    def embed(self, texts: Iterable[Prompted], exit_layers: Iterable[int | None], *, progress: bool = True) -> None:
        """Embed the (prompt, text) pairs that the cache lacks at any of `exit_layers`; one pass computes all exits."""
        texts = list(dict.fromkeys(texts))
        absent = {k: missing for k in exit_layers if (missing := self.cache.missing(self.space(k), texts))}
        # A text that one exit lacks is embedded for all these exits: the pass to the deepest computes the others too.
        wanted = sorted(set().union(*absent.values()), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        starts = range(0, len(wanted), self.chunk)
        what = f"embedding {len(wanted):,} texts, {self.name}"
        for start in tqdm(starts, desc=what, unit="shard", disable=not progress, leave=False):
            chunk = wanted[start : start + self.chunk]
            embeddings = self.encoder.encode(chunk, tuple(absent), progress=progress)
            for exit_layer in absent:
                self.cache.add(self.space(exit_layer), chunk, embeddings[exit_layer], self.name)

    def rows(self, texts: Sequence[Prompted], exit_layer: int | None) -> CachedRows:
        """Return the cached embeddings (N, size) of N (prompt, text) pairs at one exit; call `embed` before."""
        return self.cache.rows(self.space(exit_layer), texts)

    def scores(self, queries: Sequence[Text], documents: Sequence[Text], variant: ExitVariant) -> CosineScores:
        asked, answers = ([(self.encoder.prompt(one), one.text) for one in texts] for texts in (queries, documents))
        rows = self.rows(asked, variant.exit_layer), self.rows(answers, variant.exit_layer)
        return CosineScores(*rows, dimensions=variant.dimensions)

    def space(self, exit_layer: int | None) -> str:
        """Return the name under which the cache keeps this model's embeddings at this exit (None: the full model)."""
        return f"{self.checksum}/{'full' if exit_layer is None else f'exit-{exit_layer}'}"


class CosineScores:
    """`Scores` (Q, D) that are cosine similarities of embeddings; these embeddings may be larger than memory."""

    def __init__(
        self, queries: np.ndarray | CachedRows, documents: np.ndarray | CachedRows, dimensions: int | None = None
    ) -> None:
        self.queries, self.documents, self.dimensions = queries, documents, dimensions
        self.shape = (len(queries), len(documents))

    def blocks(self) -> Iterator[Block]:
        """Yield blocks of scores, one slice of documents after another, so that each document is read only once."""
        height, width = self.shape
        size = self.documents[:1].shape[1]
        columns = width if width * size <= HELD else max(1, HELD // (4 * size))
        rows = max(1, BLOCK // max(1, columns))
        for column in range(0, width, columns):
            documents = self._unit(self.documents[column : column + columns])
            for row in range(0, height, rows):
                yield Block(row, column, similarities(self._unit(self.queries[row : row + rows]), documents))

    def of_pairs(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        scores = np.empty(len(queries), dtype=np.float32)
        for start in range(0, len(queries), _PAIRS):
            part = slice(start, start + _PAIRS)
            units = self._unit(self.queries[queries[part]]), self._unit(self.documents[documents[part]])
            scores[part] = _rounded((units[0] * units[1]).sum(axis=1))
        return scores

    def _unit(self, embeddings: np.ndarray) -> np.ndarray:
        """Cut vectors to `dimensions`; scale them to length 1 in float64. Zero vectors stay 0, infinity becomes NaN."""
        embeddings = embeddings[:, : self.dimensions].astype(np.float64)
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            embeddings /= np.where(norms == 0, 1, norms)
        return embeddings


def similarities(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return the cosine similarities (Q, D) of Q and D unit vectors, the same numbers as `CosineScores.of_pairs`."""
    products = queries @ documents.T
    # Twice the largest error of a sum of F products of unit vectors, added in any order (Higham 2002, section 3.1).
    error = queries.shape[1] * 2.0**-52
    products -= error
    scores = _rounded(products)
    products += 2 * error
    unsure = np.flatnonzero(scores != _rounded(products))
    rows, columns = np.divmod(unsure, products.shape[1])
    for start in range(0, len(unsure), _PAIRS):
        part = slice(start, start + _PAIRS)
        scores[rows[part], columns[part]] = _rounded((queries[rows[part]] * documents[columns[part]]).sum(axis=1))
    return scores


def _rounded(similarities: np.ndarray) -> np.ndarray:
    rounded = similarities.astype(np.float32)
    rounded[np.abs(rounded) < _NOTHING] = 0
    return rounded


class EmbeddingCache:
    """Stores embeddings by model, exit, prompt and text, so that each text is embedded only once.

    The embeddings of one model at one exit are a *space*: a folder inside `folder`, with memory-mapped `.npy` files
    called *shards*. Each row of a shard has a hash of prompt and text, and the embedding. If `folder` is None, shards
    are kept in memory. Shards are written atomically and never change, so several processes may use them at once. A
    damaged shard is deleted, and its texts are embedded again.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, dtype: str = "float32") -> None:
        self.folder, self._dtype = None if folder is None else Path(folder), dtype
        self._spaces: dict[str, _Space] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself; embeddings in memory are sent to it.
        return vars(self) if self.folder is None else vars(self) | {"_spaces": {}}

    def missing(self, space: str, texts: Sequence[Prompted]) -> list[Prompted]:
        """Return, in order, the (prompt, text) pairs without an embedding in `space` (the name of a model and exit)."""
        places = self._space(space).places(texts)
        return [text for text, place in zip(texts, places, strict=True) if place < 0]

    def add(self, space: str, texts: Sequence[Prompted], embeddings: np.ndarray, model: str = "The model") -> None:
        """Store embeddings (N, size) of N (prompt, text) pairs in `space`; `model` is the name in error messages."""
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite
            embeddings = np.ascontiguousarray(embeddings, dtype=self._dtype)
        shards = self._space(space).shards
        size = shards[0].shape[1] if shards else embeddings.shape[-1]
        if embeddings.shape != (len(texts), size):
            message = f"{len(texts)} texts need embeddings of shape ({len(texts)}, {size}), not {embeddings.shape}."
            raise UserError("evaluation.embeddings.shape", message)
        if not np.isfinite(embeddings).all():
            message = f"{model} computed an embedding with NaN or infinity: check its weights, or run it in float32."
            raise UserError("evaluation.embeddings.not_finite", message)
        shard = np.empty(len(texts), dtype=[("key", "V32"), ("embedding", self._dtype, (size,))])
        shard["key"], shard["embedding"] = [np.void(_key(text)) for text in texts], embeddings
        if self.folder is not None:
            path = self.folder / space / f"{hashlib.sha256(shard['key'].tobytes()).hexdigest()[:32]}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            with staged_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, shard, allow_pickle=False)
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
        self._space(space).append(shard)

    def rows(self, space: str, texts: Sequence[Prompted]) -> CachedRows:
        """Return the embeddings (N, size) in `space` of N (prompt, text) pairs; KeyError if an embedding is missing."""
        found = self._space(space)
        places = found.places(texts)
        if len(missing := np.flatnonzero(places < 0)):
            raise KeyError(f"The cache has no embedding of {texts[missing[0]][1][:40]!r}: embed this text first.")
        starts = np.cumsum([0, *map(len, found.shards)])
        shard = np.searchsorted(starts, places, side="right") - 1
        return CachedRows(found.shards, np.stack([shard, places - starts[shard]], axis=1))

    def _space(self, name: str) -> _Space:
        if name not in self._spaces:
            space = self._spaces[name] = _Space()
            for path in sorted((self.folder / name).glob("*.npy")) if self.folder is not None else ():
                try:
                    space.append(np.load(path, mmap_mode="r", allow_pickle=False))
                except (ValueError, EOFError, IndexError):  # damaged
                    with suppress(OSError):
                        path.unlink()
        return self._spaces[name]


class _Space:
    """Embeddings of one model at one exit, in shards; rows are numbered across shards, in the order of the shards."""

    def __init__(self) -> None:
        self.shards: list[np.ndarray] = []
        self._hashes = [np.empty(0, np.uint64)]
        self._index: tuple[np.ndarray, np.ndarray] | None = None  # all hashes, ascending, and their rows' numbers

    def append(self, shard: np.ndarray) -> None:
        self._hashes.append(_short(shard["key"].tobytes()))
        self.shards.append(shard["embedding"])
        self._index = None

    def places(self, texts: Sequence[Prompted]) -> np.ndarray:
        """Return the row number (N,) int64 of each text's embedding; -1 if the embedding is missing."""
        if self._index is None:
            hashes = np.concatenate(self._hashes)
            order = np.argsort(hashes, kind="stable")
            # The added last entry is found for a hash above all others.
            self._index = np.append(hashes[order], np.uint64(2**64 - 1)), np.append(order, -1)
        wanted, (known, numbers) = _short(b"".join(map(_key, texts))), self._index
        found = np.searchsorted(known, wanted)
        return np.where(known[found] == wanted, numbers[found], -1)


@dataclass(frozen=True, slots=True)
class CachedRows:
    """N embeddings, float32, stored in arrays `shards`; `places` (N, 2) has the shard and the row of each embedding."""

    shards: Sequence[np.ndarray]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        shard, row = self.places[rows].T
        embeddings = np.empty((len(row), self.shards[0].shape[1]), dtype=np.float32)
        for number in np.unique(shard):
            chosen = shard == number
            embeddings[chosen] = self.shards[number][row[chosen]]
        return embeddings


def _key(text: Prompted) -> bytes:
    prompt, content = text
    # The length of the prompt keeps ("a", "bc") and ("ab", "c") apart.
    return hashlib.sha256(f"{len(prompt)}:{prompt}{content}".encode(errors="surrogatepass")).digest()


def _short(keys: bytes) -> np.ndarray:
    """Split `keys` into N keys of 32 bytes; return the first 64 bits of each as uint64 (N,), which is quick to sort."""
    return np.frombuffer(keys, "<u8")[::4]
