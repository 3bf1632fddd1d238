"""Fine-tuning from a recipe, for retrieval or clone detection: data → batches → model, restartable at every stage."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from modular_star_encoder.data.collators import ClassificationCollator, RetrievalCollator
from modular_star_encoder.data.finetuning_rows import ClassificationRows, RetrievalBatches, RetrievalTexts
from modular_star_encoder.data.pairs import read_labelled_pairs
from modular_star_encoder.data.splits import (
    CODE_TO_CODE,
    TEXT_TO_CODE,
    BatchPlan,
    PairGroups,
    RetrievalData,
    prepare_retrieval_data,
    store_retrieval_data,
)
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.report import Report, make_report
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import classification_scores, evaluate_tasks
from modular_star_encoder.evaluation.tasks import RetrievalTask, held_out_tasks
from modular_star_encoder.inference.checkpoints import checkpoint_checksum, is_servable, load_checkpoint
from modular_star_encoder.inference.encoders import ExitEncoder
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval, ModularStarEncoderForSequenceClassification
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.distillation import DistillationObjective
from modular_star_encoder.objectives.exit_losses import ClassificationObjective
from modular_star_encoder.training import find_recipe, runs
from modular_star_encoder.training.arguments import MultiExitTrainingArguments
from modular_star_encoder.training.distilling import load_teacher, teach
from modular_star_encoder.training.recipes import ClassificationRecipe, FinetuningRecipe, StartingRecipe, check_length
from modular_star_encoder.training.starting_points import (
    add_adapters,
    save_trained,
    starting_config,
    starting_model,
)
from modular_star_encoder.training.trainer import MultiExitTrainer, check_objective
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import build_settings, read_mapping

logger = logging.get_logger(__name__)


def load_finetuning(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[StartingRecipe, Callable[..., dict[str, Any]]]:
    """Read a fine-tuning recipe; return it and the function for its task, `finetune` or `finetune_classifier`.

    Arguments and errors are those of `load_recipe`.
    """
    path = find_recipe(os.fspath(path), "finetune")
    content = read_mapping(path, overrides)
    task = content.get("task", "retrieval")
    if task == "retrieval":
        return build_settings(FinetuningRecipe, content, str(path)), finetune
    if task == "classification":
        return build_settings(ClassificationRecipe, content, str(path)), finetune_classifier
    raise UserError("training.task", f"`task` must be retrieval or classification, not {task!r}.")


def finetune(
    recipe: FinetuningRecipe,
    out: str | os.PathLike[str],
    *,
    data: RetrievalData | None = None,
    progress: bool = True,
    announce: Callable[[runs.Preflight], None] = print,
    before: bool = True,
) -> dict[str, Any]:
    """Fine-tune a model for retrieval; continue from the files that an earlier call with this recipe left in `out`.

    If the recipe has `distillation`, every exit also learns the vectors of a teacher.

    `out` gets `data/` (the rows, see `prepare_retrieval_data`), `checkpoints/`, and at the end `model/` with
    `training_log.json`. `model/` is a checkpoint for `AutoModel`, and for `SentenceTransformer` if its modules can
    compute the embeddings. With `lora`, `model/` has the merged weights, and `adapter/` the adapters. If `out` already
    has a log, the run is finished and the log is returned.

    With several processes (`accelerate launch`, `torchrun`), every process calls this function. UserError if the recipe
    contradicts itself, the model or the data, or `out` holds a run with another recipe.

    Args:
        recipe: the settings.
        out: folder of this run.
        data: prepared rows, in place of the recipe's `data`.
        progress: whether to show progress bars.
        announce: called with the estimated size of the run before anything is trained.
        before: whether to evaluate also the model as it is before training.

    Returns:
        The training log: the keys of `train_to_the_end`, `evaluation` (final losses and accuracies on held-out pairs),
        `retrieval` (the report on held-out rows, see `Report.to_dict`: the exits of the trained model and of the model
        before training, and BM25), `recipe`, `preflight`, `data` (numbers of rows read, skipped and held out) and, if
        a teacher's vectors are centred, `teacher_means` (see `teach`).
    """
    out, state = Path(out), runs.processes_of_run()
    rows, processes, stored = recipe.rows(), state.num_processes, data is None
    shown = progress and state.is_main_process
    eval_pairs, seed, longest, teaching = (
        recipe.eval_pairs,
        recipe.seed,
        max(recipe.lengths().values()),
        recipe.distillation,
    )
    objective = objective_of(recipe)
    blueprint, arguments = check_recipe(recipe, out, processes, progress, objective)
    if log := runs.open_run(out, recipe, "fine-tuning", until_trained=("data", *rows)):
        return log
    teacher = None if teaching is None else load_teacher(teaching, blueprint.config.projection_size)
    start = partial(starting_model, ModularStarEncoderForRetrieval, recipe)
    model, tokenizer = start()
    adapted = model if recipe.lora is None else add_adapters(model, recipe.lora)
    with state.main_process_first():
        data = data or prepare_data(rows, out / "data", shown, store=False)
        train, held_out, groups, tokens = _batches(recipe, data, model, tokenizer, processes)
        estimate = finetuning_preflight(model, recipe, processes, groups, tokens)
        if state.is_main_process:
            runs.begin_run(out, recipe)
            announce(estimate)
            if stored:
                store_retrieval_data(data, out / "data")
    arguments.per_device_eval_batch_size = held_out.batch_size // processes
    batches: tuple[Any, Any, dict[str, Any]] = (train, held_out, {})
    if teaching and teacher:
        with state.main_process_first():
            batches = teach(teaching, teacher, model, tokenizer, train, held_out, longest, shown)
    trainer = MultiExitTrainer(
        adapted,
        arguments,
        objective,
        train_dataset=batches[0],
        eval_dataset=batches[1],
        data_collator=RetrievalCollator(tokenizer),
    )
    log = runs.train_to_the_end(trainer, out / runs.CHECKPOINTS, progress=progress)
    log |= {"evaluation": trainer.evaluate(), "recipe": recipe.to_dict(), "preflight": asdict(estimate)} | batches[2]
    model.config.unpad_inputs = blueprint.config.unpad_inputs
    save_trained(trainer, out, recipe)
    if state.is_main_process:
        models = {"trained": partial(load_checkpoint, out / runs.MODEL)} | (
            {"before training": start} if before else {}
        )
        tasks = held_out_tasks(data.held_out, limit=eval_pairs, seed=seed)
        report = evaluate_exits(tasks, models, longest, progress)
        log |= {
            "data": data.report,
            "retrieval": replace(report, checksum=checkpoint_checksum(out / runs.MODEL)).to_dict(),
        }
        runs.write_log(out, log)
    state.wait_for_everyone()
    return log


def evaluate_exits(
    tasks: Sequence[RetrievalTask], models: Mapping[str, Callable[[], tuple[Any, Any]]], longest: int, progress: bool
) -> Report:
    """Evaluate BM25 and every exit of some models; `models` has a function for each that loads model and tokenizer."""
    encoders = [exit_encoder(*load(), name, longest) for name, load in models.items()]
    results = evaluate_tasks(tasks, [*map(EmbeddingRetriever, encoders), BM25()], progress=progress)
    return make_report(tasks, results)


def objective_of(recipe: FinetuningRecipe) -> ContrastiveObjective:
    """Return a recipe's objective: `DistillationObjective` if it has a teacher, otherwise `ContrastiveObjective`."""
    if recipe.distillation is None:
        return ContrastiveObjective(recipe.objective)
    return DistillationObjective(recipe.distillation, recipe.objective)


