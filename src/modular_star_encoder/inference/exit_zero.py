"""Compute the exits of a `ModularStarEncoderForRetrieval` with numpy, and write exit 0 as a static model.

Exit 0 runs no layer: it projects the weighted mean of the token embeddings. So it equals a static model, which embeds a
text as the mean of one vector per token, scaled to length 1. Deeper exits are as fast as with torch on a CPU. This
module does not import torch, because the import takes longer than embedding 20 texts.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modular_star_encoder.data.tokenizer_files import check_tokenizer
from modular_star_encoder.utils.errors import UserError, is_panic
from modular_star_encoder.utils.files import read_json, scratch_folder, staged_folder, user_path, write_json

_NEEDED: dict[str, Any] = {"projection_head": "linear", "projection_order": "pool_then_project", "pooling": "mean"}
_NEEDED |= {"model_type": "ModularStarEncoder", "embedding_normalization": "l2", "exit_norm": "none"}
_NEEDED |= {"token_weights": True}
_NEEDED_BY_LAYERS = {"hidden_act": "gelu_pytorch_tanh", "use_bias": True, "is_causal": False}
_TEXTS_PER_BATCH = 512

# How mose-code's tokenizer divides text: at white space and `_`, inside camelCase, and between letters, digits, others.
_CASE_CHANGES = {"Regex": r"(?<=[\p{Ll}\p{N}])(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})"}
_NORMALIZERS: list[Any] = [{"type": "NFKD"}, {"type": "StripAccents"}]
_NORMALIZERS += [{"type": "Replace", "pattern": one, "content": " "} for one in (_CASE_CHANGES, {"String": "_"})]
_NORMALIZERS += [{"type": "Lowercase"}]
_PRE_TOKENIZERS: list[Any] = [{"type": "WhitespaceSplit"}]
_PRE_TOKENIZERS += [{"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}+|[^\p{L}\p{N}]{1,3}"}}]
_PRE_TOKENIZERS[1] |= {"behavior": "Isolated", "invert": False}
_DIVIDES = ({"type": "Sequence", "normalizers": _NORMALIZERS}, {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS})
_WORD = re.compile(r"\w++|[^\w\s]{1,3}+", re.ASCII)  # an identifier of ASCII text, or as above
_SPACE = re.compile(r"\s+", re.ASCII)
_MOST_KNOWN_WORDS, _FEW_WORDS = 200_000, 64

# Format → the name of the table in model.safetensors.
TENSORS = {"sentence-transformers": "embedding.weight", "model2vec": "embeddings"}
# Module paths that all versions of sentence-transformers with `StaticEmbedding` accept; model2vec writes them too.
_STATIC_MODULES = (
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"},
    {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
)


@contextmanager
def _damage_reported(folder: str | Path) -> Iterator[None]:
    """Context manager: raise UserError if code inside fails because a file of the checkpoint is damaged."""
    try:
        yield
    except BaseException as error:  # tokenizers raises no narrower class
        if isinstance(error, OSError | UserError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        message = f"{folder} cannot be used: files are missing, damaged or do not fit together ({error})."
        raise UserError("checkpoint.damaged", message) from error


class NumpyEncoder:
    """Embeds texts with numpy at any exit of a checkpoint in a local folder."""

    def __init__(self, folder: str | Path) -> None:
        """Read a checkpoint; raise UserError or OSError if a file is missing or damaged, or exit 0 needs torch."""
        from tokenizers import Tokenizer

        self.folder, self._known = Path(folder), dict[str, bytes]()  # word → its token ids as uint32
        with _damage_reported(folder):
            self._config = read_config(folder)
            if not has_exit_zero(self._config):
                raise ValueError("it has no exit 0, or its exit 0 needs torch. Use `load_checkpoint`.")
            self._tensors: dict[str, np.ndarray] = {}
            self._tokens = self._tensor("model.embed_tokens.weight")
            if self._tokens.shape != (self._config["vocab_size"], self._config["hidden_size"]):
                raise ValueError(f"the shape of the token embeddings is {self._tokens.shape}")
            self._weights = np.maximum(self._tensor("model.token_weights.weight")[:, 0], 0)
            check_tokenizer(folder)
            self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            settings = read_json(self.folder / "tokenizer_config.json")
            split = settings.get("split_special_tokens", not self._config.get("instruction_prompts", True))
            self.tokenizer.encode_special_tokens = split
            self.tokenizer.no_padding()
            self._most_tokens = self._config["max_position_embeddings"]
            self.tokenizer.enable_truncation(self._most_tokens)
            added = self.tokenizer.get_added_tokens_decoder().values()
            self._special = [] if self.tokenizer.encode_special_tokens else [token.content for token in added]
            parts = (self.tokenizer.normalizer, self.tokenizer.pre_tokenizer)
            self._has_words = tuple(part and json.loads(part.__getstate__()) for part in parts) == _DIVIDES

    @property
    def table(self) -> np.ndarray:
        """Return a vector per vocabulary entry, (V, size) float32: its projected embedding times its learned weight."""
        return self._linear("projection_heads.0.dense", self._tokens) * self._weights[:, None]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the L2-normalised embeddings (N, size) float32 of N texts at exit 0; zeros if a text has no tokens."""
        with _damage_reported(self.folder):
            means = np.zeros((len(texts), self._tokens.shape[1]), dtype=np.float32)
            totals = np.zeros((len(texts), 1), dtype=np.float32)
            for start in range(0, len(texts), _TEXTS_PER_BATCH):
                batch = self._ids(texts[start : start + _TEXTS_PER_BATCH])
                # All texts share one buffer, because new memory for each text takes as long as the sums.
                buffer = np.empty((max(map(len, batch)), self._tokens.shape[1]), dtype=np.float32)
                for place, ids in enumerate(batch, start):
                    weights = self._weights[ids]
                    totals[place] = weights.sum()
                    tokens = np.take(self._tokens, ids, axis=0, out=buffer[: len(ids)], mode="clip")
                    means[place] = weights @ tokens / (totals[place] or 1.0)
            embeddings = self._linear("projection_heads.0.dense", means) * (totals > 0)
            lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
            return embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return each text's token ids. If the tokenizer divides texts into words, equal words are encoded once."""
        if not self._has_words:
            return [np.array(one.ids, dtype=np.uint32) for one in self.tokenizer.encode_batch_fast(list(texts))]
        divided = [self._words(text) for text in texts]
        if len(self._known) > _MOST_KNOWN_WORDS:
            self._known.clear()
        new = list(set(chain.from_iterable(divided)).difference(self._known))
        encode: Any = self.tokenizer.encode_batch_fast  # it starts threads, which takes too long for few words
        encoded = encode(new) if len(new) > _FEW_WORDS else map(self.tokenizer.encode, new)
        self._known.update(
            (word, np.array(one.ids, np.uint32).tobytes()) for word, one in zip(new, encoded, strict=True)
        )
        ids = (np.frombuffer(b"".join(map(self._known.__getitem__, one)), np.uint32) for one in divided)
        return [one[: self._most_tokens] for one in ids]

    def _words(self, text: str) -> list[str]:
        """Split a text into parts that can be tokenized separately; words with non-ASCII characters stay whole."""
        if any(token in text for token in self._special):
            return [text]
        if text.isascii():
            return _WORD.findall(text)
        return [part for word in _SPACE.split(text) for part in (_WORD.findall(word) if word.isascii() else [word])]

    def encode_exits(self, texts: Sequence[str], exit_layers: Sequence[int]) -> dict[int, np.ndarray]:
        """Return {exit_layer: embeddings (N, size) float32 of length 1} of N texts; zeros for a text without tokens.

        For exits above 0, the caller must first check with `has_layers` that this class supports the layers.
        """
        result = {one: np.zeros((len(texts), self._config["projection_size"]), dtype=np.float32) for one in exit_layers}
        for place, ids in enumerate(self._ids(texts)):
            weights = self._weights[ids]
            if not weights.sum():
                continue
            for exit_layer, states in enumerate(self._states(ids, max(exit_layers))):
                if exit_layer in result:
                    pooled = weights @ states / weights.sum()
                    embedding = self._linear(f"projection_heads.{exit_layer}.dense", pooled)
                    result[exit_layer][place] = embedding / np.linalg.norm(embedding)
        return result

    def _states(self, ids: np.ndarray, layers: int) -> Iterator[np.ndarray]:
        """Yield the states (T, hidden size) of T tokens: the embeddings, then the output of each of `layers` layers."""
        states = self._tokens[ids]
        yield states
        size = states.shape[1] // self._config["num_attention_heads"]
        rates = self._config["rope_parameters"]["rope_theta"] ** (-np.arange(0, size, 2, dtype=np.float32) / size)
        angles = np.tile(np.arange(len(ids), dtype=np.float32)[:, None, None] * rates, 2)
        rotation = np.cos(angles), np.sin(angles) * np.repeat(np.array([-1, 1], dtype=np.float32), size // 2)
        for layer in range(layers):
            name = f"model.layers.{layer}"
            states = states + self._attention(name, self._normalised(f"{name}.input_layernorm", states), rotation)
            wide = self._linear(f"{name}.mlp.c_fc", self._normalised(f"{name}.post_attention_layernorm", states))
            states = states + self._linear(f"{name}.mlp.c_proj", _gelu(wide))
            yield states

    def _attention(self, layer: str, states: np.ndarray, rotation: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        (cos, sin), tokens, groups = rotation, len(states), self._config["num_key_value_heads"]
        size = cos.shape[-1]
        query, key, value = (
            self._linear(f"{layer}.self_attn.{one}_proj", states).reshape(tokens, -1, size) for one in "qkv"
        )
        query, key = (one * cos + np.roll(one, size // 2, -1) * sin for one in (query / math.sqrt(size), key))
        # Heads that share keys and values become rows of one matrix: (groups, heads of a group × T, head size).
        query = query.reshape(tokens, groups, -1, size).transpose(1, 2, 0, 3)
        scores = query.reshape(groups, -1, size) @ key.transpose(1, 2, 0)
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed = scores @ value.transpose(1, 0, 2) / scores.sum(-1, keepdims=True)
        mixed = mixed.reshape(query.shape).transpose(2, 0, 1, 3).reshape(tokens, -1)
        return self._linear(f"{layer}.self_attn.o_proj", mixed)

    def _normalised(self, name: str, states: np.ndarray) -> np.ndarray:
        states = states - states.mean(-1, keepdims=True)
        states /= np.sqrt((states * states).mean(-1, keepdims=True) + self._config["norm_epsilon"])
        return states * self._tensor(f"{name}.weight") + self._tensor(f"{name}.bias")

    def _linear(self, name: str, values: np.ndarray) -> np.ndarray:
        result: np.ndarray = values @ self._tensor(f"{name}.weight", transposed=True)
        result += self._tensor(f"{name}.bias")
        return result

    def _tensor(self, name: str, transposed: bool = False) -> np.ndarray:
        """Return a tensor of the checkpoint as float32, or its transpose, with which `_linear` is faster."""
        if name not in self._tensors:
            from safetensors import safe_open

            with safe_open(file := self.folder / "model.safetensors", "np") as tensors:
                is_bfloat16 = tensors.get_slice(name).get_dtype() == "BF16"
                tensor = _bfloat16_tensor(file, name) if is_bfloat16 else tensors.get_tensor(name)
            self._tensors[name] = np.ascontiguousarray(tensor.T if transposed else tensor, dtype=np.float32)
        return self._tensors[name]


def _bfloat16_tensor(file: Path, name: str) -> np.ndarray:
    """Read a bfloat16 tensor from a safetensors file as float32, because numpy has no bfloat16."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        facts = json.loads(opened.read(size))[name]
    start, end = facts["data_offsets"]
    halves = np.fromfile(file, "<u2", (end - start) // 2, offset=8 + size + start)
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(facts["shape"])


def _gelu(values: np.ndarray) -> np.ndarray:
    """Apply GELU (with tanh) in place, because new memory takes longer than the computation; return `values`."""
    gate = values * values
    gate *= 0.044715
    gate += 1
    gate *= values
    gate *= np.sqrt(2 / np.pi, dtype=np.float32)
    np.tanh(gate, out=gate)
    gate += 1
    gate *= 0.5
    values *= gate
    return values


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint's config.json without checks; {} if the file is missing or unreadable."""
    with suppress(OSError, ValueError):
        config = read_json(Path(folder) / "config.json")
        return config if isinstance(config, dict) else {}
    return {}


def has_exit_zero(config: dict[str, Any]) -> bool:
    """Return whether `NumpyEncoder` supports exit 0 of a checkpoint with this configuration."""
    exits, nested = config.get("exit_layers"), config.get("nested_dimensions") or []
    if not isinstance(exits, list | tuple) or 0 not in exits or not isinstance(nested, list | tuple):
        return False
    sizes = [config.get(name) for name in ("projection_size", "max_position_embeddings", "vocab_size", "hidden_size")]
    if not all(type(size) is int for size in (*sizes, *nested, *exits)) or min(*sizes, *nested) < 1:
        return False
    is_known = all(config.get(key) == value for key, value in _NEEDED.items())
    return is_known and list(exits) == sorted(set(exits)) and "instruction_prompts" in config


def has_layers(config: dict[str, Any]) -> bool:
    """Return whether `NumpyEncoder` supports all exits of a checkpoint with this configuration."""
    rotation, sizes = config.get("rope_parameters"), ("hidden_size", "num_attention_heads", "num_key_value_heads")
    if not isinstance(rotation, dict) or rotation.get("rope_type") != "default":
        return False
    numbers = [rotation.get("rope_theta"), config.get("norm_epsilon")]
    is_known = all(config.get(key) == value for key, value in _NEEDED_BY_LAYERS.items())
    is_complete = all(type(config.get(size)) is int for size in sizes) and all(type(one) is float for one in numbers)
    return has_exit_zero(config) and is_known and is_complete


def export_static(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    format: Literal["sentence-transformers", "model2vec"] = "sentence-transformers",
) -> Path:
    """Write exit 0 of a checkpoint as a static model, a table of one vector per token, which needs no remote code.

    The embeddings (N, D) float32 that the written model gives for N texts differ by at most 1e-6 from exit 0 of
    `encode_exits`; D is `config.projection_size`. An empty text gives zeros. Embeddings of model2vec differ more in two
    cases: it does not cut texts that are longer than `max_position_embeddings`, and it leaves out unknown tokens.

    Args:
        checkpoint: a folder or Hub repository with exit 0, or the name of a model of this package.
        folder: folder to write; it must be empty or not exist. If an error occurs, nothing is written.
        format: `sentence-transformers`, for `SentenceTransformer(folder)`; or `model2vec`, for
            `StaticModel.from_pretrained(folder)`, which `SentenceTransformer` can load too.

    Returns:
        The written folder: tokenizer.json, modules.json, and model.safetensors, a table (V, D) float32 for V tokens.

    Raises:
        UserError: the format is unknown (`static.format`).
        UserError: exit 0 is not a weighted mean of token vectors (`static.exit_zero`).
        UserError: the tokenizer adds special tokens, which static models leave out (`static.special_tokens`).
        ValueError: the checkpoint has no exit 0.
        OSError: the checkpoint does not exist, or lacks its configuration or weights.

    Example:
        >>> folder = export_static("mose-code", "runs/mose-code-static")  # doctest: +SKIP
        >>> SentenceTransformer(str(folder)).encode(["parse a header"]).shape  # doctest: +SKIP
        (1, 384)
    """
    from safetensors.numpy import save

    from modular_star_encoder.data.tokenizer import load_tokenizer
    from modular_star_encoder.inference import resolve_checkpoint
    from modular_star_encoder.inference.checkpoints import load_config, slice_checkpoint, stored_prompts

    config = load_config(checkpoint)
    config.check_exit(0)
    if format not in TENSORS:
        raise UserError("static.format", f"`format` must be {' or '.join(TENSORS)}, not {format!r}.")
    if not has_exit_zero(config.to_dict()):
        needed = "the model needs `token_weights` and a linear head after pooling"
        raise UserError("static.exit_zero", f"Exit 0 of {checkpoint} can't be a static model: {needed}.")
    if added := load_tokenizer(resolve_checkpoint(checkpoint)).num_special_tokens_to_add():
        message = f"The tokenizer of {checkpoint} must add no special tokens to a text, but adds {added}."
        raise UserError("static.special_tokens", message)
    with scratch_folder("static") as scratch:
        cut = slice_checkpoint(checkpoint, 0, scratch / "slice")
        try:
            encoder = NumpyEncoder(cut)
        except UserError as error:  # the user knows the checkpoint, not its temporary slice
            raise UserError(error.key, str(error).replace(str(cut), str(checkpoint))) from error
        tokenizer, table = encoder.tokenizer, encoder.table
    folder = user_path(folder)
    with staged_folder(folder) as staging:
        (staging / "model.safetensors").write_bytes(save({TENSORS[format]: table}))
        write_json(staging / "modules.json", _STATIC_MODULES)
        (staging / "1_Normalize").mkdir()
        write_json(staging / "1_Normalize" / "config.json", {})
        settings = {"prompts": stored_prompts(checkpoint), "default_prompt_name": None, "similarity_fn_name": "cosine"}
        write_json(staging / "config_sentence_transformers.json", settings)
        if format == "model2vec":
            tokenizer.no_truncation()
            # With a max_length, model2vec also cuts a text's characters, and may lose tokens within this length.
            own: dict[str, Any] = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": True}
            own |= {"hidden_dim": config.projection_size, "max_length": None, "embedding_dtype": "float32"}
            write_json(staging / "config.json", own)
        write_json(staging / "tokenizer.json", _tokenizer_state(tokenizer))
    return folder


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Return the content of a tokenizer.json with which other libraries treat special tokens as `tokenizer` does."""
    state = json.loads(tokenizer.to_str())
    if tokenizer.encode_special_tokens:  # sentence-transformers and model2vec ignore this, but read `added_tokens`
        vocabulary = state["model"]["vocab"]
        state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in vocabulary]
    return state
