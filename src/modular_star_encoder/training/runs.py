"""The folder of a training run: opening it, training to the end from the last checkpoint, and what it leaves."""

import json
import math
import os
import re
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from modular_star_encoder.training.recipes import TrainingSettings
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_file, write_json
from modular_star_encoder.utils.settings import build_settings

MODEL, ADAPTER, CHECKPOINTS = "model", "adapter", "checkpoints"
LOG = Path(MODEL, "training_log.json")
"""The last file that a run writes."""

MAY_CHANGE = frozenset({"dataloader_num_workers", "save_total_limit"})
"""Settings that do not influence what is learned, so that a run may continue with others."""


def processes_of_run() -> PartialState:
    """This process and the others of the run; without a GPU they communicate by gloo."""
    return PartialState(cpu=not torch.cuda.is_available())


def open_run(out: Path, recipe: TrainingSettings, kind: str, *, until_trained: Iterable[str]) -> dict[str, Any] | None:
    """Create the folder of a run, or check that it holds a run with the same recipe; the log of a finished run.

    From the first checkpoint on all settings must be the same, except those in `MAY_CHANGE`.

    Args:
        out: the folder; `recipe.json` in it holds the settings.
        recipe: the settings.
        kind: the kind of run, for messages.
        until_trained: settings that must be the same even before the first checkpoint, once the folder has other files.

    Raises:
        UserError: the folder holds something else (`training.run.not_a_run`), or a run with other settings
            (`training.run.other_settings`); the message names them.
    """
    written, settings = out / "recipe.json", json.loads(json.dumps(recipe.to_dict(), default=str))
    if written.is_file():
        before = _settings_before(written, recipe)
        trained = (out / MODEL).exists() or last_checkpoint(out / CHECKPOINTS) is not None
        begun = any(path != written for path in out.iterdir())
        names = set(settings) | set(before) if trained else set(until_trained) if begun else set()
        other = sorted(name for name in names - MAY_CHANGE if before.get(name) != settings.get(name))
        if other:
            raise UserError(
                "training.run.other_settings",
                f"{out} holds a run with another {', '.join(other)}; name another folder.",
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "training.run.not_a_run", f"{out} is not empty and holds no run of {kind}; name another folder."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(written, settings)
    return json.loads((out / LOG).read_text(encoding="utf-8")) if (out / LOG).is_file() else None


def _settings_before(written: Path, recipe: TrainingSettings) -> dict[str, Any]:
    """The settings in `recipe.json`, with today's names and defaults where an older version wrote it."""
    before: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            before = build_settings(type(recipe), before, str(written)).to_dict()
    except UserError:
        return before
    return json.loads(json.dumps(before, default=str))


def write_log(out: Path, log: Mapping[str, Any]) -> None:
    """Write the training log, with null for infinities and NaN, which JSON does not have."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_json(out / LOG, finite(dict(log)))


def train_to_the_end(trainer: Trainer, folder: str | os.PathLike[str], *, progress: bool = True) -> dict[str, Any]:
    """Run a trainer to its last step, from the last complete checkpoint in `folder` if there is one.

    Returns:
        `log_history`: one dict per log line, `steps`, `seconds` of this call, and `resumed_from` (a step or None).
    """
    if progress:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ExitProgressCallback())
    with trainer.args.main_process_first(local=False):
        checkpoint = last_checkpoint(folder)
        resumed_from = _step(Path(checkpoint)) if checkpoint else None
        if trainer.is_world_process_zero():
            # `Trainer` would count incomplete checkpoints among those to keep.
            for path in Path(folder).glob("checkpoint-*"):
                if path.name.rpartition("-")[2].isdecimal() and (resumed_from is None or _step(path) > resumed_from):
                    shutil.rmtree(path)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "log_history": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "resumed_from": resumed_from,
    }


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint folder in `output_dir`, or None.

    `trainer_state.json` is the last file that `Trainer` writes into a checkpoint: a folder without it, or with half of
    it, is incomplete.
    """
    found = []
    for state in Path(output_dir).glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
        except (ValueError, KeyError):
            continue
    return max(found)[1] if found else None


class NonFiniteLossError(UserError):
    """The loss is infinite or not a number; the message names the file that holds the batch."""


def stop_for_non_finite_loss(
    batch: Mapping[str, Any], losses: Mapping[int, float], folder: str | os.PathLike, *, step: int, rank: int = 0
) -> NoReturn:
    """Write a batch to `non_finite_loss_step_{step}_rank_{rank}.safetensors` and `.json`, and raise NonFiniteLossError.

    Args:
        batch: tensors and other values, in mappings and lists of any depth; tensors are named by their path in the
            batch (`query.input_ids`).
        losses: exit → its loss.
        folder: where to write; created if missing.
        step: the optimiser step in progress, counted from 1.
        rank: number of this process.
    """
    leaves = dict(_leaves(batch))
    tensors = {name: value.detach().cpu().clone() for name, value in leaves.items() if isinstance(value, torch.Tensor)}
    path = Path(folder, f"non_finite_loss_step_{step}_rank_{rank}.safetensors").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as staging:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging)
    report = {
        "step": step,
        "rank": rank,
        # JSON has neither infinities nor NaN.
        "losses": {str(exit_layer): loss if math.isfinite(loss) else str(loss) for exit_layer, loss in losses.items()},
        "other_values": {name: str(value) for name, value in leaves.items() if name not in tensors},
    }
    write_json(path.with_suffix(".json"), report)
    by_exit = ", ".join(f"exit {exit_layer}: {loss:g}" for exit_layer, loss in losses.items())
    raise NonFiniteLossError(
        "training.loss.not_finite", f"The loss of step {step} is not finite ({by_exit}); its batch is in {path}."
    )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of everything in nested mappings and lists."""
    if not isinstance(value, Mapping | list | tuple):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(part, f"{name}.{key}" if name else str(key))


PER_EXIT = re.compile(r"(?P<metric>.+)_exit_(?P<exit>\d+)")


def format_log(logs: dict[str, float]) -> str:
    """`{"loss": 1.2, "clip_loss_exit_4": 1.3, "clip_loss_exit_9": 1}` → `loss 1.200 · clip_loss 4: 1.300, 9: 1.000`."""
    single, per_exit = [], defaultdict(list)
    for name, value in logs.items():
        match = PER_EXIT.fullmatch(name)
        if match:
            per_exit[match["metric"]].append(f"{match['exit']}: {value:.3f}")
        elif name in ("loss", "eval_loss", "grad_norm", "logit_scale", "masked_negatives"):
            single.append(f"{name} {value:.3f}")
        elif name == "learning_rate":
            single.append(f"{name} {value:.1e}")
    return " · ".join(single + [f"{metric} {', '.join(values)}" for metric, values in per_exit.items()])


class ExitProgressCallback(ProgressCallback):
    """`Trainer`'s progress bar, with readable log lines."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line above the bar; the summary at the end of training has no line."""
        line = format_log(logs or {})
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps} · {line}")
