import json
import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest

from modular_star_encoder.training import ablation as ablation_module
from modular_star_encoder.training.ablation import AblationRecipe, Results, ablate, estimate, plot_ablation, to_markdown
from modular_star_encoder.training.recipes import hub_config_folder, load_recipe
from tests.errors import raises
from tests.tiny import change_json
from tests.training import retrieval_runs
from tests.training.retrieval_runs import write_recipe

TASK = "held-out, text → code"
QUERIES = np.random.default_rng(0).random(200)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    checkpoint, triplets = retrieval_runs.write_checkpoint(folder / "checkpoint"), retrieval_runs.write_triplets(folder)
    settings = retrieval_runs.finetuning_settings(checkpoint, triplets)
    settings |= {"max_steps": 1, "logging_steps": 1, "log_gradient_norms": True}
    recipe = {"finetuning": settings, "seeds": [0], "exit_layers": [1, 4], "gate": 0}
    return write_recipe(folder / "recipe.yaml", recipe)


def run(recipe_file, out, *overrides):
    lines = []
    recipe = load_recipe(AblationRecipe, recipe_file, overrides)
    results = ablate(recipe, out, command="mose ablate", progress=False, announce=lines.append)
    return results, [line.partition(" ")[2].removeprefix("training ") for line in lines]


def kept_logs(monkeypatch):
    """A list that gets the log of every training from now on."""
    logs, to_the_end = [], ablation_module.runs.train_to_the_end
    kept = lambda *rest, **options: logs.append(to_the_end(*rest, **options)) or logs[-1]  # noqa: E731
    monkeypatch.setattr(ablation_module.runs, "train_to_the_end", kept)
    return logs


@pytest.mark.slow
def test_real_cells_are_trained_kept_and_continued(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Results, "gate", lambda *_: {"passed": True})
    out = tmp_path / "run"
    results, trained = run(recipe_file, out)
    assert trained == [f"start/{kind}/rate-0.003-seed-0" for kind in ("exit-1", "exit-4", "together")]
    cell = json.loads((out / "cells/start/together/rate-0.003-seed-0.json").read_text())
    assert set(cell["test"][TASK]) == set(cell["validation"][TASK]) == {"1", "2", "4"}
    assert set(cell["cosines"]) == {"0", "1", "2"}
    alone = json.loads((out / "cells/start/exit-1/rate-0.003-seed-0.json").read_text())
    assert set(alone["test"][TASK]) == {"1"}
    assert alone["recipe"]["exit_layer"] == 1
    (start,) = results["starts"].values()
    # Each task weighs the same: text → code and code → code.
    both = np.mean([np.mean(task["1"]) for task in cell["test"].values()])
    difference = both - np.mean([np.mean(task["1"]) for task in alone["test"].values()])
    assert len(cell["test"]) == 2
    assert start["exits"]["1"]["difference"]["value"] == pytest.approx(100 * difference, abs=0.02)
    assert not list(out.rglob("*.safetensors"))
    shutil.rmtree(out / "data")  # as where cells come from another machine
    again, trained = run(recipe_file, out, "variants={alternate: {exit_schedule: alternate, max_steps: 2}}")
    assert trained == ["start/alternate/rate-0.003-seed-0"]
    assert again["starts"]["start"]["exits"] == results["starts"]["start"]["exits"]
    with raises("training.run.other_settings", "other values of batch_size;"):
        run(recipe_file, out, "finetuning.batch_size=6")
    other = shutil.copytree(recipe_file.parent / "checkpoint", tmp_path / "checkpoint")
    change_json(other, residual_dropout=0.2)
    with raises("training.run.other_settings", "values of checksum"):
        run(recipe_file, out, f"finetuning.model={other}")


