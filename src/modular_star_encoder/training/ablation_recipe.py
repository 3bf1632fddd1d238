"""Recipes of ablations: one fine-tuning, the same with single exits, and the same with other options."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from modular_star_encoder.training.recipes import FinetuningRecipe
from modular_star_encoder.utils.settings import build_settings, load_settings

SELF_DISTILLED = "self-distilled"

# What every cell must share for its figures to be comparable.
_FIXED = ("data", "held_out_share", "samples", "seed", "exit_layer", "eval_pairs", "task")
_NAME = re.compile(r"\w[\w.-]*")


class AblationCell(NamedTuple):
    """One model to train.

    Attributes:
        name: `self-distilled`, `exit-4` for the baseline of that exit, or that of a variant.
        recipe: what it is trained by; its seed is the cell's.
    """

    name: str
    recipe: FinetuningRecipe

    @property
    def folder(self) -> str:
        """Where it is, below the folder of the cells."""
        return f"{self.name}/seed-{self.recipe.seed}"


@dataclass(frozen=True, kw_only=True)
class AblationRecipe:
    """What is trained and measured.

    Args:
        finetuning: settings of the self-distilled model (see `FinetuningRecipe`), which trains all exits. Its seed
            decides which rows are held out, for all cells.
        seeds: one model of each kind for each seed; seeds decide new heads, batches, renaming and dropout.
        exit_layers: exits that get a single-exit baseline; all of the model if None.
        baselines: whether to train single-exit baselines: the same checkpoint cut at that exit, its own head only, and
            the same data, batches and steps. The loss of the one exit has weight 1, and has no terms of other exits.
        variants: name → settings that differ from `finetuning`, with dots for settings inside settings, such as
            `objective.distillation_weight: 1`. Each is compared with the self-distilled model.
        held_out: whether the rows held out from the data are measured.
        benchmarks: further ones, by the names of `mose evaluate`; retrieval only.
        benchmark_data: folder of their files.
        allow_subset: whether partial files of benchmarks are taken.
        keep_models: whether the weights of measured models stay on disk.
    """

    finetuning: Mapping[str, Any]
    seeds: Sequence[int] = (0, 1, 2)
    exit_layers: Sequence[int] | None = None
    baselines: bool = True
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    held_out: bool = True
    benchmarks: Sequence[str] = ()
    benchmark_data: str | None = None
    allow_subset: bool = False
    keep_models: bool = True

    def __post_init__(self) -> None:
        for name in ("finetuning", "variants"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping of settings, not {getattr(self, name)!r}.")
        seeds = list(self.seeds) if isinstance(self.seeds, list | tuple) else []
        if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
            raise ValueError(f"seeds must be different whole numbers from 0, not {self.seeds!r}.")
        for name, kind, what in (("exit_layers", int, "exits"), ("benchmarks", str, "names")):
            given = getattr(self, name)
            is_list = isinstance(given, list | tuple) and all(isinstance(one, kind) for one in given)
            if not is_list and (name, given) != ("exit_layers", None):
                raise ValueError(f"{name} must be a list of {what}, not {given!r}.")
        if not self.held_out and not self.benchmarks:
            raise ValueError("Nothing is measured: set held_out, or name benchmarks.")
        if self.benchmarks and self.benchmark_data is None:
            raise ValueError("benchmarks need benchmark_data, the folder of their files.")
        for name, changes in self.variants.items():
            is_name = isinstance(name, str) and _NAME.fullmatch(name) and name != SELF_DISTILLED
            are_settings = isinstance(changes, Mapping) and all(isinstance(key, str) for key in changes)
            if not is_name or name.startswith("exit-") or not are_settings:
                raise ValueError(f"variants must be names with settings that differ; {name!r} can't be used.")
            fixed = sorted(key for key in changes if key.partition(".")[0] in _FIXED)
            if fixed:
                raise ValueError(f"variants must not change {', '.join(fixed)}: all cells share it.")

    def base(self) -> FinetuningRecipe:
        """The recipe of the self-distilled model, with the seed of the data."""
        return self._recipe({}, "finetuning")

    def cells(self, exit_layers: Sequence[int]) -> list[AblationCell]:
        """Every model to train, seed by seed.

        Args:
            exit_layers: exits of the model.

        Raises:
            ValueError: a baseline is wanted at an exit that the model does not have, or settings can't be used.
        """
        wanted = list(exit_layers if self.exit_layers is None else self.exit_layers)
        if unknown := sorted(set(wanted) - set(exit_layers)):
            exits = ", ".join(map(str, exit_layers))
            raise ValueError(f"exit_layers names {', '.join(map(str, unknown))}; the model's exits are {exits}.")
        kinds: dict[str, Mapping[str, Any]] = {SELF_DISTILLED: {}}
        if self.baselines:
            kinds |= {f"exit-{exit_layer}": self._alone(exit_layer) for exit_layer in wanted}
        kinds |= self.variants
        return [
            AblationCell(name, self._recipe({**changes, "seed": seed}, name))
            for seed in self.seeds
            for name, changes in kinds.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """All settings, as plain values."""
        return asdict(self)

    def _alone(self, exit_layer: int) -> dict[str, Any]:
        """What differs in a baseline: its exit, and of the base's options those that are about other exits."""
        changes = {"exit_layer": exit_layer, "exit_weights": "uniform", "rotate_shallow_exits": False}
        objective = self.base().objective
        for weight in ("distillation_weight", "alignment_weight"):
            if objective.get(weight):
                changes[f"objective.{weight}"] = 0.0
        if isinstance(objective.get("dimensions"), Mapping):
            changes["objective.dimensions"] = objective["dimensions"].get(exit_layer)
        return changes

    def _recipe(self, changes: Mapping[str, Any], name: str) -> FinetuningRecipe:
        settings = copy.deepcopy(dict(self.finetuning))
        for key, value in changes.items():
            *parents, last = key.split(".")
            place = settings
            for parent in parents:
                place = place.setdefault(parent, {})
                if not isinstance(place, dict):
                    raise ValueError(f"{name}: {parent} is not a mapping of settings, so {key} can't be set.")
            place[last] = value
        return build_settings(FinetuningRecipe, settings, name)


def load_ablation_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> AblationRecipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value`, with dots for settings inside settings (`finetuning.steps=500`); values are YAML.

    Raises:
        ValueError: the file or an override is not of this form, or a setting is unknown, missing or out of range.
        OSError: the file is there and can't be read.
    """
    return load_settings(AblationRecipe, path, overrides, example="hub_configs/small/ablation.yaml")
