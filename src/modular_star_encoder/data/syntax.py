"""Is a text valid code in a language, and does it hold a function? Questions about snippets, not files.

A method of Java, PHP or JavaScript stands in a class, and none of them is a valid file without one: a snippet is tried
as it is and in the frames of its language, and the best result counts.
"""

import textwrap

from tree_sitter import QueryCursor, Tree

from modular_star_encoder.data.c_family import parse_around_macros
from modular_star_encoder.data.grammars import UnparsableSourceError, error_bytes, load_grammar, parse

_FRAMES: dict[str, tuple[tuple[bytes, bytes], ...]] = {
    "python": ((b"if 1:\n", b"\n"),),
    "java": ((b"class A {\n", b"\n}"), (b"interface A {\n", b"\n}"), (b"enum A { B;\n", b"\n}")),
    "go": (),
    "php": ((b"class A {\n", b"\n}"), (b"interface A {\n", b"\n}")),
    "ruby": (),
    "javascript": ((b"class A {\n", b"\n}"), (b"({\n", b"\n})"), (b"(\n", b"\n)")),
    "c": (),
    "cpp": ((b"class A {\n", b"\n};"),),
}


def syntax_error_share(code: str, language: str) -> float:
    """Return the share of the bytes of `code` that are no valid `language`: 0.0 for valid code, 1.0 at the most.

    The bytes are those under ERROR nodes of the tree-sitter grammar; a missing token counts as one. Text that cannot be
    parsed at all (see `grammars.parse`) and blank text are 1.0. Grammars forgive much, Ruby's most of all: plain prose
    may parse, which `holds_function` tells from code.

    Args:
        code: A function, a method without its class, or any other piece of code; PHP may lack its `<?php`.
        language: One of `grammars.SUPPORTED_LANGUAGES`.

    Raises:
        ValueError: If the language is not supported.
    """
    return _best_parse(code, language)[0]


def holds_function(code: str, language: str) -> bool:
    """Whether `code` defines a function with a name and a body in `language`.

    Args:
        code: As for `syntax_error_share`.
        language: As for `syntax_error_share`.

    Raises:
        ValueError: If the language is not supported.
    """
    return _best_parse(code, language)[1]


def _best_parse(code: str, language: str) -> tuple[float, bool]:
    """Return (error share, whether there is a function) of `code` in the frame that suits it best."""
    grammar = load_grammar(language)
    body = textwrap.dedent(code.replace("\r\n", "\n").replace("\r", "\n")).strip("\n").encode(errors="replace")
    if not body.strip():
        return 1.0, False
    parser = parse_around_macros if language in ("c", "cpp") else parse
    best = (1.0, False)
    for before, after in _frames(body, language):
        try:
            tree = parser(before + body + after, grammar)
        except UnparsableSourceError:
            break
        if before and after and not _is_one_frame(tree):
            continue
        # An error may lie in the frame alone, as with a brace too few.
        errors = max(int(tree.root_node.has_error), error_bytes(tree, grammar, len(before), len(before) + len(body)))
        found = "function" in QueryCursor(grammar.query).captures(tree.root_node)
        best = min(best, (min(1.0, errors / len(body)), found), key=lambda one: (one[0], not one[1]))
        if best == (0.0, True):
            break
    return best


def _frames(body: bytes, language: str) -> list[tuple[bytes, bytes]]:
    if language != "php":
        return [(b"", b""), *_FRAMES[language]]
    if body.lstrip().startswith(b"<?"):
        return [(b"", b"")]
    return [(b"<?php\n" + before, after) for before, after in [(b"", b""), *_FRAMES[language]]]


def _is_one_frame(tree: Tree) -> bool:
    """Whether the code has not closed its frame and opened another."""
    return sum(node.type != "php_tag" for node in tree.root_node.named_children) == 1
