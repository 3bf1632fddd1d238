import errno
import io
import json
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerState, TrainingArguments

from modular_star_encoder.cli.main import main
from modular_star_encoder.data.tokenizer import train_tokenizer
from modular_star_encoder.inference.encode import bf16_is_faster
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.training import find_recipe, hub_config_folder, packaged_recipes, runs
from modular_star_encoder.training.ablation import AblationRecipe
from modular_star_encoder.training.arguments import MultiExitTrainingArguments, check_arguments
from modular_star_encoder.training.recipes import ClassificationRecipe, FinetuningRecipe, PretrainingRecipe, load_recipe
from modular_star_encoder.training.runs import Run, last_checkpoint
from modular_star_encoder.training.trainer import MultiExitTrainer
from modular_star_encoder.utils.settings import format_reference
from tests.errors import raises
from tests.tiny import save_tiny_checkpoint, tiny_model


@pytest.mark.parametrize("kind", [PretrainingRecipe, FinetuningRecipe, ClassificationRecipe, AblationRecipe])
def test_the_reference_names_every_key_with_its_type_default_and_meaning(kind):
    lines = {line.split()[0]: line for line in format_reference(kind).splitlines()}
    assert all(";" in line for line in lines.values()), [line for line in lines.values() if ";" not in line]


def test_a_log_line_is_short_and_names_each_exit():
    logs = {"loss": 1.5, "learning_rate": 1e-3, "clip_loss_exit_1": 2.0, "clip_loss_exit_12": 1.0, "epoch": 1}
    assert runs.format_log(logs) == "loss 1.500 · learning_rate 1.0e-03 · clip_loss 1: 2.000, 12: 1.000"


@pytest.mark.parametrize(
    ("device", "seconds", "warmup", "announced", "said"),
    [
        ("cpu", 60, 0, 41, "about 59 minutes if steps take as long as so far. To train for only 15 minutes, stop this"),
        ("cpu", 60, 0.2, 41, "with max_steps=15 and another"),
        ("cpu", 60, 40, 41, "with max_steps=15 warmup_steps=6 and another"),
        ("cpu", 18, 40, 43, "about 17 minutes if steps"),
        ("cpu", 1, 40, None, ""),
        ("cuda", 60, 40, None, ""),
    ],
)
def test_a_long_run_on_a_cpu_names_the_number_of_steps_that_shortens_it(
    monkeypatch, capsys, device, seconds, warmup, announced, said
):
    arguments = SimpleNamespace(device=SimpleNamespace(type=device), warmup_steps=warmup)
    bar, lines = runs.ExitProgressCallback(), []
    state = TrainerState(global_step=40, max_steps=100)  # resumed from step 40
    monkeypatch.setattr("time.perf_counter", lambda: state.global_step * seconds)
    bar.on_train_begin(arguments, state, None)
    for state.global_step in range(41, 46):
        bar.on_step_end(arguments, state, None)
        said_now = [line for line in capsys.readouterr().err.splitlines() if "max_steps=" in line]
        lines += [(state.global_step, line) for line in said_now]
    assert (bar.training_bar.initial, bar.training_bar.n) == (40, 45)
    bar.on_train_end(arguments, state, None)
    assert [step for step, _ in lines] == ([announced] if announced else [])
    assert all(said in line for _, line in lines)


@pytest.mark.parametrize(
    ("step", "changes", "again"),
    [(12, {}, False), (13, {}, True), (12, {"ema_decay": 0.9}, True), (12, {"load_best_model_at_end": True}, True)],
)
def test_the_last_step_is_evaluated_once_unless_the_weights_have_changed_since(capsys, step, changes, again):
    logged, new = {"eval_loss": 2.0, "step": 12}, {"eval_loss": 1.0}
    state = TrainerState(global_step=step, log_history=[{"eval_loss": 3.0, "step": 6}, logged, {"step": step}])
    arguments = SimpleNamespace(**{"ema_decay": 0.0, "load_best_model_at_end": False} | changes)
    trainer = SimpleNamespace(args=arguments, state=state, evaluate=lambda: new)
    assert runs.final_metrics(trainer, "evaluation") is (new if again else logged)
    assert capsys.readouterr().out == ("evaluation\n" if again else "")


