"""Write exit 0 of a checkpoint as a static model, which sentence-transformers or model2vec can load.

Both libraries embed a text as the mean of one vector per token. Exit 0 is a weighted mean of such vectors, which
is then scaled to length 1. Exit 0 therefore equals the plain mean of weighted vectors, scaled to length 1.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from safetensors.numpy import save

from modular_star_encoder.inference.checkpoints import load_config, slice_checkpoint, stored_prompts
from modular_star_encoder.inference.exit_zero import ExitZero, has_exit_zero
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import scratch_folder, staged_folder, write_json

# Format → the name of the table in model.safetensors.
TENSORS = {"sentence-transformers": "embedding.weight", "model2vec": "embeddings"}
# Module paths that all versions of sentence-transformers with `StaticEmbedding` accept; model2vec writes them too.
_MODULES = (
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"},
    {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
)


def export_static(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    format: Literal["sentence-transformers", "model2vec"] = "sentence-transformers",
) -> Path:
    """Write exit 0 of a checkpoint as a table of one vector per token, which loads without `trust_remote_code`.

    The embeddings (N, D) float32 of the written model equal exit 0 of `encode_exits` to 1e-6, and an empty text gives
    zeros. model2vec differs in two points: it uses all tokens of a text longer than `max_position_embeddings`, and it
    leaves out unknown tokens.

    Args:
        checkpoint: a folder or Hub repository with exit 0, or `mose-code`, which comes with this package.
        folder: folder to write; it must be empty or not exist. It is written atomically.
        format: `sentence-transformers`, for `SentenceTransformer(folder)`; or `model2vec`, for
            `StaticModel.from_pretrained(folder)`, which `SentenceTransformer` can load too.

    Returns:
        The written folder: tokenizer.json, modules.json, and model.safetensors with V × D numbers in float32.

    Raises:
        UserError: the format is unknown, exit 0 is not a weighted mean of token vectors, the tokenizer adds special
            tokens, which static models leave out, or as in `slice_checkpoint`. Nothing is written.

    Example:
        >>> folder = export_static("mose-code", "runs/mose-code-static")  # doctest: +SKIP
        >>> SentenceTransformer(str(folder)).encode(["parse a header"]).shape  # doctest: +SKIP
        (1, 384)
    """
    if format not in TENSORS:
        raise UserError("static.format", f"`format` must be {' or '.join(TENSORS)}, not {format!r}.")
    config = load_config(checkpoint)
    if 0 in config.exit_layers and not has_exit_zero(config.to_dict()):
        message = f"Exit 0 of {checkpoint} must be a weighted mean of token vectors, with a linear head after pooling."
        raise UserError("static.exit_zero", message)
    with scratch_folder("static") as scratch:
        exit_zero = ExitZero(slice_checkpoint(checkpoint, 0, scratch / "slice"))
    tokenizer, folder = exit_zero.tokenizer, Path(folder).expanduser()
    if added := tokenizer.num_special_tokens_to_add(False):
        message = f"The tokenizer of {checkpoint} must add no special tokens to a text, but adds {added}."
        raise UserError("static.special_tokens", message)
    with staged_folder(folder) as staging:
        (staging / "model.safetensors").write_bytes(save({TENSORS[format]: exit_zero.table}))
        write_json(staging / "modules.json", _MODULES)
        (staging / "1_Normalize").mkdir()
        write_json(staging / "1_Normalize" / "config.json", {})
        settings = {"prompts": stored_prompts(checkpoint), "default_prompt_name": None, "similarity_fn_name": "cosine"}
        write_json(staging / "config_sentence_transformers.json", settings)
        if format == "model2vec":
            tokenizer.no_truncation()
            # With a maximum length, model2vec also cuts the characters of a text, which may lose tokens before it.
            own: dict[str, Any] = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": True}
            own |= {"hidden_dim": config.projection_size, "max_length": None, "embedding_dtype": "float32"}
            write_json(staging / "config.json", own)
        write_json(staging / "tokenizer.json", _tokenizer_state(tokenizer))
    return folder


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Return a tokenizer.json, parsed, that treats special tokens written in a text as `tokenizer` treats them.

    Both libraries search a text for all added tokens, so added tokens that are also in the vocabulary are removed.
    """
    state = json.loads(tokenizer.to_str())
    if tokenizer.encode_special_tokens:
        vocabulary = state["model"]["vocab"]
        state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in vocabulary]
    return state
