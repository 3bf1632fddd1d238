"""The members of zip and tar archives one after the other, with bounds on what an archive can make the reader do."""

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ZIP_SUFFIXES = (".zip", ".whl", ".jar")
TAR_OPENERS: dict[str, Callable[[Any], IO[bytes]]] = {
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
        max_members: Later members are not looked at.
        max_bytes: Reading stops when the archive has unpacked to so many bytes (of a zip, only the members read count).
    """

    max_members: int = 200_000
    max_bytes: int = 8_000_000_000

    def __post_init__(self) -> None:
        """Check the figures.

        Raises:
            ValueError: If one is not positive.
        """
        if min(self.max_members, self.max_bytes) < 1:
            raise ValueError("The bounds of ArchiveLimits must be positive.")


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
    """Return the suffix that tells the kind of archive, or an empty string."""
    return next((suffix for suffix in ARCHIVE_SUFFIXES if path.name.lower().endswith(suffix)), "")


def archive_members(location: Path, limits: ArchiveLimits) -> Iterator[Member]:
    """Yield the members of an archive in their order; each can be read until the next is asked for.

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
    """A zip file that refuses to be read in huge pieces: zipfile reads the whole directory at once."""

    largest: int | None = None

    def read(self, size: int = -1, /) -> bytes:
        if self.largest is not None and size > self.largest:
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
                    lambda size, info=info: read(info, size),
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
    """A header; one that announces a long name or attributes of a huge size is refused before these are read."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_TarInfo":
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
            yield Member(info.name, kind, info.size, lambda size, info=info: _extract(archive, info, size))


def _extract(archive: tarfile.TarFile, info: tarfile.TarInfo, size: int) -> bytes:
    file = archive.extractfile(info)
    return file.read(size) if file else b""
