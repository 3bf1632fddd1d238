"""Extract a dataset's content: documented functions from source files, and code from a model's answers."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import PurePath
from textwrap import dedent
from typing import Any

import pyarrow as pa

from modular_star_encoder.data import functions
from modular_star_encoder.data.functions import code_key, filtered_functions, function_id, open_corpus
from modular_star_encoder.data.languages.parsing import check_syntax
from modular_star_encoder.data.languages.registry import LANGUAGES, language_named, language_of
from modular_star_encoder.data.sources import SourceReader
from modular_star_encoder.data.sources.dataset_rows import open_dataset_rows
from modular_star_encoder.synthconl.translation import ERROR, MAX_ANSWER_CHARACTERS, TOO_LONG
from modular_star_encoder.utils.errors import UserError

_COLUMNS = (
    *("id", "repository_name", "func_path_in_repository", "func_code_url"),
    *("language1_CSN", "func1_CSN", "func_documentation_string", "license"),
)
FUNCTION_SCHEMA = pa.schema([(name, pa.string()) for name in _COLUMNS])
_CODESEARCHNET_COLUMNS = (
    *("repository_name", "func_path_in_repository", "func_code_url", "language"),
    *("whole_func_string", "func_code_string", "func_documentation_string"),
)

Row = dict[str, str | None]


def open_source(corpus: Mapping[str, Any], languages: Sequence[str]) -> SourceReader | Iterable[tuple[str, Any]]:
    """Open a source of functions by `open_dataset_rows` if it has the key `codesearchnet`, else by `open_corpus`."""
    if "codesearchnet" in corpus:
        options = dict(corpus)
        return open_dataset_rows(options.pop("codesearchnet"), _CODESEARCHNET_COLUMNS, **options)
    read = {*languages, "c"} if "cpp" in languages else languages  # because header files of C++ count as C
    return open_corpus({"languages": sorted(read), **corpus})


def function_rows(
    corpora: Sequence[Mapping[str, Any]],
    *,
    languages: Sequence[str],
    max_characters: int,
    counts: Counter[str],
    processes: int = 2,
    progress: bool = True,
) -> Iterator[Row]:
    """Yield the documented functions of `corpora` as rows with the columns of `FUNCTION_SCHEMA`.

    `counts` gets the numbers of functions that are kept, and of those that are dropped for each reason.
    """
    seen: set[bytes] = set()
    for corpus in corpora:
        source = open_source(corpus, languages)
        if isinstance(source, SourceReader):
            rows: Iterator[Row] = map(_row, filtered_functions(source, counts, processes, progress))
        else:
            rows = _codesearchnet_rows(source, languages, counts)
        for row in rows:
            reason = _reason(row, languages, max_characters, seen)
            counts[f"dropped: {reason}" if reason else "functions kept"] += 1
            if reason is None:
                yield row
        if isinstance(source, SourceReader):
            counts.update({f"files left out: {reason}": count for reason, count in source.skipped.items()})


def _codesearchnet_rows(
    rows: Iterable[tuple[str, Any]], languages: Sequence[str], counts: Counter[str]
) -> Iterator[Row]:
    for place, row in rows:
        counts["rows of CodeSearchNet"] += 1
        if not isinstance(row, dict):
            raise UserError("synthconl.codesearchnet", f"{place} is not a row of CodeSearchNet ({row}).")
        if language_named(row.get("language")) not in languages:
            counts["dropped: another language"] += 1
        elif function := functions.codesearchnet_function(row):
            yield _row(function, row.get("func_code_url"))
        else:
            counts["dropped: its docstring can't be taken out"] += 1


def _row(function: functions.DocumentedFunction, url: str | None = None) -> Row:
    place = function_id(function), function.repository, function.path, url
    values = (*place, function.language, function.code, function.description, function.license)
    return dict(zip(_COLUMNS, values, strict=True))


def _reason(row: Row, languages: Sequence[str], max_characters: int, seen: set[bytes]) -> str | None:
    """Return why a row is dropped, or None if it is kept; a digest of a kept row's code is added to `seen`."""
    code, description = row["func1_CSN"] or "", row["func_documentation_string"] or ""
    if row["language1_CSN"] not in languages:
        return "another language"
    if not code.strip() or not description.strip():
        return "without code or description"
    if len(code) > max_characters:
        return f"more than {max_characters:,} characters"
    try:
        key = blake2b(code_key(code).encode(), digest_size=16).digest()
        "".join(filter(None, row.values())).encode()
    except UnicodeEncodeError:
        return "characters that no file can hold"
    if key in seen:
        return "same code as an earlier function"
    seen.add(key)
    return None


MAX_SYNTAX_ERROR_SHARE = 0.05
_REASON_OF_FINISH = {
    ERROR: "not answered",
    TOO_LONG: "prompt too long",
    "content_filter": "refused",
    "length": "truncated",
}

REASONS = (
    *_REASON_OF_FINISH.values(),
    *("empty", "same as the source", "not the target language", "unparsable", "no function"),
)
"""All reasons to reject a translation, in the order of the checks."""

