"""Source files, repository by repository: installed Python distributions or a folder of checkouts.

Test files, vendored code and hidden folders are left out, as are files that cannot be read as ordinary source text.
A reader can be iterated again and again, always in the same order (repository, then path).
"""

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePath

STANDARD_LIBRARY = "python-standard-library"
OWN_DISTRIBUTION = "modular-star-encoder"
LANGUAGE_OF_SUFFIX = {".py": "python"}
CHECKOUT_MARKERS = (".git", "pyproject.toml", "setup.py", "setup.cfg", "__init__.py")

_TEST_FOLDER = re.compile(r"(.*_)?(tests?|testing)", re.IGNORECASE)
_TEST_FILE = re.compile(r"test_.*|.*_tests?|conftest", re.IGNORECASE)
_VENDOR_FOLDERS = {"_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"}
_INSTALL_FOLDERS = {"site-packages", "dist-packages"}
_CLOSED_FOLDERS = {"__pycache__", "node_modules"} | _INSTALL_FOLDERS


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One source file.

    Attributes:
        repository: Name of the repository that it belongs to.
        path: Path with forward slashes, relative to the repository (for installed distributions: to site-packages).
        language: Lower-case name of the programming language.
        text: The content without a byte-order mark; line ends are those of the file.
    """

    repository: str
    path: str
    language: str
    text: str


@dataclass(frozen=True, slots=True, order=True)
class _Entry:
    repository: str
    path: str
    location: Path


class SourceReader:
    """Iterates over the `SourceFile`s of some repositories and counts what it leaves out.

    Attributes:
        repositories: The repositories' names, sorted. Some may turn out to have no readable file.
        skipped: Number of files by reason, of the last iteration.
    """

    def __init__(
        self, entries: Iterable[_Entry], left_out: Counter[str], *, max_bytes: int, max_line_length: int
    ) -> None:
        self._entries = sorted(entries)
        self._left_out = left_out
        self._max_bytes = max_bytes
        self._max_line_length = max_line_length
        self.repositories = tuple(sorted({entry.repository for entry in self._entries}))
        self.skipped = Counter(left_out)

    def __iter__(self) -> Iterator[SourceFile]:
        self.skipped = Counter(self._left_out)
        for entry in self._entries:
            text, reason = _read(entry.location, self._max_bytes, self._max_line_length)
            if reason:
                self.skipped[reason] += 1
            else:
                yield SourceFile(entry.repository, entry.path, LANGUAGE_OF_SUFFIX[entry.location.suffix], text)

    def __length_hint__(self) -> int:
        """Return the number of files that an iteration looks at: an upper bound of those that it yields."""
        return len(self._entries)


def installed_repositories(
    exclude: Collection[str] = ("transformers",), *, max_bytes: int = 1_000_000, max_line_length: int = 1000
) -> SourceReader:
    """Return a reader of the Python code installed in this environment.

    Every installed distribution is one repository, under its normalised name (PEP 503), and so is the standard
    library (`"python-standard-library"`). This package itself is never among them.

    Args:
        exclude: Names of distributions to leave out, in any spelling.
        max_bytes: Larger files are skipped.
        max_line_length: Files with a longer line, in characters, are skipped: they are generated or hold data.
    """
    excluded = {_normalised_name(name) for name in (*exclude, OWN_DISTRIBUTION)}
    entries: list[_Entry] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for distribution in metadata.distributions():
        name = _normalised_name(distribution.name or "")
        # The first on sys.path is the one that Python imports; a distribution without a name is a broken install.
        if name and name not in seen | excluded:
            seen.add(name)
            files = distribution.files or []
            found = ((PurePath(file), Path(str(distribution.locate_file(file)))) for file in files)
            entries += _wanted(name, found, left_out)
    if STANDARD_LIBRARY not in excluded:
        root = Path(sysconfig.get_path("stdlib"))
        entries += _wanted(STANDARD_LIBRARY, _source_files(root), left_out)
    return SourceReader(entries, left_out, max_bytes=max_bytes, max_line_length=max_line_length)


def folder_repositories(
    folder: str | os.PathLike[str], *, max_bytes: int = 1_000_000, max_line_length: int = 1000
) -> SourceReader:
    """Return a reader of the Python code under `folder`.

    - A folder that is itself a checkout or a package (it holds one of `CHECKOUT_MARKERS`) is one repository, named
      after the folder.
    - In any other folder every direct sub-folder with Python files is a repository, and Python files that lie
      directly in the folder make one more, named `"."`.

    Symbolic links are not followed. Hidden folders, virtual environments, `node_modules` and the like are not entered.

    Args:
        folder: A folder of checkouts, or one checkout.
        max_bytes: Larger files are skipped.
        max_line_length: Files with a longer line, in characters, are skipped: they are generated or hold data.

    Raises:
        ValueError: If `folder` does not exist, is no folder, or holds no Python file that is read.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"{os.fspath(folder)!r} {what}; pass a folder that holds Python repositories.")
    left_out: Counter[str] = Counter()
    if any((root / marker).exists() for marker in CHECKOUT_MARKERS):
        entries = _wanted(root.name, _source_files(root), left_out)
    else:
        entries = []
        for path, location in _source_files(root):
            repository = path.parts[0] if len(path.parts) > 1 else "."
            # Judged by the whole path, so that a folder `tests` beside the sources is no repository of its own.
            found = _wanted(repository, [(path, location)], left_out)
            entries += [_Entry(repository, _inside(repository, entry.path), location) for entry in found]
    if not entries:
        aside = ", ".join(f"{count} left out as {reason}" for reason, count in sorted(left_out.items()))
        raise ValueError(f"{os.fspath(folder)!r} holds no Python file to read{f' ({aside})' if aside else ''}.")
    return SourceReader(entries, left_out, max_bytes=max_bytes, max_line_length=max_line_length)


