"""Rows in LanceDB: files of columns that are never changed, and a manifest that is renamed into place.

Every change is one commit, so that a process killed at any moment leaves the last commit. LanceDB's own full-text
search ranks the words: it lies beside the vectors, is incremental and filtered like them, and gets words that were
divided by `snippet_words`, without which BM25 knows neither camelCase nor snake_case.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from modular_star_encoder.search.pieces import Snippet
from modular_star_encoder.search.vector_store import (
    INDEX_FOLDER,
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

TABLE = "snippets"
OWN_FILES = {".gitignore", ".lock", "margins.json", f"{TABLE}.lance"}
SNIPPET_COLUMNS = ("path", "language", "name", "first_line", "last_line", "description", "text", "line", "defines")
FOUND_COLUMNS = ("row_id", "text_hash", *SNIPPET_COLUMNS)
COMPACT_EVERY = 64
# A query that began before a compaction still reads the files of before.
KEEP_VERSIONS = timedelta(minutes=1)
ANN_ROWS = 100_000
# Chosen by benchmarks/vector_index.py, as is the kind of index: scalar quantisation in √N partitions.
PROBES = 20
REFINE_FACTOR = 5
_TRAINING_ROUNDS = 15
_OUTGROWN = 4
_SETTINGS_KEY = b"modular_star_encoder"


def _sentence(location: str, error: Exception) -> str | None:
    if not isinstance(error, RuntimeError) or not str(error).startswith("lance error"):
        return None
    return f"The index {location} can't be read or written ({error}): if it is damaged, build it anew (--rebuild)."


_wrap_errors = wrap_store_errors(_sentence)


class LanceStore:
    """See `VectorStore`.

    Args:
        location: a folder, or a URI that LanceDB knows.
        ann_rows: from this many rows on, vectors get an approximate index; fewer are compared one by one.

    Raises:
        ImportError: LanceDB isn't installed.
        ValueError: the folder holds other things.
    """

    def __init__(self, location: str, ann_rows: int = ANN_ROWS) -> None:
        self.location = location
        self.folder = None if "://" in location else Path(location).expanduser().absolute()
        self._ann_rows = ann_rows
        self._table: Any = None
        self._commits = 0
        self._lancedb = _import_lancedb()
        if self.folder is not None and (self.folder.is_file() or self._strange_files()):
            raise UserError(
                "search.index.foreign",
                f"{location} is not an index: it is a file, or a folder that holds other things.",
            )

    @_wrap_errors
    def settings(self) -> dict[str, Any] | None:
        """See `VectorStore`."""
        table = self._open()
        if table is None:
            return None
        content = (table.schema.metadata or {}).get(_SETTINGS_KEY)
        if content is None:
            raise ForeignDataError(f"{self.location} holds a table {TABLE!r} of another program. Name another place.")
        return json.loads(content)

    @_wrap_errors
    def create(self, settings: Mapping[str, Any]) -> None:
        """See `VectorStore`."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.folder.name == INDEX_FOLDER:  # one in another place may be meant to be committed
                (self.folder / ".gitignore").write_text("*\n", encoding="utf-8")
        schema = _schema(settings["exit_layers"], settings["dimension"])
        schema = schema.with_metadata({_SETTINGS_KEY: json.dumps(dict(settings))})
        database = self._connect()
        there = TABLE in database.list_tables().tables
        try:
            self._table = database.create_table(TABLE, schema=schema, mode="overwrite" if there else "create")
        except RuntimeError:
            if not there:
                raise
            # Overwriting begins with the last version, which is damaged.
            database.drop_table(TABLE)
            self._table = database.create_table(TABLE, schema=schema)
        self._index_words()

    @_wrap_errors
    def files(self) -> dict[str, StoredFile]:
        """See `VectorStore`."""
        return stored_files(self._file_columns())

    def _file_columns(self) -> Iterator[tuple[str, str, int]]:
        columns = ["file_id", "file_hash", "file_rows"]
        for batch in self._rows().search().select(columns).to_batches():
            yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)

    @_wrap_errors
    def replace_files(self, known: Collection[str], rows: Sequence[Row]) -> None:
        """See `VectorStore`; one commit."""
        table = self._rows()
        if self._commits == 0:
            self._index_words()  # the process that created the table may have been killed before it did
        where = f"file_id IN ({', '.join(map(_quoted, sorted(known)))})"
        if not rows:
            table.delete(where)
        else:
            content = _content(rows, table.schema)
            if known:
                merge = table.merge_insert("row_id").when_matched_update_all().when_not_matched_insert_all()
                merge.when_not_matched_by_source_delete(where).execute(content)
            else:
                table.add(content)
        self._commits += 1
        # Thousands of small files make every further commit slow.
        if self._commits % COMPACT_EVERY == 0:
            table.optimize(cleanup_older_than=KEEP_VERSIONS)

    @_wrap_errors
    def finish(self) -> None:
        """See `VectorStore`."""
        table = self._rows()
        table.optimize(cleanup_older_than=KEEP_VERSIONS)
        rows = table.count_rows()
        if rows >= self._ann_rows:
            # After compaction, which would have to write an index anew.
            for column in [name for name in table.schema.names if name.startswith("vector_")]:
                self._index_vectors(column, rows)
            table.optimize(cleanup_older_than=KEEP_VERSIONS)

    @_wrap_errors
    def nearest(
        self, vector: np.ndarray, exit_layer: int, limit: int, where: Filter, extras: Sequence[int] = ()
    ) -> list[Found]:
        """See `VectorStore`."""
        column = f"vector_{exit_layer}"
        query = self._rows().search(vector, vector_column_name=column).distance_type("cosine")
        # Of no effect without an approximate index. A filter that leaves few rows is worth more probes.
        query = query.minimum_nprobes(PROBES).maximum_nprobes(0).refine_factor(REFINE_FACTOR)
        return _found(query, "_distance", lambda distance: 1 - distance, limit, where, extras)

    @_wrap_errors
    def lexical(self, words: Sequence[str], limit: int, where: Filter, extras: Sequence[int] = ()) -> list[Found]:
        """See `VectorStore`."""
        from lancedb.query import MatchQuery

        if not words:
            return []
        match = MatchQuery(" ".join(words), "words")  # type: ignore[call-arg]  # mypy misses its defaults
        query = self._rows().search(match, query_type="fts")
        return _found(query, "_score", float, limit, where, extras)

    @_wrap_errors
    def count(self) -> int:
        """See `VectorStore`."""
        return self._rows().count_rows()

    def _index_words(self) -> None:
        """Make the full-text index, which covers later rows too, unless it is there."""
        if any(index.columns == ["words"] for index in self._table.list_indices()):
            return
        fts = self._lancedb.index.FTS(
            base_tokenizer="whitespace", stem=False, remove_stop_words=False, ascii_folding=False, lower_case=False
        )
        self._table.create_index("words", config=fts)

    def _index_vectors(self, column: str, rows: int) -> None:
        """Make the approximate index of a column, and make it anew when it has far too few partitions.

        Its name says for how many rows it was made. `optimize` brings later rows into the partitions that there are.
        """
        prefix = f"{column}_for_"
        names = [index.name for index in self._table.list_indices() if index.name.startswith(prefix)]
        sizes = {int(name.removeprefix(prefix)): name for name in names}
        if not sizes or rows >= _OUTGROWN * max(sizes):
            config = self._lancedb.index.IvfSq(
                distance_type="cosine", num_partitions=int(rows**0.5), max_iterations=_TRAINING_ROUNDS
            )
            self._table.create_index(column, config=config, name=f"{prefix}{rows}")
            sizes[rows] = f"{prefix}{rows}"
        for size in sorted(sizes)[:-1]:
            self._table.drop_index(sizes[size])

    def _rows(self) -> Any:
        table = self._open()
        if table is None:
            raise UserError(
                "search.index.missing", f"There is no index in {self.location}. Make one with `mose index`."
            )
        return table

    def _open(self) -> Any:
        """The table, or None where nothing was ever committed."""
        if self._table is None:
            if self.folder is not None and not any(self.folder.glob(f"{TABLE}.lance/_versions/*.manifest")):
                return None
            database = self._connect()
            if TABLE not in database.list_tables().tables:
                return None
            try:
                self._table = database.open_table(TABLE)
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(
                    "search.index.unreadable", f"The index {self.location} can't be read: {error}."
                ) from error
        return self._table

    def _connect(self) -> Any:
        # Interval 0: a program that searches for long sees what `mose index` writes meanwhile.
        target = self.location if self.folder is None else str(self.folder)
        return self._lancedb.connect(target, read_consistency_interval=timedelta(0))

    def _strange_files(self) -> bool:
        """Whether the folder holds other things and no index; our own files beside an index do not count."""
        names = set(os.listdir(self.folder)) if self.folder is not None and self.folder.is_dir() else set()
        return f"{TABLE}.lance" not in names and not names <= OWN_FILES