def check_recipe(
    recipe: FinetuningRecipe, out: Path, processes: int, progress: bool, objective: ContrastiveObjective
) -> tuple[ModularStarEncoderForRetrieval, MultiExitTrainingArguments]:
    """Return the model of a recipe, without weights (on the meta device), and the trainer's arguments.

    UserError if the recipe does not fit the model. All checks that need neither data nor weights are made here.
    """
    config = starting_config(recipe)
    check_length(config, **recipe.lengths())
    with torch.device("meta"):
        model = ModularStarEncoderForRetrieval(config)
    model.set_attn_implementation(recipe.attn_implementation)
    # Batches are planned: the trainer must keep their order and take one batch per step.
    planned = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 1}
    rows = recipe.pairs_per_device(processes)
    arguments = recipe.arguments(out / runs.CHECKPOINTS, rows, progress=progress, **planned)
    check_objective(objective, arguments, config, config.exit_layers)
    if not is_servable(config):
        logger.warning_once(
            "SentenceTransformer's modules cannot compute this model's embeddings because of its pooling, "
            "projection_order or embedding_normalization. The model is saved for AutoModel alone."
        )
    return model, arguments


def exit_encoder(model: Any, tokenizer: Any, name: str, max_length: int) -> ExitEncoder:
    """Return an encoder for every exit of a model, on a GPU if there is one."""
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return ExitEncoder(model, tokenizer, name, max_length=max_length)