# Tags of code blocks that are neither names nor suffixes of their languages.
_TAGS = {"python3": "python", "golang": "go", "node": "javascript"}
# A Markdown code fence, alone on its line or first in a list item; only an opening fence has a tag.
_FENCE = re.compile(
    r"(?P<lead>[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?)(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<tag>[^`\s]*+)[^`]*"
)
# The text of reasoning models before their answer; its opening tag may have been part of the prompt.
_REASONING = re.compile(r"\A(?:\s*<think>.*?(?:</think>|\Z)|.*?^[ \t]*</think>[ \t]*$)", re.MULTILINE | re.DOTALL)
_OPENING = re.compile(
    r"\A\s*(?:sure|certainly|of course|okay|here(?:'s| is| are)|below|this is|the (?:following|translated))\b"
    r"[^\n]*[:.!][ \t]*\n",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\n[ \t]*\n(?:(?:notes?|explanation|key changes|key differences):|(?:note that|please note|let me know|i hope)\b|"
    r"(?:in )?(?:this|the (?:above|translated)) (?:code|function|method|translation|implementation|version)\b).*\Z",
    re.IGNORECASE | re.DOTALL,
)
_REFUSAL = re.compile(
    r"\A\s*(?:(?:sorry|unfortunately),|(?:i(?:'|’| a)m (?:sorry|unable|not able|afraid)|i apologi[sz]e|"
    r"i can(?:'|’|no)t|as an ai)\b)",
    re.IGNORECASE,
)
_PHP_TAGS = re.compile(r"\A\s*<\?php\b[ \t]*\n?|\n?\?>\s*\Z")


@dataclass(frozen=True, slots=True)
class Translation:
    """The code of a translated function, or the reason why it was rejected."""

    code: str  # the function; empty if it is rejected
    rejected: str = ""  # one of `REASONS`; empty if it is accepted


def clean_translation(
    text: str,
    finish_reason: str,
    *,
    source: str,
    source_language: str,
    target_language: str,
    max_error_share: float = MAX_SYNTAX_ERROR_SHARE,  # of the code's bytes; 1: syntax is not checked
) -> Translation:
    """Extract the code from a model's answer (see `Completion`) and accept or reject it as a translation of `source`.

    The sentences around the code are removed. If the rest parses as a function, or if the answer has no code block, the
    rest is the code. Otherwise the code block is the code; if there are several, the longest block in the target
    language is the code. The code is accepted if it contains a function and at most `max_error_share` of it fails to
    parse.
    """
    if reason := _REASON_OF_FINISH.get(finish_reason):
        return Translation("", reason)
    if len(text) > MAX_ANSWER_CHARACTERS:
        return Translation("", "no function")
    text = _REASONING.sub("", text.replace("\r\n", "\n"))  # `_FENCE` matches a line without \r
    blocks, plain = code_blocks(text), _CLOSING.sub("", _OPENING.sub("", text))
    if blocks and not _FENCE.match(text.lstrip()) and not _fault(plain, source_language, target_language, 0):
        blocks = []  # the fences are in comments of the code
    tags = {tag: language_named(tag) or language_of(PurePath(f"file.{tag}")) or _TAGS.get(tag, "") for tag, _ in blocks}
    named = [(tags[tag], code) for tag, code in blocks]
    best = max(named, key=lambda one: (one[0] == target_language, one[0] == "", len(one[1])), default=None)
    language, code = best or ("", plain)
    code = dedent((_PHP_TAGS.sub("", code) if target_language == "php" else code).strip("\n").rstrip())
    if not code:
        reason = "empty"
    elif best is None and _REFUSAL.match(text):
        reason = "refused"
    elif code_key(code) == code_key(source):
        reason = "same as the source"
    elif language not in ("", target_language):
        reason = "not the target language"
    else:
        reason = _fault(code, source_language, target_language, max_error_share)
    return Translation("", reason) if reason else Translation(code)


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return (tag in lower case, code) for each fenced code block in a Markdown text.

    A fence that is indented further than the opening fence belongs to the code. A block without a closing fence ends
    where the next block begins or the text ends. If its code then has an odd number of fences, the block already ends
    at the last of these fences.
    """
    blocks: list[tuple[str, str]] = []
    opening, depth, start, lines = None, 0, 0, text.split("\n")
    for number, line in enumerate(lines):
        if not (fence := _FENCE.fullmatch(line)):
            continue
        indent = len(fence["lead"].expandtabs())
        if opening is not None:
            if indent > depth or not fence["fence"].startswith(opening["fence"]):
                continue
            blocks.append(_block(opening, lines[start:number], closed=not fence["tag"]))
        opening, depth, start = (None if opening is not None and not fence["tag"] else fence), indent, number + 1
    return blocks if opening is None else [*blocks, _block(opening, lines[start:], closed=False)]


def _block(opening: re.Match[str], lines: list[str], *, closed: bool) -> tuple[str, str]:
    code = "\n".join(lines)
    if not closed and code.count(opening["fence"]) % 2:
        code = code.rpartition(opening["fence"])[0]
    return opening["tag"].lower(), code


def _fault(code: str, source: str, target: str, max_error_share: float) -> str:
    """Return why `code` is rejected as a translation from language `source` to `target`; "" if it is accepted."""
    if max_error_share >= 1:
        return ""
    share, has_function = check_syntax(code, target)
    # Grammars are tolerant: JavaScript often parses as C++ with few errors. The second check finds untranslated code.
    if share == 0 or (share <= max_error_share and check_syntax(code, source)[0] > 0):
        return "" if has_function else "no function"
    others = (language for language in LANGUAGES if language != target)
    return "not the target language" if any(check_syntax(code, other)[0] == 0 for other in others) else "unparsable"
