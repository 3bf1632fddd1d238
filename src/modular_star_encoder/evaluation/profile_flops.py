"""Arithmetic of a pass to one exit, by formula."""

from __future__ import annotations

from modular_star_encoder.modeling import ModularStarEncoderConfig


def flops_per_token(config: ModularStarEncoderConfig, exit_layer: int, length: int) -> float:
    """Floating-point operations for each token of a text of `length` tokens, embedded at one exit.

    Matrix products alone are counted, a multiplication with its addition as two operations, as in Kaplan et al. (2020,
    arXiv 2001.08361, section 2.1) and in torch's `FlopCounterMode`. With hidden size H, size of keys K (key-value heads
    times head size), MLP size I, projection size D and T tokens:

        layer      2 · (2·H·H + 2·H·K + 2·H·I)     queries and outputs, keys and values, MLP
        attention  4 · T·H                         scores, and their weighted sum of values; grows with the text
        head       2 · (H·D + D·D)                 of every token; with `pool_then_project` once more for the text

    and `exit_layer` times layer and attention, plus one head. Tokens of padding cost as much as others unless
    `config.unpad_inputs`.

    Raises:
        ValueError: an exit that the model doesn't have, or no tokens.
    """
    config.check_exit(exit_layer)
    if length < 1:
        raise ValueError(f"A text has at least one token, not {length}.")
    hidden, projection = config.hidden_size, config.projection_size
    keys = config.num_key_value_heads * config.head_dim
    layer = 2 * (2 * hidden * hidden + 2 * hidden * keys + 2 * hidden * config.intermediate_size)
    attention = 4 * length * hidden
    head = 2 * (hidden * projection + projection * projection)
    if config.projection_order == "pool_then_project":
        head += head / length
    return float(exit_layer * (layer + attention) + head)
