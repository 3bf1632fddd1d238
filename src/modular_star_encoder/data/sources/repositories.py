"""Read source files on this machine: installed Python distributions, folders, and untrusted archives."""

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
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath, PureWindowsPath
from typing import IO, Any, NamedTuple

from modular_star_encoder.data.languages.registry import check_languages, language_of, language_of_script
from modular_star_encoder.data.sources import FileFilters, SourceFile, SourceReader, decode_source, is_closed
from modular_star_encoder.data.sources.ignore_files import IgnoreFiles, beginning
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import MAX_FOLDER_DEPTH, files_below, user_path

STANDARD_LIBRARY = "python-standard-library"
OWN_DISTRIBUTION = "modular-star-encoder"
CHECKOUT_MARKERS = (".git", "pyproject.toml", "setup.py", "setup.cfg", "__init__.py")


class SourcePath(NamedTuple):
    """A file to read; `path` is relative to the repository's folder."""

    repository: str
    path: str
    location: Path
    language: str


_Found = Iterable[tuple[SourcePath, str | None]]  # pairs (file, why it is left out before reading, or None)


class FileReader(SourceReader):
    """Reads source files of this machine, sorted by repository and path.

    Attributes:
        skipped_files: (path, reason) of each file that the last iteration left out.
        guessed_files: paths of the files that the last iteration read as Latin-1, because they are not UTF-8.
        is_known: None, or a function (path, location) → bool. If it returns True, the file is neither read nor counted.
    """

    def __init__(self, found: _Found, filters: FileFilters, *, links: bool = False) -> None:
        self._filters, self._links, found = filters, links, list(found)
        self._files = sorted(file for file, reason in found if not reason)
        self._left_out = [(file.path, reason) for file, reason in found if reason]
        self.skipped_files, self.guessed_files = list(self._left_out), list[str]()
        self.is_known: Callable[[str, Path], bool] | None = None
        super().__init__(self._read_files, tuple(dict.fromkeys(file.repository for file in self._files)))

    def _read_files(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        skipped.update(reason for _, reason in self._left_out)
        self.skipped_files, self.guessed_files = files, guessed = list(self._left_out), list[str]()
        for repository, path, location, language in self._files:
            if self.is_known is not None and self.is_known(path, location):
                continue
            content = beginning(location, self._filters.max_bytes + 1, links=self._links)
            text, reason = ("", "unreadable") if content is None else self._filters.decode(content)
            if reason:
                skipped[reason] += 1
                files.append((path, reason))
                continue
            if content and self._filters.any_encoding and not content.isascii() and decode_source(content)[1] is None:
                guessed.append(path)
            yield SourceFile(repository, path, language, text)

    def __length_hint__(self) -> int:
        return len(self._files)

    def sort(self, keys: Callable[[Sequence[SourcePath]], Iterable[Any]]) -> None:
        """From now on, read files in ascending order of their sort keys; `keys(files)` returns a key for each file."""
        self._files = [file for _, file in sorted(zip(keys(self._files), self._files, strict=True))]


def installed_repositories(
    exclude: str | Collection[str] = ("transformers",),
    *,
    languages: Iterable[str] | None = ("python",),
    filters: FileFilters | None = None,
) -> FileReader:
    """Return a reader of Python's standard library and installed distributions except `exclude` and this package."""
    # Imported here, because a search reads only folders and does not need these modules.
    from importlib import metadata

    from packaging.utils import canonicalize_name

    excluded = [exclude] if isinstance(exclude, str) else exclude
    seen = {canonicalize_name(name) for name in (*excluded, OWN_DISTRIBUTION)}
    chosen, filters = set(check_languages(languages)), filters or FileFilters()
    found: list[SourcePath] = []
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.name or "")
        # Of two distributions with one name, Python imports the first on sys.path. One without a name is broken.
        if not name or name in seen:
            continue
        seen.add(name)
        for file in distribution.files or []:
            # A path that climbs out of site-packages is a script or a data file; `__editable__` is an import hook.
            is_inside = ".." not in file.parts and not file.name.startswith("__editable__")
            if is_inside and (language := language_of(file) or "") in chosen:
                found.append(SourcePath(name, file.as_posix(), Path(str(distribution.locate_file(file))), language))
    if STANDARD_LIBRARY not in seen:
        library = _source_files(Path(sysconfig.get_path("stdlib")), chosen)
        found += [file._replace(repository=STANDARD_LIBRARY) for file, reason in library if not reason]
    reasons = ((file, filters.reason_by_path(PurePath(file.path), file.language)) for file in found)
    return FileReader(reasons, filters, links=True)  # package managers may install links


