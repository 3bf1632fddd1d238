"""Fine-tuning for clone detection from a recipe, at every exit; restartable."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, TrainingArguments

from modular_star_encoder.data.labelled_pairs import ClassificationCollator, ClassificationRows, read_labelled_pairs
from modular_star_encoder.evaluation.run import classification_scores
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForSequenceClassification
from modular_star_encoder.objectives.classification import ClassificationObjective
from modular_star_encoder.objectives.exit_losses import exit_weights
from modular_star_encoder.training.recipes import LOG, ClassificationRecipe, finite, open_run, processes_of_run
from modular_star_encoder.training.stages import train_to_the_end
from modular_star_encoder.training.starting_points import (
    MODEL,
    add_adapters,
    save_trained,
    starting_config,
    starting_model,
)
from modular_star_encoder.training.trainer import MultiExitTrainer
from modular_star_encoder.utils.files import write_json


def finetune_classifier(
    recipe: ClassificationRecipe, out: str | os.PathLike, *, progress: bool = True
) -> dict[str, Any]:
    """Train a classifier of pairs, continuing whatever an earlier call with this recipe left in `out`.

    `out` gets `checkpoints/` and in the end `model/`, a checkpoint with `training_log.json`; with `lora` also
    `adapter/`. A run that has its log is finished, and the log is returned.

    Args:
        recipe: what to do.
        out: folder of this run.
        progress: whether to show progress bars.

    Returns:
        The training log: that of `run_stage`, and `evaluation` (losses and accuracies on validation pairs at the end),
        `scores` (split → exit → accuracy, precision, recall and F1 of `valid` and `test`), `recipe`, and `pairs`, the
        numbers of pairs by split.

    Raises:
        ValueError: the recipe contradicts itself, the model or the data, or `out` holds a run with another recipe.
    """
    out, state = Path(out), processes_of_run()
    config, arguments = _check(recipe, out, state.num_processes, progress)
    with state.main_process_first():
        open_run(out, recipe.to_dict(), "fine-tuning a classifier", until_trained=())
        if (out / LOG).is_file():
            return json.loads((out / LOG).read_text(encoding="utf-8"))
    model, tokenizer = _start(recipe)
    collator, splits = ClassificationCollator(tokenizer), _splits(recipe, tokenizer, progress and state.is_main_process)
    trainer = MultiExitTrainer(
        model if recipe.lora is None else add_adapters(model, recipe.lora),
        arguments,
        ClassificationObjective(),
        train_dataset=splits["train"],
        eval_dataset=splits["valid"],
        data_collator=collator,
        **recipe.trainer_options(),
    )
    log = train_to_the_end(trainer, out / "checkpoints", progress=progress)
    log |= {
        "evaluation": trainer.evaluate(),
        "recipe": recipe.to_dict(),
        "pairs": {split: len(rows) for split, rows in splits.items()},
    }
    model.config.unpad_inputs = config.unpad_inputs
    save_trained(trainer, tokenizer, out, None if recipe.lora is None else lambda: _start(recipe)[0])
    if state.is_main_process:
        saved = ModularStarEncoderForSequenceClassification.from_pretrained(out / MODEL).eval()
        saved.to("cuda" if torch.cuda.is_available() else "cpu")
        rows = arguments.per_device_eval_batch_size
        log["scores"] = {
            split: classification_scores(saved, DataLoader(splits[split], rows, collate_fn=collator), progress=progress)
            for split in ("valid", "test")
            if split in splits
        }
        write_json(out / LOG, finite(log))
    state.wait_for_everyone()
    return log


def _check(
    recipe: ClassificationRecipe, out: Path, processes: int, progress: bool
) -> tuple[ModularStarEncoderConfig, TrainingArguments]:
    """Refuse what can be told without data and weights; return the model's configuration and Trainer's arguments."""
    config, _ = starting_config(recipe)
    if recipe.max_tokens > config.max_position_embeddings:
        raise ValueError(
            f"max_tokens {recipe.max_tokens} must be at most the model's max_position_embeddings "
            f"{config.max_position_embeddings}."
        )
    exit_weights(recipe.exit_weights, config.exit_layers, config.parent_num_hidden_layers)
    rows, accumulation = recipe.accumulation(processes)
    options = {"gradient_accumulation_steps": accumulation}
    return config, recipe.arguments(out / "checkpoints", rows, progress=progress, **options)


def _start(
    recipe: ClassificationRecipe,
) -> tuple[ModularStarEncoderForSequenceClassification, PreTrainedTokenizerFast]:
    return starting_model(ModularStarEncoderForSequenceClassification, recipe)


def _splits(
    recipe: ClassificationRecipe, tokenizer: PreTrainedTokenizerFast, progress: bool
) -> dict[str, ClassificationRows]:
    """Tokenized pairs of each split, as many as the recipe wants."""
    wanted = {"train": recipe.samples, "valid": recipe.eval_samples, "test": recipe.eval_samples}
    return {
        split: ClassificationRows(
            pairs if wanted[split] is None else pairs.sample(wanted[split], recipe.seed),
            tokenizer,
            max_tokens=recipe.max_tokens,
            progress=progress,
        )
        for split, pairs in read_labelled_pairs(recipe.data).items()
    }
