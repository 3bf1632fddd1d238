"""Averaged weights: an exponential moving average over the steps, saved in place of the last step's weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

from modular_star_encoder.utils.files import staged_file


class AveragedWeights(TrainerCallback):
    """Average the trained parameters after every step; at the end of training, put the average into the model.

    The decay of step s is min(`decay`, (1 + s) / (10 + s)), so that the first steps are soon forgotten. Every process
    keeps the whole average, so the model may be replicated (DDP), but not sharded (FSDP).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the average from the model's weights, or from the average stored when training continues."""
        trained = [(name, one) for name, one in kwargs["model"].named_parameters() if one.requires_grad]
        self.parameters, self.average = dict(trained), {name: one.detach().clone() for name, one in trained}
        if state.global_step:
            stored = load_file(Path(args.output_dir, f"checkpoint-{state.global_step}", "average.safetensors"))
            self.average = {name: stored[name].to(one) for name, one in self.average.items()}

    def save(self, folder: str) -> None:
        """Write the average to `average.safetensors` in the folder of a checkpoint."""
        with staged_file(Path(folder, "average.safetensors")) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self.average.items()}, temporary)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, average in self.average.items():
            average.lerp_(self.parameters[name], 1 - decay)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for name, average in self.average.items():
            self.parameters[name].copy_(average)
