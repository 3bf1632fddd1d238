import pytest

from modular_star_encoder.data.codesearchnet import (
    LeakingDocstringError,
    codesearchnet_function,
    documentation_summary,
)


@pytest.mark.parametrize(
    "documentation",
    ["Reads a\nfile.", "Reads a\nfile.\n \nMore.", "Reads a\nfile. @param path", "\n\nReads a\nfile.\n@see\n\nMore."],
)
def test_the_query_ends_at_the_first_blank_line_or_tag(documentation):
    assert documentation_summary(documentation) == "Reads a\nfile."


def test_a_row_becomes_a_function():
    row = {"func_code_string": "func A() {}", "func_documentation_string": "Does it.\n\nSlowly.", "language": "go"}
    function = codesearchnet_function(row)
    assert (function.description, function.code, function.language) == ("Does it.", "func A() {}", "go")


def test_python_code_loses_its_query_or_is_refused():
    code = 'def a():\n    """Does it."""\n    return 1'
    row = {"func_code_string": code, "func_documentation_string": "Does it.", "language": "python"}
    assert codesearchnet_function(row).code == "def a():\n    return 1"
    with pytest.raises(LeakingDocstringError):
        codesearchnet_function({**row, "func_code_string": code + ")))"})
