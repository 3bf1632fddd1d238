"""Multi-exit code encoders for Hugging Face Transformers.

Each public name is imported at its first use, so importing this package does not import torch. The import registers
ModularStarEncoder with `AutoConfig`, `AutoModel`, `AutoModelForPreTraining`, `AutoModelForMaskedLM` and
`AutoModelForSequenceClassification`, so that checkpoints load with this package's classes and run no code from the Hub.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:  # `X as X` exports a name to type checkers, because they cannot read a computed `__all__`
    from modular_star_encoder.evaluation.multi_exit_evaluator import MultiExitEvaluator as MultiExitEvaluator
    from modular_star_encoder.hub.onnx_export import export_onnx as export_onnx
    from modular_star_encoder.hub.publishing import publish as publish
    from modular_star_encoder.inference import shipped_model as shipped_model
    from modular_star_encoder.inference.checkpoints import slice_checkpoint as slice_checkpoint
    from modular_star_encoder.inference.encode import encode_exits as encode_exits
    from modular_star_encoder.inference.exit_profile import ExitProfile as ExitProfile
    from modular_star_encoder.inference.exit_profile import load_at_budget as load_at_budget
    from modular_star_encoder.inference.exit_profile import select_exit as select_exit
    from modular_star_encoder.inference.exit_zero import export_static as export_static
    from modular_star_encoder.modeling import ModularStarEncoderConfig as ModularStarEncoderConfig
    from modular_star_encoder.modeling import ModularStarEncoderForMaskedLM as ModularStarEncoderForMaskedLM
    from modular_star_encoder.modeling import ModularStarEncoderForPreTraining as ModularStarEncoderForPreTraining
    from modular_star_encoder.modeling import ModularStarEncoderForRetrieval as ModularStarEncoderForRetrieval
    from modular_star_encoder.modeling import (
        ModularStarEncoderForSequenceClassification as ModularStarEncoderForSequenceClassification,
    )
    from modular_star_encoder.modeling import ModularStarEncoderModel as ModularStarEncoderModel
    from modular_star_encoder.objectives.contrastive import ContrastiveObjective as ContrastiveObjective
    from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings as ContrastiveSettings
    from modular_star_encoder.objectives.distillation import DistillationObjective as DistillationObjective
    from modular_star_encoder.objectives.distillation import DistillationSettings as DistillationSettings
    from modular_star_encoder.objectives.sentence_transformer_loss import (
        MultiExitContrastiveLoss as MultiExitContrastiveLoss,
    )
    from modular_star_encoder.search.index import CodeIndex as CodeIndex
    from modular_star_encoder.training.arguments import MultiExitTrainingArguments as MultiExitTrainingArguments
    from modular_star_encoder.training.trainer import MultiExitTrainer as MultiExitTrainer

_NAMES_OF = {
    "evaluation.multi_exit_evaluator": ["MultiExitEvaluator"],
    "hub.publishing": ["publish"],
    "inference": ["shipped_model"],
    "inference.checkpoints": ["slice_checkpoint"],
    "inference.encode": ["encode_exits"],
    "inference.exit_profile": ["ExitProfile", "load_at_budget", "select_exit"],
    "hub.onnx_export": ["export_onnx"],
    "inference.exit_zero": ["export_static"],
    "modeling": [
        "ModularStarEncoderConfig",
        "ModularStarEncoderForMaskedLM",
        "ModularStarEncoderForPreTraining",
        "ModularStarEncoderForRetrieval",
        "ModularStarEncoderForSequenceClassification",
        "ModularStarEncoderModel",
    ],
    "objectives.contrastive": ["ContrastiveObjective"],
    "objectives.contrastive_settings": ["ContrastiveSettings"],
    "objectives.distillation": ["DistillationObjective", "DistillationSettings"],
    "objectives.sentence_transformer_loss": ["MultiExitContrastiveLoss"],
    "search.index": ["CodeIndex"],
    "training.arguments": ["MultiExitTrainingArguments"],
    "training.trainer": ["MultiExitTrainer"],
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modular_star_encoder.utils.errors import naming_extra

    with naming_extra():
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_MODEL_TYPE = "ModularStarEncoder"


class _RegisteredWhenUsed(dict):
    """`AutoConfig`'s dict {model type: configuration class}; imports ModularStarEncoder's class when it is read."""

    def __getitem__(self, key: str) -> Any:
        if key == _MODEL_TYPE:
            self.load()
        return super().__getitem__(key)

    def values(self) -> Any:
        self.load()
        return super().values()

    def items(self) -> Any:
        self.load()
        return super().items()

    def load(self) -> None:
        if dict.__getitem__(self, _MODEL_TYPE) is None:
            import_module(f"{__name__}.modeling")


class _RegisterWithAutoConfig(MetaPathFinder):
    """An import hook: adds ModularStarEncoder to `AutoConfig` when `AutoConfig` is imported, and imports no model."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            loader.exec_module = exec_module
        return spec


def _register(module: ModuleType) -> None:
    registered = module.CONFIG_MAPPING._extra_content
    if _MODEL_TYPE not in registered:
        module.CONFIG_MAPPING._extra_content = _RegisteredWhenUsed(registered | {_MODEL_TYPE: None})


if _AUTO_CONFIG in sys.modules:
    _register(sys.modules[_AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _RegisterWithAutoConfig())
