"""From the exits' outputs to one loss per exit."""

from modular_star_encoder.objectives.contrastive import ContrastiveObjective, clip_losses
from modular_star_encoder.objectives.exit_weights import exit_weights
from modular_star_encoder.objectives.in_context import InContextObjective
from modular_star_encoder.objectives.outputs import Objective, ObjectiveOutput

__all__ = [
    "ContrastiveObjective",
    "InContextObjective",
    "Objective",
    "ObjectiveOutput",
    "clip_losses",
    "exit_weights",
]
