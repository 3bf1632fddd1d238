"""Read source files of this machine: installed Python distributions, folders of checkouts, zip and tar archives.

Files come in the order of repository and path; in an archive, in the order of its members. Archives are not trusted:
nothing is written to disk; links, devices and paths that lead outside are counted, never followed; members are limited
in size and number, archives in unpacked bytes.
"""

import bz2
import gzip
import lzma
import os
import re
import stat
import struct
import sysconfig
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath, PureWindowsPath
from typing import IO, Any, NamedTuple

from modular_star_encoder.data.languages.registry import check_languages, language_of, language_of_script
from modular_star_encoder.data.sources import (
    CLOSED_FOLDERS,
    FileFilters,
    SourceFile,
    SourceReader,
    is_closed,
)
from modular_star_encoder.data.sources.decoding import decode_source
from modular_star_encoder.data.sources.ignore_files import IgnoreFiles
from modular_star_encoder.utils.errors import UserError

STANDARD_LIBRARY = "python-standard-library"
OWN_DISTRIBUTION = "modular-star-encoder"
CHECKOUT_MARKERS = (".git", "pyproject.toml", "setup.py", "setup.cfg", "__init__.py")


@dataclass(slots=True)
class _Repository:
    """The files to read of one repository, and (path, reason) for each file that is left out before reading."""

    files: list["_File"] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def add(self, file: "_File", filters: FileFilters, inside: str = "", reason: str | None = None) -> None:
        """Add a file to `files`, or to `left_out` with the reason; `inside` is the repository's folder."""
        path = PurePath(file.path)
        # A path that climbs out of site-packages is a script or a data file; `__editable__` files are import hooks.
        if ".." in path.parts or path.name.startswith("__editable__"):
            return
        file = file._replace(path=path.relative_to(inside).as_posix())
        if reason := reason or filters.reason_by_path(path, file.language):
            self.left_out.append((file.path, reason))
        else:
            self.files.append(file)


class _File(NamedTuple):
    """A file to read; `path` is relative to the searched folder at first, and then to the repository's folder."""

    path: str
    location: Path
    language: str


class FileReader(SourceReader):
    """Reads files of this machine; `skip` and `shard` count the repositories with a file to read, sorted by name.

    `skipped_files` lists the files that `skipped` counts, as (path, reason); `guessed_files` lists the files that the
    last iteration read as Latin-1, because they are not UTF-8.
    Files whose path and location `is_known` accepts are left out without being read or counted.
    """

    def __init__(self, repositories: dict[str, _Repository], filters: FileFilters) -> None:
        self._filters = filters
        self.skipped_files: list[tuple[str, str]] = []
        self.guessed_files: list[str] = []
        units = [(name, one) for name, one in sorted(repositories.items()) if one.files]
        units = units or sorted(repositories.items())[:1]
        for one in repositories.values():  # the counts of all shards add up to the counts of the whole
            if not one.files and one is not units[0][1]:
                units[0][1].left_out += one.left_out
        for _, one in units:
            one.files.sort()
        super().__init__(units)
        self.is_known: Callable[[str, Path], bool] | None = None

    def _left_out(self) -> Counter[str]:
        return Counter(reason for _, one in self._chosen() for _, reason in one.left_out)

    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        self.skipped_files = files = [left_out for _, one in self._chosen() for left_out in one.left_out]
        self.guessed_files = guessed = []
        for repository, one in self._chosen():
            for path, location, language in one.files:
                if self.is_known is not None and self.is_known(path, location):
                    continue
                content, reason = self._content(location)
                text, reason = ("", reason) if reason else self._filters.decode(content)
                if reason:
                    skipped[reason] += 1
                    files.append((path, reason))
                    continue
                if self._filters.any_encoding and not content.isascii() and decode_source(content)[1] is None:
                    guessed.append(path)
                yield SourceFile(repository, path, language, text)

    def _content(self, location: Path) -> tuple[bytes, str | None]:
        """Return (bytes, None), or (b"", why the file is not read)."""
        try:
            status = location.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would be read for ever
                return b"", "unreadable"
            if status.st_size > self._filters.max_bytes:
                return b"", "too large"
            with location.open("rb") as file:
                return file.read(self._filters.max_bytes + 1), None  # it may have grown since
        except OSError:
            return b"", "unreadable"

    def __length_hint__(self) -> int:
        return sum(len(one.files) for _, one in self._chosen())


