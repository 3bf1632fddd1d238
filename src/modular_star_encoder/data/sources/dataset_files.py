"""Read source files from data sets with one source file per row, or from The Stack v2 (arXiv 2402.19173).

The Stack v2 lists only ids of files. Their contents are gzip files in a bucket: ask Software Heritage for access.
"""

import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import PurePath
from threading import Semaphore
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tqdm.auto import tqdm

from modular_star_encoder.data.languages.registry import check_languages, language_named, language_of
from modular_star_encoder.data.sources import FileFilters, SourceFile, SourceReader, is_closed
from modular_star_encoder.data.sources.dataset_rows import Source, open_rows
from modular_star_encoder.data.sources.ignore_files import beginning
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import fits
from modular_star_encoder.utils.http import (
    HTTPClient,
    HTTPRequestError,
    check_http_settings,
    in_daemon_thread,
    is_web_address,
)

_ROWS_PER_BATCH, _AHEAD_PER_THREAD, _MAX_FAILURES_AT_FIRST = 16, 4, 200
_BLOB_ID = re.compile(r"[0-9a-f]{40}")
_HTTP = ("http:", "https:")  # fetched with `HTTPClient`; fsspec would need aiohttp
_GZIP_MAGIC, _GZIP_OVERHEAD = b"\x1f\x8b", 65_536
_NOT_AVAILABLE = (401, 403, 404, 410)
_TEXT: Any = str | None
_TERMS: Any = str | Sequence[str] | None
_STACK_ROW = {"repo_name": _TEXT, "files": Sequence[Mapping[str, Any]] | None}
_STACK_FILE = dict.fromkeys(("path", "language", "blob_id"), _TEXT)
_STACK_FILE_MORE = {"src_encoding": _TEXT, "license_type": _TEXT, "detected_licenses": _TERMS}
_STACK_FILE_MORE |= {"length_bytes": float | None}
_MISSING, _NOT_FETCHED = "content missing or forbidden", "content not fetched"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowColumns:
    """The column names of a data set with one source file per row. `language` may be None if paths have suffixes."""

    repository: str
    path: str
    text: str
    language: str | None = None
    license: str | None = None


THE_STACK_COLUMNS = RowColumns(  # of version 1; `bigcode/starcoderdata` lacks the last two columns
    repository="max_stars_repo_name",
    path="max_stars_repo_path",
    text="content",
    language="lang",
    license="max_stars_repo_licenses",
)


def _check_contents(url: str, http: Mapping[str, Any]) -> None:
    check_http_settings(**http)
    fault = "" if "{blob_id}" in url else "it must contain {blob_id}"
    if url.lower().startswith(_HTTP):
        if not is_web_address(url.replace("{blob_id}", "0" * 40)):
            fault = fault or "it is not a valid http or https address"
    elif "::" in url and urlsplit(url.rpartition("::")[2]).scheme in ("", "file", "local"):
        fault = "write a folder of this machine without `::`"
    else:
        protocol = urlsplit(url).scheme or "file"
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            fault = f"its protocol {protocol!r} is not available: {str(error).rstrip('.')}"
    if fault:
        raise UserError("data.contents.url", f"`content_url` can't be used: {fault}.")


def _received(future: Future[Any]) -> tuple[bytes, str | None, str]:
    """Return (content, reason to leave the file out or None, kind of error); an error's message may hold the URL."""
    try:
        content = future.result()
    except HTTPRequestError as error:
        reason = _MISSING if error.status in _NOT_AVAILABLE else _NOT_FETCHED
        kind = f"status {error.status}" if error.status else error.reason
        return b"", "too large" if error.key == "http.too_large" else reason, kind
    except Exception as error:  # every protocol raises its own exceptions
        missing = isinstance(error, FileNotFoundError | PermissionError)
        return b"", _MISSING if missing else _NOT_FETCHED, type(error).__name__
    return content if isinstance(content, bytes) else content.content, None, ""


