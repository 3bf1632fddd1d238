"""Contrastive training through `MultiExitTrainer`: gradient caching in its loop, a learned scale, and bad batches."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset

from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.exit_losses import InContextObjective, ObjectiveOutput
from modular_star_encoder.training.arguments import MultiExitTrainingArguments
from modular_star_encoder.training.trainer import MultiExitTrainer
from tests.errors import raises
from tests.objectives.contrastive_batches import every_option, every_side, texts, with_dropout
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model

pytestmark = pytest.mark.slow


class Rows(Dataset):
    """Indices; the collator makes their texts."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return index


def collate(indices):
    lengths = [3 + index % 5 for index in indices]
    return {"query": texts(lengths, seed=sum(indices)), "document": texts(lengths[::-1], seed=1 + sum(indices))}


def trainer_of(model, folder, settings, objective=None, **changes):
    arguments = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 6, "save_strategy": "no"}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": 1e-2}
    return MultiExitTrainer(
        model,
        MultiExitTrainingArguments(output_dir=str(folder), **(arguments | changes)),
        objective or ContrastiveObjective(settings),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        data_collator=collate,
    )


def train(folder, tokens, **changes):
    model = with_dropout(0.0, logit_scale_init_value=12.0)
    settings = ContrastiveSettings(mini_batch_tokens=tokens, alignment_weight=0.1)
    trainer = trainer_of(model, folder, settings, **changes)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}])
def test_mini_batches_train_as_whole_batches_do(tmp_path, changes):
    plain, cached = (train(tmp_path, tokens, **changes) for tokens in (None, 16))
    names = {"loss", "grad_norm", "logit_scale"} | {f"clip_loss_exit_{exit_layer}" for exit_layer in EXIT_LAYERS}
    for expected, found in zip(plain.state.log_history[:3], cached.state.log_history[:3], strict=True):
        assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names}, 1e-3)
    assert plain.state.log_history[2]["logit_scale"] != pytest.approx(12.0, abs=1e-3)
    before = with_dropout(0.0, logit_scale_init_value=12.0)
    states = (trainer.model.state_dict() for trainer in (plain, cached))
    distances = [
        torch.stack([(first[name] - second[name]).norm() for name in first]).norm()
        for first, second in ((before.state_dict(), cached.model.state_dict()), tuple(states))
    ]
    assert distances[1] < 1e-2 * distances[0]


@pytest.mark.slow
def test_mini_batches_train_in_mixed_precision(tmp_path):
    plain, cached = (train(tmp_path, tokens, bf16=True) for tokens in (None, 16))
    losses = [[log["loss"] for log in trainer.state.log_history[:3]] for trainer in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_evaluation_needs_no_gradients(tmp_path):
    trainer = train(tmp_path, 16, max_steps=1)
    metrics = trainer.evaluate()
    assert {"eval_logit_scale", "eval_alignment_loss_exit_1", "eval_clip_accuracy_exit_4"} <= set(metrics)


def test_a_learned_scale_is_resumed_saved_and_loaded(tmp_path):
    straight = train(tmp_path / "straight", 16, max_steps=4, save_strategy="steps", save_steps=2)
    resumed = trainer_of(
        with_dropout(0.0, logit_scale_init_value=12.0),
        tmp_path / "resumed",
        ContrastiveSettings(mini_batch_tokens=16, alignment_weight=0.1),
        max_steps=4,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    scale = straight.model.logit_scale.log_scale
    assert torch.equal(resumed.model.logit_scale.log_scale, scale)
    straight.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("*.bin")), "Trainer's settings are a pickle"
    loaded = ModularStarEncoderForRetrieval.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.logit_scale.log_scale, scale)


def test_a_learned_scale_is_trained_beside_lora_and_comes_back(tmp_path):
    def adapted():
        return with_dropout(0.0, logit_scale_init_value=12.0)

    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["dense", "out_proj", "logit_scale"])
    trainer = trainer_of(get_peft_model(adapted(), lora), tmp_path, ContrastiveSettings(mini_batch_tokens=16))
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    scale = trainer.state.log_history[2]["logit_scale"]
    assert scale != pytest.approx(12.0, abs=1e-2)
    loaded = PeftModel.from_pretrained(adapted(), tmp_path / "adapter")
    trained = trainer.model(**tiny_batch())
    torch.testing.assert_close(loaded(**tiny_batch()).logit_scale, trained.logit_scale)
    assert trained.logit_scale.item() != pytest.approx(12.0, abs=1e-2)