def write_training_checkpoint(folder, step):
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step}, folder / name)
    save_file({"weight": torch.ones(9)}, folder / "model.safetensors")
    TrainerState(global_step=step, max_steps=6, epoch=1.0).save_to_json(str(folder / "trainer_state.json"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("trainer_state.json", text) for text in ("[]", '{"global_step": null}', '{"global_step": 4}', "{", "")),
        *((name, text) for name in ("optimizer.pt", "model.safetensors") for text in ("", "half")),
        *((name, "missing") for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")),
        ("../checkpoint-9", ""),
    ],
)
def test_a_run_continues_from_the_newest_checkpoint_whose_files_are_all_there_and_whole(tmp_path, file, content):
    for name, step in (("2", 2), ("4", 4), ("4-backup", 4), ("final", 6), ("5", 4)):
        write_training_checkpoint(tmp_path / f"checkpoint-{name}", step)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / file
    if content == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if content == "half" else content.encode())
    assert last_checkpoint(tmp_path) == str(tmp_path / ("checkpoint-4" if "checkpoint-9" in file else "checkpoint-2"))


def continued_from(folder, **options):
    """Name of the checkpoint in `folder` from which `train_to_the_end` continues; None from the start."""
    found, arguments = [], MultiExitTrainingArguments("never written", use_cpu=True, **options)
    options = {"is_world_process_zero": lambda: True, "add_callback": [].append, "state": TrainerState()}
    options["train"] = lambda resume_from_checkpoint: found.append(resume_from_checkpoint)
    runs.train_to_the_end(SimpleNamespace(args=arguments, **options), folder, progress=False)
    return found[0] and Path(found[0]).name


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "model.safetensors"])
def test_nothing_is_deleted_or_passed_over_because_a_file_cannot_be_read_now(tmp_path, monkeypatch, name):
    for step in (2, 4):
        write_training_checkpoint(tmp_path / f"checkpoint-{step}", step)
    before, read = sorted(tmp_path.rglob("*")), io.open

    def fail(path, *rest, **options):
        if str(path).endswith(f"checkpoint-4/{name}"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr("io.open", fail)
        with pytest.raises(OSError, match="Input/output error"):
            continued_from(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert continued_from(tmp_path) == "checkpoint-4"


def test_checkpoints_of_another_transformers_are_kept(tmp_path):
    for step in (2, 4):
        write_training_checkpoint(tmp_path / f"checkpoint-{step}", step)
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"unknown": 1}))
    before = sorted(tmp_path.rglob("*"))
    assert continued_from(tmp_path) == "checkpoint-4"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_needs_the_average_if_one_is_trained_and_no_states_if_only_the_model_is_saved(tmp_path):
    write_training_checkpoint(tmp_path / "checkpoint-2", 2)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "checkpoint-2" / name).unlink()
    assert continued_from(tmp_path, save_only_model=True) == "checkpoint-2"
    assert continued_from(tmp_path, save_only_model=True, ema_decay=0.9) is None
    assert (tmp_path / "damaged-checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        *(({}, True), ({"warmup_steps": 7}, False), ({"lr_scheduler_type": "constant"}, False)),
        *(({"max_steps": -1}, False), ({"warmup_steps": 0.9}, True), ({"warmup_steps": 0.8}, False)),
    ],
)
def test_a_warm_up_that_does_not_end_before_training_is_warned_about(monkeypatch, changes, warned):
    lines = []
    monkeypatch.setattr("modular_star_encoder.training.arguments.logger.warning_once", lines.append)
    MultiExitTrainingArguments("never written", use_cpu=True, **({"max_steps": 8, "warmup_steps": 8} | changes))
    assert ["A warm-up of 8 steps is not shorter than max_steps=8" in line for line in lines] == [True] * warned