def _inside(repository: str, path: str) -> str:
    return path if repository == "." else path.removeprefix(repository + "/")


def _normalised_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _source_files(root: Path) -> Iterator[tuple[PurePath, Path]]:
    """Yield (path relative to `root`, location) of every source file; no symbolic link is followed."""
    for parent, folders, files in os.walk(root):
        if "pyvenv.cfg" in files:  # a virtual environment, whatever its name
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _CLOSED_FOLDERS]
        for name in files:
            location = Path(parent, name)
            if location.suffix in LANGUAGE_OF_SUFFIX and not location.is_symlink():
                yield location.relative_to(root), location


def _wanted(repository: str, files: Iterable[tuple[PurePath, Path]], left_out: Counter[str]) -> list[_Entry]:
    """Return the entries of the source files to read; `left_out` counts the others."""
    entries = []
    for path, location in files:
        # A path that climbs out of site-packages is a script or a data file; `__editable__` files are import hooks.
        if path.suffix not in LANGUAGE_OF_SUFFIX or ".." in path.parts or path.name.startswith("__editable__"):
            continue
        reason = _reason_by_name(path)
        if reason:
            left_out[reason] += 1
        else:
            entries.append(_Entry(repository, path.as_posix(), location))
    return entries


def _reason_by_name(path: PurePath) -> str | None:
    folders = path.parts[:-1]
    if not _VENDOR_FOLDERS.isdisjoint(folders) or not _INSTALL_FOLDERS.isdisjoint(folders):
        return "vendored code"
    if _TEST_FILE.fullmatch(path.stem) or any(_TEST_FOLDER.fullmatch(name) for name in folders):
        return "test code"
    return None


def _read(location: Path, max_bytes: int, max_line_length: int) -> tuple[str, str | None]:
    """Return (text, None), or ("", why the file is skipped)."""
    try:
        if location.stat().st_size > max_bytes:
            return "", "too large"
        content = location.read_bytes()
    except OSError:
        return "", "unreadable"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    if "\0" in text:
        return "", "contains null bytes"
    if not text.strip():
        return "", "empty"
    if max(map(len, re.split(r"[\r\n]", text))) > max_line_length:
        return "", "very long lines"
    return text, None
