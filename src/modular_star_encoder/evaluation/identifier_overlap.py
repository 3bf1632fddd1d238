"""In-context classification by identifiers alone: the yardstick that a trained model has to beat."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,}")
_IGNORED_LABEL = -100


def identifier_overlap(first: str, second: str) -> float:
    """Jaccard similarity, 0 to 1, of the sets of words of three characters or more that could be identifiers."""
    a, b = (set(_IDENTIFIER.findall(text)) for text in (first, second))
    return len(a & b) / len(a | b) if a | b else 0.0


def identifier_overlap_accuracy(
    fitted_on: Iterable[Mapping[str, torch.Tensor]],
    measured_on: Iterable[Mapping[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, float]:
    """Accuracy of "same repository if the identifiers overlap by more than a threshold".

    Args:
        fitted_on, measured_on: rows of `InContextPairs`; the threshold is the best one of the first.
        tokenizer: what made them.

    Returns:
        `accuracy` on `measured_on`, `fitted_accuracy` on `fitted_on`, and the `threshold`.
    """
    overlaps, labels = _overlaps(fitted_on, tokenizer)
    thresholds = np.unique(overlaps)
    accuracies = [((overlaps > threshold) == labels).mean() for threshold in thresholds]
    threshold = float(thresholds[int(np.argmax(accuracies))])
    unseen, unseen_labels = _overlaps(measured_on, tokenizer)
    return {
        "accuracy": float(((unseen > threshold) == unseen_labels).mean()),
        "fitted_accuracy": float(max(accuracies)),
        "threshold": threshold,
    }


def _overlaps(
    rows: Iterable[Mapping[str, torch.Tensor]], tokenizer: PreTrainedTokenizerFast
) -> tuple[np.ndarray, np.ndarray]:
    """The overlap of each pair, with its masked tokens restored, and whether both are from one repository."""
    overlaps, labels = [], []
    for row in rows:
        ids = torch.where(row["labels"] != _IGNORED_LABEL, row["labels"], row["input_ids"])
        middle = (ids == tokenizer.sep_token_id).nonzero().squeeze(-1)[1]
        overlaps.append(identifier_overlap(tokenizer.decode(ids[1:middle]), tokenizer.decode(ids[middle + 1 : -1])))
        labels.append(bool(row["icc_label"]))
    return np.array(overlaps), np.array(labels)
