"""Size and cost of a training run, estimated before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass

from modular_star_encoder.data.splits import CODE_TO_CODE, TEXT_TO_CODE
from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderPreTrainedModel,
)
from modular_star_encoder.training.recipes import FinetuningRecipe, PretrainingRecipe
from modular_star_encoder.utils.errors import UserError

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
    """Estimate a pre-training run; `model` may be on the meta device.

    FLOPs per token are 6 per parameter of a layer and 12 × T × H per layer for attention over T tokens, as in Chowdhery
    et al. (arXiv 2204.02311, appendix B), and, at the masked tokens only, 6 per parameter of the heads at each exit.

    Raises:
        UserError: rows are longer than the model takes, or `tokens_per_step` does not divide.
    """
    config = model.config
    check_length(config, max_tokens=recipe.max_tokens)
    heads = sum(parameter.numel() for parameter in model.heads.parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    exits = 2 if recipe.training["rotate_shallow_exits"] else len(config.exit_layers)
    return Preflight(
        parameters=parameters,
        tokens_per_step=recipe.tokens_per_step,
        steps=recipe.max_steps,
        accumulation=recipe.accumulation(processes),
        processes=processes,
        flops_per_token=trunk_flops_per_token(model, recipe.max_tokens) + 6.0 * recipe.mlm_probability * exits * heads,
        memory_bytes=16 * parameters + activation_bytes(config, recipe.rows_per_device * recipe.max_tokens),
    )


def check_length(config: ModularStarEncoderConfig, **lengths: int) -> None:
    """Raise UserError if a setting for the longest text is above the model's `max_position_embeddings`."""
    for name, length in lengths.items():
        if length > config.max_position_embeddings:
            raise UserError(
                "training.length.too_long",
                f"{name} {length} must be at most the model's max_position_embeddings "
                f"{config.max_position_embeddings}.",
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


@dataclass(frozen=True)
class FinetuningPreflight:
    """Size of a run.

    Attributes:
        parameters, trained_parameters: of the model with its heads; with adapters, few of them are trained.
        groups: kind of pairs → number of groups of rows without common texts.
        pairs_per_step, steps, processes: of the run.
        epochs: kind of pairs → how often each group has its turn.
        tokens_per_pair: mean of query, document and negative together, padding not counted; 0 if no data was seen.
        flops_per_pair: floating-point operations of training on one pair.
        memory_bytes: on each device: float32 weights, gradients and two moments, and activations; an upper estimate.
    """

    parameters: int
    trained_parameters: int
    groups: Mapping[str, int]
    pairs_per_step: int
    steps: int
    processes: int
    epochs: Mapping[str, float]
    tokens_per_pair: float
    flops_per_pair: float
    memory_bytes: int

    def __str__(self) -> str:
        pairs = self.pairs_per_step * self.steps
        return "\n".join(
            [
                f"parameters            {self.parameters:,}, of which {self.trained_parameters:,} are trained",
                *(
                    f"{kind:21} {self.groups[kind]:,} groups without common texts, {self.epochs[kind]:.2f} epochs"
                    if kind in self.groups
                    else f"{kind:21} none in this data"
                    for kind in (TEXT_TO_CODE, CODE_TO_CODE)
                ),
                f"pairs per step        {self.pairs_per_step:,} ({self.pairs_per_step // self.processes:,} on each of "
                f"{self.processes} processes)",
                f"steps                 {self.steps:,} ({pairs:,} pairs of {self.tokens_per_pair:.0f} tokens)",
                f"training FLOPs        {self.flops_per_pair:.2e} per pair, {self.flops_per_pair * pairs:.2e} in all",
                f"memory per device     at most about {self.memory_bytes / 2**30:.1f} GiB",
            ]
        )


def finetuning_preflight(
    model: ModularStarEncoderForRetrieval,
    recipe: FinetuningRecipe,
    processes: int,
    groups: Mapping[str, int],
    tokens: tuple[float, float],
    trained_parameters: int | None = None,
) -> FinetuningPreflight:
    """Estimate a fine-tuning run; FLOPs are counted as for pre-training, and a third more where gradients are cached.

    Args:
        model: may be on the meta device.
        recipe: the settings.
        processes: devices that train.
        groups: number of groups of each kind of pairs; see `BatchPlan`.
        tokens: mean tokens of a description and of a snippet; a hard negative counts as a snippet.
        trained_parameters: all of the model if None.

    Raises:
        UserError: texts are longer than the model takes.
    """
    config, settings = model.config, recipe.objective
    check_length(config, max_text_tokens=recipe.max_text_tokens, max_code_tokens=recipe.max_code_tokens)
    longest = max(recipe.max_text_tokens, recipe.max_code_tokens)
    rows = recipe.batch_size // processes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = parameters if trained_parameters is None else trained_parameters
    text, code = tokens
    sides = {TEXT_TO_CODE: (text, code), CODE_TO_CODE: (code, code)}
    # A batch has equally many pairs of each kind in the data.
    negatives = [code] * (len(settings.sides) - 2)
    pairs = [[*sides[kind], *negatives] for kind in (groups or [TEXT_TO_CODE])]
    texts = [length for pair in pairs for length in pair]
    in_batch = len(settings.sides) * rows * longest
    in_memory = min(settings.mini_batch_tokens or in_batch, in_batch)
    stacks = 2 * 4 * len(config.exit_layers) * len(settings.sides) * recipe.batch_size * config.projection_size
    passes = 1.0 if settings.mini_batch_tokens is None else 4 / 3
    return FinetuningPreflight(
        parameters=parameters,
        trained_parameters=trained,
        groups=dict(groups),
        pairs_per_step=recipe.batch_size,
        steps=recipe.max_steps,
        processes=processes,
        epochs={kind: recipe.max_steps * recipe.batch_size / len(groups) / count for kind, count in groups.items()},
        tokens_per_pair=sum(texts) / len(pairs),
        flops_per_pair=passes * sum(trunk_flops_per_token(model, length) * length for length in texts) / len(pairs),
        memory_bytes=4 * parameters + 12 * trained + activation_bytes(config, in_memory) + stacks,
    )
