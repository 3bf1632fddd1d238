"""Contrastive fine-tuning: the symmetric CLIP loss of each exit on its own projection head."""

from typing import Any

import torch
from torch import nn

from modular_star_encoder.objectives.outputs import ObjectiveOutput


def clip_losses(
    queries: torch.Tensor, documents: torch.Tensor, logit_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric cross-entropy over the similarities of a batch (CLIP, arXiv 2103.00020, figure 3).

    Args:
        queries: (E, B, D), L2-normalised; row b belongs to row b of `documents`.
        documents: (E, B, D), L2-normalised.
        logit_scale: multiplies the cosine similarities; the paper's "temperature 10.0".

    Returns:
        losses (E,) float32, the mean of both directions; accuracies (E,), the share of queries whose own document is
        the most similar one.
    """
    scores = logit_scale * torch.einsum("eqd,ecd->eqc", queries.float(), documents.float())
    targets = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[:2])
    by_query = nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none").mean(dim=1)
    by_document = nn.functional.cross_entropy(scores, targets, reduction="none").mean(dim=1)
    accuracies = (scores.argmax(dim=-1) == targets).float().mean(dim=1)
    return (by_query + by_document) / 2, accuracies


class ContrastiveObjective:
    """CLIP loss between descriptions and code at each exit.

    Args:
        logit_scale: multiplies similarities, 10 in the paper (a temperature of 0.1).
    """

    def __init__(self, logit_scale: float = 10.0) -> None:
        if logit_scale <= 0:
            raise ValueError(f"logit_scale {logit_scale} must be positive.")
        self.logit_scale = logit_scale

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Losses of one batch.

        Args:
            model: a `ModularStarEncoderForRetrieval`, possibly wrapped.
            batch: `query` and `document`, each with `input_ids` and `attention_mask` (B, T).
            exit_layers: the exits to train.
        """
        queries = model(**batch["query"], exit_layers=exit_layers).exit_embeddings
        documents = model(**batch["document"], exit_layers=exit_layers).exit_embeddings
        losses, accuracies = clip_losses(queries, documents, self.logit_scale)
        return ObjectiveOutput(
            losses=losses, metrics={"clip_loss": losses.detach(), "clip_accuracy": accuracies.detach()}
        )