def test_damaged_checkpoints_are_kept_under_another_name_and_unfinished_ones_removed(tmp_path, capsys):
    (tmp_path / "checkpoint-6").mkdir()
    for number in range(2):
        for step in (2, 4):
            write_training_checkpoint(tmp_path / f"checkpoint-{step}", step)
            (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_text(f"damaged {number}")
        assert continued_from(tmp_path) is None
        lines = capsys.readouterr().err.splitlines()
        assert [sum(f"checkpoint-{step} " in line for line in lines) for step in (2, 4, 6)] == [1, 1, 0]
    kept = {path.parent.name: path.read_text() for path in tmp_path.rglob("model.safetensors")}
    assert {path.name for path in tmp_path.iterdir()} == kept.keys()
    assert sorted(kept.values()) == ["damaged 0"] * 2 + ["damaged 1"] * 2
    assert not any(name.startswith("checkpoint-") for name in kept)


def recipe_of(model, **settings):
    data, options = {"triplets": "triplets.jsonl"}, {"max_steps": 6, "learning_rate": 1e-3, "batch_size": 4}
    return FinetuningRecipe(model=str(model), data=data, **options, **settings)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("recipe.json", text) for text in ("[]", "3", "", "{")),
        *(("model/training_log.json", t) for t in ("{}", "[]")),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, file, content):
    Run(tmp_path, recipe_of("small"), "fine-tuning").begin()
    (tmp_path / "model").mkdir()
    (tmp_path / file).write_text(content)
    with raises("training.run.damaged", tmp_path / file):
        Run(tmp_path, recipe_of("small"), "fine-tuning")


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_a_strategy_may_be_the_word_no_which_yaml_reads_as_false(tmp_path, name):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_of("model").to_dict()))
    recipe = load_recipe(FinetuningRecipe, path, [f"{name}=no"])
    assert getattr(recipe.arguments(tmp_path, progress=False), name) == "no"


FINISHED = {"steps": 6, "evaluation": {}}


@pytest.mark.parametrize("settings", [{"lora": {}}, {}])
def test_a_run_is_continued_only_with_the_model_and_tokenizer_it_began_with(tmp_path, settings):
    start, out = save_tiny_checkpoint(tmp_path / "start"), tmp_path / "run"
    shutil.copytree(start, tmp_path / "tokenizer")
    recipe = recipe_of(start, tokenizer=str(tmp_path / "tokenizer"), **settings)
    run = Run(out, recipe, "fine-tuning")
    run.begin()
    write_training_checkpoint(out / "checkpoints" / "checkpoint-2", 2)
    assert Run(out, recipe, "fine-tuning").settings == json.loads(json.dumps(recipe.to_dict()))
    assert load_recipe(FinetuningRecipe, out / "recipe.json").lora == recipe.lora
    for folder, name in ((start, "model_checksum"), (tmp_path / "tokenizer", "tokenizer_checksum")):
        kept = shutil.move(folder, tmp_path / "kept")
        save_tiny_checkpoint(folder, pooling="lasttoken")
        train_tokenizer(["other words"], 290, progress=False).save_pretrained(folder)
        with raises("training.run.other_settings", f"other values of {name}; choose another folder, or restore"):
            Run(out, recipe, "fine-tuning")
        shutil.rmtree(folder)
        shutil.move(kept, folder)
    (out / "model").mkdir()
    run.end(FINISHED)
    assert Run(out, recipe, "fine-tuning").log == FINISHED


