import time

import pytest

from modular_star_encoder.data.languages import documentation
from modular_star_encoder.data.languages.documentation import comment_description, docstring_description, reads_as_prose


@pytest.mark.parametrize(
    ("language", "comment", "description"),
    [
        ("java", "/** Adds x. */", "Adds x."),
        ("java", "/**\n * Adds x\n * to y.\n *\n * Slowly.\n */", "Adds x to y."),
        ("java", "/**\n * Adds x.\n * @param x a number\n */", "Adds x."),
        ("java", "/**\n * @deprecated use y\n *   or z\n *\n * Adds x.\n */", "Adds x."),
        ("java", "/** @return the sum */", ""),
        ("java", "/** {@inheritDoc} */", ""),
        ("java", "/** Mail a@b.org about it. */", "Mail a@b.org about it."),
        ("java", "/**\n * <p>Adds <code>x</code> &amp; y.</p>\n * <p>Slowly.\n */", "Adds x & y."),
        ("java", "/** Adds x.<p>Slowly. */", "Adds x."),
        ("java", "/** Maps List<String> to {@code Map<K, V>}. */", "Maps List<String> to Map<K, V>."),
        ("java", "/** See {@link Stack#push} and {@link #pop the other}. */", "See Stack.push and the other."),
        ("java", "/***\n *** Adds x.\n **/", "Adds x."),
        ("php", "/**\n * Adds x.\n * \n * @since 1.0\n */", "Adds x."),
        ("javascript", "/**\n * @memberof A\n * @description Adds x\n * to y.\n * @example f()\n */", "Adds x to y."),
        ("javascript", "/** Adds a `<b>` to <b>x</b>. */", "Adds a `<b>` to x."),
        ("ruby", "# Adds the \\port of x.", "Adds the port of x."),
        ("javascript", "/** Adds {@link A|the first} to {@linkcode B}. */", "Adds the first to B."),
        ("c", "/*\n * ======\n * Adds x.\n * ------\n * Slowly.\n */", "Adds x."),
        ("c", "/* Adds x\n   to y. */", "Adds x to y."),
        ("c", "/* Adds a * b. */", "Adds a * b."),
        ("c", "/* Adds x.\n * Copyright 2020 Me */", ""),
        ("c", "/* Adds x.\n * Licensed under the MIT */", ""),
        ("c", "/* Adds x.\n * SPDX-License-Identifier: MIT */", ""),
        ("c", "/// \\brief Adds \\a x to \\c y.\n/// \\param x a number", "Adds x to y."),
        ("cpp", "//! Adds x.\n//!\n//! Slowly.", "Adds x."),
        ("cpp", "// NOLINTNEXTLINE\n// Adds x.", "Adds x."),
        ("go", "// Add adds x <b>\n// to y.\n//\n// Slowly.", "Add adds x <b> to y."),
        ("go", "//go:noinline\n// Add adds x.\n//nolint:gosec", "Add adds x."),
        ("go", "/* Add adds x. */", "Add adds x."),
        ("ruby", "# Adds +x+ to y.\n#\n# Slowly.", "Adds x to y."),
        ("ruby", "##\n# Adds x.\n# @param x a number", "Adds x."),
        ("ruby", "# :call-seq:\n#   add(x) -> y\n#\n# Adds x.", "Adds x."),
        ("ruby", "# :nodoc:", ""),
        ("ruby", "=begin\nAdds x.\n\nSlowly.\n=end", "Adds x."),
        ("ruby", "# rubocop:disable all\n# Adds 1 + 2 + x.", "Adds 1 + 2 + x."),
    ],
)
def test_the_description_is_the_first_paragraph_without_markup(language, comment, description):
    comments = [comment] if comment.startswith(("/*", "=begin")) else comment.split("\n")
    assert comment_description(comments, language) == description


CODE = ["def size(self):\n    return self.count", "def size\n  count\nend", "size => size.length;", "x + y"]
CODE += ["func Size(s []int) int {\n\treturn len(s)\n}", "int size(void);", "@property\ndef size(self):\n    return 1"]
PROSE = ["Returns the number of elements in this list.", "Calls `size()` until there is nothing left."]
PROSE += ["Returns the size of the list.\n\n@param {Array} list the list\n@returns {number} its size"]
PROSE += ["First it reads the file.\n\nThen it closes the file (if it is open) and continues."]


def test_prose_is_recognised_and_code_is_not_taken_for_it():
    assert [text for text in CODE + PROSE if reads_as_prose(text)] == PROSE


@pytest.mark.parametrize(
    ("docstring", "description"),
    [
        ("\n    Adds x\n    to y.\n    \n    Slowly.", "Adds x to y."),
        ("Adds x.\n    :param x: a number\n    :return: y", "Adds x."),
        ("Adds x.\n    @param x: a number", "Adds x."),
        (":param x: a number", ""),
        (":class:`Adder` of\n    :class:`X` adds x.", ":class:`Adder` of :class:`X` adds x."),
        ("Adds x.\n    @decorated is allowed.", "Adds x. @decorated is allowed."),
        ("Title\n=====\n\nMore.", "Title ====="),
        ("Bad \ud800 escape.", "Bad ? escape."),
    ],
)
def test_the_description_of_a_docstring_ends_at_a_blank_line_or_a_field(docstring, description):
    assert docstring_description(docstring) == description


N = 100_000
HOSTILE = {
    "blank lines": lambda: reads_as_prose("Adds two numbers" + "\n" * N + "x"),
    "brackets": lambda: reads_as_prose("Adds two numbers. " + "a(" * N),
    "blanks": lambda: reads_as_prose("Adds two numbers by f()" + " " * N + "x"),
    "tag in prose": lambda: reads_as_prose("Adds two numbers {@" + "a" * N),
    "tag": lambda: comment_description(["/** {@" + "a" * N + " */"], "java"),
    "margin": lambda: comment_description(["/*\n" + " " * N + "x\n*/"], "java"),
    "line comment": lambda: comment_description(["# " + " " * N + "x"], "php"),
    "docstring": lambda: docstring_description("\n" * 5 * N + "x"),
}


@pytest.mark.parametrize("call", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_take_linear_time(call):
    start = time.process_time()
    call()
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("'a'", "a"),
        ('r"""\\d\nb"""', "\\d\nb"),
        ("('a'\n 'b')", "ab"),
        ("'\\x41'", "A"),
        ("b'a'", None),
        ("f'a{b}'", None),
        ("ur'a'", None),
        ("('a', 'b')", None),
        ("(" * 500 + "'a'" + ")" * 500, None),
    ],
)
def test_a_docstring_is_a_plain_string_of_any_spelling(literal, value):
    assert documentation.docstring_of(literal) == value
