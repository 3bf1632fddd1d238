"""A training run: estimate its size, check its folder, train from the last checkpoint, and format log lines."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from modular_star_encoder.data.splits import CODE_TO_CODE, TEXT_TO_CODE
from modular_star_encoder.data.tokenizer import ContentEncoder, load_tokenizer
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderPreTrainedModel,
)
from modular_star_encoder.training import starting_source
from modular_star_encoder.training.recipes import FinetuningRecipe, PretrainingRecipe, TrainingRecipe, TrainingSettings
from modular_star_encoder.training.trainer import AVERAGE, STATES, checkpoints, missing_files
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import fits, folder_lock, read_record, write_json, write_text
from modular_star_encoder.utils.settings import build_settings

MODEL, ADAPTER, CHECKPOINTS, REPORT = "model", "adapter", "checkpoints", "report.md"
LOG = Path(MODEL, "training_log.json")
"""Path of the training log in a run's folder. The log is written last, so a run with a log is finished."""

MAY_CHANGE = frozenset({"dataloader_num_workers", "save_total_limit"})
"""Settings that may be changed when a run is continued, because they have no influence on the trained weights."""

LONG_RUN = 15 * 60  # seconds; a message announces the duration of a longer run on a CPU
LONG_STEP = 20  # seconds; a longer first step is enough to estimate the duration, otherwise three steps are needed


@dataclass(frozen=True)
class Preflight:
    """Parameters, tokens, FLOPs and memory of a training run, estimated before the run starts."""

    parameters: int  # number of parameters, with heads and adapters
    trained_parameters: int
    rows_per_step: int  # over all devices; in contrastive training, a row is a pair
    steps: int
    processes: int
    tokens_per_row: float  # mean number of tokens in all texts of a row together
    flops_per_row: float  # FLOPs of the forward and the backward pass of a row
    memory_bytes: int  # upper estimate per device: float32 weights, gradients and two moments, and activations
    groups: Mapping[str, int]  # {kind of pairs: number of groups, 0 if none}; two groups have no text in common
    epochs: Mapping[str, float]  # {kind of pairs: how often the run uses each group}

    def __str__(self) -> str:
        rows = self.rows_per_step * self.steps
        tokens = f"{rows:,} rows of {self.tokens_per_row:.0f} tokens, {rows * self.tokens_per_row / 1e6:,.1f} million"
        each = f"{self.rows_per_step // self.processes:,} on each of {self.processes} processes"
        kinds = dict.fromkeys(self.groups, "no such pairs in this data")
        for kind, epochs in self.epochs.items():
            kinds[kind] = f"{self.groups[kind]:,} pairs without a common text, {epochs:.2f} epochs"
        lines = {
            "parameters": f"{self.parameters:,}, of which {self.trained_parameters:,} are trained",
            **kinds,
            "rows per step": f"{self.rows_per_step:,} ({each})",
            "steps": f"{self.steps:,} ({tokens})",
            "training FLOPs": f"{self.flops_per_row:.2e} per row, {self.flops_per_row * rows:.2e} in all",
            "memory per device": f"at most about {self.memory_bytes / 2**30:.1f} GiB",
        }
        return "\n".join(f"{name:21} {value}" for name, value in lines.items())