def test_only_a_finished_run_of_other_settings_advises_to_train_its_model_further(tmp_path):
    run, advice = Run(tmp_path, recipe_of("small"), "fine-tuning"), f"set model={tmp_path / 'model'}."
    run.begin()
    write_training_checkpoint(tmp_path / "checkpoints" / "checkpoint-2", 2)
    for finished in (False, True):
        if finished:
            (tmp_path / "model").mkdir()
            run.end(FINISHED)
        with raises("training.run.other_settings", "values of seed; choose another folder") as caught:
            Run(tmp_path, recipe_of("small", seed=5), "fine-tuning")
        assert str(caught.value).endswith(advice) == finished


def test_a_moved_run_finds_its_best_checkpoint_although_a_later_step_without_checkpoint_was_better(tmp_path):
    for step in (2, 4):
        write_training_checkpoint(tmp_path / f"checkpoint-{step}", step)
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    moved = {"best_global_step": 3, "best_model_checkpoint": "moved/checkpoint-2"}
    state.write_text(json.dumps(json.loads(state.read_text()) | moved))
    assert continued_from(tmp_path) == "checkpoint-4"
    assert json.loads(state.read_text())["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    written = state.stat().st_ino
    assert continued_from(tmp_path) == "checkpoint-4"
    assert state.stat().st_ino == written


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("clip_loss_exit_4", False), ("eval_mlm_loss_exit_12", False), ("loss", False), ("clip_accuracy_exit_4", True)],
)
def test_the_best_checkpoint_has_the_lowest_loss_of_an_exit_or_the_highest_accuracy(metric, greater):
    options = {"use_cpu": True, "metric_for_best_model": metric}
    assert MultiExitTrainingArguments("never written", **options).greater_is_better is greater
    assert MultiExitTrainingArguments("never written", **options, greater_is_better=True).greater_is_better


@pytest.mark.parametrize("greater", [None, True, False])
def test_plain_arguments_do_not_keep_the_checkpoint_with_the_highest_loss_of_an_exit(tmp_path, greater):
    metric = {"metric_for_best_model": "clip_loss_exit_4", "load_best_model_at_end": True, "eval_strategy": "steps"}
    options = {"use_cpu": True, "greater_is_better": greater, "report_to": "none", "eval_steps": 500}
    plain = TrainingArguments(str(tmp_path), **metric, **options)
    make = partial(MultiExitTrainer, tiny_model(), plain, ContrastiveObjective(), eval_dataset=[])
    if greater is False:
        assert make().args.greater_is_better is False
    else:
        with raises("training.greater_is_better", "clip_loss_exit_4", "greater_is_better=False"):
            make()


@pytest.mark.parametrize(("resumed_from", "duration"), [(None, ", about 2 min"), (6, ", about 4 min"), (12, "")])
def test_an_evaluation_is_announced_with_a_duration_measured_in_training(resumed_from, duration):
    log = {"steps": 12, "resumed_from": resumed_from, "seconds": 720.0}
    assert runs.evaluation_notice(log, "200 pairs at 5 exits", 6.0) == f"evaluation: 200 pairs at 5 exits{duration}"


