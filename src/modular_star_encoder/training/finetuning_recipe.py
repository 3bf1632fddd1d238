"""Recipes of fine-tuning for retrieval: one YAML file that says which model learns what from which pairs, and how."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from modular_star_encoder.data.parallel_texts import have_negatives
from modular_star_encoder.data.settings import build_settings, load_settings
from modular_star_encoder.objectives import ContrastiveSettings
from modular_star_encoder.training.training_recipe import StartingRecipe

SCHEDULES = ("constant", "linear")


@dataclass(frozen=True, kw_only=True)
class FinetuningRecipe(StartingRecipe):
    """How a model is fine-tuned on pairs; see `StartingRecipe` and `TrainingRecipe` for the other settings.

    Args:
        data: sources of pairs; see `data.parallel_texts.read_parallel_texts`.
        batch_size: pairs of one step over all processes, all of them candidates for each other.
        samples: rows to train on, drawn at random; all of them if None.
        max_text_tokens, max_code_tokens: longest description and code, prompt and special tokens included.
        renamed_share: share of the code snippets whose frequent words become random strings; see `data.augmentation`.
        objective: settings of the loss; see `ContrastiveSettings`.
        schedule: of the learning rate after the warm-up: constant, or linear down to 0.
        held_out_share: share of each source's rows, up to a fifth, kept for evaluation, whole repositories at a time.
        eval_pairs: held-out pairs of one evaluation.
    """

    data: Mapping[str, Any]
    batch_size: int
    samples: int | None = None
    max_text_tokens: int = 128
    max_code_tokens: int = 512
    renamed_share: float = 0.3
    objective: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "constant"
    held_out_share: float = 0.05
    eval_pairs: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("batch_size", "max_text_tokens", "max_code_tokens", "eval_pairs")
        if self.samples is not None:
            self.check_positive("samples")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}.")
        if not 0 <= self.renamed_share <= 1:
            raise ValueError(f"renamed_share must be between 0 and 1, not {self.renamed_share}.")
        if not 0 < self.held_out_share <= 0.2:
            raise ValueError(f"held_out_share must be above 0 and at most 0.2, not {self.held_out_share}.")
        self.check_mappings("data", "objective")
        if "pairs" in self.objective:
            raise ValueError("objective.pairs can't be set: the data says whether batches have hard negatives.")
        objective = self.contrastive()
        if self.log_gradient_norms and objective.mini_batch_tokens is not None:
            raise ValueError("log_gradient_norms does not go with objective.mini_batch_tokens, which keeps no graph.")

    def contrastive(self) -> ContrastiveSettings:
        """The settings of the loss, with the sides that batches of the data have."""
        settings = build_settings(ContrastiveSettings, dict(self.objective), "objective")
        return replace(settings, pairs=(("query", "document", "negative"),)) if have_negatives(self.data) else settings

    def pairs_per_device(self, processes: int) -> int:
        """Pairs of one step on each of `processes` devices.

        Raises:
            ValueError: `batch_size` is not as many pairs, an even number, on each.
        """
        if self.batch_size % (2 * processes):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of 2 × processes = {2 * processes}: each process "
                "takes as many pairs, half of them text → code."
            )
        return self.batch_size // processes


def load_finetuning_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> FinetuningRecipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value`, with dots for settings inside settings (`data.functions.folder=~/code`); values are
            YAML.

    Raises:
        ValueError: the file or an override is not of this form, or a setting is unknown, missing or out of range.
        OSError: the file is there and can't be read.
    """
    return load_settings(FinetuningRecipe, path, overrides, example="hub_configs/small/finetune.yaml")