def unpack(content: bytes, max_bytes: int) -> bytes:
    """Return the first `max_bytes` + 1 bytes of `content`, unpacked if it is gzip; zlib.error if it is damaged gzip."""
    if not content.startswith(_GZIP_MAGIC):
        return content[: max_bytes + 1]
    unpacker = zlib.decompressobj(wbits=31)
    unpacked = unpacker.decompress(content, max_bytes + 1)
    if not unpacker.eof and len(unpacked) <= max_bytes:
        raise zlib.error("incomplete")
    return unpacked


def _reason_by_path(path: PurePath, language: str | None, languages: Sequence[str], filters: FileFilters) -> str | None:
    if language not in languages:
        return "another language"
    return "hidden or closed folder" if is_closed(path) else filters.reason_by_path(path, language or "")


def row_repositories(
    source: Source,
    columns: RowColumns | Mapping[str, str] = THE_STACK_COLUMNS,
    *,
    languages: Iterable[str] | None = None,
    filters: FileFilters | None = None,
    **options: Any,
) -> SourceReader:
    """Return a reader of a data set with one source file per row; for `source` and `options` see `open_rows`."""
    names = columns if isinstance(columns, RowColumns) else RowColumns(**columns)
    chosen, filters = check_languages(languages), filters or FileFilters()
    kinds = {name: _TERMS if field == "license" else _TEXT for field, name in asdict(names).items() if name}
    rows = open_rows(source, columns=list(kinds), batch_size=_ROWS_PER_BATCH, **options)

    def files(skipped: Counter[str]) -> Iterator[SourceFile]:
        for row in rows:
            _check(row, kinds)
            path = PurePath((row[names.path] or "").lstrip("/"))
            language = language_named(row[names.language]) if names.language else language_of(path)
            text = (row[names.text] or "").removeprefix("\ufeff")
            if reason := _reason_by_path(path, language, chosen, filters) or filters.reason_by_text(text):
                skipped[reason] += 1
            else:
                terms = _joined_licenses(row[names.license]) if names.license else None
                yield SourceFile(row[names.repository] or "", path.as_posix(), language or "", text, terms)

    return SourceReader(files)


