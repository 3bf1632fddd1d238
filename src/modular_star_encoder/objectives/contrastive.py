"""Contrastive fine-tuning: the symmetric CLIP loss of the embeddings that each exit's projection head gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings, gather_stacks, rank_and_count
from modular_star_encoder.objectives.exit_losses import ObjectiveOutput
from modular_star_encoder.objectives.gradient_cache import embed_sides, number_of_texts
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import as_settings

# Number of similarities computed at once, over all exits: 2**20 float32 are 4 MiB, however large the batch.
SCORES_PER_CHUNK = 2**20


def losses_from_embeddings(
    stacks: Mapping[str, torch.Tensor],
    exit_layers: Sequence[int],
    settings: ContrastiveSettings | None = None,
    logit_scale: torch.Tensor | float | None = None,
) -> ObjectiveOutput:
    """Return each exit's loss: the CLIP loss (arXiv 2103.00020, figure 3) plus the terms with a weight in `settings`.

    `stacks` has the L2-normalised embeddings (E exits, B texts, embedding size) of each side (list of texts) that
    `settings.pairs` names. For each set of pairs, the anchors of this process are scored against the positives and
    negatives of all processes, and its positives against the anchors of all processes.
    """
    settings = settings or ContrastiveSettings()
    settings.check_sides({side: stack.shape[1] for side, stack in stacks.items()})
    first = stacks[settings.sides[0]]
    settings.check_step(exit_layers, first.shape[-1])
    with torch.autocast(first.device.type, enabled=False):
        dtype = torch.promote_types(first.dtype, torch.float32)
        stacks = {side: stacks[side].to(dtype) for side in settings.sides}
        scale = settings.logit_scale if logit_scale is None else logit_scale
        scoring = _scoring(settings, exit_layers, first.to(dtype), scale)
        gathered = gather_stacks(stacks)
        sums = {pair: _pair_sums(pair, stacks, gathered, scoring) for pair in settings.pairs}
        rows = {pair: stacks[pair[0]].shape[1] for pair in settings.pairs}
        means = {name: total / sum(rows.values()) for name, total in _add(list(sums.values())).items()}
        terms = {"clip": means["clip"]}
        if settings.distillation_weight:
            terms["distillation"] = means["distillation"]
        if settings.alignment_weight:
            target = _places(settings.alignment_target, exit_layers)
            terms["alignment"] = _alignment(torch.cat(list(stacks.values()), dim=1), target)
    metrics = {f"{name}_loss": term.detach() for name, term in terms.items()} | {"clip_accuracy": means["hits"]}
    if len(sums) > 1:
        metrics |= {f"clip_accuracy_{pair[0]}_{pair[1]}": sums[pair]["hits"] / rows[pair] for pair in sums}
    if settings.dimensions is not None:
        metrics["clip_accuracy_smallest"] = means["hits_smallest"]
    if settings.leaves_out_false_negatives:
        metrics["masked_negatives"] = means["masked"]
    if logit_scale is not None:
        metrics["logit_scale"] = scoring.logit_scale.detach().reshape(())
    weights = {"clip": 1.0, "distillation": settings.distillation_weight, "alignment": settings.alignment_weight}
    terms = {name: weights[name] * term for name, term in terms.items()}
    return ObjectiveOutput(torch.stack(list(terms.values())).sum(dim=0), metrics, terms)


@dataclass(frozen=True)
class _Scoring:
    settings: ContrastiveSettings
    logit_scale: torch.Tensor
    sizes: list[tuple[int, ...]]  # embedding sizes of each exit, ascending
    places: dict[int, list[int]]  # embedding size → indices of the exits that are trained at this size
    teacher: torch.Tensor  # (E, E), row e: weight of each exit's scores in the teacher of exit e; zeros without teacher

    def mean_over_sizes(self, found: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Return each exit's mean over its embedding sizes; `found` is {size: values of the exits with this size}."""
        by_exit = ([found[size][self.places[size].index(e)] for size in own] for e, own in enumerate(self.sizes))
        return torch.stack([reduce(torch.add, values) / len(values) for values in by_exit])


def _scoring(settings: ContrastiveSettings, exits: Sequence[int], stack: torch.Tensor, scale: Any) -> _Scoring:
    sizes = [settings.sizes(exit_layer, stack.shape[-1]) for exit_layer in exits]
    every_size = sorted(set().union(*sizes))
    places = {size: [e for e, of_exit in enumerate(sizes) if size in of_exit] for size in every_size}
    teacher = stack.new_zeros(len(sizes), len(sizes))
    if settings.teacher == "ensemble":
        teacher += 1 / len(sizes)
    elif settings.distillation_weight:
        for pupil, place in enumerate(_places(settings.teacher, exits)):
            teacher[pupil, place] = float(pupil != place)
    return _Scoring(settings, torch.as_tensor(scale, dtype=stack.dtype, device=stack.device), sizes, places, teacher)