def _preflight(
    model: ModularStarEncoderPreTrainedModel,
    recipe: TrainingSettings,
    processes: int,
    rows_per_step: int,
    texts: Sequence[Sequence[float]],  # mean lengths of the texts of a row, for each of the equally frequent kinds
    tokens_in_memory: int,  # on a device, with their activations at one time
    *,
    passes: float = 1.0,  # above 1 if texts are embedded again
    head_flops: float = 0.0,  # per row
    other_bytes: int = 0,  # per device
    groups: Mapping[str, int] | None = None,
) -> Preflight:
    """Return the estimated size of a run that trains `model`, which may be on the meta device."""
    config, groups, steps = model.config, groups or {}, recipe.max_steps
    parameters, layers = (sum(one.numel() for one in part.parameters()) for part in (model, model.model.layers))
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    # FLOPs by Chowdhery et al., arXiv 2204.02311, appendix B: 6 per parameter and token, and for attention 12 × T × H.
    attention = 12.0 * config.num_hidden_layers * config.hidden_size
    lengths = [length for row in texts for length in row]
    # How many 2-byte numbers the blocks keep of each token for the backward pass: 16 × H (block input, normalised
    # inputs, queries, keys, values, attention output, projections, residuals), and the MLP before and after activation.
    kept = config.num_hidden_layers * (16 * config.hidden_size + 2 * config.intermediate_size)
    counts = {kind: count for kind, count in groups.items() if count}
    return Preflight(
        parameters=parameters,
        trained_parameters=trained,
        rows_per_step=rows_per_step,
        steps=steps,
        processes=processes,
        tokens_per_row=sum(lengths) / len(texts),
        flops_per_row=passes * sum((6.0 * layers + attention * T) * T for T in lengths) / len(texts) + head_flops,
        memory_bytes=4 * parameters + 12 * trained + 2 * tokens_in_memory * kept + other_bytes,
        groups=groups,
        epochs={kind: steps * rows_per_step / len(counts) / count for kind, count in counts.items()},
    )


def pretraining_preflight(
    model: ModularStarEncoderForPreTraining, recipe: PretrainingRecipe, processes: int
) -> Preflight:
    """Return a `Preflight`, an estimate of a pre-training run, which computes the MLM head for masked tokens only."""
    exits = 2 if recipe.training["exit_schedule"] == "rotate" else len(model.config.exit_layers)
    heads = sum(parameter.numel() for parameter in model.heads.parameters())
    head_flops = 6.0 * recipe.mlm_probability * exits * heads * recipe.max_tokens
    rows, in_memory = recipe.tokens_per_step // recipe.max_tokens, recipe.rows_per_device * recipe.max_tokens
    return _preflight(model, recipe, processes, rows, [[recipe.max_tokens]], in_memory, head_flops=head_flops)


def finetuning_preflight(
    model: ModularStarEncoderForRetrieval,
    recipe: FinetuningRecipe,
    processes: int,
    groups: Mapping[str, int],  # {kind of pairs: number of groups without a common text}
    tokens: tuple[float, float],  # mean lengths of a description and of a code snippet
) -> Preflight:
    """Return a `Preflight` with the estimated size of a fine-tuning run."""
    (text, code), mini_batch, sides = tokens, recipe.objective.mini_batch_tokens, len(recipe.objective.sides)
    kinds = {kind: [first] + [code] * (sides - 1) for kind, first in ((TEXT_TO_CODE, text), (CODE_TO_CODE, code))}
    in_batch = sides * recipe.batch_size // processes * max(recipe.lengths().values())
    embeddings = len(model.config.exit_layers) * sides * recipe.batch_size * model.config.projection_size
    sizes = recipe.batch_size, [kinds[kind] for kind in groups], min(mini_batch or in_batch, in_batch)
    passes = 1.0 if mini_batch is None else 4 / 3  # cached gradients need a second forward pass
    counts = {kind: groups.get(kind, 0) for kind in kinds}
    return _preflight(model, recipe, processes, *sizes, passes=passes, other_bytes=2 * 4 * embeddings, groups=counts)


def processes_of_run() -> PartialState:
    """Return accelerate's `PartialState` of the training processes; without a GPU, they communicate through gloo."""
    return PartialState(cpu=not torch.cuda.is_available())


def check_folder(out: Path, mark: str, kind: str) -> None:
    """Raise UserError (`training.run.not_a_run`) if `out` is a file, or a folder with files but no file `mark`.

    `mark` is the name of a file or folder that every earlier run has written. Hidden files do not count.
    """
    if out.is_file():
        raise UserError("training.run.not_a_run", f"Name a folder: {out} is a file.")
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if names and mark not in names:
        raise UserError("training.run.not_a_run", f"Choose another folder: {out} contains files, but no {kind}.")


def check_same(
    place: Path, before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str], advice: str = ""
) -> None:
    """Raise UserError (`training.run.other_settings`) if a setting in `names` differs between `before` and `now`.

    The message ends with `advice`.
    """
    if other := sorted(name for name in names if before.get(name) != now.get(name)):
        message = f"{place} has a run with other values of {', '.join(other)}; choose another folder{advice}."
        raise UserError("training.run.other_settings", message)


