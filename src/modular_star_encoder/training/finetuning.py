"""Fine-tuning for retrieval from a recipe: pairs → batches → model, restartable at every stage."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from modular_star_encoder.data.collators import RetrievalCollator
from modular_star_encoder.data.finetuning_rows import RetrievalBatches, RetrievalTexts
from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.data.splits import BatchPlan, PairGroups, RetrievalData, prepare_retrieval_data
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import held_out_tasks
from modular_star_encoder.inference.checkpoints import is_servable, load_checkpoint, write_sentence_transformer_files
from modular_star_encoder.inference.encoders import ExitEncoder
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.exit_losses import exit_weights
from modular_star_encoder.training.arguments import MultiExitTrainingArguments
from modular_star_encoder.training.clone_detection import finetune_classifier
from modular_star_encoder.training.preflight import FinetuningPreflight, finetuning_preflight
from modular_star_encoder.training.recipes import ClassificationRecipe, FinetuningRecipe, StartingRecipe
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
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import build_settings, read_mapping

logger = logging.get_logger(__name__)


def load_finetuning(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[StartingRecipe, Callable[..., dict[str, Any]]]:
    """Read a recipe of any `task`; the recipe, and the function that runs it: `run(recipe, out, progress=…)`.

    Arguments and errors as for `load_recipe`.
    """
    content = read_mapping(path, overrides, example=FinetuningRecipe.EXAMPLE)
    task = content.get("task", "retrieval")
    if task == "classification":
        return build_settings(ClassificationRecipe, content, str(path)), finetune_classifier
    if task == "retrieval":
        return build_settings(FinetuningRecipe, content, str(path)), finetune
    raise UserError("training.task", f"task must be retrieval or classification, not {task!r}.")


def finetune(
    recipe: FinetuningRecipe,
    out: str | os.PathLike[str],
    *,
    data: RetrievalData | None = None,
    progress: bool = True,
    announce: Callable[[FinetuningPreflight], None] = print,
) -> dict[str, Any]:
    """Fine-tune a model, continuing from anything that an earlier call with this recipe left in `out`.

    `out` gets `data/` (the rows, see `prepare_retrieval_data`), `checkpoints/`, and in the end `model/`, a checkpoint
    for `AutoModel` and, where its modules can compute the embeddings, `SentenceTransformer`, with `training_log.json`;
    with `lora` also `adapter/`, and `model/` has the merged weights. A run with a log is finished, and the log is
    returned. With several processes (`accelerate launch`, `torchrun`) each calls this.

    Args:
        recipe: the settings.
        out: folder of this run.
        data: prepared rows, in place of the recipe's `data`.
        progress: whether to show progress bars.
        announce: called with the estimated size of the run before anything is trained.

    Returns:
        The training log: that of `train_to_the_end`, and `evaluation` (losses and accuracies on held-out pairs at the
        end), `retrieval` (benchmark → retriever → estimates: every exit, and BM25, on `held_out_tasks`), `recipe`,
        `preflight` and `data`, the report of the rows that were read, skipped and held out.

    Raises:
        UserError: the recipe contradicts itself, the model or the data, or `out` holds a run with another recipe.
    """
    out, state = Path(out), processes_of_run()
    blueprint, arguments = check_recipe(recipe, out, state.num_processes, progress)
    with state.main_process_first():
        log = open_run(out, recipe, "fine-tuning", until_trained=("data", "eval_fraction", "max_train_samples", "seed"))
        if log is not None:
            return log
        data = data or prepare_data(recipe, out / "data", progress and state.is_main_process)
    model, tokenizer = starting_model(ModularStarEncoderForRetrieval, recipe)
    prompts = model.config.instruction_prompts
    train, unseen, groups, tokens = _batches(recipe, data, prompts, tokenizer, state.num_processes)
    adapted = model if recipe.lora is None else add_adapters(model, recipe.lora)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    estimate = finetuning_preflight(blueprint, recipe, state.num_processes, groups, tokens, trained)
    if state.is_main_process:
        announce(estimate)
    arguments.per_device_eval_batch_size = unseen.batch_size // state.num_processes
    trainer = MultiExitTrainer(
        adapted,
        arguments,
        ContrastiveObjective(recipe.objective),
        train_dataset=train,
        eval_dataset=unseen,
        data_collator=RetrievalCollator(tokenizer),
    )
    log = train_to_the_end(trainer, out / CHECKPOINTS, progress=progress)
    log |= {"evaluation": trainer.evaluate(), "recipe": recipe.to_dict(), "preflight": asdict(estimate)}
    model.config.unpad_inputs = blueprint.config.unpad_inputs
    save_trained(trainer, tokenizer, out, recipe)
    if state.is_main_process:
        if is_servable(model.config):
            prompts_of_files = sentence_transformer_prompts(instructions=prompts)
            write_sentence_transformer_files(out / MODEL, model.config, prompts_of_files)
        log |= {"data": data.report, "retrieval": _retrieval(recipe, data, out, progress)}
        write_log(out, log)
    state.wait_for_everyone()
    return log


def check_recipe(
    recipe: FinetuningRecipe, out: Path, processes: int, progress: bool
) -> tuple[ModularStarEncoderForRetrieval, MultiExitTrainingArguments]:
    """The model without weights and the trainer's arguments, after the checks that need neither data nor weights.

    Raises:
        UserError: the recipe contradicts itself or the model.
    """
    config, _ = starting_config(recipe)
    if not is_servable(config):
        logger.warning_once(
            "SentenceTransformer's modules cannot compute this model's embeddings (pooling, projection_order or "
            "embedding_normalization): it is saved for AutoModel alone."
        )
    with torch.device("meta"):
        model = ModularStarEncoderForRetrieval(config)
    finetuning_preflight(model, recipe, processes, {}, (0.0, 0.0))
    model.set_attn_implementation(recipe.attn_implementation)
    exit_weights(recipe.training["exit_weights"], config.exit_layers, config.parent_num_hidden_layers)
    recipe.objective.check(config.exit_layers, config.projection_size)
    if recipe.training["rotate_shallow_exits"]:
        recipe.objective.check_rotation(config.exit_layers)
    # Batches are planned: in this order, and each of them is a whole step.
    planned = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 1}
    rows = recipe.pairs_per_device(processes)
    return model, recipe.arguments(out / CHECKPOINTS, rows, progress=progress, **planned)


def prepare_data(recipe: FinetuningRecipe, folder: Path, progress: bool) -> RetrievalData:
    """The rows of a recipe; with `progress` the numbers of rows and of skipped rows are printed."""
    data = prepare_retrieval_data(
        recipe.data,
        folder,
        eval_fraction=recipe.eval_fraction,
        seed=recipe.seed,
        max_train_samples=recipe.max_train_samples,
        progress=progress,
    )
    if progress:
        for name, source in data.report["sources"].items():
            print(f"{name}: {source['rows']:,} rows")
            for reason, count in source["skipped"].items():
                example = source["examples"].get(reason)
                print(f"  skipped {count:,}: {reason}{f', for example {example}' if example else ''}")
        print(f"{data.report['train']:,} rows to train on, {data.report['held_out']:,} held out")
    return data


def _batches(
    recipe: FinetuningRecipe,
    data: RetrievalData,
    prompts: bool,
    tokenizer: PreTrainedTokenizerFast,
    processes: int,
) -> tuple[RetrievalBatches, RetrievalBatches, Mapping[str, int], tuple[float, float]]:
    """Batches to train on and of every evaluation, groups of each kind of pairs, mean tokens of texts and of code."""
    lengths = {"max_text_tokens": recipe.max_text_tokens, "max_code_tokens": recipe.max_code_tokens}
    train, held_out = (
        RetrievalTexts(texts, tokenizer, prompts=prompts, progress=False, **lengths)
        for texts in (data.train, data.held_out)
    )
    groups, held_out_groups = PairGroups(data.train), PairGroups(held_out.texts)
    plan = BatchPlan(groups, recipe.batch_size, recipe.seed)
    # Batches of an evaluation are as large as those of training if there are as many rows.
    most = min(recipe.batch_size, held_out_groups.largest_batch)
    size = most // (2 * processes) * 2 * processes
    if not size:
        raise UserError(
            "training.held_out.too_few",
            f"At most {most} held-out rows fit into one batch, too few for {processes} processes. Raise eval_fraction, "
            "or add data.",
        )
    unseen = BatchPlan(held_out_groups, size, recipe.seed + 1)
    return (
        RetrievalBatches(train, plan, recipe.max_steps, identifier_rename_prob=recipe.identifier_rename_prob),
        RetrievalBatches(held_out, unseen, max(1, recipe.eval_pairs // size)),
        groups.counts,
        train.mean_tokens(),
    )


def checkpoint_encoder(recipe: FinetuningRecipe, checkpoint: Path) -> ExitEncoder:
    """The encoder of a checkpoint that a recipe trained, at every exit, for texts as long as in training."""
    model, tokenizer = load_checkpoint(checkpoint)
    longest = max(recipe.max_text_tokens, recipe.max_code_tokens)
    return ExitEncoder(model, tokenizer, checkpoint.parent.name, max_length=longest)


def _retrieval(recipe: FinetuningRecipe, data: RetrievalData, out: Path, progress: bool) -> Mapping[str, Any]:
    """Benchmark → retriever → estimates of BM25 and the saved model's exits on the held-out rows."""
    encoder = checkpoint_encoder(recipe, out / MODEL)
    tasks = held_out_tasks(data.held_out, limit=recipe.eval_pairs, seed=recipe.seed)
    found: dict[str, Any] = {task.benchmark: {"queries": len(task.queries)} for task in tasks}
    for result in evaluate_tasks(tasks, [BM25(), EmbeddingRetriever(encoder)], progress=progress):
        name = result.retriever if result.exit_layer is None else f"exit {result.exit_layer}"
        found[result.benchmark][name] = {metric: asdict(estimate) for metric, estimate in result.estimates.items()}
    return found
