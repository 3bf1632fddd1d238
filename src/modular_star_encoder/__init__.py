"""Multi-exit code encoders for Hugging Face Transformers.

Importing this package is quick and loads no torch: the names below are imported when they are first used. It also
registers ModularStarEncoder with `AutoConfig`, `AutoModel`, `AutoModelForPreTraining`, `AutoModelForMaskedLM` and
`AutoModelForSequenceClassification`, so that checkpoints load with our classes and run no code from the Hub.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from modular_star_encoder.evaluation.multi_exit_evaluator import MultiExitEvaluator
    from modular_star_encoder.hub.publishing import publish
    from modular_star_encoder.inference import shipped_model
    from modular_star_encoder.inference.checkpoints import slice_checkpoint
    from modular_star_encoder.inference.encode import encode_exits
    from modular_star_encoder.inference.exit_profile import load_at_budget, select_exit
    from modular_star_encoder.inference.onnx_export import export_onnx
    from modular_star_encoder.inference.static_export import export_static
    from modular_star_encoder.modeling import (
        ModularStarEncoderConfig,
        ModularStarEncoderForMaskedLM,
        ModularStarEncoderForPreTraining,
        ModularStarEncoderForRetrieval,
        ModularStarEncoderForSequenceClassification,
        ModularStarEncoderModel,
    )
    from modular_star_encoder.objectives.contrastive import ContrastiveObjective
    from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
    from modular_star_encoder.objectives.distillation import DistillationObjective, DistillationSettings
    from modular_star_encoder.objectives.sentence_transformer_loss import MultiExitContrastiveLoss
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.training.arguments import MultiExitTrainingArguments
    from modular_star_encoder.training.trainer import MultiExitTrainer

_MODULE_OF = {
    "CodeIndex": "search.index",
    "ContrastiveObjective": "objectives.contrastive",
    "ContrastiveSettings": "objectives.contrastive_settings",
    "DistillationObjective": "objectives.distillation",
    "DistillationSettings": "objectives.distillation",
    "ModularStarEncoderConfig": "modeling",
    "ModularStarEncoderForMaskedLM": "modeling",
    "ModularStarEncoderForPreTraining": "modeling",
    "ModularStarEncoderForRetrieval": "modeling",
    "ModularStarEncoderForSequenceClassification": "modeling",
    "ModularStarEncoderModel": "modeling",
    "MultiExitContrastiveLoss": "objectives.sentence_transformer_loss",
    "MultiExitEvaluator": "evaluation.multi_exit_evaluator",
    "MultiExitTrainer": "training.trainer",
    "MultiExitTrainingArguments": "training.arguments",
    "encode_exits": "inference.encode",
    "export_onnx": "inference.onnx_export",
    "export_static": "inference.static_export",
    "load_at_budget": "inference.exit_profile",
    "publish": "hub.publishing",
    "select_exit": "inference.exit_profile",
    "shipped_model": "inference",
    "slice_checkpoint": "inference.checkpoints",
}

__all__ = [
    "CodeIndex",
    "ContrastiveObjective",
    "ContrastiveSettings",
    "DistillationObjective",
    "DistillationSettings",
    "ModularStarEncoderConfig",
    "ModularStarEncoderForMaskedLM",
    "ModularStarEncoderForPreTraining",
    "ModularStarEncoderForRetrieval",
    "ModularStarEncoderForSequenceClassification",
    "ModularStarEncoderModel",
    "MultiExitContrastiveLoss",
    "MultiExitEvaluator",
    "MultiExitTrainer",
    "MultiExitTrainingArguments",
    "encode_exits",
    "export_onnx",
    "export_static",
    "load_at_budget",
    "publish",
    "select_exit",
    "shipped_model",
    "slice_checkpoint",
]


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
    """The configurations registered with `AutoConfig`; looking up ours imports it and so registers all our classes."""

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


class _RegisterWithAutoConfig(MetaPathFinder, Loader):
    """Adds our model type to `AutoConfig` right after transformers defines it, without importing a model."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(module)


def _register(module: ModuleType) -> None:
    """Add our model type to the mapping that `AutoConfig` and every other Auto class reads first."""
    registered = module.CONFIG_MAPPING._extra_content
    if _MODEL_TYPE not in registered:
        module.CONFIG_MAPPING._extra_content = _RegisteredWhenUsed(registered | {_MODEL_TYPE: None})


if _AUTO_CONFIG in sys.modules:
    _register(sys.modules[_AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _RegisterWithAutoConfig())
