"""The trainer: per-exit logs, the weighted total, and resuming as if nothing had happened."""

import json

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from modular_star_encoder.data.collators import PaddingCollator
from modular_star_encoder.data.in_context import InContextPairs
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.exit_losses import InContextObjective
from modular_star_encoder.training.arguments import MultiExitTrainingArguments
from modular_star_encoder.training.runs import last_checkpoint, train_to_the_end
from modular_star_encoder.training.starting_points import add_adapters
from modular_star_encoder.training.trainer import MultiExitTrainer
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model

pytestmark = pytest.mark.slow


class Pairs(Dataset):
    """Rows that differ, one batch of them being a whole collated batch."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(4, 300, (2, 8), generator=generator)


def collate(rows):
    sides = torch.stack(rows, dim=1)
    return {
        name: {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, ids in zip(("query", "document"), sides, strict=True)
    }


def arguments(folder, **changes):
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    return MultiExitTrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **(settings | changes)
    )


def make_trainer(folder, weights="paper", model=None, **changes):
    return MultiExitTrainer(
        tiny_model() if model is None else model,
        arguments(folder, exit_weights=weights, **changes),
        ContrastiveObjective(),
        train_dataset=Pairs(),
        eval_dataset=Pairs(),
        data_collator=collate,
    )


def test_the_total_is_the_weighted_sum_of_the_exits(tmp_path):
    batch = {"query": tiny_batch(lengths=(5, 3, 4)), "document": tiny_batch()}
    trainer = make_trainer(tmp_path)
    trainer.model.eval()
    losses = ContrastiveObjective()(trainer.model, batch, EXIT_LAYERS).losses
    total = losses[0] * 1 / 4 + losses[1] * 2 / 4 + losses[2] * 4 / 4
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), total)


def test_every_exits_loss_is_logged_and_adds_up_to_the_total(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    for log in trainer.state.log_history[:2]:
        per_exit = [log[f"clip_loss_exit_{exit_layer}"] for exit_layer in EXIT_LAYERS]
        total = sum(exit_layer / 4 * loss for exit_layer, loss in zip(EXIT_LAYERS, per_exit, strict=True))
        assert log["loss"] == pytest.approx(total, rel=1e-4)
        assert {f"clip_accuracy_exit_{exit_layer}" for exit_layer in EXIT_LAYERS} <= set(log)


def test_rotation_trains_the_deepest_exit_and_each_other_in_its_turn(tmp_path):
    trainer, seen = make_trainer(tmp_path, logging_steps=4, rotate_shallow_exits=True), []
    objective = trainer.objective
    trainer.objective = lambda model, batch, exits: seen.append(exits) or objective(model, batch, exits)
    trainer.train()
    assert seen == [(1, 4), (2, 4), (1, 4), (2, 4)]
    log = trainer.state.log_history[0]
    total = sum(
        exit_layer / 4 * log[f"clip_loss_exit_{exit_layer}"] / (1 + (exit_layer < 4)) for exit_layer in (1, 2, 4)
    )
    assert log["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_norms_per_exit_are_those_of_each_weighted_loss_on_the_trunk(tmp_path, adapters):
    model = add_adapters(tiny_model(), {}) if adapters else tiny_model()
    own = {"model": model, "log_gradient_norms": True}
    trainer = make_trainer(tmp_path, max_steps=1, logging_steps=1, learning_rate=0.0, **own)
    trainer.model.config.attention_dropout = 0.0
    for module in trainer.model.modules():
        for name in ("attention_dropout", "residual_dropout", "embedding_dropout"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    trainer.train()
    (batch,) = [batch for step, batch in zip(range(1), trainer.get_train_dataloader(), strict=False)]
    for exit_layer in EXIT_LAYERS:
        trainer.model.zero_grad()
        (loss,) = ContrastiveObjective()(trainer.model, batch, (exit_layer,)).losses
        (loss * exit_layer / 4).backward()
        trunk = [p for name, p in trainer.model.named_parameters() if "projection_heads" not in name]
        gradients = [p.grad for p in trunk if p.grad is not None]
        expected = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        assert trainer.state.log_history[0][f"gradient_norm_exit_{exit_layer}"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("adapters", [False, True])
def test_weight_decay_is_not_applied_to_biases_norms_and_the_learned_scale(tmp_path, adapters):
    model = tiny_model(logit_scale_init_value=10.0)
    model = add_adapters(model, {}) if adapters else model
    trainer = make_trainer(tmp_path, model=model, weight_decay=0.1)
    decayed = {
        id(p) for group in trainer.create_optimizer().param_groups if group["weight_decay"] for p in group["params"]
    }
    spared = {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in decayed}
    assert sum(name.endswith("log_scale") for name in spared) == 1
    assert all(name.endswith((".bias", "log_scale", "norm.weight", "layernorm.weight")) for name in spared)
    assert len(decayed) > 6


def test_a_schedule_of_steps_replaces_trainers_own(tmp_path):
    schedule = {"warmup_steps": 2, "milestones": [3], "fractions": [0.5]}
    trainer = make_trainer(tmp_path, logging_steps=1, learning_rate=1e-3, **schedule)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0.0, 0.0005, 0.001, 0.0005])


def test_a_weight_of_zero_trains_nothing_of_that_exit(tmp_path):
    trainer = make_trainer(tmp_path, weights=[0.0, 0.0, 1.0], weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert not any(name.startswith(("projection_heads.1.", "projection_heads.2.")) for name in changed)
    assert any(name.startswith("projection_heads.4.") for name in changed)


def test_accumulated_gradients_are_those_of_the_mean_loss(tmp_path, tokenizer):
    """With pre-training's labels: for batches that have them, `Trainer` would leave the division to the model."""
    texts = {f"repository {i}": [f"def f{i}_{j}(x): return x + {i * j} " * 4 for j in range(6)] for i in range(4)}
    rows = InContextPairs(texts, tokenizer, length=8, max_tokens=48, seed=0, progress=False)
    settings = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    model = tiny_model(
        ModularStarEncoderForPreTraining, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0
    )
    trainer = MultiExitTrainer(
        model,
        arguments(tmp_path, **settings, gradient_accumulation_steps=4, max_grad_norm=1e9),
        InContextObjective(),
        train_dataset=rows,
        data_collator=PaddingCollator(tokenizer),
    )
    trainer.train()
    losses = [trainer.compute_loss(model, batch) for batch in trainer.get_train_dataloader()]
    (torch.stack(losses).mean()).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]).norm()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert log["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_evaluation_reports_each_exit_and_leaves_the_training_log_alone(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1, logging_steps=2, max_steps=2)
    trainer.train()
    training = next(log for log in trainer.state.log_history if "loss" in log)
    evaluation = next(log for log in trainer.state.log_history if "eval_loss" in log)
    per_exit = [evaluation[f"eval_clip_loss_exit_{exit_layer}"] for exit_layer in EXIT_LAYERS]
    total = sum(exit_layer / 4 * loss for exit_layer, loss in zip(EXIT_LAYERS, per_exit, strict=True))
    assert evaluation["eval_loss"] == pytest.approx(total, rel=1e-4)
    assert training["loss"] == pytest.approx(
        sum(exit_layer / 4 * training[f"clip_loss_exit_{exit_layer}"] for exit_layer in EXIT_LAYERS), rel=1e-4
    )


def test_an_exit_that_the_model_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="its exits are 1, 2, 4"):
        MultiExitTrainer(tiny_model(), arguments(tmp_path), ContrastiveObjective(), exit_layers=(3,))


