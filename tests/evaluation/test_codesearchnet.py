from modular_star_encoder.evaluation.codesearchnet import codesearchnet_row


def test_a_row_becomes_a_pair():
    row = {"func_code_string": "func A() {}", "func_documentation_string": "Does it.\n\nSlowly.", "language": "go"}
    assert codesearchnet_row(row) == ("Does it.", "func A() {}", "go")


def test_python_code_does_not_hold_its_query():
    code = 'def a():\n    """Does it."""\n    return 1'
    row = {"func_code_string": code, "func_documentation_string": "Does it.", "language": "python"}
    assert codesearchnet_row(row) == ("Does it.", "def a():\n    return 1", "python")
