"""Source files, repository by repository: installed Python distributions or a folder of checkouts.

Files come in the order of repository and path.
"""

import os
import re
import stat
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePath

from modular_star_encoder.data.languages.registry import check_languages, language_of
from modular_star_encoder.data.sources.source_files import CLOSED_FOLDERS, FileFilters, SourceFile, SourceReader
from modular_star_encoder.utils.errors import UserError

STANDARD_LIBRARY = "python-standard-library"
OWN_DISTRIBUTION = "modular-star-encoder"
CHECKOUT_MARKERS = (".git", "pyproject.toml", "setup.py", "setup.cfg", "__init__.py")


@dataclass(slots=True)
class _Repository:
    """The files of one repository as (path in it, location), and how many were left out by their path."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


class FileReader(SourceReader):
    """Reads files of this machine; its units are the repositories, sorted by name."""

    def __init__(self, repositories: dict[str, _Repository], filters: FileFilters) -> None:
        """`repositories` may hold some without a file to read; only the files left out of them are counted."""
        self._filters = filters
        units = [(name, one) for name, one in sorted(repositories.items()) if one.files]
        rest = sum((one.left_out for one in repositories.values() if not one.files), Counter())
        if units:  # the counts of all shards together are those of the whole
            units[0][1].left_out.update(rest)
        for _, one in units:
            one.files.sort()
        super().__init__(units)

    def _left_out(self) -> Counter[str]:
        return sum((one.left_out for _, one in self._chosen()), Counter())

    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        for repository, one in self._chosen():
            for path, location in one.files:
                text, reason = self._text(location)
                if reason:
                    skipped[reason] += 1
                else:
                    yield SourceFile(repository, path, language_of(location) or "", text)

    def _text(self, location: Path) -> tuple[str, str | None]:
        try:
            status = location.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would be read for ever
                return "", "unreadable"
            if status.st_size > self._filters.max_bytes:
                return "", "too large"
            content = location.read_bytes()
        except OSError:
            return "", "unreadable"
        return self._filters.decode(content)

    def __length_hint__(self) -> int:
        """The number of files that an iteration reads: an upper bound of those that it yields."""
        return sum(len(one.files) for _, one in self._chosen())


def installed_repositories(
    exclude: Collection[str] = ("transformers",),
    *,
    languages: Iterable[str] | None = ("python",),
    filters: FileFilters | None = None,
) -> FileReader:
    """A reader of the code installed in this Python environment.

    Every installed distribution is one repository, under its normalised name (PEP 503), and so is the standard
    library (`"python-standard-library"`). This package itself is never among them.

    Args:
        exclude: Names of distributions to leave out, in any spelling.
        languages: The languages to read; None for all of `LANGUAGES`.
        filters: Which files are left out; by default, `FileFilters()`.

    Raises:
        UserError: `data.language.unknown`; `data.installed.exclude` if `exclude` is a single text.
    """
    if isinstance(exclude, str):
        message = f"exclude must be a list of names of distributions, not {exclude!r}."
        raise UserError("data.installed.exclude", message)
    excluded = {_normalised_name(name) for name in (*exclude, OWN_DISTRIBUTION)}
    chosen = set(check_languages(languages))
    filters = filters or FileFilters()
    repositories: defaultdict[str, _Repository] = defaultdict(_Repository)
    seen: set[str] = set()
    for distribution in metadata.distributions():
        name = _normalised_name(distribution.name or "")
        # The first on sys.path is the one that Python imports; a distribution without a name is a broken install.
        if name and name not in seen | excluded:
            seen.add(name)
            for file in distribution.files or []:
                path = PurePath(file)
                if language_of(path) in chosen:
                    _sort_in(repositories[name], path, Path(str(distribution.locate_file(file))), filters)
    if STANDARD_LIBRARY not in excluded:
        for path, location in _source_files(Path(sysconfig.get_path("stdlib")), chosen):
            _sort_in(repositories[STANDARD_LIBRARY], path, location, filters)
    return FileReader(repositories, filters)


def folder_repositories(
    folder: str | os.PathLike[str],
    *,
    languages: Iterable[str] | None = None,
    depth: int | None = None,
    filters: FileFilters | None = None,
    may_be_empty: bool = False,
) -> FileReader:
    """A reader of the code under `folder`.

    - A folder that is itself a checkout or a package (it holds one of `CHECKOUT_MARKERS`) is one repository, named
      after the folder.
    - In any other folder every direct sub-folder with source files is a repository, and source files directly in the
      folder make one more, named `"."`.

    With `depth`, repositories are the folders that many levels down, named by their path (`"a/b"` at depth 2; a file in
    `a` itself belongs to `"a"`); at depth 0 the folder is one repository.

    Symbolic links are not followed. Hidden folders, virtual environments, `node_modules` and the like are not entered.

    Args:
        folder: A folder of checkouts, or one checkout.
        languages: The languages to read; None for all of `LANGUAGES`.
        depth: Number of levels from `folder` down to the repositories; by default, the two rules above.
        filters: Which files are left out; by default, `FileFilters()`.
        may_be_empty: Whether a folder without a source file to read gives a reader of nothing.

    Raises:
        UserError: `data.source.missing` if `folder` is not a folder; `data.source.no_files` if it holds no source file
            to read (unless it may be empty); `data.language.unknown`; `data.folder.depth` if `depth` is negative.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError("data.source.missing", f"{os.fspath(folder)!r} {what}; pass a folder of repositories.")
    if depth is None:
        depth = 0 if any((root / marker).exists() for marker in CHECKOUT_MARKERS) else 1
    elif depth < 0:
        raise UserError("data.folder.depth", f"depth must be a number of levels from 0, not {depth}.")
    chosen = check_languages(languages)
    filters = filters or FileFilters()
    repositories: defaultdict[str, _Repository] = defaultdict(_Repository)
    for path, location in _source_files(root, set(chosen)):
        name = "/".join(path.parts[:-1][:depth]) if depth else root.name
        # Filtered by the whole path, so that a folder `tests` next to the sources is not a repository.
        _sort_in(repositories[name or "."], path, location, filters, inside=name if depth else "")
    if not may_be_empty and not any(one.files for one in repositories.values()):
        left_out = sum((one.left_out for one in repositories.values()), Counter())
        aside = ", ".join(f"{count} left out as {reason}" for reason, count in sorted(left_out.items()))
        what = chosen[0].capitalize() if len(chosen) == 1 else "source"
        message = f"{os.fspath(folder)!r} holds no {what} file to read{f' ({aside})' if aside else ''}."
        raise UserError("data.source.no_files", message)
    return FileReader(repositories, filters)


def _normalised_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _source_files(root: Path, languages: set[str]) -> Iterator[tuple[PurePath, Path]]:
    """Yield (path relative to `root`, location) of every source file; no symbolic link is followed."""
    for parent, folders, files in os.walk(root):
        if "pyvenv.cfg" in files:  # a virtual environment, whatever its name
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in CLOSED_FOLDERS]
        for name in files:
            location = Path(parent, name)
            # Unlike Path.is_symlink, this raises nothing where a folder may be listed but not entered.
            if language_of(location) in languages and not os.path.islink(location):
                yield location.relative_to(root), location


def _sort_in(repository: _Repository, path: PurePath, location: Path, filters: FileFilters, inside: str = "") -> None:
    """Add a file to those to read, under its path from the folder `inside`, or to the counts of those left out."""
    # A path that climbs out of site-packages is a script or a data file; `__editable__` files are import hooks.
    if ".." in path.parts or path.name.startswith("__editable__"):
        return
    reason = filters.reason_by_path(path, language_of(path) or "")
    if reason:
        repository.left_out[reason] += 1
    else:
        repository.files.append((path.relative_to(inside).as_posix(), location))