def installed_repositories(
    exclude: str | Collection[str] = ("transformers",),
    *,
    languages: Iterable[str] | None = ("python",),
    filters: FileFilters | None = None,
) -> FileReader:
    """Return a reader of the code of this Python environment's distributions, except `exclude` and this package.

    Every distribution is a repository, under its normalised name (PEP 503), and so is `python-standard-library`.
    """
    from importlib import metadata  # here, because a search reads folders only

    excluded = [exclude] if isinstance(exclude, str) else exclude
    seen = {_normalised_name(name) for name in (*excluded, OWN_DISTRIBUTION)}
    chosen, filters = set(check_languages(languages)), filters or FileFilters()
    repositories: defaultdict[str, _Repository] = defaultdict(_Repository)
    for distribution in metadata.distributions():
        name = _normalised_name(distribution.name or "")
        # The first on sys.path is the one that Python imports; a distribution without a name is a broken install.
        if name and name not in seen:
            seen.add(name)
            for file in distribution.files or []:
                if (language := language_of(file)) in chosen:
                    found = _File(file.as_posix(), Path(str(distribution.locate_file(file))), str(language))
                    repositories[name].add(found, filters)
    if STANDARD_LIBRARY not in seen:
        for found, _ in _source_files(Path(sysconfig.get_path("stdlib")), chosen):
            repositories[STANDARD_LIBRARY].add(found, filters)
    return FileReader(repositories, filters)


