"""Configuration and models of ModularStarEncoder. Importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from .configuration_modular_star_encoder import ModularStarEncoderConfig
from .modeling_modular_star_encoder import (
    ModularStarEncoderForMaskedLM,
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderForSequenceClassification,
    ModularStarEncoderModel,
    ModularStarEncoderPreTrainedModel,
)
from .published_checkpoints import read_published_layout

ModularStarEncoderPreTrainedModel._layout_readers.append(read_published_layout)

AutoConfig.register(ModularStarEncoderConfig.model_type, ModularStarEncoderConfig, exist_ok=True)
# `AutoModel` loads the class that `config.architectures` names; by default, the first of these two.
AutoModel.register(ModularStarEncoderConfig, (ModularStarEncoderModel, ModularStarEncoderForRetrieval), exist_ok=True)
AutoModelForPreTraining.register(ModularStarEncoderConfig, ModularStarEncoderForPreTraining, exist_ok=True)
AutoModelForMaskedLM.register(ModularStarEncoderConfig, ModularStarEncoderForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    ModularStarEncoderConfig, ModularStarEncoderForSequenceClassification, exist_ok=True
)

__all__ = [
    "ModularStarEncoderConfig",
    "ModularStarEncoderForMaskedLM",
    "ModularStarEncoderForPreTraining",
    "ModularStarEncoderForRetrieval",
    "ModularStarEncoderForSequenceClassification",
    "ModularStarEncoderModel",
    "ModularStarEncoderPreTrainedModel",
]