def start_checksums(recipe: TrainingRecipe) -> dict[str, str | None]:
    """Return checksums of the `model` and of the `tokenizer` of a recipe, as a run's `start.json` has them.

    A repository on the Hub, where the newest commit may change no weights, counts only with `lora`: then checkpoints
    hold only the adapters.
    """
    own = recipe.tokenizer and ContentEncoder(load_tokenizer(recipe.tokenizer)).checksum
    source, has_weights = starting_source(recipe.model)
    counts = has_weights and (getattr(recipe, "lora", None) is not None or os.path.isdir(source))
    return {"model_checksum": checkpoint_checksum(source) if counts else None, "tokenizer_checksum": own}


_OLD_NAMES = {"weights": "model_checksum", "rows": "data_checksum"}  # in `start.json` of older versions


def hold(out: Path) -> contextlib.ExitStack:
    """Lock the run's folder `out` in the main process; closing or deleting the returned `ExitStack` unlocks `out`."""
    held = contextlib.ExitStack()
    if processes_of_run().is_main_process:
        held.enter_context(folder_lock(out))
    return held


class Run:
    """The folder of a training run, with `recipe.json` (settings), `checkpoints/`, and `model/` with the training log.

    `log` is the training log of a finished run, and None before. A run with a model or checkpoint can be continued only
    with the same settings (except `MAY_CHANGE`); before the first checkpoint, only the settings in `until_trained` must
    be the same. `start.json` holds checksums of what the settings name, such as the starting model. A run with a
    checkpoint can be continued only with the same checksums.
    """

    def __init__(self, out: Path, recipe: TrainingRecipe, kind: str, *, until_trained: Iterable[str] = ()) -> None:
        check_folder(out, "recipe.json", f"run of {kind}")
        self._out, self._written, self.settings = out, out / "recipe.json", _plain(recipe)
        has_log = (out / LOG).is_file()
        self.log = read_record(out / LOG, "training.run.damaged", steps=int, evaluation=dict) if has_log else None
        needed = _needed(recipe.training.get("save_only_model"), recipe.training.get("ema_decay"))
        self._trained = (out / MODEL).exists() or last_checkpoint(out / CHECKPOINTS, needed) is not None
        if self._written.is_file():
            before = read_record(self._written, "training.run.damaged")
            with contextlib.suppress(UserError):  # adds defaults for settings that did not exist when the run began
                before = _plain(build_settings(type(recipe), before, str(self._written)))
            begun = any(path.suffix != ".json" and not path.name.startswith(".") for path in out.iterdir())
            names = {*self.settings, *before} if self._trained else set(until_trained) if begun else set()
            advice = f". To train the finished model further, set model={out / MODEL}" if self.log is not None else ""
            check_same(out, before, self.settings, names - MAY_CHANGE, advice)
        self._start: dict[str, str | None] = {}
        if self.log is None:
            self.check_start(start_checksums(recipe))
        self._held = hold(out) if self._written.is_file() and self.log is None else None

    def check_start(self, checksums: Mapping[str, str | None]) -> None:
        """Keep checksums for `begin` to write; UserError (as in `check_same`) if a run with a checkpoint has others."""
        self._start, file = {**self._start, **checksums}, self._out / "start.json"
        if self._trained and file.is_file():
            stored = read_record(file, "training.run.damaged")
            before = {**checksums, **{_OLD_NAMES.get(name, name): value for name, value in stored.items()}}
            advice = ", or restore the files that this run was trained with"
            check_same(self._out, before, checksums, checksums, advice)

    def begin(self) -> None:
        """Create the run's folder and write `recipe.json` and `start.json`; call this when all checks have passed."""
        self._held = self._held or hold(self._out)
        write_json(self._written, self.settings)
        write_json(self._out / "start.json", self._start)

    def end(self, log: Mapping[str, Any]) -> None:
        """Write `log` to the file `LOG`, with null in place of infinities and NaN, which JSON does not have."""
        # `dumps` writes them as the words NaN, Infinity and -Infinity, for which `loads` calls `parse_constant`.
        write_json(self._out / LOG, json.loads(json.dumps(log), parse_constant=lambda _: None))


