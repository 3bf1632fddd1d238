"""The files that git ignores: `.gitignore` at every level, `.git/info/exclude`, and our own `.moseignore`."""

from __future__ import annotations

import os
from pathlib import Path

from pathspec import GitIgnoreSpec

NAMES = (".gitignore", ".moseignore")


class IgnoreFiles:
    """Says which paths below a folder are ignored; ignore files above it apply up to the top of its repository.

    Ask about a folder before its content: as in git, nothing inside an ignored folder is examined.
    """

    def __init__(self, root: Path) -> None:
        self._specs: dict[Path, list[tuple[Path, GitIgnoreSpec]]] = {}
        above = [root, *root.parents]
        top = next((place for place, folder in enumerate(above) if (folder / ".git").exists()), 0)
        first = _read(above[top] / ".git" / "info" / "exclude")
        known = [(above[top], first)] if first else []
        for folder in reversed(above[1 : top + 1]):
            known = [*known, *_specs_of(folder)]
        self._above = known

    def ignores(self, path: Path, *, is_folder: bool) -> bool:
        """Whether a path is ignored; if several patterns match, the last one of the deepest file decides."""
        for base, spec in reversed(self._of(path.parent)):
            relative = path.relative_to(base).as_posix() + ("/" if is_folder else "")
            include = spec.check_file(relative).include
            if include is not None:
                return include
        return False

    def _of(self, folder: Path) -> list[tuple[Path, GitIgnoreSpec]]:
        if folder not in self._specs:
            outer = self._specs.get(folder.parent, self._above)
            self._specs[folder] = [*outer, *_specs_of(folder)]
        return self._specs[folder]


def _specs_of(folder: Path) -> list[tuple[Path, GitIgnoreSpec]]:
    return [(folder, spec) for name in NAMES if (spec := _read(folder / name)) is not None]


def _read(path: Path) -> GitIgnoreSpec | None:
    try:
        if os.path.islink(path) or not path.is_file():
            return None
        return GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except (OSError, ValueError):  # a path that is too long, or an invalid pattern
        return None
