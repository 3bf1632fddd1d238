"""Source files out of zip and tar archives, member by member; nothing is written to disk.

Archives are of unknown origin. Links, devices and members whose path leads outside are counted, never followed; the
size of members, their number and the number of bytes that an archive may unpack to are limited.
"""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath, PureWindowsPath
from typing import IO, Any

from modular_star_encoder.data.languages.registry import check_languages, language_of
from modular_star_encoder.data.sources.source_files import FileFilters, SourceFile, SourceReader, is_closed
from modular_star_encoder.utils.errors import UserError

ZIP_SUFFIXES = (".zip", ".whl", ".jar")
TAR_OPENERS: dict[str, Callable[..., Any]] = {
    ".tar": lambda file: file,
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
}
ARCHIVE_SUFFIXES = (*ZIP_SUFFIXES, *TAR_OPENERS)

_HEADER_BYTES = 1_000_000  # long names and attributes; tarfile reads each into memory
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_DIRECTORY_BYTES_PER_MEMBER = 512
BROKEN_ARCHIVE = (
    OSError,
    EOFError,
    RuntimeError,  # encrypted members, unknown compression
    ValueError,
    LookupError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveLimits:
    """How much of one archive is read.

    Attributes:
        max_members: Later members are not read.
        max_bytes: Reading stops when the archive has unpacked to so many bytes (of a zip, only the members read count).

    Raises:
        UserError: `data.archive.limits` if one is not positive.
    """

    max_members: int = 200_000
    max_bytes: int = 8_000_000_000

    def __post_init__(self) -> None:
        if min(self.max_members, self.max_bytes) < 1:
            raise UserError("data.archive.limits", f"The limits of archives must be positive, not {self}.")


class ArchiveLimitError(Exception):
    """The archive exceeds a limit; the message is the reason that is counted."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive: `kind` is "file", "folder" or "other" (links, devices)."""

    name: str
    kind: str
    size: int
    read: Callable[[int], bytes]


def archive_suffix(path: Path) -> str:
    """The suffix of a known kind of archive, or an empty string."""
    return next((suffix for suffix in ARCHIVE_SUFFIXES if path.name.lower().endswith(suffix)), "")


def archive_members(location: Path, limits: ArchiveLimits) -> Iterator[Member]:
    """Yield the members of an archive in their order; each can be read until the next is requested.

    Raises:
        ArchiveLimitError: If it exceeds a limit.
        BROKEN_ARCHIVE: One of these, if it is damaged.
    """
    members = _zip_members if archive_suffix(location) in ZIP_SUFFIXES else _tar_members
    for number, member in enumerate(members(location, limits)):
        if number == limits.max_members:
            raise ArchiveLimitError("rest of an archive with too many members")
        yield member


class _ZipBytes(io.FileIO):
    """A zip file with a limit for one read: zipfile reads the whole directory at once."""

    largest: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self.largest is not None and (size or 0) > self.largest:
            raise ArchiveLimitError("rest of an archive with too many members")
        return super().read(size) or b""


def _zip_members(location: Path, limits: ArchiveLimits) -> Iterator[Member]:
    with _ZipBytes(location) as raw:
        raw.largest = limits.max_members * _DIRECTORY_BYTES_PER_MEMBER
        unpacked = 0

        def read(info: zipfile.ZipInfo, size: int) -> bytes:
            nonlocal unpacked
            with archive.open(info) as file:
                content = file.read(size)
            unpacked += len(content)
            if unpacked > limits.max_bytes:
                raise ArchiveLimitError("rest of an archive that unpacks to too many bytes")
            return content

        with zipfile.ZipFile(raw) as archive:
            raw.largest = None
            for info in archive.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                is_file = kind in (0, stat.S_IFREG)
                yield Member(
                    info.filename,
                    "folder" if info.is_dir() else "file" if is_file else "other",
                    info.file_size,
                    partial(read, info),
                )


class _TarBytes:
    """The unpacked bytes of a tar file, up to a limit."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ArchiveLimitError("rest of an archive that unpacks to too many bytes")
        return content


class _TarInfo(tarfile.TarInfo):
    """A header; if it announces a huge name or huge attributes, ArchiveLimitError comes before these are read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_TarInfo":
        info = super().frombuf(buf, encoding, errors)
        if info.size > _HEADER_BYTES and info.type in _HEADER_TYPES:
            raise ArchiveLimitError("rest of an archive with huge headers")
        return info


def _tar_members(location: Path, limits: ArchiveLimits) -> Iterator[Member]:
    opener = TAR_OPENERS[archive_suffix(location)]
    with (
        location.open("rb") as raw,
        opener(raw) as unpacked,
        tarfile.open(fileobj=_TarBytes(unpacked, limits.max_bytes), mode="r|", tarinfo=_TarInfo) as archive,  # type: ignore[call-overload]
    ):
        while (info := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep every header
            kind = "file" if info.isreg() and not info.issparse() else "folder" if info.isdir() else "other"
            yield Member(info.name, kind, info.size, partial(_extract, archive, info))


def _extract(archive: tarfile.TarFile, info: tarfile.TarInfo, size: int) -> bytes:
    file = archive.extractfile(info)
    return file.read(size) if file else b""


class ArchiveReader(SourceReader):
    """Reads archives; its units are the archives, each of them a repository, sorted by name.

    The files of an archive come in the order of its members.
    """

    def __init__(
        self,
        archives: Iterable[tuple[str, Path]],
        languages: tuple[str, ...],
        filters: FileFilters,
        limits: ArchiveLimits,
    ) -> None:
        super().__init__(sorted(archives))
        self._languages, self._filters, self._limits = languages, filters, limits

    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        for repository, location in self._chosen():
            try:
                for member in archive_members(location, self._limits):
                    file = self._file(repository, member, skipped)
                    if file:
                        yield file
            except ArchiveLimitError as reason:
                skipped[str(reason)] += 1
            except BROKEN_ARCHIVE:
                skipped["rest of a damaged archive"] += 1

    def _file(self, repository: str, member: Member, skipped: Counter[str]) -> SourceFile | None:
        if member.kind == "folder":
            return None
        path = PurePath(member.name)
        language = language_of(path)
        reason = "link or device" if member.kind == "other" else "unsafe path" if _leads_outside(member.name) else None
        if not reason and (language not in self._languages or is_closed(path)):
            return None
        reason = reason or self._filters.reason_by_path(path, language or "")
        if not reason and member.size > self._filters.max_bytes:
            reason = "too large"
        text = ""
        if not reason:
            try:
                # One byte more than allowed: the size that an archive declares may be wrong.
                content = member.read(self._filters.max_bytes + 1)
            except BROKEN_ARCHIVE:  # an encrypted or damaged member; the next may be readable
                reason = "unreadable"
            else:
                text, reason = self._filters.decode(content)
        if reason:
            skipped[reason] += 1
            return None
        return SourceFile(repository, path.as_posix(), language or "", text)


def archive_repositories(
    source: str | os.PathLike[str],
    *,
    languages: Iterable[str] | None = None,
    filters: FileFilters | None = None,
    limits: ArchiveLimits | None = None,
) -> ArchiveReader:
    """A reader of one archive, or of every archive under a folder; each is one repository.

    Zip files (`.zip`, `.whl`, `.jar`) and tar files (`.tar`, also with `.gz`, `.bz2`, `.xz`, `.tgz` and the like) are
    read. A repository has the name of its file, without the suffix; in a folder, its path from there. Symbolic links
    are not followed.

    Args:
        source: An archive or a folder of archives.
        languages: The languages to read; None for all of `LANGUAGES`.
        filters: Which files are left out; by default, `FileFilters()`.
        limits: How much of an archive is read at most; by default, `ArchiveLimits()`.

    Raises:
        UserError: `data.source.missing` if `source` does not exist; `data.source.no_files` if it is not an archive and
            holds none; `data.language.unknown`.
    """
    root = Path(source).expanduser()
    if not root.exists():
        message = f"{os.fspath(source)!r} does not exist; pass an archive or a folder of archives."
        raise UserError("data.source.missing", message)
    if root.is_dir():
        found = [path for path in root.rglob("*") if archive_suffix(path) and path.is_file() and not path.is_symlink()]
        names = [path.relative_to(root).as_posix() for path in found]
    else:
        found, names = [root] if archive_suffix(root) else [], [root.name]
    if not found:
        message = f"{os.fspath(source)!r} holds no archive with one of the suffixes {', '.join(ARCHIVE_SUFFIXES)}."
        raise UserError("data.source.no_files", message)
    short = [name[: -len(archive_suffix(path))] for name, path in zip(names, found, strict=True)]
    counts = Counter(short)
    unique = [name if counts[brief] > 1 else brief for name, brief in zip(names, short, strict=True)]
    return ArchiveReader(
        zip(unique, found, strict=True), check_languages(languages), filters or FileFilters(), limits or ArchiveLimits()
    )


def _leads_outside(name: str) -> bool:
    """Whether a member's path is absolute or climbs, read as that of this system or of Windows."""
    windows = PureWindowsPath(name)
    return bool(windows.anchor) or ".." in windows.parts or "\0" in name
