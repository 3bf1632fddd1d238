"""Embed questions and snippets at the exits of a checkpoint."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from modular_star_encoder.data.prompts import CODE_INSTRUCTION, SEP_TOKEN, code_prompt, text_prompt
from modular_star_encoder.inference import local_folder, resolve_checkpoint
from modular_star_encoder.inference.exit_zero import NumpyEncoder, has_exit_zero, has_layers, read_config
from modular_star_encoder.search.pieces import Snippet
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import folder_checksum

if TYPE_CHECKING:
    from modular_star_encoder.modeling import ModularStarEncoderConfig

_KEPT_EMBEDDINGS = 20_000
_FEW_TEXTS = 64
"""So many texts are embedded by numpy at the deeper exits, too, because importing torch would take longer."""

_Key = tuple[tuple[int, ...], int, str]  # exits, dimension, text


class Embedder:
    """Embeds questions and code with one checkpoint, of which it loads only the layers up to the deepest exit in use.

    Attributes:
        checkpoint: absolute path of a folder, or the name of a Hub repository or of a model inside this package.
        trained_exits: the exits of the checkpoint, ascending.
        has_exit_zero: whether numpy can compute exit 0; if so, torch is imported only to embed many texts deeper.

    Args:
        checkpoint: a folder, the name of a model inside this package, or a repository of the Hub.
        device: torch device of the model; None for a GPU if there is one.

    Raises:
        ValueError, OSError: there is no such checkpoint, or it is not a ModularStarEncoder for retrieval.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], device: str | None = None) -> None:
        folder = local_folder(checkpoint)
        self.checkpoint = os.fspath(checkpoint) if folder is None else str(folder.resolve())
        self._folder = resolve_checkpoint(checkpoint)
        facts = read_config(self._folder)
        self.has_exit_zero = has_exit_zero(facts)
        if not self.has_exit_zero:
            facts = self.config.to_dict()
        self._instructions = facts["instruction_prompts"]
        self._sizes = sorted({*(facts.get("nested_dimensions") or ()), facts["projection_size"]})
        self._device = device
        self._model: Any = None
        self._tokenizer: Any = None
        self._has_layers = has_layers(facts) and device in (None, "cpu")
        self.trained_exits: tuple[int, ...] = tuple(sorted(facts["exit_layers"]))
        self._numpy: NumpyEncoder | None = None
        self._known: OrderedDict[_Key, np.ndarray] = OrderedDict()

    @cached_property
    def checksum(self) -> str:
        """Checksum of the weights, configuration and tokenizer (see `checkpoint_checksum`)."""
        if self.has_exit_zero:
            return folder_checksum(self._folder)
        from modular_star_encoder.inference.checkpoints import checkpoint_checksum

        return checkpoint_checksum(self.checkpoint)

    @cached_property
    def config(self) -> ModularStarEncoderConfig:
        """The configuration of the whole checkpoint."""
        from modular_star_encoder.inference.checkpoints import load_config

        return load_config(self.checkpoint)

    def exits(self, exit_layer: int | None, exit_layers: Sequence[int] | None) -> tuple[int, ...]:
        """Return the exits given; by default, exit 0 where numpy can compute it, otherwise the deepest exit."""
        if self.has_exit_zero and exit_layers is None and exit_layer in (None, 0):
            # With the ranking rules, exit 0 finds nearly as much as the deepest exit, at a fraction of its cost.
            return (0,)
        for one in exit_layers or (() if exit_layer is None else (exit_layer,)):
            self.check_exit(one)
        if exit_layer is None and exit_layers is None:
            exit_layer = self.config.num_hidden_layers  # also if a forward pass returns all exits by default
        return tuple(self.config.resolve_exits(exit_layer, exit_layers))

    def check_exit(self, exit_layer: int) -> int:
        """Return `exit_layer`, or raise UserError if the checkpoint has no such exit; the message lists its exits."""
        if exit_layer not in self.trained_exits:
            exits = ", ".join(map(str, self.trained_exits))
            message = f"exit_layer {exit_layer} is not an exit of {self.checkpoint}; its exits are {exits}."
            raise UserError("search.exit_layer", message)
        return exit_layer

    def prompts(self) -> dict[str, str]:
        """Return the prompts put before questions (`query`) and code (`document`, with a placeholder `{language}`)."""
        document = CODE_INSTRUCTION + SEP_TOKEN if self._instructions else ""
        return {"query": text_prompt(instructions=self._instructions), "document": document}

    def check_dimension(self, dimension: int | None) -> int:
        """Return `dimension`, or the full size of an embedding if it is None.

        Raises:
            UserError: the model was not trained with embeddings of this size.
        """
        if dimension is not None and dimension not in self._sizes:
            sizes = " or ".join(map(str, self._sizes))
            message = f"`dimension` must be {sizes} for {self.checkpoint}, not {dimension}."
            raise UserError("search.dimension", message)
        return dimension or self._sizes[-1]

    def questions(self, texts: Sequence[str], exit_layers: Sequence[int], dimension: int) -> dict[int, np.ndarray]:
        """Embed Q questions in one forward pass; return exit_layer → (Q, dimension) float32, scaled to length 1."""
        prompt = text_prompt(instructions=self._instructions)
        embeddings = self._encode([prompt + text for text in texts], exit_layers)
        return {exit_layer: cut(values, dimension) for exit_layer, values in embeddings.items()}

    def snippets(
        self, snippets: Sequence[Snippet], exit_layers: Sequence[int], dimension: int
    ) -> dict[int, np.ndarray]:
        """Embed N pieces of code; return exit_layer → (N, dimension) float32, scaled to length 1.

        A piece equal to a recently embedded one is not embedded again: in some large projects, a third are copies.
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

    def prepare(self, exit_layers: Sequence[int], texts: int | None = None) -> None:
        """Load what embeds `texts` texts (None: many) at these exits: numpy arrays if that suffices, else a model.

        Raises:
            UserError: the checkpoint has no such exit.
            OSError: the weights can't be read.
        """
        if self._suits_numpy(exit_layers, texts):
            self._numpy = self._numpy or NumpyEncoder(self._folder)
        elif self._model is None or self._model.config.num_hidden_layers < max(exit_layers):
            from modular_star_encoder.inference.checkpoints import load_checkpoint

            _hide_loading_bars()
            self._model, self._tokenizer = load_checkpoint(self.checkpoint, max(exit_layers), self._device)

    def _suits_numpy(self, exit_layers: Sequence[int], texts: int | None) -> bool:
        is_small = self._model is None and texts is not None and texts <= _FEW_TEXTS
        return self.has_exit_zero and (tuple(exit_layers) == (0,) or (self._has_layers and is_small))

    def _encode(self, texts: Sequence[str], exit_layers: Sequence[int]) -> dict[int, np.ndarray]:
        self.prepare(exit_layers, len(texts))
        if self._numpy is not None and self._suits_numpy(exit_layers, len(texts)):
            if tuple(exit_layers) == (0,):
                return {0: self._numpy.encode(texts)}
            return self._numpy.encode_exits(texts, exit_layers)
        from modular_star_encoder.inference.encode import encode_exits

        return encode_exits(self._model, self._tokenizer, texts, exit_layers=exit_layers, progress=False)


def _hide_loading_bars() -> None:
    """Hide the progress bars of transformers, which would overwrite ours; bars of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads_hidden = are_progress_bars_disabled()
    logging.disable_progress_bar()
    if not downloads_hidden:
        enable_progress_bars()


def cut(embeddings: np.ndarray, dimension: int) -> np.ndarray:
    """Return the first `dimension` components of embeddings (N, D), scaled to length 1; zero vectors stay zero."""
    values = embeddings[:, :dimension]
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
