"""Store an index in a collection of a Qdrant server, for indexes that outgrow one machine.

Qdrant has no transactions: an update writes the new rows of a file before it deletes the old ones, and each row stores
how many rows its file has, to detect incomplete files. A search by words uses sparse vectors with BM25 weights, which
assume a fixed average length of rows.
"""

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial, wraps
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import numpy as np

from modular_star_encoder.search.pieces import Snippet
from modular_star_encoder.search.vector_store import QDRANT, Filter, Found, Row, VectorStore, content_hash
from modular_star_encoder.utils.errors import UserError, naming_extra

_SETTINGS_KEY = "modular_star_encoder"
_K1, _B, _AVERAGE_WORDS = 1.2, 0.75, 256
_PAGE = 1000
_POINTS_PER_REQUEST = 256
_MOST_PATHS = 1_000_000


def connect(location: str) -> tuple[Any, str]:
    """Return a client and the collection's name for a location `qdrant:NAME@URL`; UserError if it is invalid."""
    name, _, url = location.removeprefix(QDRANT).partition("@")
    if not name or not url.startswith(("http://", "https://")):
        fault = f"{location!r} is not a Qdrant index. Write qdrant:NAME@URL with an http or https URL."
        raise UserError("search.qdrant.location", fault)
    if "@" in urlsplit(url).netloc:  # messages show locations, and would show the password
        fault = "A Qdrant URL must not contain a password. Put the key in the environment variable QDRANT_API_KEY."
        raise UserError("search.qdrant.password", fault)
    api_key = os.environ.get("QDRANT_API_KEY") or None
    return _import_client().QdrantClient(url=url, api_key=api_key, check_compatibility=False), name


