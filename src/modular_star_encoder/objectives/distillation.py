"""Distillation objective: every exit learns the vectors, and optionally the similarities, of a teacher model."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modular_star_encoder.objectives.contrastive import ContrastiveObjective, losses_from_embeddings
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.exit_losses import ObjectiveOutput
from modular_star_encoder.objectives.gradient_cache import number_of_texts
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import NonNegative, Positive, as_settings, settings_class


@settings_class
class DistillationSettings:
    """Weights of the three losses in `DistillationObjective`: cosine, relational and contrastive.

    Args:
        cosine_weight: weight of the mean over all texts of 1 - cosine(embedding, teacher's vector).
        relational_weight: weight of the Kullback-Leibler divergence from the teacher's distribution over the candidates
            of a batch to each exit's distribution. Queries are scored against documents, and documents against queries;
            the two divergences are averaged.
        relational_temperature: number that divides the logits of the relational loss. Logits are similarities times the
            logit scale. The loss is multiplied by the square of the temperature.
        contrastive_weight: weight of the contrastive loss. If it and `relational_weight` are 0, batches need no pairs.

    Raises:
        UserError: a value is of another type or out of range (`settings.value`).

    Example:
        >>> DistillationSettings(cosine_weight=2).contrastive_weight
        1.0
    """

    cosine_weight: NonNegative = 1.0
    relational_weight: NonNegative = 0.0
    relational_temperature: Positive = 1.0
    contrastive_weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        if not self.cosine_weight + self.relational_weight + self.contrastive_weight:
            message = "cosine_weight, relational_weight and contrastive_weight are all 0; set at least one above 0."
            raise UserError("settings.value", message)


class DistillationObjective(ContrastiveObjective):
    """An objective for `MultiExitTrainer` that teaches every exit the vectors of another model, the teacher.

    The loss of an exit is the weighted sum of three terms: the distance to the teacher's vector of each text (LEAF,
    arXiv 2509.12539), the divergence from the teacher's similarities within the batch, and the contrastive loss. If
    `contrastive` has a `false_negative_margin` or `false_negative_factor`, the teacher decides which negatives are
    masked (as in GISTEmbed, arXiv 2402.16829). A margin of 0 masks negatives that the teacher ranks above the positive.

    All exits learn the embedding space of the teacher, so queries embedded at one exit can be compared with documents
    embedded at another exit or by the teacher. If training used centred vectors, centre the teacher's vectors before
    you compare them.

    A batch has named lists of texts, its *sides*, such as `query`. Texts in a side that `contrastive.pairs` does not
    name have no pair: only the first term, the distance to the teacher's vector, applies to them. Several processes and
    gradient caching (`mini_batch_tokens`) work as in `ContrastiveObjective`.

    Args:
        settings: the weights of the three terms.
        contrastive: pairs, logit scale, mini-batches and masking; by default, the logit scale is 20 and the
            `false_negative_margin` is 0. Its `distillation_weight` and `alignment_weight` must be 0.

    Raises:
        UserError: `distillation_weight` or `alignment_weight` is not 0 (`distillation.contrastive`).

    Example:
        >>> from modular_star_encoder.inference.checkpoints import load_checkpoint
        >>> model, _ = load_checkpoint("mose-code")
        >>> side = {"input_ids": torch.ones(4, 6, dtype=torch.long), "attention_mask": torch.ones(4, 6)}
        >>> side["teacher"] = torch.randn(4, model.config.projection_size)
        >>> batch = {"query": side, "document": side, "text": side}
        >>> DistillationObjective()(model, batch, exit_layers=(0, 2)).losses.shape
        torch.Size([2])
    """

    def __init__(
        self, settings: DistillationSettings | None = None, contrastive: ContrastiveSettings | None = None
    ) -> None:
        super().__init__(contrastive or ContrastiveSettings(logit_scale=20.0, false_negative_margin=0.0))
        self.distillation = as_settings(DistillationSettings, settings)
        if self.settings.distillation_weight or self.settings.alignment_weight:
            message = "With a teacher model, the settings distillation_weight and alignment_weight must be 0."
            raise UserError("distillation.contrastive", f"{message} Set relational_weight and cosine_weight instead.")
        names = {"distillation_weight": "relational_weight", "distillation_temperature": "relational_temperature"}
        relational: dict[str, Any] = {name: getattr(self.distillation, own) for name, own in names.items()}
        self._guided = replace(self.settings, teacher="deepest", **relational)

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Return the losses of one batch at each exit.

        Args:
            model: a `ModularStarEncoderForRetrieval`, possibly wrapped.
            batch: {side: inputs} for the lists of texts that `contrastive.pairs` names, and for others, such as `text`.
                If only `cosine_weight` is above 0, no pairs are needed. The inputs of B texts of T tokens are
                `input_ids` and `attention_mask` (B, T), and `teacher`, the teacher's vectors (B, D), of any norm and
                float dtype. D is the embedding size of the model. The sides of a pair have the same B.
            exit_layers: the exits to train.

        Returns:
            `losses` of the E exits (E,), float32 with gradient. `terms`, multiplied by their weights: `cosine`, `clip`
            and, if its weight is above 0, `relational`. `metrics`: `cosine_loss`, `relational_loss`,
            `masked_by_teacher` (the share of negatives that are masked) and those of `ContrastiveObjective`.

        Raises:
            UserError: a side of a pair is missing; sides of a pair or processes have different numbers of rows; or the
                teacher's vectors of a side are missing, or do not have the shape of the embeddings.
        """
        weights, sides = self.distillation, self.settings.sides
        inputs = {side: {name: x for name, x in own.items() if name != "teacher"} for side, own in batch.items()}
        compares = bool(weights.contrastive_weight or weights.relational_weight)
        if compares:
            self.settings.check_sides({side: number_of_texts(inputs[side]) for side in sides if side in inputs})
        stacks, logit_scale = self.embed(model, inputs, exit_layers)
        targets = {side: _unit(side, own.get("teacher"), stacks[side]) for side, own in batch.items()}
        wanted = torch.cat(list(targets.values()))
        found = torch.cat(list(stacks.values()), dim=1).to(wanted.dtype)
        cosine = (1 - nn.functional.cosine_similarity(found, wanted[None], dim=-1)).mean(dim=1)
        terms, metrics = {"cosine": weights.cosine_weight * cosine}, {"cosine_loss": cosine.detach()}
        if compares:
            # The teacher takes the place of the deepest exit, which guides the others, and gets no gradient.
            joint = {side: torch.cat([stacks[side].to(wanted.dtype), targets[side][None]]) for side in sides}
            guided = (*exit_layers, exit_layers[-1] + 1)
            of_pairs = losses_from_embeddings(joint, guided, self._guided, logit_scale)
            terms["clip"] = weights.contrastive_weight * of_pairs.terms["clip"][:-1]
            if weights.relational_weight:
                terms["relational"] = of_pairs.terms["distillation"][:-1]
            names = {"distillation_loss": "relational_loss", "masked_negatives": "masked_by_teacher"}
            for name, values in of_pairs.metrics.items():
                metrics[names.get(name, name)] = values[:-1] if values.dim() else values
        return ObjectiveOutput(torch.stack(list(terms.values())).sum(dim=0), metrics, terms)


def _unit(side: str, vectors: torch.Tensor | None, stack: torch.Tensor) -> torch.Tensor:
    """Scale the teacher's vectors to length 1; UserError if their shape is not that of one exit's embeddings."""
    if not isinstance(vectors, torch.Tensor) or vectors.shape != stack.shape[1:]:
        shape = tuple(getattr(vectors, "shape", ()))
        found = "no `teacher`" if vectors is None else f"`teacher` of shape {shape}"
        message = f"The batch's {side!r} has {found}; give one vector per text: shape {tuple(stack.shape[1:])}."
        raise UserError("distillation.teacher", message)
    return nn.functional.normalize(vectors.to(torch.promote_types(stack.dtype, torch.float32)), dim=-1)
