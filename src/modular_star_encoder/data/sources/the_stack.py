"""The Stack v2 as published: rows list the files of a repository; the contents are fetched from elsewhere.

`bigcode/the-stack-v2-train-smol-ids` and `-full-ids` have one row a repository, with `repo_name` and `files`, a list of
records with `blob_id`, `path`, `language`, `src_encoding`, `length_bytes`, `is_vendor`, `is_generated`,
`detected_licenses` and `license_type`. Contents lie gzip-compressed in the bucket of Software Heritage, at
`s3://softwareheritage/content/{blob_id}`; bulk access asks for an agreement with Software Heritage and Inria, and is
the user's own. Source: the dataset cards, and Lozhkov et al., 2024 (arXiv 2402.19173).
"""

import os
import re
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import datasets
import fsspec
from tqdm.auto import tqdm

from modular_star_encoder.data.sources.dataset_rows import DatasetReader, joined_licenses, open_rows
from modular_star_encoder.data.sources.source_files import FileFilters, SourceFile, check_languages, language_named

SOFTWARE_HERITAGE_S3 = "s3://softwareheritage/content/{blob_id}"
"""Needs `s3fs`, and credentials where that looks for them."""

_BLOB_ID = re.compile(r"[0-9a-f]{40}")
_GZIP_MAGIC = b"\x1f\x8b"
_AHEAD_PER_THREAD = 4
_GZIP_OVERHEAD = 65_536
_HTTP = ("http", "https")
_NOT_AVAILABLE = (FileNotFoundError, PermissionError)
_NOT_AVAILABLE_STATUS = (401, 403, 404, 410)
_MAX_FAILURES_AT_FIRST = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentSource:
    """Where and how contents are fetched.

    Attributes:
        url: URL with `{blob_id}` in it: http, https, or any protocol that fsspec knows (s3, file). It is never printed,
            as it may hold a signature.
        threads: Number of contents fetched at the same time.
        attempts: How often a fetch is tried; a content that does not exist or is forbidden is asked for once.
        pause: Seconds before the second attempt; twice as many before each further one.
        timeout: Seconds without an answer after which an attempt has failed; http and https only.
        options: Options of fsspec's file system, such as `{"anon": True}` for s3; not for http and https.
    """

    url: str
    threads: int = 16
    attempts: int = 4
    pause: float = 0.5
    timeout: float = 30.0
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If the URL lacks `{blob_id}` or its protocol cannot be used, or a number is out of range.
        """
        if "{blob_id}" not in self.url:
            raise ValueError("The URL of contents must hold {blob_id}, as SOFTWARE_HERITAGE_S3 does.")
        if self.threads < 1 or self.attempts < 1 or self.pause < 0 or self.timeout <= 0:
            raise ValueError("threads and attempts must be at least 1, pause at least 0, and timeout above 0.")
        try:
            if self.protocol not in _HTTP:
                fsspec.get_filesystem_class(self.protocol)
        except (ImportError, ValueError) as error:
            raise ValueError(f"Contents cannot be fetched by {self.protocol!r}: {str(error).rstrip('.')}.") from error

    @property
    def protocol(self) -> str:
        """The URL's protocol; "file" if it names none."""
        return urlsplit(self.url).scheme or "file"

    def fetch(self, blob_id: str, max_bytes: int) -> bytes:
        """Return the bytes of a content as stored; of more than `max_bytes`, no more than that by http.

        Raises:
            LookupError: If it does not exist or is forbidden.
            OSError: If it could not be fetched in any attempt. Messages name the kind of error only.
        """
        url = self.url.replace("{blob_id}", blob_id)
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return self._get(url, max_bytes)
            except Exception as error:  # every protocol raises kinds of its own
                if isinstance(error, _NOT_AVAILABLE) or getattr(error, "code", None) in _NOT_AVAILABLE_STATUS:
                    raise LookupError(_kind(error)) from None
                last = _kind(error)
        raise OSError(last)

    def _get(self, url: str, max_bytes: int) -> bytes:
        if self.protocol in _HTTP:  # fsspec would need aiohttp for these, and ask for the size first
            with urlopen(url, timeout=self.timeout) as answer:  # noqa: S310  the protocol was looked at
                return answer.read(max_bytes)
        file_system, _ = fsspec.url_to_fs(self.url, **self.options or {})
        return file_system.cat_file(url)


def _kind(error: Exception) -> str:
    """Return what can be said of an error without its message, which may hold the URL."""
    code = getattr(error, "code", None)
    return f"{type(error).__name__}{f' {code}' if code else ''}"


def unpack(content: bytes, max_bytes: int) -> bytes:
    """Return `content` without its gzip compression, if it has one; at most `max_bytes` + 1 bytes.

    Raises:
        zlib.error: If the compressed data is damaged.
    """
    if not content.startswith(_GZIP_MAGIC):
        return content[: max_bytes + 1]
    unpacker = zlib.decompressobj(wbits=31)
    unpacked = unpacker.decompress(content, max_bytes + 1)
    if not unpacker.eof and len(unpacked) <= max_bytes:
        raise zlib.error("incomplete")
    return unpacked


