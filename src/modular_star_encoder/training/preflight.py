"""What a run of training will take, estimated before it starts."""

from dataclasses import dataclass

from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForPreTraining,
    ModularStarEncoderPreTrainedModel,
)
from modular_star_encoder.training.pretraining_recipe import PretrainingRecipe

# Per token and layer, in units of the hidden size, what the backward pass of a pre-norm block keeps in 2-byte numbers:
# block input, two normalised inputs, queries, keys and values, attention output, projections, residuals.
_KEPT_PER_HIDDEN = 16
# Of the MLP's width: before and after the activation.
_KEPT_PER_INTERMEDIATE = 2


@dataclass(frozen=True)
class Preflight:
    """Size of a run.

    Attributes:
        parameters: of the model with its heads.
        tokens_per_step, steps, accumulation, processes: of the run; `accumulation` per process.
        flops_per_token: floating-point operations of training on one token, forward and backward.
        memory_bytes: on each device: float32 weights, gradients and two moments, and activations; an estimate.
    """

    parameters: int
    tokens_per_step: int
    steps: int
    accumulation: int
    processes: int
    flops_per_token: float
    memory_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, rows counted as full."""
        return self.tokens_per_step * self.steps

    def __str__(self) -> str:
        return "\n".join(
            [
                f"parameters            {self.parameters:,}",
                f"tokens per step       {self.tokens_per_step:,} ({self.accumulation} batches on each of "
                f"{self.processes} processes)",
                f"steps                 {self.steps:,} ({self.tokens / 1e9:,.3f} billion tokens)",
                f"training FLOPs        {self.flops_per_token:.2e} per token, {self.flops_per_token * self.tokens:.2e} "
                "in all",
                f"memory per device     about {self.memory_bytes / 2**30:.1f} GiB",
            ]
        )


def preflight(model: ModularStarEncoderForPreTraining, recipe: PretrainingRecipe, processes: int) -> Preflight:
    """Estimate a run; `model` may be on the meta device.

    FLOPs per token are 6 per parameter of a layer and 12 × T × H per layer for attention over T tokens, as in Chowdhery
    et al. (arXiv 2204.02311, appendix B), and, at the masked tokens only, 6 per parameter of the heads at each exit.

    Raises:
        ValueError: rows are longer than the model takes, or `tokens_per_step` does not divide; nothing is started.
    """
    config = model.config
    if recipe.max_tokens > config.max_position_embeddings:
        raise ValueError(
            f"max_tokens {recipe.max_tokens} must be at most the model's max_position_embeddings "
            f"{config.max_position_embeddings}."
        )
    heads = sum(parameter.numel() for parameter in model.heads.parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    exits = 2 if recipe.rotate_shallow_exits else len(config.exit_layers)
    return Preflight(
        parameters=parameters,
        tokens_per_step=recipe.tokens_per_step,
        steps=recipe.steps,
        accumulation=recipe.accumulation(processes),
        processes=processes,
        flops_per_token=trunk_flops_per_token(model, recipe.max_tokens) + 6.0 * recipe.mask_probability * exits * heads,
        memory_bytes=16 * parameters + activation_bytes(config, recipe.rows_per_device * recipe.max_tokens),
    )


def trunk_flops_per_token(model: ModularStarEncoderPreTrainedModel, tokens: float) -> float:
    """Floating-point operations of training the layers on one token of a text of `tokens`; see `preflight`."""
    config = model.config
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    return 6.0 * layers + 12.0 * config.num_hidden_layers * config.hidden_size * tokens


def activation_bytes(config: ModularStarEncoderConfig, tokens: int) -> int:
    """Bytes that the backward pass through all layers needs of so many tokens at once; an estimate."""
    kept = _KEPT_PER_HIDDEN * config.hidden_size + _KEPT_PER_INTERMEDIATE * config.intermediate_size
    return 2 * tokens * config.num_hidden_layers * kept
