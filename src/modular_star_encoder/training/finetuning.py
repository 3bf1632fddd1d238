"""Fine-tuning for retrieval from a recipe: pairs → batches → model, restartable at every stage."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.batch_plan import TEXT_TO_CODE, BatchPlan, PairGroups
from modular_star_encoder.data.files import write_json
from modular_star_encoder.data.parallel_texts import ParallelText
from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.data.retrieval import RetrievalBatches, RetrievalCollator, RetrievalTexts
from modular_star_encoder.data.retrieval_data import RetrievalData, prepare_retrieval_data
from modular_star_encoder.evaluation.exits import RetrievalRow, evaluate_exits
from modular_star_encoder.hub.saving import save_retrieval_checkpoint
from modular_star_encoder.hub.sentence_transformer_files import write_sentence_transformer_files
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.objectives import ContrastiveObjective, exit_weights
from modular_star_encoder.training.adapters import add_adapters, merged_model
from modular_star_encoder.training.finetuning_preflight import FinetuningPreflight, finetuning_preflight
from modular_star_encoder.training.finetuning_recipe import FinetuningRecipe
from modular_star_encoder.training.stages import train_to_the_end
from modular_star_encoder.training.starting_points import starting_config, starting_model
from modular_star_encoder.training.trainer import MultiExitTrainer
from modular_star_encoder.training.training_recipe import finite, open_run

LOG = Path("model", "training_log.json")
ADAPTER = "adapter"


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
    for `AutoModel` and `SentenceTransformer` with `training_log.json`; with `lora` also `adapter/`, and `model/` holds
    the merged weights. A run that has its log is finished, and the log is returned. With several processes
    (`accelerate launch`, `torchrun`) each calls this.

    Args:
        recipe: what to do.
        out: folder of this run.
        data: rows that were prepared before, in place of the recipe's `data`.
        progress: whether to show progress bars.
        announce: called with the estimate of what the run will take, before anything is trained.

    Returns:
        The training log: that of `run_stage`, and `evaluation` (losses and accuracies on held-out pairs at the end),
        `retrieval` (held-out descriptions → code at every exit, beside BM25), `recipe`, `preflight` and `data`, the
        report of what was read, skipped and held out.

    Raises:
        ValueError: the recipe contradicts itself, the model or the data, or `out` holds a run with another recipe.
    """
    out, state = Path(out), PartialState()
    rows_per_device = check_recipe(recipe, state.num_processes)
    with state.main_process_first():
        settings = recipe.to_dict()
        open_run(out, settings, "fine-tuning", until_trained=("data", "held_out_share", "samples", "seed"))
        if (out / LOG).is_file():
            return json.loads((out / LOG).read_text(encoding="utf-8"))
        data = data or _data(recipe, out, progress and state.is_main_process)
    model, tokenizer = _model(recipe)
    train, held_out = (_texts(recipe, model, texts, tokenizer) for texts in (data.train, data.held_out))
    groups = PairGroups(data.train)
    plan = BatchPlan(groups, recipe.batch_size, recipe.seed)
    eval_rows, unseen = _held_out_batches(recipe, held_out, rows_per_device, state.num_processes)
    trained_model = model if recipe.lora is None else add_adapters(model, recipe.lora)
    estimate = finetuning_preflight(
        model, recipe, state.num_processes, groups.counts, train.mean_tokens(), _trained_parameters(trained_model)
    )
    if state.is_main_process:
        announce(estimate)
    trainer = MultiExitTrainer(
        trained_model,
        recipe.arguments(
            out / "checkpoints",
            rows_per_device,
            progress=progress,
            per_device_eval_batch_size=eval_rows,
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule),
            train_sampling_strategy="sequential",
        ),
        ContrastiveObjective(recipe.contrastive()),
        weights=recipe.exit_weights,
        normalize_weights=recipe.normalize_exit_weights,
        rotate_shallow_exits=recipe.rotate_shallow_exits,
        log_gradient_norms=recipe.log_gradient_norms,
        train_dataset=RetrievalBatches(train, plan, recipe.steps, renamed_share=recipe.renamed_share),
        eval_dataset=unseen,
        data_collator=RetrievalCollator(tokenizer),
    )
    log = train_to_the_end(trainer, out / "checkpoints", progress=progress)
    log |= {
        "evaluation": trainer.evaluate(),
        "recipe": recipe.to_dict(),
        "preflight": asdict(estimate),
        "data": data.report,
    }
    _save(recipe, trainer, tokenizer, out)
    if state.is_main_process:
        log["retrieval"] = _evaluate(recipe, data.held_out, tokenizer, out, progress)
        write_json(out / LOG, finite(log))
    state.wait_for_everyone()
    return log


