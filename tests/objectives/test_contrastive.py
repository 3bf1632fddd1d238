"""The symmetric CLIP loss."""

import math

import pytest
import torch

from modular_star_encoder.objectives import ContrastiveObjective, clip_losses
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model


def stacks(exits=2, rows=4, size=8):
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, exits, rows, size, generator=generator)
    return torch.nn.functional.normalize(draw, dim=-1).unbind(0)


def literal_clip_loss(queries, documents, scale):
    """The loss written out with Python floats."""
    scores = [[scale * sum(a * b for a, b in zip(q, d, strict=True)) for d in documents] for q in queries]
    size = len(scores)
    by_query = sum(math.log(sum(math.exp(s) for s in row)) - row[i] for i, row in enumerate(scores)) / size
    columns = list(zip(*scores, strict=True))
    by_document = sum(math.log(sum(math.exp(s) for s in col)) - col[i] for i, col in enumerate(columns)) / size
    return (by_query + by_document) / 2


def test_it_equals_the_formula_written_out_at_every_exit():
    queries, documents = stacks()
    losses, _ = clip_losses(queries, documents, 10.0)
    expected = [literal_clip_loss(q.tolist(), d.tolist(), 10.0) for q, d in zip(queries, documents, strict=True)]
    torch.testing.assert_close(losses, torch.tensor(expected))
    assert expected[0] != pytest.approx(expected[1], abs=1e-2)


def test_it_is_symmetric_and_both_directions_count():
    queries, documents = stacks()
    torch.testing.assert_close(clip_losses(queries, documents, 10.0)[0], clip_losses(documents, queries, 10.0)[0])
    one_direction = torch.nn.functional.cross_entropy(10 * queries[0] @ documents[0].T, torch.arange(4))
    assert abs(clip_losses(queries, documents, 10.0)[0][0] - one_direction) > 1e-2


def test_accuracy_counts_queries_nearest_to_their_own_document():
    queries = torch.eye(4)[None]
    documents = torch.eye(4)[[0, 1, 3, 2]][None]
    assert clip_losses(queries, documents, 10.0)[1].tolist() == [0.5]


def test_the_objective_embeds_both_sides_at_every_exit():
    model = tiny_model().eval()
    batch = {"query": tiny_batch(lengths=(5, 3, 4)), "document": tiny_batch()}
    output = ContrastiveObjective(logit_scale=3.0)(model, batch, EXIT_LAYERS)
    queries, documents = (model(**batch[side], exit_layers=EXIT_LAYERS).exit_embeddings for side in batch)
    torch.testing.assert_close(output.losses, clip_losses(queries, documents, 3.0)[0])
    assert output.losses.requires_grad
    assert not output.metrics["clip_loss"].requires_grad


@pytest.mark.parametrize("scale", [0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match="must be positive"):
        ContrastiveObjective(scale)