def folder_repositories(
    folder: str | os.PathLike[str],
    *,
    languages: Iterable[str] | None = None,
    depth: int | None = None,
    filters: FileFilters | None = None,
    may_be_empty: bool = False,
    obey_ignore_files: bool = False,
) -> FileReader:
    """Return a reader of the source files under `folder`.

    Links are not followed. Hidden folders, virtual environments and `CLOSED_FOLDERS` are not entered.

    Args:
        depth: number of levels from `folder` down to the repositories; by default 0 if `folder` holds one of
            `CHECKOUT_MARKERS`, else 1. A repository's name is its path, such as `"a/b"` at depth 2, but at depth 0
            the name of `folder`. At depth 2, a file right in `a` belongs to `"a"`, a file right in `folder` to `"."`.
        may_be_empty: if there is no file to read, True returns an empty reader, and False raises UserError.
        obey_ignore_files: leave out files that git ignores, read scripts without a suffix too, and count links and
            unreadable folders as left out.
    """
    root = user_path(folder).resolve()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError("data.source.missing", f"{os.fspath(folder)!r} {what}: pass a folder of source code.")
    if depth is None:
        depth = 0 if any((root / marker).exists() for marker in CHECKOUT_MARKERS) else 1
    if depth < 0:
        raise UserError("data.folder.depth", f"`depth` must be 0 or more, not {depth}.")
    chosen, filters = check_languages(languages), filters or FileFilters()

    found: list[tuple[SourcePath, str | None]] = []
    for file, reason in _source_files(root, set(chosen), obey_ignore_files):
        path = PurePath(file.path)
        name = "/".join(path.parts[:-1][:depth]) if depth else root.name
        own_path = path.relative_to(name).as_posix() if depth else file.path
        # Filters get paths relative to `root`: a top folder `tests` then counts as tests, not as a repository.
        reason = reason or filters.reason_by_path(path, file.language)
        found.append((file._replace(repository=name or ".", path=own_path), reason))
    reader = FileReader(found, filters)
    if not may_be_empty and not reader.repositories:
        left_out = sorted(Counter(reason for _, reason in reader.skipped_files).items())
        aside = ", ".join(f"{count} left out as {reason}" for reason, count in left_out)
        what = chosen[0].capitalize() if len(chosen) == 1 else "source"
        message = f"{os.fspath(folder)!r} holds no {what} file to read{f' ({aside})' if aside else ''}."
        raise UserError("data.source.no_files", f"{message} Name another folder.")
    return reader


def is_source_file(folder: str | os.PathLike[str], path: Path, languages: Collection[str]) -> bool:
    """Return whether `folder_repositories(folder, obey_ignore_files=True)` finds the file at an absolute `path`."""
    root = Path(os.path.realpath(folder))
    ignored = IgnoreFiles(root)
    for parent in reversed(path.parents[: len(path.parts) - len(root.parts) - 1]):  # the outermost first
        if is_closed(PurePath(parent.name, "file")) or ignored.ignores(str(parent), is_folder=True):
            return False
    return _language(path) in languages and not ignored.ignores(str(path), is_folder=False)


def _language(location: Path) -> str | None:
    """Return the language of a file's suffix or, if it has none, of the interpreter in its first line; or None."""
    language = language_of(location)
    if not (language or location.suffix or location.name.startswith(".") or os.path.islink(location)):
        language = language_of_script(beginning(location, 128, links=False) or b"")
    return language


