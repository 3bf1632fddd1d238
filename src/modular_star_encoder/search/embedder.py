"""Questions and snippets as embeddings of a checkpoint's exits."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modular_star_encoder.data.prompts import CODE_INSTRUCTION, SEP_TOKEN, code_prompt, text_prompt
from modular_star_encoder.inference.checkpoints import checkpoint_checksum, load_checkpoint, load_config
from modular_star_encoder.inference.encode import encode_exits, encode_states, resume_states
from modular_star_encoder.search.vector_store import Found, Snippet, content_hash
from modular_star_encoder.utils.errors import UserError

_KEPT_EMBEDDINGS = 20_000

_Key = tuple[tuple[int, ...], int, str, str]  # exits, dimension, hash of the text, language


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
        self.checkpoint = str(folder.resolve()) if folder.is_dir() else os.fspath(checkpoint)
        self.config = load_config(self.checkpoint)
        self.checksum = checkpoint_checksum(self.checkpoint)
        self._device = device
        self._model: Any = None
        self._tokenizer: Any = None
        self._known: OrderedDict[_Key, np.ndarray] = OrderedDict()

    def prompts(self) -> dict[str, str]:
        """Of questions and of code, where `{language}` stands for the language."""
        instructions = self.config.instruction_prompts
        document = CODE_INSTRUCTION + SEP_TOKEN if instructions else ""
        return {"query": text_prompt(instructions=instructions), "document": document}

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
        prompt = text_prompt(instructions=self.config.instruction_prompts)
        embeddings = self._encode([prompt + text for text in texts], exit_layers)
        return {exit_layer: cut(values, dimension) for exit_layer, values in embeddings.items()}

    def snippets(
        self, snippets: Sequence[Snippet], exit_layers: Sequence[int], dimension: int, *, states: bool = False
    ) -> tuple[dict[int, np.ndarray], list[np.ndarray] | None]:
        """exit_layer → (N, dimension) float32 of length 1, and the states of the shallowest exit if asked for.

        Without states, copies of a snippet that was embedded lately are not embedded again: a third of some large
        projects are copies.
        """
        if states:
            texts = [self._document(snippet) for snippet in snippets]
            embeddings, kept = encode_states(self.load(max(exit_layers)), self._tokenizer, texts, exit_layers)
            return {exit_layer: cut(values, dimension) for exit_layer, values in embeddings.items()}, kept

        def embed(places: Sequence[int]) -> np.ndarray:
            embeddings = self._encode([self._document(snippets[place]) for place in places], exit_layers)
            return np.stack([cut(embeddings[exit_layer], dimension) for exit_layer in exit_layers], axis=1)

        exits = tuple(exit_layers)
        keys = [(exits, dimension, content_hash(one.text), one.language) for one in snippets]
        values = self._remembered(keys, embed)
        return {exit_layer: values[:, place] for place, exit_layer in enumerate(exits)}, None

    def deeper(
        self, found: Sequence[Found], exit_layer: int, dimension: int, states_of: int | None = None
    ) -> np.ndarray:
        """Embeddings (N, dimension) float32 of rows at a deep exit; those made lately are remembered.

        Args:
            found: rows of an index.
            exit_layer: the deep exit.
            states_of: the exit whose states the rows have; from text if None.
        """

        def embed(places: Sequence[int]) -> np.ndarray:
            if states_of is None:
                texts = [self._document(found[place].snippet) for place in places]
                values = self._encode(texts, [exit_layer])[exit_layer]
            else:
                kept = [states for place in places if (states := found[place].states) is not None]
                values = resume_states(self.load(exit_layer), kept, states_of, exit_layer)
            return cut(values, dimension)[:, None]

        keys = [((exit_layer,), dimension, one.text_hash, one.snippet.language) for one in found]
        return self._remembered(keys, embed)[:, 0]

    def forget(self) -> None:
        """Remember no embedding that was made before."""
        self._known.clear()

    def _remembered(self, keys: Sequence[_Key], embed: Callable[[Sequence[int]], np.ndarray]) -> np.ndarray:
        """Embeddings (N, exits, dimension) of keys; `embed` makes those of the places that aren't known."""
        new = {key: place for place, key in enumerate(keys) if key not in self._known}
        if new:
            self._known.update(zip(new, embed(list(new.values())), strict=True))
        result = np.stack([self._known[key] for key in keys])
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > _KEPT_EMBEDDINGS:
            self._known.popitem(last=False)
        return result

    def _document(self, snippet: Snippet) -> str:
        return code_prompt(snippet.language, instructions=self.config.instruction_prompts) + snippet.text

    def _encode(self, texts: Sequence[str], exit_layers: Sequence[int]) -> dict[int, np.ndarray]:
        model = self.load(max(exit_layers))
        return encode_exits(model, self._tokenizer, texts, exit_layers=exit_layers, progress=False)


def cut(embeddings: np.ndarray, dimension: int) -> np.ndarray:
    """The first components of embeddings (N, D), scaled to length 1; a zero vector stays one."""
    values = embeddings[:, :dimension]
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
