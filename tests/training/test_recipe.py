"""Recipes and configurations that ship with the package."""

import pytest
import torch
import yaml

from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.training.ablation import AblationRecipe
from modular_star_encoder.training.arguments import bf16_is_faster
from modular_star_encoder.training.recipes import (
    ClassificationRecipe,
    FinetuningRecipe,
    PretrainingRecipe,
    hub_config_folder,
    load_config,
    load_recipe,
)
from modular_star_encoder.training.runs import format_log
from modular_star_encoder.utils.settings import format_reference
from tests.errors import raises


def test_the_quickstart_recipe_and_configuration_fit_each_other():
    recipe, config = (
        load_recipe(QuickstartRecipe, hub_config_folder("quickstart") / "recipe.yaml"),
        load_config("quickstart"),
    )
    assert recipe.vocab_size == config.vocab_size
    assert max(recipe.max_document_tokens, recipe.pretraining.max_tokens) <= config.max_position_embeddings
    with torch.device("meta"):
        assert 1e6 < ModularStarEncoderForRetrieval(config).num_parameters() < 4e6


def test_an_unknown_configuration_is_refused_with_the_available_ones():
    with raises("config.unknown", "'large'", "quickstart"):
        load_config("large")


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"vocabulary_size": 3}, "settings.unknown", "vocabulary_size; did you mean vocab_size?"),
        ({"finetuning": {"max_step": 3}}, "settings.unknown", "finetuning: unknown setting max_step"),
        ({"finetuning": None}, "settings.value", "finetuning"),
        ({"vocab_size": None}, "settings.missing", "vocab_size"),
        ({"max_functions": 0}, "settings.value", "max_functions"),
    ],
)
def test_a_wrong_setting_of_the_quickstart_is_named(tmp_path, change, key, value):
    content = yaml.safe_load((hub_config_folder("quickstart") / "recipe.yaml").read_text()) | change
    if content["vocab_size"] is None:
        del content["vocab_size"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with raises(key, value):
        load_recipe(QuickstartRecipe, tmp_path / "recipe.yaml")


@pytest.mark.parametrize("kind", [PretrainingRecipe, FinetuningRecipe, ClassificationRecipe, AblationRecipe])
def test_the_reference_names_every_key_with_its_type_default_and_meaning(kind):
    lines = {line.split()[0]: line for line in format_reference(kind).splitlines()}
    assert all(";" in line for line in lines.values()), [line for line in lines.values() if ";" not in line]
    if kind is FinetuningRecipe:
        assert "float, default 0.05; share of each source's rows" in lines["eval_fraction"]
        assert "required; pairs of one step" in lines["batch_size"]
        assert (
            "'deepest' | 'next_deeper' | 'ensemble' | int, default deepest; exit whose scores"
            in lines["objective.teacher"]
        )
        assert lines["learning_rate"].endswith("required; peak of the schedule.")
        assert "default paper; weights of the exits' losses" in lines["exit_weights"]


def test_a_log_line_is_short_and_names_each_exit():
    line = format_log(
        {"loss": 1.5, "learning_rate": 1e-3, "clip_loss_exit_1": 2.0, "clip_loss_exit_12": 1.0, "epoch": 1}
    )
    assert line == "loss 1.500 · learning_rate 1.0e-03 · clip_loss 1: 2.000, 12: 1.000"


@pytest.mark.parametrize(
    ("flags", "faster"),
    [
        ("flags : fpu avx512f avx512_bf16", True),
        ("flags : fpu amx_bf16 amx_tile", True),
        ("Features : asimd bf16 i8mm", True),
        ("flags : fpu avx2 avx512f avx512_vnni", False),
    ],
)
def test_bfloat16_is_chosen_by_what_the_processor_says_it_can_do(monkeypatch, flags, faster):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("pathlib.Path.read_text", lambda self, **_: flags)
    assert bf16_is_faster() is faster
