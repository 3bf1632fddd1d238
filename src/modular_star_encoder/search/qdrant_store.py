"""Rows on a Qdrant server, for indexes that outgrow one machine.

Qdrant has no transactions. New rows of a file are written before its old rows are deleted, and every row stores how
many rows its file has, so that the next update finds incomplete files and writes them again.

Words are ranked by Qdrant's own recipe for BM25: a sparse vector of term weights with a fixed average length, which
the server multiplies by inverse document frequencies (Modifier.IDF).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from modular_star_encoder.search.pieces import Snippet
from modular_star_encoder.search.vector_store import (
    QDRANT,
    Filter,
    ForeignDataError,
    Found,
    Row,
    StoredFile,
    best_first,
    stored_files,
    wrap_store_errors,
)
from modular_star_encoder.utils.errors import UserError

_SETTINGS_KEY = "modular_star_encoder"
_K1, _B, _AVERAGE_WORDS = 1.2, 0.75, 256
_PAGE = 1000
_POINTS_PER_REQUEST = 256
_MOST_PATHS = 1_000_000


def connect(location: str) -> tuple[Any, str]:
    """The client and the collection's name of `qdrant:NAME@URL`.

    Raises:
        ImportError: the client isn't installed.
        ValueError: the location has another form, or its URL holds a password.
    """
    name, _, url = location.removeprefix(QDRANT).partition("@")
    if not name or not url.startswith(("http://", "https://")):
        raise UserError(
            "search.qdrant.location", f"A Qdrant index is written qdrant:NAME@URL with an http URL, not {location!r}."
        )
    if "@" in urlsplit(url).netloc:  # locations are shown in messages, and kept
        raise UserError(
            "search.qdrant.password", "A Qdrant URL must not hold a password. Put the key into QDRANT_API_KEY."
        )
    return _import_client().QdrantClient(
        url=url, api_key=os.environ.get("QDRANT_API_KEY") or None, check_compatibility=False
    ), name


def _sentence(location: str, error: Exception) -> str | None:
    from qdrant_client.http.exceptions import ApiException

    if not isinstance(error, ApiException):
        return None
    return f"The Qdrant server of {location} can't be reached, or refused: {' '.join(str(error).split())}."


_wrap_errors = wrap_store_errors(_sentence)


class QdrantStore:
    """See `VectorStore`.

    Args:
        client: a `QdrantClient`, for a server or in memory.
        name: name of the collection.
        location: the location that errors and settings show.
    """

    def __init__(self, client: Any, name: str, location: str = "") -> None:
        self.location = location or f"{QDRANT}{name}"
        self._client, self._name = client, name
        self._models = _import_client().models

    @_wrap_errors
    def settings(self) -> dict[str, Any] | None:
        """See `VectorStore`."""
        if not self._client.collection_exists(self._name):
            return None
        metadata = self._client.get_collection(self._name).config.metadata or {}
        if _SETTINGS_KEY not in metadata:
            raise ForeignDataError(f"{self.location} is a collection of another program. Name another.")
        return metadata[_SETTINGS_KEY]

    @_wrap_errors
    def create(self, settings: Mapping[str, Any]) -> None:
        """See `VectorStore`."""
        models = self._models
        if self._client.collection_exists(self._name):
            self._client.delete_collection(self._name)
        vector = models.VectorParams(size=settings["dimension"], distance=models.Distance.COSINE)
        self._client.create_collection(
            self._name,
            vectors_config={f"vector_{exit_layer}": vector for exit_layer in settings["exit_layers"]},
            sparse_vectors_config={"words": models.SparseVectorParams(modifier=models.Modifier.IDF)},
            metadata={_SETTINGS_KEY: dict(settings)},
        )
        for field in ("file_id", "path", "language"):
            self._client.create_payload_index(self._name, field, models.PayloadSchemaType.KEYWORD)

    @_wrap_errors
    def files(self) -> dict[str, StoredFile]:
        """See `VectorStore`."""
        fields = ("file_id", "file_hash", "file_rows")
        return stored_files(tuple(payload[name] for name in fields) for _, payload in self._scroll(fields))

    @_wrap_errors
    def replace_files(self, known: Collection[str], rows: Sequence[Row]) -> None:
        """See `VectorStore`."""
        models = self._models
        for start in range(0, len(rows), _POINTS_PER_REQUEST):
            points = [self._point(row) for row in rows[start : start + _POINTS_PER_REQUEST]]
            self._client.upsert(self._name, points, wait=True)
        if known:
            conditions = [models.FieldCondition(key="file_id", match=models.MatchAny(any=sorted(known)))]
            kept = [models.HasIdCondition(has_id=[row.row_id for row in rows])] if rows else None
            stale = models.FilterSelector(filter=models.Filter(must=conditions, must_not=kept))
            self._client.delete(self._name, stale, wait=True)

    def finish(self) -> None:
        """Do nothing: the server maintains its indexes."""

    @_wrap_errors
    def nearest(
        self, vector: np.ndarray, exit_layer: int, limit: int, where: Filter, extras: Sequence[int] = ()
    ) -> list[Found]:
        """See `VectorStore`."""
        return self._query(vector.tolist(), f"vector_{exit_layer}", limit, where, extras)

    @_wrap_errors
    def lexical(self, words: Sequence[str], limit: int, where: Filter, extras: Sequence[int] = ()) -> list[Found]:
        """See `VectorStore`."""
        places = sorted({_word_place(word) for word in words})
        query = self._models.SparseVector(indices=places, values=[1.0] * len(places))
        return self._query(query, "words", limit, where, extras) if places else []

    @_wrap_errors
    def count(self) -> int:
        """See `VectorStore`."""
        return self._client.count(self._name, exact=True).count

    def _query(self, query: Any, using: str, limit: int, where: Filter, extras: Sequence[int] = ()) -> list[Found]:
        chosen = self._filter(where)
        if chosen is not None and not chosen.must:
            return []
        response = self._client.query_points(
            self._name,
            query=query,
            using=using,
            limit=limit,
            query_filter=chosen,
            with_vectors=[f"vector_{exit_layer}" for exit_layer in extras] or False,
        )
        found = []
        for point in response.points:
            vectors = {
                int(name.removeprefix("vector_")): np.asarray(values, dtype=np.float32)
                for name, values in (point.vector or {}).items()
            }
            snippet = _snippet(point.payload["snippet"])
            found.append(Found(str(point.id), point.payload["text_hash"], snippet, point.score, vectors))
        return best_first(found)

    def _filter(self, where: Filter) -> Any:
        """Return the filter for the server, or None to keep all rows; `must` is empty if no file passes."""
        models, must = self._models, []
        if where.languages:
            must.append(models.FieldCondition(key="language", match=models.MatchAny(any=list(where.languages))))
        if where.path is not None:  # the server has no patterns: they are matched here, against the list of paths
            fits = re.compile(where.path)
            paths = [hit.value for hit in self._client.facet(self._name, "path", limit=_MOST_PATHS).hits]
            chosen = [path for path in paths if fits.search(path)]
            if not chosen:
                return models.Filter(must=[])
            must.append(models.FieldCondition(key="path", match=models.MatchAny(any=chosen)))
        return models.Filter(must=must) if must else None

    def _scroll(self, fields: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        offset = None
        wanted = fields if fields is True else list(fields)
        while True:
            points, offset = self._client.scroll(self._name, limit=_PAGE, offset=offset, with_payload=wanted)
            yield from ((str(point.id), point.payload) for point in points)
            if offset is None:
                return

    def _point(self, row: Row) -> Any:
        vectors: dict[str, Any] = {f"vector_{layer}": values.tolist() for layer, values in row.vectors.items()}
        weights = _word_weights(row.words.split())
        if weights:
            vectors["words"] = self._models.SparseVector(indices=list(weights), values=list(weights.values()))
        payload = {name: getattr(row, name) for name in ("file_id", "file_hash", "file_rows", "text_hash")}
        # `path` and `language` are stored again as own fields, for filters.
        payload |= {"path": row.snippet.path, "language": row.snippet.language, "snippet": asdict(row.snippet)}
        return self._models.PointStruct(id=row.row_id, vector=vectors, payload=payload)


def _snippet(payload: Mapping[str, Any]) -> Snippet:
    return Snippet(**{**payload, "defines": tuple(payload["defines"])})


def _import_client() -> Any:
    try:
        import qdrant_client
    except ImportError as error:
        raise ImportError(
            "An index on a Qdrant server needs its client: pip install 'modular-star-encoder[qdrant]'"
        ) from error
    return qdrant_client


def _word_place(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode(errors="surrogatepass")).digest()[:4], "big")


def _word_weights(words: Sequence[str]) -> dict[int, float]:
    """BM25's weight of each term in a document, without the inverse document frequency."""
    norm = _K1 * (1 - _B + _B * len(words) / _AVERAGE_WORDS)
    counts = Counter(map(_word_place, words))
    return {place: count * (_K1 + 1) / (count + norm) for place, count in counts.items()}
