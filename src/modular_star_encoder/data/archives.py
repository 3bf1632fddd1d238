"""Source files out of zip and tar archives, member by member: nothing is ever written to disk.

An archive is material of unknown origin. Links, devices and members whose path leads outside are counted, never
followed; the size of members, their number and the number of bytes that an archive may unpack to are bounded.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath, PureWindowsPath

from modular_star_encoder.data.archive_members import (
    ARCHIVE_SUFFIXES,
    BROKEN_ARCHIVE,
    ArchiveLimitError,
    ArchiveLimits,
    Member,
    archive_members,
    archive_suffix,
)
from modular_star_encoder.data.file_filters import FileFilters, is_closed
from modular_star_encoder.data.source_files import SourceFile, SourceReader, check_languages, language_of


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
        super().__init__()
        self._units = tuple(sorted(archives))
        self._languages, self._filters, self._limits = languages, filters, limits
        self.repositories = tuple(name for name, _ in self._units)

    def _window(self, start: int, step: int) -> "ArchiveReader":
        reader = super()._window(start, step)
        reader.repositories = tuple(name for name, _ in reader._chosen(reader._units))
        return reader

    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        for repository, location in self._chosen(self._units):
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
                # One byte more than allowed: the size that an archive declares may be a lie.
                content = member.read(self._filters.max_bytes + 1)
            except BROKEN_ARCHIVE:  # a member that is encrypted or damaged; the next may be sound
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
    """Return a reader of one archive, or of every archive under a folder; each is one repository.

    Zip files (`.zip`, `.whl`, `.jar`) and tar files (`.tar`, also with `.gz`, `.bz2`, `.xz`, `.tgz` and the like) are
    read. A repository has the name of its file, without the suffix; in a folder, its path from there. Symbolic links
    are not followed.

    Args:
        source: An archive or a folder of archives.
        languages: The languages to read; None for all of `LANGUAGES`.
        filters: Which files are left out; by default, `FileFilters()`.
        limits: How much of an archive is read at most; by default, `ArchiveLimits()`.

    Raises:
        ValueError: If `source` does not exist, is no archive or holds none, or a language is unknown.
    """
    root = Path(source).expanduser()
    if not root.exists():
        raise ValueError(f"{os.fspath(source)!r} does not exist; pass an archive or a folder of archives.")
    if root.is_dir():
        found = [path for path in root.rglob("*") if archive_suffix(path) and path.is_file() and not path.is_symlink()]
        names = [path.relative_to(root).as_posix() for path in found]
    else:
        found, names = [root] if archive_suffix(root) else [], [root.name]
    if not found:
        raise ValueError(f"{os.fspath(source)!r} holds no archive; known are {', '.join(ARCHIVE_SUFFIXES)}.")
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
