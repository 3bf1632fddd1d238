"""Settings of contrastive fine-tuning, and the exchange of embeddings between processes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, StrictStr
from pydantic import Field as Constraint
from torch import distributed

from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import (
    Count,
    Different,
    ExitLayer,
    Float,
    NonNegative,
    Positive,
    settings_class,
)


def _have_own_names(pairs: Any) -> Any:
    if any(len(set(pair)) < len(pair) for pair in pairs) or len({pair[:2] for pair in pairs}) < len(pairs):
        raise ValueError("must not have a name twice in a set, or two sets with the same first two names")
    return pairs


Pair = Annotated[tuple[StrictStr, ...], Constraint(min_length=2)]
Pairs = Annotated[tuple[Pair, ...], Constraint(min_length=1), AfterValidator(_have_own_names)]
Sizes = Annotated[tuple[Count, ...], Constraint(min_length=1), Different]


@settings_class
class ContrastiveSettings:
    """Settings of `ContrastiveObjective`. The defaults give the paper's loss.

    Args:
        pairs: which lists of texts of a batch (its *sides*) belong together. Each set names an anchor, a positive and
            any number of hard negatives, such as `(("query", "document", "negative"),)`. Two sets may share a side, as
            in `(("description", "code"), ("code", "translation"))`. The loss is the mean over the pairs of all sets.
        logit_scale: multiplier of the similarities, which the paper calls "temperature 10.0". A model with a learned
            scale (`logit_scale_init_value` in its configuration) uses the learned scale instead.
        mini_batch_tokens: largest number of tokens in a mini-batch, padding included. Every mini-batch is embedded
            twice, and only one at a time has activations in memory (gradient caching), so memory hardly grows with the
            batch (benchmarks/README.md). If `None`, each side is embedded once, as a whole. In bfloat16 on a CPU, set
            the environment variables LRU_CACHE_CAPACITY and ONEDNN_PRIMITIVE_CACHE_CAPACITY to 64, as `mose` does: by
            default torch keeps up to 2,048 compiled operations, one for each length.
        dimensions: embedding sizes to train (Matryoshka, arXiv 2205.13147), for all exits, `(64, 256)`, or by exit,
            `{4: (64, 256)}`. Embeddings are cut to each size and normalised again; the loss of an exit is the mean over
            its sizes. The full size is trained only if it is listed. With `None`, or for an exit without an entry, only
            the full size is trained.
        teacher: exit whose scores the other exits learn: `"deepest"`, `"next_deeper"`, `"ensemble"` (mean of the scores
            of all exits), or an exit's number. Distillation sends no gradient to the teacher. An untrained teacher
            teaches noise (benchmarks/results/mini_parallel_ablation.md), so begin with fine-tuned models.
        distillation_weight: weight of the Kullback-Leibler divergence from the teacher's distribution over the
            candidates, at full embedding size, to each exit's distribution.
        distillation_temperature: number that divides the logits of teacher and exit. The divergence is multiplied by
            the squared temperature, which preserves the size of gradients (Hinton et al., arXiv 1503.02531, section 2).
        alignment_weight: weight of 1 - cosine(exit's embedding, target's embedding). This term brings all exits into
            one embedding space, so that queries embedded at a shallow exit can search documents of a deep exit.
        alignment_target: exit to align with, which gets no gradient: `"deepest"`, `"next_deeper"`, or an exit's number.
        false_negative_margin: mask a negative if its similarity at the deepest exit exceeds the positive's similarity
            minus this margin. GISTEmbed (arXiv 2402.16829) compares similarities of a separate model. An untrained
            deepest exit masks half the negatives, so begin with fine-tuned models.
        false_negative_factor: mask a negative if its similarity at the deepest exit exceeds this factor times the
            positive's similarity.

    Raises:
        UserError: a value is of another type or out of range, or margin and factor are both set (`settings.value`).

    Example:
        >>> ContrastiveSettings(dimensions=[128, 256], mini_batch_tokens=8192).sizes(exit_layer=4, embedding_size=256)
        (128, 256)
    """

    pairs: Pairs = (("query", "document"),)
    logit_scale: Positive = 10.0
    mini_batch_tokens: Count | None = None
    dimensions: Sizes | Mapping[ExitLayer, Sizes] | None = None
    teacher: Literal["deepest", "next_deeper", "ensemble"] | ExitLayer = "deepest"
    distillation_weight: NonNegative = 0.0
    distillation_temperature: Positive = 1.0
    alignment_weight: NonNegative = 0.0
    alignment_target: Literal["deepest", "next_deeper"] | ExitLayer = "deepest"
    false_negative_margin: Annotated[Float, Constraint(ge=-2, le=2)] | None = None
    false_negative_factor: Positive | None = None

    def __post_init__(self) -> None:
        if self.false_negative_margin is not None and self.false_negative_factor is not None:
            raise UserError("settings.value", "Set `false_negative_margin` or `false_negative_factor`, not both.")

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of a batch's sides (`query`, `document`, …), each once, in the order of `pairs`."""
        return tuple(dict.fromkeys(side for pair in self.pairs for side in pair))

    @property
    def leaves_out_false_negatives(self) -> bool:
        """Whether the loss leaves out false negatives: negatives so similar that they are probably positives."""
        return self.false_negative_margin is not None or self.false_negative_factor is not None

    def sizes(self, exit_layer: int, embedding_size: int) -> tuple[int, ...]:
        """Return the embedding sizes to train at an exit, ascending; `embedding_size` is the full size."""
        listed = self.dimensions.get(exit_layer) if isinstance(self.dimensions, Mapping) else self.dimensions
        return (embedding_size,) if listed is None else tuple(sorted(listed))

    def check(self, exit_layers: Sequence[int], embedding_size: int, *, rotates: bool = False) -> None:
        """Raise UserError if the settings do not fit a model's trained exits and its embedding size.

        If `rotates`, a step may skip all exits but the deepest, so only the deepest can be teacher or alignment target.
        """
        self.check_step(exit_layers, embedding_size, self.dimensions if isinstance(self.dimensions, Mapping) else ())
        for name, chosen in self._guides() if rotates and len(exit_layers) > 1 else ():
            if chosen not in ("deepest", exit_layers[-1]):
                message = f"{name}={chosen!r} does not work with exit_schedule: set {name} to deepest."
                raise UserError("contrastive.rotation", message)

    def _guides(self) -> list[tuple[str, str | int]]:
        """Return (name, value) of the settings in use that name an exit from which other exits learn."""
        weights = {"teacher": self.distillation_weight, "alignment_target": self.alignment_weight}
        return [(name, getattr(self, name)) for name, weight in weights.items() if weight]

    def check_step(self, exit_layers: Sequence[int], embedding_size: int, named: Iterable[int] = ()) -> None:
        """Raise UserError if a setting, or `named`, names an untrained exit, or a size exceeds `embedding_size`."""
        used = [*self._guides(), *(("dimensions", exit_layer) for exit_layer in named)]
        unknown = [f"`{name}` names exit {k}" for name, k in used if isinstance(k, int) and k not in exit_layers]
        if unknown:
            message = f"{unknown[0]}, but the trained exits are {', '.join(map(str, exit_layers))}."
            raise UserError("contrastive.exit", message)
        if (largest := max(self.sizes(exit_layer, 1)[-1] for exit_layer in exit_layers)) > embedding_size:
            message = f"`dimensions` must be at most the embedding size {embedding_size}, not {largest}."
            raise UserError("contrastive.dimensions", message)

    def check_sides(self, rows: Mapping[str, int]) -> None:
        """Raise UserError if the sides of a batch and their numbers of `rows`, {side: number}, do not fit `pairs`."""
        if set(rows) != set(self.sides):
            found, used = (", ".join(sorted(sides)) for sides in (rows, self.sides))
            message = f"The batch has the sides {found}, but the objective's `pairs` use {used}."
            raise UserError("contrastive.sides", message)
        for pair in self.pairs:
            numbers = [rows[side] for side in pair]
            if len(set(numbers)) > 1 or not numbers[0]:
                message = f"The sides {', '.join(pair)} have {numbers} rows; give each the same number, at least 1."
                raise UserError("contrastive.rows", message)


def rank_and_count() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without `torch.distributed`."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather_stacks(stacks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather the embeddings (E exits, B texts, D) of each side from all processes into (E, processes × B, D).

    The rows of the process with rank r begin at r × B. The backward pass sums the gradients that all processes have for
    a row. If each process computes the loss of its own rows, and a wrapper such as DDP averages gradients, the result
    is exactly the gradient of the joint batch's loss.
    """
    if rank_and_count()[1] == 1:
        return dict(stacks)
    joint = _GatherWithGradient.apply(torch.cat(list(stacks.values()), dim=1))
    by_side = joint.split([stack.shape[1] for stack in stacks.values()], dim=2)
    return {side: part.transpose(0, 1).flatten(1, 2) for side, part in zip(stacks, by_side, strict=True)}


class _GatherWithGradient(torch.autograd.Function):
    """Gather tensors (E, N, D) of all processes into (processes, E, N, D); the backward pass sums their gradients."""

    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor) -> torch.Tensor:
        gathered = stack.new_empty(rank_and_count()[1], *stack.shape)
        distributed.all_gather(list(gathered), stack.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        own = torch.empty_like(gradient[0])
        distributed.reduce_scatter(own, list(gradient.contiguous()))
        return own
