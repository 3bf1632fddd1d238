"""What can be ranked by: anything that gives scores for queries and documents.

A system may have several *variants* that come from one pass over the texts: the exits of a model, and at each exit the
sizes to which its embeddings can be cut. The harness asks for the variants whose figures are still missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.evaluation.scores import CosineScores, Scores
from modular_star_encoder.inference.embedding_cache import EmbeddingCache, Prompted
from modular_star_encoder.inference.encoders import Text


class Variant(NamedTuple):
    """An exit of a model, and the size its embeddings are cut to; None where a system has neither."""

    exit_layer: int | None = None
    dimensions: int | None = None


class System(Protocol):
    """Something that ranks.

    Attributes:
        name: as tables show it.
        fingerprint: differs if any score could differ; figures are kept under it.
        variants: what it can be asked for.
    """

    name: str
    fingerprint: str
    variants: tuple[Variant, ...]

    def prepare(self, texts: Sequence[Text], variants: Sequence[Variant], *, progress: bool = True) -> None:
        """Do now what can be done for all texts at once."""
        ...

    def scores(self, queries: Sequence[Text], documents: Sequence[Text], variant: Variant) -> Scores:
        """Scores (Q, D) of prepared texts."""
        ...


class Encoder(Protocol):
    """Something that embeds texts.

    Attributes:
        name, fingerprint: as of a `System`.
        exit_layers: its exits, or (None,).
        dimensions: sizes to which its embeddings can be cut (truncated and normalised again), or (None,).
    """

    name: str
    fingerprint: str
    exit_layers: tuple[int | None, ...]
    dimensions: tuple[int | None, ...]

    def prompt(self, text: Text) -> str:
        """What goes before the text."""
        ...

    def encode(
        self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True
    ) -> Mapping[int | None, np.ndarray]:
        """Embeddings (N, F) float32 of texts with their prompts at each exit, from one pass."""
        ...


class EmbeddingSystem:
    """Ranks by cosine similarity of embeddings; each text is embedded once, all missing exits in one pass.

    Args:
        encoder: what embeds.
        cache: where embeddings are kept; in memory for the life of the system if None.
    """

    chunk = 4096
    """Texts per shard of the cache: what an interruption may cost."""

    def __init__(self, encoder: Encoder, cache: EmbeddingCache | None = None) -> None:
        self.encoder = encoder
        self.cache = EmbeddingCache() if cache is None else cache
        self.name, self.fingerprint = encoder.name, encoder.fingerprint
        self.variants = tuple(
            Variant(exit_layer, size) for exit_layer in encoder.exit_layers for size in encoder.dimensions
        )

    def prepare(self, texts: Sequence[Text], variants: Sequence[Variant], *, progress: bool = True) -> None:
        """Embed the texts that the cache lacks, longest first."""
        exits = tuple(dict.fromkeys(variant.exit_layer for variant in variants))
        prompted = dict.fromkeys((self.encoder.prompt(text), text.text) for text in dict.fromkeys(texts))
        absent = {exit_layer: self.cache.missing(self._space(exit_layer), prompted) for exit_layer in exits}
        exits = tuple(exit_layer for exit_layer in exits if absent[exit_layer])
        # A text is embedded at all exits where some exit lacks it: the deepest costs the pass anyway.
        wanted = sorted(set().union(*absent.values()), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        starts = range(0, len(wanted), self.chunk)
        for start in tqdm(starts, desc=f"embedding, {self.name}", unit="shard", disable=not progress, leave=False):
            chunk = wanted[start : start + self.chunk]
            embeddings = self.encoder.encode(chunk, exits, progress=progress)
            for exit_layer in exits:
                self.cache.add(self._space(exit_layer), chunk, embeddings[exit_layer])

    def scores(self, queries: Sequence[Text], documents: Sequence[Text], variant: Variant) -> CosineScores:
        """Cosine similarities of prepared texts."""
        space = self._space(variant.exit_layer)
        rows = [
            self.cache.rows(space, [(self.encoder.prompt(text), text.text) for text in texts])
            for texts in (queries, documents)
        ]
        return CosineScores(*rows, dimensions=variant.dimensions)

    def _space(self, exit_layer: int | None) -> str:
        return f"{self.fingerprint}/{'full' if exit_layer is None else f'exit-{exit_layer}'}"
