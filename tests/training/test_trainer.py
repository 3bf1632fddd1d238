import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from modular_star_encoder.data.collators import PaddingCollator
from modular_star_encoder.data.in_context import InContextPairs
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.exit_losses import InContextObjective
from modular_star_encoder.training.arguments import MultiExitTrainingArguments
from modular_star_encoder.training.runs import train_to_the_end
from modular_star_encoder.training.starting_points import add_adapters
from modular_star_encoder.training.trainer import MultiExitTrainer
from tests.data.samples import corpus_of
from tests.errors import raises
from tests.objectives.contrastive_batches import assert_same_gradients, gradients, texts, with_dropout
from tests.tiny import EXIT_LAYERS, tiny_model

pytestmark = pytest.mark.slow


ROWS = range(40)  # the collator makes their texts


def collate(indices):
    lengths = [3 + index % 5 for index in indices]
    return {"query": texts(lengths, seed=sum(indices)), "document": texts(lengths[::-1], seed=1 + sum(indices))}


def arguments(folder, **changes):
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return MultiExitTrainingArguments(output_dir=str(folder), **(settings | changes))


def make_trainer(folder, model=None, objective=None, **changes):
    model, objective = tiny_model() if model is None else model, objective or ContrastiveObjective()
    data = {"train_dataset": ROWS, "eval_dataset": ROWS, "data_collator": collate}
    return MultiExitTrainer(model, arguments(folder, **changes), objective, **data)


def total(log, name="clip_loss", prefix=""):
    """The paper's weights × the logged losses of the exits."""
    return sum(exit_layer / 4 * log[f"{prefix}{name}_exit_{exit_layer}"] for exit_layer in EXIT_LAYERS)


@pytest.mark.parametrize(
    ("schedule", "trained"),
    [
        ("rotate", [(1, 4), (2, 4), (1, 4), (2, 4)]),
        ("alternate", [(4,), EXIT_LAYERS, (4,), EXIT_LAYERS]),
        ("deepest_first", [(4,), (4,), EXIT_LAYERS, EXIT_LAYERS]),
    ],
)
def test_schedules_train_the_deepest_exit_in_every_step_and_the_others_in_some(tmp_path, schedule, trained):
    seen = []
    objective = lambda model, batch, exits: seen.append(exits) or ContrastiveObjective()(model, batch, exits)  # noqa: E731
    trainer = make_trainer(tmp_path, objective=objective, logging_steps=4, exit_schedule=schedule)
    trainer.train()
    assert seen == trained
    if schedule == "rotate":
        log = trainer.state.log_history[0]
        shallow = (total(log) - log["clip_loss_exit_4"]) / 2
        assert log["loss"] == pytest.approx(shallow + log["clip_loss_exit_4"], rel=1e-4)


def trained_weights(folder, **changes):
    trainer = make_trainer(folder, with_dropout(0.0), max_steps=2, learning_rate=1e-2, **changes)
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_detached_exits_train_their_heads_and_leave_the_trunk_to_the_deepest(tmp_path):
    plain = {"exit_weights": "uniform", "max_grad_norm": 0.0}
    alone = trained_weights(tmp_path, **{**plain, "exit_weights": [0, 0, 1]})
    detached, joint = (trained_weights(tmp_path, detach_shallow_exits=value, **plain) for value in (True, False))
    trunk = [name for name in alone if not name.startswith("projection_heads")]
    for name in trunk:
        torch.testing.assert_close(detached[name], alone[name])
    assert not all(torch.allclose(joint[name], alone[name]) for name in trunk)
    start = with_dropout(0.0).state_dict()
    assert not torch.allclose(detached["projection_heads.1.dense.weight"], start["projection_heads.1.dense.weight"])


def test_exits_are_detached_only_while_their_trainer_trains(tmp_path):
    trainer = make_trainer(tmp_path, detach_shallow_exits=True)
    trainer.train()
    trainer.model.zero_grad()
    (loss,) = ContrastiveObjective()(trainer.model, collate(range(4)), (1,)).losses
    loss.backward()
    assert trainer.model.model.layers[0].mlp.c_fc.weight.grad.any()


