"""Numbers of recipes: what YAML makes of them, and what is made of that."""

from dataclasses import dataclass

import pytest

from modular_star_encoder.utils.settings import build_settings


@dataclass
class Numbers:
    """One of each kind."""

    whole: int = 1
    fraction: float = 1.0
    whole_or_none: int | None = None
    fraction_or_none: float | None = None
    switch: bool = False


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("whole", "1e5", 100_000),
        ("whole", 2**60 + 1, 2**60 + 1),
        ("fraction", "1e-6", 1e-6),
        ("whole_or_none", "1e5", 100_000),
        ("whole_or_none", 3.0, 3),
        ("fraction_or_none", 2, 2.0),
        ("whole_or_none", None, None),
        ("fraction_or_none", None, None),
    ],
)
def test_numbers_are_of_the_kind_that_is_wanted_or_none(name, given, expected):
    found = getattr(build_settings(Numbers, {name: given}, "recipe"), name)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize("name", ["whole", "whole_or_none", "fraction", "fraction_or_none"])
@pytest.mark.parametrize("given", ["two", True, [1], {"a": 1}])
def test_what_is_no_number_is_refused_by_name(name, given):
    with pytest.raises(ValueError, match=f"^recipe: {name} must be a number( without fraction)?, not "):
        build_settings(Numbers, {name: given}, "recipe")


@pytest.mark.parametrize(("name", "given"), [("whole", 1.5), ("whole_or_none", "1.5"), ("whole", None)])
def test_a_whole_number_has_no_fraction_and_is_there(name, given):
    with pytest.raises(ValueError, match=f"{name} must be a number without fraction, not "):
        build_settings(Numbers, {name: given}, "recipe")


@pytest.mark.parametrize("given", ["flase", "no", 0, None])
def test_a_switch_is_true_or_false_and_no_word_that_would_count_as_true(given):
    assert build_settings(Numbers, {"switch": True}, "recipe").switch is True
    with pytest.raises(ValueError, match=f"^recipe: switch must be true or false, not {given!r}"):
        build_settings(Numbers, {"switch": given}, "recipe")