def _needed(save_only_model: Any, ema_decay: Any) -> tuple[str, ...]:
    """Return patterns of the files, besides the model's, without which a run can't continue from a checkpoint."""
    return (*(() if save_only_model else STATES), *((AVERAGE,) if ema_decay else ()))


def _plain(recipe: TrainingSettings) -> dict[str, Any]:
    return json.loads(json.dumps(recipe.to_dict(), default=str))


def train_to_the_end(trainer: Trainer, folder: str | os.PathLike[str], *, progress: bool = True) -> dict[str, Any]:
    """Run a trainer to its last step, from the last complete checkpoint in `folder`, if any; return the training log.

    In a run of one process, Ctrl-C or SIGTERM ends the training after the current step: a checkpoint is written, then
    KeyboardInterrupt is raised. A second signal ends the training at once.
    """
    if progress:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ExitProgressCallback())
    needed = _needed(trainer.args.save_only_model, getattr(trainer.args, "ema_decay", None))
    with trainer.args.main_process_first(local=False):
        checkpoint = last_checkpoint(folder, needed)
        resumed_from = int(checkpoint.rpartition("-")[2]) if checkpoint else None
        if trainer.is_world_process_zero():
            # `Trainer` would count newer checkpoints among those to keep.
            for step, path in checkpoints(folder).items():
                if step > (resumed_from or 0):
                    _pass_over(path)
            if checkpoint:
                _find_best_checkpoint(Path(checkpoint, TRAINER_STATE_NAME))
    if checkpoint and progress and trainer.is_world_process_zero():
        print(f"training continues after step {resumed_from} of {trainer.args.max_steps}")
    start = time.perf_counter()
    with _stopping_after_a_step(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = round(time.perf_counter() - start, 1)  # of this call
    log = {"log_history": trainer.state.log_history, "steps": trainer.state.global_step}
    return log | {"seconds": seconds, "resumed_from": resumed_from}


def evaluation_notice(log: Mapping[str, Any], what: str, steps: float) -> str:
    """Return a line that announces an evaluation of `what` and, if known, its duration.

    `steps` is the number of the evaluation's rows divided by the number of rows in a training step.
    """
    trained = log["steps"] - (log["resumed_from"] or 0)
    # Without a backward pass, a row takes about a third of its time in training.
    minutes = log["seconds"] / trained * steps / 3 / 60 if trained else 0.0
    return f"evaluation: {what}" + (f", about {max(1, round(minutes))} min" if trained else "")


def final_metrics(trainer: Trainer, notice: str = "") -> dict[str, float]:
    """Return the trained model's {metric: value}; if the log lacks them, print `notice` and evaluate the model."""
    args, state = trainer.args, trainer.state
    replaced = getattr(args, "ema_decay", 0) or args.load_best_model_at_end  # the last step's weights
    found = [one for one in state.log_history if "eval_loss" in one and one["step"] == state.global_step]
    if found and not replaced:
        return found[-1]
    if notice:
        print(notice)
    return trainer.evaluate()


@contextlib.contextmanager
def _stopping_after_a_step(trainer: Trainer) -> Iterator[None]:
    """Context manager: after a SIGINT or SIGTERM, finish the step, save a checkpoint and raise KeyboardInterrupt."""
    if trainer.args.world_size > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            if asked:
                control.should_save = control.should_training_stop = True

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])
        print("mose: training stops after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

    trainer.add_callback(Stop())
    before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


def _find_best_checkpoint(state: Path) -> None:
    """Correct the path of the best checkpoint in the file `state` (`trainer_state.json`) of a run that was moved."""
    content = json.loads(state.read_text(encoding="utf-8"))
    old = content.get("best_model_checkpoint")
    if old and (best := state.parent.with_name(Path(old).name)).is_dir() and str(best) != old:
        write_text(state, json.dumps({**content, "best_model_checkpoint": str(best)}, indent=2))


def last_checkpoint(output_dir: str | os.PathLike[str], needed: Sequence[str] = STATES) -> str | None:
    """Return the folder of the newest undamaged checkpoint with a file for each pattern in `needed`, or None."""
    found = sorted(checkpoints(output_dir).items(), reverse=True)
    return next((str(folder) for step, folder in found if _is_whole(folder, step, needed)), None)


def _is_whole(folder: Path, step: int, needed: Sequence[str]) -> bool:
    """Return whether a checkpoint is complete and none of its files is truncated; OSError if a file can't be read."""
    # A missing file, or a folder in its place, means damage; after other OSErrors, the file may be whole.
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, SafetensorError):
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # written last
        for weights in folder.glob("*.safetensors"):
            weights.open("rb").close()  # `safe_open` would report a file that can't be opened as missing
            with safe_open(weights, "pt"):  # an error if the file is cut short
                pass
        for archive in folder.glob("*.pt*"):
            with archive.open("rb") as file:
                if not zipfile.is_zipfile(file):  # torch's files are archives that end with a directory
                    return False
        known = isinstance(state, dict) and fits([state.get("global_step"), state.get("max_steps")], list[int])
        return known and state["global_step"] == step <= state["max_steps"] and not missing_files(folder, needed)
    return False


