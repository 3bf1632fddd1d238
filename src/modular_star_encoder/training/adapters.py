"""Low-rank adapters (LoRA, arXiv 2106.09685) on the trunk, with the heads trained in full and saved with them."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modular_star_encoder.modeling import ModularStarEncoderPreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")
DEFAULTS = {"r": 16, "lora_alpha": 32, "target_modules": list(LINEAR_LAYERS)}


def add_adapters(model: ModularStarEncoderPreTrainedModel, settings: Mapping[str, Any]) -> "PeftModel":
    """Freeze the trunk and give its linear layers adapters; heads stay trainable and are saved with the adapters.

    Args:
        model: a retrieval or classification model.
        settings: of `peft.LoraConfig`, in place of rank 16, alpha 32 and all linear layers of the trunk.

    Raises:
        ImportError: peft is missing.
        ValueError: a setting that `LoraConfig` does not have, or layers that the model does not have.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'modular-star-encoder[peft]'.") from error
    try:
        config = LoraConfig(**{"modules_to_save": heads_of(model), **DEFAULTS, **settings})
    except TypeError as error:
        raise ValueError(f"lora: {error}.") from error
    return get_peft_model(model, config)


def heads_of(model: ModularStarEncoderPreTrainedModel) -> list[str]:
    """Names of the modules beside the trunk; of several projection heads each, for peft takes no `ModuleDict`."""
    names = []
    for name, module in model.named_children():
        if name == "projection_heads":
            names += [f"{name}.{exit_layer}" for exit_layer in module]
        elif module is not model.base_model and any(True for _ in module.parameters()):
            names.append(name)
    return names


def merged_model(
    model: ModularStarEncoderPreTrainedModel, adapter: str | os.PathLike
) -> ModularStarEncoderPreTrainedModel:
    """The model with the adapters of a folder, and the heads saved with them, merged into its weights.

    Args:
        model: what the adapters were trained on; its heads are replaced.
        adapter: folder that a model of `add_adapters` was saved to.
    """
    from peft import PeftModel

    return PeftModel.from_pretrained(model, os.fspath(adapter)).merge_and_unload()
