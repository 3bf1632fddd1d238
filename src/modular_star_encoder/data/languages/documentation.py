"""Turns comments and docstrings into the description of a function, one paragraph of prose.

The description ends at the first blank line or the first tag, such as `@param`, as in CodeSearchNet (arXiv 1909.09436).
"""

import ast
import html
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterator

from modular_star_encoder.data.languages.parsing import SourceText
from modular_star_encoder.data.languages.registry import Language, language_entry

# Comments that instruct tools; they are not prose.
_DIRECTIVE = re.compile(
    r"\s*(?:rubocop:|:\w*doc:|frozen_string_literal:|-\*-|eslint\b|js[hl]int\b|jscs:|istanbul ignore|c8 ignore"
    r"|prettier-ignore|phpcs:|nolint\w*|nosonar|clang-format o|cppcheck-suppress|coverity\b|lint:)",
    re.IGNORECASE,
)

_TAG = re.compile(r"\s*(?:[@\\](?P<name>[A-Za-z][\w-]*)|:?call-seq:)[ \t]*:?")
_PROSE_TAGS = {"brief", "short", "summary", "desc", "description", "details", "classdesc", "remark", "doc", "internal"}
_DOCSTRING_FIELD = re.compile(
    r"\n[ \t]*[:@](?:param|parameter|arg|argument|key|keyword|type|returns?|rtype|raises?|throws?|yields?|i?var)\b"
    r"[^:\n]*:(?!`)"
)
_LEGAL_NOTICE = re.compile(
    r"copyright\b|\(c\) *(?:19|20)\d\d|licen[sc]ed (?:under|to)|spdx-license|all rights reserved"
    r"|permission is hereby granted|@license\b",
    re.IGNORECASE,
)

_INLINE_TAG = re.compile(r"\{@(?P<name>\w++)\s*+(?P<text>[^{}]*+)\}")
_HTML_BREAK = re.compile(r"<(?:p|ul|ol|li|dl|pre|table|blockquote|h[1-6]|hr|div)\b[^<>]*>", re.IGNORECASE)
_HTML_TAG = re.compile(
    r"(?<![`\"'])</?(?:a|abbr|b|big|br|cite|code|dd|del|dfn|dt|em|font|i|img|ins|kbd|q|s|samp|small|span|strike|strong"
    r"|sub|sup|td|th|tr|tt|u|var)\b[^<>]*>|</(?:p|ul|ol|li|dl|pre|table|blockquote|h[1-6]|div)>",
    re.IGNORECASE,
)
_DOXYGEN_MARK = re.compile(r"(?<!\S)[\\@](?:a|b|c|e|em|p|ref|link)\s+(?=\S)")
_RDOC_ESCAPE = re.compile(r"(?<!\S)\\(?=\w)")  # in RDoc, `\port` shows `port` without a link to a method
_RDOC_MARK = re.compile(r"(?<![\w+])\+([\w:.#?!=]+)\+(?![\w+])")


def docstring_of(literal: str) -> str | None:
    """Return the text of one or several adjacent Python string literals; None for other code, such as an f-string."""
    try:
        with warnings.catch_warnings(action="ignore"):  # such as warnings about invalid escapes
            value = ast.literal_eval(f"({literal}\n)")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, str) else None


def docstring_description(docstring: str) -> str:
    """Return the first paragraph of a Python docstring, up to its first field (`:param x:`), as one line."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return _one_line(_DOCSTRING_FIELD.split("\n" + paragraph, maxsplit=1)[0])


def comment_description(comments: list[str], language: str) -> str:
    """Return the first paragraph of a function's comments, without markup; "" if they hold no prose or a licence."""
    entry, text = language_entry(language), "\n".join(comments)
    if _LEGAL_NOTICE.search(text):
        return ""
    text = "\n".join(comment for comment in comments if not re.match(entry.directive, comment))
    marker = r"=begin\b.*|=end\b.*" if text.startswith("=begin") else entry.line_comment
    if text.startswith("/*"):
        text, marker = re.sub(r"^/\*[*!]*<?", "", text).removesuffix("/").rstrip("*"), r"\s*\*+"
    prose = " ".join(_first_paragraph([re.sub(f"^(?:{marker})", "", line) for line in text.split("\n")], entry))
    if "html" in entry.markup:
        prose = _HTML_TAG.sub("", _INLINE_TAG.sub(_shown_text, prose))
    if "doxygen" in entry.markup:
        prose = _DOXYGEN_MARK.sub("", prose)
    if "rdoc" in entry.markup:
        prose = _RDOC_MARK.sub(r"\1", _RDOC_ESCAPE.sub("", prose))
    return _one_line(html.unescape(prose) if "html" in entry.markup else prose)


