"""The kinds of fine-tuning, by the `task` of a recipe."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from modular_star_encoder.training.clone_detection import finetune_classifier
from modular_star_encoder.training.finetuning import finetune
from modular_star_encoder.training.recipes import TASKS, ClassificationRecipe, FinetuningRecipe, StartingRecipe
from modular_star_encoder.utils.settings import load_settings

_KINDS: dict[str, tuple[type[StartingRecipe], Callable[..., dict[str, Any]]]] = {
    "retrieval": (FinetuningRecipe, finetune),
    "classification": (ClassificationRecipe, finetune_classifier),
}


def load_task(
    path: str | os.PathLike, overrides: Sequence[str] = ()
) -> tuple[StartingRecipe, Callable[..., dict[str, Any]]]:
    """Read a recipe of any task, and name the function that runs it: `run(recipe, out, progress=…)`.

    Args:
        path: a YAML file.
        overrides: `key=value`, with dots for settings inside settings; values are YAML.

    Raises:
        ValueError: the file or an override is not of this form, or a setting is unknown, missing or out of range.
        OSError: the file is there and can't be read.
    """
    kind, run = _KINDS.get(_task_of(path), _KINDS[TASKS[0]])
    recipe = load_settings(kind, path, overrides, example="hub_configs/small/finetune.yaml")
    if not isinstance(recipe, _KINDS[recipe.task][0]):
        raise ValueError(f"{path} is a recipe of another task; {recipe.task} needs one of its own.")
    return recipe, run


def _task_of(path: str | os.PathLike) -> str:
    """What the file says; whatever is wrong with it is told by those who read all of it."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return TASKS[0]
    task = content.get("task") if isinstance(content, dict) else None
    return task if isinstance(task, str) else TASKS[0]
