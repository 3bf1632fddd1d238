"""Slices: stand-alone smaller checkpoints, the first layers of a larger one with their heads."""

import os
import shutil
from pathlib import Path

from modular_star_encoder import modeling
from modular_star_encoder.data.files import staged_folder
from modular_star_encoder.evaluation.checkpoint import checkpoint_file, load_config, load_own_tokenizer, load_whole
from modular_star_encoder.modeling.published_checkpoints import PUBLISHED_ARCHITECTURE

SENTENCE_TRANSFORMER_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
)


def slice_checkpoint(
    checkpoint: str | os.PathLike, exit_layer: int, out: str | os.PathLike, *, only_exit: bool = False
) -> Path:
    """Write the first `exit_layer` layers of a checkpoint as a checkpoint of its own.

    The slice holds the same tensors, in the dtype that the configuration names, so its outputs at each of its exits
    equal those of the full model as it is loaded, bit for bit. Its configuration says what it holds, and keeps the
    depth and the exits of its parent.

    Args:
        checkpoint: a folder or Hub id.
        exit_layer: the slice's depth, an exit of the checkpoint.
        out: folder to write; it must not exist, or be empty.
        only_exit: keep the projection head of this exit alone, as the published cut models do.

    Returns:
        The folder written.

    Raises:
        ValueError: the checkpoint has no such exit (the message lists those it has), is damaged or none of ours, or
            `out` is taken. Nothing is written then.
        OSError: its folder lacks configuration or weights, or the Hub doesn't give them. Nothing is written either.
    """
    out = Path(out).expanduser()
    with staged_folder(out) as staging:
        write_checkpoint(checkpoint, staging, exit_layer, only_exit=only_exit)
    return out


def write_checkpoint(
    checkpoint: str | os.PathLike,
    out: Path,
    exit_layer: int | None = None,
    *,
    only_exit: bool = False,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Write a checkpoint once more, whole or cut, with this package's model code.

    Args:
        checkpoint: a folder or Hub id.
        out: a folder.
        exit_layer, only_exit: as for `slice_checkpoint`; not cut if None.
        tokenizer: folder of the tokenizer; that of the checkpoint if None.

    Raises:
        ValueError: the checkpoint has no such exit, is damaged, or is of a class that is none of ours.
        OSError: its folder lacks configuration or weights, or the Hub doesn't give them.
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


def class_named(name: str, checkpoint: str | os.PathLike) -> type[modeling.ModularStarEncoderPreTrainedModel]:
    """The class of ours with this name; for a published checkpoint the base class, which looks what it holds."""
    if name == PUBLISHED_ARCHITECTURE:
        return modeling.ModularStarEncoderPreTrainedModel
    if name not in modeling.__all__:
        raise ValueError(f"{checkpoint} holds a {name}, no class of this package; load it and save model.slice(…).")
    return getattr(modeling, name)


def keep_only_exit(model: modeling.ModularStarEncoderPreTrainedModel, exit_layer: int) -> None:
    """Drop every exit of a model but this one, with their projection heads; the layers stay."""
    for other in set(model.config.exit_layers) - {exit_layer}:
        if hasattr(model, "projection_heads"):
            del model.projection_heads[str(other)]
    model.config.exit_layers = [exit_layer]
