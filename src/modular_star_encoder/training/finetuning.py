"""Fine-tuning for retrieval from a recipe: pairs → batches → model, restartable at every stage."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers.utils import logging

from modular_star_encoder.data.batch_plan import BatchPlan, PairGroups
from modular_star_encoder.data.pairs import RetrievalExample
from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.data.retrieval import RetrievalBatches, RetrievalCollator, RetrievalTexts
from modular_star_encoder.data.retrieval_data import RetrievalData, prepare_retrieval_data
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import RetrievalTask, TaskResult, held_out_tasks
from modular_star_encoder.inference.checkpoints import is_servable, write_sentence_transformer_files
from modular_star_encoder.inference.encoders import ExitEncoder
from modular_star_encoder.inference.load import load_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.exit_losses import exit_weights
from modular_star_encoder.training.preflight import FinetuningPreflight, finetuning_preflight
from modular_star_encoder.training.recipes import LOG, FinetuningRecipe, finite, open_run, processes_of_run
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

logger = logging.get_logger(__name__)


def finetune(
    recipe: FinetuningRecipe,
    out: str | os.PathLike,
    *,
    data: RetrievalData | None = None,
    progress: bool = True,
    announce: Callable[[FinetuningPreflight], None] = print,
) -> dict[str, Any]:
    """Fine-tune a model, continuing whatever an earlier call with this recipe left in `out`.

    `out` gets `data/` (the rows, see `prepare_retrieval_data`), `checkpoints/`, and in the end `model/`, a checkpoint
    for `AutoModel` and, where its modules can compute the embeddings, `SentenceTransformer`, with `training_log.json`;
    with `lora` also `adapter/`, and `model/` holds the merged weights. A run that has its log is finished, and the log
    is returned. With several processes (`accelerate launch`, `torchrun`) each calls this.

    Args:
        recipe: what to do.
        out: folder of this run.
        data: rows that were prepared before, in place of the recipe's `data`.
        progress: whether to show progress bars.
        announce: called with the estimate of what the run will take, before anything is trained.

    Returns:
        The training log: that of `run_stage`, and `evaluation` (losses and accuracies on held-out pairs at the end),
        `retrieval` (benchmark → system → figures: every exit, and BM25, on `held_out_tasks`), `recipe`, `preflight`
        and `data`, the report of what was read, skipped and held out.

    Raises:
        ValueError: the recipe contradicts itself, the model or the data, or `out` holds a run with another recipe.
    """
    out, state = Path(out), processes_of_run()
    blueprint, arguments = check_recipe(recipe, out, state.num_processes, progress)
    with state.main_process_first():
        settings = recipe.to_dict()
        open_run(out, settings, "fine-tuning", until_trained=("data", "held_out_share", "samples", "seed"))
        if (out / LOG).is_file():
            return json.loads((out / LOG).read_text(encoding="utf-8"))
        data = data or prepare_data(recipe, out / "data", progress and state.is_main_process)
    model, tokenizer = _model(recipe)
    train, held_out = (_texts(recipe, model, texts, tokenizer) for texts in (data.train, data.held_out))
    groups = PairGroups(data.train)
    batches = RetrievalBatches(
        train,
        BatchPlan(groups, recipe.batch_size, recipe.seed),
        recipe.steps,
        identifier_rename_prob=recipe.renamed_share,
    )
    unseen = _held_out_batches(recipe, held_out, state.num_processes)
    adapted = model if recipe.lora is None else add_adapters(model, recipe.lora)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    estimate = finetuning_preflight(blueprint, recipe, state.num_processes, groups.counts, train.mean_tokens(), trained)
    if state.is_main_process:
        announce(estimate)
    arguments.per_device_eval_batch_size = unseen.batch_size // state.num_processes
    trainer = MultiExitTrainer(
        adapted,
        arguments,
        ContrastiveObjective(recipe.contrastive()),
        train_dataset=batches,
        eval_dataset=unseen,
        data_collator=RetrievalCollator(tokenizer),
        **recipe.trainer_options(),
    )
    log = train_to_the_end(trainer, out / "checkpoints", progress=progress)
    log |= {"evaluation": trainer.evaluate(), "recipe": settings, "preflight": asdict(estimate), "data": data.report}
    model.config.unpad_inputs = blueprint.config.unpad_inputs
    save_trained(trainer, tokenizer, out, None if recipe.lora is None else lambda: _model(recipe)[0])
    if state.is_main_process:
        if is_servable(model.config):
            prompts = sentence_transformer_prompts(instructions=model.config.instruction_prompts)
            write_sentence_transformer_files(out / MODEL, model.config, prompts)
        log["retrieval"] = _retrieval(recipe, data, out, progress)
        write_json(out / LOG, finite(log))
    state.wait_for_everyone()
    return log


def check_recipe(
    recipe: FinetuningRecipe, out: Path, processes: int, progress: bool
) -> tuple[ModularStarEncoderForRetrieval, TrainingArguments]:
    """Refuse what can be told without data and weights; return the model without weights, and Trainer's arguments.

    Raises:
        ValueError: the recipe contradicts itself or the model.
    """
    config, _ = starting_config(recipe)
    if not is_servable(config):
        logger.warning_once(
            "SentenceTransformers' modules can't compute this model's embeddings (pooling, projection_order or "
            "embedding_normalization): it will be saved for AutoModel alone."
        )
    with torch.device("meta"):
        model = ModularStarEncoderForRetrieval(config)
    finetuning_preflight(model, recipe, processes, {}, (0.0, 0.0))
    model.set_attn_implementation(recipe.attn_implementation)
    exit_weights(recipe.exit_weights, config.exit_layers, config.parent_num_hidden_layers)
    recipe.contrastive().check(config.exit_layers, config.projection_size)
    if recipe.rotate_shallow_exits:
        recipe.contrastive().check_rotation(config.exit_layers)
    schedule = {"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule)
    rows = recipe.pairs_per_device(processes)
    # Batches are planned: in this order, and each of them is a whole step.
    planned = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 1}
    options = {"lr_scheduler_type": schedule, **planned}
    return model, recipe.arguments(out / "checkpoints", rows, progress=progress, **options)


def prepare_data(recipe: FinetuningRecipe, folder: Path, progress: bool) -> RetrievalData:
    """The rows of a recipe, and with `progress` what was skipped; see `prepare_retrieval_data`."""
    data = prepare_retrieval_data(
        recipe.data,
        folder,
        eval_fraction=recipe.held_out_share,
        seed=recipe.seed,
        max_train_samples=recipe.samples,
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


def _model(recipe: FinetuningRecipe) -> tuple[ModularStarEncoderForRetrieval, PreTrainedTokenizerFast]:
    return starting_model(ModularStarEncoderForRetrieval, recipe)


def _texts(
    recipe: FinetuningRecipe,
    model: ModularStarEncoderForRetrieval,
    texts: list[RetrievalExample],
    tokenizer: PreTrainedTokenizerFast,
) -> RetrievalTexts:
    return RetrievalTexts(
        texts,
        tokenizer,
        max_text_tokens=recipe.max_text_tokens,
        max_code_tokens=recipe.max_code_tokens,
        prompts=model.config.instruction_prompts,
        progress=False,
    )


def _held_out_batches(recipe: FinetuningRecipe, held_out: RetrievalTexts, processes: int) -> RetrievalBatches:
    """The batches of one evaluation, the same at every step, as large as those of training if there are as many."""
    groups = PairGroups(held_out.texts)
    most = min(recipe.batch_size, groups.largest_batch)
    size = most // (2 * processes) * 2 * processes
    if not size:
        raise ValueError(
            f"Of the held-out rows at most {most} can stand in one batch; that is too few for {processes} processes. "
            "Raise held_out_share, or add data."
        )
    plan = BatchPlan(groups, size, recipe.seed + 1)
    return RetrievalBatches(held_out, plan, max(1, recipe.eval_pairs // size))


def evaluate_checkpoint(
    recipe: FinetuningRecipe,
    checkpoint: Path,
    tasks: Sequence[RetrievalTask],
    *,
    out: Path | None = None,
    progress: bool = True,
) -> list[TaskResult]:
    """Every exit of a checkpoint on tasks, with texts as long as in training.

    Args:
        recipe: what the checkpoint was trained by.
        checkpoint: its folder.
        tasks: what is measured.
        out: folder that keeps finished figures; see `evaluate_tasks`.
        progress: whether to show progress bars.
    """
    model, tokenizer = load_checkpoint(checkpoint)
    longest = max(recipe.max_text_tokens, recipe.max_code_tokens)
    encoder = ExitEncoder(model, tokenizer, checkpoint.parent.name, max_length=longest)
    return evaluate_tasks(tasks, [EmbeddingRetriever(encoder)], out=out, progress=progress)


def _retrieval(recipe: FinetuningRecipe, data: RetrievalData, out: Path, progress: bool) -> dict[str, Any]:
    """Figures of the saved model's exits and of BM25 on the held-out rows, by task and system."""
    tasks = held_out_tasks(data.held_out, limit=recipe.eval_pairs, seed=recipe.seed)
    cells = evaluate_tasks(tasks, [BM25()], progress=progress)
    cells += evaluate_checkpoint(recipe, out / MODEL, tasks, progress=progress)
    found: dict[str, Any] = {task.benchmark: {"queries": len(task.queries)} for task in tasks}
    for cell in cells:
        name = cell.retriever if cell.exit_layer is None else f"exit {cell.exit_layer}"
        found[cell.benchmark][name] = {metric: asdict(figure) for metric, figure in cell.estimates.items()}
    return found
