"""From the exits' outputs to one loss per exit."""

from modular_star_encoder.objectives.classification import ClassificationObjective
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.contrastive_losses import ContrastiveTerms, losses_from_embeddings
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.exit_weights import exit_weights
from modular_star_encoder.objectives.in_context import InContextObjective
from modular_star_encoder.objectives.outputs import Objective, ObjectiveOutput

__all__ = [
    "ClassificationObjective",
    "ContrastiveObjective",
    "ContrastiveSettings",
    "ContrastiveTerms",
    "InContextObjective",
    "Objective",
    "ObjectiveOutput",
    "exit_weights",
    "losses_from_embeddings",
]
