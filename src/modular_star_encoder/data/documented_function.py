"""The record of a function with its documentation, its identifier, and the keys by which near-copies are found."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DocumentedFunction:
    """A function and what its author says about it.

    Attributes:
        repository: Name of its repository.
        path: Path of its file, with forward slashes.
        line: 1-based line of the file at which the function begins: that of its first decorator, if it has any; 0 if
            its origin does not tell.
        language: Lower-case name of the programming language.
        name: Dotted name inside the file, such as `"Stack.push"`.
        description: First paragraph of the documentation, in one line; empty for the undocumented that a search keeps.
        code: Decorators, signature and body, dedented, with `\\n` line ends and without documentation: docstrings are
            taken out, and comments stand before a function, not in it.
        source: The whole function as its file has it, docstrings, line ends and indentation included; comments before
            it are no part of it. SynthCoNL's column `func1_CSN` is this text.
        start_byte: Its first byte in the UTF-8 encoding of the file's text; None if its origin does not tell.
        end_byte: The byte after its last: `text.encode()[start_byte:end_byte].decode() == source`.
        license: What the origin of the file says of its licence, if it says anything.
    """

    repository: str
    path: str
    line: int
    language: str
    name: str
    description: str
    code: str
    source: str = ""
    start_byte: int | None = None
    end_byte: int | None = None
    license: str | None = None


def function_id(function: DocumentedFunction) -> str:
    """Return an identifier of `function`: 32 hexadecimal digits, the same on every machine and in every run.

    It is the beginning of the SHA-256 of the repository, the path, the language, the place (line and first byte) and
    the source: a function that moves or changes becomes another one. Its name, description and licence do not count.
    """
    place = f"{function.line}:{'' if function.start_byte is None else function.start_byte}"
    # Lengths go before the parts, so that no two lists of parts make the same text.
    parts = (function.repository, function.path, function.language, place, function.source or function.code)
    encoded = [part.encode(errors="surrogatepass") for part in parts]
    digest = hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in encoded))
    return digest.hexdigest()[:32]


def code_key(code: str) -> str:
    """Return `code` with every run of white space made one space: equal for functions that differ in layout only."""
    return " ".join(code.split())


def description_key(description: str) -> str:
    """Return the lower-cased letters and digits of `description`: equal for near-identical descriptions."""
    return "".join(filter(str.isalnum, description.lower()))