def _import_lancedb() -> Any:
    # LanceDB logs a note for every table that does not exist yet.
    os.environ.setdefault("LANCEDB_LOG", "error")
    try:
        import lancedb
        import lancedb.index
    except ImportError as error:
        raise ImportError(
            "An index needs LanceDB, which is not installed: pip install 'modular-star-encoder[search]'"
        ) from error
    return lancedb


def _schema(exit_layers: Sequence[int], dimension: int) -> Any:
    import pyarrow as pa

    text = (
        "row_id",
        "file_id",
        "file_hash",
        "text_hash",
        "path",
        "language",
        "name",
        "description",
        "text",
        "words",
        "defines",
    )
    fields = [pa.field(name, pa.string(), nullable=False) for name in text]
    fields += [pa.field(name, pa.int32(), nullable=False) for name in ("file_rows", "first_line", "last_line", "line")]
    fields += [pa.field(f"vector_{exit_layer}", pa.list_(pa.float32(), dimension)) for exit_layer in exit_layers]
    return pa.schema(fields)


def _content(rows: Sequence[Row], schema: Any) -> Any:
    import pyarrow as pa

    columns: dict[str, Any] = {
        name: [getattr(row, name) for row in rows]
        for name in ("row_id", "file_id", "file_hash", "text_hash", "file_rows", "words")
    }
    columns |= {name: [getattr(row.snippet, name) for row in rows] for name in SNIPPET_COLUMNS}
    columns["defines"] = ["\n".join(names) for names in columns["defines"]]
    for exit_layer in rows[0].vectors:
        flat = np.concatenate([row.vectors[exit_layer] for row in rows]).astype(np.float32, copy=False)
        width = len(rows[0].vectors[exit_layer])
        columns[f"vector_{exit_layer}"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    arrays = [pa.array(columns[field.name], field.type) if isinstance(columns[field.name], list) else
              columns[field.name] for field in schema]  # fmt: skip
    return pa.Table.from_arrays(arrays, schema=schema)


def _found(query: Any, score: str, similarity: Any, limit: int, where: Filter, extras: Sequence[int] = ()) -> list:
    condition = _condition(where)
    if condition:
        query = query.where(condition)
    columns = {exit_layer: f"vector_{exit_layer}" for exit_layer in extras}
    return best_first(
        Found(
            row["row_id"],
            row["text_hash"],
            Snippet(**{name: row[name] for name in SNIPPET_COLUMNS} | {"defines": tuple(row["defines"].split("\n"))}),
            similarity(row[score]),
            {layer: np.asarray(row[column], dtype=np.float32) for layer, column in columns.items()},
        )
        for row in query.limit(limit).select([*FOUND_COLUMNS, *columns.values(), score]).to_list()
    )


def _condition(where: Filter) -> str:
    parts = []
    if where.languages:
        parts.append(f"language IN ({', '.join(map(_quoted, where.languages))})")
    if where.path is not None:
        parts.append(f"regexp_like(path, {_quoted(where.path)})")
    return " AND ".join(parts)


def _quoted(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"
