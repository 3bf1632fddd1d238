"""Settings of the contrastive objective: their checks."""

import pytest

from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from tests.errors import raises


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("logit_scale", (0, float("nan"), "ten")),
        ("alignment_weight", (True, -0.5)),
        ("mini_batch_tokens", (0, 8.5)),
        ("alignment_target", ("ensemble",)),
        ("dimensions", ([], [64, 64], [[8], [16]], {4: None}, {"four": [64]})),
        ("false_negative_margin", (3.0,)),
        ("pairs", ((), ("query", "document"), [["query"]], [["query", "query"]], [["query", "document"]] * 2)),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence_that_names_the_setting(name, values):
    for value in values:
        with raises("settings.value", name) as error:
            ContrastiveSettings(**{name: value})
        assert "\n" not in str(error.value)
    with raises("settings.value", "false_negative_factor"):
        ContrastiveSettings(false_negative_margin=0.0, false_negative_factor=0.95)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"teacher": 9, "distillation_weight": 1.0}, "contrastive.exit", "exit 9, but the trained exits are 4, 18, 36"),
        ({"alignment_target": 27, "alignment_weight": 1.0}, "contrastive.exit", "`alignment_target` names exit 27"),
        ({"dimensions": {9: [64]}}, "contrastive.exit", "`dimensions` names exit 9"),
        ({"dimensions": [64, 2048]}, "contrastive.dimensions", "1024, not 2048"),
        ({"dimensions": {18: [2048]}}, "contrastive.dimensions", 1024),
    ],
)
def test_exits_and_sizes_that_the_model_does_not_have_are_refused(changes, key, value):
    with raises(key, value):
        ContrastiveSettings(**changes).check((4, 18, 36), 1024)
    ContrastiveSettings(teacher=9, alignment_target=9).check((4, 18, 36), 1024)


@pytest.mark.parametrize("name", ["teacher", "alignment_target"])
def test_exits_that_are_trained_in_turn_learn_from_the_deepest_alone(name):
    weight = {"teacher": "distillation_weight", "alignment_target": "alignment_weight"}[name]
    for chosen in (9, "next_deeper"):
        settings = ContrastiveSettings(**{name: chosen, weight: 1.0})
        settings.check((9,), 64, rotates=True)
        with raises("contrastive.rotation", f"{name}={chosen!r}"):
            settings.check((4, 9, 36), 64, rotates=True)
    for values in ({name: 36, weight: 1.0}, {name: "deepest", weight: 1.0}, {name: 9}):
        ContrastiveSettings(**values).check((4, 9, 36), 64, rotates=True)