def check_recipe(recipe: FinetuningRecipe, processes: int) -> int:
    """Refuse what can be told without data and weights; return the pairs of one step on each device.

    Raises:
        ValueError: the recipe contradicts itself or the model.
    """
    config, _ = starting_config(recipe.model, recipe.config, recipe.exit_layer)
    with torch.device("meta"):
        model = ModularStarEncoderForRetrieval(config)
    finetuning_preflight(model, recipe, processes, {}, (0.0, 0.0))
    model.set_attn_implementation(recipe.attn_implementation)
    exit_weights(recipe.exit_weights, config.exit_layers, config.parent_num_hidden_layers)
    recipe.contrastive().check(config.exit_layers, config.projection_size)
    return recipe.pairs_per_device(processes)


def _data(recipe: FinetuningRecipe, out: Path, progress: bool) -> RetrievalData:
    data = prepare_retrieval_data(
        recipe.data,
        out / "data",
        held_out_share=recipe.held_out_share,
        seed=recipe.seed,
        samples=recipe.samples,
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
    return starting_model(
        ModularStarEncoderForRetrieval,
        recipe.model,
        recipe.config,
        seed=recipe.seed,
        exit_layer=recipe.exit_layer,
        tokenizer=recipe.tokenizer,
        attn_implementation=recipe.attn_implementation,
    )


def _texts(
    recipe: FinetuningRecipe,
    model: ModularStarEncoderForRetrieval,
    texts: list[ParallelText],
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


def _held_out_batches(
    recipe: FinetuningRecipe, held_out: RetrievalTexts, rows_per_device: int, processes: int
) -> tuple[int, RetrievalBatches]:
    """Pairs of one evaluation batch on each device, and the batches of one evaluation, the same at every step."""
    groups = PairGroups(held_out.texts)
    most = min(rows_per_device * processes, groups.largest_batch)
    rows = most // (2 * processes) * 2
    if not rows:
        raise ValueError(
            f"Of the held-out rows at most {most} can stand in one batch; that is too few for {processes} processes. "
            "Raise held_out_share, or add data."
        )
    plan = BatchPlan(groups, rows * processes, recipe.seed + 1)
    return rows, RetrievalBatches(held_out, plan, max(1, recipe.eval_pairs // plan.batch_size))


def _trained_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _save(recipe: FinetuningRecipe, trainer: MultiExitTrainer, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write `model/`, and with `lora` before it `adapter/`.

    Every process calls, for a model may be spread over them.
    """
    trainer.save_model(os.fspath(out / ("model" if recipe.lora is None else ADAPTER)))
    if not trainer.is_world_process_zero():
        return
    if recipe.lora is None:
        config = trainer.accelerator.unwrap_model(trainer.model).config
        tokenizer.save_pretrained(out / "model")
        prompts = sentence_transformer_prompts(instructions=config.instruction_prompts)
        write_sentence_transformer_files(out / "model", config, prompts)
    elif not (out / "model").exists():
        save_retrieval_checkpoint(merged_model(_model(recipe)[0], out / ADAPTER), tokenizer, out / "model")


def _evaluate(
    recipe: FinetuningRecipe, texts: list[ParallelText], tokenizer: PreTrainedTokenizerFast, out: Path, progress: bool
) -> dict[str, Any] | None:
    """Retrieval of held-out code by its description with the model that was saved; None without two descriptions."""
    groups = PairGroups(texts).rows.get(TEXT_TO_CODE, [])
    chosen = np.random.default_rng(recipe.seed).permutation(len(groups))[: recipe.eval_pairs]
    if len(chosen) < 2:
        return None
    described = [texts[groups[group][0]] for group in chosen]
    rows = [RetrievalRow(text.description, text.snippets[0].code, text.snippets[0].language) for text in described]
    model = ModularStarEncoderForRetrieval.from_pretrained(out / "model")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    options = {"max_length": max(recipe.max_text_tokens, recipe.max_code_tokens), "progress": progress}
    return evaluate_exits(model, tokenizer, rows, **options).to_dict()
