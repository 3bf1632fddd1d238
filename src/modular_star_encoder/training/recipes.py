"""Settings of training recipes, with types and checks. A recipe is a YAML file, such as hub_configs/small/recipe.yaml.

A recipe may also set any argument of `MultiExitTrainingArguments`, a subclass of `transformers.TrainingArguments`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field as Constraint
from pydantic import with_config
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from modular_star_encoder.data.in_context import MIN_ROW_TOKENS
from modular_star_encoder.data.pairs import have_negatives, resolve_pairs
from modular_star_encoder.inference.encode import bf16_is_faster
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.distillation import DistillationObjective, DistillationSettings
from modular_star_encoder.training import find_recipe, hub_config_folder
from modular_star_encoder.training.arguments import MultiExitTrainingArguments, check_arguments
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import (
    Count,
    Int,
    Positive,
    Probability,
    Seed,
    Share,
    Switch,
    check_names,
    load_settings,
    settings_class,
)


def load_config(name: str) -> ModularStarEncoderConfig:
    return ModularStarEncoderConfig.from_pretrained(hub_config_folder(name))


_MAPPINGS = {one.name for one in fields(MultiExitTrainingArguments) if "dict" in str(one.type)}
_Rank = Annotated[Count, Constraint(le=1024)]


@with_config({"extra": "allow"})
class LoraArguments(TypedDict, total=False):
    """Arguments of `peft.LoraConfig`. Ranks above 1024 are an error, because their adapters need much memory."""

    r: _Rank
    rank_pattern: Mapping[str, _Rank]


@settings_class
class TrainingSettings:
    """Settings of any training run: all arguments of `MultiExitTrainingArguments`, with this package's defaults.

    Args:
        max_steps: number of optimiser steps.
        learning_rate: peak of the learning-rate schedule.
        seed: seed of all random numbers, from 0 to 4294967295.
        logging_steps, eval_steps, save_steps: number of steps between log lines, between evaluations and between
            checkpoints; a number below 1 is a fraction of all steps.
        training: {name: value} of all other arguments. Arguments that upload the model, `parallelism_config`, and the
            name of a JSON file in place of a mapping raise UserError.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = (
        {"warmup_steps": 0, "lr_scheduler_type": "linear", "save_total_limit": 2, "dataloader_num_workers": 0}
        | {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.0}
        | {name: getattr(MultiExitTrainingArguments, name, ()) for name in MultiExitTrainingArguments.__annotations__}
    )
    OPEN_KEYS: ClassVar[tuple[str, type]] = ("training", MultiExitTrainingArguments)

    max_steps: Count
    learning_rate: Positive
    seed: Seed = 0
    logging_steps: Positive = 50
    eval_steps: Positive = 500
    save_steps: Positive = 500
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.training.items():
            if name.startswith(("push_to_hub", "hub_", "trackio_")):
                message = f"A recipe can't upload: leave out {name}, and publish with `mose publish`."
                raise UserError("training.arguments.upload", message)
            if name == "parallelism_config":
                message = f"Leave out {name}: give the options --parallelism_config_… to `accelerate launch` instead."
                raise UserError("training.arguments.decided", message)
            # transformers takes a string for the name of a JSON file and reads it.
            if name in _MAPPINGS and not isinstance(value, Mapping | None):
                message = f"{name} must be a mapping of settings, not {value!r}."
                raise UserError("training.arguments.mapping", message)
        # YAML reads the word `no` as false.
        unset = {name: "no" for name, value in self.training.items() if name.endswith("_strategy") and value is False}
        object.__setattr__(self, "training", {**self.DEFAULTS, **self.training, **unset})

    def batches(self, processes: int) -> dict[str, Any]:
        """Return training arguments that split a batch evenly over `processes` devices; UserError if impossible."""
        return {"per_device_train_batch_size": 1}

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as one dict of plain values, with the same keys as the recipe's YAML file."""
        settings = asdict(self)
        return {**settings.pop("training"), **settings}

    def arguments(self, folder: Path, processes: int = 1, *, progress: bool) -> MultiExitTrainingArguments:
        """Return arguments to train on `processes` devices and to save in `folder`; UserError if a setting is wrong."""
        decided = {"output_dir": os.fspath(folder), "auto_find_batch_size": False, **self.batches(processes)}
        decided["per_device_eval_batch_size"] = decided["per_device_train_batch_size"]
        given = {one.name: getattr(self, one.name) for one in fields(TrainingSettings)}
        given |= given.pop("training")
        if twice := sorted(set(given) & set(decided)):
            message = f"Leave out {', '.join(twice)}, which other settings of the recipe determine."
            raise UserError("training.arguments.decided", message)
        defaults: dict[str, Any] = {"eval_strategy": "steps", "report_to": "none", "disable_tqdm": not progress}
        defaults |= {"bf16": bf16_is_faster(), "use_cpu": not torch.cuda.is_available()}
        try:
            arguments = MultiExitTrainingArguments(**(defaults | decided | given))
            check_arguments(arguments)
            return arguments
        except (UserError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of transformers, or of a library that an argument needs
            unset_hf_deepspeed_config()  # the rejected settings would break the loading of every later model
            message = f"transformers rejects a setting of the recipe: {' '.join(str(error).split())}"
            raise UserError("training.arguments.value", message) from error


@settings_class
class TrainingRecipe(TrainingSettings):
    """Settings of every training recipe: the model to train, its tokenizer and its attention.

    Args:
        model: a packaged configuration, such as small, or a folder with a config.json; training starts from the
            weights in this folder, if it has any.
        tokenizer: folder or Hub id of the tokenizer, by default the model's tokenizer.
        attn_implementation: name of an attention implementation in transformers; kernels on the Hub are not allowed.
    """

    model: str
    tokenizer: str | None = None
    attn_implementation: Annotated[str, Constraint(pattern=r"^\w+$")] = "sdpa"


@settings_class
class PretrainingRecipe(TrainingRecipe):
    """Settings to pre-train a model on repositories of code.

    Args:
        corpus: one source of files and its options, such as `folder: PATH`; see `open_corpus`.
        tokens_per_step: number of tokens per step over all devices; every row counts as `max_tokens` tokens.
        rows_per_device: number of rows in a forward pass on one device; gradients of several passes are accumulated.
        max_tokens: largest number of tokens of a row, special tokens included.
        mlm_probability: fraction of the text tokens that the model must predict (masked language modelling).
        tokenizer: folder or Hub id, by default a new tokenizer of the model's vocabulary size, trained on the corpus.
        start_from_corpus: before training, give similar embeddings to tokens that are spelled alike, such as "Parse"
            and "parse", and set the output biases from the token frequencies; this helps small models.
        packing: join all rows of a batch into one row without padding.
        eval_fraction: fraction of the repositories that is held out for evaluation.
        eval_rows: number of held-out rows in an evaluation, at most 100,000.
    """

    COMMAND: ClassVar[str] = "pretrain"

    corpus: Mapping[str, Any]
    tokens_per_step: Count
    rows_per_device: Count
    max_tokens: Annotated[Int, Constraint(ge=MIN_ROW_TOKENS)]
    mlm_probability: Share = 0.15
    start_from_corpus: Switch = False
    packing: Switch = False
    eval_fraction: Share = 0.05
    eval_rows: Annotated[Count, Constraint(le=100_000)] = 512

    def batches(self, processes: int) -> dict[str, Any]:
        batch = {"rows_per_device": self.rows_per_device, "max_tokens": self.max_tokens, "processes": processes}
        steps = _quotient("tokens_per_step", self.tokens_per_step, batch)
        return {"per_device_train_batch_size": self.rows_per_device, "gradient_accumulation_steps": steps}


@settings_class
class StartingRecipe(TrainingRecipe):
    """Settings of every fine-tuning recipe, for retrieval or classification.

    Args:
        task: `retrieval` (pairs of texts) or `classification` (labelled pairs).
        model: folder or Hub id of a fine-tuned model, or of a pre-trained model, to which new heads are added. To start
            from random weights, name a packaged configuration, or a folder with a config.json but no weights, and set
            `tokenizer`.
        exit_layer: train this exit alone, as a single-exit baseline; deeper layers and other exits' heads are removed.
        config: {name: new value} for the model's configuration, such as `residual_dropout: 0.1`.
        unpad_inputs: remove padding tokens in training; the saved model has the `unpad_inputs` of the starting model.
        lora: train LoRA adapters in place of the trunk's weights, and all weights of the heads. The value is a mapping
            of arguments of `peft.LoraConfig`; `{}` means this package's defaults. If None, all weights are trained.
    """

    task: Literal["retrieval", "classification"] = "retrieval"
    exit_layer: Int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    unpad_inputs: Switch = True
    lora: LoraArguments | None = None

    def lengths(self) -> dict[str, int]:
        """Return {name: value} of the settings that limit the number of tokens of a text."""
        return {}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(list(self.config), [one.name for one in fields(ModularStarEncoderConfig)], "config")


@settings_class
class TeacherSettings(DistillationSettings):
    """Settings of a recipe's `distillation`: the teacher model, and how the exits learn the teacher's vectors.

    Args:
        teacher: the model to learn from; any name that `load_encoder` takes, such as a folder, a Hub id or an endpoint.
        query_prompt, document_prompt: prefix of each description, and prefix of each snippet, that the teacher embeds.
        max_characters: texts are cut to this number of characters before the teacher embeds them.
        centre_by_kind: subtract the mean vector of all descriptions from the vector of each description, do the same
            for code snippets, and scale the differences to length 1.
        texts: file of texts that belong to no pair, from which the exits also learn: JSON Lines or Parquet with a
            column `text`. A batch has one of these texts for every two pairs.
        start_from_teacher: before training, initialise exit 0 from the teacher's vectors of single tokens; see
            `starting_points.start_from_teacher`.
        cache: folder to store the teacher's vectors in, by default in the user's cache folder.
    """

    teacher: str
    query_prompt: str = ""
    document_prompt: str = ""
    max_characters: Count = 1200
    centre_by_kind: Switch = True
    texts: str | None = None
    start_from_teacher: Switch = False
    cache: str | None = None


@settings_class
class FinetuningRecipe(StartingRecipe):
    """Settings to fine-tune a model for retrieval on pairs of texts.

    Args:
        data: sources of pairs, such as `pairs: pairs.csv`; see `read_retrieval_examples`.
        batch_size: number of pairs per step over all devices. For each pair, the texts of the step's other pairs serve
            as negatives.
        max_train_samples: number of rows to train on, drawn at random (all if None).
        max_text_tokens: largest number of tokens of a description, prompt and special tokens included.
        max_code_tokens: largest number of tokens of a code snippet, prompt and special tokens included.
        identifier_rename_prob: fraction of the code snippets in which random strings replace the most frequent
            identifiers.
        objective: settings of the loss, see `ContrastiveSettings`; leave out `pairs`, which follows from the data.
        distillation: a teacher whose vectors every exit learns; see `TeacherSettings`.
        eval_fraction: fraction of each source's rows to hold out for evaluation, at most 0.2. Rows of one repository
            are all trained on or all held out.
        eval_pairs: number of held-out pairs in each evaluation.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = StartingRecipe.DEFAULTS | {"lr_scheduler_type": "constant_with_warmup"}

    data: Mapping[str, Any]
    batch_size: Count
    max_train_samples: Count | None = None
    max_text_tokens: Count = 128
    max_code_tokens: Count = 512
    identifier_rename_prob: Probability = 0.3
    objective: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    distillation: TeacherSettings | None = None
    eval_fraction: Annotated[Share, Constraint(le=0.2)] = 0.05
    eval_pairs: Count = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "data", resolve_pairs(self.data))
        default = ContrastiveSettings().pairs
        pairs = (("query", "document", "negative"),) if have_negatives(self.data) else default
        if self.objective.pairs not in (default, pairs):
            message = "Leave out `objective.pairs`: it follows from whether the rows of `data` have negatives."
            raise UserError("training.objective.pairs", message)
        if self.lora is not None and self.distillation and self.distillation.start_from_teacher:
            message = "`lora` freezes the weights that `distillation.start_from_teacher` sets; leave out one of them."
            raise UserError("training.lora", message)
        object.__setattr__(self, "objective", replace(self.objective, pairs=pairs))

    def make_objective(self) -> ContrastiveObjective:
        """Return a `DistillationObjective` if the recipe has a teacher, otherwise a `ContrastiveObjective`."""
        if self.distillation is None:
            return ContrastiveObjective(self.objective)
        return DistillationObjective(self.distillation, self.objective)

    def rows(self) -> dict[str, Any]:
        """Return this recipe's arguments for `prepare_retrieval_data`."""
        names = ("eval_fraction", "seed", "max_train_samples")
        return {"settings": self.data} | {name: getattr(self, name) for name in names}

    def lengths(self) -> dict[str, int]:
        return {"max_text_tokens": self.max_text_tokens, "max_code_tokens": self.max_code_tokens}

    def batches(self, processes: int) -> dict[str, Any]:
        pairs = 2 * _quotient("batch_size", self.batch_size, {"2": 2, "processes": processes})
        # Each batch is planned for one step: the trainer must neither shuffle nor accumulate batches.
        planned = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 1}
        return {"per_device_train_batch_size": pairs, **planned}


