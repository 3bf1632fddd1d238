"""Embed questions and snippets at the exits of a checkpoint."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modular_star_encoder.data.prompts import CODE_INSTRUCTION, SEP_TOKEN, code_prompt, text_prompt
from modular_star_encoder.inference.exit_zero import ExitZero, has_exit_zero, read_config, shipped_checkpoint
from modular_star_encoder.search.pieces import Snippet
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import folder_checksum

if TYPE_CHECKING:
    from modular_star_encoder.modeling import ModularStarEncoderConfig

_KEPT_EMBEDDINGS = 20_000

_Key = tuple[tuple[int, ...], int, str]  # exits, dimension, text


class Embedder:
    """Embeds with one checkpoint; loads only the layers of the deepest requested exit.

    Attributes:
        checkpoint: absolute path of the folder, or the name of a repository or of a packaged model.
        checksum: see `checkpoint_checksum`.

    Args:
        checkpoint: a folder, or a repository of the Hub.
        device: where the model goes; a GPU if there is one and None is given.

    Raises:
        ValueError, OSError: there is no such checkpoint, or it isn't one of ours.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], device: str | None = None) -> None:
        folder = Path(checkpoint).expanduser()
        self.checkpoint = str(folder.resolve()) if folder.is_dir() else os.fspath(checkpoint)
        self._folder = shipped_checkpoint(self.checkpoint)
        facts = read_config(self._folder)
        self.has_exit_zero = has_exit_zero(facts)
        """Whether exit 0 needs no framework; then nothing of one is imported before a deeper exit is asked."""
        if self.has_exit_zero:
            self.checksum = folder_checksum(self._folder)
            self._instructions, sizes = facts["instruction_prompts"], facts.get("nested_dimensions") or ()
            self._sizes = sorted({*sizes, facts["projection_size"]})
        else:
            from modular_star_encoder.inference.checkpoints import checkpoint_checksum

            config = self.config
            self.checksum = checkpoint_checksum(self.checkpoint)
            self._instructions, sizes = config.instruction_prompts, getattr(config, "nested_dimensions", None) or ()
            self._sizes = sorted({*sizes, config.projection_size})
        self._device = device
        self._model: Any = None
        self._tokenizer: Any = None
        self._exit_zero: ExitZero | None = None
        self._known: OrderedDict[_Key, np.ndarray] = OrderedDict()

    @cached_property
    def config(self) -> ModularStarEncoderConfig:
        """The configuration of the whole checkpoint."""
        from modular_star_encoder.inference.checkpoints import load_config

        return load_config(self.checkpoint)

    def exits(self, exit_layer: int | None, exit_layers: Sequence[int] | None) -> tuple[int, ...]:
        """Return the named exits; without any, exit 0 if it needs no framework, else the deepest."""
        if self.has_exit_zero and exit_layers is None and exit_layer in (None, 0):
            # Under the ranking rules exit 0 answers nearly as well as the deepest, at a fraction of its cost.
            return (0,)
        if exit_layer is None and exit_layers is None:
            exit_layer = self.config.num_hidden_layers  # also where a forward pass gives all exits unless told
        return tuple(self.config.resolve_exits(exit_layer, exit_layers))

    def prompts(self) -> dict[str, str]:
        """Return the prompts of questions and of code; `{language}` is a placeholder."""
        document = CODE_INSTRUCTION + SEP_TOKEN if self._instructions else ""
        return {"query": text_prompt(instructions=self._instructions), "document": document}

    def check_dimension(self, dimension: int | None) -> int:
        """`dimension`, or all components for None.

        Raises:
            ValueError: the model wasn't trained with embeddings of this size.
        """
        if dimension is not None and dimension not in self._sizes:
            raise UserError(
                "search.dimension",
                f"{self.checkpoint} has embeddings of {' or '.join(map(str, self._sizes))} components, "
                f"not {dimension}.",
            )
        return dimension or self._sizes[-1]

    def load(self, exit_layer: int) -> Any:
        """Return the model, loaded at least up to this exit.

        Raises:
            ValueError: the checkpoint has no such exit.
            OSError: the weights can't be read.
        """
        from modular_star_encoder.inference.checkpoints import load_checkpoint

        _hide_loading_bars()
        if self._model is None or self._model.config.num_hidden_layers < exit_layer:
            self._model, self._tokenizer = load_checkpoint(self.checkpoint, exit_layer, self._device)
        return self._model

    def questions(self, texts: Sequence[str], exit_layers: Sequence[int], dimension: int) -> dict[int, np.ndarray]:
        """exit_layer → (Q, dimension) float32 of length 1, from one pass."""
        prompt = text_prompt(instructions=self._instructions)
        embeddings = self._encode([prompt + text for text in texts], exit_layers)
        return {exit_layer: cut(values, dimension) for exit_layer, values in embeddings.items()}

    def snippets(
        self, snippets: Sequence[Snippet], exit_layers: Sequence[int], dimension: int
    ) -> dict[int, np.ndarray]:
        """exit_layer → (N, dimension) float32 of length 1.

        Copies of a recently embedded snippet are not embedded again: some large projects are one third copies.
        """
        exits = tuple(exit_layers)
        texts = [code_prompt(one.language, instructions=self._instructions) + one.embedded() for one in snippets]
        keys = [(exits, dimension, text) for text in texts]
        new = list(dict.fromkeys(key for key in keys if key not in self._known))
        if new:
            embeddings = self._encode([text for *_, text in new], exits)
            values = np.stack([cut(embeddings[exit_layer], dimension) for exit_layer in exits], axis=1)
            self._known.update(zip(new, values, strict=True))
        result = np.stack([self._known[key] for key in keys])
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > _KEPT_EMBEDDINGS:
            self._known.popitem(last=False)
        return {exit_layer: result[:, place] for place, exit_layer in enumerate(exits)}

    def forget(self) -> None:
        """Clear the cache of embeddings."""
        self._known.clear()

    def prepare(self, exit_layers: Sequence[int]) -> None:
        """Load what these exits need; UserError or OSError if loading fails."""
        if not (self.has_exit_zero and tuple(exit_layers) == (0,)):
            self.load(max(exit_layers))
        elif self._exit_zero is None:
            self._exit_zero = ExitZero(self._folder)

    def _encode(self, texts: Sequence[str], exit_layers: Sequence[int]) -> dict[int, np.ndarray]:
        self.prepare(exit_layers)
        if self._exit_zero is not None and tuple(exit_layers) == (0,):
            return {0: self._exit_zero.encode(texts)}
        from modular_star_encoder.inference.encode import encode_exits

        return encode_exits(self._model, self._tokenizer, texts, exit_layers=exit_layers, progress=False)


def _hide_loading_bars() -> None:
    """Hide the bar of transformers, which would break ours; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads_hidden = are_progress_bars_disabled()
    logging.disable_progress_bar()
    if not downloads_hidden:
        enable_progress_bars()


def cut(embeddings: np.ndarray, dimension: int) -> np.ndarray:
    """The first components of embeddings (N, D), scaled to length 1; a zero vector stays one."""
    values = embeddings[:, :dimension]
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
