"""Open a corpus by the settings of a recipe: a folder, archives, installed packages, a data set, The Stack v2."""

from collections.abc import Callable, Mapping
from typing import Any

from modular_star_encoder.data.sources.source_files import STARCODER2_FILTERS, SourceReader
from modular_star_encoder.utils.errors import UserError

SNIPPETS = ("files", "functions")


def open_corpus(settings: Mapping[str, Any]) -> SourceReader:
    """The reader of a recipe's `corpus`, with StarCoder2's filters.

    Args:
        settings: exactly one source, its options, and optionally `languages`, a list, and `snippets`: `files` (whole,
            the default) or `functions` (each by itself, see `FunctionFiles`):

            - `folder: PATH`, with `depth` (levels from there down to the repositories);
            - `installed: true`, with `exclude` (names of distributions): the installed Python packages;
            - `archives: PATH`: an archive, or a folder of them, one repository each;
            - `rows: PATH or Hub id`, with `columns` (ours → the dataset's) and further arguments of `open_rows`;
            - `the_stack: PATH or Hub id`, with `content_url`, from where contents are fetched with your own access.

    Raises:
        UserError: `data.corpus.source` if there is not exactly one source; `data.corpus.snippets`;
            `data.corpus.options` if an option is unknown or missing; or the errors of the source's reader.
    """
    options = dict(settings)
    named = [source for source in _OPENERS if source in options]
    if len(named) != 1:
        raise UserError(
            "data.corpus.source", f"A corpus has exactly one source of {', '.join(_OPENERS)}; {len(named)} are set."
        )
    source, snippets = options.pop(named[0]), options.pop("snippets", "files")
    if snippets not in SNIPPETS:
        raise UserError(
            "data.corpus.snippets", f"A corpus's snippets are one of {', '.join(SNIPPETS)}, not {snippets!r}."
        )
    try:
        files = _OPENERS[named[0]](source, **options, filters=STARCODER2_FILTERS)
    except TypeError as error:
        message = f"The corpus's settings for {named[0]!r} can't be used: {error}."
        raise UserError("data.corpus.options", message) from error
    files.unicode_names = True
    if snippets == "functions":
        from modular_star_encoder.data.functions import FunctionFiles

        return FunctionFiles(files)
    return files


# Each imports its reader when it is used: archives and folders need no `datasets`.
def _folder(source: Any, **options: Any) -> SourceReader:
    from modular_star_encoder.data.sources.repositories import folder_repositories

    return folder_repositories(source, **options)


def _installed(source: Any, **options: Any) -> SourceReader:
    from modular_star_encoder.data.sources.repositories import installed_repositories

    if source is not True:
        raise TypeError(f"the installed packages are `installed: true`, not {source!r}")
    return installed_repositories(**options)


def _archives(source: Any, **options: Any) -> SourceReader:
    from modular_star_encoder.data.sources.archives import archive_repositories

    return archive_repositories(source, **options)


def _rows(source: Any, columns: Mapping[str, str], **options: Any) -> SourceReader:
    from modular_star_encoder.data.sources.dataset_files import RowColumns, row_repositories

    return row_repositories(source, RowColumns(**columns), **options)


def _the_stack(source: Any, content_url: str, **options: Any) -> SourceReader:
    from modular_star_encoder.data.sources.dataset_files import ContentSource, the_stack_repositories

    return the_stack_repositories(source, ContentSource(url=content_url), **options)


_OPENERS: dict[str, Callable[..., SourceReader]] = {
    "folder": _folder,
    "installed": _installed,
    "archives": _archives,
    "rows": _rows,
    "the_stack": _the_stack,
}
