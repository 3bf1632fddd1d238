"""The model that a fine-tuning starts from, and its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.hub.slicing import keep_only_exit
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderPreTrainedModel
from modular_star_encoder.training.training_recipe import has_weights, model_folder

Model = TypeVar("Model", bound=ModularStarEncoderPreTrainedModel)


def starting_config(
    name: str, settings: Mapping[str, Any], exit_layer: int | None = None
) -> tuple[ModularStarEncoderConfig, bool]:
    """The configuration of what a recipe's `model` names, and whether there are weights.

    Args:
        name: a folder of `hub_configs`, a folder with a config.json, or a Hub id.
        settings: fields of the configuration to change.
        exit_layer: cut at this exit and keep it alone.

    Raises:
        ValueError: the model has no such exit, or settings contradict each other.
        OSError: there is neither a folder nor a Hub repository of this name.
    """
    source, weights = _source(name)
    config = ModularStarEncoderConfig.from_pretrained(source, **{**settings, "dtype": torch.float32})
    if exit_layer is not None:
        config = config.cut(exit_layer)
        config.exit_layers = [exit_layer]
    return config, weights


def starting_model(
    model_class: type[Model],
    name: str,
    settings: Mapping[str, Any],
    *,
    seed: int,
    exit_layer: int | None = None,
    tokenizer: str | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[Model, PreTrainedTokenizerFast]:
    """A model in float32, heads that its checkpoint lacks drawn anew, and its tokenizer.

    Args:
        model_class: the class to train.
        name, settings, exit_layer: see `starting_config`.
        seed: of new weights.
        tokenizer: folder or Hub id, in place of the checkpoint's own.
        attn_implementation: attention to train with.

    Raises:
        ValueError: there is no tokenizer, or it has more tokens than the model.
    """
    source, weights = _source(name)
    if tokenizer is None and not weights:
        raise ValueError(f"The model {name} has no weights, and so no tokenizer of its own: name one as tokenizer.")
    loaded = load_tokenizer(tokenizer or source)
    torch.manual_seed(seed)
    if weights:
        cut = {} if exit_layer is None else {"exit_layer": exit_layer}
        model = model_class.from_pretrained(source, **{**settings, **cut, "dtype": torch.float32})
        if exit_layer is not None:
            keep_only_exit(model, exit_layer)
    else:
        config, _ = starting_config(name, settings, exit_layer)
        config.vocab_size = max(len(loaded), config.vocab_size)
        model = model_class(config)
    if len(loaded) > model.config.vocab_size:
        raise ValueError(f"The tokenizer has {len(loaded)} tokens, more than the model's {model.config.vocab_size}.")
    model.set_attn_implementation(attn_implementation)
    return model, loaded


def _source(name: str) -> tuple[str | Path, bool]:
    """Where a model is, and whether it has weights; what is no folder is taken for a Hub id."""
    try:
        folder = model_folder(name)
    except ValueError:
        if "/" not in name or Path(name).expanduser().exists():
            raise
        return name, True
    return folder, has_weights(folder)
