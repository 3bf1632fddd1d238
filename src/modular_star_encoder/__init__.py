"""Multi-exit code encoders for Hugging Face Transformers.

Importing this package registers ModularStarEncoder with `AutoConfig`, `AutoModel`, `AutoModelForPreTraining`,
`AutoModelForMaskedLM` and `AutoModelForSequenceClassification`, so that checkpoints load with our classes and
without running code from the Hub.
"""

__version__ = "0.1.0.dev0"

from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderForSequenceClassification,
    ModularStarEncoderModel,
)

__all__ = [
    "ModularStarEncoderConfig",
    "ModularStarEncoderForPreTraining",
    "ModularStarEncoderForRetrieval",
    "ModularStarEncoderForSequenceClassification",
    "ModularStarEncoderModel",
]
