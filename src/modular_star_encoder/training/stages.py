"""One stage of training: its settings, and running it to the end, from wherever it was interrupted."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProgressCallback, TrainingArguments

from modular_star_encoder.objectives.exit_losses import Objective
from modular_star_encoder.training.trainer import ExitProgressCallback, MultiExitTrainer, last_checkpoint


@dataclass(frozen=True)
class Stage:
    """Settings of one stage of training.

    Args:
        steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: peak of the schedule: linear warm-up, then linear decay to zero.
        warmup_steps: steps of the warm-up.
        weight_decay: AdamW's, on matrices only.
        adam_beta2: decay of AdamW's second moment; 0.999 would remember more steps than a short stage has.
        logging_steps: steps between two log lines.
        save_steps: steps between two checkpoints.
        max_tokens: longest row, in tokens; `None` where the data says it otherwise.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    logging_steps: int = 50
    save_steps: int = 500
    max_tokens: int | None = None


def run_stage(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: Callable[..., Any],
    objective: Objective,
    stage: Stage,
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    bf16: bool = False,
    progress: bool = True,
    eval_dataset: Dataset | None = None,
) -> dict[str, Any]:
    """Train `model` in place, resuming from the last whole checkpoint in `folder`, if there is one.

    Args:
        folder: where checkpoints go; they are removed when the stage is complete and its caller has saved the model.
        bf16: compute under bfloat16 autocast; weights stay float32.

    Returns:
        `log_history`: one dict per log line, `steps`, `seconds` of this run, and `resumed_from` (a step, or `None`).
    """
    arguments = TrainingArguments(
        output_dir=os.fspath(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        adam_beta2=stage.adam_beta2,
        lr_scheduler_type="linear",
        logging_steps=stage.logging_steps,
        save_steps=stage.save_steps,
        save_total_limit=2,
        seed=seed,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=not progress,
        dataloader_drop_last=True,
        report_to="none",
    )
    trainer = MultiExitTrainer(
        model, arguments, objective, train_dataset=dataset, eval_dataset=eval_dataset, data_collator=collator
    )
    return train_to_the_end(trainer, folder, progress=progress)


def train_to_the_end(trainer: MultiExitTrainer, folder: str | os.PathLike, *, progress: bool = True) -> dict[str, Any]:
    """Run a trainer to its last step, from the last whole checkpoint in `folder` if there is one.

    Returns:
        As `run_stage`.
    """
    if progress:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ExitProgressCallback())
    with trainer.args.main_process_first(local=False):
        checkpoint = last_checkpoint(folder)
        if trainer.is_world_process_zero():
            _remove_half_written(Path(folder), keep_up_to=checkpoint)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "log_history": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "resumed_from": int(checkpoint.rpartition("-")[2]) if checkpoint else None,
    }


def _remove_half_written(folder: Path, keep_up_to: str | None) -> None:
    """Remove checkpoints that an interruption left incomplete: `Trainer` would count them among those to keep."""
    for checkpoint in [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]:
        whole = keep_up_to is not None and _step(checkpoint) <= _step(Path(keep_up_to))
        if not whole:
            shutil.rmtree(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def bf16_is_faster() -> bool:
    """Whether this machine's default device multiplies matrices in bfloat16 by instructions of its own.

    True on recent GPUs and on CPUs with AMX, AVX512-BF16 or Arm's BF16; others only emulate bfloat16, and autocast
    would slow training down. Told by what the machine says of itself (Linux), not by the clock: an interrupted run that
    decided otherwise when it is resumed would end with other weights.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(words)
