"""Extracts documented functions from a corpus: (description, code) rows, filtered by CodeSearchNet's rules.

The description is the first paragraph of a function's docstring in Python, and of the comment before it in other
languages. The code has no docstring; otherwise even BM25 would find it by the words of the query.

Source of the rules: Husain et al., "CodeSearchNet Challenge", 2019 (arXiv 1909.09436), section 2.
"""

import hashlib
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
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
    """A function and its author's description."""

    repository: str
    path: str  # with forward slashes, as in the repository
    line: int  # 1-based line at which the function, with its decorators, begins; 0 if unknown
    language: str
    name: str  # dotted name inside the file, such as "Stack.push"
    description: str  # first paragraph of the documentation, in one line; empty if there is none
    code: str  # decorators, signature and body, dedented, with `\n` line ends, without docstrings
    source: str = ""  # the whole function as in its file, from start_byte; SynthCoNL's column `func1_CSN`
    start_byte: int | None = None  # its first byte in the UTF-8 encoding of the file's text; None if unknown
    end_byte: int | None = None  # the byte after its last
    license: str | None = None  # as the source of the file reports it


def function_id(function: DocumentedFunction) -> str:
    """Hash a function's repository, path, language, place and source to 32 hexadecimal digits, the same everywhere."""
    place = f"{function.line}:{'' if function.start_byte is None else function.start_byte}"
    # The length of each part precedes it, so that different lists of parts never make the same text.
    parts = (function.repository, function.path, function.language, place, function.source or function.code)
    encoded = [part.encode(errors="surrogatepass") for part in parts]
    digest = hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in encoded))
    return digest.hexdigest()[:32]


def code_key(code: str) -> str:
    """Replace each run of white space in `code` by one space: codes that differ only in layout become equal."""
    return " ".join(code.split())


def description_key(description: str) -> str:
    """Return the letters and digits of `description` in lower case: nearly identical descriptions become equal."""
    return "".join(filter(str.isalnum, description.lower()))


def drop_reason(function: DocumentedFunction) -> str | None:
    """Return the reason why CodeSearchNet's rules drop `function`, or None if they keep it."""
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
    """Return all functions that `find_functions` finds in `file`; a `.h` file that holds C++ is parsed as C++.

    Adds the number of `"files that do not parse"` and the counts of `find_functions` to `counts`.
    """
    language = language_of_text(file.language, file.path, file.text)
    try:
        found = find_functions(file.text, language, documented_only=documented_only, counts=counts)
    except UnparsableSourceError:
        if counts is not None:
            counts["files that do not parse"] += 1
        return []
    origin = partial(DocumentedFunction, repository=file.repository, path=file.path, language=language)
    return [origin(license=file.license, **asdict(one)) for one in found]


def collect_functions(
    files: Iterable[SourceFile], processes: int = 2, progress: bool = True
) -> tuple[list[DocumentedFunction], Counter[str]]:
    """Collect the documented functions that `drop_reason` keeps, in order; of those with equal code, only the first.

    Returns them with counts of files and of documented, kept and dropped functions. The result does not depend on
    `processes`; with 0 or 1, no other process is started.
    """
    counts: Counter[str] = Counter()
    kept: dict[str, DocumentedFunction] = {}
    found, total = 0, length_hint(files) or None
    with tqdm(desc="Extracting functions", total=total, unit=" files", disable=not progress) as bar:
        for functions, chunk_counts in filtered_functions(files, processes):
            counts += chunk_counts
            found += len(functions)
            for function in functions:
                kept.setdefault(code_key(function.code), function)
            bar.update(chunk_counts["files"])
    if found > len(kept):
        counts["dropped: same code as an earlier function"] = found - len(kept)
    counts["functions kept"] = len(kept)
    return list(kept.values()), counts


def filtered_functions(
    files: Iterable[SourceFile], processes: int = 2
) -> Iterator[tuple[list[DocumentedFunction], Counter[str]]]:
    """Yield (functions, counts) for a few files at a time, filtered as in `collect_functions` but with duplicates."""
    yield from crash_safe_map(_filtered, files, processes=processes, chunk_size=_FILES_PER_CHUNK, crashed=_crashed)


