"""A progress bar with one short line per log: each metric with its value at every exit."""

import re
from collections import defaultdict
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

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
