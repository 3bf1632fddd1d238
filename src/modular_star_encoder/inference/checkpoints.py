"""Write checkpoints: slices (the first layers of a larger one with their heads), and files of a SentenceTransformer."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import modular_star_encoder.modeling as modeling
from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.inference.load import checkpoint_file, load_config, load_own_tokenizer, load_whole
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
from modular_star_encoder.modeling.published_checkpoints import PUBLISHED_ARCHITECTURE
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_folder

SENTENCE_TRANSFORMER_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
)


def slice_checkpoint(
    checkpoint: str | os.PathLike[str], exit_layer: int, out: str | os.PathLike[str], *, only_exit: bool = False
) -> Path:
    """Write the first `exit_layer` layers of a checkpoint as a stand-alone checkpoint.

    The slice holds the same tensors, in the configuration's dtype: its outputs at each of its exits equal those of the
    full model bit for bit. Its configuration also keeps the depth and the exits of its parent.

    Args:
        checkpoint: a folder or Hub id.
        exit_layer: depth of the slice, an exit of the checkpoint.
        out: folder to write; it must not exist, or be empty. It appears whole or not at all.
        only_exit: keep the projection head of this exit alone, as the published cut models do.

    Returns:
        The written folder.

    Raises:
        UserError: the checkpoint has no such exit (the message lists its exits), is damaged or not ours, or `out` is
            not empty. Nothing is written.
        OSError: its folder lacks configuration or weights, or the Hub has no such repository. Nothing is written.

    Example:
        >>> slice_checkpoint("runs/model", 4, "runs/model-exit-4")  # doctest: +SKIP
        >>> AutoModel.from_pretrained("runs/model-exit-4").config.num_hidden_layers  # doctest: +SKIP
        4
    """
    out = Path(out).expanduser()
    with staged_folder(out) as staging:
        write_checkpoint(checkpoint, staging, exit_layer, only_exit=only_exit)
    return out


def write_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: Path,
    exit_layer: int | None = None,
    *,
    only_exit: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Write a copy of a checkpoint, whole or cut, with this package's model code.

    Args:
        checkpoint: a folder or Hub id.
        out: a folder.
        exit_layer, only_exit: as for `slice_checkpoint`; not cut if None.
        tokenizer: folder of the tokenizer; that of the checkpoint if None.
    """
    config = load_config(checkpoint)
    checkpoint = os.path.expanduser(checkpoint)
    if exit_layer is not None:
        config.check_exit(exit_layer)
    model_class = class_named(config.architectures[0], checkpoint)
    model = load_whole(model_class, checkpoint, exit_layer)
    own_tokenizer = load_own_tokenizer(os.path.expanduser(tokenizer or checkpoint))
    if only_exit and exit_layer is not None:
        keep_only_exit(model, exit_layer)
    model.save_pretrained(out)
    own_tokenizer.save_pretrained(out)
    for name in SENTENCE_TRANSFORMER_FILES:
        source = checkpoint_file(checkpoint, name)
        if source is not None:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, out / name)


def class_named(name: str, checkpoint: str | os.PathLike[str]) -> type[modeling.ModularStarEncoderPreTrainedModel]:
    """Our class of this name; for a published checkpoint the base class, which reads the tensor names."""
    if name == PUBLISHED_ARCHITECTURE:
        return modeling.ModularStarEncoderPreTrainedModel
    if name not in modeling.__all__:
        raise UserError(
            "checkpoint.other_class",
            f"{checkpoint} holds a {name}, which is not a class of this package: load it and save model.slice(…).",
        )
    return getattr(modeling, name)


def keep_only_exit(model: modeling.ModularStarEncoderPreTrainedModel, exit_layer: int) -> None:
    """Drop the other exits of a model with their projection heads; the layers stay."""
    for other in set(model.config.exit_layers) - {exit_layer}:
        if hasattr(model, "projection_heads"):
            del model.projection_heads[str(other)]
    model.config.exit_layers = [exit_layer]


# The module paths of sentence-transformers before version 6: version 6 reads them, and so do text-embeddings-inference
# and older installations, which know no others.
MODULES = (
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer", "kwargs": ["exit_layer"]},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
)

# text-embeddings-inference reads the first two without a default (router/src/lib.rs), so none is left out.
POOLING_MODES = ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken")

SERVABLE = {
    "pooling": ("mean", "lasttoken"),
    "projection_order": ("project_then_pool",),
    "embedding_normalization": ("l2",),
}
"""Settings of a model whose embedding SentenceTransformers' modules can compute."""


def _servable_values(config: ModularStarEncoderConfig, name: str) -> tuple[str, ...]:
    # A mean and a linear head commute, so the order of the two does not matter.
    free = name == "projection_order" and config.projection_head == "linear" and config.pooling == "mean"
    return (*SERVABLE[name], "pool_then_project") if free else SERVABLE[name]


def is_servable(config: ModularStarEncoderConfig) -> bool:
    """Whether SentenceTransformers' own pooling and normalisation give the model's embedding."""
    return all(getattr(config, name) in _servable_values(config, name) for name in SERVABLE)


def check_servable(config: ModularStarEncoderConfig) -> None:
    """Raise UserError if SentenceTransformers' own pooling and normalisation would not give the model's embedding."""
    for name in SERVABLE:
        allowed = _servable_values(config, name)
        if getattr(config, name) not in allowed:
            raise UserError(
                "checkpoint.not_servable",
                f"A model with {name}={getattr(config, name)!r} cannot be a SentenceTransformer, whose modules know "
                f"only {' and '.join(map(repr, allowed))}.",
            )


def write_sentence_transformer_files(
    folder: str | os.PathLike[str],
    config: ModularStarEncoderConfig,
    prompts: Mapping[str, str],
    modules: Sequence[Mapping[str, Any]] = MODULES,
    *,
    dimension: int | None = None,
    pooling: str | None = None,
) -> None:
    """Write `modules.json` and the modules' settings into a checkpoint's folder.

    A retrieval model's `last_hidden_state` are the exit's projected tokens, so stock pooling and normalisation follow,
    and `encode(..., exit_layer=k)` reaches the model.

    Args:
        folder: the checkpoint's folder.
        config: its configuration.
        prompts: name → prefix, as `SentenceTransformer.encode(prompt_name=…)` takes them.
        modules: content of `modules.json`.
        dimension: size of the embeddings; `config.projection_size` if None.
        pooling: of a model that has no embeddings of its own, `"mean"` or `"lasttoken"`; the retrieval model's if None.
    """
    if pooling is None:
        check_servable(config)
    mode = {"mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken"}[pooling or config.pooling]
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


def save_retrieval_checkpoint(
    model: ModularStarEncoderForRetrieval, tokenizer: PreTrainedTokenizerBase, out: str | os.PathLike[str]
) -> Path:
    """Write model, code, tokenizer, and the prompts and modules of a SentenceTransformer.

    Args:
        out: folder to write; it must not exist, or be empty. It appears whole or not at all.
    """
    with staged_folder(out) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        prompts = sentence_transformer_prompts(instructions=model.config.instruction_prompts)
        write_sentence_transformer_files(staging, model.config, prompts)
    return Path(out)
