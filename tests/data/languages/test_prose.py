"""Prose in place of code."""

import pytest

from modular_star_encoder.data.languages.documentation import reads_as_prose

CODE = {
    "python": "def size(self):\n    return self.count",
    "ruby": "def size\n  count\nend",
    "go": "func Size(s []int) int {\n\treturn len(s)\n}",
    "java": "int size() {\n    return count;\n}",
    "c": "int size(void);",
    "javascript": "size => size.length;",
    "decorated": "@property\ndef size(self):\n    return 1",
    "one expression": "x + y",
}
PROSE = {
    "sentence": "Returns the number of elements in this list.",
    "call in backticks": "Calls `size()` until there is nothing left.",
    "tags": "Returns the size of the list.\n\n@param {Array} list the list\n@returns {number} its size",
    "paragraphs": "First it reads the file.\n\nThen it closes the file (if it is open) and goes on.",
}


@pytest.mark.parametrize("name", CODE)
def test_code_is_not_taken_for_prose(name):
    assert not reads_as_prose(CODE[name])


@pytest.mark.parametrize("name", PROSE)
def test_a_description_is_recognised(name):
    assert reads_as_prose(PROSE[name])
