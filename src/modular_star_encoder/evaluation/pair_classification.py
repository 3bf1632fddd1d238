"""Scores of a classifier of pairs at every exit."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm


@torch.inference_mode()
def classification_scores(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], *, progress: bool = True
) -> dict[int, dict[str, float]]:
    """Accuracy, and precision, recall and F1 of class 1, the metric of BigCloneBench since 2021-09-13.

    Args:
        model: a `ModularStarEncoderForSequenceClassification` with two classes, in evaluation mode.
        batches: `input_ids`, `attention_mask` and `labels`, as `ClassificationCollator` makes them.
        progress: whether to show a progress bar.

    Returns:
        exit → name → a fraction between 0 and 1; precision, recall and F1 are 0 where nothing is found.
    """
    exits, device = tuple(model.config.exit_layers), next(model.parameters()).device
    decisions, labels = [], []
    for batch in tqdm(batches, desc="classifying", unit="batch", disable=not progress, leave=False):
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        decisions.append(model(**inputs, exit_layers=exits).exit_logits.argmax(dim=-1).cpu().numpy())
        labels.append(batch["labels"].numpy())
    truth = np.concatenate(labels)
    return {
        exit_layer: binary_scores(decided, truth)
        for exit_layer, decided in zip(exits, np.concatenate(decisions, axis=1), strict=True)
    }


def binary_scores(decisions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of class 1, of decisions and labels (N,)."""
    found, true = int(decisions.sum()), int(labels.sum())
    right = int((decisions * labels).sum())
    return {
        "accuracy": float((decisions == labels).mean()),
        "precision": right / found if found else 0.0,
        "recall": right / true if true else 0.0,
        "f1": 2 * right / (found + true) if found + true else 0.0,
    }