def _first_paragraph(lines: list[str], language: Language) -> list[str]:
    """Return the lines of prose before a blank line, a line of dashes, an HTML block, or a tag such as `@param`."""
    prose: list[str] = []
    inside_tag = False
    for line in lines:
        tag = _TAG.match(line)
        if _DIRECTIVE.match(line):
            continue
        if prose and (tag or not _is_prose(line)):
            break
        if tag:
            inside_tag = tag["name"] not in _PROSE_TAGS
            line = line[tag.end() :]
        elif not _is_prose(line):
            inside_tag = False
        if not inside_tag:
            first, *others = _HTML_BREAK.split(line) if "html" in language.markup else [line]
            prose += filter(_is_prose, [first])
            if others and prose:
                break
            prose += list(filter(_is_prose, others))[:1]
    return prose


def _is_prose(line: str) -> bool:
    return any(map(str.isalnum, line))


def _shown_text(match: re.Match[str]) -> str:
    """Return what the documentation shows in place of `{@code text}` or `{@link Class#method label}`."""
    name, text = match["name"].lower(), match["text"].strip()
    if name in ("inheritdoc", "value", "internal"):
        return ""
    if name.startswith("link"):
        target, _, label = text.partition("|" if "|" in text else " ")
        return label.strip() or target.replace("#", ".").lstrip(".")
    return text


def _one_line(text: str) -> str:
    # An escape in a docstring can make a lone surrogate, which no tokenizer accepts.
    return " ".join(text.encode(errors="replace").decode().split())


_MAX_GAP_BYTES = 200
_BLOCKS, _AFTER_MEMBER = ("/*", "=begin"), ("/**<", "/*!<", "///<", "//!<")


def description_before(start: int, comments: list[tuple[int, int]], source: SourceText, language: Language) -> str:
    """Return the description in comments right before byte `start`, or ""; `comments`: sorted spans of all comments."""
    blocks_only = language.documented_by_blocks
    run: list[str] = []
    for comment in _comments_before(start, comments, source, language):
        if comment.startswith("/**" if blocks_only else _BLOCKS):
            run = run or [comment]
            break
        if not blocks_only:
            run.append(comment)
    return comment_description(run[::-1], language.name) if run else ""


def _comments_before(start: int, spans: list[tuple[int, int]], source: SourceText, language: Language) -> Iterator[str]:
    """Yield the comments right before `start`, the last one first, up to a blank line or to code between comments."""
    may_follow = language.gap.encode()
    for index in range(bisect_right(spans, (start, start)) - 1, -1, -1):
        first, last = spans[index]
        gap = source.bytes[max(last, start - _MAX_GAP_BYTES - 1) : start]
        if len(gap) > _MAX_GAP_BYTES or gap.count(b"\n") > 1 or not re.fullmatch(may_follow, gap):
            break
        comment = source.bytes[first:last].decode()
        follows_code = b"\n" in gap and source.bytes[source.line_start(first) : first].strip()
        if follows_code or comment.startswith(_AFTER_MEMBER):
            break
        yield comment
        start, may_follow = first, rb"\s*"


# Atomic groups and possessive quantifiers, here and above, keep the time linear for hostile texts.
_TAGS = re.compile(r"^[^\S\n]*+@.*$|\{@\w++[^{}]*+\}|`[^`\n]*`", re.MULTILINE)
_CODE = re.compile(
    r"[{}]|;\s*$|\s=\s|^(?>.*?\w\().*\)[^\S\n]*+(?::[^\S\n]*+)?$|^[^\S\n]*+(?:def|func|function|class|end|return)\b",
    re.MULTILINE,
)
_WORD = re.compile(r"[^\W\d_]+")


def reads_as_prose(text: str) -> bool:
    """Return whether `text` is prose: three words or more, and no sign of code outside of backticks and `@` lines."""
    return len(_WORD.findall(text)) >= 3 and _CODE.search(_TAGS.sub("", text)) is None
