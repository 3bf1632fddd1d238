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
    ("language", "constructors", "special", "kept"),
    [
        ("python", "Stack.__init__", "Stack.__len__", "__private|toString"),
        ("java", "Outer.Stack.Stack", "Stack.toString|Stack.hashCode", "Stack.stack|Stack.toStringList"),
        ("php", "Stack.__construct", "Stack.__get", "__"),
        ("ruby", "Stack.initialize", "Stack.==|Stack.to_s", "Stack.empty?|Stack.size="),
        ("javascript", "Stack.constructor", "Stack.toString", "Stack.Stack"),
        ("go", None, "Stack.String|main", "NewStack"),
        ("c", None, "main", "initialize"),
        (
            "cpp",
            "Stack.Stack|Stack.~Stack",
            "main|Stack.operator==|Stack.operator bool",
            "operate|Stack.operator_name|Stack.push",
        ),
    ],
)
def test_names_of_constructors_and_special_methods_are_dropped_and_similar_ones_kept(
    language, constructors, special, kept
):
    for names, expected in ((constructors, ["constructor"]), (special, ["special method"]), (kept, [])):
        for name in names.split("|") if names else ():
            assert reasons(language, name) == expected, name