@settings_class
class ClassificationRecipe(StartingRecipe):
    """Settings to train a classifier of pairs of code snippets, for clone detection.

    Args:
        data: labelled pairs, such as `bigclonebench: FOLDER`; see `read_labelled_pairs`.
        batch_size: number of pairs per step over all devices, reached by accumulating gradients.
        pairs_per_device: number of pairs in a forward pass on one device, by default `batch_size` divided by the number
            of devices.
        max_tokens: largest number of tokens of a pair, special tokens included.
        max_train_samples, max_eval_samples: number of training pairs, and number of pairs of each evaluation split,
            drawn at random (all pairs if None).
    """

    data: Mapping[str, Any]
    batch_size: Count = 64
    pairs_per_device: Count | None = None
    max_tokens: Count = 1024
    max_train_samples: Count | None = None
    max_eval_samples: Count | None = None

    def lengths(self) -> dict[str, int]:
        return {"max_tokens": self.max_tokens}

    def batches(self, processes: int) -> dict[str, Any]:
        pairs = self.pairs_per_device or max(1, self.batch_size // processes)
        steps = _quotient("batch_size", self.batch_size, {"pairs_per_device": pairs, "processes": processes})
        return {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": steps}


def _quotient(name: str, total: int, factors: Mapping[str, int]) -> int:
    product = math.prod(factors.values())
    if total % product:
        numbers = " × ".join(map(str, factors.values()))
        message = f"{name}={total} must be a multiple of {' × '.join(factors)} = {numbers} = {product}."
        raise UserError(f"training.{name}.multiple", message)
    return total // product


def check_length(config: ModularStarEncoderConfig, **lengths: int) -> None:
    """Raise UserError (`training.length.too_long`) if one of `lengths` exceeds `config.max_position_embeddings`."""
    longest = config.max_position_embeddings
    if too_long := [f"{name}={length}" for name, length in lengths.items() if length > longest]:
        message = f"{', '.join(too_long)} must be at most the model's max_position_embeddings={longest}."
        raise UserError("training.length.too_long", message)


AnyRecipe = TypeVar("AnyRecipe")


def load_recipe(kind: type[AnyRecipe], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read recipe `path`, with `overrides` such as `seed=1`, as an instance of the class `kind`; see `find_recipe`."""
    return load_settings(kind, find_recipe(os.fspath(path), getattr(kind, "COMMAND", "finetune")), overrides)