def test_settings_that_do_not_fit_the_trainer_are_refused_before_training(tmp_path):
    for settings, own, key in (
        ({"mini_batch_tokens": 8}, {"log_gradient_norms": True}, "training.log_gradient_norms.cached"),
        ({"teacher": 3, "distillation_weight": 1.0}, {}, "contrastive.exit"),
        (
            {"teacher": "next_deeper", "distillation_weight": 1.0},
            {"rotate_shallow_exits": True},
            "contrastive.rotation",
        ),
        ({"dimensions": [17]}, {}, "contrastive.dimensions"),
    ):
        with raises(key):
            trainer_of(tiny_model(), tmp_path, ContrastiveSettings(**settings), **own)


def test_exits_with_sizes_of_their_own_may_be_trained_in_turn(tmp_path):
    settings = ContrastiveSettings(dimensions={1: [4], 4: [8, 16]}, mini_batch_tokens=16)
    trainer = trainer_of(tiny_model(), tmp_path, settings, rotate_shallow_exits=True)
    trainer.train()
    assert "clip_loss_exit_1" in trainer.state.log_history[0]
    assert "clip_loss_exit_2" in trainer.state.log_history[1]


def test_a_loss_that_is_not_finite_stops_training_and_leaves_its_batch(tmp_path):
    model = tiny_model()
    trainer = trainer_of(model, tmp_path / "run", ContrastiveSettings(mini_batch_tokens=16))
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
    message = str(error.value)
    path = tmp_path / "run" / "non_finite_loss_step_2_rank_0.safetensors"
    assert message.startswith("The loss of step 2 is not finite (exit 1: ")
    assert "exit 2: nan" in message
    assert message.endswith(f"its batch is in {path}.")
    written = load_file(path)
    assert set(written) == {f"{side}.{name}" for side in collate([0]) for name in ("input_ids", "attention_mask")}
    assert torch.equal(written["query.input_ids"], batches[1]["query"]["input_ids"])
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["step"] == 2
    assert report["losses"]["2"] == "nan"
    assert isinstance(report["losses"]["1"], float)
    assert trainer.state.global_step == 1


def test_any_objective_is_stopped(tmp_path):
    batch = tiny_batch() | {"labels": tiny_batch()["input_ids"], "icc_labels": torch.tensor([0, 1, 1])}

    class Infinite(InContextObjective):
        def __call__(self, model, batch, exits):
            output = super().__call__(model, batch, exits)
            return ObjectiveOutput(output.losses / 0.0, output.metrics)

    trainer = trainer_of(tiny_model(ModularStarEncoderForPreTraining), tmp_path, None, Infinite())
    with raises("training.loss.not_finite", "exit 1: inf"):
        trainer.compute_loss(trainer.model.train(), {**batch, "kind": "in context"})
    report = json.loads((tmp_path / "non_finite_loss_step_1_rank_0.json").read_text())
    assert report["other_values"] == {"kind": "in context"}


def test_every_option_trains_through_the_trainer(tmp_path):
    model = tiny_model(logit_scale_init_value=10.0)
    trainer = trainer_of(model, tmp_path, every_option(mini_batch_tokens=20), max_steps=1)
    trainer.data_collator = lambda indices: every_side()
    trainer.train()
    log = trainer.state.log_history[0]
    assert {"masked_negatives", "logit_scale", "distillation_loss_exit_4", "clip_accuracy_smallest_exit_1"} <= set(log)


@pytest.mark.parametrize(("margin", "warned"), [(1.9, True), (-1.9, False)])
def test_a_guide_that_masks_many_negatives_is_warned_about(tmp_path, monkeypatch, margin, warned):
    warnings = []
    monkeypatch.setattr("modular_star_encoder.training.trainer.logger.warning_once", warnings.append)
    settings = ContrastiveSettings(false_negative_margin=margin)
    trainer_of(tiny_model(), tmp_path, settings, max_steps=1).train()
    assert [text.startswith("The deepest exit takes") for text in warnings] == [True] * warned
