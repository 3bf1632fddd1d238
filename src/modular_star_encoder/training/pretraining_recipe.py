"""Recipes of pre-training: one YAML file that says which model learns what from which corpus, and how."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modular_star_encoder.data.in_context import MIN_ROW_TOKENS
from modular_star_encoder.data.settings import load_settings
from modular_star_encoder.training.training_recipe import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe(TrainingRecipe):
    """How a model is pre-trained on repositories; settings of any training are those of `TrainingRecipe`.

    Args:
        corpus: one source of files and its options; see `data.corpora.open_corpus`.
        tokens_per_step: tokens of one step over all processes, reached by accumulating gradients; rows are counted as
            full.
        rows_per_device: rows in memory at once on each device.
        max_tokens: longest row, special tokens included.
        milestones, fractions: see `MultiStepSchedule`; without milestones the rate falls linearly to 0.
        mask_probability: share of the text tokens to predict.
        tokenizer: folder or Hub id; without one, a tokenizer of the model's vocabulary size is trained on the corpus.
        start_from_corpus: initial token vectors by spelling and decoder biases by frequency, for small models.
        packing: rows of a batch in one flat row, without padding.
        held_out_share: share of the repositories kept for evaluation.
        eval_rows: held-out rows of one evaluation.
    """

    corpus: Mapping[str, Any]
    tokens_per_step: int
    rows_per_device: int
    max_tokens: int
    milestones: Sequence[int] = ()
    fractions: Sequence[float] = ()
    mask_probability: float = 0.15
    start_from_corpus: bool = False
    packing: bool = False
    held_out_share: float = 0.05
    eval_rows: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("tokens_per_step", "rows_per_device", "max_tokens", "eval_rows")
        if not 0 < self.mask_probability < 1:
            raise ValueError(f"mask_probability must be between 0 and 1, not {self.mask_probability}.")
        if self.max_tokens < MIN_ROW_TOKENS:
            raise ValueError(f"max_tokens must be at least {MIN_ROW_TOKENS}, not {self.max_tokens}.")
        object.__setattr__(self, "fractions", _numbers("fractions", self.fractions))
        steps = _numbers("milestones", self.milestones)
        if not all(step.is_integer() for step in steps):
            raise ValueError(f"milestones must be whole numbers of steps, not {list(self.milestones)}.")
        object.__setattr__(self, "milestones", tuple(map(int, steps)))
        if not isinstance(self.corpus, Mapping):
            raise ValueError(f"corpus must be a mapping such as `folder: PATH`, not {self.corpus!r}.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share must be between 0 and 1, not {self.held_out_share}.")

    def accumulation(self, processes: int) -> int:
        """Batches of gradients to accumulate on each of `processes` devices.

        Raises:
            ValueError: `tokens_per_step` is not a whole number of batches over the processes.
        """
        batch = self.rows_per_device * self.max_tokens * processes
        if self.tokens_per_step % batch:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} must be a multiple of rows_per_device × max_tokens × "
                f"processes = {self.rows_per_device} × {self.max_tokens} × {processes} = {batch}."
            )
        return self.tokens_per_step // batch


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """The values as numbers: YAML reads `1e-1`, which has no point, as a word."""
    try:
        if isinstance(values, list | tuple):
            return tuple(map(float, values))
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} must be a list of numbers, not {values!r}.")


def load_pretraining_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> PretrainingRecipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value`, with dots for settings inside settings (`corpus.folder=~/code`); values are YAML.

    Raises:
        ValueError: the file or an override is not of this form, or a setting is unknown, missing or out of range.
        OSError: the file is there and can't be read.
    """
    return load_settings(PretrainingRecipe, path, overrides, example="hub_configs/small/recipe.yaml")
