"""Retrievers, which score documents for queries, and the cache of the embeddings of texts.

A retriever may have several *variants* that come from one pass over the texts: the exits of a model, and at each exit
the sizes to which its embeddings can be truncated. `run.evaluate_tasks` asks for the variants without a stored result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.evaluation.scores import CosineScores, Scores
from modular_star_encoder.inference.encoders import Encoder, Prompted, Text
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_file


class ExitVariant(NamedTuple):
    """An exit of a model, and the size its embeddings are truncated to; None where a retriever has neither."""

    exit_layer: int | None = None
    dimensions: int | None = None


class Retriever(Protocol):
    """Anything that ranks documents for queries.

    Attributes:
        name: as tables show it.
        checksum: differs if any score could differ; results are stored under it.
        variants: the available ones.
    """

    @property
    def name(self) -> str: ...
    @property
    def checksum(self) -> str: ...
    @property
    def variants(self) -> tuple[ExitVariant, ...]: ...

    def prepare(self, texts: Sequence[Text], variants: Sequence[ExitVariant], *, progress: bool = True) -> None:
        """Do now what can be done for all texts at once, such as embedding them."""
        ...

    def scores(self, queries: Sequence[Text], documents: Sequence[Text], variant: ExitVariant) -> Scores:
        """Scores (Q, D) of prepared texts."""
        ...


class EmbeddingRetriever:
    """Ranks by cosine similarity of embeddings; each text is embedded once, all missing exits in one pass.

    Args:
        encoder: embeds the texts.
        cache: stores the embeddings; in memory for the life of the retriever if None.
    """

    chunk = 4096
    """Texts per shard of the cache: what an interruption may cost."""

    def __init__(self, encoder: Encoder, cache: EmbeddingCache | None = None) -> None:
        self.encoder = encoder
        self.cache = EmbeddingCache() if cache is None else cache
        self.name, self.checksum = encoder.name, encoder.checksum
        self.variants = tuple(
            ExitVariant(exit_layer, size) for exit_layer in encoder.exit_layers for size in encoder.dimensions
        )

    def prepare(self, texts: Sequence[Text], variants: Sequence[ExitVariant], *, progress: bool = True) -> None:
        """Embed the texts that the cache lacks, longest first."""
        exits = tuple(dict.fromkeys(variant.exit_layer for variant in variants))
        prompted = dict.fromkeys((self.encoder.prompt(text), text.text) for text in dict.fromkeys(texts))
        absent = {exit_layer: self.cache.missing(self._space(exit_layer), prompted) for exit_layer in exits}
        exits = tuple(exit_layer for exit_layer in exits if absent[exit_layer])
        # A text is embedded at all exits where some exit lacks it: the deepest costs the pass anyway.
        wanted = sorted(set().union(*absent.values()), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        starts = range(0, len(wanted), self.chunk)
        for start in tqdm(starts, desc=f"embedding, {self.name}", unit="shard", disable=not progress, leave=False):
            chunk = wanted[start : start + self.chunk]
            embeddings = self.encoder.encode(chunk, exits, progress=progress)
            for exit_layer in exits:
                self.cache.add(self._space(exit_layer), chunk, embeddings[exit_layer])

    def scores(self, queries: Sequence[Text], documents: Sequence[Text], variant: ExitVariant) -> CosineScores:
        """Cosine similarities of prepared texts."""
        query_rows, document_rows = (
            self.cache.rows(self._space(variant.exit_layer), [(self.encoder.prompt(text), text.text) for text in texts])
            for texts in (queries, documents)
        )
        return CosineScores(query_rows, document_rows, dimensions=variant.dimensions)

    def _space(self, exit_layer: int | None) -> str:
        return f"{self.checksum}/{'full' if exit_layer is None else f'exit-{exit_layer}'}"


class EmbeddingCache:
    """Embeddings by model, exit, prompt and text; a second benchmark over the same texts embeds nothing.

    A *space* (model and exit) is a folder of shards: `NAME.npy` with embeddings and `NAME.keys.npy` with the hashes of
    their texts. Shards never change, and keys are renamed into place last: a reader sees whole shards only, and any
    number of processes may write. Embeddings are memory-mapped when read.

    Args:
        folder: of the spaces; in memory if None.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._spaces: dict[str, _Space] = {}

    def missing(self, space: str, texts: Iterable[Prompted]) -> list[Prompted]:
        """The texts without an embedding in `space`, in order."""
        places = self._space(space).places
        return [text for text in texts if _key(text) not in places]

    def add(self, space: str, texts: Sequence[Prompted], embeddings: np.ndarray) -> None:
        """Store embeddings (N, F) float32 of N texts.

        Raises:
            UserError: an embedding holds NaN or infinite components, or the shape is not (N, F).
            OSError: the folder cannot be written to.
        """
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(texts):
            raise UserError(
                "evaluation.embeddings.shape",
                f"{len(texts)} texts need embeddings (N, F), not an array of shape {embeddings.shape}.",
            )
        if not np.isfinite(embeddings).all():
            raise UserError(
                "evaluation.embeddings.not_finite",
                "An embedding holds NaN or infinite components. Nothing was stored; check the model.",
            )
        self._space(space).add([_key(text) for text in texts], embeddings)

    def rows(self, space: str, texts: Sequence[Prompted]) -> CachedRows:
        """The embeddings of texts that were added, read on access.

        Raises:
            KeyError: a text that was never added.
        """
        found = self._space(space)
        return CachedRows(found.shards, np.array([found.places[_key(text)] for text in texts]).reshape(-1, 2))

    def _space(self, name: str) -> _Space:
        if name not in self._spaces:
            self._spaces[name] = _Space(None if self.folder is None else self.folder / name)
        return self._spaces[name]