def _source_files(root: Path, languages: set[str], obey: bool = False) -> Iterator[tuple[SourcePath, str | None]]:
    """Yield (source file below `root`, why it is left out or None); if `obey`, skip the files that git ignores."""
    ignored = IgnoreFiles(root) if obey else None
    closed: list[OSError] = []
    left_out: list[tuple[Path, str]] = []
    for parent, folders, files in os.walk(root, onerror=closed.append):
        is_deep = len(Path(parent).parts) - len(root.parts) > MAX_FOLDER_DEPTH
        if is_deep:
            left_out.append((Path(parent), "folder nested too deeply"))
        if is_deep or "pyvenv.cfg" in files:  # a virtual environment, whatever its name
            folders.clear()
            continue
        folders[:] = [name for name in folders if not is_closed(PurePath(name, "file"))]
        if ignored:
            folders[:] = [one for one in folders if not ignored.ignores(os.path.join(parent, one), is_folder=True)]
        for location in (Path(parent, name) for name in files):
            # Unlike Path.is_symlink, this raises nothing where a folder may be listed but not entered.
            is_link = os.path.islink(location)
            language = _language(location) if obey else language_of(location)
            if language not in languages or (ignored and ignored.ignores(str(location), is_folder=False)):
                continue
            if obey or not is_link:
                path = location.relative_to(root).as_posix()
                yield SourcePath("", path, location, str(language)), "symbolic link" if is_link else None
    left_out += [(Path(error.filename), "unreadable folder") for error in closed if obey]
    for location, reason in left_out:
        yield SourcePath("", location.relative_to(root).as_posix(), location, ""), reason


class _XzFile:
    """Reads an .xz file, but uses at most `_XZ_MEMORY` bytes to unpack it; `lzma.open` has no limit of memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._decoder = file, lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        content = packed = b""
        while not content:
            if self._decoder.eof:  # another stream may follow, after zeros
                packed = self._decoder.unused_data.lstrip(b"\0")
                while not packed and (more := self._file.read(size)):
                    packed = more.lstrip(b"\0")
                if not packed:
                    return b""
                self._decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
            elif self._decoder.needs_input and not (packed := self._file.read(size)):
                raise EOFError("the .xz file ends early")
            content, packed = self._decoder.decompress(packed, size), b""
        return content


ZIP_SUFFIXES = (".zip", ".whl", ".jar")
TAR_OPENERS: dict[str, Callable[..., Any]] = {
    ".tar": lambda file: file,
    **dict.fromkeys((".tar.gz", ".tgz"), gzip.open),
    **dict.fromkeys((".tar.bz2", ".tbz2"), bz2.open),
    **dict.fromkeys((".tar.xz", ".txz"), _XzFile),
}
ARCHIVE_SUFFIXES = (*ZIP_SUFFIXES, *TAR_OPENERS)

_XZ_MEMORY = 2**28  # `xz -9` needs 65 MiB
_HEADER_BYTES = 1_000_000  # of attributes
_ATTRIBUTE = re.compile(rb"(\d{1,7}) ([^=]{1,1000})=")
_MAX_PATH = 4096  # characters in the path of a member
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_HEADER_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *_LONG_NAMES)
_DIRECTORY_BYTES_PER_MEMBER, _ZIP_ENTRY = 256, b"PK\1\2"
# RuntimeError: encrypted members, unknown compression.
BROKEN_ARCHIVE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, LookupError, RuntimeError)
BROKEN_ARCHIVE += (struct.error, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)
_HUGE_HEADERS, _TOO_MANY = "rest of an archive with huge headers", "rest of an archive with too many members"
_TOO_LARGE = "rest of an archive that unpacks to too many bytes"
MAX_ARCHIVE_MEMBERS = 200_000
MAX_ARCHIVE_BYTES = 8_000_000_000  # unpacked; in a zip, only of the members that are read
FREE_BYTES, MAX_RATIO = 2**24, 50  # beyond the free bytes, each byte of the archive may unpack to 50: code to 3 to 20


class ArchiveLimitError(Exception):
    """Raised if an archive exceeds a limit. `SourceReader.skipped` counts the message as a reason."""


class Member(NamedTuple):
    """A member of an archive, such as a file; `read(size)` returns the first `size` bytes of the file."""

    name: str
    kind: str  # "file", "folder" or "other" (links, devices)
    size: int
    read: Callable[[int], bytes]


def archive_members(location: Path) -> Iterator[Member]:
    """Yield an archive's members in order; read each before the next. ArchiveLimitError if a limit is exceeded."""
    members = _zip_members if _archive_suffix(location) in ZIP_SUFFIXES else _tar_members
    most_bytes = min(MAX_ARCHIVE_BYTES, FREE_BYTES + MAX_RATIO * location.stat().st_size)
    for number, member in enumerate(members(location, most_bytes)):
        if number == MAX_ARCHIVE_MEMBERS or len(member.name) > _MAX_PATH:
            raise ArchiveLimitError(_TOO_MANY if number == MAX_ARCHIVE_MEMBERS else _HUGE_HEADERS)
        yield member