def _wrap_errors(method: Callable) -> Callable:
    """Decorate a method of `QdrantStore`: it raises OSError with one sentence if the server reports an error."""

    @wraps(method)
    def wrapped(self: "QdrantStore", *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except _import_client().http.exceptions.ApiException as error:
            reason = " ".join(str(error).split())
            raise OSError(f"The server of {self.location} did not answer, or rejected a request: {reason}.") from error

    return wrapped


class QdrantStore(VectorStore):
    """Stores an index in a collection of a Qdrant server. Several processes may write to it at the same time."""

    def __init__(self, client: Any, name: str, location: str = "") -> None:
        self.location = location or f"{QDRANT}{name}"
        self._client, self._name = client, name
        self._models = _import_client().models

    @_wrap_errors
    def settings(self) -> dict[str, Any] | None:
        if not self._client.collection_exists(self._name):
            return None
        metadata = self._client.get_collection(self._name).config.metadata or {}
        if _SETTINGS_KEY not in metadata:
            message = f"{self.location} is a collection of another program. Use another name for the index."
            raise UserError("search.index.foreign", message)
        return metadata[_SETTINGS_KEY]

    @_wrap_errors
    def create(self, settings: Mapping[str, Any]) -> None:
        models = self._models
        if self.settings() is not None:
            self._client.delete_collection(self._name)
        vector = models.VectorParams(size=settings["dimension"], distance=models.Distance.COSINE)
        self._client.create_collection(
            self._name,
            vectors_config={f"vector_{exit_layer}": vector for exit_layer in settings["exit_layers"]},
            sparse_vectors_config={"words": models.SparseVectorParams(modifier=models.Modifier.IDF)},
            metadata={_SETTINGS_KEY: dict(settings)},
        )
        with warnings.catch_warnings():  # a client in local mode has no such indexes, and needs none
            warnings.filterwarnings("ignore", "Payload indexes have no effect", UserWarning)
            for field in ("file_id", "path", "language"):
                self._client.create_payload_index(self._name, field, models.PayloadSchemaType.KEYWORD)

    @_wrap_errors
    def files(self) -> dict[str, str | None]:
        states: defaultdict[str, Counter[tuple[str, int]]] = defaultdict(Counter)
        offset, fields = None, ["file_id", "file_hash", "file_rows"]
        while True:
            points, offset = self._client.scroll(self._name, limit=_PAGE, offset=offset, with_payload=fields)
            for file, *state in ([point.payload[name] for name in fields] for point in points):
                states[file][tuple(state)] += 1
            if offset is None:
                break
        return {
            file: file_hash if len(counts) == 1 and counts.total() == expected else None
            for file, counts in states.items()
            for file_hash, expected in [next(iter(counts))]
        }

    @_wrap_errors
    def replace_files(self, known: Collection[str], rows: Sequence[Row]) -> None:
        models = self._models
        for start in range(0, len(rows), _POINTS_PER_REQUEST):
            points = [self._point(row) for row in rows[start : start + _POINTS_PER_REQUEST]]
            self._client.upsert(self._name, points, wait=True)
        if known:
            conditions = [models.FieldCondition(key="file_id", match=models.MatchAny(any=sorted(known)))]
            kept = [models.HasIdCondition(has_id=[_row_id(row) for row in rows])] if rows else None
            stale = models.FilterSelector(filter=models.Filter(must=conditions, must_not=kept))
            self._client.delete(self._name, stale, wait=True)

    @_wrap_errors
    def nearest(self, vector: np.ndarray, exit_layer: int, limit: int, where: Filter) -> list[Found]:
        return self._query(vector.tolist(), f"vector_{exit_layer}", limit, where)

    @_wrap_errors
    def lexical(self, words: Sequence[str], limit: int, where: Filter) -> list[Found]:
        places = sorted({_word_place(word) for word in words})
        query = self._models.SparseVector(indices=places, values=[1.0] * len(places))
        return self._query(query, "words", limit, where) if places else []

    @_wrap_errors
    def vectors(self, found: Sequence[Found], exit_layer: int) -> np.ndarray:
        name, ids = f"vector_{exit_layer}", [str(one.row_id) for one in found]
        points = self._client.retrieve(self._name, ids, with_payload=False, with_vectors=[name])
        known = {str(point.id): point.vector[name] for point in points}
        zeros = [0.0] * len(next(iter(known.values()), ()))
        return np.array([known.get(one, zeros) for one in ids], dtype=np.float32)

    @_wrap_errors
    def count(self) -> int:
        return self._client.count(self._name, exact=True).count

    def _query(self, query: Any, using: str, limit: int, where: Filter) -> list[Found]:
        chosen = self._filter(where)
        if chosen is not None and not chosen.must:
            return []
        response = self._client.query_points(self._name, query=query, using=using, limit=limit, query_filter=chosen)
        found = []
        for point in response.points:
            values = point.payload["snippet"]
            read = partial(Snippet, **{**values, "defines": tuple(values["defines"])})
            found.append(Found(str(point.id), values["path"], point.score, read))
        return sorted(found, key=lambda one: (-one.score, one.path, one.snippet.first_line))

    def _filter(self, where: Filter) -> Any:
        """Convert `where` to a Qdrant filter: None if it accepts all rows, an empty filter if it accepts no row."""
        models, must = self._models, []
        if where.languages:
            must.append(models.FieldCondition(key="language", match=models.MatchAny(any=list(where.languages))))
        if where.file is not None:
            must.append(models.FieldCondition(key="file_id", match=models.MatchValue(value=where.file)))
        if where.path is not None:  # the server can't match patterns, so all its paths are matched here
            paths = [hit.value for hit in self._client.facet(self._name, "path", limit=_MOST_PATHS).hits]
            chosen = [path for path in paths if where.path.match(path.encode())]
            if not chosen:
                return models.Filter(must=[])
            must.append(models.FieldCondition(key="path", match=models.MatchAny(any=chosen)))
        return models.Filter(must=must) if must else None

    def _point(self, row: Row) -> Any:
        vectors: dict[str, Any] = {f"vector_{layer}": values.tolist() for layer, values in row.vectors.items()}
        if counts := Counter(map(_word_place, row.words.split())):
            norm = _K1 * (1 - _B + _B * counts.total() / _AVERAGE_WORDS)
            weights = [count * (_K1 + 1) / (count + norm) for count in counts.values()]  # BM25 without IDF
            vectors["words"] = self._models.SparseVector(indices=list(counts), values=weights)
        payload = {name: getattr(row, name) for name in ("file_id", "file_hash", "file_rows")}
        # Filters need `path` and `language` as fields of their own.
        payload |= {"path": row.snippet.path, "language": row.snippet.language, "snippet": asdict(row.snippet)}
        return self._models.PointStruct(id=_row_id(row), vector=vectors, payload=payload)


def _import_client() -> Any:
    with naming_extra():
        import qdrant_client
    return qdrant_client


def _row_id(row: Row) -> str:
    """Return a row's id in Qdrant: a UUID, made from a hash of the file's id and the row's number in the file."""
    return str(UUID(hex=content_hash(f"{row.file_id}:{row.place}")))


def _word_place(word: str) -> int:
    """Return the position of a word in the sparse vectors: a 32-bit hash of the word."""
    return int.from_bytes(hashlib.sha256(word.encode(errors="surrogatepass")).digest()[:4], "big")
