"""What recipes of every kind of training say, and the folder of a run."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from modular_star_encoder.data.files import write_json
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.training.recipe import hub_config_folder
from modular_star_encoder.training.stages import bf16_is_faster
from modular_star_encoder.training.trainer import last_checkpoint

LOG = Path("model", "training_log.json")
"""Where a run leaves its log, as the last thing that it writes."""

MAY_CHANGE = frozenset({"dataloader_workers", "save_total_limit"})
"""Settings without influence on what is learned, which a run may be continued with others of."""

TASKS = ("retrieval", "classification")
"""What models can be fine-tuned for."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Optimiser, logs, evaluations and checkpoints.

    Args:
        model: a folder of `hub_configs`, or any folder with a config.json; a folder with weights is continued from.
        steps: optimiser steps.
        learning_rate: peak of the schedule.
        warmup_steps: steps of linear warm-up.
        adam_beta1, adam_beta2, adam_epsilon, weight_decay: AdamW's; decay is not applied to biases, norms and a
            learned logit scale.
        max_grad_norm: longest gradient; longer ones are scaled down.
        exit_weights: weights of the exits' losses: paper, uniform, linear, or one number per exit.
        normalize_exit_weights: divide them by their sum.
        rotate_shallow_exits, log_gradient_norms: see `MultiExitTrainer`.
        tokenizer: folder or Hub id; by default the model's own.
        attn_implementation: attention to train with.
        logging_steps, eval_steps, save_steps: steps between two logs, evaluations, checkpoints.
        save_total_limit: checkpoints kept.
        dataloader_workers: processes that make rows, per device.
        trainer: more arguments of `transformers.TrainingArguments` (fsdp, gradient_checkpointing, torch_compile, …),
            without those that other settings decide.
        seed: of everything that is drawn.
    """

    model: str
    steps: int
    learning_rate: float
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-6
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    exit_weights: str | Sequence[float] = "paper"
    normalize_exit_weights: bool = False
    rotate_shallow_exits: bool = False
    log_gradient_norms: bool = False
    tokenizer: str | None = None
    attn_implementation: str = "sdpa"
    logging_steps: int = 50
    eval_steps: int = 500
    save_steps: int = 500
    save_total_limit: int = 2
    dataloader_workers: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_positive("steps", "learning_rate", "logging_steps", "eval_steps", "save_steps")
        if not 0 <= self.seed < 2**32:  # what numpy takes
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}.")
        if not isinstance(self.model, str):
            raise ValueError(f"model must be the name of a folder or Hub repository, not {self.model!r}.")
        self.check_mappings("trainer")

    def check_mappings(self, *names: str) -> None:
        """Refuse what is no mapping of settings."""
        for name in names:
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping of settings, not {getattr(self, name)!r}.")

    def check_positive(self, *names: str) -> None:
        """Refuse numbers that are not above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """All settings, as plain values."""
        return asdict(self)

    def trainer_options(self) -> dict[str, Any]:
        """What `MultiExitTrainer` is told about exits."""
        return {
            "weights": self.exit_weights,
            "normalize_weights": self.normalize_exit_weights,
            "rotate_shallow_exits": self.rotate_shallow_exits,
            "log_gradient_norms": self.log_gradient_norms,
        }

    def arguments(self, folder: Path, rows_per_device: int, *, progress: bool, **others: Any) -> TrainingArguments:
        """The recipe in the words of `Trainer`.

        Args:
            folder: where checkpoints go.
            rows_per_device: rows in memory at once on each device.
            progress: whether to show a progress bar.
            others: further arguments that the recipe's settings decide.

        Raises:
            ValueError: an argument in `trainer` that `TrainingArguments` does not have or can't use here, or that other
                settings decide.
        """
        own = {
            "output_dir": os.fspath(folder),
            "max_steps": self.steps,
            "per_device_train_batch_size": rows_per_device,
            "per_device_eval_batch_size": rows_per_device,
            "auto_find_batch_size": False,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "adam_epsilon": self.adam_epsilon,
            "max_grad_norm": self.max_grad_norm,
            "logging_steps": self.logging_steps,
            "eval_steps": self.eval_steps,
            "save_steps": self.save_steps,
            "save_total_limit": self.save_total_limit,
            "dataloader_num_workers": self.dataloader_workers,
            "seed": self.seed,
            **others,
        }
        defaults = {
            "lr_scheduler_type": "linear",
            "eval_strategy": "steps",
            "bf16": bf16_is_faster(),
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": not progress,
            "report_to": "none",
        }
        if twice := sorted(set(self.trainer) & set(own)):
            raise ValueError(f"trainer must not set {', '.join(twice)}: the recipe's own settings decide it.")
        try:
            return TrainingArguments(**(defaults | own | dict(self.trainer)))
        except TypeError as error:
            raise ValueError(f"trainer: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class StartingRecipe(TrainingRecipe):
    """What recipes of fine-tuning share: what is started from, and which of its weights are trained.

    Args:
        task: retrieval or classification; recipes of each have settings of their own.
        model: a pre-trained model, whose heads are new, or a fine-tuned one, as a folder or Hub id; or, to start from
            random weights, a folder of `hub_configs` or any other with a config.json alone, which needs a `tokenizer`.
        exit_layer: train this exit alone, with the layers up to it and no other head: a single-exit baseline.
        config: settings of the model's configuration to change, such as `residual_dropout`.
        unpad_inputs: compute padded batches without their padding; the model that is saved keeps its own setting.
        lora: train low-rank adapters in place of the trunk's weights, and the heads in full: settings of
            `peft.LoraConfig`; `{}` for the usual ones.
    """

    task: str = TASKS[0]
    exit_layer: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    unpad_inputs: bool = True
    lora: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} must be one of {', '.join(TASKS)}.")
        self.check_mappings("config", *(["lora"] if self.lora is not None else []))
        known = {one.name for one in fields(ModularStarEncoderConfig)}
        if unknown := sorted(set(self.config) - known):
            raise ValueError(f"config has unknown settings {', '.join(unknown)}.")