def _pass_over(checkpoint: Path) -> None:
    """Remove a checkpoint that was never finished; rename a damaged checkpoint, because some files may be of use."""
    if TRAINER_STATE_NAME not in os.listdir(checkpoint):
        shutil.rmtree(checkpoint)
        return
    kept = checkpoint
    while kept.exists():
        kept = kept.with_name(f"damaged-{kept.name}")
    checkpoint.rename(kept)
    print(f"mose: {checkpoint} is damaged or incomplete: it is renamed to {kept.name} and not used", file=sys.stderr)


def format_log(logs: dict[str, float]) -> str:
    """Format one log entry: `{"clip_loss_exit_4": 1.3, "clip_loss_exit_9": 1}` → `clip_loss 4: 1.300, 9: 1.000`."""
    single, per_exit = [], defaultdict(list)
    for name, value in logs.items():
        if match := re.fullmatch(r"(.+)_exit_(\d+)", name):
            per_exit[match[1]].append(f"{match[2]}: {value:.3f}")
        elif name in ("loss", "eval_loss", "grad_norm", "logit_scale", "masked_negatives"):
            single.append(f"{name} {value:.3f}")
        elif name == "learning_rate":
            single.append(f"{name} {value:.1e}")
    return " · ".join(single + [f"{metric} {', '.join(values)}" for metric, values in per_exit.items()])


class ExitProgressCallback(ProgressCallback):
    """`Trainer`'s progress bar with the time left and readable log lines; on a CPU, the bar announces a long run."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._first_step, self._begin, self._announced = state.global_step + 1, time.perf_counter(), False
        if self.training_bar is not None:
            bar, self.current_step = self.training_bar, state.global_step
            bar.unit = "step"
            bar.bar_format = "{l_bar}{bar}| {n_fmt} of {total_fmt} steps, {remaining} left, then evaluation, {rate_fmt}"
            # In a resumed run, leave the steps before the checkpoint out of the speed.
            bar.initial = bar.n = bar.last_print_n = self.current_step
            bar.refresh()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        now, done = time.perf_counter(), state.global_step - self._first_step
        step = (now - self._begin) / max(1, done)
        if done == 0:  # later estimates leave the first step out, because it is slower than the others
            self._begin = now
        if self.training_bar is None or args.device.type != "cpu" or self._announced:
            return
        left = step * (state.max_steps - state.global_step)
        if left > LONG_RUN and (done == 2 or (done == 0 and step > LONG_STEP)):
            self._announced, short = True, max(1, int(LONG_RUN / step))
            settings = f"max_steps={short}"
            if args.warmup_steps >= 1:  # a smaller number is a fraction of all steps
                settings += f" warmup_steps={max(1, round(args.warmup_steps * short / state.max_steps))}"
            duration = f"{left / 3600:.1f} hours" if left > 5400 else f"{left / 60:.0f} minutes"
            message = f"mose: training will take about {duration} if steps take as long as so far. To train for only "
            message += f"{LONG_RUN // 60} minutes, stop this run and start again with {settings} and another --out; the"
            self.training_bar.write(f"{message} model then learns less.", file=sys.stderr)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description(f"losses on held-out rows after step {state.global_step}", False)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a log entry as one line above the progress bar, but leave out the summary at the end of training."""
        line = format_log(logs or {})
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps} · {line}")
