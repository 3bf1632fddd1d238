import os
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from modular_star_encoder.utils import settings
from modular_star_encoder.utils.settings import Count, build_settings, read_mapping, settings_class
from tests.errors import raises


@dataclass
class Numbers:
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


@pytest.mark.parametrize(
    ("names", "values"),
    [
        ("whole whole_or_none fraction fraction_or_none", ["two", True, [1], {"a": 1}]),
        ("whole whole_or_none", [1.5, "1.5"]),
        ("whole fraction switch", [None]),
        ("switch", ["flase", "no", 0]),
    ],
)
def test_values_of_another_kind_are_refused_by_name(names, values):
    assert build_settings(Numbers, {"switch": True}, "recipe").switch is True
    for name in names.split():
        for given in values:
            with raises("settings.value", f"recipe: {name} "):
                build_settings(Numbers, {name: given}, "recipe")


@settings_class
class Inner:
    """Checked settings.

    Args:
        size: how large.
        kind: which one.
    """

    size: Count = 3
    kind: Literal["a", "b"] = "a"


@settings_class
class Outer:
    """Settings with settings inside.

    Args:
        name: a word.
        inner: more settings.
    """

    name: str
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[Count, ...] = ()


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ({"name": "x", "inner": {"size": 0}}, "settings.value", "recipe: inner: size must be greater than 0, not 0"),
        ({"name": "x", "inner": {"kind": "c"}}, "settings.value", "'a' or 'b', not 'c'"),
        ({"name": "x", "inner": {"sise": 1}}, "settings.unknown", "inner: unknown setting sise; did you mean size?"),
        ({"name": "x", "wrong": 1}, "settings.unknown", "available: inner, name, sizes"),
        ({}, "settings.missing", "name"),
        ({"name": "x", "inner": 3}, "settings.value", "inner"),
        ({"name": "x", "sizes": ["1e1", "b"]}, "settings.value", "'b'"),
        ([], "settings.value", "recipe must be a mapping"),
    ],
)
def test_a_fault_is_named_with_its_place_its_rule_and_its_value(content, key, value):
    with raises(key, value):
        build_settings(Outer, content, "recipe")


def test_only_a_missing_argument_makes_settings_incomplete():
    @dataclass
    class Named:
        name: Any

        def __post_init__(self):
            os.fspath(self.name)

    with raises("settings.value", "recipe: expected str"):
        build_settings(Named, {"name": None}, "recipe")
    with raises("settings.missing", "recipe is incomplete"):
        build_settings(Named, {}, "recipe")


def test_a_fault_is_blamed_on_the_command_line_unless_the_file_has_it_too(tmp_path):
    file = tmp_path / "a.yaml"
    for text, word, place in (("name: x", "nam=3", "command line"), ("nam: x", "sizes=[1]", file)):
        file.write_text(text)
        with raises("settings.unknown", f"{place}: unknown", "did you mean name?"):
            settings.load_settings(Outer, file, [word])


def test_the_reference_lists_keys_with_type_default_and_meaning():
    assert settings.format_reference(Outer).splitlines() == [
        "  name        str, required; a word.",
        "  inner.size  int, default 3; how large.",
        "  inner.kind  'a' | 'b', default a; which one.",
        "  sizes       tuple[int, ...], default ()",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: " + "[" * 40 + "]" * 40, 32),
        ("a: " + "[" * 100_000, "nest"),  # libyaml has a limit of its own
        ("a: &x [1]\nb: *x", "alias *x"),
        ("a: [" + "1," * 20_000 + "]", "20,000"),
        ("a: " + "9" * 5_000, 100),
        ("a: " + "1:" * 10_000 + "1", 100),
        ('a: !!int "' + "1:" * 1000 + '1"', "tag"),
        ("a: !!python/object/apply:os.system [exit]", "python/object"),
        ("a: 2001-01-01T99:00:00Z", "hour"),
        ("? [a]\n: 1", "YAML"),
        ("#" * 2**19 + "\na: 1", "524,288"),
        ("a: \x00", "YAML"),
        ('a: ["\\ud800"]', "YAML"),
        ("- a", "mapping"),
    ],
)
def test_yaml_beyond_a_limit_is_a_sentence(tmp_path, text, value):
    (tmp_path / "a.yaml").write_text(text)
    with raises("settings.file", "a.yaml", value) as caught:
        read_mapping(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 500


def test_a_sentence_shows_the_beginning_of_a_long_value(tmp_path):
    (tmp_path / "a.yaml").write_text("name: x\nsizes: " + "x" * 10_000)
    with raises("settings.value", "sizes", "xxx") as caught:
        build_settings(Outer, read_mapping(tmp_path / "a.yaml"), "recipe")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["", " ", "[" * 50])
def test_a_value_that_is_empty_or_no_yaml_is_refused_so_that_an_unset_variable_of_a_shell_changes_nothing(
    tmp_path, value
):
    (tmp_path / "a.yaml").write_text("name: x")
    with raises("settings.override", "name="):
        read_mapping(tmp_path / "a.yaml", [f"name={value}"])