def _check(row: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise UserError (`data.source.column`) if `row` lacks a column of `kinds`, or its value has another type."""
    for name, kind in kinds.items():
        if name not in row or not fits(row[name], kind):
            found = f"has a value of a type that can't be used: {row[name]!r:.60}" if name in row else "is missing"
            raise UserError("data.source.column", f"The column {name!r} of the data set {found}.")


def _joined_licenses(value: str | Sequence[str] | None) -> str | None:
    return value or None if isinstance(value, str) else ", ".join(value or ()) or None


def the_stack_repositories(
    source: Source,
    content_url: str,
    *,
    http: Mapping[str, Any] | None = None,
    languages: Iterable[str] | None = None,
    filters: FileFilters | None = None,
    progress: bool = True,
    **options: Any,
) -> SourceReader:
    """Return a reader of the files of The Stack v2: one repository per row of the data set, in the order of the rows.

    A file that can't be fetched is left out and counted in `skipped`. If none of the first 200 files can be fetched,
    iterating raises UserError.

    Args:
        source, options: see `open_rows`; for example `"bigcode/the-stack-v2-train-smol-ids"`.
        content_url: an http address or a URL of fsspec, with `{blob_id}` in place of the file's id, such as
            `s3://softwareheritage/content/{blob_id}`. The URL is never shown, because it may contain a signature.
        http: `concurrency`, the number of files fetched at the same time, and other settings of `HTTPClient`.
    """
    http = {"concurrency": 16, "attempts": 4, "pause": 0.5, "timeout": 30.0} | dict(http or {})
    _check_contents(content_url, http)
    rows = open_rows(source, columns=("repo_name", "files"), batch_size=_ROWS_PER_BATCH, **options)
    chosen, filters = check_languages(languages), filters or FileFilters()

    def read(skipped: Counter[str]) -> Iterator[SourceFile]:
        fetched = 0
        wanted = (one for row in rows for one in _wanted_files(row, chosen, filters, skipped))
        with (
            closing(_fetched(wanted, content_url, http, filters.max_bytes + _GZIP_OVERHEAD)) as fetching,
            tqdm(desc="Fetching contents", unit=" files", disable=not progress) as bar,
        ):
            for file, encoding, future in fetching:
                content, reason, last = _received(future)
                fetched += not reason
                try:
                    text, damage = filters.decode(unpack(content, filters.max_bytes), encoding)
                except zlib.error:
                    text, damage = "", "damaged content"
                bar.update()
                if reason := reason or damage:
                    skipped[reason] += 1
                else:
                    yield replace(file, text=text)
                # A wrong URL or missing access should show now, not after a week of skipping.
                if not fetched and skipped[_MISSING] + skipped[_NOT_FETCHED] >= _MAX_FAILURES_AT_FIRST:
                    message = f"None of the first {_MAX_FAILURES_AT_FIRST} files could be fetched (last error: {last})."
                    raise UserError("data.contents.no_access", f"{message} Check `content_url` and your access to it.")

    return SourceReader(read)


def _wanted_files(
    row: dict[str, Any], languages: tuple[str, ...], filters: FileFilters, skipped: Counter[str]
) -> Iterator[tuple[SourceFile, str, str]]:
    """Yield (file without text, blob id, encoding) for each file of `row` to fetch; count the others in `skipped`."""
    _check(row, _STACK_ROW)
    for record in row["files"] or ():
        _check(record, _STACK_FILE | {name: kind for name, kind in _STACK_FILE_MORE.items() if name in record})
        path = PurePath((record["path"] or "").lstrip("/"))
        language = language_named(record["language"])
        faults = {
            "vendored code": record.get("is_vendor") and not filters.vendored,
            "generated code": record.get("is_generated") and not filters.generated,
            "too large": (record.get("length_bytes") or 0) > filters.max_bytes,
            "no valid blob_id": not _BLOB_ID.fullmatch(record["blob_id"] or ""),
        }
        faulty = next((fault for fault, found in faults.items() if found), None)
        if reason := _reason_by_path(path, language, languages, filters) or faulty:
            skipped[reason] += 1
            continue
        terms = _joined_licenses(record.get("detected_licenses")) or record.get("license_type")
        file = SourceFile(row["repo_name"] or "", path.as_posix(), language or "", "", terms)
        yield file, record["blob_id"], record.get("src_encoding") or "UTF-8"


def _fetched(
    files: Iterable[tuple[SourceFile, str, str]], url: str, http: Mapping[str, Any], max_bytes: int
) -> Generator[tuple[SourceFile, str, Future[Any]]]:
    """Yield (file, encoding, future of the file's content) in order; start to fetch a few contents in advance."""
    waiting: deque[tuple[SourceFile, str, Future[Any]]] = deque()
    with ExitStack() as stack:  # leaving it cancels pending fetches
        if url.lower().startswith(_HTTP):
            client = stack.enter_context(HTTPClient(max_bytes=max_bytes, follow_redirects=True, **http))
            submit: Callable[[str], Future[Any]] = partial(client.submit, "GET")
        else:
            system, slots = fsspec.url_to_fs(url)[0], Semaphore(http["concurrency"])
            submit = partial(in_daemon_thread, _read_content, system, max_bytes + 1, slots=slots)
            stack.callback(lambda: [future.cancel() for *_, future in waiting])
        for file, blob_id, encoding in files:
            waiting.append((file, encoding, submit(url.replace("{blob_id}", blob_id))))
            if len(waiting) > _AHEAD_PER_THREAD * http["concurrency"]:
                yield waiting.popleft()
        yield from waiting


def _read_content(system: fsspec.AbstractFileSystem, max_bytes: int, url: str) -> bytes:
    """Return at most `max_bytes` bytes of a file; FileNotFoundError for a pipe or device, which may never end."""
    if not isinstance(system, LocalFileSystem):
        return system.cat_file(url, start=0, end=max_bytes)
    if (content := beginning(system._strip_protocol(url), max_bytes)) is None:
        raise FileNotFoundError
    return content