def _places(chosen: str | int, exit_layers: Sequence[int]) -> list[int]:
    """Return each exit's teacher, as index in `exit_layers`; `chosen` is "deepest", "next_deeper" or an exit."""
    last = len(exit_layers) - 1
    if chosen == "next_deeper":
        return [min(place + 1, last) for place in range(last + 1)]
    place = list(exit_layers).index(chosen) if isinstance(chosen, int) else last
    return [place] * (last + 1)


def _alignment(stack: torch.Tensor, target: list[int]) -> torch.Tensor:
    """Return each exit's mean of 1 - cosine(embedding at the exit, at its target); 0 if the exit is its own target."""
    cosines = nn.functional.cosine_similarity(stack, stack.detach()[target], dim=-1)
    pupils = torch.tensor([float(own != place) for own, place in enumerate(target)], device=stack.device)
    return (1 - cosines).mean(dim=1) * pupils.to(stack.dtype)


def _pair_sums(
    pair: Sequence[str], stacks: Mapping[str, torch.Tensor], gathered: Mapping[str, torch.Tensor], scoring: _Scoring
) -> dict[str, torch.Tensor]:
    """Return {name of a loss or hit count: its sum over this process's pairs, by exit}.

    A loss is the mean of two losses: one with the anchors as queries, and one with the positives as queries.
    """
    anchor, positive, *negatives = pair
    candidates = torch.cat([gathered[side] for side in (positive, *negatives)], dim=1)
    forwards = _row_sums(stacks[anchor], candidates, scoring)
    backwards = _row_sums(stacks[positive], gathered[anchor], scoring)
    either = {"hits", "hits_smallest"}
    return {name: value if name in either else (value + backwards[name]) / 2 for name, value in forwards.items()}


