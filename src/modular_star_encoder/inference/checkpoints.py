"""Read checkpoints (whole, at an exit, or only their configuration), identify them, and write slices of them.

A checkpoint is a local folder or a repository of the Hub. Errors of the libraries below become one sentence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase

import modular_star_encoder.modeling as modeling
from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.inference.exit_zero import shipped_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
from modular_star_encoder.modeling.published_checkpoints import PUBLISHED_ARCHITECTURE
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import folder_checksum, staged_folder

TOKENIZER_FILE = "tokenizer.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
SENTENCE_TRANSFORMER_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
)
# The module paths of sentence-transformers before version 6: version 6 reads them, and so do text-embeddings-inference
# and older installations, which accept only these.
MODULES = (
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer", "kwargs": ["exit_layer"]},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
)
# text-embeddings-inference reads the first two without a default (router/src/lib.rs), so none is left out.
POOLING_MODES = ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken")

_TRUNK = re.compile(r"(^|\.)(embed_tokens|layers|norm)\.")


def load_checkpoint(
    path: str | os.PathLike[str],
    exit_layer: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[ModularStarEncoderForRetrieval, Any]:
    """Load a retrieval model, ready for inference, with its tokenizer.

    Args:
        path: a checkpoint folder, or a repository of the Hub ("owner/name"), of which no code is run.
        exit_layer: read only the layers up to this exit.
        device, dtype: of the model; by default a GPU if there is one, and the checkpoint's own.

    Raises:
        UserError: not a retrieval checkpoint of ours, a damaged file, weights that do not fit its configuration (a
            missing head would be drawn at random), or an exit that it does not have.
        OSError: no such folder or repository, or one without configuration, weights or tokenizer.
    """
    config, path = load_config(path), _expanded(path)
    if exit_layer is not None:
        config.check_exit(exit_layer)
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, TOKENIZER_FILE)):
        raise FileNotFoundError(f"{path} has no tokenizer: {TOKENIZER_FILE} is not there.")
    options = {name: value for name, value in (("exit_layer", exit_layer), ("dtype", dtype)) if value is not None}
    model = _load_whole(AutoModel, path, trust_remote_code=False, **options)
    if not isinstance(model, ModularStarEncoderForRetrieval):
        raise UserError("checkpoint.not_retrieval", f"{path} has no projection heads: fine-tune it first.")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), _load_tokenizer(path)


def load_config(path: str | os.PathLike[str]) -> ModularStarEncoderConfig:
    """The configuration alone: which exits there are, and how texts are prompted."""
    check_checkpoint(path)
    path = _expanded(path)
    with _clear_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not isinstance(config, ModularStarEncoderConfig):
        raise UserError("checkpoint.other_model", f"{path} is a {config.model_type!r}, not a ModularStarEncoder.")
    return config


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Check that a local path is a checkpoint folder, before anything is loaded; names of the Hub pass."""
    folder = Path(_expanded(path))
    if not folder.exists():
        if isinstance(path, str) and re.fullmatch(r"(?![.~]+/)[^/]+/[^/]+", path):  # owner/name
            return
        raise FileNotFoundError(f"There is no checkpoint folder {path}.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} is a file; a checkpoint is a folder.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no config.json.")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise FileNotFoundError(f"{path} has no weights: neither {' nor '.join(WEIGHT_FILES)} is there.")


def checkpoint_checksum(checkpoint: str | os.PathLike[str]) -> str:
    """An identifier of a checkpoint's weights.

    Of a folder the first 16 hexadecimal digits of a SHA-256 of its configuration, tokenizer and weights (reads them
    all, about a second per GB); of a repository of the Hub the commit that is loaded.
    """
    folder = Path(_expanded(checkpoint))
    if not folder.is_dir():
        # The Hub's cache keeps each commit in a folder of its name.
        return Path(hf_hub_download(os.fspath(checkpoint), "config.json")).parent.name
    return folder_checksum(folder)


def checkpoint_file(path: str | os.PathLike[str], name: str) -> Path | None:
    """A file of a checkpoint folder or of a Hub repository; None if it has none, or offline if it was never fetched."""
    path = _expanded(path)
    if os.path.isdir(path):
        return Path(path, name) if os.path.isfile(os.path.join(path, name)) else None
    with _clear_errors(path):
        try:
            return Path(hf_hub_download(path, name))
        except LocalEntryNotFoundError:
            if not constants.HF_HUB_OFFLINE:
                raise
        except EntryNotFoundError:
            pass
    return None


def _expanded(path: str | os.PathLike[str]) -> str:
    return shipped_checkpoint(os.path.expanduser(os.fspath(path)))


def _load_whole(model_class: Any, path: str, **options: Any) -> Any:
    """A model whose tensors are all in the file, and the file has no more of a trunk than the model."""
    with _clear_errors(path):
        model, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    # A published model may lack its vocabulary's bias, which is a bias of zero then.
    missing = set(info["missing_keys"]) - {"heads.decoder.bias"}
    names = {"missing from": missing, "too many in": filter(_TRUNK.search, info["unexpected_keys"])}
    for problem, found in names.items():
        if listed := sorted(found):
            message = f"{len(listed)} tensors are {problem} {path}, such as {listed[0]}"
            raise UserError("checkpoint.tensors", f"{message}: its configuration does not describe its weights.")
    return model