@pytest.mark.slow
def test_an_interrupted_evaluation_costs_no_training_and_cells_of_other_rows_or_form_are_refused(
    recipe_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(Results, "gate", lambda *_: {"passed": False})
    out = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(ablation_module, "evaluate_tasks", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe_file, out)
    trained = kept_logs(monkeypatch)
    run(recipe_file, out)
    assert [log["resumed_from"] for log in trained] == [1, None]
    assert not list(out.glob("training/*/*/*"))
    path = out / "cells/start/exit-4/rate-0.003-seed-0.json"
    cell = json.loads(path.read_text())
    other = {task: {"4": ranks["4"][1:]} for task, ranks in cell["test"].items()}
    bad = {"test": {TASK: 5}}, {"seconds": float("nan")}, {"cosines": {"0": float("inf")}}
    cases = [({"test": other}, "training.run.other_settings"), *((one, "benchmark.file.unexpected") for one in bad)]
    for changes, key in cases:
        path.write_text(json.dumps(cell | changes))
        with raises(key, path.name):
            run(recipe_file, out)


@pytest.mark.slow
@pytest.mark.parametrize("has_recipe", [True, False])
def test_an_interrupted_cell_of_another_recipe_or_version_is_trained_again_from_its_start_and_says_so(
    recipe_file, tmp_path, monkeypatch, has_recipe
):
    monkeypatch.setattr(Results, "gate", lambda *_: {"passed": False})
    begun, name = ["finetuning.max_steps=3", "finetuning.save_steps=1"], "start/exit-1/rate-0.003-seed-0"
    with retrieval_runs.interrupt(monkeypatch, 2):
        run(recipe_file, tmp_path / "run", *begun)
    if not has_recipe:
        (tmp_path / "run" / "training" / name / "recipe.json").unlink()
    logs = kept_logs(monkeypatch)
    _, lines = run(recipe_file, tmp_path / "run", *([] if has_recipe else begun))
    assert [name in lines[0], "checkpoints" in lines[0], lines[1]] == [True, True, name]
    assert [(log["resumed_from"], log["steps"]) for log in logs] == [(None, 1 if has_recipe else 3)] * 2


def test_too_few_held_out_repositories_are_refused_before_training(recipe_file, tmp_path):
    rows = [json.loads(line) for line in (recipe_file.parent / "triplets.jsonl").read_text().splitlines()]
    few = [json.dumps(row | {"repository_name": f"repository{place % 3}"}) for place, row in enumerate(rows)]
    (tmp_path / "few.jsonl").write_text("\n".join(few))
    with raises("ablation.held_out"):
        run(recipe_file, tmp_path / "run", f"finetuning.data.triplets={tmp_path / 'few.jsonl'}")


def cell_of(recipe, mrr, *, validation=None):
    """The content of a cell whose exits score `mrr` (exit → mean), the same for each query up to a known spread."""
    test = {str(e): (value + 0.1 * (QUERIES - QUERIES.mean())).tolist() for e, value in mrr.items()}
    shown = {str(e): [value if validation is None else validation] for e, value in mrr.items()}
    return {"recipe": recipe, "seconds": 1.0, "cosines": {}, "test": {TASK: test}, "validation": {TASK: shown}}


def planned(recipe, scores):
    """The keys of the cells in the order of training, and the results if `scores(*key, exit)` is the score of each."""
    results = Results(recipe, (1, 2, 4))
    for cell in ablation_module._plan(results):
        key = (cell.start, cell.kind, cell.recipe.learning_rate, cell.recipe.seed)
        exits = [int(cell.kind[5:])] if cell.kind.startswith("exit-") else [1, 2, 4]
        results.found.setdefault(key, cell_of({}, {e: scores(*key, e) for e in exits}))
    return list(results.found), results


def test_gates_come_first_then_all_exits_then_variants_where_together_costs_most(recipe_file):
    overrides = ["exit_layers=null", "starts={deep: {}, flat: {}, harmed: {}}", "gate=3", "seeds=[0, 1]"]
    overrides += ["learning_rates=[0.1, 0.2]", "variants={alternate: {exit_schedule: alternate}}"]
    recipe = load_recipe(AblationRecipe, recipe_file, overrides)

    def scores(start, kind, rate, seed, e):
        alone = 0.4 + (0.0 if start == "flat" else 0.05 * e) + (0.01 if rate == 0.2 else 0.0)
        return alone - (0.1 if start == "harmed" and kind == "together" else 0.0)

    order, results = planned(recipe, scores)
    starts = [start for start, *_ in order]
    assert order[:3] == [("deep", "exit-1", 0.1, 0), ("deep", "exit-1", 0.2, 0), ("deep", "exit-1", 0.2, 1)]
    assert starts[:18] == ["deep"] * 6 + ["flat"] * 6 + ["harmed"] * 6
    assert "flat" not in starts[18:]
    variants = [key for key in order if key[1] == "alternate"]
    assert variants == order[-2:] == [("harmed", "alternate", 0.2, seed) for seed in (0, 1)]
    results = results.summary()["starts"]
    assert [results[start]["gate"]["passed"] for start in ("deep", "flat", "harmed")] == [True, False, True]
    assert results["deep"]["gate"]["value"] == pytest.approx(15)
    assert results["harmed"]["exits"]["2"]["difference"]["value"] == pytest.approx(-10)
    # Where every query of every seed differs by the same, an interval has no width.
    assert results["harmed"]["exits"]["2"]["difference"]["low"] == pytest.approx(-10, abs=0.01)
    assert results["harmed"]["variants"]["alternate"]["exits"]["2"]["from_together"]["value"] == pytest.approx(10)
    assert results["flat"]["exits"]["2"] == {}


def test_a_rate_is_chosen_by_validation_not_by_test_scores(recipe_file):
    recipe = load_recipe(AblationRecipe, recipe_file, ["learning_rates=[0.1, 0.2]"])
    found = {
        ("start", "together", 0.1, 0): cell_of({}, {1: 0.2, 4: 0.3}, validation=0.9),
        ("start", "together", 0.2, 0): cell_of({}, {1: 0.8, 4: 0.9}, validation=0.1),
    }
    assert Results(recipe, (1, 4), found).best_rate("start", "together") == 0.1


def test_intervals_cover_queries_and_seeds_and_widen_with_the_number_of_comparisons():
    generator = np.random.default_rng(1)
    queries = generator.normal(0.0, 0.3, size=400)
    equal_seeds = estimate([np.tile(queries, (3, 1))])
    half = 1.96 * 100 * queries.std() / np.sqrt(400)
    assert equal_seeds["high"] - equal_seeds["low"] == pytest.approx(2 * half, rel=0.1)
    other_seeds = estimate([queries + np.array([[-0.1], [0.0], [0.1]])])
    assert other_seeds["high"] - other_seeds["low"] > 1.5 * (equal_seeds["high"] - equal_seeds["low"])
    many = estimate([np.tile(queries, (3, 1))], comparisons=20)
    # 1 - 0.05 / 20 of a normal distribution lies within 3.02 standard deviations.
    assert many["high"] - many["low"] == pytest.approx(3.02 / 1.96 * 2 * half, rel=0.15)
    assert other_seeds["by_seed"] == pytest.approx([100 * queries.mean() + shift for shift in (-10, 0, 10)], abs=0.01)


def test_validation_and_test_rows_share_no_repository(recipe_file, tmp_path):
    recipe = load_recipe(AblationRecipe, recipe_file).base()
    data = ablation_module.prepare_retrieval_data(**recipe.rows(), folder=tmp_path / "data", progress=False)
    parts = ablation_module._parts(data.held_out)
    names = [{row.repository for row in rows} for rows in parts.values()]
    assert names[0]
    assert names[1]
    assert names[0].isdisjoint(names[1])
    assert sum(map(len, parts.values())) == len(data.held_out)


@pytest.fixture
def results(recipe_file):
    overrides = ["variants={other: {exit_schedule: alternate}}", "exit_layers=null"]
    recipe = load_recipe(AblationRecipe, recipe_file, overrides)
    levels = {"together": 0.0, "other": 0.1}
    _, results = planned(recipe, lambda start, kind, rate, seed, e: 0.1 * e + levels.get(kind, 0.05))
    return {
        "command": "mose ablate x",
        "recipe": {"finetuning": {"max_steps": 3, "batch_size": 4}, "variants": {"other": {}, "missing": {}}},
        "finished": False,
        **results.summary(),
    }


def test_the_report_shows_gate_differences_and_variants(results):
    text = to_markdown(results)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["start", "+30.0", "+30.0 to +30.0", "yes"] in rows
    assert ["2", "20.0", "25.0", "-5.0", "-5.0 to -5.0", "-5.0"] in rows
    assert ["other", *["+5.0 (+5.0 to +5.0)"] * 3] in rows
    assert ["missing", *["not run"] * 3] in rows
    assert "    mose ablate x" in text
    assert "Training runs are missing" in text


def test_the_picture_has_a_line_together_alone_and_for_the_best_variant(tmp_path, monkeypatch, results):
    figure, figures = pytest.importorskip("matplotlib.figure").Figure, []
    save = figure.savefig
    monkeypatch.setattr(
        figure, "savefig", lambda self, *rest, **keys: figures.append(self) or save(self, *rest, **keys)
    )
    plot_ablation(results, tmp_path / "ablation.png")
    (axes,) = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["together", "alone", "other"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([10, 20, 40])
    assert (tmp_path / "ablation.png").is_file()


def test_reports_hold_no_places_of_this_machine(monkeypatch):
    monkeypatch.setenv("MOSE_DATA", "/srv/data")
    home = os.environ.get("HOME", "")
    found = ablation_module.without_places({"a": ["/srv/data/x", 3], "b": f"{home}/y"})
    assert found == {"a": ["$MOSE_DATA/x", 3], "b": "$HOME/y" if home else "/y"}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seeds=[1, 1]", "settings.value", "seeds"),
        (
            "starts={start: {}, cut: {config.exit_layers: [2, 4]}}",
            "ablation.exits",
            "together has the exits [2, 4]",
        ),
        ("exit_layers=[0, 3]", "ablation.exit_layers", "[0, 3], but the model's exits are [1, 2, 4]"),
        ("variants={together: {}}", "settings.value", "'together'"),
        ("variants={../x: {}}", "settings.value", "'../x'"),
        ("variants={a: {data.triplets: x}}", "ablation.variants", "data.triplets"),
        ("starts={a: {learning_rate: 3}}", "ablation.variants", "learning_rate"),
        ("variants_on=[b]", "ablation.starts", "b"),
        ("variants={a: {objective.speed: 3}}", "settings.unknown", "objective: unknown setting speed"),
        ("variants={a: {max_steps.x: 3}}", "settings.override", "max_steps is not a mapping"),
        ("variants={a: {objective: {teacher: 3, distillation_weight: 1}}}", "contrastive.exit", "a: `teacher` names"),
        ("finetuning.max_steps=0", "settings.value", "max_steps"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(recipe_file, tmp_path, override, key, value):
    with raises(key, value):
        run(recipe_file, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_variant_must_fit_only_the_starts_that_train_it(recipe_file, tmp_path):
    starts = "starts={start: {}, taught: {distillation: {teacher: none}}}"
    overrides = [starts, "variants={own-teacher: {objective.distillation_weight: 1}}", "variants_on=[start]"]
    ablation_module._Cells(load_recipe(AblationRecipe, recipe_file, overrides), tmp_path / "run", False, print)
    with raises("distillation.contrastive", "taught/own-teacher"):
        run(recipe_file, tmp_path / "other", *overrides[:2])


def test_different_rates_have_different_names(recipe_file):
    recipe = load_recipe(AblationRecipe, recipe_file)
    names = [recipe.cell("start", "together", rate, 0).name for rate in (0.003, 0.0030000001, 3.0)]
    assert names == [f"start/together/rate-{rate}-seed-0" for rate in ("0.003", "0.0030000001", "3")]


def test_exits_alone_have_no_options_about_other_exits(recipe_file):
    objective = {"teacher": 4, "distillation_weight": 1, "alignment_weight": 1}
    overrides = [f"finetuning.objective={objective}", "finetuning.share_heads=true", "finetuning.exit_weights=paper"]
    recipe = load_recipe(AblationRecipe, recipe_file, overrides)
    alone, together = (recipe.cell("start", kind, 0.1, 7).recipe for kind in ("exit-2", "together"))
    assert (alone.exit_layer, alone.seed, alone.learning_rate) == (2, 7, 0.1)
    assert alone.objective.distillation_weight == alone.objective.alignment_weight == 0
    assert (alone.training["share_heads"], alone.training["exit_weights"]) == (False, "uniform")
    assert (together.training["share_heads"], together.training["exit_weights"]) == (True, "paper")
    assert together.objective.teacher == 4


def test_our_recipe_tries_options_one_at_a_time():
    recipe = load_recipe(AblationRecipe, hub_config_folder("small") / "ablation.yaml")
    objectives = {kind: recipe.cell("start", kind, 1e-3, 0).recipe.objective for kind in recipe.variants}
    assert objectives["distilled-from-ensemble"].distillation_weight == 1.0
    assert objectives["aligned"].distillation_weight == 0.0
