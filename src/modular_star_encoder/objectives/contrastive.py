"""Contrastive fine-tuning: the symmetric CLIP loss of each exit on its own projection head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from modular_star_encoder.objectives.contrastive_losses import losses_from_embeddings
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.gradient_cache import embed_sides, number_of_texts
from modular_star_encoder.objectives.outputs import ObjectiveOutput


class ContrastiveObjective:
    """CLIP loss between descriptions and code, or code and code, at each exit.

    Over several processes, candidates come from all of them and the gradients are those of the joint batch, which needs
    batches of equal size and a wrapper that averages gradients (DDP, FSDP2). Accumulated batches are separate ones:
    accumulation adds no negatives; `mini_batch_tokens` is what makes large batches possible.

    Args:
        settings: by default the paper's.
    """

    def __init__(self, settings: ContrastiveSettings | None = None) -> None:
        self.settings = settings or ContrastiveSettings()

    @property
    def caches_gradients(self) -> bool:
        """Whether parameters get their gradients inside the loss's backward pass, and no graph leads to them."""
        return self.settings.mini_batch_tokens is not None

    def check(self, exit_layers: Sequence[int], embedding_size: int) -> None:
        """Refuse settings that do not fit a model; see `ContrastiveSettings.check`."""
        self.settings.check(exit_layers, embedding_size)

    def check_rotation(self, exit_layers: Sequence[int]) -> None:
        """Refuse settings that do not fit training in turn; see `ContrastiveSettings.check_rotation`."""
        self.settings.check_rotation(exit_layers)

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Losses of one batch.

        Args:
            model: a `ModularStarEncoderForRetrieval`, possibly wrapped.
            batch: the sides that `settings.pairs` names, `query` and `document` by default, each with `input_ids` and
                `attention_mask` (B, T), padded on either side. Sides of one pair have as many rows, row b of each
                belonging together; different pairs may have different numbers. Rows of one side may be of different
                kinds (descriptions and code).
            exit_layers: the exits to train.

        Raises:
            ValueError: sides, rows, exits or processes do not fit together; the message says which.
        """

        def embed(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
            output = model(**inputs, exit_layers=exit_layers)
            if len(output.exit_embeddings) != len(exit_layers):
                raise ValueError("nn.DataParallel mixes up exits and texts; start one process per device (torchrun).")
            return output.exit_embeddings, output.logit_scale

        self.settings.check_sides({side: number_of_texts(inputs) for side, inputs in batch.items()})
        stacks, logit_scale = embed_sides(model, embed, batch, self.settings.mini_batch_tokens)
        output = losses_from_embeddings(stacks, exit_layers, self.settings, logit_scale)
        return ObjectiveOutput(losses=output.losses, metrics=output.metrics)
