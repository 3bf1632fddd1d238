"""Saving what was trained: whole checkpoints, and with adapters both ways."""

import os
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.files import staged_folder
from modular_star_encoder.modeling import ModularStarEncoderPreTrainedModel
from modular_star_encoder.training.adapters import merged_model
from modular_star_encoder.training.trainer import MultiExitTrainer

MODEL, ADAPTER = "model", "adapter"


def save_trained(
    trainer: MultiExitTrainer,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    start: Callable[[], ModularStarEncoderPreTrainedModel] | None = None,
) -> None:
    """Write `model/` with weights, code and tokenizer; of a model with adapters `adapter/` too, and merged weights.

    Every process calls, for a model may be spread over them.

    Args:
        trainer: after training.
        tokenizer: goes with the weights.
        out: folder of the run.
        start: makes the model as it was before it got adapters; None for a model without.
    """
    trainer.save_model(os.fspath(out / (MODEL if start is None else ADAPTER)))
    if not trainer.is_world_process_zero():
        return
    if start is not None and not (out / MODEL).exists():
        with staged_folder(out / MODEL) as staging:
            merged = merged_model(start(), out / ADAPTER)
            # `start` sets it as in training; the model that was trained has its own value back by now.
            merged.config.unpad_inputs = trainer.model.config.unpad_inputs
            merged.save_pretrained(staging)
    tokenizer.save_pretrained(out / MODEL)