def _archive_suffix(path: Path) -> str:
    return next((suffix for suffix in ARCHIVE_SUFFIXES if path.name.lower().endswith(suffix)), "")


class _LimitedFile:
    """Wraps a file for tarfile or zipfile. ArchiveLimitError(`reason`) if reads ask for over `left` bytes in total.

    The error is also raised if one read returns the bytes `entry` more than `MAX_ARCHIVE_MEMBERS` times.
    """

    def __init__(self, file: IO[bytes], left: float, reason: str, entry: bytes = b"") -> None:
        self._file, self.left, self._reason, self._entry = file, left, reason, entry

    def read(self, size: int = -1) -> bytes:
        self.left -= max(size, 0)
        content = self._file.read(size) if self.left >= 0 else b""
        # zipfile reads the whole directory at once; an entry takes it ten times the bytes, whatever number is declared.
        if self.left < 0 or (self._entry and content.count(self._entry) > MAX_ARCHIVE_MEMBERS):
            raise ArchiveLimitError(self._reason)
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _zip_members(location: Path, left: int) -> Iterator[Member]:
    def read(info: zipfile.ZipInfo, size: int) -> bytes:
        nonlocal left
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile limits no other unpacking
            raise zipfile.BadZipFile(f"compression {info.compress_type}")
        left -= min(size, info.file_size)
        if left < 0:
            raise ArchiveLimitError(_TOO_LARGE)
        with archive.open(info) as file:
            return file.read(size)

    with location.open("rb") as file:
        raw: Any = _LimitedFile(file, MAX_ARCHIVE_MEMBERS * _DIRECTORY_BYTES_PER_MEMBER, _TOO_MANY, _ZIP_ENTRY)
        with zipfile.ZipFile(raw) as archive:
            raw.left = float("inf")
            for info in archive.infolist():
                is_file = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
                kind = "folder" if info.is_dir() else "file" if is_file else "other"
                yield Member(info.filename, kind, info.file_size, partial(read, info))


