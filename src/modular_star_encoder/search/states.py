"""States of a shallow exit, kept so that a deeper pass over the same texts begins where the shallow one ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from modular_star_encoder.evaluation.encode import evaluating, length_batches, tokenize, without_padding

_TOKENS_PER_BATCH = 8192


def encode_states(
    model: torch.nn.Module, tokenizer: Any, texts: Sequence[str], exit_layers: Sequence[int]
) -> tuple[dict[int, np.ndarray], list[np.ndarray]]:
    """Embeddings of texts at several exits, and their states at the shallowest of these.

    Args:
        model, tokenizer: as `load_checkpoint` returns them.
        texts: N texts with their prompts; cut to what the model takes.
        exit_layers: exits of the model.

    Returns:
        {exit_layer: (N, D) float32}, and of each text (T, H) float32, its real tokens' states before the final norm.
    """
    exits = model.config.resolve_exits(exit_layers=exit_layers)
    token_ids = tokenize(tokenizer, list(texts), model.config.max_position_embeddings, progress=False)
    embeddings = {exit_layer: np.empty((len(texts), model.config.projection_size), np.float32) for exit_layer in exits}
    states: list[np.ndarray] = [np.empty((0, model.config.hidden_size), np.float32)] * len(texts)
    device = next(model.parameters()).device
    with evaluating(model), without_padding(model):
        for rows in length_batches([len(ids) for ids in token_ids], _TOKENS_PER_BATCH):
            batch = tokenizer.pad({"input_ids": [token_ids[row] for row in rows]}, return_tensors="pt").to(device)
            mask = batch["attention_mask"]
            output = model(batch["input_ids"], mask, exit_layers=exits, output_residual_states=True)
            for exit_layer, values in zip(exits, output.exit_embeddings, strict=True):
                embeddings[exit_layer][rows] = values.float().cpu().numpy()
            shallowest = output.residual_states[0]
            for place, row in enumerate(rows):
                states[row] = shallowest[place][mask[place].bool()].float().cpu().numpy()
    return embeddings, states


def resume_states(
    model: torch.nn.Module, states: Sequence[np.ndarray], start_layer: int, exit_layer: int
) -> np.ndarray:
    """Embeddings at an exit, computed from the states of a shallower one.

    Args:
        model: one with this exit.
        states: of each text (T, H), as `encode_states` returns them.
        start_layer: the exit that the states are of.
        exit_layer: a deeper one.

    Returns:
        (N, D) float32, what a straight pass gives.
    """
    parameter = next(model.parameters())
    embeddings = np.empty((len(states), model.config.projection_size), np.float32)
    with evaluating(model), without_padding(model):
        for rows in length_batches([len(one) for one in states], _TOKENS_PER_BATCH):
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(states[row]) for row in rows], batch_first=True)
            lengths = torch.tensor([len(states[row]) for row in rows])
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
            output = model(
                inputs_embeds=padded.to(parameter.device, parameter.dtype),
                attention_mask=mask.to(parameter.device),
                start_layer=start_layer,
                exit_layer=exit_layer,
            )
            embeddings[rows] = output.sentence_embedding.float().cpu().numpy()
    return embeddings
