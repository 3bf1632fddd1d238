"""Stopping at a loss that is not finite, with the batch that made it in a file."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file

from modular_star_encoder.data.files import write_json


class NonFiniteLossError(ValueError):
    """The loss is infinite or not a number; the message names the file that holds the batch."""


def stop_for_non_finite_loss(
    batch: Mapping[str, Any], losses: Mapping[int, float], folder: str | os.PathLike, *, step: int, rank: int = 0
) -> NoReturn:
    """Write a batch and raise.

    `non_finite_loss_step_{step}_rank_{rank}.safetensors` gets the tensors, named by their place in the batch
    (`query.input_ids`), and the `.json` beside it the losses and what else the batch holds.

    Args:
        batch: tensors and other values, in mappings and lists of any depth.
        losses: exit → its loss.
        folder: where to write, made if missing.
        step: the optimiser step in progress, counted from 1.
        rank: number of this process.

    Raises:
        NonFiniteLossError: always.
    """
    leaves = dict(_leaves(batch))
    tensors = {name: value.detach().cpu().clone() for name, value in leaves.items() if isinstance(value, torch.Tensor)}
    path = Path(folder, f"non_finite_loss_step_{step}_rank_{rank}.safetensors").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    report = {
        "step": step,
        "rank": rank,
        # JSON has neither infinities nor NaN.
        "losses": {str(exit_layer): loss if math.isfinite(loss) else str(loss) for exit_layer, loss in losses.items()},
        "other_values": {name: str(value) for name, value in leaves.items() if name not in tensors},
    }
    write_json(path.with_suffix(".json"), report)
    by_exit = ", ".join(f"exit {exit_layer}: {loss:g}" for exit_layer, loss in losses.items())
    raise NonFiniteLossError(f"The loss of step {step} is not finite ({by_exit}); its batch is in {path}.")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of everything in nested mappings and lists."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        yield name, value
        return
    for key, part in parts:
        yield from _leaves(part, f"{name}.{key}" if name else str(key))
