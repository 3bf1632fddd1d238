"""Batches, settings and models for the tests of the contrastive objective."""

import torch

from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from tests.tiny import NO_DROPOUT, PROJECTION_SIZE, tiny_batch, tiny_model

# Weights that are no powers of two, so that forgetting one shows.
WEIGHTS = torch.tensor([0.3, 0.5, 1.1])


def every_option(**changes):
    settings = {"pairs": (("query", "document", "negative"), ("document", "translation")), "teacher": "ensemble"}
    settings |= {"dimensions": {1: (4, 16), 2: (8,), 4: (4, 8, 16)}, "false_negative_margin": 0.02}
    settings |= {"distillation_weight": 0.7, "distillation_temperature": 2.0, "alignment_weight": 0.5}
    return ContrastiveSettings(**(settings | changes))


def texts(lengths, seed, side="right"):
    """Random texts of these lengths, padded on one side two columns beyond the longest."""
    return tiny_batch(side, lengths, seed, more=2)


def every_side():
    """Sides of `every_option`, six rows each, padded on the left and on the right."""
    return {
        "query": texts((3, 9, 2, 5, 4, 7), seed=1, side="left"),
        "document": texts((12, 5, 8, 3, 9, 6), seed=2),
        "negative": texts((4, 4, 10, 6, 2, 7), seed=3),
        "translation": texts((6, 11, 3, 8, 5, 5), seed=4, side="left"),
    }


def pair_batch():
    sides = every_side()
    return {"query": sides["query"], "document": sides["document"]}


def taught_batch():
    """Six pairs and six texts without a counterpart, with random vectors of a teacher, of any length."""
    sides = pair_batch() | {"text": texts((5, 3, 9, 2, 4, 6), seed=7)}
    generator = torch.Generator().manual_seed(3)
    return {
        side: own | {"teacher": torch.randn(6, PROJECTION_SIZE, generator=generator).half()}
        for side, own in sides.items()
    }


def with_dropout(rate, model_class=ModularStarEncoderForRetrieval, **changes):
    rates = dict.fromkeys(NO_DROPOUT, rate)
    return tiny_model(model_class, **rates, **changes).train()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found, expected, relative=1e-6):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= relative * gradient.norm() + 1e-9, name
    assert torch.stack([gradient.norm() for gradient in expected.values()]).norm() > 0.1
