"""The small files that make a checkpoint folder a SentenceTransformer, too."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modular_star_encoder.modeling import ModularStarEncoderConfig

# The module paths of sentence-transformers before version 6: version 6 reads them, and so do text-embeddings-inference
# and older installations, which know no others.
MODULES = (
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer", "kwargs": ["exit_layer"]},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
)

# text-embeddings-inference reads the first two without a default (router/src/lib.rs), so none is left out.
POOLING_MODES = ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken")

SERVABLE = {"pooling": ("mean", "cls"), "projection_order": ("project_then_pool",), "embedding_normalization": ("l2",)}
"""What pooling and normalisation outside the model, in SentenceTransformers' modules, can express."""


def is_servable(config: ModularStarEncoderConfig) -> bool:
    """Whether SentenceTransformers' own pooling and normalisation give the model's embedding."""
    return all(getattr(config, name) in allowed for name, allowed in SERVABLE.items())


def check_servable(config: ModularStarEncoderConfig) -> None:
    """Refuse a model whose embedding SentenceTransformers' own pooling and normalisation would not give.

    Raises:
        ValueError: the message says which setting that is.
    """
    for name, allowed in SERVABLE.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"A model with {name}={getattr(config, name)!r} can't be a SentenceTransformer, whose modules know "
                f"only {' and '.join(map(repr, allowed))}."
            )


def write_sentence_transformer_files(
    folder: str | os.PathLike,
    config: ModularStarEncoderConfig,
    prompts: Mapping[str, str],
    modules: Sequence[Mapping[str, Any]] = MODULES,
    *,
    dimension: int | None = None,
    pooling: str | None = None,
) -> None:
    """Write `modules.json` and the modules' settings beside a checkpoint.

    A retrieval model's `last_hidden_state` are the exit's projected tokens, so stock pooling and normalisation follow,
    and `encode(..., exit_layer=k)` reaches the model.

    Args:
        folder: the checkpoint's folder.
        config: its configuration, which says the embedding size and the pooling.
        prompts: name → prefix, as `SentenceTransformer.encode(prompt_name=…)` takes them.
        modules: content of `modules.json`.
        dimension: size of the embeddings; `config.projection_size` if None.
        pooling: of a model that has no embeddings of its own, `"mean"` or `"cls"`; the retrieval model's if None.

    Raises:
        ValueError: a retrieval model whose embeddings the modules would not give. Nothing is written then.
    """
    if pooling is None:
        check_servable(config)
    mode = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_lasttoken"}[pooling or config.pooling]
    files = {
        "modules.json": list(modules),
        "sentence_bert_config.json": {"max_seq_length": config.max_position_embeddings, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": dict(prompts),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {"word_embedding_dimension": dimension or config.projection_size}
        | {name: name == mode for name in POOLING_MODES},
        "2_Normalize/config.json": {},
    }
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