@pytest.mark.parametrize(
    ("flags", "faster"),
    [("flags : fpu avx512_bf16", True), ("Features : asimd bf16 i8mm", True), ("flags : fpu avx512_vnni", False)],
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


@pytest.mark.parametrize(
    ("name", "command", "file"),
    [
        ("small", None, "small/finetune"),
        ("small", "pretrain", "small/recipe"),
        ("small", "ablate", "small/ablation"),
        ("mose-code", "finetune", "mose-code/finetune"),
        ("mose-code/exit-0", "finetune", "mose-code/exit-0"),
        ("finetuned", "finetune", "finetuned/recipe"),
        ("hub_configs/mini/recipe.yaml", "pretrain", "mini/recipe"),
        ("synthconl", "dataset build", "synthconl/recipe"),
        ("mose-code/corpus", None, "mose-code/corpus"),
        ("small/publish", None, "small/publish"),
    ],
)
def test_a_packaged_recipe_is_found_by_its_name_and_by_its_folders(tmp_path, monkeypatch, name, command, file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert find_recipe(name, command) == hub_config_folder("small").parent / f"{file}.yaml"


def test_a_file_of_the_same_name_comes_first_and_an_unknown_name_lists_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").write_text("mine")
    assert find_recipe("small").read_text() == "mine"
    for name in ("smal", "mini", "./hub_configs"):
        with raises("settings.file", name, "small/finetune") as caught:
            find_recipe(name, "finetune")
        assert "small/recipe" not in str(caught.value)
    (tmp_path / "data").mkdir()
    with raises("settings.file", "data not found: it is a folder. Give"):
        find_recipe("data", "finetune")


def test_recipes_are_listed_shown_and_copied_but_no_file_is_replaced(tmp_path, capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"mose {one.command}" in listed and one.name in listed for one in packaged_recipes())
    assert all(len(one.summary) > 20 for one in packaged_recipes())
    assert main(["recipes", "copy", "small", str(tmp_path / "my.yaml")]) == 0
    text = (tmp_path / "my.yaml").read_text()
    note = "small/finetune (mose finetune); other recipes: small/recipe (mose pretrain), small/ablation (mose ablate)"
    assert note in capsys.readouterr().err
    assert main(["recipes", "show", "small/finetune"]) == 0
    assert capsys.readouterr() == (text, "")
    assert text == find_recipe("small").read_text()
    (tmp_path / "my.yaml").write_text("mine")
    assert main(["recipes", "copy", "small", str(tmp_path / "my.yaml")]) == 2
    assert (tmp_path / "my.yaml").read_text() == "mine"


def test_the_papers_recipes_hold_its_figures():
    figures = {"max_steps": 245_000, "max_tokens": 2048, "learning_rate": 6.24e-4, "weight_decay": 0.1}
    figures |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "exit_weights": "paper"}
    recipe = load_recipe(PretrainingRecipe, "pretrained/recipe")
    assert figures.items() <= recipe.to_dict().items()
    assert recipe.tokens_per_step == pytest.approx(3.99e6, rel=0.005)
    assert recipe.batches(8)["gradient_accumulation_steps"] == recipe.tokens_per_step // (8 * 4 * 2048)
    figures = {"max_steps": 20_000, "batch_size": 2048, "max_train_samples": 635_404, "max_code_tokens": 2048}
    figures |= {"learning_rate": 1e-5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}
    figures |= {"exit_weights": "paper", "identifier_rename_prob": 0.3}
    recipe = load_recipe(FinetuningRecipe, "finetuned/recipe")
    assert figures.items() <= recipe.to_dict().items()
    assert recipe.objective.logit_scale == 10.0
    changes = {"config": {"logit_scale_init_value": 30.0}, "exit_weights": "uniform"}  # ours learns a scale from 30
    assert load_recipe(FinetuningRecipe, "finetuned/recommended").to_dict() == recipe.to_dict() | changes
    figures = {"max_steps": 14_000, "batch_size": 64, "warmup_steps": 2000, "learning_rate": 1e-5}
    assert figures.items() <= load_recipe(ClassificationRecipe, "finetuned/clone_detection").to_dict().items()


@pytest.mark.parametrize(
    ("plan", "tried"), [({}, True), ({"fsdp": True}, False), ({"deepspeed_plugin": object()}, False)]
)
def test_arguments_are_tried_on_a_tiny_model_unless_deepspeed_or_fsdp_would_hold_it(monkeypatch, tmp_path, plan, tried):
    trainer = Mock(side_effect=InterruptedError)
    monkeypatch.setattr("modular_star_encoder.training.arguments.Trainer", trainer)
    arguments = MultiExitTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    for name, value in plan.items():
        setattr(arguments, name, value)
    with suppress(InterruptedError):
        check_arguments(arguments)
    assert trainer.called is tried
