"""Extracts documented functions from a corpus, and filters them by CodeSearchNet's rules (arXiv 1909.09436, section 2).

Docstrings are removed from the code: with the description inside the code, even BM25 would find the code.
"""

import hashlib
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import chain
from operator import length_hint
from typing import Any

from tqdm.auto import tqdm

from modular_star_encoder.data.languages.function_finder import find_functions
from modular_star_encoder.data.languages.parsing import UnparsableSourceError
from modular_star_encoder.data.languages.registry import LANGUAGES, language_entry, language_named, language_of_text
from modular_star_encoder.data.sources import STARCODER2_FILTERS, SourceFile, SourceReader
from modular_star_encoder.utils.crash_safe import crash_safe_map
from modular_star_encoder.utils.errors import UserError

_FILES_PER_CHUNK = 64


@dataclass(frozen=True, slots=True)
class DocumentedFunction:
    """A function of a repository, with the description that its author wrote."""

    repository: str
    path: str  # with forward slashes, as in the repository
    line: int  # 1-based line at which the function, with its decorators, begins; 0 if unknown
    language: str
    name: str  # dotted name inside the file, such as "Stack.push"
    description: str  # first paragraph of the documentation, in one line; empty if there is none
    code: str  # decorators, signature and body, dedented, with `\n` line ends, without docstrings
    source: str = ""  # the whole function as written in its file, with docstrings; SynthCoNL's column `func1_CSN`
    start_byte: int | None = None  # where `source` begins in the file's text, encoded in UTF-8; None if unknown
    end_byte: int | None = None  # where `source` ends: the offset of the byte after it
    license: str | None = None  # of the file, as a data set reports it


def function_id(function: DocumentedFunction) -> str:
    """Return 32 hexadecimal digits: a hash of a function's repository, path, language, position and source."""
    place = f"{function.line}:{'' if function.start_byte is None else function.start_byte}"
    # The length of each part precedes it, so that different lists of parts never make the same text.
    parts = (function.repository, function.path, function.language, place, function.source or function.code)
    encoded = [part.encode(errors="surrogatepass") for part in parts]
    digest = hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in encoded))
    return digest.hexdigest()[:32]


def code_key(code: str) -> str:
    """Return `code` with one space for each run of white space: codes that differ only in white space become equal."""
    return " ".join(code.split())


def description_key(description: str) -> str:
    """Return the letters and digits of `description` in lower case: nearly identical descriptions become equal."""
    return "".join(filter(str.isalnum, description.lower()))


def drop_reason(function: DocumentedFunction) -> str | None:
    """Return the reason why CodeSearchNet's rules leave out `function`; None if the rules keep the function."""
    if not 3 <= sum(any(map(str.isalnum, word)) for word in function.description.split()) <= 256:
        return "description not of 3 to 256 words"
    letters = [character for character in function.description if character.isalpha()]
    if 2 * sum(map(str.isascii, letters)) <= len(letters):  # a coarse test of "written in English"
        return "description mostly not ASCII"
    if sum(bool(line.strip()) for line in function.code.splitlines()) < 3:
        return "code of fewer than 3 lines"
    entry = language_entry(function.language)
    outer, _, name = function.name.rpartition(".")
    named_like_class = entry.constructors_named_like_class and name.lstrip("~") == outer.rpartition(".")[2]
    if name in entry.constructors or named_like_class:
        return "constructor"
    if name in entry.special_methods or re.fullmatch(entry.special_method, name, re.DOTALL):
        return "special method"
    return "name contains test" if "test" in name.lower() else None


def extract_functions(
    file: SourceFile, counts: Counter[str] | None = None, documented_only: bool = True
) -> list[DocumentedFunction]:
    """Return the functions of a file (see `find_functions`), or [] if parsing fails; errors are counted in `counts`."""
    language = language_of_text(file.language, file.path, file.text)
    counts = Counter() if counts is None else counts
    try:
        found = find_functions(file.text, language, documented_only=documented_only, counts=counts)
    except UnparsableSourceError:
        counts["files that do not parse"] += 1
        return []
    origin = partial(DocumentedFunction, repository=file.repository, path=file.path, language=language)
    return [origin(license=file.license, **asdict(one)) for one in found]


