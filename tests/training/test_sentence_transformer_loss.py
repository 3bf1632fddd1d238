import json

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderModel
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.exit_losses import exit_weights
from modular_star_encoder.objectives.sentence_transformer_loss import MultiExitContrastiveLoss
from tests.errors import raises
from tests.objectives.contrastive_batches import (
    assert_same_gradients,
    every_option,
    every_side,
    gradients,
    with_dropout,
)
from tests.tiny import EXIT_LAYERS, tiny_model, tiny_tokenizer

PAIRS = (("query", "document", "negative_1"),)
LINES = [f"add {i} and {i * i % 7}" for i in range(24)], [f"def f{i}(x):\n    return x + {i}" for i in range(24)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = with_dropout(0.0, logit_scale_init_value=12.0)
    return save_retrieval_checkpoint(model, tiny_tokenizer(), tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def model(checkpoint):
    return SentenceTransformer(str(checkpoint), device="cpu").train()


def columns():
    sides = every_side()
    return [sides[side] | {"modality": "text"} for side in ("query", "document", "negative")]


@pytest.mark.parametrize("tokens", [None, 13])
def test_it_is_the_objective_of_our_trainer_in_parts_that_add_up(model, tokens):
    options = {"mini_batch_tokens": tokens}
    sides = dict(zip(PAIRS[0], (every_side()[side] for side in ("query", "document", "negative")), strict=True))
    output = ContrastiveObjective(every_option(pairs=PAIRS))(model[0].auto_model, sides, EXIT_LAYERS)
    expected_losses = output.losses * exit_weights("linear", EXIT_LAYERS, 4)
    expected_losses.sum().backward()
    expected = gradients(model[0].auto_model)
    model.zero_grad()
    settings = every_option(pairs=ContrastiveSettings().pairs, **options)
    parts = MultiExitContrastiveLoss(model, settings, weights="linear")(columns())
    names = ("clip", "distillation", "alignment")
    assert list(parts) == [f"{name}_exit_{exit_layer}" for name in names for exit_layer in EXIT_LAYERS]
    for place, exit_layer in enumerate(EXIT_LAYERS):
        total = sum(parts[f"{name}_exit_{exit_layer}"] for name in names)
        torch.testing.assert_close(total, expected_losses[place], rtol=1e-5, atol=1e-6)
    sum(parts.values()).backward()
    assert "logit_scale.log_scale" in expected
    assert_same_gradients(gradients(model[0].auto_model), expected, relative=1e-5)


def test_it_trains_a_model_that_pools_before_its_heads_as_mose_code_does(tmp_path):
    shape = {"projection_order": "pool_then_project", "projection_head": "linear", "token_weights": True}
    folder = save_retrieval_checkpoint(with_dropout(0.0, **shape), tiny_tokenizer(), tmp_path / "model")
    model = SentenceTransformer(str(folder), device="cpu").train()
    sides = {side: every_side()[side] for side in ("query", "document")}
    expected = ContrastiveObjective()(model[0].auto_model, sides, EXIT_LAYERS).losses
    parts = MultiExitContrastiveLoss(model, weights="uniform")(columns()[:2])
    torch.testing.assert_close(torch.stack(list(parts.values())), expected)


def test_the_model_is_left_as_it_was(model):
    plain = model.encode(["add two numbers"], output_value=None, show_progress_bar=False)
    MultiExitContrastiveLoss(model)(columns()[:2])
    again = model.encode(["add two numbers"], output_value=None, show_progress_bar=False)
    assert plain[0].keys() == again[0].keys()
    assert "forward" not in vars(model[0]) | vars(model[0].auto_model)
    assert not any(module._forward_hooks for module in model.modules())


def train(model, folder, steps, resume=None):
    loss = MultiExitContrastiveLoss(model, ContrastiveSettings(mini_batch_tokens=40))
    settings = {"max_steps": steps, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    settings |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 8}
    settings |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    arguments = SentenceTransformerTrainingArguments(output_dir=str(folder), **settings)
    rows = Dataset.from_dict(dict(zip(("anchor", "positive"), LINES, strict=True)))
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, loss=loss)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_their_trainer_logs_every_exit_and_resumes_with_the_learned_scale(checkpoint, tmp_path):
    straight = train(SentenceTransformer(str(checkpoint), device="cpu"), tmp_path / "straight", 4)
    straight.evaluate()
    *logs, evaluation = [log for log in straight.state.log_history if "loss" in log or "eval_loss" in log]
    assert len(logs) == 4
    for prefix, log in [*(("", log) for log in logs), ("eval_", evaluation)]:
        parts = [log[f"{prefix}clip_exit_{exit_layer}"] for exit_layer in EXIT_LAYERS]
        assert log[f"{prefix}loss"] == pytest.approx(sum(parts), abs=2e-3)
    untrained, half = SentenceTransformer(str(checkpoint), device="cpu"), str(tmp_path / "straight" / "checkpoint-2")
    resumed = train(untrained, tmp_path / "resumed", 4, resume=half)
    expected, found = (trainer.model[0].auto_model.state_dict() for trainer in (straight, resumed))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    scale = expected["logit_scale.log_scale"]
    straight.model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(again[0].auto_model.logit_scale.log_scale, scale)
    assert scale.exp().item() != pytest.approx(12.0, abs=1e-3)


def test_its_settings_can_be_written_into_a_model_card(model):
    settings = ContrastiveSettings(dimensions=[8, 16], teacher="ensemble", distillation_weight=1.0)
    found = MultiExitContrastiveLoss(model, settings, weights=[1, 2, 3]).get_config_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["exit_layers"] == list(EXIT_LAYERS)
    assert found["weights"] == [1, 2, 3]
    assert found["teacher"] == "ensemble"
    assert "10.1609/aaai.v40i37.40348" in MultiExitContrastiveLoss(model).citation


def test_what_does_not_fit_is_refused(model, checkpoint, tmp_path):
    with raises("contrastive.columns"):
        MultiExitContrastiveLoss(model)(columns()[:1])
    for other in ("model", None, model[0].auto_model, torch.nn.Sequential()):
        with raises("contrastive.model", type(other).__name__):
            MultiExitContrastiveLoss(other)
    with raises("settings.value", "ContrastiveSettings", "'x'"):
        MultiExitContrastiveLoss(model, "x")
    with raises("contrastive.pairs"):
        MultiExitContrastiveLoss(model, ContrastiveSettings(pairs=PAIRS))
    with pytest.raises(ValueError, match=r"3 .* 1, 2, 4"):
        MultiExitContrastiveLoss(model, exit_layers=[3])
    with raises("contrastive.dimensions", 16):
        MultiExitContrastiveLoss(model, ContrastiveSettings(dimensions=[32]))
    with pytest.raises(RuntimeError, match="MultiExitContrastiveLoss"):
        AdaptiveLayerLoss(model, MultipleNegativesRankingLoss(model))(columns()[:2], None)
    model[0].auto_model(**every_side()["query"], output_hidden_states=True)
    model.append(Dense(16, 16))
    with raises("contrastive.modules", "Dense"):
        MultiExitContrastiveLoss(model)
    tiny_model(ModularStarEncoderModel).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    trunk = Transformer(str(tmp_path))
    with raises("contrastive.model", "ModularStarEncoderModel"):
        MultiExitContrastiveLoss(SentenceTransformer(modules=[trunk, Pooling(32)], device="cpu"))
