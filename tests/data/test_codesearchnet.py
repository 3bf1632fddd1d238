import pytest

from modular_star_encoder.evaluation.codesearchnet import codesearchnet_row, documentation_summary


@pytest.mark.parametrize(
    "documentation",
    ["Reads a\nfile.", "Reads a\nfile.\n \nMore.", "Reads a\nfile. @param path", "\n\nReads a\nfile.\n@see\n\nMore."],
)
def test_the_query_ends_at_the_first_blank_line_or_tag(documentation):
    assert documentation_summary(documentation) == "Reads a\nfile."


def test_a_row_becomes_a_pair():
    row = {"func_code_string": "func A() {}", "func_documentation_string": "Does it.\n\nSlowly.", "language": "go"}
    assert codesearchnet_row(row) == ("Does it.", "func A() {}", "go")


def test_python_code_that_holds_its_query_is_refused():
    code = 'def a():\n    """Does it."""\n    return 1'
    row = {"func_code_string": code, "func_documentation_string": "Does it.", "language": "python"}
    with pytest.raises(ValueError, match="strip the docstring"):
        codesearchnet_row(row)
    codesearchnet_row({**row, "func_code_string": "def a():\n    return 1"})
