"""Path patterns as regular expressions that Python and the vector stores read alike."""

from __future__ import annotations

import re

_PUNCTUATION = re.compile(r"[.^$*+?{}\[\]\\|()]")
_RANGE_OR_CHARACTER = re.compile(".-.|.", re.DOTALL)


def glob_expression(pattern: str) -> str:
    """The anchored regular expression of a pattern of paths with forward slashes.

    `*` and `?` stay within a name, `**` crosses folders, `[abc]`, `[a-z]` and `[!abc]` are one character. A pattern
    without a slash is about the file's name in any folder; one that ends in a slash is about all below that folder.

    Raises:
        ValueError: a blank pattern, or one with a bracket that isn't closed or a range that ends before it begins.
    """
    if not pattern.strip():
        raise ValueError("A path pattern must not be blank; '*.py' and 'src/**' are patterns.")
    if "/" not in pattern:
        pattern = f"**/{pattern}"
    pattern = pattern.removeprefix("./").removeprefix("/")
    if pattern.endswith("/"):
        pattern += "**"
    parts, place = [], 0
    while place < len(pattern):
        token, place = _token(pattern, place)
        parts.append(token)
    return f"^{''.join(parts)}$"


def _token(pattern: str, place: int) -> tuple[str, int]:
    """The expression of what stands at `place`, and where the next thing stands."""
    if pattern.startswith("**/", place):
        return "(?:.*/)?", place + 3
    if pattern.startswith("**", place):
        return ".*", place + 2
    character = pattern[place]
    if character == "*":
        return "[^/]*", place + 1
    if character == "?":
        return "[^/]", place + 1
    if character == "[":
        return _bracket(pattern, place)
    return _PUNCTUATION.sub(r"\\\g<0>", character), place + 1


def _bracket(pattern: str, place: int) -> tuple[str, int]:
    negated = pattern.startswith("!", place + 1)
    start = place + 1 + negated
    end = pattern.find("]", start + 1)
    if end < 0:
        raise ValueError(f"The path pattern {pattern!r} has a '[' without a ']'.")
    inside = []
    for part in _RANGE_OR_CHARACTER.findall(pattern[start:end]):
        if part[0] > part[-1]:
            raise ValueError(f"The path pattern {pattern!r} has a range, {part}, that ends before it begins.")
        # `&&`, `--` and `~~` are set operations in Rust's expressions.
        inside.append("-".join(re.sub(r"[\\\[\]^&~-]", r"\\\g<0>", one) for one in part[::2]))
    return f"[{'^/' if negated else ''}{''.join(inside)}]", end + 1
