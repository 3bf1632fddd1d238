"""Training: the `Trainer` subclass and what belongs to it."""

from modular_star_encoder.training.initialization import start_from_spellings, start_from_unigrams
from modular_star_encoder.training.non_finite import NonFiniteLossError
from modular_star_encoder.training.recipe import Recipe, hub_config_folder, load_config, load_recipe
from modular_star_encoder.training.schedule import MultiStepSchedule
from modular_star_encoder.training.sentence_transformer_loss import MultiExitContrastiveLoss
from modular_star_encoder.training.stages import Stage, bf16_is_faster, run_stage
from modular_star_encoder.training.trainer import MultiExitTrainer, last_checkpoint

__all__ = [
    "MultiExitContrastiveLoss",
    "MultiExitTrainer",
    "MultiStepSchedule",
    "NonFiniteLossError",
    "Recipe",
    "Stage",
    "bf16_is_faster",
    "hub_config_folder",
    "last_checkpoint",
    "load_config",
    "load_recipe",
    "run_stage",
    "start_from_spellings",
    "start_from_unigrams",
]