def folder_repositories(
    folder: str | os.PathLike[str],
    *,
    languages: Iterable[str] | None = None,
    depth: int | None = None,
    filters: FileFilters | None = None,
    may_be_empty: bool = False,
    obey_ignore_files: bool = False,
) -> FileReader:
    """Return a reader of the code under `folder`.

    With `depth`, repositories are the folders `depth` levels down, named by their path (`"a/b"` at depth 2; a file
    directly in `a` belongs to `"a"`, one directly in `folder` to `"."`); at depth 0 the folder is the repository. The
    default depth is 1, or 0 if the folder holds one of `CHECKOUT_MARKERS`. Symbolic links are not followed. Hidden
    folders, virtual environments and `CLOSED_FOLDERS` are not entered. With `obey_ignore_files`, what git ignores is
    not read, scripts without a suffix are, and links and folders that can't be read count as left out.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError("data.source.missing", f"{os.fspath(folder)!r} {what}; pass a folder of repositories.")
    if depth is None:
        depth = 0 if any((root / marker).exists() for marker in CHECKOUT_MARKERS) else 1
    elif depth < 0:
        raise UserError("data.folder.depth", f"`depth` must be 0 or more, not {depth}.")
    chosen, filters = check_languages(languages), filters or FileFilters()
    repositories: defaultdict[str, _Repository] = defaultdict(_Repository)
    for file, reason in _source_files(root, set(chosen), obey_ignore_files):
        name = "/".join(PurePath(file.path).parts[:-1][:depth]) if depth else root.name
        # Filters see the whole path, so that a folder `tests` next to the sources is not a repository.
        repositories[name or "."].add(file, filters, inside=name if depth else "", reason=reason)
    if not may_be_empty and not any(one.files for one in repositories.values()):
        left_out = Counter(reason for one in repositories.values() for _, reason in one.left_out)
        aside = ", ".join(f"{count} left out as {reason}" for reason, count in sorted(left_out.items()))
        what = chosen[0].capitalize() if len(chosen) == 1 else "source"
        message = f"{os.fspath(folder)!r} holds no {what} file to read{f' ({aside})' if aside else ''}."
        raise UserError("data.source.no_files", message)
    return FileReader(repositories, filters)


def _normalised_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _source_files(root: Path, languages: set[str], obey: bool = False) -> Iterator[tuple[_File, str | None]]:
    """Yield every source file, with a path relative to `root`, and why it is left out; no symbolic link is followed.

    `obey` and the reasons: see `folder_repositories`.
    """
    ignored = IgnoreFiles(root) if obey else None
    closed: list[OSError] = []
    for parent, folders, files in os.walk(root, onerror=closed.append):
        if "pyvenv.cfg" in files:  # a virtual environment, whatever its name
            folders.clear()
            continue
        folders[:] = [
            name
            for name in folders
            if not (name.startswith(".") or name in CLOSED_FOLDERS)
            and not (ignored and ignored.ignores(os.path.join(parent, name), is_folder=True))
        ]
        for name in files:
            location = Path(parent, name)
            language = language_of(location) or (_language_of_script(location) if obey else None)
            if language not in languages or (ignored and ignored.ignores(str(location), is_folder=False)):
                continue
            # Unlike Path.is_symlink, this raises nothing where a folder may be listed but not entered.
            is_link = os.path.islink(location)
            if obey or not is_link:
                path = location.relative_to(root).as_posix()
                yield _File(path, location, str(language)), "symbolic link" if is_link else None
    for error in closed if obey else ():
        yield _File(Path(error.filename).relative_to(root).as_posix(), Path(error.filename), ""), "unreadable folder"


def _language_of_script(location: Path) -> str | None:
    """Return the language that the first line of a file without a suffix names, or None."""
    if location.suffix or location.name.startswith("."):
        return None
    try:
        if not stat.S_ISREG(location.lstat().st_mode):
            return None
        with location.open("rb") as file:
            return language_of_script(file.read(_SHEBANG_BYTES))
    except OSError:
        return None


_SHEBANG_BYTES = 128


ZIP_SUFFIXES = (".zip", ".whl", ".jar")
TAR_OPENERS: dict[str, Callable[..., Any]] = {
    ".tar": lambda file: file,
    **dict.fromkeys((".tar.gz", ".tgz"), gzip.open),
    **dict.fromkeys((".tar.bz2", ".tbz2"), bz2.open),
    **dict.fromkeys((".tar.xz", ".txz"), lzma.open),
}
ARCHIVE_SUFFIXES = (*ZIP_SUFFIXES, *TAR_OPENERS)

_HEADER_BYTES = 1_000_000  # long names and attributes; tarfile reads each into memory
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_HEADER_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *_LONG_NAMES)
_DIRECTORY_BYTES_PER_MEMBER = 512
# RuntimeError: encrypted members, unknown compression.
_PLAIN_ERRORS = (OSError, EOFError, RuntimeError, ValueError, LookupError, struct.error, zlib.error)
BROKEN_ARCHIVE = (*_PLAIN_ERRORS, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)
_TOO_MANY, _TOO_LARGE = "rest of an archive with too many members", "rest of an archive that unpacks to too many bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveLimits:
    """Limits how much of one archive is read."""

    max_members: int = 200_000  # later members are not read
    max_bytes: int = 8_000_000_000  # unpacked; in a zip, only of the members that are read


class ArchiveLimitError(Exception):
    """Raised if an archive exceeds a limit; its message is the reason that `skipped` counts."""


class _Budget:
    """Counts down how much may still be read of an archive."""

    def __init__(self, left: int, reason: str) -> None:
        self._left, self._reason = left, reason

    def spend(self, amount: int) -> None:
        """Subtract `amount`; raise ArchiveLimitError with the budget's reason if it is more than what is left."""
        self._left -= amount
        if self._left < 0:
            raise ArchiveLimitError(self._reason)


class Member(NamedTuple):
    """A member of an archive."""

    name: str
    kind: str  # "file", "folder" or "other" (links, devices)
    size: int
    read: Callable[[int], bytes]


def archive_members(location: Path, limits: ArchiveLimits) -> Iterator[Member]:
    """Yield the members of an archive in their order; each can be read until the next is requested.

    Raises ArchiveLimitError beyond a limit, and an error of BROKEN_ARCHIVE if the archive is damaged.
    """
    members = _zip_members if _archive_suffix(location) in ZIP_SUFFIXES else _tar_members
    budget = _Budget(limits.max_members, _TOO_MANY)
    for member in members(location, limits):
        budget.spend(1)
        yield member


def _archive_suffix(path: Path) -> str:
    return next((suffix for suffix in ARCHIVE_SUFFIXES if path.name.lower().endswith(suffix)), "")