def test_geometric_weights_train_the_logarithm_of_each_loss(tmp_path):
    trainer = make_trainer(tmp_path, with_dropout(0.0), max_steps=1, logging_steps=1, exit_weights="geometric")
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    trainer.objective(trainer.model, batch, EXIT_LAYERS).losses.log().sum().backward()
    assert loss.item() == pytest.approx(len(EXIT_LAYERS), rel=1e-5)
    assert_same_gradients(found, gradients(trainer.model), relative=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_norm_of_each_exits_gradient_and_cosines_by_layer_are_those_of_the_weighted_losses(tmp_path, adapters):
    model = add_adapters(with_dropout(0.0), {}) if adapters else with_dropout(0.0)
    settings = {"max_steps": 1, "logging_steps": 1, "learning_rate": 0.0, "log_gradient_norms": True}
    trainer = make_trainer(tmp_path, model, **settings)
    trainer.train()
    (log, *_), batch, of_layer_2 = trainer.state.log_history, next(iter(trainer.get_train_dataloader())), {}
    for exit_layer in EXIT_LAYERS:
        trainer.model.zero_grad()
        (loss,) = ContrastiveObjective()(trainer.model, batch, (exit_layer,)).losses
        (loss * exit_layer / 4).backward()
        trunk = {name: one.flatten() for name, one in gradients(trainer.model).items() if "heads" not in name}
        norm = torch.cat([*trunk.values()]).norm().item()
        assert log[f"gradient_norm_exit_{exit_layer}"] == pytest.approx(norm, rel=1e-3)
        of_layer_2[exit_layer] = [gradient for name, gradient in trunk.items() if "layers.1." in name]
    expected = torch.nn.functional.cosine_similarity(*(torch.cat(of_layer_2[k]) for k in (2, 4)), dim=0).item()
    assert log["gradient_cosine_layer_2"] == pytest.approx(expected, rel=1e-3)
    # Layers 3 and 4 belong to the deepest exit alone, and adapters are in layers only.
    layers = (1, 2) if adapters else (0, 1, 2)
    assert {name for name in log if "cosine" in name} == {f"gradient_cosine_layer_{layer}" for layer in layers}


@pytest.mark.parametrize("adapters", [False, True])
def test_weight_decay_is_not_applied_to_biases_norms_and_the_learned_scale(tmp_path, adapters):
    model = tiny_model(logit_scale_init_value=10.0)
    model = add_adapters(model, {}) if adapters else model
    trainer = make_trainer(tmp_path, model=model, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    spared = {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in decayed}
    assert sum(name.endswith("log_scale") for name in spared) == 1
    assert all(name.endswith((".bias", "log_scale", "norm.weight", "layernorm.weight")) for name in spared)
    assert len(decayed) > 6


@pytest.mark.parametrize(
    "length",
    [{"warmup_steps": 2}, {"warmup_steps": 0.5}, {"warmup_steps": 0.5, "max_steps": -1, "num_train_epochs": 0.4}],
)
def test_a_schedule_of_steps_replaces_trainers_own_also_after_a_warm_up_by_share(tmp_path, length):
    schedule = {"milestones": [3], "fractions": [0.5], **length}
    trainer = make_trainer(tmp_path, logging_steps=1, learning_rate=1e-3, **schedule)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0.0, 0.0005, 0.001, 0.0005])


def test_accumulated_gradients_are_those_of_the_mean_loss(tmp_path, tokenizer):
    """With pre-training's labels: for batches that have them, `Trainer` would leave the division to the model."""
    settings = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    settings |= {"gradient_accumulation_steps": 4, "max_grad_norm": 1e9}
    model = with_dropout(0.0, ModularStarEncoderForPreTraining)
    files = {f"repository {i}": [f"def f{i}_{j}(x): return x + {i * j} " * 4 for j in range(6)] for i in range(4)}
    rows = InContextPairs(corpus_of(files, tokenizer), tokenizer, length=8, max_tokens=48, seed=0)
    options = {"train_dataset": rows, "data_collator": PaddingCollator(tokenizer)}
    trainer = MultiExitTrainer(model, arguments(tmp_path, **settings), InContextObjective(), **options)
    trainer.train()
    loss = torch.stack([trainer.compute_loss(model, batch) for batch in trainer.get_train_dataloader()]).mean()
    loss.backward()
    norm = torch.stack([gradient.norm() for gradient in gradients(model).values()]).norm()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_evaluation_reports_each_exit_and_leaves_the_training_log_alone(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1, logging_steps=2, max_steps=2)
    trainer.train()
    training = next(log for log in trainer.state.log_history if "loss" in log)
    evaluation = next(log for log in trainer.state.log_history if "eval_loss" in log)
    assert evaluation["eval_loss"] == pytest.approx(total(evaluation, prefix="eval_"), rel=1e-4)
    assert training["loss"] == pytest.approx(total(training), rel=1e-4)
    assert {f"clip_accuracy_exit_{exit_layer}" for exit_layer in EXIT_LAYERS} <= set(training)