class CachedRows:
    """Embeddings (N, F) float32 from several shards."""

    def __init__(self, shards: Sequence[np.ndarray], places: np.ndarray) -> None:
        self._shards, self._places = shards, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        shard, row = self._places[rows].T
        embeddings = np.empty((len(row), self._shards[0].shape[1]), dtype=np.float32)
        for number in np.unique(shard):
            chosen = shard == number
            embeddings[chosen] = self._shards[number][row[chosen]]
        return embeddings


class _Space:
    """The shards of one folder, and the shard and row of each text."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.shards: list[np.ndarray] = []
        self.places: dict[bytes, tuple[int, int]] = {}
        for keys in sorted(folder.glob("*.keys.npy")) if folder is not None else ():
            self._open(keys)

    def add(self, keys: list[bytes], embeddings: np.ndarray) -> None:
        if self.shards and embeddings.shape[1] != (size := self.shards[0].shape[1]):
            raise UserError(
                "evaluation.embeddings.shape",
                f"The embeddings have {embeddings.shape[1]} components, earlier ones have {size}.",
            )
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            joined = b"".join(keys)
            target = self.folder / f"{hashlib.sha256(joined).hexdigest()[:32]}.npy"
            _write(target, embeddings)
            _write(target.with_suffix(".keys.npy"), np.frombuffer(joined, dtype=np.uint8).reshape(-1, 32))
            embeddings = np.load(target, mmap_mode="r", allow_pickle=False)
        self._append(keys, embeddings)

    def _open(self, path: Path) -> None:
        try:
            keys = np.load(path, allow_pickle=False)
            shard = np.load(path.with_name(path.name.removesuffix(".keys.npy") + ".npy"), "r", allow_pickle=False)
            if keys.dtype != np.uint8 or keys.shape != (len(shard), 32) or shard.dtype != np.float32:
                raise ValueError("keys and embeddings do not fit together")
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                "evaluation.cache.damaged", f"{path} of the embedding cache is damaged ({error}): remove it."
            ) from None
        self._append([row.tobytes() for row in keys], shard)

    def _append(self, keys: list[bytes], embeddings: np.ndarray) -> None:
        number = len(self.shards)
        self.shards.append(embeddings)
        for row, key in enumerate(keys):
            self.places.setdefault(key, (number, row))


def _key(text: Prompted) -> bytes:
    prompt, content = text
    # The length of the prompt keeps ("a", "bc") and ("ab", "c") apart.
    return hashlib.sha256(f"{len(prompt)}:{prompt}{content}".encode(errors="surrogatepass")).digest()


def _write(path: Path, array: np.ndarray) -> None:
    with staged_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
