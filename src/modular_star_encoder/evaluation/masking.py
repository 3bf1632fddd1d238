"""Code with its names replaced: what is left when identifiers can't be matched by their spelling.

Solutions of one exercise share the names that the exercise prescribes, so word overlap alone finds most translations.
`mask_names` replaces each identifier of a snippet, the same one always by the same placeholder, and drops comments and
docstrings, which repeat the names in prose. Keywords, operators, literals and what a language defines itself (`len`,
`self`, `int`) stay. Names of libraries are identifiers like others.
"""

from __future__ import annotations

import re
from functools import lru_cache

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Name, String, _TokenType

_WORD = re.compile(r"[^\W\d]\w*")
_KEPT = (Name.Builtin, Name.Entity, Name.Tag)
_DIRECTIVES = re.compile(
    r"define|undef|include|ifn?def|if|elif|else|endif|pragma|once|error|warning|line|defined|import|(end)?region"
    r"|nullable|enable|disable|restore|php"
)
_OWN_OBJECT = ("this", "self")  # PHP's lexer takes $this for a variable like others


@lru_cache(maxsize=1 << 14)
def mask_names(code: str, language: str) -> str:
    """The code with every identifier replaced by `name1`, `name2`, … in the order of their first appearance.

    Args:
        code: a snippet or a file.
        language: any name that Pygments knows, such as "python", "c++", "c#".

    Raises:
        ValueError: Pygments has no lexer for the language.
    """
    names: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        return match[0] if match[0] in _OWN_OBJECT else names.setdefault(match[0], f"name{len(names) + 1}")

    pieces = []
    for kind, text in _lexer(language).get_tokens(code):
        if kind in Comment.PreprocFile and not text.startswith("<"):
            pieces.append(_WORD.sub(placeholder, text))
        elif kind in Comment.Preproc:
            pieces.append(_WORD.sub(lambda m: m[0] if _DIRECTIVES.fullmatch(m[0]) else placeholder(m), text))
        elif kind in Comment.PreprocFile or (kind not in Comment and kind not in String.Doc):
            pieces.append(_WORD.sub(placeholder, text) if _is_name(kind) else text)
    lines = [line.rstrip() for line in "".join(pieces).split("\n")]
    return "\n".join(line for line in lines if line)


def _is_name(kind: _TokenType) -> bool:
    return kind in String.Symbol or (kind in Name and not any(kind in kept for kept in _KEPT))


@lru_cache
def _lexer(language: str) -> Lexer:
    options = {"startinline": True} if language == "php" else {}
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False, **options)
    except ValueError:
        raise ValueError(f"There is no lexer for {language!r}, so its names can't be masked.") from None
