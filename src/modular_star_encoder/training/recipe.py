"""Recipes: the YAML files in hub_configs that say how a model is trained."""

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from modular_star_encoder.data.settings import build_settings
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.training.stages import Stage


@dataclass(frozen=True)
class Recipe:
    """How a small model is trained end to end.

    Args:
        vocab_size: entries of the tokenizer.
        max_query_tokens, max_document_tokens: longest description and code, prompt and special tokens included.
        pretraining, finetuning: the two stages.
        max_functions: train on so many functions at most, drawn at random; on all if None.
        attn_implementation: attention used in training.
        seed: of everything that is drawn.
    """

    vocab_size: int
    max_query_tokens: int
    max_document_tokens: int
    pretraining: Stage
    finetuning: Stage
    max_functions: int | None = None
    attn_implementation: str = "sdpa"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_functions is not None and self.max_functions < 1:
            raise ValueError(f"max_functions must be at least 1, not {self.max_functions}.")


def hub_config_folder(name: str) -> Path:
    """The folder of one of our configurations, such as `"quickstart"`.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    root = Path(str(files("modular_star_encoder.hub_configs")))
    names = sorted(path.parent.name for path in root.glob("*/config.json"))
    if name not in names:
        raise ValueError(f"There is no configuration {name!r}; there are {', '.join(names)}.")
    return root / name


def load_config(name: str) -> ModularStarEncoderConfig:
    """The model configuration of `hub_configs/{name}`."""
    return ModularStarEncoderConfig.from_pretrained(hub_config_folder(name))


def load_recipe(path: str | os.PathLike) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError: the file is not a mapping, or has unknown or missing keys, which the message names.
    """
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    stages = {
        name: build_settings(Stage, (content or {}).get(name), f"{path}: {name}")
        for name in ("pretraining", "finetuning")
    }
    return build_settings(Recipe, {**content, **stages}, str(path))
