"""Recipes: the YAML files in hub_configs that say how a model is trained."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import TrainingArguments

from modular_star_encoder.data.in_context import MIN_ROW_TOKENS
from modular_star_encoder.data.pairs import have_negatives
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.training.stages import Stage, bf16_is_faster
from modular_star_encoder.training.trainer import last_checkpoint
from modular_star_encoder.utils.files import write_json
from modular_star_encoder.utils.settings import build_settings, load_settings


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


SCHEDULES = ("constant", "linear")


@dataclass(frozen=True, kw_only=True)
class FinetuningRecipe(StartingRecipe):
    """How a model is fine-tuned on pairs; see `StartingRecipe` and `TrainingRecipe` for the other settings.

    Args:
        data: sources of pairs; see `data.parallel_texts.read_retrieval_examples`.
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
