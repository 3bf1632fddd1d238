"""The contrastive objective of all exits as a loss for `SentenceTransformerTrainer`."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.objectives.contrastive import losses_from_embeddings
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.exit_losses import exit_weights
from modular_star_encoder.objectives.gradient_cache import embed_sides, number_of_texts
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.reports import render_card
from modular_star_encoder.utils.settings import as_settings


class MultiExitContrastiveLoss(nn.Module):
    """Loss that trains every exit of a SentenceTransformer, with the exit's projection head, by symmetric CLIP loss.

    The columns of the dataset are anchor, positive, and any number of hard negatives. One pass through the layers
    embeds a column at all exits, as `encode(…, exit_layer=k)` does at one exit. With `mini_batch_tokens`, a batch of
    any size needs only the memory of a mini-batch.

    Args:
        model: a SentenceTransformer whose first module is a `ModularStarEncoderForRetrieval`.
        settings: see `ContrastiveSettings`; leave `pairs` at its default, because the columns define the pairs.
        weights, normalize_weights: weights of the exits' losses: `weighting` and `normalize` of `exit_weights`.
        exit_layers: exits to train; all exits of the model by default.

    Raises:
        UserError: the model is of another class, has modules other than Pooling and Normalize, or does not fit the
            settings.
        ValueError: the model lacks an exit; the message lists its exits.

    Example:
        >>> from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
        >>> model = SentenceTransformer("path/to/checkpoint")  # doctest: +SKIP
        >>> loss = MultiExitContrastiveLoss(model, ContrastiveSettings(mini_batch_tokens=8192))  # doctest: +SKIP
        >>> SentenceTransformerTrainer(model, train_dataset=pairs, loss=loss).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ContrastiveSettings | None = None,
        *,
        weights: str | Sequence[float] = "paper",
        normalize_weights: bool = False,
        exit_layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = as_settings(ContrastiveSettings, settings)
        self.weighting, self.normalize_weights = weights, normalize_weights
        names = [type(module).__name__ for module in self._sentence_transformer()]
        if self.settings.pairs != ContrastiveSettings().pairs:
            message = "Leave `pairs` at its default: the dataset's columns are anchor, positive and negatives."
            raise UserError("contrastive.pairs", message)
        if others := [name for name in names[1:] if name not in ("Pooling", "Normalize")]:
            message = f"After the encoder, the model may have only Pooling and Normalize modules, not {others[0]}."
            raise UserError("contrastive.modules", message)
        config = self._encoder().config
        self.exit_layers = config.resolve_exits(exit_layers=exit_layers or config.exit_layers)
        self.settings.check(self.exit_layers, config.projection_size)
        depth = config.parent_num_hidden_layers
        self.exit_weights = exit_weights(weights, self.exit_layers, depth, normalize=normalize_weights)

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the weighted loss terms of every exit by name, such as `clip_exit_4`; their sum is the loss.

        `sentence_features` has `input_ids` and `attention_mask` of each column of texts; `labels` are not used.
        UserError if there is only one column, or if columns or processes have different numbers of rows.
        """
        columns = list(sentence_features)
        if len(columns) < 2:
            raise UserError("contrastive.columns", "The dataset needs at least two text columns: anchor and positive.")
        names = ("query", "document", *(f"negative_{number}" for number in range(1, len(columns) - 1)))
        settings = replace(self.settings, pairs=(names,))
        sides = dict(zip(names, columns, strict=True))
        settings.check_sides({side: number_of_texts(inputs) for side, inputs in sides.items()})
        stacks, logit_scale = embed_sides(self.model, self._embed, sides, settings)
        terms = losses_from_embeddings(stacks, self.exit_layers, settings, logit_scale).terms
        return {
            f"{name}_exit_{exit_layer}": weight * value
            for name, values in terms.items()
            for exit_layer, weight, value in zip(self.exit_layers, self.exit_weights.tolist(), values, strict=True)
        }

    def _embed(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._exits_in_features():
            features = self.model({**inputs, "exit_layers": self.exit_layers})
        return features["exit_embeddings"], features["exit_logit_scale"]

    @contextmanager
    def _exits_in_features(self) -> Iterator[None]:
        """Context manager: add the embeddings of all exits to the first module's features, where DDP finds them."""
        encoder, outputs = self._encoder(), []
        forward = encoder.forward

        def keep(*arguments: Any, **options: Any) -> Any:
            outputs.append(forward(*arguments, **options))
            return outputs[-1]

        def hand_over(module: nn.Module, arguments: Any, features: dict[str, Any]) -> dict[str, Any]:
            found = outputs.pop()
            return {**features, "exit_embeddings": found.exit_embeddings, "exit_logit_scale": found.logit_scale}

        # Replaced, not hooked: sentence-transformers calls the encoder's `forward` directly, without hooks.
        encoder.forward = keep
        handle = self._sentence_transformer()[0].register_forward_hook(hand_over)
        try:
            yield
        finally:
            handle.remove()
            del encoder.forward

    def _sentence_transformer(self) -> nn.Sequential:
        model: Any = self.model
        while not isinstance(model, nn.Sequential):
            model = getattr(model, "_orig_mod", getattr(model, "module", nn.Sequential()))
        return model

    def _encoder(self) -> ModularStarEncoderForRetrieval:
        encoder: Any = getattr(next(iter(self._sentence_transformer()), None), "auto_model", None)
        if hasattr(encoder, "get_base_model"):
            encoder = encoder.get_base_model()
        if not isinstance(encoder, ModularStarEncoderForRetrieval):
            found = type(self.model if encoder is None else encoder).__name__
            message = f"The model must be a SentenceTransformer with a ModularStarEncoderForRetrieval, not {found}."
            raise UserError("contrastive.model", message)
        return encoder

    def get_config_dict(self) -> dict[str, Any]:
        """Return {name: value} of all settings except `pairs`, for the model card."""
        own = {"exit_layers": self.exit_layers, "weights": self.weighting, "normalize_weights": self.normalize_weights}
        settings = json.loads(json.dumps(own | asdict(self.settings)))  # lists in place of tuples
        return {name: value for name, value in settings.items() if name != "pairs"}

    @property
    def citation(self) -> str:
        """BibTeX of the model's paper."""
        return render_card("citation.bib.jinja")
