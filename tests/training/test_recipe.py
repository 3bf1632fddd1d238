"""Recipes and configurations that ship with the package, the schedule of pre-training, and what is logged."""

import pytest

from modular_star_encoder.training.ablation import AblationRecipe
from modular_star_encoder.training.arguments import MultiExitTrainingArguments, bf16_is_faster
from modular_star_encoder.training.recipes import (
    ClassificationRecipe,
    FinetuningRecipe,
    PretrainingRecipe,
)
from modular_star_encoder.training.runs import format_log
from modular_star_encoder.utils.settings import format_reference


@pytest.mark.parametrize("kind", [PretrainingRecipe, FinetuningRecipe, ClassificationRecipe, AblationRecipe])
def test_the_reference_names_every_key_with_its_type_default_and_meaning(kind):
    lines = {line.split()[0]: line for line in format_reference(kind).splitlines()}
    assert all(";" in line for line in lines.values()), [line for line in lines.values() if ";" not in line]
    if kind is FinetuningRecipe:
        assert "float, default 0.05; share of each source's rows" in lines["eval_fraction"]
        assert "required; pairs of one step" in lines["batch_size"]
        teachers = "'deepest' | 'next_deeper' | 'ensemble' | int"
        assert f"{teachers}, default deepest; exit whose scores" in lines["objective.teacher"]
        assert lines["learning_rate"].endswith("required; peak of the schedule.")
        assert "default paper; weights of the exits' losses" in lines["exit_weights"]


def test_a_log_line_is_short_and_names_each_exit():
    logs = {"loss": 1.5, "learning_rate": 1e-3, "clip_loss_exit_1": 2.0, "clip_loss_exit_12": 1.0, "epoch": 1}
    assert format_log(logs) == "loss 1.500 · learning_rate 1.0e-03 · clip_loss 1: 2.000, 12: 1.000"


@pytest.mark.parametrize(
    ("flags", "faster"),
    [
        ("flags : fpu avx512f avx512_bf16", True),
        ("Features : asimd bf16 i8mm", True),
        ("flags : fpu avx2 avx512f avx512_vnni", False),
    ],
)
def test_bfloat16_is_chosen_by_what_the_processor_says_it_can_do(monkeypatch, flags, faster):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("pathlib.Path.read_text", lambda self, **_: flags)
    assert bf16_is_faster() is faster


def test_the_papers_rate_is_a_fraction_of_the_peak_at_every_boundary():
    milestones, fractions = [120_000, 185_000, 220_000, 230_000, 240_000], [0.36, 0.1, 0.031, 0.01, 0.001]
    options = {"warmup_steps": 4_000, "milestones": milestones, "fractions": fractions}
    paper = MultiExitTrainingArguments("never written", use_cpu=True, **options)
    for milestone, before, after in zip(milestones, [1.0, *fractions], fractions, strict=False):
        assert (paper.rate_fraction(milestone - 1), paper.rate_fraction(milestone)) == (before, after)
    warm_up = [paper.rate_fraction(step) for step in (0, 1, 3_999, 4_000)]
    assert warm_up == pytest.approx([0.0, 1 / 4_000, 3_999 / 4_000, 1.0])
    assert paper.rate_fraction(244_999) == 0.001