def collect_functions(
    files: Iterable[SourceFile], processes: int = 2, progress: bool = True
) -> tuple[list[DocumentedFunction], Counter[str]]:
    """Return the documented functions in `files` that CodeSearchNet's rules keep, and {what was counted: number, …}.

    The counter has totals and reasons to leave out, such as `functions kept` and `dropped: constructor`. Of functions
    with equal code, only the first is kept. If `processes` is 0 or 1, files are parsed in the calling process.
    """
    counts: Counter[str] = Counter()
    kept: dict[str, DocumentedFunction] = {}
    for function in filtered_functions(files, counts, processes, progress):
        if kept.setdefault(code_key(function.code), function) is not function:
            counts["dropped: same code as an earlier function"] += 1
    counts["functions kept"] = len(kept)
    return list(kept.values()), counts


def filtered_functions(
    files: Iterable[SourceFile], counts: Counter[str], processes: int = 2, progress: bool = True
) -> Iterator[DocumentedFunction]:
    """Yield functions that CodeSearchNet's rules keep, also repeated ones; `counts` counts files and functions."""
    chunks = crash_safe_map(_filtered, files, processes=processes, chunk_size=_FILES_PER_CHUNK, crashed=_crashed)
    total = length_hint(files) or None
    with tqdm(desc="Extracting functions", total=total, unit=" files", disable=not progress) as bar:
        for functions, chunk_counts in chunks:
            counts.update(chunk_counts)
            yield from functions
            bar.update(chunk_counts["files"])


def _filtered(files: list[SourceFile]) -> tuple[list[DocumentedFunction], Counter[str]]:
    counts: Counter[str] = Counter(files=len(files))
    found = list(chain.from_iterable(_functions_by_file(files, counts, True)))
    reasons = list(map(drop_reason, found))
    counts.update(["documented functions"] * len(found))
    counts.update(f"dropped: {reason}" for reason in reasons if reason)
    return [one for one, reason in zip(found, reasons, strict=True) if reason is None], counts


def _functions_by_file(
    files: list[SourceFile], counts: Counter[str], documented_only: bool
) -> Iterator[list[DocumentedFunction]]:
    for file in files:
        if file.language in LANGUAGES:
            yield extract_functions(file, counts, documented_only)
        else:
            counts["files in an unsupported language"] += 1


def _crashed(_: SourceFile) -> tuple[list[Any], Counter[str]]:
    return [], Counter({"files": 1, "files that crash the parser": 1})


def outer_functions(files: SourceReader) -> SourceReader:
    """Return a reader with one `SourceFile`, at `PATH#L{line}`, for each function in `files` that is not nested."""

    def read(skipped: Counter[str]) -> Iterator[SourceFile]:
        extract = partial(crash_safe_map, _outer_functions, processes=2, chunk_size=_FILES_PER_CHUNK, crashed=_crashed)
        for functions, counts in extract(files):
            for reason in _REASONS.keys() & counts.keys():
                skipped[_REASONS[reason]] += counts[reason]
            yield from functions
        skipped.update(files.skipped)

    return SourceReader(read, files.repositories)


_REASONS = {
    "files in an unsupported language": "unsupported language",
    "files that do not parse": "does not parse",
    "files that crash the parser": "crashes the parser",
}


def _outer_functions(files: list[SourceFile]) -> tuple[list[SourceFile], Counter[str]]:
    found: list[SourceFile] = []
    counts: Counter[str] = Counter()
    for functions in _functions_by_file(files, counts, False):
        end = 0
        for one in functions:
            if (one.start_byte or 0) >= end:
                end = one.end_byte or 0
                path = f"{one.path}#L{one.line}"
                found.append(SourceFile(one.repository, path, one.language, one.source, one.license))
    return found, counts


SNIPPETS = ("files", "functions")
# Source → (module in `data.sources`, function). Modules are imported late: archives and folders need no `datasets`.
_OPENERS = {
    "folder": ("repositories", "folder_repositories"),
    "installed": ("repositories", "installed_repositories"),
    "archives": ("repositories", "archive_repositories"),
    "rows": ("dataset_files", "row_repositories"),
    "the_stack": ("dataset_files", "the_stack_repositories"),
}


@contextmanager
def checking_options(key: str, name: str) -> Iterator[None]:
    """Context manager for a call with a recipe's options of the source `name`; wrong ones raise UserError(`key`)."""
    try:
        yield
    except TypeError as error:
        fault = str(error).rpartition("() ")[2]  # without the name of our function
        raise UserError(key, f"The options of {name} are invalid: {fault}.") from error