def _load_tokenizer(path: str) -> Any:
    with _clear_errors(path):
        try:
            return load_tokenizer(path)
        except OSError:
            raise
        except Exception as error:  # of a damaged file; tokenizers raises nothing narrower
            message = f"The tokenizer of {path} is missing or damaged: {_one_line(error)}"
            raise UserError("checkpoint.tokenizer", message) from error


@contextmanager
def _clear_errors(path: str) -> Iterator[None]:
    """Turn errors of transformers and the Hub into one sentence."""
    try:
        yield
    except (SafetensorError, StrictDataclassError) as error:
        raise UserError("checkpoint.damaged", f"{path} cannot be loaded: {_one_line(error)}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        message = f"{path} cannot be loaded: weights and configuration differ in shape."
        raise UserError("checkpoint.shapes", message) from error
    except OSError as error:
        if os.path.isdir(path):
            raise
        message = f"{path} is not a local folder and cannot be downloaded from the Hub: {_one_line(error)}"
        raise OSError(message) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
    """Write a copy of a checkpoint, whole or cut at `exit_layer`, with this package's model code.

    The tokenizer is that of the folder `tokenizer`, or of the checkpoint. See `slice_checkpoint`.
    """
    config, path = load_config(checkpoint), _expanded(checkpoint)
    if exit_layer is not None:
        config.check_exit(exit_layer)
    model = _load_whole(class_named(config.architectures[0], path), path, exit_layer=exit_layer)
    own_tokenizer = _load_tokenizer(_expanded(tokenizer or path))
    if only_exit and exit_layer is not None:
        keep_only_exit(model, exit_layer)
    model.save_pretrained(out)
    own_tokenizer.save_pretrained(out)
    for name in SENTENCE_TRANSFORMER_FILES:
        if (source := checkpoint_file(path, name)) is not None:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, out / name)


def class_named(name: str, checkpoint: str | os.PathLike[str]) -> type[modeling.ModularStarEncoderPreTrainedModel]:
    """Our class of this name; for a published checkpoint the base class, which reads the tensor names."""
    if name == PUBLISHED_ARCHITECTURE:
        return modeling.ModularStarEncoderPreTrainedModel
    if name not in modeling.__all__:
        message = f"{checkpoint} holds a {name}, not a class of this package: load it and save model.slice(…)."
        raise UserError("checkpoint.other_class", message)
    return getattr(modeling, name)


def keep_only_exit(model: modeling.ModularStarEncoderPreTrainedModel, exit_layer: int) -> None:
    """Drop the other exits of a model with their projection heads; the layers stay."""
    for other in set(model.config.exit_layers) - {exit_layer}:
        if hasattr(model, "projection_heads"):
            del model.projection_heads[str(other)]
    model.config.exit_layers = [exit_layer]


def save_retrieval_checkpoint(
    model: ModularStarEncoderForRetrieval, tokenizer: PreTrainedTokenizerBase, out: str | os.PathLike[str]
) -> Path:
    """Write model, code, tokenizer, and the prompts and modules of a SentenceTransformer.

    The folder `out` must not exist, or be empty. It appears whole or not at all.
    """
    with staged_folder(out) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        prompts = sentence_transformer_prompts(instructions=model.config.instruction_prompts)
        write_sentence_transformer_files(staging, model.config, prompts)
    return Path(out)


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
        prompts: name → prefix, as `SentenceTransformer.encode(prompt_name=…)` takes them.
        modules: content of `modules.json`.
        dimension: size of the embeddings; `config.projection_size` if None.
        pooling: of a model that has no embeddings of its own, `"mean"` or `"lasttoken"`; the retrieval model's if None.
    """
    if pooling is None:
        check_servable(config)
    mode = {"mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken"}[pooling or config.pooling]
    modes = {name: name == mode for name in POOLING_MODES}
    contents: tuple[Any, ...] = (
        list(modules),
        {"max_seq_length": config.max_position_embeddings, "do_lower_case": False},
        {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"},
        {"word_embedding_dimension": dimension or config.projection_size, **modes},
        {},
    )
    for name, content in zip(SENTENCE_TRANSFORMER_FILES, contents, strict=True):
        path = Path(folder, name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_servable(config: ModularStarEncoderConfig) -> bool:
    """Whether SentenceTransformers' own pooling and normalisation give the model's embedding."""
    try:
        check_servable(config)
    except UserError:
        return False
    return True


def check_servable(config: ModularStarEncoderConfig) -> None:
    """Raise UserError if SentenceTransformers' own pooling and normalisation would not give the model's embedding."""
    # A mean and a linear head commute, so the order of the two does not matter.
    commute = config.projection_head == "linear" and config.pooling == "mean"
    orders = ("project_then_pool", "pool_then_project") if commute else ("project_then_pool",)
    known = {"pooling": ("mean", "lasttoken"), "projection_order": orders, "embedding_normalization": ("l2",)}
    for name, allowed in known.items():
        if getattr(config, name) not in allowed:
            message = f"A SentenceTransformer cannot have {name}={getattr(config, name)!r}, only"
            raise UserError("checkpoint.not_servable", f"{message} {' or '.join(map(repr, allowed))}.")