def _filtered(files: list[SourceFile]) -> tuple[list[DocumentedFunction], Counter[str]]:
    counts: Counter[str] = Counter(files=len(files))
    kept: list[DocumentedFunction] = []
    for function in (one for found in _functions_by_file(files, counts, True) for one in found):
        counts["documented functions"] += 1
        if reason := drop_reason(function):
            counts[f"dropped: {reason}"] += 1
        else:
            kept.append(function)
    return kept, counts


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
    """Return a reader of the functions in another reader's files, documented or not: files with paths in `#L{line}`.

    A nested function stays in the function around it.
    """

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
# Source → (module of `data.sources`, function). Archives and folders need no `datasets`, so modules are imported late.
_OPENERS = {
    "folder": ("repositories", "folder_repositories"),
    "installed": ("repositories", "installed_repositories"),
    "archives": ("repositories", "archive_repositories"),
    "rows": ("dataset_files", "row_repositories"),
    "the_stack": ("dataset_files", "the_stack_repositories"),
}


def open_corpus(settings: Mapping[str, Any]) -> SourceReader:
    """Return a reader for the source code that a recipe's `corpus` names; it applies StarCoder2's filters.

    Args:
        settings: exactly one source, its options, and optionally `languages`, a list, and `snippets`: `files` (whole,
            the default) or `functions` (each by itself, see `outer_functions`):

            - `folder: PATH`, with `depth` (levels from PATH down to the repositories);
            - `installed: true`, with `exclude` (names of distributions): the installed Python packages;
            - `archives: PATH`: an archive, or a folder of them, one repository each;
            - `rows: PATH or Hub id`, with `columns` (our name → the dataset's) and the arguments of `row_repositories`;
            - `the_stack: PATH or Hub id`, with `content_url`, from where contents are fetched with your own access,
              and the arguments of `the_stack_repositories`.
    """
    options = dict(settings)
    named = [source for source in _OPENERS if source in options]
    if len(named) != 1 or options.get("installed", True) is not True:
        message = f"`corpus` must have exactly one of {', '.join(_OPENERS)} (as `installed: true`); not {options}."
        raise UserError("data.corpus.source", message)
    kind = named[0]
    source, snippets = options.pop(kind), options.pop("snippets", "files")
    if snippets not in SNIPPETS:
        raise UserError("data.corpus.snippets", f"`snippets` must be one of {', '.join(SNIPPETS)}; not {snippets!r}.")
    module, opener = _OPENERS[kind]
    readers = import_module(f"modular_star_encoder.data.sources.{module}")
    try:
        places = () if kind == "installed" else (source,)
        files: SourceReader = getattr(readers, opener)(*places, **options, filters=STARCODER2_FILTERS)
    except TypeError as error:
        fault = str(error).rpartition("() ")[2]  # without the name of our function
        raise UserError("data.corpus.options", f"The options of corpus.{kind} do not fit: {fault}.") from error
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
    """Return a documentation string's first paragraph, up to the first `@` tag: the query in CodeSearchNet."""
    return re.split(r"\n\s*\n|@", documentation.strip(), maxsplit=1)[0].strip()


def codesearchnet_function(row: Mapping[str, Any]) -> DocumentedFunction | None:
    """Read the function in a published CodeSearchNet row, with the column names of the Hub or of the JSON Lines files.

    The docstring is removed from Python code, because BM25 reaches an MRR of 97 % with it; None if that is impossible.
    """
    texts: dict[str, str] = {}
    for what, names in _CODESEARCHNET_COLUMNS.items():
        found = [row[name] for name in names if isinstance(row.get(name), str)]
        if not found and what in _REQUIRED:
            message = f"A row of CodeSearchNet needs text in the column {' or '.join(dict.fromkeys(names))}."
            raise UserError("data.codesearchnet.column", message)
        texts[what] = found[0] if found else ""
    language = language_entry(language_named(texts["language"]) or texts["language"]).name
    line = re.search(r"#L(\d+)", texts["url"])
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
    """Return Python `code`, which may be indented like a method, without its docstring; None if it does not parse."""
    try:
        found = find_functions(textwrap.dedent(code), "python")
    except UnparsableSourceError:
        return None
    begins_at = 1 + code[: len(code) - len(code.lstrip())].count("\n")
    return found[0].code if found and found[0].line == begins_at else None
