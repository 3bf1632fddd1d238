"""Recipes of pre-training: one YAML file that says which model learns what from which corpus, and how."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from modular_star_encoder.data.settings import load_settings


@dataclass(frozen=True)
class PretrainingRecipe:
    """How a model is pre-trained on repositories.

    Args:
        model: a folder of `hub_configs`, or any folder with a config.json; a folder with weights is continued from.
        corpus: one source of files and its options; see `data.corpora.open_corpus`.
        steps: optimiser steps.
        tokens_per_step: tokens of one step over all processes, reached by accumulating gradients; rows are counted as
            full.
        rows_per_device: rows in memory at once on each device.
        max_tokens: longest row, special tokens included.
        learning_rate: peak of the schedule.
        warmup_steps, milestones, fractions: see `MultiStepSchedule`; without milestones the rate falls linearly to 0.
        adam_beta1, adam_beta2, adam_epsilon, weight_decay: AdamW's; decay is not applied to biases and norms.
        max_grad_norm: longest gradient; longer ones are scaled down.
        mask_probability: share of the text tokens to predict.
        exit_weights: weights of the exits' losses: paper, uniform, linear, or one number per exit.
        normalize_exit_weights: divide them by their sum.
        rotate_shallow_exits: see `MultiExitTrainer`.
        log_gradient_norms: see `MultiExitTrainer`.
        tokenizer: folder or Hub id; without one, a tokenizer of the model's vocabulary size is trained on the corpus.
        start_from_corpus: initial token vectors by spelling and decoder biases by frequency, for small models.
        packing: rows of a batch in one flat row, without padding.
        attn_implementation: attention to train with.
        held_out_share: share of the repositories kept for evaluation.
        eval_rows: held-out rows of one evaluation.
        logging_steps, eval_steps, save_steps: steps between two logs, evaluations, checkpoints.
        save_total_limit: checkpoints kept.
        dataloader_workers: processes that make rows, per device.
        trainer: more arguments of `transformers.TrainingArguments` (fsdp, gradient_checkpointing, torch_compile, …).
        seed: of everything that is drawn.
    """

    model: str
    corpus: Mapping[str, Any]
    steps: int
    tokens_per_step: int
    rows_per_device: int
    max_tokens: int
    learning_rate: float
    warmup_steps: int = 0
    milestones: Sequence[int] = ()
    fractions: Sequence[float] = ()
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-6
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    mask_probability: float = 0.15
    exit_weights: str | Sequence[float] = "paper"
    normalize_exit_weights: bool = False
    rotate_shallow_exits: bool = False
    log_gradient_norms: bool = False
    tokenizer: str | None = None
    start_from_corpus: bool = False
    packing: bool = False
    attn_implementation: str = "sdpa"
    held_out_share: float = 0.05
    eval_rows: int = 512
    logging_steps: int = 50
    eval_steps: int = 500
    save_steps: int = 500
    save_total_limit: int = 2
    dataloader_workers: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            *("steps", "tokens_per_step", "rows_per_device", "max_tokens", "learning_rate", "eval_rows"),
            *("logging_steps", "eval_steps", "save_steps"),
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")
        # YAML reads `1e-1`, which has no point, as a word.
        object.__setattr__(self, "milestones", tuple(int(step) for step in self.milestones))
        object.__setattr__(self, "fractions", tuple(float(fraction) for fraction in self.fractions))
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

    def to_dict(self) -> dict[str, Any]:
        """All settings, as plain values."""
        return asdict(self)


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
