"""Does an ONNX file compute what the model computes? Compared in onnxruntime against torch, at several shapes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modular_star_encoder.hub.onnx_export import OUTPUTS, open_session, served_exit
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval

TOLERANCE = 1e-4

_LONGEST = 256


@dataclass(frozen=True, slots=True)
class OnnxDifferences:
    """Largest absolute differences between a file and its model.

    Attributes:
        last_hidden_state: at real tokens, divided by the largest absolute value of the batch where that is above 1.
        sentence_embedding: of the embeddings, whose length is 1.
        batches: how many were compared.
    """

    last_hidden_state: float
    sentence_embedding: float
    batches: int


def check_onnx(
    model: ModularStarEncoderForRetrieval,
    path: str | os.PathLike,
    exit_layer: int | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> OnnxDifferences:
    """Compare an ONNX file with the exit that it was made of: one text and several, one token and many, both paddings.

    Args:
        model: the model that `export_onnx` was given.
        path: the file.
        exit_layer: as it was given there.

    Raises:
        ValueError: an output differs by more than `tolerance`, or is NaN; the message says which, where and by how
            much.
        ImportError: onnxruntime is missing.
    """
    served, session = served_exit(model, exit_layer), open_session(path)
    largest, batches = dict.fromkeys(OUTPUTS, 0.0), 0
    for batch in _batches(model.config.vocab_size, min(_LONGEST, model.config.max_position_embeddings)):
        with torch.inference_mode():
            expected = served(**batch)
        found = session.run(list(OUTPUTS), {name: tensor.numpy() for name, tensor in batch.items()})
        real = batch["attention_mask"].bool()
        for name, values in zip(OUTPUTS, map(torch.from_numpy, found), strict=True):
            wanted = expected[name]
            if name == "last_hidden_state":
                # What stands at padding is arbitrary, and never read.
                values, wanted = values[real], wanted[real]
            difference = float((values - wanted).abs().max() / wanted.abs().max().clamp(min=1))
            if not difference <= tolerance:
                raise ValueError(
                    f"{path} does not compute what the model computes: {name} differs by {difference:.2g} (allowed: "
                    f"{tolerance:g}) at a batch of {real.shape[0]} × {real.shape[1]} tokens."
                )
            largest[name] = max(largest[name], difference)
        batches += 1
    return OnnxDifferences(*(largest[name] for name in OUTPUTS), batches)


def _batches(vocab_size: int, longest: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random tokens: one and several texts, of equal and of different lengths, padded on the left and on the right."""
    generator = torch.Generator().manual_seed(0)
    for lengths in ((1,), (longest,), (1, 1), (7, 7, 7, 7, 7), (longest, 1, longest // 2)):
        width = max(lengths)
        places = torch.arange(width).expand(len(lengths), -1)
        tokens = torch.randint(vocab_size, (len(lengths), width), generator=generator)
        right = (places < torch.tensor(lengths)[:, None]).long()
        for mask in (right, right.flip(1)) if len(set(lengths)) > 1 else (right,):
            yield {"input_ids": tokens, "attention_mask": mask}
