from dataclasses import replace

import pytest

from modular_star_encoder.data.functions import code_key, description_key, function_id
from tests.data.samples import extract_one, function


def test_keys_ignore_layout_and_punctuation_only():
    assert code_key("a =  1\n\tb") == code_key("a = 1\nb") != code_key("a = 1\nc")
    assert description_key("Return the Index.") == description_key("return (the) index") != description_key("the index")


def test_an_identifier_is_the_same_in_every_run():
    assert function_id(function()) == "cd8ab7017bc4282883e87ef5f3d2370e"
    assert function_id(function()) == function_id(replace(function(), name="x", description="y", license="MIT"))


@pytest.mark.parametrize(
    "change",
    [
        {"repository": "r"},
        {"path": "p"},
        {"language": "go"},
        {"line": 9},
        {"start_byte": 9},
        {"source": "x"},
        {"code": "y"},
    ],
)
def test_an_identifier_tells_apart_what_is_not_the_same_function(change):
    assert function_id(replace(function(), **change)) != function_id(function())


def test_parts_of_an_identifier_do_not_run_into_each_other():
    one, other = replace(function(), repository="a", path="bc"), replace(function(), repository="ab", path="c")
    assert function_id(one) != function_id(other)


def test_two_functions_of_one_line_have_identifiers_of_their_own():
    first = extract_one("def f(): 'Doc.'; return 1\n")
    assert function_id(first) != function_id(replace(first, start_byte=30))