def test_the_newest_checkpoints_are_kept_although_the_clock_was_set_back(tmp_path):
    class Later(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for path in tmp_path.glob("checkpoint-[12]"):
                os.utime(path, (4e9, 4e9))

    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.add_callback(Later())
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def saving_every_second_step(folder, **changes):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    return make_trainer(folder, with_dropout(0.0), **(settings | changes))


def equal_weights(first, second):
    return all(torch.equal(value, second.model.state_dict()[name]) for name, value in first.model.state_dict().items())


def test_an_average_is_resumed_from_the_checkpoint_that_is_resumed(tmp_path):
    straight = saving_every_second_step(tmp_path / "straight", ema_decay=0.9)
    straight.train()
    saving_every_second_step(tmp_path / "other", ema_decay=0.9, learning_rate=1e-1).train()
    checkpoint = shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "best")
    resumed = saving_every_second_step(tmp_path / "other", ema_decay=0.9, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert equal_weights(straight, resumed)


def test_a_checkpoint_without_optimizer_is_passed_over_and_the_run_ends_as_an_uninterrupted_one(tmp_path):
    straight, again = (saving_every_second_step(tmp_path) for _ in range(2))
    straight.train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    assert train_to_the_end(again, tmp_path, progress=False)["resumed_from"] == 2
    assert equal_weights(straight, again)


def test_a_run_that_saves_only_models_continues_their_average_and_warns_that_it_is_not_exact(tmp_path, monkeypatch):
    options, lines = {"ema_decay": 0.9, "save_only_model": True}, []
    saving_every_second_step(tmp_path, **options, max_steps=2).train()
    monkeypatch.setattr("modular_star_encoder.training.trainer.logger.warning_once", lines.append)
    log = train_to_the_end(saving_every_second_step(tmp_path, **options), tmp_path, progress=False)
    assert (log["resumed_from"], log["steps"]) == (2, 4)
    assert ["has no optimizer*, scheduler.pt, rng_state.pth (because of" in line for line in lines] == [True]


def test_a_run_that_ended_after_its_last_step_is_not_trained_further(tmp_path):
    first, again = (saving_every_second_step(tmp_path, ema_decay=0.9) for _ in range(2))
    logs = [train_to_the_end(trainer, tmp_path, progress=False) for trainer in (first, again)]
    assert [(log["resumed_from"], log["steps"]) for log in logs] == [(None, 4), (4, 4)]
    assert equal_weights(first, again)


def test_a_run_with_no_or_rare_log_lines_may_have_no_number_of_steps_between_them(tmp_path):
    trainer = make_trainer(tmp_path, logging_strategy="epoch", logging_steps=0, max_steps=10, log_gradient_norms=True)
    trainer.train()
    assert any("gradient_norm_exit_4" in log for log in trainer.state.log_history)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_arguments_without_effect_are_refused(tmp_path, name):
    with raises("training.no_effect", name):
        MultiExitTrainer(tiny_model(), arguments(tmp_path), ContrastiveObjective(), **{name: print})


@pytest.mark.parametrize("options", [{}, {"share_heads": True, "ema_decay": 0.5}, {"detach_shallow_exits": True}])
def test_model_init_gives_each_training_a_new_model_and_the_same_result_and_shared_heads_stay_equal(tmp_path, options):
    made = []
    options = {"model_init": lambda: made.append(tiny_model()) or made[-1], "args": arguments(tmp_path, **options)}
    data = {"train_dataset": ROWS, "data_collator": collate}
    trainer = MultiExitTrainer(None, objective=ContrastiveObjective(), **options, **data)
    results = []
    for number in (2, 3):  # `Trainer` makes one model when it is made
        trainer.train()
        assert (len(made), trainer.model is made[-1]) == (number, True)
        results.append(trainer.model.state_dict())
        heads = [[*one.parameters()] for one in trainer.model.projection_heads.values()]
        are_equal = {all(map(torch.equal, heads[0], others)) for others in heads[1:]}
        assert are_equal == {trainer.args.share_heads}
    assert all(torch.equal(results[0][name], one) for name, one in results[1].items())
    assert not all(torch.equal(tiny_model().state_dict()[name], one) for name, one in results[1].items())


def trainer_of(model, folder, settings, **changes):
    options = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 6, "learning_rate": 1e-2}
    return make_trainer(folder, model, ContrastiveObjective(ContrastiveSettings(**settings)), **(options | changes))