def prepare_data(rows: Mapping[str, Any], folder: Path, progress: bool, *, store: bool = True) -> RetrievalData:
    """Return the data that `prepare_retrieval_data` makes of `rows`, its arguments (see `FinetuningRecipe.rows`).

    With `progress`, also print how many rows each source has, and how many are skipped and why.
    """
    data = prepare_retrieval_data(folder=folder, progress=progress, store=store, **rows)
    if progress:
        for name, source in data.report["sources"].items():
            print(f"{name}: {source['rows']:,} rows")
            if name == "pairs":
                columns = [f"{role}: {name}" for role, name in rows["settings"][name]["columns"].items() if name]
                print(f"  columns {', '.join(columns)}; to change them: data.columns={{query: NAME, positive: NAME}}")
            for reason, count in source["skipped"].items():
                print(f"  skipped {count:,}: {reason}")
                for example in source["examples"].get(reason, ()):
                    print(f"    {example}")
        print(f"{data.report['train']:,} rows to train on, {data.report['held_out']:,} held out")
    return data


def _batches(
    recipe: FinetuningRecipe,
    data: RetrievalData,
    model: ModularStarEncoderForRetrieval,
    tokenizer: PreTrainedTokenizerFast,
    processes: int,
) -> tuple[RetrievalBatches, RetrievalBatches, Mapping[str, int], tuple[float, float]]:
    """Return training and evaluation batches, numbers of groups (see `Preflight`), and mean tokens of text and code."""
    groups, held_out_groups, step = PairGroups(data.train), PairGroups(data.held_out), 2 * processes
    most, most_held_out = (one.largest_batch // step * step for one in (groups, held_out_groups))
    if recipe.batch_size > most:
        listed = " and ".join(f"{count} groups of {kind} pairs" for kind, count in groups.counts.items())
        advice = f"set batch_size={most}, or less" if most else "add rows"
        message = f"batch_size={recipe.batch_size} is too large: {advice}. The data has {listed or 'no pairs'}"
        rule = "a batch takes one pair of a group, because pairs of one group may have a text in common"
        raise UserError("data.batch_size", f"{message}, and {rule}.")
    if not most_held_out:
        message = (
            f"{len(data.held_out)} rows are held out, too few for an evaluation on {processes} processes: add rows"
        )
        raise UserError("training.held_out.too_few", f"{message}, or raise `eval_fraction` (at most 0.2).")
    # Evaluation batches are as large as training batches if there are enough rows, and no pair is evaluated twice.
    size = min(recipe.batch_size, most_held_out)
    there = min(held_out_groups.counts.values()) * len(held_out_groups.counts)
    eval_steps = max(1, min(recipe.eval_pairs, there) // size)
    options: dict[str, Any] = {"prompts": model.config.instruction_prompts, "progress": False, **recipe.lengths()}
    train, held_out = (RetrievalTexts(texts, tokenizer, **options) for texts in (data.train, data.held_out))
    plan = BatchPlan(groups, recipe.batch_size, recipe.seed)
    batches = RetrievalBatches(train, plan, recipe.max_steps, identifier_rename_prob=recipe.identifier_rename_prob)
    eval_batches = RetrievalBatches(held_out, BatchPlan(held_out_groups, size, recipe.seed + 1), eval_steps)
    return batches, eval_batches, groups.counts, train.mean_tokens()


def finetuning_preflight(
    model: ModularStarEncoderForRetrieval,
    recipe: FinetuningRecipe,
    processes: int,
    groups: Mapping[str, int],
    tokens: tuple[float, float],
) -> runs.Preflight:
    """Estimate the size of a run; `tokens` has the mean numbers of tokens of a description and of a snippet."""
    text, code = tokens
    settings, sides = recipe.objective, len(recipe.objective.sides)
    negatives = [code] * (sides - 2)
    kinds = {TEXT_TO_CODE: [text, code, *negatives], CODE_TO_CODE: [code, code, *negatives]}
    in_batch = sides * recipe.batch_size // processes * max(recipe.lengths().values())
    embeddings = len(model.config.exit_layers) * sides * recipe.batch_size * model.config.projection_size
    return runs.preflight(
        model,
        rows_per_step=recipe.batch_size,
        steps=recipe.max_steps,
        processes=processes,
        texts=[kinds[kind] for kind in groups],
        tokens_in_memory=min(settings.mini_batch_tokens or in_batch, in_batch),
        passes=1.0 if settings.mini_batch_tokens is None else 4 / 3,
        other_bytes=2 * 4 * embeddings,
        groups={kind: groups.get(kind, 0) for kind in kinds},
    )


def finetune_classifier(
    recipe: ClassificationRecipe, out: str | os.PathLike[str], *, progress: bool = True
) -> dict[str, Any]:
    """Train a classifier of code pairs; arguments, files in `out`, resumption and errors are as in `finetune`.

    Returns:
        The training log: the keys of `train_to_the_end`, `evaluation` (final losses and accuracies on validation
        pairs), `scores` (split `valid` or `test` → exit → accuracy, precision, recall and F1), `recipe`, and `pairs`
        (split → number of pairs).
    """
    out, state, objective = Path(out), runs.processes_of_run(), ClassificationObjective()
    config = starting_config(recipe)
    check_length(config, max_tokens=recipe.max_tokens)
    rows, steps = recipe.accumulation(state.num_processes)
    folder = out / runs.CHECKPOINTS
    arguments = recipe.arguments(folder, rows, progress=progress, gradient_accumulation_steps=steps)
    check_objective(objective, arguments, config, config.exit_layers)
    if log := runs.open_run(out, recipe, "fine-tuning a classifier", until_trained=()):
        return log
    model, tokenizer = starting_model(ModularStarEncoderForSequenceClassification, recipe)
    splits = {}
    for split, pairs in read_labelled_pairs(recipe.data).items():
        limit = recipe.max_train_samples if split == "train" else recipe.max_eval_samples
        chosen = pairs if limit is None else pairs.sample(limit, recipe.seed)
        shown = progress and state.is_main_process
        splits[split] = ClassificationRows(chosen, tokenizer, max_tokens=recipe.max_tokens, progress=shown)
    adapted = model if recipe.lora is None else add_adapters(model, recipe.lora)
    if state.is_main_process:
        runs.begin_run(out, recipe)
    trainer = MultiExitTrainer(
        adapted,
        arguments,
        objective,
        train_dataset=splits["train"],
        eval_dataset=splits["valid"],
        data_collator=ClassificationCollator(tokenizer),
    )
    log = runs.train_to_the_end(trainer, folder, progress=progress)
    log |= {"evaluation": trainer.evaluate(), "recipe": recipe.to_dict()}
    log["pairs"] = {split: len(pairs) for split, pairs in splits.items()}
    model.config.unpad_inputs = config.unpad_inputs
    save_trained(trainer, out, recipe)
    if state.is_main_process:
        saved = ModularStarEncoderForSequenceClassification.from_pretrained(out / runs.MODEL).eval()
        saved.to("cuda" if torch.cuda.is_available() else "cpu")
        log["scores"] = {}
        for split in [name for name in splits if name != "train"]:
            loader = DataLoader(splits[split], rows, collate_fn=ClassificationCollator(tokenizer))
            log["scores"][split] = classification_scores(saved, loader, progress=progress)
        runs.write_log(out, log)
    state.wait_for_everyone()
    return log
