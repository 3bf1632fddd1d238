"""The contrastive objective: a model and a batch."""

import pytest
import torch

from modular_star_encoder.objectives.contrastive import ContrastiveObjective, losses_from_embeddings
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from tests.errors import raises
from tests.objectives.contrastive_batches import every_option, every_side
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model


def test_both_sides_are_embedded_at_every_exit():
    model = tiny_model().eval()
    batch = {"query": tiny_batch(lengths=(5, 3, 4)), "document": tiny_batch()}
    settings = ContrastiveSettings(logit_scale=3.0)
    output = ContrastiveObjective(settings)(model, batch, EXIT_LAYERS)
    stacks = {side: model(**batch[side], exit_layers=EXIT_LAYERS).exit_embeddings for side in batch}
    torch.testing.assert_close(output.losses, losses_from_embeddings(stacks, EXIT_LAYERS, settings).losses)
    assert output.losses.requires_grad
    assert set(output.metrics) == {"clip_loss", "clip_accuracy"}
    assert not output.metrics["clip_loss"].requires_grad


def test_every_option_reports_its_term():
    model = tiny_model(logit_scale_init_value=7.0)
    output = ContrastiveObjective(every_option())(model, every_side(), EXIT_LAYERS)
    terms = {"clip_loss", "clip_accuracy", "clip_accuracy_smallest", "distillation_loss", "alignment_loss"}
    pairs = {"clip_accuracy_query_document", "clip_accuracy_document_translation"}
    assert set(output.metrics) == terms | pairs | {"masked_negatives", "logit_scale"}
    assert all(output.metrics[name].shape == (3,) for name in terms | pairs)
    assert output.metrics["logit_scale"].item() == pytest.approx(7.0)
    parts = output.metrics["clip_loss"] + 0.7 * output.metrics["distillation_loss"]
    torch.testing.assert_close(output.losses.detach(), parts + 0.5 * output.metrics["alignment_loss"])


def test_a_batch_with_other_sides_is_refused_before_it_is_embedded():
    with raises("contrastive.sides", "document, negative, query, translation"):
        ContrastiveObjective()(None, every_side(), EXIT_LAYERS)


def test_an_output_that_mixes_exits_and_texts_is_refused():
    class Halves(torch.nn.Module):
        def forward(self, **inputs):
            output = tiny_model()(**inputs)
            output.exit_embeddings = output.exit_embeddings.repeat(2, 1, 1)
            return output

    batch = {"query": tiny_batch(), "document": tiny_batch()}
    with raises("contrastive.data_parallel"):
        ContrastiveObjective()(Halves(), batch, EXIT_LAYERS)