class _TarInfo(tarfile.TarInfo):
    """A tar header. It keeps only path and size from extended headers, and not, for example, a sparse file's map."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_TarInfo":
        info = super().frombuf(buf, encoding, errors)
        if info.type in _HEADER_TYPES and info.size > (_MAX_PATH if info.type in _LONG_NAMES else _HEADER_BYTES):
            raise ArchiveLimitError(_HUGE_HEADERS)
        return info

    _sparse_structs: Any
    _block: Any

    def _proc_sparse(self, archive: Any) -> Any:
        while self._sparse_structs[1]:  # another block of the map follows
            self._sparse_structs = [], archive.fileobj.read(tarfile.BLOCKSIZE)[504], 0
        return super()._proc_sparse(archive)  # type: ignore[misc]

    def _proc_pax(self, archive: Any) -> Any:
        # tarfile's own takes quadratic time for some attributes, and copies global ones for every member.
        data, start, found = archive.fileobj.read(self._block(self.size)), 0, dict[bytes, bytes]()
        while (match := _ATTRIBUTE.match(data, start)) and (end := start + int(match[1])) > match.end():
            if match[2] in (b"path", b"size"):
                found[match[2]] = data[match.end() : end - 1][: 5 * _MAX_PATH]
            elif match[2].startswith(b"GNU.sparse."):
                found[b"sparse"] = b""
            start = end
        if data[start:].strip(b"\0"):
            raise tarfile.ReadError("an attribute can't be read")
        data = b""  # a chain of headers would keep it
        try:
            info: Any = self.fromtarfile(archive)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        if self.type == tarfile.XGLTYPE:
            return info
        if b"path" in found:
            info.name = found[b"path"].decode("utf-8", "surrogateescape").rstrip("/")
        if b"size" in found and info.isreg():
            info.size = int(found[b"size"])
            archive.offset = info.offset_data + info._block(info.size)
        if b"sparse" in found:
            info.sparse = []  # it has data and a map, and counts as no file
        return info


def _tar_members(location: Path, most_bytes: int) -> Iterator[Member]:
    opener = TAR_OPENERS[_archive_suffix(location)]
    with location.open("rb") as raw:
        file: Any = _LimitedFile(opener(raw), most_bytes, _TOO_LARGE)
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_TarInfo) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
                kind = "file" if info.isreg() and not info.issparse() else "folder" if info.isdir() else "other"
                content = archive.extractfile(info) if kind == "file" else None
                yield Member(info.name, kind, info.size, content.read if content else bytes)


def archive_repositories(
    source: str | os.PathLike[str], *, languages: Iterable[str] | None = None, filters: FileFilters | None = None
) -> SourceReader:
    """Return a reader of an archive, or of a folder's archives, each as a repository; UserError if there is none."""
    root = user_path(source)
    files = files_below(root, links=False) if root.is_dir() else [root]
    folder = root if root.is_dir() else root.parent
    found = {one.relative_to(folder).as_posix(): one for one in files if _archive_suffix(one) and one.is_file()}
    if not found:
        message = f"{os.fspath(source)!r} is neither an archive nor a folder with an archive."
        raise UserError("data.source.no_files", f"{message} Names of archives end in {', '.join(ARCHIVE_SUFFIXES)}.")
    short = {name: name[: -len(_archive_suffix(path))] for name, path in found.items()}
    counts = Counter(short.values())
    archives = sorted((name if counts[short[name]] > 1 else short[name], path) for name, path in found.items())
    chosen, filters = check_languages(languages), filters or FileFilters()

    def read(skipped: Counter[str]) -> Iterator[SourceFile]:
        for repository, location in archives:
            seen: set[PurePath] = set()
            try:
                for member in archive_members(location):
                    path = PurePath(member.name)
                    text, reason = _member_text(member, path, chosen, filters)
                    if reason or (text and path in seen):
                        skipped[reason or "repeated path"] += 1
                    elif text:
                        seen.add(path)
                        yield SourceFile(repository, path.as_posix(), language_of(path) or "", text)
            except ArchiveLimitError as error:
                skipped[str(error)] += 1
            except BROKEN_ARCHIVE:
                skipped["rest of a damaged archive"] += 1

    return SourceReader(read, tuple(name for name, _ in archives))


def _member_text(
    member: Member, path: PurePath, languages: tuple[str, ...], filters: FileFilters
) -> tuple[str, str | None]:
    """For an archive's member, return (text, None), ("", why it is left out), or ("", None) if it is no source file."""
    if member.kind == "folder":
        return "", None
    if member.kind == "other":
        return "", "link or device"
    # The path is absolute or climbs out of the archive, on this system or on Windows.
    windows = PureWindowsPath(member.name)
    if windows.anchor or ".." in windows.parts or "\0" in member.name:
        return "", "unsafe path"
    language = language_of(path)
    if language not in languages or is_closed(path):
        return "", None
    if reason := filters.reason_by_path(path, language) or ("too large" if member.size > filters.max_bytes else None):
        return "", reason
    try:
        # Read one byte more than allowed, because the size that an archive declares may be wrong.
        content = member.read(filters.max_bytes + 1)
    except BROKEN_ARCHIVE:  # an encrypted or damaged member; the next may be readable
        return "", "unreadable"
    return filters.decode(content)
