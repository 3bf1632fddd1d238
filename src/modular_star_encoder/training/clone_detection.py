"""Fine-tuning for clone detection from a recipe, at every exit; restartable."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from modular_star_encoder.data.collators import ClassificationCollator
from modular_star_encoder.data.finetuning_rows import ClassificationRows
from modular_star_encoder.data.pairs import read_labelled_pairs
from modular_star_encoder.evaluation.run import classification_scores
from modular_star_encoder.modeling import ModularStarEncoderForSequenceClassification
from modular_star_encoder.objectives.classification import ClassificationObjective
from modular_star_encoder.objectives.exit_losses import exit_weights
from modular_star_encoder.training.preflight import check_length
from modular_star_encoder.training.recipes import ClassificationRecipe
from modular_star_encoder.training.runs import (
    CHECKPOINTS,
    MODEL,
    open_run,
    processes_of_run,
    train_to_the_end,
    write_log,
)
from modular_star_encoder.training.starting_points import add_adapters, save_trained, starting_config, starting_model
from modular_star_encoder.training.trainer import MultiExitTrainer


def finetune_classifier(
    recipe: ClassificationRecipe, out: str | os.PathLike[str], *, progress: bool = True
) -> dict[str, Any]:
    """Train a classifier of pairs, continuing from anything that an earlier call with this recipe left in `out`.

    `out` gets `checkpoints/` and in the end `model/`, a checkpoint with `training_log.json`; with `lora` also
    `adapter/`. A run with a log is finished, and the log is returned.

    Args:
        recipe: the settings.
        out: folder of this run.
        progress: whether to show progress bars.

    Returns:
        The training log: that of `train_to_the_end`, and `evaluation` (losses and accuracies on validation pairs at the
        end), `scores` (split → exit → accuracy, precision, recall and F1 of `valid` and `test`), `recipe`, and `pairs`,
        the numbers of pairs by split.

    Raises:
        UserError: the recipe contradicts itself, the model or the data, or `out` holds a run with another recipe.
    """
    out, state = Path(out), processes_of_run()
    config, _ = starting_config(recipe)
    check_length(config, max_tokens=recipe.max_tokens)
    exit_weights(recipe.training["exit_weights"], config.exit_layers, config.parent_num_hidden_layers)
    rows, accumulation = recipe.accumulation(state.num_processes)
    arguments = recipe.arguments(out / CHECKPOINTS, rows, progress=progress, gradient_accumulation_steps=accumulation)
    with state.main_process_first():
        log = open_run(out, recipe, "fine-tuning a classifier", until_trained=())
        if log is not None:
            return log
    model, tokenizer = starting_model(ModularStarEncoderForSequenceClassification, recipe)
    collator = ClassificationCollator(tokenizer)
    limits: dict[str, Any] = {
        "train": recipe.max_train_samples,
        "valid": recipe.max_eval_samples,
        "test": recipe.max_eval_samples,
    }
    options: dict[str, Any] = {"max_tokens": recipe.max_tokens, "progress": progress and state.is_main_process}
    splits = {
        split: ClassificationRows(
            pairs if limits[split] is None else pairs.sample(limits[split], recipe.seed), tokenizer, **options
        )
        for split, pairs in read_labelled_pairs(recipe.data).items()
    }
    trainer = MultiExitTrainer(
        model if recipe.lora is None else add_adapters(model, recipe.lora),
        arguments,
        ClassificationObjective(),
        train_dataset=splits["train"],
        eval_dataset=splits["valid"],
        data_collator=collator,
    )
    log = train_to_the_end(trainer, out / CHECKPOINTS, progress=progress)
    log |= {
        "evaluation": trainer.evaluate(),
        "recipe": recipe.to_dict(),
        "pairs": {split: len(pairs) for split, pairs in splits.items()},
    }
    model.config.unpad_inputs = config.unpad_inputs
    save_trained(trainer, tokenizer, out, recipe)
    if state.is_main_process:
        saved = ModularStarEncoderForSequenceClassification.from_pretrained(out / MODEL).eval()
        saved.to("cuda" if torch.cuda.is_available() else "cpu")
        log["scores"] = {
            split: classification_scores(saved, DataLoader(splits[split], rows, collate_fn=collator), progress=progress)
            for split in ("valid", "test")
            if split in splits
        }
        write_log(out, log)
    state.wait_for_everyone()
    return log