class TheStackReader(DatasetReader):
    """Reads rows with lists of files, whose contents are fetched ahead in a few threads; its units are repositories."""

    def __init__(
        self,
        rows: datasets.IterableDataset,
        contents: ContentSource,
        *,
        languages: Iterable[str] | None = None,
        filters: FileFilters | None = None,
        progress: bool = True,
    ) -> None:
        """See `the_stack_repositories`."""
        super().__init__(rows, languages, filters)
        self._contents = contents
        self._progress = progress

    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        fetched = 0
        files = (file for row in self._chosen_rows() for file in self._wanted(row, skipped))
        bar = tqdm(desc="Fetching contents", unit=" files", disable=not self._progress)
        with bar:
            for file, encoding, future in self._fetched(files):
                text = ""
                try:
                    content = future.result()
                except LookupError as error:
                    reason, last = "content missing or forbidden", error
                except OSError as error:
                    reason, last = "content not fetched", error
                else:
                    fetched += 1
                    text, reason = self._decode(content, encoding)
                bar.update()
                if reason:
                    skipped[reason] += 1
                else:
                    yield SourceFile(file.repository, file.path, file.language, text, file.license)
                # A wrong URL or missing access should not be noticed after a week of skipping.
                if not fetched and sum(map(skipped.__getitem__, _FETCH_REASONS)) >= _MAX_FAILURES_AT_FIRST:
                    raise ValueError(
                        f"None of the first {_MAX_FAILURES_AT_FIRST} contents could be fetched by "
                        f"{self._contents.protocol} (the last: {last}); check the URL and your access to it."
                    )

    def _wanted(self, row: dict[str, Any], skipped: Counter[str]) -> Iterator[tuple[SourceFile, str, str]]:
        """Yield (file without its text, blob, encoding) of the files of a row to fetch."""
        for record in row["files"] or ():
            path = PurePath((record["path"] or "").lstrip("/"))
            language = language_named(record["language"])
            reason = self._reason(path, language)
            if not reason and record.get("is_vendor") and not self._filters.vendored:
                reason = "vendored code"
            if not reason and record.get("is_generated") and not self._filters.generated:
                reason = "generated code"
            if not reason and (record.get("length_bytes") or 0) > self._filters.max_bytes:
                reason = "too large"
            if not reason and not _BLOB_ID.fullmatch(record["blob_id"] or ""):
                reason = "no valid blob_id"
            if reason:
                skipped[reason] += 1
                continue
            terms = joined_licenses(record.get("detected_licenses")) or record.get("license_type")
            file = SourceFile(row["repo_name"] or "", path.as_posix(), language or "", "", terms)
            yield file, record["blob_id"], record.get("src_encoding") or "UTF-8"

    def _fetched(self, files: Iterable[tuple[SourceFile, str, str]]) -> Iterator[tuple[SourceFile, str, Future[bytes]]]:
        """Yield (file, encoding, its content) in order; only a few are fetched ahead."""
        executor = ThreadPoolExecutor(self._contents.threads)
        largest = self._filters.max_bytes + _GZIP_OVERHEAD
        waiting: deque[tuple[SourceFile, str, Future[bytes]]] = deque()
        try:
            for file, blob_id, encoding in files:
                waiting.append((file, encoding, executor.submit(self._contents.fetch, blob_id, largest)))
                if len(waiting) > _AHEAD_PER_THREAD * self._contents.threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            executor.shutdown(cancel_futures=True)

    def _decode(self, content: bytes, encoding: str) -> tuple[str, str | None]:
        try:
            unpacked = unpack(content, self._filters.max_bytes)
        except zlib.error:
            return "", "damaged content"
        return self._filters.decode(unpacked, encoding)


_FETCH_REASONS = ("content missing or forbidden", "content not fetched")


def the_stack_repositories(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    contents: ContentSource,
    *,
    languages: Iterable[str] | None = None,
    filters: FileFilters | None = None,
    progress: bool = True,
    **options: Any,
) -> TheStackReader:
    """Return a reader of The Stack v2, repository by repository, in the order of its rows.

    Files that cannot be fetched are counted in `skipped` and left out, but if none of the first 200 can be fetched,
    iterating raises a ValueError.

    Args:
        source: Name of the dataset, such as `"bigcode/the-stack-v2-train-smol-ids"`, or parquet files with its schema.
        contents: Where contents are fetched, such as `ContentSource(url=SOFTWARE_HERITAGE_S3)`.
        languages: The languages to read; None for all of `LANGUAGES`.
        filters: Which files are left out; by default, `FileFilters()`.
        progress: Whether to show a progress bar while reading.
        options: Further arguments of `open_rows`.

    Raises:
        ValueError: If the dataset cannot be opened or lacks a column, or a language is unknown.
    """
    check_languages(languages)
    rows = open_rows(source, columns=("repo_name", "files"), **options)
    return TheStackReader(rows, contents, languages=languages, filters=filters, progress=progress)
