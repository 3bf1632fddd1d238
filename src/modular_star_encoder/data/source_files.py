"""What every reader of source code shares: the languages, the `SourceFile`, and the interface `SourceReader`."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Self

LANGUAGE_OF_SUFFIX = {
    ".py": "python",
    ".js": "javascript",
    ".mjs": "javascript",
    ".cjs": "javascript",
    ".jsx": "javascript",
    ".go": "go",
    ".java": "java",
    ".php": "php",
    ".rb": "ruby",
    ".c": "c",
    ".h": "c",
    ".cc": "cpp",
    ".cpp": "cpp",
    ".cxx": "cpp",
    ".hpp": "cpp",
    ".hh": "cpp",
    ".hxx": "cpp",
}
"""The languages of ModularStarEncoder by file suffix. A `.h` is read as C, though C++ uses the suffix too."""

LANGUAGES = tuple(dict.fromkeys(LANGUAGE_OF_SUFFIX.values()))

_LANGUAGE_OF_NAME = {**{name: name for name in LANGUAGES}, "c++": "cpp"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One source file.

    Attributes:
        repository: Name of the repository that it belongs to.
        path: Path with forward slashes, relative to the repository (for installed distributions: to site-packages).
        language: Lower-case name of the programming language.
        text: The content without a byte-order mark; line ends are those of the file.
        license: What the source of the file says of its licence, if it says anything.
    """

    repository: str
    path: str
    language: str
    text: str
    license: str | None = None


def check_languages(languages: Iterable[str] | None) -> tuple[str, ...]:
    """Return `languages`, or all of `LANGUAGES` for None.

    Raises:
        ValueError: If one of them is not in `LANGUAGES`, there is none, or a single string is given.
    """
    if languages is None:
        return LANGUAGES
    chosen = () if isinstance(languages, str) else tuple(dict.fromkeys(languages))
    unknown = [name for name in chosen if name not in LANGUAGES]
    if not chosen or unknown:
        given = f"{', '.join(map(repr, unknown))} is unknown" if unknown else f"{languages!r} is not"
        raise ValueError(f"languages must be a list out of {', '.join(LANGUAGES)}; {given}.")
    return chosen


def language_of(path: PurePath) -> str | None:
    """Return the language that the suffix of `path` tells, or None."""
    return LANGUAGE_OF_SUFFIX.get(path.suffix)


def language_named(name: Any) -> str | None:
    """Return our name of a language that a dataset calls `name` (`"C++"` is `"cpp"`), or None if it is none of ours."""
    return _LANGUAGE_OF_NAME.get(name.lower()) if isinstance(name, str) else None


class SourceReader(ABC):
    """Iterates over the `SourceFile`s of a corpus and counts what it leaves out; never holds the corpus in memory.

    A corpus is a sequence of *units*: repositories, or the rows of a dataset. Every iteration yields the same files in
    the same order. `skip` and `shard` return readers of some of the units and can be combined; a shard that is
    resumed is `reader.shard(index, count).skip(units)`.

    Attributes:
        repositories: The repositories' names in the order of reading, or None where only reading tells. Some may turn
            out to have no readable file.
        skipped: Number of files by reason, of the last iteration.
        unicode_names: Whether bytes of names of files and repositories that are no Unicode come as `\\udcff`, which can
            be written everywhere, and not as Python's halves of characters, by which such a file can be opened.
    """

    repositories: tuple[str, ...] | None = None
    unicode_names = False

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self._start, self._step = 0, 1

    def __iter__(self) -> Iterator[SourceFile]:
        # Each iteration has a counter of its own; one that was abandoned cannot add to that of the next.
        self.skipped = skipped = Counter()
        for file in self._read(skipped):
            yield _with_unicode_names(file) if self.unicode_names else file

    @abstractmethod
    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        """Yield the files of the units `_start`, `_start + _step`, …"""

    def skip(self, units: int) -> Self:
        """Return a reader without the first `units` units.

        Raises:
            ValueError: If `units` is negative.
        """
        if units < 0:
            raise ValueError(f"skip needs a number of units from 0, not {units}.")
        return self._window(self._start + units * self._step, self._step)

    def shard(self, index: int, count: int) -> Self:
        """Return a reader of the units `index`, `index + count`, …: `count` such readers share out every unit once.

        Raises:
            ValueError: If `index` is not from 0 to `count` − 1.
        """
        if not 0 <= index < count:
            raise ValueError(f"shard needs an index from 0 to {count - 1} of {count} shards, not {index}.")
        return self._window(self._start + index * self._step, self._step * count)

    def _window(self, start: int, step: int) -> Self:
        reader = copy(self)
        reader.skipped = Counter()
        reader._start, reader._step = start, step
        return reader

    def _chosen(self, units: tuple[Any, ...]) -> tuple[Any, ...]:
        return units[self._start :: self._step]


def _with_unicode_names(file: SourceFile) -> SourceFile:
    repository, path = (name.encode(errors="backslashreplace").decode() for name in (file.repository, file.path))
    return replace(file, repository=repository, path=path)