def open_corpus(settings: Mapping[str, Any]) -> SourceReader:
    """Return a reader of the source code that a recipe's `corpus` names. The reader applies StarCoder2's filters.

    `settings` is this `corpus`: one of the keys below, which says where the code is; options of this key; and
    optionally `languages` (a list) and `snippets`. The value of `snippets` is `files` (the default), or `functions` to
    read each function as if it were a file (see `outer_functions`).

    - `folder: PATH`: a folder of repositories; option `depth` (number of levels from PATH down to the repositories);
    - `installed: true`: the installed Python packages; option `exclude` (names of distributions to leave out);
    - `archives: PATH`: an archive, or a folder of archives; each archive is read as one repository;
    - `rows: PATH or Hub id`: a dataset with one source file per row; options are arguments of `row_repositories`;
    - `the_stack: PATH or Hub id`: The Stack v2; options are arguments of `the_stack_repositories`.
    """
    options = dict(settings)
    named = [source for source in _OPENERS if source in options]
    snippets = options.pop("snippets", "files")
    if len(named) != 1 or options.get("installed", True) is not True:
        message = f"`corpus` must have exactly one of the keys {', '.join(_OPENERS)}; not {dict(settings)}."
        raise UserError("data.corpus.source", f"{message} The only value of `installed` is true.")
    if snippets not in SNIPPETS:
        message = f"`snippets` must be {' or '.join(SNIPPETS)}, not {snippets!r}."
        raise UserError("data.corpus.snippets", message)
    (kind,) = named
    source, (module, opener) = options.pop(kind), _OPENERS[kind]
    readers = import_module(f"modular_star_encoder.data.sources.{module}")
    places = () if kind == "installed" else (source,)
    with checking_options("data.corpus.options", f"corpus.{kind}"):
        files: SourceReader = getattr(readers, opener)(*places, **options, filters=STARCODER2_FILTERS)
    files.unicode_names = True
    return outer_functions(files) if snippets == "functions" else files


# Names of the columns on the Hub (`code_search_net`) and in the authors' JSON lines (github.com/github/CodeSearchNet).
_CODESEARCHNET_COLUMNS = {
    "language": ("language", "language"),
    "code": ("func_code_string", "code"),
    "documentation": ("func_documentation_string", "docstring"),
    "repository": ("repository_name", "repo"),
    "path": ("func_path_in_repository", "path"),
    "name": ("func_name", "func_name"),
    "source": ("whole_func_string", "original_string"),
    "url": ("func_code_url", "url"),
}
_REQUIRED = ("language", "code", "documentation")


def documentation_summary(documentation: str) -> str:
    """Return a documentation string up to its first blank line or `@`; CodeSearchNet uses this part as the query."""
    return re.split(r"\n\s*\n|@", documentation.strip(), maxsplit=1)[0].strip()


def codesearchnet_function(row: Mapping[str, Any]) -> DocumentedFunction | None:
    """Return the function in a row of CodeSearchNet, without its docstring; None if the docstring can't be removed."""
    texts: dict[str, str] = {}
    for what, names in _CODESEARCHNET_COLUMNS.items():
        found = [row[name] for name in names if isinstance(row.get(name), str)]
        if not found and what in _REQUIRED:
            message = f"Each row of CodeSearchNet must have a text in the column {' or '.join(dict.fromkeys(names))}."
            raise UserError("data.codesearchnet.column", message)
        texts[what] = found[0] if found else ""
    language = language_entry(language_named(texts["language"]) or texts["language"]).name
    line = re.search(r"#L(\d{1,9})", texts["url"])
    code = texts["code"].replace("\r\n", "\n").replace("\r", "\n")
    stripped = without_docstring(code) if language == "python" else code
    if stripped is None:
        return None
    return DocumentedFunction(
        repository=texts["repository"],
        path=texts["path"],
        line=int(line[1]) if line else 0,
        language=language,
        name=texts["name"],
        description=" ".join(documentation_summary(texts["documentation"]).split()),
        code=stripped,
        source=texts["source"] or texts["code"],
    )


def without_docstring(code: str) -> str | None:
    """Return the Python function `code`, which may be indented, without docstring; None if `code` can't be parsed."""
    try:
        found = find_functions(textwrap.dedent(code), "python")
    except UnparsableSourceError:
        return None
    begins_at = 1 + code[: len(code) - len(code.lstrip())].count("\n")
    return found[0].code if found and found[0].line == begins_at else None
