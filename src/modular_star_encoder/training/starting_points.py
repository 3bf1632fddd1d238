"""The model that a fine-tuning starts from, and its tokenizer."""

import copy
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.tokenizer import load_tokenizer, with_template
from modular_star_encoder.hub.slicing import keep_only_exit
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderPreTrainedModel
from modular_star_encoder.training.training_recipe import StartingRecipe, has_weights, model_folder

Model = TypeVar("Model", bound=ModularStarEncoderPreTrainedModel)


def starting_source(name: str) -> tuple[str | Path, bool]:
    """Where a model is, and whether it has weights; what is no folder is taken for a Hub id.

    Raises:
        ValueError: there is neither a folder of this name nor a configuration of ours, and it is no Hub id.
    """
    try:
        folder = model_folder(name)
    except ValueError as error:
        if "/" in name and not Path(name).expanduser().exists() and _is_hub_id(name):
            return name, True
        raise ValueError(
            f"{error} Nor is there a folder {name} with a config.json; pre-train first, or name a Hub id owner/name."
        ) from error
    return folder, has_weights(folder)


def starting_config(recipe: StartingRecipe) -> tuple[ModularStarEncoderConfig, bool]:
    """The configuration of the model that a recipe starts from, and whether there are weights.

    Raises:
        ValueError: the model has no such exit, or settings contradict each other.
        OSError: there is neither a folder nor a Hub repository of this name.
    """
    source, weights = starting_source(recipe.model)
    try:
        config = ModularStarEncoderConfig.from_pretrained(source, **{**recipe.config, "dtype": torch.float32})
        in_training = copy.deepcopy(config)
        in_training.unpad_inputs = recipe.unpad_inputs
        # Values given to `from_pretrained` are set after the configuration's own validation.
        in_training.validate()
    except StrictDataclassError as error:
        raise ValueError(f"{recipe.model} can't be started from: {' '.join(str(error).split())}") from error
    except OSError as error:
        if isinstance(source, Path):
            raise
        raise OSError(
            f"{source} is no folder with a config.json (pre-train first), and it can't be had from the Hub: "
            f"{' '.join(str(error).split())}"
        ) from error
    if recipe.exit_layer is not None:
        config = config.cut(recipe.exit_layer)
        config.exit_layers = [recipe.exit_layer]
    return config, weights


def starting_model(model_class: type[Model], recipe: StartingRecipe) -> tuple[Model, PreTrainedTokenizerFast]:
    """The model that a recipe starts from, in float32, and its tokenizer; heads that it lacks are drawn by the seed.

    A tokenizer without template, as the published one is, gets ours.

    Raises:
        ValueError: there is no tokenizer, it has more tokens than the model, or the model can't be had as asked for.
        OSError: there is neither a folder nor a Hub repository of this name.
    """
    source, weights = starting_source(recipe.model)
    if recipe.tokenizer is None and not weights:
        raise ValueError(
            f"The model {recipe.model} has no weights, and so no tokenizer of its own: name one as tokenizer."
        )
    tokenizer = with_template(load_tokenizer(recipe.tokenizer or source))
    torch.manual_seed(recipe.seed)
    if weights:
        cut = {} if recipe.exit_layer is None else {"exit_layer": recipe.exit_layer}
        model = model_class.from_pretrained(source, **{**recipe.config, **cut, "dtype": torch.float32})
        if recipe.exit_layer is not None:
            keep_only_exit(model, recipe.exit_layer)
    else:
        config, _ = starting_config(recipe)
        config.vocab_size = max(len(tokenizer), config.vocab_size)
        model = model_class(config)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, more than the model's {model.config.vocab_size}.")
    model.set_attn_implementation(recipe.attn_implementation)
    model.config.unpad_inputs = recipe.unpad_inputs
    return model, tokenizer


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
