"""Questions and snippets as embeddings of a checkpoint's exits."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from modular_star_encoder.data.prompts import CODE_INSTRUCTION, SEP_TOKEN, code_prompt, text_prompt
from modular_star_encoder.inference.checkpoints import checkpoint_checksum, load_checkpoint, load_config
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.search.pieces import Snippet
from modular_star_encoder.utils.errors import UserError

_KEPT_EMBEDDINGS = 20_000

_Key = tuple[tuple[int, ...], int, str]  # exits, dimension, text


def shipped_checkpoint(name: str) -> str:
    """The folder of a checkpoint that the package holds, such as `mose-code`; any other name as it is."""
    folder = Path(str(files("modular_star_encoder.hub_configs"))) / name
    return str(folder) if (folder / "model.safetensors").is_file() else name


class Embedder:
    """One checkpoint, of which no more layers are loaded than were asked for.

    Attributes:
        checkpoint: absolute path of the folder, or the repository's name.
        checksum: see `checkpoint_checksum`.
        config: the configuration of the whole checkpoint.

    Args:
        checkpoint: a folder, or a repository of the Hub.
        device: where the model goes; a GPU if there is one and None is given.

    Raises:
        ValueError, OSError: there is no such checkpoint, or it isn't one of ours.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], device: str | None = None) -> None:
        folder = Path(checkpoint).expanduser()
        self.checkpoint = str(folder.resolve()) if folder.is_dir() else shipped_checkpoint(os.fspath(checkpoint))
        self.config = load_config(self.checkpoint)
        self.checksum = checkpoint_checksum(self.checkpoint)
        self._device = device
        self._instructions = self.config.instruction_prompts
        self._model: Any = None
        self._tokenizer: Any = None
        self._known: OrderedDict[_Key, np.ndarray] = OrderedDict()

    def prompts(self) -> dict[str, str]:
        """Of questions and of code, where `{language}` stands for the language."""
        document = CODE_INSTRUCTION + SEP_TOKEN if self._instructions else ""
        return {"query": text_prompt(instructions=self._instructions), "document": document}

    def check_dimension(self, dimension: int | None) -> int:
        """`dimension`, or all components for None.

        Raises:
            ValueError: the model wasn't trained to have its embeddings cut there.
        """
        nested = getattr(self.config, "nested_dimensions", None) or ()
        sizes = sorted({*nested, self.config.projection_size})
        if dimension is not None and dimension not in sizes:
            raise UserError(
                "search.dimension",
                f"{self.checkpoint} has embeddings of {' or '.join(map(str, sizes))} components, not {dimension}.",
            )
        return dimension or self.config.projection_size

    def load(self, exit_layer: int) -> Any:
        """The model with its layers up to an exit at least.

        Raises:
            ValueError: an exit that it doesn't have.
            OSError: weights that can't be read.
        """
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

        Copies of a snippet that was embedded lately are not embedded again: a third of some large projects are copies.
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
        """Remember no embedding that was made before."""
        self._known.clear()

    def _encode(self, texts: Sequence[str], exit_layers: Sequence[int]) -> dict[int, np.ndarray]:
        model = self.load(max(exit_layers))
        return encode_exits(model, self._tokenizer, texts, exit_layers=exit_layers, progress=False)


def cut(embeddings: np.ndarray, dimension: int) -> np.ndarray:
    """The first components of embeddings (N, D), scaled to length 1; a zero vector stays one."""
    values = embeddings[:, :dimension]
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
