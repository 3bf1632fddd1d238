"""Settings of contrastive fine-tuning, and the exchange of embeddings between processes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from modular_star_encoder.utils.errors import UserError

DISTILLATION_TEACHERS = ("deepest", "next_deeper", "ensemble")
ALIGNMENT_TARGETS = ("deepest", "next_deeper")


@dataclass(frozen=True)
class ContrastiveSettings:
    """Settings of `ContrastiveObjective`; the paper's objective by default, all additions from `dimensions` on off.

    Args:
        pairs: sets of pairs, each of them the names of sides of a batch: anchor, positive, and any number of hard
            negatives. `(("query", "document", "negative"),)`, or text→code and code→code pairs that share a side:
            `(("description", "code"), ("code", "translation"))`. The loss is the mean over all pairs.
        logit_scale: multiplies similarities, the paper's "temperature 10.0" (a temperature of 0.1). A model with a
            learned scale (`logit_scale_init_value` in its configuration) uses its own.
        mini_batch_tokens: embed the batch by mini-batches of at most this many tokens, padding included, and keep no
            activations of the others (gradient caching): memory hardly grows with the batch (benchmarks/README.md),
            and each text is embedded twice. `None` embeds each side at once. In bfloat16 on a CPU, set the environment
            variables LRU_CACHE_CAPACITY and ONEDNN_PRIMITIVE_CACHE_CAPACITY to 64, as `mose` does: by default torch
            keeps up to 2,048 compiled operations, one for each length.
        dimensions: sizes of the embedding that each exit is trained at (Matryoshka, arXiv 2205.13147): for all exits
            alike, or by exit, `{4: (64, 256)}`. Embeddings are cut and normalised again; the loss of an exit is the
            mean over its sizes. List the full size too if it is to be trained. `None`, or an exit without an entry: the
            full size alone.
        teacher: exit whose scores the others are trained to have: `"deepest"`, `"next_deeper"`, `"ensemble"` (mean of
            the scores of all exits), or an exit's number. It is never trained by its pupils. One that isn't trained
            yet teaches noise (benchmarks/results/mini_parallel_ablation.md): begin with fine-tuned models.
        distillation_weight: of the Kullback-Leibler divergence from the teacher's distribution over the candidates, at
            full size, to each exit's.
        distillation_temperature: divides the logits of both; the divergence is multiplied by its square, which keeps
            gradients at one size (Hinton et al., arXiv 1503.02531, section 2).
        alignment_weight: of 1 - cosine(exit's embedding, target's embedding), which brings exits into one space, so
            that queries of a shallow exit can search an index of a deep one.
        alignment_target: `"deepest"`, `"next_deeper"`, or an exit's number; never trained by the others.
        false_negative_margin: a negative is left out where the deepest exit's similarity is above that of the pair
            minus this margin (GISTEmbed, arXiv 2402.16829, whose guide is another, trained model; here an exit that
            isn't trained yet would mask half the negatives, so begin with fine-tuned ones).
        false_negative_factor: the same where it is above this factor times that of the pair.

    Raises:
        UserError: a value is of another type or out of range (`settings.value`).

    Example:
        >>> ContrastiveSettings(dimensions=[128, 256], mini_batch_tokens=8192).sizes(exit_layer=4, embedding_size=256)
        (128, 256)
    """

    pairs: Sequence[Sequence[str]] = (("query", "document"),)
    logit_scale: float = 10.0
    mini_batch_tokens: int | None = None
    dimensions: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    teacher: str | int = "deepest"
    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0
    alignment_weight: float = 0.0
    alignment_target: str | int = "deepest"
    false_negative_margin: float | None = None
    false_negative_factor: float | None = None

    def __post_init__(self) -> None:
        margin, factor = self.false_negative_margin, self.false_negative_factor
        by_exit = self.dimensions if isinstance(self.dimensions, Mapping) else {1: self.dimensions}
        for name in ("logit_scale", "distillation_temperature"):
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a number above 0")
        for name in ("distillation_weight", "alignment_weight"):
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) >= 0, "a number from 0")
        for name, words in (("teacher", DISTILLATION_TEACHERS), ("alignment_target", ALIGNMENT_TARGETS)):
            value = getattr(self, name)
            self._require(name, value in words or _is_count(value), f"one of {', '.join(words)}, or an exit")
        tokens = self.mini_batch_tokens
        self._require("mini_batch_tokens", tokens is None or _is_count(tokens), "a whole number above 0, or None")
        are_pairs = "lists of at least two different names: anchor, positive, negatives"
        self._require("pairs", _are_pairs(self.pairs), are_pairs)
        are_sizes = self.dimensions is None or all(_is_count(exit) and _are_sizes(by_exit[exit]) for exit in by_exit)
        self._require("dimensions", are_sizes, "different sizes such as [64, 256], or such a list per exit")
        is_cosine = margin is None or (_is_number(margin) and -2 <= margin <= 2)
        self._require("false_negative_margin", is_cosine, "a difference of cosines, between -2 and 2")
        is_factor = factor is None or (_is_number(factor) and factor > 0 and margin is None)
        self._require("false_negative_factor", is_factor, "a number above 0, and without false_negative_margin")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError("settings.value", f"{name} must be {rule}, not {getattr(self, name)!r}.")

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the sides of a batch, each once, in the order of `pairs`."""
        return tuple(dict.fromkeys(side for pair in self.pairs for side in pair))

    @property
    def leaves_out_false_negatives(self) -> bool:
        """Whether negatives may be masked."""
        return self.false_negative_margin is not None or self.false_negative_factor is not None

    def sizes(self, exit_layer: int, embedding_size: int) -> tuple[int, ...]:
        """Embedding sizes that an exit is trained at, ascending."""
        listed = self.dimensions.get(exit_layer) if isinstance(self.dimensions, Mapping) else self.dimensions
        return (embedding_size,) if listed is None else tuple(sorted(listed))

    def check(self, exit_layers: Sequence[int], embedding_size: int) -> None:
        """Raise UserError if an exit is not among the trained `exit_layers`, or a size is above `embedding_size`."""
        self.check_step(exit_layers, embedding_size)
        if isinstance(self.dimensions, Mapping):
            _check_exits("dimensions", self.dimensions, exit_layers)

    def check_step(self, exit_layers: Sequence[int], embedding_size: int) -> None:
        """The same for the exits of one step, which may be some of those that `dimensions` names."""
        if self.distillation_weight and isinstance(self.teacher, int):
            _check_exits("teacher", [self.teacher], exit_layers)
        if self.alignment_weight and isinstance(self.alignment_target, int):
            _check_exits("alignment_target", [self.alignment_target], exit_layers)
        largest = max(self.sizes(exit_layer, 1)[-1] for exit_layer in exit_layers)
        if largest > embedding_size:
            raise UserError(
                "contrastive.dimensions", f"dimensions must be at most the embedding's {embedding_size}, not {largest}."
            )

    def check_rotation(self, exit_layers: Sequence[int]) -> None:
        """Raise UserError if exits learn from another one than the deepest, which a step with two exits may lack."""
        chosen = {"teacher": self.distillation_weight, "alignment_target": self.alignment_weight}
        for name, weight in chosen.items():
            if weight and len(exit_layers) > 1 and getattr(self, name) not in ("deepest", exit_layers[-1]):
                raise UserError(
                    "contrastive.rotation",
                    f"{name} {getattr(self, name)!r} does not work with rotate_shallow_exits, where each step has the "
                    "deepest exit and one other: set deepest.",
                )

    def check_sides(self, rows: Mapping[str, int]) -> None:
        """Raise UserError if a batch, as side → number of rows, does not have the sides and equal rows of `pairs`."""
        if set(rows) != set(self.sides):
            raise UserError(
                "contrastive.sides",
                f"The batch has the sides {', '.join(sorted(rows))}; the objective's pairs use "
                f"{', '.join(sorted(self.sides))}.",
            )
        for pair in self.pairs:
            numbers = [rows[side] for side in pair]
            if len(set(numbers)) > 1 or not numbers[0]:
                raise UserError(
                    "contrastive.rows",
                    f"{', '.join(pair)} have {', '.join(map(str, numbers))} rows; their numbers must be equal.",
                )


def _check_exits(name: str, named: Iterable[int], exit_layers: Sequence[int]) -> None:
    for exit_layer in named:
        if exit_layer not in exit_layers:
            exits = ", ".join(map(str, exit_layers))
            raise UserError("contrastive.exit", f"{name} names exit {exit_layer}. The trained exits are {exits}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_count, value)) and 0 < len(set(value)) == len(value)


def _are_pairs(value: Any) -> bool:
    """Whether these are lists of at least two different names, without two lists of one anchor and positive."""
    if not isinstance(value, list | tuple) or not all(isinstance(pair, list | tuple) for pair in value):
        return False
    are_names = all(isinstance(side, str) for pair in value for side in pair)
    return (
        are_names
        and all(len(set(pair)) == len(pair) >= 2 for pair in value)
        and (0 < len({tuple(pair[:2]) for pair in value}) == len(value))
    )


def rank_and_count() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without `torch.distributed`."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """The whole numbers of every process, as many in each."""
    processes = rank_and_count()[1]
    if processes == 1:
        return [list(numbers)]
    own = torch.tensor(numbers, device=device)
    everyones = [torch.empty_like(own) for _ in range(processes)]
    distributed.all_gather(everyones, own)
    return torch.stack(everyones).tolist()


def gather_stacks(stacks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embeddings of all processes, with gradient, in one collective for all sides and exits.

    Under an averaging wrapper such as DDP, a loss of local rows against these columns has the exact gradient of the
    loss on the joint batch: the backward pass sums what every process found for a column, and needs no factor.

    Args:
        stacks: side → (E, B, D), of equal sizes in every process.

    Returns:
        side → (E, processes × B, D); the rows of process r begin at r × B.
    """
    if rank_and_count()[1] == 1:
        return dict(stacks)
    joint = _GatherWithGradient.apply(torch.cat(list(stacks.values()), dim=1))
    by_side = joint.split([stack.shape[1] for stack in stacks.values()], dim=2)
    return {side: part.transpose(0, 1).flatten(1, 2) for side, part in zip(stacks, by_side, strict=True)}


class _GatherWithGradient(torch.autograd.Function):
    """(E, N, D) of each process → (processes, E, N, D); the backward pass sums over processes (reduce-scatter)."""

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
