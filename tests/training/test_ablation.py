"""The ablation: what is trained, what is compared, and that finished cells are kept."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.training import ablation as ablation_module
from modular_star_encoder.training.ablation import AblationRecipe, ablate, compare, plot_ablation, to_markdown
from modular_star_encoder.training.finetuning import finetune
from modular_star_encoder.training.recipes import hub_config_folder, load_recipe
from tests.errors import raises
from tests.tiny import EXIT_LAYERS
from tests.training import retrieval_runs
from tests.training.retrieval_runs import saved_figures, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    checkpoint, triplets = retrieval_runs.write_checkpoint(folder / "checkpoint"), retrieval_runs.write_triplets(folder)
    settings = retrieval_runs.finetuning_settings(checkpoint, triplets)
    settings |= {"max_steps": 1, "eval_steps": 1, "save_steps": 1}
    recipe = {"finetuning": settings, "seeds": [0], "exit_layers": [2], "variants": {}}
    return write_recipe(folder / "recipe.yaml", recipe)


def run(recipe_file, out, *overrides):
    lines = []
    recipe = load_recipe(AblationRecipe, recipe_file, overrides)
    return ablate(recipe, out, command="mose ablate", progress=False, announce=lines.append), lines


def count_trainings(monkeypatch, out, stop_at=None):
    """The cells that are trained, in order; `stop_at` is where Ctrl-C comes."""
    trained, original = [], finetune

    def counting(recipe, folder, **options):
        trained.append(folder.relative_to(out / "cells").as_posix())
        if len(trained) == stop_at:
            raise KeyboardInterrupt
        return original(recipe, folder, **options)

    monkeypatch.setattr(ablation_module, "finetune", counting)
    return trained


def test_cells_resume_on_their_own_and_later_calls_may_add_some(recipe_file, tmp_path, monkeypatch):
    out = tmp_path / "ablation"
    with monkeypatch.context() as patch:
        trained = count_trainings(patch, out, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            run(recipe_file, out)
    assert trained == ["self-distilled/seed-0", "exit-2/seed-0"]
    trained = count_trainings(monkeypatch, out)
    results, lines = run(recipe_file, out)
    assert lines == ["cell 1 of 2: self-distilled, seed 0", "cell 2 of 2: exit-2, seed 0"]
    assert trained == ["exit-2/seed-0"]
    _, lines = run(recipe_file, out, "seeds=[0, 1]", "variants={uniform: {exit_weights: uniform}}", "keep_models=false")
    assert len(lines) == 6
    added = ["uniform/seed-0", "self-distilled/seed-1", "exit-2/seed-1", "uniform/seed-1"]
    assert trained[1:] == added
    name = "held-out, text → code"
    found, before = json.loads((out / "ablation.json").read_text())["benchmarks"][name], results["benchmarks"][name]
    by_seed = [one["exits"]["2"]["self_distilled"]["mrr"]["by_seed"][0] for one in (found, before)]
    assert by_seed[0] == pytest.approx(by_seed[1])
    assert set(found["variants"]["uniform"]["exits"]) == {"1", "2", "4"}
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "| uniform |" in (out / "ablation.md").read_text()
    assert not [*(out / "cells").rglob("*.safetensors"), *(out / "cells").rglob("checkpoint-*")]


def test_baselines_are_cut_from_the_same_checkpoint_and_see_the_same_batches(recipe_file, tmp_path):
    results, _ = run(recipe_file, tmp_path / "run", "exit_layers=[1]", "finetuning.learning_rate=1.0e-30")
    models = [tmp_path / "run" / "cells" / name / "seed-0" / "model" for name in ("self-distilled", "exit-1")]
    both, alone = (load_file(model / "model.safetensors") for model in models)
    heads = {f"projection_heads.1.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("bias", "weight")}
    assert {name for name in alone if name.startswith("projection_heads")} == heads
    assert not any(name.startswith("model.layers.1") for name in alone)
    for name in set(alone) - heads:
        torch.testing.assert_close(alone[name], both[name], rtol=0, atol=1e-20)
    logs = [json.loads((model / "training_log.json").read_text()) for model in models]
    assert logs[0]["data"] == logs[1]["data"]
    names = {"model", "max_steps", "batch_size", "seed", "learning_rate", "data"}
    assert {name: logs[0]["recipe"][name] for name in names} == {name: logs[1]["recipe"][name] for name in names}
    assert set(results["benchmarks"]) == {"held-out, text → code", "held-out, code → code"}


def write_exercises(folder):
    rows = [
        {"slug": f"exercise{i}", "description": f"Compute {i}.", "code": {"go": f"func E{i}() {{}}", "c": f"int e{i};"}}
        for i in range(4)
    ]
    (folder / "exercises.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_model_that_was_not_kept_is_trained_again_for_a_benchmark_that_comes_later(
    recipe_file, tmp_path, monkeypatch
):
    write_exercises(tmp_path)
    out, options = tmp_path / "run", ("keep_models=false", "baselines=false", "finetuning.lora={}")
    trained = count_trainings(monkeypatch, out)
    before, _ = run(recipe_file, out, *options)
    assert not list(out.rglob("*.safetensors"))
    later = (*options, f"benchmark_data={tmp_path}", "benchmarks=[exercism-code]")
    after, _ = run(recipe_file, out, *later)
    found = after["benchmarks"].pop("exercism-code")
    assert found["queries"] == 8
    assert set(found["exits"]) == {str(exit_layer) for exit_layer in EXIT_LAYERS}
    assert "difference" not in found["exits"]["2"]
    assert after["benchmarks"] == before["benchmarks"]
    assert trained == ["self-distilled/seed-0"] * 2
    assert not list(out.rglob("*.safetensors"))
    run(recipe_file, out, *later)
    assert len(trained) == 2


def scores(values, seeds=(0, 1)):
    """model → exit → reciprocal ranks, the same for each seed but for a shift."""
    return {
        (model, seed): {
            "bench": {
                exit_layer: {"task": {str(i): rank for i, rank in enumerate(ranks)}} for exit_layer, ranks in of.items()
            }
        }
        for model, of in values.items()
        for seed in seeds
    }


GOOD, BAD = [1.0] * 30 + [0.5] * 10, [1.0] * 10 + [0.25] * 30


def test_figures_are_means_and_differences_are_paired():
    found = compare(scores({"self-distilled": {1: GOOD, 2: GOOD}, "exit-1": {1: BAD}}), (1, 2), (0, 1), [])
    found = found["benchmarks"]["bench"]
    one = found["exits"]["1"]
    assert one["self_distilled"]["mrr"]["value"] == pytest.approx(35 / 40)
    assert one["self_distilled"]["recall@1"]["value"] == pytest.approx(30 / 40)
    assert one["difference"]["mrr"]["value"] == pytest.approx((35 - 17.5) / 40)
    assert one["difference"]["mrr"]["by_seed"] == pytest.approx([(35 - 17.5) / 40] * 2)
    assert one["difference"]["mrr"]["low"] < (35 - 17.5) / 40 < one["difference"]["mrr"]["high"]
    # Where every query differs by the same, drawing other queries changes nothing.
    shifted = {"self-distilled": {1: GOOD}, "exit-1": {1: [value - 0.25 for value in GOOD]}}
    one = compare(scores(shifted), (1,), (0, 1), [])["benchmarks"]["bench"]["exits"]["1"]
    assert (one["difference"]["mrr"]["low"], one["difference"]["mrr"]["high"]) == pytest.approx((0.25, 0.25))
    assert one["self_distilled"]["mrr"]["high"] > one["self_distilled"]["mrr"]["low"]
    # The mean over seeds is taken query by query.
    seeds = [
        scores({"self-distilled": {1: ranks}}, seeds=(seed,)) for seed, ranks in enumerate([[1.0, 0.5], [0.5] * 2])
    ]
    figure = compare(seeds[0] | seeds[1], (1,), (0, 1), [])["benchmarks"]["bench"]["exits"]["1"]["self_distilled"]
    assert figure["mrr"]["by_seed"] == [0.75, 0.5]
    assert figure["mrr"]["value"] == pytest.approx(0.625)
    assert figure["recall@1"]["by_seed"] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("exits", "recommended", "lowered"),
    [
        ({1: GOOD, 2: GOOD}, True, []),
        ({1: GOOD, 2: BAD}, True, []),
        ({1: BAD, 2: BAD}, False, []),
        ({1: GOOD, 2: [0.1] * 40}, False, [2]),
    ],
)
def test_a_variant_is_recommended_if_it_raises_the_mean_and_lowers_no_exit(exits, recommended, lowered):
    given = scores({"self-distilled": {1: BAD, 2: BAD}, "other": exits})
    found = compare(given, (1, 2), (0, 1), ["other"])["benchmarks"]["bench"]["variants"]["other"]
    assert (found["recommended"], found["lowered_exits"]) == (recommended, lowered)


@pytest.fixture
def results():
    both = {"self-distilled": {1: GOOD, 2: GOOD}, "exit-1": {1: BAD}, "exit-2": {2: BAD}, "other": {1: BAD, 2: GOOD}}
    recipe = {"finetuning": {"max_steps": 3, "batch_size": 4, "model": "m"}}
    extra = {"command": "mose ablate x", "recipe": recipe, "bm25": {"bench": 0.5}}
    return {**extra, **compare(scores(both), (1, 2), (0, 1), ["other"])}


def test_the_report_shows_both_series_differences_and_variants(results):
    lines = to_markdown(results).splitlines()
    row = next(line for line in lines if line.startswith("| 1 "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["1", "87.5", "43.8", "+43.8"]
    assert cells[5] == "+43.8 to +43.8"
    assert cells[6:9] == ["75.0", "25.0", "+50.0"]
    assert next(line for line in lines if line.startswith("| other")).split("|")[-2].strip() == "lowers 1"
    assert "    mose ablate x" in lines


def test_the_picture_has_both_series_in_a_panel_of_each_metric(tmp_path, monkeypatch, results):
    figures = saved_figures(monkeypatch)
    plot_ablation(results, tmp_path / "ablation.png")
    (figure,) = figures
    assert [axes.get_ylabel() for axes in figure.axes] == ["MRR × 100", "R@1 × 100"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[87.5, 87.5], [43.75, 43.75]]
    assert (tmp_path / "ablation.png").is_file()


def test_reports_hold_no_places_of_this_machine(monkeypatch):
    monkeypatch.setenv("MOSE_DATA", "/srv/data")
    home = os.environ.get("HOME", "")
    found = ablation_module._without_places({"a": ["/srv/data/x", 3], "b": f"{home}/y"})
    assert found == {"a": ["$MOSE_DATA/x", 3], "b": "$HOME/y" if home else "/y"}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seeds=[1, 1]", "settings.value", "seeds"),
        ("exit_layers=[3]", "ablation.exit_layers", "[3], but the model's exits are [1, 2, 4]"),
        ("benchmarks=codesearchnet-999", "settings.value", "'codesearchnet-999'"),
        ("variants={self-distilled: {}}", "settings.value", "'self-distilled'"),
        ("variants={../x: {}}", "settings.value", "'../x'"),
        ("variants={a: {data.triplets: x}}", "ablation.variants", "data.triplets"),
        ("variants={a: {max_train_samples: 3}}", "ablation.variants", "max_train_samples"),
        ("variants={a: {objective.speed: 3}}", "settings.unknown", "a: objective: unknown setting speed"),
        ("variants={a: {max_steps.x: 3}}", "settings.override", "max_steps is not a mapping"),
        ("variants={a: {objective: {teacher: 3, distillation_weight: 1}}}", "contrastive.exit", "a: `teacher` names"),
        ("held_out=false", "ablation.benchmarks", "held_out"),
        ("benchmarks=[exercism-code]", "ablation.benchmark_data", "benchmark_data"),
        ("finetuning.max_steps=0", "settings.value", "max_steps"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(recipe_file, tmp_path, override, key, value):
    with raises(key, value):
        run(recipe_file, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_baselines_have_no_options_about_other_exits(recipe_file):
    objective = {"teacher": 4, "distillation_weight": 1, "alignment_weight": 1, "dimensions": {1: [8, 16]}}
    recipe = load_recipe(AblationRecipe, recipe_file, ["exit_layers=[1, 2]", f"finetuning.objective={objective}"])
    settings = {cell.name: cell.recipe.objective for cell in recipe.cells(EXIT_LAYERS)}
    for exit_layer, sizes in ((1, (8, 16)), (2, (64,))):
        alone = settings[f"exit-{exit_layer}"]
        alone.check((exit_layer,), 64)
        assert alone.sizes(exit_layer, 64) == sizes
        assert alone.distillation_weight == alone.alignment_weight == 0
    assert settings["self-distilled"].teacher == 4
    plain = load_recipe(AblationRecipe, recipe_file).cells(EXIT_LAYERS)
    assert {cell.recipe.objective for cell in plain} == {ContrastiveSettings()}


def test_cells_of_other_settings_or_of_another_checkpoint_at_the_same_place_are_refused(recipe_file, tmp_path):
    checkpoint, settings = tmp_path / "checkpoint", ("baselines=false", f"finetuning.model={tmp_path / 'checkpoint'}")
    shutil.copytree(recipe_file.parent / "checkpoint", checkpoint)
    run(recipe_file, tmp_path / "run", *settings)
    with raises("training.run.other_settings", "other values of batch_size;"):
        run(recipe_file, tmp_path / "run", *settings, "finetuning.batch_size=6")
    weights = {name: tensor + 1 for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with raises("ablation.starting_points", checkpoint):
        run(recipe_file, tmp_path / "run", *settings, "seeds=[0, 1]")
    assert not (tmp_path / "run" / "cells" / "self-distilled" / "seed-1").exists()
    # An ablation of a version that wrote no checksums.
    (tmp_path / "run" / "starting_points.json").unlink()
    run(recipe_file, tmp_path / "run", *settings)


def test_our_recipe_trains_a_baseline_for_each_exit_and_tries_options_one_at_a_time():
    recipe = load_recipe(AblationRecipe, hub_config_folder("small") / "ablation.yaml")
    assert isinstance(recipe, AblationRecipe)
    cells = recipe.cells((1, 2, 4, 6, 8))
    assert len(cells) == 3 * (1 + 5 + len(recipe.variants))
    assert {cell.recipe.exit_layer for cell in cells} == {None, 1, 2, 4, 6, 8}
    assert {cell.recipe.seed for cell in cells} == {0, 1, 2}
    weights = {cell.name: cell.recipe.objective.distillation_weight for cell in cells}
    assert weights["distilled-from-ensemble"] == 1.0
    assert weights["self-distilled"] == weights["aligned"] == 0.0
