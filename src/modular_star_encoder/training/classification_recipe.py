"""Recipes of fine-tuning for clone detection."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modular_star_encoder.training.training_recipe import StartingRecipe


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(StartingRecipe):
    """How a classifier of pairs is trained; see `StartingRecipe` and `TrainingRecipe` for the other settings.

    Args:
        data: labelled pairs; see `data.labelled_pairs.read_labelled_pairs`.
        batch_size: pairs of one step over all processes, reached by accumulating gradients.
        pairs_per_device: pairs in memory at once on each device; by default all of a step.
        max_tokens: longest pair, special tokens included.
        samples, eval_samples: pairs to train on and to evaluate with, drawn at random; all of them if None.
    """

    data: Mapping[str, Any]
    batch_size: int = 64
    pairs_per_device: int | None = None
    max_tokens: int = 1024
    samples: int | None = None
    eval_samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("batch_size", "max_tokens")
        given = ("samples", "eval_samples", "pairs_per_device")
        self.check_positive(*(name for name in given if getattr(self, name) is not None))
        if not isinstance(self.data, Mapping):
            raise ValueError(f"data must be a mapping such as `bigclonebench: FOLDER`, not {self.data!r}.")

    def accumulation(self, processes: int) -> tuple[int, int]:
        """Pairs in memory at once on each of `processes` devices, and batches of gradients to accumulate.

        Raises:
            ValueError: `batch_size` is not a whole number of batches over the processes.
        """
        rows = self.pairs_per_device or max(1, self.batch_size // processes)
        if self.batch_size % (rows * processes):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of pairs_per_device × processes = {rows} × "
                f"{processes}."
            )
        return rows, self.batch_size // (rows * processes)
