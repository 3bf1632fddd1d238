"""Mutated source files through the extractor: whatever is found is exact, and nothing crashes."""

import os
import random
from collections import Counter

from modular_star_encoder.data.functions import extract_functions
from modular_star_encoder.data.sources import SourceFile
from tests.data.polyglot import SOURCES

MUTATIONS = int(os.environ.get("MOSE_MUTATIONS", "400"))  # files
SNIPPETS = [
    *"(){}[]<>;:,\"'`#@$\\/%\t\n\r",
    *('"""', "'''", "/*", "*/", "/**", "//", "<<~EOS\n", "<<<EOT\n", "?>", "<?php", "=begin\n", "=end\n", "\r\n", "#{"),
    *("é", "\u2028", "\x0c", "\ufeff", "\U0001f600", "e\u0301", "\0", "\ud800", "${", "\\\n", "def f():\n", "end\n"),
    *("class A {", "if (x) {", "template <", 'R"x(', "#ifdef A\n", "#endif\n", "MACRO(x)\n", "=> ", "func "),
]  # fmt: skip


def mutated(text, other, draw):
    """Replace parts of `text` by nothing, by a part of the other text, or by a snippet, and change line ends."""
    for _ in range(draw.randint(1, 6)):
        start, at = draw.randint(0, len(text)), draw.randint(0, len(other))
        end = min(len(text), start + draw.choice((0, 0, 1, 5, 40, 400)))
        new = draw.choice(("", other[at : at + end - start], draw.choice(SNIPPETS), draw.choice(SNIPPETS)))
        text = text[:start] + new + text[end:]
    return text.replace("\n", draw.choice(("\n", "\n", "\r\n", "\r", "\n\t")))


def check(file, counts):
    functions = extract_functions(file, counts, documented_only=False)
    encoded = file.text.encode(errors="surrogatepass")
    for function in functions:
        assert encoded[function.start_byte : function.end_byte].decode() == function.source
        before = encoded[: function.start_byte].decode().replace("\r\n", "\n").replace("\r", "\n")
        assert function.line == before.count("\n") + 1
        assert function.name
        assert function.code.strip() == function.code.rstrip()
        assert "\r" not in function.code
        assert "\n" not in function.description
        assert function.description.encode() is not None
    assert sorted(functions, key=lambda one: (one.start_byte, -one.end_byte)) == functions
    return functions


def test_mutated_files_never_crash_and_what_is_found_is_exact():
    sources, counts, found = list(SOURCES.items()), Counter(), 0
    for number in range(MUTATIONS):
        draw = random.Random(f"mutation {number}")
        language, source = sources[number % len(sources)]
        text = mutated(source, draw.choice(sources)[1], draw)
        try:
            found += len(check(SourceFile("repository", "file", language, text), counts))
        except Exception as error:
            raise AssertionError(f"mutation {number}, of {language}") from error
    # Neither harmless nor hopeless: most files are broken, and most of those still give functions.
    assert counts["files with a syntax error"] + counts["files that do not parse"] > MUTATIONS / 3
    assert counts["files with a syntax error"] > counts["files that do not parse"]
    assert found > MUTATIONS
