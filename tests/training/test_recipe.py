"""Recipes and configurations that ship with the package."""

import pytest
import torch
import yaml

from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.training.recipes import hub_config_folder, load_config, load_recipe
from modular_star_encoder.training.stages import bf16_is_faster
from modular_star_encoder.training.trainer import format_log


def test_the_quickstart_recipe_and_configuration_fit_each_other():
    recipe, config = load_recipe(hub_config_folder("quickstart") / "recipe.yaml"), load_config("quickstart")
    assert recipe.vocab_size == config.vocab_size
    assert max(recipe.max_document_tokens, recipe.pretraining.max_tokens) <= config.max_position_embeddings
    with torch.device("meta"):
        assert 1e6 < ModularStarEncoderForRetrieval(config).num_parameters() < 4e6


def test_an_unknown_configuration_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no configuration 'large'; there are .*quickstart"):
        load_config("large")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vocabulary": 3}, "unknown settings vocabulary"),
        ({"finetuning": {"step": 3}}, "finetuning has unknown settings step"),
        ({"finetuning": None}, "finetuning must be a mapping"),
        ({"vocab_size": None}, "incomplete"),
        ({"max_functions": 0}, "max_functions must be at least 1"),
    ],
)
def test_a_recipe_with_a_wrong_key_is_refused_by_name(tmp_path, change, sentence):
    content = yaml.safe_load((hub_config_folder("quickstart") / "recipe.yaml").read_text()) | change
    if content["vocab_size"] is None:
        del content["vocab_size"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=sentence):
        load_recipe(tmp_path / "recipe.yaml")


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