def processes_of_run() -> PartialState:
    """This process among those of the run; without a GPU they talk by gloo, however they were started."""
    return PartialState(cpu=not torch.cuda.is_available())


def model_folder(name: str) -> Path:
    """The folder that a recipe's `model` names.

    Names of ours come first, so that a folder that happens to be there does not change what a recipe means.

    Raises:
        ValueError: there is neither a configuration of ours nor a folder with one.
    """
    try:
        return hub_config_folder(name)
    except ValueError:
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise
        return folder


def has_weights(folder: Path) -> bool:
    """Whether weights lie in a folder."""
    return any(folder.glob("model*.safetensors"))


def open_run(out: Path, settings: Mapping[str, Any], kind: str, *, until_trained: Iterable[str]) -> None:
    """Make the folder of a run, or check that it holds a run with these settings.

    Settings must be the same from the first checkpoint on; `MAY_CHANGE` names those that need not.

    Args:
        out: the folder; `recipe.json` in it holds the settings.
        settings: those of the recipe.
        kind: what the run is, for messages.
        until_trained: settings that must be the same even as long as nothing is trained, once anything lies there.

    Raises:
        ValueError: the folder holds something else, or a run with other settings; the message names them.
    """
    written = out / "recipe.json"
    settings = json.loads(json.dumps(settings, default=str))
    if written.is_file():
        before = json.loads(written.read_text(encoding="utf-8"))
        trained = (out / "model").exists() or last_checkpoint(out / "checkpoints") is not None
        begun = any(path != written for path in out.iterdir())
        names = (set(settings) if trained else set(until_trained) if begun else set()) - MAY_CHANGE
        other = sorted(name for name in names if before.get(name) != settings[name])
        if other:
            raise ValueError(f"{out} holds a run with another {', '.join(other)}; name another folder.")
        write_json(written, settings)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and holds no run of {kind}; name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(written, settings)


def finite(value: Any) -> Any:
    """The same with None in place of infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
