import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.distillation import DistillationObjective, DistillationSettings
from tests.errors import raises
from tests.objectives.contrastive_batches import assert_same_gradients, gradients, taught_batch, with_dropout
from tests.tiny import PROJECTION_SIZE, tiny_model

EXITS = (0, 1, 4)
WEIGHTS = DistillationSettings(
    cosine_weight=2.0, relational_weight=0.3, relational_temperature=2.0, contrastive_weight=0.7
)


def new_model(**changes):
    return with_dropout(0.0, exit_layers=EXITS, **changes)


def in_numpy(embeddings, teacher, scale=20.0, temperature=2.0):
    """Cosine, relational and contrastive loss of one exit, and the share of negatives that are masked."""
    unit = {side: vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for side, vectors in teacher.items()}
    cosine = np.mean(np.concatenate([1 - (embeddings[side] * unit[side]).sum(axis=1) for side in unit]))
    found, wanted = embeddings["query"] @ embeddings["document"].T, unit["query"] @ unit["document"].T
    relational = contrastive = masked = 0.0
    for own, target in ((found, wanted), (found.T, wanted.T)):
        p, q = (softmax(scale / temperature * one, axis=1) for one in (target, own))
        relational += entropy(p, q, axis=1).mean() * temperature**2 / 2
        above = target > np.diag(target)[:, None]
        probabilities = softmax(np.where(above, -1e9, scale * own), axis=1)
        contrastive += -np.log(np.diag(probabilities)).mean() / 2
        masked += above.sum() / (len(own) * (len(own) - 1)) / 2
    return {"cosine": cosine, "relational": relational, "clip": contrastive}, masked


def test_every_exits_terms_are_the_formulas_and_the_teacher_masks_the_negatives():
    model, batch = new_model().double(), taught_batch()
    output = DistillationObjective(WEIGHTS)(model, batch, EXITS)
    teacher = {side: own.pop("teacher").double().numpy() for side, own in batch.items()}
    weights = {"cosine": 2.0, "relational": 0.3, "clip": 0.7}
    for place, exit_layer in enumerate(EXITS):
        embedded = {side: model(**own, exit_layer=exit_layer).sentence_embedding for side, own in batch.items()}
        expected, masked = in_numpy({side: one.detach().numpy() for side, one in embedded.items()}, teacher)
        for name, value in expected.items():
            assert output.terms[name][place].item() == pytest.approx(weights[name] * value, rel=1e-6), name
            assert output.metrics[f"{name}_loss"][place].item() == pytest.approx(value, rel=1e-6)
    assert torch.equal(output.losses, sum(output.terms.values()))
    assert 0.2 < masked < 0.8
    assert output.metrics["masked_by_teacher"].item() == pytest.approx(masked, rel=1e-6)


def test_each_exits_loss_trains_its_own_head_and_the_layers_up_to_it():
    for place, exit_layer in enumerate(EXITS):
        model = new_model()
        DistillationObjective(WEIGHTS)(model, taught_batch(), EXITS).losses[place].backward()
        moved = {name for name, gradient in gradients(model).items() if gradient.any()}
        assert {name.split(".")[1] for name in moved if name.startswith("projection_heads")} == {str(exit_layer)}
        layers = {int(name.split(".")[2]) for name in moved if name.startswith("model.layers")}
        assert layers == set(range(exit_layer))
        assert "model.embed_tokens.weight" in moved


@pytest.mark.parametrize(("tokens", "unpad"), [(1, False), (20, False), (20, True), (10_000, False)])
def test_mini_batches_give_what_whole_sides_give_with_unpaired_texts_and_a_learned_scale(tokens, unpad):
    model, batch, found = new_model(logit_scale_init_value=12.0, unpad_inputs=unpad), taught_batch(), []
    for size in (None, tokens):
        model.zero_grad(set_to_none=True)
        contrastive = ContrastiveSettings(mini_batch_tokens=size, false_negative_margin=0.0)
        objective = DistillationObjective(WEIGHTS, contrastive)
        assert objective.caches_gradients is (size is not None)
        losses = objective(model, batch, EXITS).losses
        (losses * torch.tensor([0.3, 0.5, 1.1])).sum().backward()
        found.append((losses.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert "logit_scale.log_scale" in found[0][1]
    assert_same_gradients(found[1][1], found[0][1], relative=1e-5)


def test_without_pairs_any_sides_are_taught_by_their_vectors_alone():
    batch, model = {"text": taught_batch()["text"]}, tiny_model(exit_layers=EXITS).eval()
    output = DistillationObjective(DistillationSettings(contrastive_weight=0))(model, batch, EXITS)
    teacher = batch["text"].pop("teacher").float()
    cosines = torch.nn.functional.cosine_similarity(model(**batch["text"], exit_layer=0).sentence_embedding, teacher)
    assert output.losses[0].item() == pytest.approx(1 - cosines.mean().item(), rel=1e-5)


def test_what_does_not_fit_is_refused():
    batch, objective = taught_batch(), DistillationObjective()
    with raises("distillation.contrastive", "alignment_weight"):
        DistillationObjective(contrastive=ContrastiveSettings(alignment_weight=1.0))
    with raises("settings.value", "cosine_weight"):
        DistillationSettings(cosine_weight=0, contrastive_weight=0)
    for settings, of in (("x", "Distillation"), ([], "Distillation"), (None, "Contrastive")):
        with raises("settings.value", f"{of}Settings must be a mapping"):
            DistillationObjective(settings, None if settings is not None else "x")
    with raises("contrastive.sides", "query"):
        objective(new_model(), {"query": batch["query"]}, EXITS)
    for teacher, shown in ((None, "no `teacher`"), (torch.ones(6, 8), "(6, 8)"), ([1], "()")):
        wrong = batch | {"query": batch["query"] | {"teacher": teacher}}
        with raises("distillation.teacher", "'query'", shown, f"(6, {PROJECTION_SIZE})"):
            objective(new_model(), wrong, EXITS)
