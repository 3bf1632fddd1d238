"""Fine-tune a model from a recipe, for retrieval or clone detection. An interrupted run can be continued."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.utils import logging

from modular_star_encoder.data.collators import ClassificationCollator, RetrievalCollator
from modular_star_encoder.data.finetuning_rows import ClassificationRows, RetrievalBatches, RetrievalTexts
from modular_star_encoder.data.pairs import read_labelled_pairs
from modular_star_encoder.data.splits import (
    BatchPlan,
    PairGroups,
    RetrievalData,
    evaluation_plan,
    prepare_retrieval_data,
    store_retrieval_data,
)
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.report import make_report
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import classification_scores, evaluate_tasks
from modular_star_encoder.evaluation.tasks import held_out_tasks
from modular_star_encoder.inference.checkpoints import checkpoint_checksum, is_servable, load_checkpoint
from modular_star_encoder.inference.encoders import ExitEncoder
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval, ModularStarEncoderForSequenceClassification
from modular_star_encoder.objectives.exit_losses import ClassificationObjective
from modular_star_encoder.training import find_recipe, runs
from modular_star_encoder.training.distilling import load_teacher, teach, teaching_checksums, unpaired_texts
from modular_star_encoder.training.recipes import ClassificationRecipe, FinetuningRecipe, StartingRecipe
from modular_star_encoder.training.starting_points import StartingPoint, add_adapters
from modular_star_encoder.training.trainer import MultiExitTrainer, check_objective
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_text
from modular_star_encoder.utils.settings import load_settings, read_mapping

logger = logging.get_logger(__name__)


def load_finetuning(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[StartingRecipe, Callable[..., dict[str, Any]]]:
    """Read a fine-tuning recipe (see `load_recipe`); return the recipe and the function that runs this recipe."""
    path = find_recipe(os.fspath(path), "finetune")
    task = read_mapping(path, overrides).get("task", "retrieval")
    if task == "retrieval":
        return load_settings(FinetuningRecipe, path, overrides), finetune
    if task == "classification":
        return load_settings(ClassificationRecipe, path, overrides), finetune_classifier
    raise UserError("training.task", f"The recipe's `task` must be retrieval or classification, not {task!r}.")


def finetune(
    recipe: FinetuningRecipe,
    out: str | os.PathLike[str],
    *,
    data: RetrievalData | None = None,  # prepared rows, in place of the recipe's `data`
    progress: bool = True,
    announce: Callable[[runs.Preflight], None] = print,  # called with the size of the run before it begins
    before: bool = True,  # whether to evaluate the model also before training
) -> dict[str, Any]:
    """Fine-tune a model for retrieval, or continue an interrupted run of the recipe in `out`; return the training log.

    `out` gets `data/`, `checkpoints/`, and at the end `report.md` (scores of all exits), `model/` (with the training
    log), and with `lora` also `adapter/`. With several processes, every process calls this function.
    """
    out, state = Path(out), runs.processes_of_run()
    processes, shown = state.num_processes, progress and state.is_main_process
    teaching, longest = recipe.distillation, max(recipe.lengths().values())
    # Run all checks that need neither data nor weights before reading them.
    start = StartingPoint(ModularStarEncoderForRetrieval, recipe)
    arguments = recipe.arguments(out / runs.CHECKPOINTS, processes, progress=progress)
    objective = recipe.make_objective()
    check_objective(objective, arguments, start.config, start.config.exit_layers)
    if not is_servable(start.config):
        message = "SentenceTransformer's modules cannot compute this model's embeddings because of its pooling, "
        message += "projection_order or embedding_normalization. The model is saved for AutoModel alone."
        logger.warning_once(message)
    run = runs.Run(out, recipe, "fine-tuning", until_trained=("data", *recipe.rows()))
    if run.log is not None:
        return run.log
    teacher = None if teaching is None else load_teacher(teaching, start.config.projection_size)
    with state.main_process_first():
        unpaired = unpaired_texts(teaching)
    run.check_start(teaching_checksums(teaching, unpaired))
    model, tokenizer = start.load()
    trained = add_adapters(model, recipe.lora)
    with state.main_process_first():
        rows = data or prepare_retrieval_data(folder=out / "data", progress=shown, store=False, **recipe.rows())
        groups, unseen = PairGroups(rows.train), PairGroups(rows.held_out)
        plan = BatchPlan(groups, recipe.batch_size, recipe.seed)
        sizes = (recipe.batch_size, recipe.eval_pairs, processes)
        eval_plan, eval_steps = evaluation_plan(unseen, *sizes, recipe.seed + 1)
        options: dict[str, Any] = {"prompts": model.config.instruction_prompts, "progress": False, **recipe.lengths()}
        texts, unseen_texts = (RetrievalTexts(part, tokenizer, **options) for part in (rows.train, rows.held_out))
        train = RetrievalBatches(texts, plan, recipe.max_steps, identifier_rename_prob=recipe.identifier_rename_prob)
        held_out = RetrievalBatches(unseen_texts, eval_plan, eval_steps)
        estimate = runs.finetuning_preflight(model, recipe, processes, groups.counts, texts.mean_tokens())
        if state.is_main_process:
            run.begin()
            announce(estimate)
            if data is None:
                store_retrieval_data(rows, out / "data")
    arguments.per_device_eval_batch_size = held_out.batch_size // processes
    batches: tuple[Any, Any, dict[str, Any]] = (train, held_out, {})
    if teaching and teacher:
        with state.main_process_first():
            batches = teach(teaching, teacher, model, tokenizer, train, held_out, unpaired, longest, shown)
    datasets: dict[str, Any] = {"train_dataset": batches[0], "eval_dataset": batches[1]}
    trainer = MultiExitTrainer(trained, arguments, objective, data_collator=RetrievalCollator(tokenizer), **datasets)
    log = runs.train_to_the_end(trainer, out / runs.CHECKPOINTS, progress=progress)
    tasks = held_out_tasks(rows.held_out, limit=recipe.eval_pairs, seed=recipe.seed)
    if shown:
        count = sum(len(task.queries) for task in tasks)
        what = f"{count:,} pairs of texts of at most {longest} tokens, at {len(start.config.exit_layers)} exits"
        what += ", before and after training" * before
        print(runs.evaluation_notice(log, what, (len(held_out) + count * (1 + before)) / recipe.batch_size))
    log |= {"evaluation": runs.final_metrics(trainer), "recipe": run.settings}
    log |= {"preflight": asdict(estimate), **batches[2]}
    start.save(trainer, out)
    if state.is_main_process:
        models: dict[str, tuple[Any, Any]] = {"trained": load_checkpoint(out / runs.MODEL)}
        models |= {"before training": start.load()} if before else {}
        encoders = [exit_encoder(*loaded, name, longest) for name, loaded in models.items()]
        results = evaluate_tasks(tasks, [*map(EmbeddingRetriever, encoders), BM25()], progress=progress)
        checksum, first = checkpoint_checksum(out / runs.MODEL), "before training" if before else None
        report = make_report(tasks, results, checksum=checksum, before=first)
        write_text(out / runs.REPORT, report.to_markdown())
        log |= {"data": rows.report, "retrieval": report.to_dict()}
        run.end(log)
    state.wait_for_everyone()
    return log


def exit_encoder(model: Any, tokenizer: Any, name: str, max_length: int) -> ExitEncoder:
    """Move a model to the GPU, or to the CPU if there is no GPU; return an `ExitEncoder` for all exits of the model."""
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return ExitEncoder(model, tokenizer, name, max_length=max_length)


def finetune_classifier(
    recipe: ClassificationRecipe, out: str | os.PathLike[str], *, progress: bool = True
) -> dict[str, Any]:
    """Train a classifier of pairs of code snippets, or continue the interrupted run in `out`; return the log."""
    out, state, objective = Path(out), runs.processes_of_run(), ClassificationObjective()
    start = StartingPoint(ModularStarEncoderForSequenceClassification, recipe)
    arguments = recipe.arguments(out / runs.CHECKPOINTS, state.num_processes, progress=progress)
    check_objective(objective, arguments, start.config, start.config.exit_layers)
    run = runs.Run(out, recipe, "fine-tuning a classifier")
    if run.log is not None:
        return run.log
    model, tokenizer = start.load()
    splits, digest = {}, hashlib.sha256()
    for split, pairs in read_labelled_pairs(recipe.data).items():
        setting = "max_train_samples" if split == "train" else "max_eval_samples"
        limit = getattr(recipe, setting)
        chosen = pairs if limit is None else pairs.sample(limit, recipe.seed)
        shown = progress and state.is_main_process
        if shown:
            counts = f"{len(chosen):,} rows, of which {chosen.labels.sum():,} have label 1"
            left_out = f", {len(pairs) - len(chosen):,} left out (beyond {setting}={limit})"
            print(f"{split}: {counts}{left_out if len(chosen) < len(pairs) else ''}")
        for part in (repr(chosen.codes).encode(), chosen.pairs.tobytes(), chosen.labels.tobytes()):
            digest.update(part)
        splits[split] = ClassificationRows(chosen, tokenizer, max_tokens=recipe.max_tokens, progress=shown)
    run.check_start({"data_checksum": digest.hexdigest()})
    if state.is_main_process:
        run.begin()
    collator, model = ClassificationCollator(tokenizer), add_adapters(model, recipe.lora)
    datasets: dict[str, Any] = {"train_dataset": splits["train"], "eval_dataset": splits["valid"]}
    trainer = MultiExitTrainer(model, arguments, objective, data_collator=collator, **datasets)
    log = runs.train_to_the_end(trainer, out / runs.CHECKPOINTS, progress=progress)
    if progress and state.is_main_process:
        count = sum(len(one) for split, one in splits.items() if split != "train")
        what, rows = f"{count:,} pairs at {len(start.config.exit_layers)} exits", count + len(splits["valid"])
        print(runs.evaluation_notice(log, what, rows / recipe.batch_size))
    log |= {"evaluation": runs.final_metrics(trainer), "recipe": run.settings}
    log["pairs"] = {split: len(pairs) for split, pairs in splits.items()}
    start.save(trainer, out)
    if state.is_main_process:
        saved = ModularStarEncoderForSequenceClassification.from_pretrained(out / runs.MODEL).eval()
        saved.to("cuda" if torch.cuda.is_available() else "cpu")
        log["scores"] = {}
        for split in [name for name in splits if name != "train"]:
            loader = DataLoader(splits[split], arguments.per_device_train_batch_size, collate_fn=collator)
            log["scores"][split] = classification_scores(saved, loader, progress=progress)
        run.end(log)
    state.wait_for_everyone()
    return log
