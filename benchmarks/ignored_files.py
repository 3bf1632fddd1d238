"""Whether search reads the source files that git lists: differences in every repository of a folder.

    python benchmarks/ignored_files.py CHECKOUTS

git lists what it tracks, and what is new and not ignored; `core.excludesFile` is a setting of the user and not read.
Left out on purpose, and not compared: symbolic links, folders that are hidden or hold installed packages, the content
of submodules (git lists only their folder), and what `.moseignore` names.
"""

import os
import subprocess
import sys
from pathlib import Path, PurePath

from modular_star_encoder.data.languages.registry import SEARCH_LANGUAGES, language_of
from modular_star_encoder.data.sources import is_closed
from modular_star_encoder.data.sources.repositories import folder_repositories
from modular_star_encoder.search.building import SEARCH_FILTERS

_GIT = ("git", "-c", "core.excludesFile=", "ls-files", "-z", "--cached", "--others", "--exclude-standard")


def git_files(folder: Path) -> set[str]:
    """The source files that git lists."""
    listed = subprocess.run(_GIT, cwd=folder, check=True, capture_output=True).stdout.split(b"\0")
    paths = [PurePath(os.fsdecode(name)) for name in listed if name]
    return {
        path.as_posix()
        for path in paths
        if language_of(path) in SEARCH_LANGUAGES and not is_closed(path) and (folder / path).is_file()
        if not (folder / path).is_symlink()
    }


def our_files(folder: Path) -> set[str]:
    """The source files that search reads, or names as left out; scripts without a suffix are not compared."""
    options = {"languages": SEARCH_LANGUAGES, "depth": 0, "may_be_empty": True, "obey_ignore_files": True}
    reader = folder_repositories(folder, filters=SEARCH_FILTERS, **options)
    read = {file.path for file in reader} | {path for path, why in reader.skipped_files if why != "symbolic link"}
    return {path for path in read if language_of(PurePath(path))}


def main() -> None:
    """Print a line for each repository."""
    for folder in sorted(path.parent for path in Path(sys.argv[1]).glob("*/.git")):
        git, ours = git_files(folder), our_files(folder)
        print(f"{folder.name}: {len(git):,} files, {len(git ^ ours)} differences", *sorted(git ^ ours)[:5])


if __name__ == "__main__":
    main()