def _row_sums(rows: torch.Tensor, columns: torch.Tensor, scoring: _Scoring) -> dict[str, torch.Tensor]:
    """Return {name of a loss or hit count: its sum over the queries `rows` (E exits, B queries, embedding size)}.

    The candidates are `columns`, from all processes; candidate r × B + b is the positive of query b of process r. The
    backward pass computes the scores again, to save memory.
    """
    count = rows.shape[1]
    own = torch.arange(count, device=rows.device) + rank_and_count()[0] * count
    per_chunk = max(1, SCORES_PER_CHUNK // (columns.shape[0] * columns.shape[1]))
    sums_of: Callable[..., dict[str, torch.Tensor]] = _chunk_sums
    if per_chunk < count:
        sums_of = partial(checkpoint, _chunk_sums, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(rows.split(per_chunk, dim=1), own.split(per_chunk), strict=True)
    return _add([sums_of(chunk, columns, chunk_own, scoring) for chunk, chunk_own in chunks])


def _add(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: reduce(torch.add, [part[name] for part in parts]) for name in parts[0]}


def _chunk_sums(
    rows: torch.Tensor, columns: torch.Tensor, own: torch.Tensor, scoring: _Scoring
) -> dict[str, torch.Tensor]:
    """Return the sums of `_row_sums` for R queries, `rows`; the positive of query r is the candidate `own[r]`."""
    settings, (exits, _, size) = scoring.settings, rows.shape
    scores = {cut: _similarities(rows, columns, places, cut) for cut, places in scoring.places.items()}
    sums: dict[str, torch.Tensor] = {}
    masked = teachers = None
    if settings.leaves_out_false_negatives or settings.distillation_weight:
        with torch.no_grad():
            every = list(range(exits))
            whole = scores[size] if scoring.places.get(size) == every else _similarities(rows, columns, every, size)
            teachers = torch.einsum("pe,erc->prc", scoring.teacher, whole)
            if settings.leaves_out_false_negatives:
                masked = _false_negatives(whole[-1], own, settings)
                sums["masked"] = masked.sum() / max(1, columns.shape[1] - 1)
    entropies, divergences = {}, {}
    for cut, places in scoring.places.items():
        logits = scoring.logit_scale * scores[cut]
        if masked is not None:
            logits = logits.masked_fill(masked, -torch.inf)
        targets = own.repeat(len(places))
        flat = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        entropies[cut] = flat.view(logits.shape[:2]).sum(dim=1)
        if teachers is not None and settings.distillation_weight:
            has_teacher = scoring.teacher[places].any(dim=1)
            divergences[cut] = _divergences(scores[cut], teachers[places], scoring) * has_teacher
    sums["clip"] = scoring.mean_over_sizes(entropies)
    if divergences:
        sums["distillation"] = scoring.mean_over_sizes(divergences)
    found = {cut: (scores[cut].argmax(dim=-1) == own).sum(dim=1) for cut in scoring.places}
    hits = {cut: dict(zip(places, found[cut], strict=True)) for cut, places in scoring.places.items()}
    for name, end in (("hits", -1), ("hits_smallest", 0)):
        sums[name] = torch.stack([hits[sizes[end]][e] for e, sizes in enumerate(scoring.sizes)]).to(rows.dtype)
    return sums


def _similarities(rows: torch.Tensor, columns: torch.Tensor, places: list[int], cut: int) -> torch.Tensor:
    """Return cosines of rows and columns from their first `cut` dimensions, for the exits with the indices `places`."""
    exits, _, size = rows.shape
    if len(places) < exits:  # otherwise indexing would copy for nothing
        rows, columns = rows[places], columns[places]
    if cut < size:
        rows, columns = (nn.functional.normalize(states[..., :cut], dim=-1) for states in (rows, columns))
    return rows @ columns.transpose(1, 2)


def _divergences(scores: torch.Tensor, teachers: torch.Tensor, scoring: _Scoring) -> torch.Tensor:
    """Return each exit's KL divergence from its teacher, summed over the queries, times temperature²."""
    temperature = scoring.settings.distillation_temperature
    # The distillation term must not train the scale.
    scale = scoring.logit_scale.detach() / temperature
    wanted, found = ((scale * part).log_softmax(dim=-1) for part in (teachers, scores))
    divergences = nn.functional.kl_div(found, wanted, reduction="none", log_target=True)
    return divergences.sum(dim=(1, 2)) * temperature**2


def _false_negatives(similarities: torch.Tensor, own: torch.Tensor, settings: ContrastiveSettings) -> torch.Tensor:
    """Return a mask, True for negatives that `settings` leave out; `own[r]` is the column of the positive of row r."""
    limits = similarities.gather(1, own[:, None])
    if settings.false_negative_factor is not None:
        limits = limits * settings.false_negative_factor
    elif settings.false_negative_margin is not None:
        limits = limits - settings.false_negative_margin
    return (similarities > limits).scatter(1, own[:, None], False)


class ContrastiveObjective:
    """Objective of `MultiExitTrainer`: the CLIP loss between descriptions and code, or code and code, at each exit.

    With several processes, the candidates come from all processes, and the gradients are those of the joint batch. All
    processes must then have the same number of pairs in a batch, and a wrapper (DDP, FSDP2) must average the gradients.
    Gradient accumulation adds no candidates; for large batches, set `mini_batch_tokens`.

    Args:
        settings: which texts of a batch form pairs, and which terms the loss has; by default the paper's settings.

    Example:
        >>> from modular_star_encoder.inference.checkpoints import load_checkpoint
        >>> model, _ = load_checkpoint("mose-code")
        >>> side = {"input_ids": torch.ones(4, 6, dtype=torch.long), "attention_mask": torch.ones(4, 6)}
        >>> ContrastiveObjective()(model, {"query": side, "document": side}, exit_layers=(1, 2)).losses.shape
        torch.Size([2])
    """

    def __init__(self, settings: ContrastiveSettings | None = None) -> None:
        self.settings = as_settings(ContrastiveSettings, settings)

    @property
    def caches_gradients(self) -> bool:
        """Whether gradients are cached. If so, parameters get gradients only by `backward`, not by `autograd.grad`."""
        return self.settings.mini_batch_tokens is not None

    def check(self, exit_layers: Sequence[int], embedding_size: int, *, rotates: bool = False) -> None:
        """Raise UserError if the settings do not fit a model; see `ContrastiveSettings.check`."""
        self.settings.check(exit_layers, embedding_size, rotates=rotates)

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Compute the losses and metrics of one batch at each exit.

        Args:
            model: a `ModularStarEncoderForRetrieval`, possibly wrapped.
            batch: {side: inputs} for each name in `settings.pairs`, by default `query` and `document`. A side has one
                text of every pair, such as all queries. Inputs are `input_ids` and `attention_mask` (B, T), padded left
                or right. Row b of `query` matches row b of `document`. A side may mix descriptions and code. If
                `settings.pairs` has several sets of pairs, each set may have a different B.
            exit_layers: the exits to train.

        Returns:
            `losses` of the E exits (E,), float32 with gradient, the sum of the terms. `terms`: `clip`, and
            `distillation` and `alignment` times their weights, if these are above 0. `metrics`: `clip_loss`,
            `distillation_loss` and `alignment_loss`, without the weights; `clip_accuracy`, the share of anchors whose
            positive is the most similar candidate, at the largest embedding size; `clip_accuracy_smallest`, the same
            at the smallest size in `dimensions`; `clip_accuracy_{anchor}_{positive}` for each of several sets of pairs;
            `masked_negatives`, the share of negatives that are masked; and `logit_scale`, if it is learned.

        Raises:
            UserError: `batch` does not have exactly the sides that `settings.pairs` names, two sides of a pair or two
                processes have different numbers of rows, or the settings name an exit that is not trained.
        """
        self.settings.check_sides({side: number_of_texts(inputs) for side, inputs in batch.items()})
        stacks, logit_scale = self.embed(model, batch, exit_layers)
        return losses_from_embeddings(stacks, exit_layers, self.settings, logit_scale)

    def embed(
        self, model: nn.Module, sides: Mapping[str, Mapping[str, Any]], exit_layers: tuple[int, ...]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Return {side: embeddings with gradient (exits, texts, size)}, and the learned logit scale (1,) or None."""

        def embed(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
            output = model(**inputs, exit_layers=exit_layers)
            if len(output.exit_embeddings) != len(exit_layers):
                message = "nn.DataParallel does not work with several exits: start one process per device (torchrun)."
                raise UserError("contrastive.data_parallel", message)
            return output.exit_embeddings, output.logit_scale

        return embed_sides(model, embed, sides, self.settings)