@pytest.mark.parametrize(
    ("settings", "own", "key"),
    [
        ({}, {"exit_schedule": "sometimes"}, "training.exit_schedule"),
        ({}, {"label_smoothing_factor": 0.1}, "training.no_effect"),
        ({}, {"ema_decay": "high"}, "training.ema_decay"),
        ({}, {"ema_decay": 1.5}, "training.ema_decay"),
        ({}, {"ema_decay": 0.9, "load_best_model_at_end": True}, "training.ema_decay"),  # the average would replace it
        ({}, {"warmup_steps": "few", "milestones": [3], "fractions": [0.5]}, "training.schedule"),
        ({"mini_batch_tokens": 8}, {"log_gradient_norms": True}, "training.log_gradient_norms.cached"),
        ({"teacher": "next_deeper", "distillation_weight": 1}, {"exit_schedule": "rotate"}, "contrastive.rotation"),
    ],
)
def test_settings_that_do_not_fit_the_trainer_are_refused_before_training(tmp_path, settings, own, key):
    with raises(key):
        trainer_of(tiny_model(), tmp_path, settings, **own)


def test_exits_with_sizes_of_their_own_may_be_trained_in_turn(tmp_path):
    settings = {"dimensions": {1: [4], 4: [8, 16]}, "mini_batch_tokens": 16}
    trainer = trainer_of(tiny_model(), tmp_path, settings, exit_schedule="rotate")
    trainer.train()
    assert "clip_loss_exit_1" in trainer.state.log_history[0]
    assert "clip_loss_exit_2" in trainer.state.log_history[1]


def test_a_loss_that_is_not_finite_stops_training_and_leaves_its_batch(tmp_path):
    model = tiny_model()
    trainer = trainer_of(model, tmp_path / "run", {"mini_batch_tokens": 16})
    batches = []

    def objective(model, batch, exits):
        batches.append(batch)
        if len(batches) == 2:
            with torch.no_grad():
                model.projection_heads["2"].out_proj.bias.fill_(float("nan"))
        return ContrastiveObjective()(model, batch, exits)

    trainer.objective = objective
    with raises("training.loss.not_finite") as error:
        trainer.train()
    path = tmp_path / "run" / "non_finite_loss_step_2_rank_0.safetensors"
    for part in ("step 2", "exit 2: nan", path):
        assert str(part) in str(error.value)
    written = load_file(path)
    assert set(written) == {f"{side}.{name}" for side in collate([0]) for name in ("input_ids", "attention_mask")}
    assert torch.equal(written["query.input_ids"], batches[1]["query"]["input_ids"])
    assert trainer.state.global_step == 1


def test_a_gradient_that_is_not_finite_stops_training_before_it_reaches_the_weights(tmp_path):
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, {})
    before = {name: one.clone() for name, one in model.state_dict().items()}
    model.projection_heads["2"].out_proj.weight.register_hook(lambda gradient: gradient * float("nan"))
    with raises("training.gradient.not_finite", "step 1"):
        trainer.train()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(("margin", "warned"), [(1.9, True), (-1.9, False)])
def test_a_guide_that_masks_many_negatives_is_warned_about(tmp_path, monkeypatch, margin, warned):
    warnings = []
    monkeypatch.setattr("modular_star_encoder.training.trainer.logger.warning_once", warnings.append)
    trainer_of(tiny_model(), tmp_path, {"false_negative_margin": margin}, max_steps=1).train()
    assert [text.startswith("The deepest exit masks") for text in warnings] == [True] * warned
