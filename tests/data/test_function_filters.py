from dataclasses import replace

import pytest

from modular_star_encoder.data.functions import FILTERS
from tests.data.samples import function


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"description": "Two words."}, "description not of 3 to 256 words"),
        ({"description": "One -- two --"}, "description not of 3 to 256 words"),
        ({"description": "word " * 257}, "description not of 3 to 256 words"),
        ({"description": "Возвращает сумму двух чисел of x"}, "description mostly not ASCII"),
        ({"code": "def f():\n\n\n    return 1"}, "code of fewer than 3 lines"),
        ({"name": "A.__len__"}, "special method"),
        ({"name": "A.runTest"}, "name contains test"),
    ],
)
def test_each_rule_drops_what_it_names(changes, reason):
    assert all(keeps(function()) for keeps in FILTERS.values())
    dropped_by = [name for name, keeps in FILTERS.items() if not keeps(replace(function(), **changes))]
    assert dropped_by == [reason]


def test_rules_keep_what_lies_on_their_limits():
    for description in ("just three words", "word " * 256, "Résumé of the naïve façade"):
        assert all(keeps(replace(function(), description=description)) for keeps in FILTERS.values())
    assert all(keeps(replace(function(), name="TestCase.run")) for keeps in FILTERS.values())


def reasons(language, name):
    dropped = [
        reason for reason, keeps in FILTERS.items() if not keeps(replace(function(), language=language, name=name))
    ]
    return dropped[:1]


@pytest.mark.parametrize(
    ("language", "name"),
    [
        ("python", "Stack.__init__"),
        ("java", "Outer.Stack.Stack"),
        ("php", "Stack.__construct"),
        ("ruby", "Stack.initialize"),
        ("javascript", "Stack.constructor"),
        ("cpp", "Stack.Stack"),
        ("cpp", "Stack.~Stack"),
    ],
)
def test_constructors_are_dropped(language, name):
    assert reasons(language, name) == ["constructor"]


@pytest.mark.parametrize(
    ("language", "name"),
    [
        ("python", "Stack.__len__"),
        ("java", "Stack.toString"),
        ("java", "Stack.hashCode"),
        ("php", "Stack.__get"),
        ("ruby", "Stack.=="),
        ("ruby", "Stack.to_s"),
        ("javascript", "Stack.toString"),
        ("go", "Stack.String"),
        ("go", "main"),
        ("c", "main"),
        ("cpp", "Stack.operator=="),
        ("cpp", "Stack.operator bool"),
    ],
)
def test_methods_that_the_language_calls_are_dropped(language, name):
    assert reasons(language, name) == ["special method"]


@pytest.mark.parametrize(
    ("language", "name"),
    [
        ("python", "__private"),
        ("python", "toString"),
        ("java", "Stack.stack"),
        ("java", "Stack.toStringList"),
        ("php", "__"),
        ("ruby", "Stack.empty?"),
        ("ruby", "Stack.size="),
        ("go", "NewStack"),
        ("javascript", "Stack.Stack"),
        ("c", "initialize"),
        ("cpp", "operate"),
        ("cpp", "Stack.operator_name"),
        ("cpp", "Stack.push"),
    ],
)
def test_names_that_look_alike_are_kept(language, name):
    assert reasons(language, name) == []
