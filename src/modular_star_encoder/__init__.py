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
    from modular_star_encoder.modeling import (
        ModularStarEncoderConfig,
        ModularStarEncoderForPreTraining,
        ModularStarEncoderForRetrieval,
        ModularStarEncoderForSequenceClassification,
        ModularStarEncoderModel,
    )

_MODULE_OF = {
    "ModularStarEncoderConfig": "modeling",
    "ModularStarEncoderForPreTraining": "modeling",
    "ModularStarEncoderForRetrieval": "modeling",
    "ModularStarEncoderForSequenceClassification": "modeling",
    "ModularStarEncoderModel": "modeling",
}

__all__ = [
    "ModularStarEncoderConfig",
    "ModularStarEncoderForPreTraining",
    "ModularStarEncoderForRetrieval",
    "ModularStarEncoderForSequenceClassification",
    "ModularStarEncoderModel",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The first module of the Auto classes; the others are importable when it has run.
_AUTO_CLASSES = "transformers.models.auto.configuration_auto"


class _RegisterWithAutoClasses(MetaPathFinder, Loader):
    """Import our model, which registers itself, right after transformers' Auto classes are first imported."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        import_module(f"{__name__}.modeling")


if _AUTO_CLASSES in sys.modules:
    import_module(f"{__name__}.modeling")
else:
    sys.meta_path.insert(0, _RegisterWithAutoClasses())
