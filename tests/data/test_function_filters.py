from dataclasses import replace

import pytest

from modular_star_encoder.data.functions import drop_reason
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
    assert drop_reason(replace(function(), **changes)) == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"description": "just three words"},
        {"description": "word " * 256},
        {"description": "Résumé of the naïve façade"},
        {"name": "TestCase.run"},
    ],
)
def test_rules_keep_what_lies_on_their_limits(changes):
    assert drop_reason(replace(function(), **changes)) is None


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
    for names, reason in ((constructors, "constructor"), (special, "special method"), (kept, None)):
        for name in names.split("|") if names else ():
            assert drop_reason(replace(function(), language=language, name=name)) == reason, name
