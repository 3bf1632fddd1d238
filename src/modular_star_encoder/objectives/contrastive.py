"""Contrastive fine-tuning: the symmetric CLIP loss of each exit on its own projection head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings, gather_stacks, rank_and_count
from modular_star_encoder.objectives.exit_losses import ObjectiveOutput
from modular_star_encoder.objectives.gradient_cache import embed_sides, number_of_texts
from modular_star_encoder.utils.errors import UserError

# Similarities computed at once, of all exits: 2**20 float32 are 4 MiB, however large the batch.
SCORES_PER_CHUNK = 2**20


@dataclass
class ContrastiveTerms:
    """Terms of the loss of one batch.

    Args:
        terms: name → (E,) with gradient; their sum is the loss of each exit. `clip` always; `distillation` and
            `alignment` where they are on, multiplied by their weights.
        metrics: name → (E,) or (), detached.
    """

    terms: dict[str, torch.Tensor]
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def losses(self) -> torch.Tensor:
        """(E,), the sum of the terms."""
        return torch.stack(list(self.terms.values())).sum(dim=0)


def losses_from_embeddings(
    stacks: Mapping[str, torch.Tensor],
    exit_layers: Sequence[int],
    settings: ContrastiveSettings | None = None,
    logit_scale: torch.Tensor | float | None = None,
) -> ContrastiveTerms:
    """Symmetric cross-entropy over the similarities of a batch (CLIP, arXiv 2103.00020, figure 3), and its additions.

    Each anchor of this process is scored against the positives and negatives of all processes, column by column, and
    each positive against the anchors of all processes; the loss is the mean of both directions over the pairs. With
    several sets of pairs each has candidates of its own.

    Args:
        stacks: side → (E, B, D), L2-normalised; row b of a pair's positive and negatives belongs to its anchor's.
        exit_layers: the exits, in the order of E.
        settings: which terms are computed.
        logit_scale: a learned multiplier of similarities (1,), in place of `settings.logit_scale`.

    Returns:
        The terms, and the metrics `clip_loss`, `clip_accuracy` (share of anchors whose own positive is the most similar
        candidate, at the largest embedding size), with several sets `clip_accuracy_{anchor}_{positive}`, and by option
        `clip_accuracy_smallest` (at the smallest size), `distillation_loss`, `alignment_loss` (without their weights),
        `masked_negatives` (share) and `logit_scale`.

    Raises:
        UserError: a side is missing or superfluous, the sides of a pair have different numbers of rows, or the settings
            name an exit or a size that does not exist.
    """
    settings = settings or ContrastiveSettings()
    settings.check_sides({side: stack.shape[1] for side, stack in stacks.items()})
    stacks = {side: stacks[side] for side in settings.sides}
    first = next(iter(stacks.values()))
    settings.check_step(exit_layers, first.shape[-1])
    with torch.autocast(first.device.type, enabled=False):
        stacks = {side: stack.to(torch.promote_types(stack.dtype, torch.float32)) for side, stack in stacks.items()}
        scoring = _Scoring.of(
            settings, exit_layers, first, settings.logit_scale if logit_scale is None else logit_scale
        )
        gathered = gather_stacks(stacks)
        by_pair = {tuple(pair): _pair_sums(pair, stacks, gathered, scoring) for pair in settings.pairs}
        rows = {pair: stacks[pair[0]].shape[1] for pair in by_pair}
        output = _means(by_pair, rows, settings)
        if settings.alignment_weight:
            joint = torch.cat(list(stacks.values()), dim=1)
            _add_term(output, "alignment", _alignment(joint, scoring.target), settings.alignment_weight)
        if logit_scale is not None:
            output.metrics["logit_scale"] = scoring.logit_scale.detach().reshape(())
    return output


def _means(
    by_pair: Mapping[tuple[str, ...], Mapping[str, torch.Tensor]],
    rows: Mapping[tuple[str, ...], int],
    settings: ContrastiveSettings,
) -> ContrastiveTerms:
    """Terms and metrics as means over all pairs, from the sums over those of each set."""
    names = next(iter(by_pair.values()))
    means: dict[str, torch.Tensor] = {
        name: reduce(torch.add, [sums[name] for sums in by_pair.values()]) / sum(rows.values()) for name in names
    }
    output = ContrastiveTerms({"clip": means["clip"]}, {"clip_loss": means["clip"].detach()})
    output.metrics["clip_accuracy"] = means["hits"]
    if len(by_pair) > 1:
        for pair, sums in by_pair.items():
            output.metrics[f"clip_accuracy_{pair[0]}_{pair[1]}"] = sums["hits"] / rows[pair]
    if settings.dimensions is not None:
        output.metrics["clip_accuracy_smallest"] = means["hits_smallest"]
    if settings.distillation_weight:
        _add_term(output, "distillation", means["distillation"], settings.distillation_weight)
    if settings.leaves_out_false_negatives:
        output.metrics["masked_negatives"] = means["masked"]
    return output


def _add_term(output: ContrastiveTerms, name: str, term: torch.Tensor, weight: float) -> None:
    output.terms[name] = weight * term
    output.metrics[f"{name}_loss"] = term.detach()


@dataclass(frozen=True)
class _Scoring:
    """How the scores of a batch become losses.

    Args:
        sizes: embedding size → places of the exits that are trained at it.
        counts: (E,), number of sizes of each exit.
        ends: smallest and largest size of each exit.
        teacher: (E, E), row e: the weights with which the exits' scores make up the teacher of exit e; zeros where it
            has none.
        target: place of the exit that each exit is aligned to.
    """

    settings: ContrastiveSettings
    logit_scale: torch.Tensor
    sizes: dict[int, list[int]]
    counts: torch.Tensor
    ends: tuple[tuple[int, int], ...]
    teacher: torch.Tensor
    target: list[int]

    @classmethod
    def of(
        cls,
        settings: ContrastiveSettings,
        exit_layers: Sequence[int],
        stack: torch.Tensor,
        logit_scale: torch.Tensor | float,
    ) -> "_Scoring":
        """The scoring of stacks such as this one, (E, B, D)."""
        dtype = torch.promote_types(stack.dtype, torch.float32)
        by_exit = [settings.sizes(exit_layer, stack.shape[-1]) for exit_layer in exit_layers]
        sizes: dict[int, list[int]] = {}
        for place, of_exit in enumerate(by_exit):
            for size in of_exit:
                sizes.setdefault(size, []).append(place)
        exits = len(by_exit)
        teacher = torch.zeros(exits, exits, dtype=dtype, device=stack.device)
        if settings.teacher == "ensemble":
            teacher += 1 / exits
        elif settings.distillation_weight:
            for pupil, place in enumerate(_places(settings.teacher, exit_layers)):
                teacher[pupil, place] = float(pupil != place)
        return cls(
            settings,
            torch.as_tensor(logit_scale, dtype=dtype, device=stack.device),
            sizes,
            torch.tensor([len(of_exit) for of_exit in by_exit], dtype=dtype, device=stack.device),
            tuple((of_exit[0], of_exit[-1]) for of_exit in by_exit),
            teacher,
            _places(settings.alignment_target, exit_layers) if settings.alignment_weight else [],
        )


def _places(chosen: str | int, exit_layers: Sequence[int]) -> list[int]:
    """For each exit the place of the exit that teaches it, or that it is aligned to."""
    last = len(exit_layers) - 1
    if chosen == "next_deeper":
        return [min(place + 1, last) for place in range(last + 1)]
    place = list(exit_layers).index(chosen) if isinstance(chosen, int) else last
    return [place] * (last + 1)


def _alignment(stack: torch.Tensor, target: list[int]) -> torch.Tensor:
    """Mean over texts of 1 - cosine to the target's embedding (E,); zero for an exit that is its own target."""
    cosines = nn.functional.cosine_similarity(stack, stack.detach()[target], dim=-1)
    pupils = torch.tensor([float(own != place) for own, place in enumerate(target)], device=stack.device)
    return (1 - cosines).mean(dim=1) * pupils.to(stack.dtype)


