"""Open a corpus by the settings of a recipe."""

from collections.abc import Mapping
from typing import Any

from modular_star_encoder.data.functions import FunctionFiles
from modular_star_encoder.data.sources.archives import archive_repositories
from modular_star_encoder.data.sources.dataset_rows import RowColumns, row_repositories
from modular_star_encoder.data.sources.repositories import folder_repositories, installed_repositories
from modular_star_encoder.data.sources.source_files import STARCODER2_FILTERS, SourceReader
from modular_star_encoder.data.sources.the_stack import ContentSource, the_stack_repositories

SOURCES = ("folder", "installed", "archives", "rows", "the_stack")
SNIPPETS = ("files", "functions")


def open_corpus(settings: Mapping[str, Any]) -> SourceReader:
    """The reader that a recipe's `corpus` describes, with StarCoder2's filters.

    Args:
        settings: exactly one source, its options, and optionally `languages`, a list, and `snippets`: `files` (as they
            are, the default) or `functions` (each by itself, see `FunctionFiles`):

            - `folder: PATH`, with `depth` (levels from there down to the repositories);
            - `installed: true`, with `exclude` (names of distributions): the installed Python packages;
            - `archives: PATH`: an archive, or a folder of them, one repository each;
            - `rows: PATH or Hub id`, with `columns` (ours → the dataset's) and further arguments of `open_rows`;
            - `the_stack: PATH or Hub id`, with `content_url`, from where contents are fetched with your own access.

    Raises:
        ValueError: not exactly one source, an unknown option, or a source that can't be read.
    """
    options = dict(settings)
    named = [source for source in SOURCES if source in options]
    if len(named) != 1:
        raise ValueError(f"A corpus has exactly one source among {', '.join(SOURCES)}; {len(named)} are given.")
    source = options.pop(named[0])
    if named[0] == "the_stack" and "content_url" not in options:
        raise ValueError("A corpus of The Stack needs content_url, the address of a content with {blob_id} in it.")
    options["filters"] = STARCODER2_FILTERS
    snippets = options.pop("snippets", "files")
    if snippets not in SNIPPETS:
        raise ValueError(f"A corpus's snippets are one of {', '.join(SNIPPETS)}, not {snippets!r}.")
    files = _open_source(named[0], source, options)
    files.unicode_names = True
    return FunctionFiles(files) if snippets == "functions" else files


def _open_source(name: str, source: Any, options: dict[str, Any]) -> SourceReader:
    try:
        match name:
            case "folder":
                return folder_repositories(source, **options)
            case "installed":
                if source is not True:
                    raise ValueError(f"A corpus of the installed packages is `installed: true`, not {source!r}.")
                return installed_repositories(**options)
            case "archives":
                return archive_repositories(source, **options)
            case "rows":
                return row_repositories(source, RowColumns(**options.pop("columns", {})), **options)
            case _:
                return the_stack_repositories(source, ContentSource(url=options.pop("content_url")), **options)
    except TypeError as error:
        raise ValueError(f"The corpus's settings for {name!r} can't be used: {error}.") from error