def pretraining_stage(tokenizer, folder, monkeypatch=None, stop_after=None):
    """Six steps of pre-training with dropout; `stop_after` interrupts it as Ctrl-C would."""
    texts = {f"repository {i}": [f"def f{i}_{j}(x): return x + {i * j} " * 4 for j in range(6)] for i in range(4)}
    settings = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "save_strategy": "steps"}
    rows = InContextPairs(texts, tokenizer, length=24, max_tokens=48, seed=0, progress=False)
    model = tiny_model(ModularStarEncoderForPreTraining, residual_dropout=0.2)
    if stop_after is not None:

        class Interrupt(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop_after:
                    raise KeyboardInterrupt

        original = MultiExitTrainer.__init__

        def with_interrupt(self, *args, **kwargs):
            original(self, *args, callbacks=[Interrupt()], **kwargs)

        monkeypatch.setattr(MultiExitTrainer, "__init__", with_interrupt)
    trainer = MultiExitTrainer(
        model,
        arguments(folder, **settings),
        InContextObjective(),
        train_dataset=rows,
        data_collator=PaddingCollator(tokenizer),
    )
    return model, train_to_the_end(trainer, folder, progress=False)


@pytest.mark.slow
def test_interrupted_training_resumes_to_the_same_losses_and_weights(tmp_path, tokenizer, monkeypatch):
    straight, straight_log = pretraining_stage(tokenizer, tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        pretraining_stage(tokenizer, tmp_path / "interrupted", patch, stop_after=5)
    resumed, log = pretraining_stage(tokenizer, tmp_path / "interrupted")
    assert log["resumed_from"] == 4
    assert straight_log["resumed_from"] is None

    def losses(log):
        return {entry["step"]: entry["loss"] for entry in log["log_history"] if "loss" in entry}

    assert losses(log) == losses(straight_log)
    assert len(set(losses(log).values())) == 6
    for (name, expected), got in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, got), name


def test_a_half_written_checkpoint_is_passed_over_and_removed(tmp_path, tokenizer):
    pretraining_stage(tokenizer, tmp_path)
    assert last_checkpoint(tmp_path).endswith("checkpoint-6")
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert last_checkpoint(tmp_path).endswith("checkpoint-4")
    _, log = pretraining_stage(tokenizer, tmp_path)
    assert log["resumed_from"] == 4
    assert not (tmp_path / "checkpoint-8").exists()
    assert json.loads(state.read_text())["global_step"] == 6


def test_an_empty_folder_has_no_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "missing") is None