def _pair_sums(
    pair: Sequence[str], stacks: Mapping[str, torch.Tensor], gathered: Mapping[str, torch.Tensor], scoring: _Scoring
) -> dict[str, torch.Tensor]:
    """Sums over this process's pairs of one set: losses as the mean of both directions, hits of anchors alone."""
    anchor, positive, *negatives = pair
    candidates = torch.cat([gathered[side] for side in (positive, *negatives)], dim=1)
    forwards = _row_sums(stacks[anchor], candidates, scoring)
    backwards = _row_sums(stacks[positive], gathered[anchor], scoring)
    either = {"hits", "hits_smallest"}
    return {name: value if name in either else (value + backwards[name]) / 2 for name, value in forwards.items()}


def _row_sums(rows: torch.Tensor, columns: torch.Tensor, scoring: _Scoring) -> dict[str, torch.Tensor]:
    """Sums over the rows (E, B, D) of one direction; the candidate of row b is in column rank × B + b of (E, C, D).

    Scores are computed for a chunk of rows at a time and once more in the backward pass, so that memory grows with the
    batch and not with its square.
    """
    count = rows.shape[1]
    own = torch.arange(count, device=rows.device) + rank_and_count()[0] * count
    per_chunk = max(1, SCORES_PER_CHUNK // (columns.shape[0] * columns.shape[1]))
    sums_of: Callable[..., dict[str, torch.Tensor]] = _chunk_sums
    if per_chunk < count:
        sums_of = partial(checkpoint, _chunk_sums, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(rows.split(per_chunk, dim=1), own.split(per_chunk), strict=True)
    parts = [sums_of(chunk, columns, chunk_own, scoring) for chunk, chunk_own in chunks]
    return {name: reduce(torch.add, [part[name] for part in parts]) for name in parts[0]}


def _chunk_sums(
    rows: torch.Tensor, columns: torch.Tensor, own: torch.Tensor, scoring: _Scoring
) -> dict[str, torch.Tensor]:
    """Sums over rows (E, R, D) whose candidates are in the columns `own` (R,) of (E, C, D)."""
    settings, scale = scoring.settings, scoring.logit_scale
    exits, size = rows.shape[0], rows.shape[-1]
    scores = {
        cut: _similarities(_at(rows, places), _at(columns, places), cut, size) for cut, places in scoring.sizes.items()
    }
    sums = {"clip": rows.new_zeros(exits)}
    masked = teachers = None
    if settings.leaves_out_false_negatives or settings.distillation_weight:
        with torch.no_grad():
            whole = scores[size] if len(scoring.sizes.get(size, ())) == exits else _similarities(rows, columns)
            masked = _false_negatives(whole[-1], own, settings)
            teachers = torch.einsum("pe,erc->prc", scoring.teacher, whole)
    if masked is not None:
        sums["masked"] = masked.sum() / max(1, columns.shape[1] - 1)
    if settings.distillation_weight:
        sums["distillation"] = rows.new_zeros(exits)
    for cut, places in scoring.sizes.items():
        share = 1 / scoring.counts[places]
        logits = scale * scores[cut]
        if masked is not None:
            logits = logits.masked_fill(masked, -torch.inf)
        sums["clip"] = sums["clip"].index_add(0, _index(places, own), _cross_entropies(logits, own) * share)
        if teachers is not None and settings.distillation_weight:
            divergences = _divergences(scores[cut], teachers[places], scoring)
            has_teacher = scoring.teacher[places].any(dim=1)
            sums["distillation"] = sums["distillation"].index_add(
                0, _index(places, own), divergences * share * has_teacher
            )
    hits = {
        cut: dict(zip(places, (scores[cut].argmax(dim=-1) == own).sum(dim=1), strict=True))
        for cut, places in scoring.sizes.items()
    }
    for name, end in (("hits", 1), ("hits_smallest", 0)):
        sums[name] = torch.stack([hits[ends[end]][place] for place, ends in enumerate(scoring.ends)]).to(rows.dtype)
    return sums


def _at(stack: torch.Tensor, places: list[int]) -> torch.Tensor:
    """The exits at these places; the stack itself, and no copy, where they are all."""
    return stack if len(places) == len(stack) else stack[places]


def _index(places: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(places, device=like.device)


def _similarities(
    rows: torch.Tensor, columns: torch.Tensor, cut: int | None = None, size: int | None = None
) -> torch.Tensor:
    """(E, R, C) similarities of embeddings, cut to their first `cut` of `size` numbers and normalised again."""
    if cut != size:
        rows, columns = (nn.functional.normalize(states[..., :cut], dim=-1) for states in (rows, columns))
    return rows @ columns.transpose(1, 2)


def _cross_entropies(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Sums over rows (E,) of the cross-entropy of (E, R, C)."""
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), own.repeat(logits.shape[0]), reduction="none")
    return flat.view(logits.shape[:2]).sum(dim=1)


def _divergences(scores: torch.Tensor, teachers: torch.Tensor, scoring: _Scoring) -> torch.Tensor:
    """Sums over rows (E,) of the divergence from the teachers' distributions over the candidates, times T²."""
    temperature = scoring.settings.distillation_temperature
    # Training must not change the scale in order to please the teacher.
    scale = scoring.logit_scale.detach() / temperature
    wanted, found = ((scale * part).log_softmax(dim=-1) for part in (teachers, scores))
    divergences = nn.functional.kl_div(found, wanted, reduction="none", log_target=True)
    return divergences.sum(dim=(1, 2)) * temperature**2


def _false_negatives(
    similarities: torch.Tensor, own: torch.Tensor, settings: ContrastiveSettings
) -> torch.Tensor | None:
    """Mask (R, C) of negatives that the guide finds too similar; `None` where none are left out."""
    if not settings.leaves_out_false_negatives:
        return None
    limits = similarities.gather(1, own[:, None])
    if settings.false_negative_margin is not None:
        limits = limits - settings.false_negative_margin
    elif settings.false_negative_factor is not None:
        limits = limits * settings.false_negative_factor
    return (similarities > limits).scatter(1, own[:, None], False)


class ContrastiveObjective:
    """CLIP loss between descriptions and code, or code and code, at each exit; an objective of `MultiExitTrainer`.

    Over several processes, candidates come from all of them and the gradients are those of the joint batch, which needs
    batches of equal size and a wrapper that averages gradients (DDP, FSDP2). Accumulated batches are separate ones:
    accumulation adds no negatives; `mini_batch_tokens` is what makes large batches possible.

    Args:
        settings: by default the paper's.

    Example:
        >>> from modular_star_encoder import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
        >>> config = ModularStarEncoderConfig(
        ...     vocab_size=64, hidden_size=32, num_hidden_layers=2, exit_layers=[1, 2], num_attention_heads=4,
        ...     num_key_value_heads=2, intermediate_size=64, projection_size=16,
        ... )
        >>> model = ModularStarEncoderForRetrieval(config)
        >>> side = {"input_ids": torch.ones(4, 6, dtype=torch.long), "attention_mask": torch.ones(4, 6)}
        >>> output = ContrastiveObjective()(model, {"query": side, "document": side}, exit_layers=(1, 2))
        >>> output.losses.shape
        torch.Size([2])
    """

    def __init__(self, settings: ContrastiveSettings | None = None) -> None:
        self.settings = settings or ContrastiveSettings()

    @property
    def caches_gradients(self) -> bool:
        """Whether parameters get their gradients inside the loss's backward pass, and no graph leads to them."""
        return self.settings.mini_batch_tokens is not None

    def check(self, exit_layers: Sequence[int], embedding_size: int) -> None:
        """Raise UserError if the settings do not fit a model; see `ContrastiveSettings.check`."""
        self.settings.check(exit_layers, embedding_size)

    def check_rotation(self, exit_layers: Sequence[int]) -> None:
        """Raise UserError if the settings need exits that a step lacks; see `ContrastiveSettings.check_rotation`."""
        self.settings.check_rotation(exit_layers)

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Losses of one batch.

        Args:
            model: a `ModularStarEncoderForRetrieval`, possibly wrapped.
            batch: the sides that `settings.pairs` names, `query` and `document` by default, each with `input_ids` and
                `attention_mask` (B, T), padded on either side. Sides of one pair have as many rows, row b of each
                belonging together; different pairs may have different numbers. Rows of one side may be of different
                kinds (descriptions and code).
            exit_layers: the exits to train.

        Returns:
            `losses` (E,), float32 with gradient, and `metrics`; see `losses_from_embeddings`.

        Raises:
            UserError: sides, rows, exits or processes do not fit together.
        """

        def embed(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
            output = model(**inputs, exit_layers=exit_layers)
            if len(output.exit_embeddings) != len(exit_layers):
                raise UserError(
                    "contrastive.data_parallel",
                    "nn.DataParallel mixes up exits and texts; start one process per device (torchrun).",
                )
            return output.exit_embeddings, output.logit_scale

        self.settings.check_sides({side: number_of_texts(inputs) for side, inputs in batch.items()})
        stacks, logit_scale = embed_sides(model, embed, batch, self.settings.mini_batch_tokens)
        output = losses_from_embeddings(stacks, exit_layers, self.settings, logit_scale)
        return ObjectiveOutput(losses=output.losses, metrics=output.metrics)
