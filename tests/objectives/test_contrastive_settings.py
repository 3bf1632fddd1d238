"""Settings of the contrastive objective: what is refused, and in which words."""

import pytest

from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"logit_scale": 0}, "logit_scale 0 must be positive"),
        ({"logit_scale": float("nan")}, "must be positive"),
        ({"logit_scale": "ten"}, "logit_scale 'ten' must be positive"),
        ({"distillation_temperature": -1.0}, "distillation_temperature -1.0 must be positive"),
        ({"distillation_weight": -0.5}, "distillation_weight -0.5 must be zero or a positive number"),
        ({"alignment_weight": True}, "alignment_weight True must be zero or a positive number"),
        ({"mini_batch_tokens": 0}, "mini_batch_tokens 0 must be a positive whole number, or None"),
        ({"mini_batch_tokens": 8.5}, "mini_batch_tokens 8.5"),
        ({"teacher": "best"}, "teacher 'best' must be one of deepest, next_deeper, ensemble, or an exit"),
        ({"alignment_target": "ensemble"}, "alignment_target 'ensemble' must be one of deepest, next_deeper, or"),
        ({"dimensions": []}, "must be different embedding sizes"),
        ({"dimensions": [64, 64]}, "must be different embedding sizes"),
        ({"dimensions": [[8], [16]]}, "must be different embedding sizes"),
        ({"dimensions": 64}, "must be different embedding sizes"),
        ({"dimensions": {4: None}}, "must be different embedding sizes"),
        ({"dimensions": {"four": [64]}}, "must be different embedding sizes"),
        ({"false_negative_margin": 3.0}, "between -2 and 2"),
        ({"false_negative_factor": 0}, "false_negative_factor 0 must be a positive number"),
        ({"false_negative_margin": 0.0, "false_negative_factor": 0.95}, "not both"),
        ({"pairs": ()}, "must be lists, each of at least two different names"),
        ({"pairs": ("query", "document")}, "must be lists"),
        ({"pairs": [["query"]]}, "must be lists"),
        ({"pairs": [["query", "query"]]}, "must be lists"),
        ({"pairs": [["query", "document"], ["query", "document"]]}, "must be lists"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        ContrastiveSettings(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": 9, "distillation_weight": 1.0}, "teacher names exit 9, which is not trained here; .* 4, 18, 36"),
        ({"alignment_target": 27, "alignment_weight": 1.0}, "alignment_target names exit 27"),
        ({"dimensions": {9: [64]}}, "dimensions names exit 9"),
        ({"dimensions": [64, 2048]}, "dimensions must be at most the embedding's 1024, not 2048"),
        ({"dimensions": {18: [2048]}}, "at most the embedding's 1024"),
    ],
)
def test_exits_and_sizes_that_the_model_does_not_have_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ContrastiveSettings(**changes).check((4, 18, 36), 1024)
    ContrastiveSettings(teacher=9, alignment_target=9).check((4, 18, 36), 1024)


@pytest.mark.parametrize("name", ["teacher", "alignment_target"])
def test_exits_that_are_trained_in_turn_learn_from_the_deepest_alone(name):
    weight = {"teacher": "distillation_weight", "alignment_target": "alignment_weight"}[name]
    for chosen in (9, "next_deeper"):
        settings = ContrastiveSettings(**{name: chosen, weight: 1.0})
        settings.check_rotation((36,))
        with pytest.raises(ValueError, match=f"{name} {chosen!r} does not go with rotate_shallow_exits"):
            settings.check_rotation((4, 9, 36))
    for chosen in (36, "deepest"):
        ContrastiveSettings(**{name: chosen, weight: 1.0}).check_rotation((4, 9, 36))
    ContrastiveSettings(**{name: 9}).check_rotation((4, 9, 36))


def test_exits_without_sizes_of_their_own_have_the_full_one():
    settings = ContrastiveSettings(dimensions={4: [256, 64]})
    assert settings.sizes(4, 1024) == (64, 256)
    assert settings.sizes(9, 1024) == ContrastiveSettings().sizes(4, 1024) == (1024,)
    assert ContrastiveSettings(dimensions=[64]).sizes(9, 1024) == (64,)


def test_sides_are_named_once():
    settings = ContrastiveSettings(pairs=(("a", "b"), ("b", "c", "d")))
    assert settings.sides == ("a", "b", "c", "d")