class _LimitedFile:
    """Wraps the file that tarfile or zipfile reads, so that they read no more bytes than a budget has left."""

    def __init__(self, file: IO[bytes], budget: _Budget | None) -> None:
        self._file, self.budget = file, budget

    def read(self, size: int = -1) -> bytes:
        if self.budget is not None:
            self.budget.spend(max(size, 0))
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _zip_members(location: Path, limits: ArchiveLimits) -> Iterator[Member]:
    unpacked = _Budget(limits.max_bytes, _TOO_LARGE)

    def read(info: zipfile.ZipInfo, size: int) -> bytes:
        with archive.open(info) as file:
            content = file.read(size)
        unpacked.spend(len(content))
        return content

    with location.open("rb") as file:
        # zipfile reads the whole directory at once.
        raw: Any = _LimitedFile(file, _Budget(limits.max_members * _DIRECTORY_BYTES_PER_MEMBER, _TOO_MANY))
        with zipfile.ZipFile(raw) as archive:
            raw.budget = None
            for info in archive.infolist():
                is_file = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
                kind = "folder" if info.is_dir() else "file" if is_file else "other"
                yield Member(info.filename, kind, info.file_size, partial(read, info))


class _TarInfo(tarfile.TarInfo):
    """A tar header that raises ArchiveLimitError if it announces a huge name or attributes, before it is read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_TarInfo":
        info = super().frombuf(buf, encoding, errors)
        if info.size > _HEADER_BYTES and info.type in _HEADER_TYPES:
            raise ArchiveLimitError("rest of an archive with huge headers")
        return info


def _tar_members(location: Path, limits: ArchiveLimits) -> Iterator[Member]:
    opener = TAR_OPENERS[_archive_suffix(location)]
    with location.open("rb") as raw, opener(raw) as unpacked:
        file: Any = _LimitedFile(unpacked, _Budget(limits.max_bytes, _TOO_LARGE))
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_TarInfo) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
                kind = "file" if info.isreg() and not info.issparse() else "folder" if info.isdir() else "other"
                content = archive.extractfile(info) if kind == "file" else None
                yield Member(info.name, kind, info.size, content.read if content else bytes)


class ArchiveReader(SourceReader):
    """Reads archives; each is one repository; `skip` and `shard` count them, sorted by name."""

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
                    path = PurePath(member.name)
                    text, reason = self._text(member, path)
                    if reason:
                        skipped[reason] += 1
                    elif text:
                        yield SourceFile(repository, path.as_posix(), language_of(path) or "", text)
            except ArchiveLimitError as reason:
                skipped[str(reason)] += 1
            except BROKEN_ARCHIVE:
                skipped["rest of a damaged archive"] += 1

    def _text(self, member: Member, path: PurePath) -> tuple[str, str | None]:
        """Return (text, None) or ("", why a member is left out), or ("", None) if it is not a source file."""
        if member.kind == "folder":
            return "", None
        if member.kind == "other":
            return "", "link or device"
        # The path is absolute or climbs out of the archive, on this system or on Windows.
        windows = PureWindowsPath(member.name)
        if windows.anchor or ".." in windows.parts or "\0" in member.name:
            return "", "unsafe path"
        language = language_of(path)
        if language not in self._languages or is_closed(path):
            return "", None
        if reason := self._filters.reason_by_path(path, language):
            return "", reason
        if member.size > self._filters.max_bytes:
            return "", "too large"
        try:
            # One byte more than allowed: the size that an archive declares may be wrong.
            content = member.read(self._filters.max_bytes + 1)
        except BROKEN_ARCHIVE:  # an encrypted or damaged member; the next may be readable
            return "", "unreadable"
        return self._filters.decode(content)


def archive_repositories(
    source: str | os.PathLike[str],
    *,
    languages: Iterable[str] | None = None,
    filters: FileFilters | None = None,
    limits: ArchiveLimits | None = None,
) -> ArchiveReader:
    """Return a reader of one archive, or of all archives (files with one of `ARCHIVE_SUFFIXES`) under a folder.

    Each archive is a repository, named by its path in the folder, without the suffix. Symbolic links are not followed.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if not path.is_symlink()}
    else:
        files = {root.name: root}
    found = {name: path for name, path in files.items() if _archive_suffix(path) and path.is_file()}
    if not found:
        message = f"{os.fspath(source)!r} is no archive and no folder that holds one. An archive is a file with one of "
        raise UserError("data.source.no_files", f"{message}the suffixes {', '.join(ARCHIVE_SUFFIXES)}.")
    short = {name: name[: -len(_archive_suffix(path))] for name, path in found.items()}
    counts = Counter(short.values())
    archives = [(name if counts[short[name]] > 1 else short[name], path) for name, path in found.items()]
    return ArchiveReader(archives, check_languages(languages), filters or FileFilters(), limits or ArchiveLimits())
