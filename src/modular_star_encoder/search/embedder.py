"""Embed questions and pieces of code at the exits of a checkpoint."""

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from modular_star_encoder.data.prompts import CODE_INSTRUCTION, SEP_TOKEN, code_prompt, text_prompt
from modular_star_encoder.inference import check_checkpoint, is_repository, local_folder, resolve_checkpoint
from modular_star_encoder.inference.exit_zero import NumpyEncoder, has_exit_zero, has_layers, read_config
from modular_star_encoder.search.pieces import Snippet
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import folder_checksum

_KEPT_EMBEDDINGS = 4096  # with their texts, about 20 MB for two exits
_FEW_TEXTS = 64  # numpy embeds at most this many at exits above 0: for so few, importing torch would take longer

# Files of a repository that a search may read.
_FILES = ["config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "model*.safetensors*"]
_FILES += ["config_sentence_transformers.json", "exit_profile.json"]

_Key = tuple[tuple[int, ...], int, str]  # exits, dimension, text
_Encoder = Callable[[Sequence[str]], dict[int, np.ndarray]]  # N texts → {exit_layer: embeddings (N, D) float32}


class Embedder:
    """Embeds questions and code with one checkpoint, whose files are read when they are first needed.

    Only layers up to the deepest exit in use are loaded, and torch is imported only if numpy can't compute embeddings.
    Any method raises ValueError or OSError if the checkpoint does not exist, is damaged, or is not a retrieval model.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], device: str | None = None) -> None:
        folder = local_folder(checkpoint)
        self.checkpoint = os.fspath(checkpoint) if folder is None else str(folder.resolve())
        self._device = device
        self._loaded: dict[Any, tuple[Any, Any]] = {}  # dtype or None → (model, tokenizer)
        self._known: OrderedDict[_Key, np.ndarray] = OrderedDict()

    @cached_property
    def checksum(self) -> str:
        """The checkpoint's checksum (see `checkpoint_checksum`); for a Hub repository, the hash of the commit."""
        if is_repository(self.checkpoint):
            return Path(self._folder).name  # the hash of the commit
        if has_exit_zero(self._facts):
            return folder_checksum(self._folder)
        from modular_star_encoder.inference.checkpoints import checkpoint_checksum

        return checkpoint_checksum(self.checkpoint)

    @property
    def trained_exits(self) -> tuple[int, ...]:
        """The exits of the checkpoint, ascending."""
        return tuple(sorted(self._facts["exit_layers"]))

    @cached_property
    def _folder(self) -> str:
        """The checkpoint's folder; for a Hub repository, the folder of its newest commit in the Hub's cache."""
        if not is_repository(self.checkpoint):
            return resolve_checkpoint(self.checkpoint)
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(self.checkpoint, allow_patterns=_FILES)
        except OSError as error:
            reason = f"cannot be downloaded from the Hub: {' '.join(str(error).split())}"
            raise OSError(f"{self.checkpoint} is not a local folder and {reason}") from error
        check_checkpoint(folder)
        return folder

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """The checkpoint's configuration as a dictionary; read without torch if numpy can compute exit 0."""
        facts = read_config(self._folder)
        if not has_exit_zero(facts):
            from modular_star_encoder.inference.checkpoints import load_config

            facts = load_config(self._folder).to_dict()
        return facts

    def exits(
        self,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        budget: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Return the given exits, ascending; by default, exit 0 if numpy can compute it, else the deepest exit.

        `budget` has limits for `select_exit`, such as `latency_ms`, and may name the file of an exit profile (measured
        costs of the exits) under the key `profile`. With a budget, return only the best exit within these limits: one
        of the given exits or, by default, of all exits.
        """
        if exit_layers is not None and (exit_layer is not None or not exit_layers):
            raise UserError("search.exit_layer", "Give either `exit_layer`, or `exit_layers` with at least one exit.")
        named = exit_layers or (() if exit_layer is None else (exit_layer,))
        for one in named:
            self.check_exit(one)
        if budget:
            from modular_star_encoder.inference.exit_profile import checkpoint_profile, select_exit

            limits, allowed = dict(budget), named or self.trained_exits
            file = limits.pop("profile", None)
            fault = f"There is no exit profile {file}" if file else f"{self.checkpoint} has no exit profile"
            with suppress(FileNotFoundError):
                profile = checkpoint_profile(self._folder, file)
                if exits := {one: profile.exits[one] for one in profile.exits if one in allowed}:
                    return (select_exit(replace(profile, exits=exits), **limits),)
                fault += f" with exits {', '.join(map(str, allowed))}"
            advice = f"Run `mose profile {self.checkpoint} --out profile.json`, and add --profile profile.json"
            raise UserError("search.profile", f"{fault}. {advice}.")
        if named:
            return tuple(sorted(set(named)))
        # With the ranking rules, exit 0 finds nearly as much as the deepest exit, at a fraction of its cost.
        return (0,) if has_exit_zero(self._facts) else (self.trained_exits[-1],)

    def check_exit(self, exit_layer: int) -> int:
        """Return `exit_layer`; raise UserError if the checkpoint lacks this exit (the message lists its exits)."""
        if exit_layer not in self.trained_exits:
            exits = ", ".join(map(str, self.trained_exits))
            raise UserError("search.exit_layer", f"{self.checkpoint} has no exit {exit_layer}; its exits are {exits}.")
        return exit_layer

    def prompts(self) -> dict[str, str]:
        """Return {"query": prompt before questions, "document": prompt before code, with placeholder `{language}`}."""
        instructions = self._facts["instruction_prompts"]
        document = CODE_INSTRUCTION + SEP_TOKEN if instructions else ""
        return {"query": text_prompt(instructions=instructions), "document": document}

    def check_dimension(self, dimension: int | None) -> int:
        """Return `dimension`, or the largest if it is None. UserError if the model isn't trained for `dimension`."""
        sizes = sorted({*(self._facts.get("nested_dimensions") or ()), self._facts["projection_size"]})
        if dimension is not None and dimension not in sizes:
            named = " or ".join(map(str, sizes))
            raise UserError("search.dimension", f"`dimension` must be {named} for {self.checkpoint}, not {dimension}.")
        return dimension or sizes[-1]

    def questions(self, texts: Sequence[str], exit_layers: Sequence[int], dimension: int) -> dict[int, np.ndarray]:
        """Embed Q questions in one pass; return {exit_layer: embeddings (Q, dimension) float32 of length 1}."""
        prompt = self.prompts()["query"]
        embeddings = self._embed([prompt + text for text in texts], exit_layers)
        return {exit_layer: cut(values, dimension) for exit_layer, values in embeddings.items()}

    def snippets(
        self, snippets: Sequence[Snippet], exit_layers: Sequence[int], dimension: int
    ) -> dict[int, np.ndarray]:
        """Embed N pieces of code; return {exit_layer: embeddings (N, dimension) float32}. Recent vectors are cached."""
        exits, instructions = tuple(exit_layers), self._facts["instruction_prompts"]
        texts = [code_prompt(one.language, instructions=instructions) + one.embedded() for one in snippets]
        keys = [(exits, dimension, text) for text in texts]
        new = list(dict.fromkeys(key for key in keys if key not in self._known))
        if new:
            embeddings = self._embed([text for *_, text in new], exits)
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

    def _embed(self, texts: Sequence[str], exit_layers: Sequence[int]) -> dict[int, np.ndarray]:
        embeddings = self.encoder(exit_layers, len(texts))(texts)
        if not all(np.isfinite(values).all() for values in embeddings.values()):
            message = f"{self.checkpoint} gives embeddings that are not finite: its weights are damaged."
            raise UserError("search.embeddings.not_finite", message)
        return embeddings

    def encoder(self, exit_layers: Sequence[int], expected: int | None = None) -> _Encoder:
        """Return a function from N texts to {exit_layer: embeddings (N, D) float32}; `expected`, if known, is N.

        If the configuration allows it, numpy computes exit 0. On a CPU, numpy also computes deeper exits of few texts,
        unless torch has already loaded the model.
        """
        if has_exit_zero(self._facts) and tuple(exit_layers) == (0,):
            encode = self._numpy.encode
            return lambda texts: {0: encode(texts)}
        is_short = expected is not None and expected <= _FEW_TEXTS
        if is_short and self._device in (None, "cpu") and None not in self._loaded and has_layers(self._facts):
            return partial(self._numpy.encode_exits, exit_layers=exit_layers)
        import torch

        from modular_star_encoder.inference.encode import bf16_is_faster, encode_exits

        # Of many texts only: a few questions must give the same scores on every machine.
        dtype = torch.bfloat16 if not is_short and bf16_is_faster(self._device) else None
        return partial(encode_exits, *self._load(max(exit_layers), dtype), exit_layers=exit_layers, progress=False)

    def _load(self, exit_layer: int, dtype: Any) -> tuple[Any, Any]:
        """Return (model, tokenizer) in `dtype`, with at least the layers up to `exit_layer`; keep both per dtype."""
        from modular_star_encoder.inference.checkpoints import load_checkpoint

        if dtype not in self._loaded or self._loaded[dtype][0].config.num_hidden_layers < exit_layer:
            _hide_loading_bars()
            model, tokenizer = load_checkpoint(self._folder, exit_layer, self._device, dtype)
            if dtype is not None and model.device.type == "cpu":
                # In bfloat16, torch's CPU kernel for attention takes twice as long as plain products on short texts.
                model.set_attn_implementation("eager")
            self._loaded[dtype] = model, tokenizer
        return self._loaded[dtype]

    @cached_property
    def _numpy(self) -> NumpyEncoder:
        return NumpyEncoder(self._folder)


def _hide_loading_bars() -> None:
    """Hide transformers' bar for loading weights, which would overwrite the bar of indexing; keep download bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads_hidden = are_progress_bars_disabled()
    logging.disable_progress_bar()  # also hides the bars of downloads
    if not downloads_hidden:
        enable_progress_bars()


def cut(embeddings: np.ndarray, dimension: int) -> np.ndarray:
    """Return the first `dimension` components of embeddings (N, D), scaled to length 1; zero vectors stay zero."""
    values = embeddings[:, :dimension]
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
