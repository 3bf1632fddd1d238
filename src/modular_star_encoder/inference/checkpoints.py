"""Load a checkpoint or only its configuration, cut a checkpoint at an exit, and compute its checksum.

A checkpoint is a local folder, a repository on the Hub, or a model of this package. Error messages have one sentence.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedTokenizerBase

import modular_star_encoder.modeling as modeling
from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.inference import ADAPTER, check_checkpoint, is_repository, local_folder, resolve_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
from modular_star_encoder.modeling.published_checkpoints import PUBLISHED_ARCHITECTURE
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import folder_checksum, read_json, staged_folder, user_path, write_json

SENTENCE_TRANSFORMER_FILES = (
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "2_Normalize/config.json"),
)
# Content of modules.json, with class names from before sentence-transformers 6. Version 6 also reads these names; older
# versions and text-embeddings-inference read no others.
MODULES = (
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer", "kwargs": ["exit_layer"]},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
)

# Errors that transformers raises for damaged files, and for values of a wrong type or size in them.
_OF_VALUES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError)
_DAMAGED = (SafetensorError, StrictDataclassError, RecursionError, *_OF_VALUES)
_TRUNK = re.compile(r"(^|\.)(embed_tokens|layers|norm)\.")


def load_checkpoint(
    path: str | os.PathLike[str],
    exit_layer: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[ModularStarEncoderForRetrieval, Any]:
    """Return (model, tokenizer) of the retrieval checkpoint `path`, in evaluation mode. No code in `path` is run.

    By default, all layers are loaded, on a GPU if there is one, in the dtype of the checkpoint. ValueError if the
    checkpoint is damaged, is not a retrieval model, or has no exit `exit_layer`; OSError if `path` does not exist.
    """
    config, path = load_config(path), resolve_checkpoint(path)
    if exit_layer is not None:
        config.check_exit(exit_layer)
    tokenizer = load_tokenizer(path)
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= config.vocab_size:
        message = f"The tokenizer of {path} has the token id {last}, but the model's ids are below {config.vocab_size}."
        raise UserError("checkpoint.tokenizer", message)
    options = {name: value for name, value in (("exit_layer", exit_layer), ("dtype", dtype)) if value is not None}
    model = _load_whole(AutoModel, config, path, trust_remote_code=False, **options)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def load_config(path: str | os.PathLike[str]) -> ModularStarEncoderConfig:
    """Load the configuration of a checkpoint without its weights; raises the errors of `load_checkpoint`."""
    check_checkpoint(path)
    path = resolve_checkpoint(path)
    refuse_adapter(path)
    with clear_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not isinstance(config, ModularStarEncoderConfig):
        raise UserError("checkpoint.other_model", f"{path} is a {config.model_type!r} model, not a ModularStarEncoder.")
    return config


def checkpoint_checksum(checkpoint: str | os.PathLike[str]) -> str:
    """Return the checksum of the files of a local checkpoint, or the commit hash of a repository on the Hub."""
    folder = Path(resolve_checkpoint(checkpoint))
    if not folder.is_dir():
        # The Hub's cache has one folder per commit, whose name is the hash of the commit.
        return Path(hf_hub_download(os.fspath(checkpoint), "config.json")).parent.name
    return folder_checksum(folder)


def checkpoint_file(path: str | os.PathLike[str], name: str) -> Path | None:
    """Return the path of the file `name` in a checkpoint; None if it is missing, or is not cached while offline."""
    path = resolve_checkpoint(path)
    if os.path.isdir(path):
        return Path(path, name) if os.path.isfile(os.path.join(path, name)) else None
    missing = LocalEntryNotFoundError if constants.HF_HUB_OFFLINE else RemoteEntryNotFoundError
    with clear_errors(path), suppress(missing):
        return Path(hf_hub_download(path, name))
    return None


def refuse_adapter(path: str | os.PathLike[str]) -> None:
    """Raise UserError if a Hub repository has an adapter; folders with an adapter fail in `check_checkpoint`."""
    if is_repository(path) and checkpoint_file(path, "adapter_config.json"):
        raise UserError("checkpoint.adapter", f"{path} is not a checkpoint: {ADAPTER}.")


def _load_whole(model_class: Any, config: ModularStarEncoderConfig, path: str, **options: Any) -> Any:
    """Load a model. Raise UserError if its weight files lack tensors, or have layers that its configuration lacks."""
    with clear_errors(path):
        with torch.device("meta"):
            parameters = modeling.ModularStarEncoderModel(config).num_parameters()
        check_size(parameters, Path(path))
        model, info = model_class.from_pretrained(path, output_loading_info=True, **options)
        # A published model may lack the bias of the head that predicts tokens; this bias is then zero.
        missing = sorted(set(info["missing_keys"]) - {"heads.decoder.bias"})
        if wrong := missing or sorted(filter(_TRUNK.search, info["unexpected_keys"])):
            tensors = f"{len(wrong)} tensors are {'missing' if missing else 'left over'}, such as {wrong[0]}."
            raise UserError("checkpoint.tensors", f"The weights of {path} do not fit its configuration: {tensors}")
        if model_class is AutoModel and not isinstance(model, ModularStarEncoderForRetrieval):
            raise UserError("checkpoint.not_retrieval", f"{path} lacks projection heads to embed texts: fine-tune it.")
    return model


def check_size(parameters: int, folder: Path) -> None:
    """Raise RuntimeError if the weight files in `folder` have fewer bytes than the model has `parameters`."""
    # transformers would fill gigabytes with random numbers before it reports this.
    files = list(folder.glob("*.safetensors"))
    if files and parameters > sum(file.stat().st_size for file in files):
        for file in files:  # SafetensorError if it is cut
            safe_open(file, framework="pt")
        raise RuntimeError(f"size mismatch: the weights have fewer bytes than the model has parameters ({parameters})")


@contextmanager
def clear_errors(path: str) -> Iterator[list[logging.LogRecord]]:
    """Context manager: replace errors of transformers and the Hub about files by errors of one sentence.

    Yields the list of messages that transformers logs, from which the caller may remove messages. If there is no error,
    the remaining messages are shown at the end.
    """
    log, records = logging.getLogger("transformers.modeling_utils"), list[logging.LogRecord]()

    def keep(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    log.addFilter(keep)
    try:
        yield records
        for record in records:
            log.callHandlers(record)
    except (*_DAMAGED, RuntimeError, OSError) as error:
        if (clear := _clear_error(error, path)) is None:
            raise
        raise clear from error
    finally:
        log.removeFilter(keep)


def _clear_error(error: Exception, path: str) -> Exception | None:
    """Return an error with a message of one sentence, to raise in place of `error`; None to raise `error` itself."""
    reason = " ".join(str(error).split())
    if isinstance(error, OSError):
        message = f"{path} is not a local folder and cannot be downloaded from the Hub: {reason}"
        return None if os.path.isdir(path) else OSError(message)
    if isinstance(error, _DAMAGED):
        message = f"{path} cannot be loaded: {reason}"
        return None if isinstance(error, UserError) else UserError("checkpoint.damaged", message)
    message = f"{path} cannot be loaded: its weights do not fit its configuration."
    return UserError("checkpoint.shapes", message) if "mismatch" in str(error) else None


def slice_checkpoint(
    checkpoint: str | os.PathLike[str], exit_layer: int, out: str | os.PathLike[str], *, only_exit: bool = False
) -> Path:
    """Write the first `exit_layer` layers of a checkpoint as a new checkpoint to the folder `out`, and return `out`.

    At its exits, the new checkpoint has the same outputs as the full model, bit for bit. Its configuration also has the
    full model's name (`parent_model`), number of layers (`parent_num_hidden_layers`) and exits (`parent_exit_layers`).

    Args:
        checkpoint: a folder, a Hub repository, or a model of this package.
        exit_layer: an exit of the checkpoint, which is the number of layers to keep.
        out: folder to write; it must be empty or not exist. The folder is written atomically.
        only_exit: leave out the projection heads of the shallower exits, as in the published slices.

    Raises:
        ValueError: the checkpoint lacks the exit; the message lists its exits.
        UserError: the checkpoint is damaged or not a ModularStarEncoder, or `out` is not empty.
        OSError: the folder lacks configuration or weights, or the Hub repository does not exist.

    Example:
        >>> slice_checkpoint("runs/model", 4, "runs/model-exit-4")  # doctest: +SKIP
        >>> AutoModel.from_pretrained("runs/model-exit-4").config.num_hidden_layers  # doctest: +SKIP
        4
    """
    out = user_path(out)
    with staged_folder(out) as staging:
        write_checkpoint(checkpoint, staging, exit_layer, only_exit=only_exit)
        config = ModularStarEncoderConfig.from_pretrained(staging)
        note_parent(config, checkpoint)
        if config.num_hidden_layers < config.parent_num_hidden_layers and not hasattr(config, "parent_model"):
            folder = local_folder(checkpoint)  # a slice of a slice keeps the name of the full model
            if folder and (folder / "training_log.json").is_file():  # the folder model/ of a run
                folder = folder.resolve().parent
            config.parent_model = folder.resolve().name if folder else os.fspath(checkpoint)
        config.save_pretrained(staging)
    return out


def note_parent(config: ModularStarEncoderConfig, parent: str | os.PathLike[str]) -> None:
    """Set `config.parent_license` (see `stored_license`) and, if `parent` is on the Hub, `config.parent_repository`."""
    if (name := stored_license(parent)) != getattr(config, "parent_license", None):
        config.parent_license = name
    if is_repository(parent):
        config.parent_repository = parent


def stored_license(checkpoint: str | os.PathLike[str]) -> str | None:
    """Return the licence that a checkpoint's card names, else `parent_license` in its config.json; None for "other"."""
    found: Any = None
    with suppress(OSError, ValueError, AttributeError):
        found = read_json(checkpoint_file(checkpoint, "config.json") or "").get("parent_license")
    with suppress(OSError, ValueError, yaml.YAMLError):
        if file := checkpoint_file(checkpoint, "README.md"):
            with file.open(encoding="utf-8-sig", errors="replace") as card:
                metadata = re.match(r"---\n.*?\n---$", card.read(2**18), re.DOTALL | re.MULTILINE)
            if named := re.search(r"^license:(.*)$", metadata[0], re.MULTILINE) if metadata else None:
                found = None
                found = yaml.safe_load(named[1])  # several licences count as None
    return found if isinstance(found, str) and found != "other" else None


def stored_prompts(checkpoint: str | os.PathLike[str]) -> dict[str, str]:
    """Return {name: prompt} from a checkpoint's config_sentence_transformers.json; {} if it has no prompts."""
    if (file := checkpoint_file(checkpoint, "config_sentence_transformers.json")) is None:
        return {}
    with suppress(ValueError, TypeError, AttributeError):
        prompts = dict(read_json(file).get("prompts") or {})
        if all(isinstance(text, str) for text in prompts.values()):
            return prompts
    raise UserError("checkpoint.prompts", f'{file} must be JSON with prompts like {{"prompts": {{"NAME": "TEXT"}}}}.')


def write_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: Path,
    exit_layer: int | None = None,
    *,
    only_exit: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Copy a checkpoint, or only its first `exit_layer` layers, to the folder `out`, with this package's model code.

    `only_exit` leaves out the projection heads of shallower exits; `tokenizer` is a folder with another tokenizer.
    Weights keep their stored dtype, if all have the same dtype. Raises the errors of `slice_checkpoint`.
    """
    config, path = load_config(checkpoint), resolve_checkpoint(checkpoint)
    if exit_layer is not None:
        config.check_exit(exit_layer)
    with clear_errors(path):
        stored = _stored_dtype(path)
    options = {"exit_layer": exit_layer} | ({"dtype": stored} if stored else {})
    model = _load_whole(class_named(config.architectures[0], path), config, path, **options)
    own_tokenizer = load_tokenizer(resolve_checkpoint(tokenizer or path))
    if only_exit and exit_layer is not None:
        keep_only_exit(model, exit_layer)
    model.save_pretrained(out)
    model.config.dtype = config.dtype  # the dtype in which users load the weights
    model.config.save_pretrained(out)
    save_tokenizer(own_tokenizer, model.config, out)
    _copy_sentence_transformer_files(path, out)


def _copy_sentence_transformer_files(checkpoint: str | os.PathLike[str], out: Path) -> None:
    for name in SENTENCE_TRANSFORMER_FILES:
        if source := checkpoint_file(checkpoint, name):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, out / name)


def _stored_dtype(path: str) -> torch.dtype | None:
    """Return the floating-point dtype of all tensors in a checkpoint's weight files; None if dtypes differ."""
    config, names = checkpoint_file(path, "config.json"), set()
    for file in config.parent.glob("model*.safetensors") if config else ():
        with safe_open(file, framework="pt") as tensors:
            names |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    known = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    return known.get(names.pop()) if len(names) == 1 else None


def class_named(name: str, checkpoint: str | os.PathLike[str]) -> type[modeling.ModularStarEncoderPreTrainedModel]:
    """Return this package's model class `name`, which `checkpoint` needs; UserError if the package lacks the class."""
    if name == PUBLISHED_ARCHITECTURE:  # the `from_pretrained` of the base class finds the right class
        return modeling.ModularStarEncoderPreTrainedModel
    if name not in modeling.__all__:
        message = f"The class {name} of {checkpoint} is unknown. Load the model in Python, and save `model.slice(k)`."
        raise UserError("checkpoint.other_class", message)
    return getattr(modeling, name)


def keep_only_exit(model: modeling.ModularStarEncoderPreTrainedModel, exit_layer: int) -> None:
    """Remove all exits except `exit_layer` from a model, with their projection heads, in place. Keep all layers."""
    heads = getattr(model, "projection_heads", {})
    for other in set(heads) - {str(exit_layer)}:
        del heads[other]
    model.config.exit_layers = [exit_layer]


def save_retrieval_checkpoint(
    model: ModularStarEncoderForRetrieval,
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike[str],
    *,
    parent: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a model, its code and a tokenizer to the folder `out`, which SentenceTransformer can load; return `out`.

    `parent` is the checkpoint that the model was made from: its prompts and licence are written too.
    """
    config = model.config
    with staged_folder(out) as staging:
        if parent is not None:
            note_parent(config, parent)
        model.save_pretrained(staging)
        save_tokenizer(tokenizer, config, staging)
        prompts = sentence_transformer_prompts(instructions=config.instruction_prompts)
        write_sentence_transformer_files(staging, config, prompts)
        if parent is not None:
            _copy_sentence_transformer_files(parent, staging)
    return Path(out)


def save_tokenizer(tokenizer: Any, config: PreTrainedConfig, folder: Path) -> None:
    """Save a tokenizer to a folder, with its maximum length limited to the model's `max_position_embeddings`."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    tokenizer.save_pretrained(folder)


def write_sentence_transformer_files(
    folder: str | os.PathLike[str],
    config: ModularStarEncoderConfig,
    prompts: Mapping[str, str],
    modules: Sequence[Mapping[str, Any]] = MODULES,
    *,
    dimension: int | None = None,
    pooling: str | None = None,
) -> None:
    """Write the files that SentenceTransformer reads to a checkpoint's folder: `modules.json`, prompts and settings.

    The modules pool and normalise the `last_hidden_state`. `dimension` is the size of the embeddings, by default
    `config.projection_size`. `pooling` is "mean" or "lasttoken", by default `config.pooling`; then the errors of
    `check_servable` may be raised.
    """
    if pooling is None:
        check_servable(config)
    mode = {"mean": "mean_tokens", "lasttoken": "lasttoken"}[pooling or config.pooling]
    # All three modes are written, because text-embeddings-inference requires the first two (router/src/lib.rs).
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "lasttoken")}
    texts: dict[str, Any] = {"max_seq_length": config.max_position_embeddings, "do_lower_case": False}
    # Padding is on the right, because `encode(output_value="token_embeddings")` removes only that.
    texts["processor_kwargs"] = {"padding_side": "right"}
    model = {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"}
    pooled = {"word_embedding_dimension": dimension or config.projection_size} | modes
    for name, content in zip(SENTENCE_TRANSFORMER_FILES, (list(modules), texts, model, pooled, {}), strict=True):
        path = Path(folder, name)
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)
    path = Path(folder, "tokenizer_config.json")
    if not config.instruction_prompts and path.is_file():
        # No prompt has a special token, so libraries can treat special tokens in texts as ordinary characters.
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "split_special_tokens": True})


def is_servable(config: ModularStarEncoderConfig) -> bool:
    """Return whether a SentenceTransformer computes the same embeddings as a retrieval model with this `config`."""
    with suppress(UserError):
        check_servable(config)
        return True
    return False


def check_servable(config: ModularStarEncoderConfig) -> None:
    """Raise UserError if a SentenceTransformer can't compute the embeddings of a retrieval model with this `config`."""
    # Mean pooling and a linear head commute, so their order does not matter.
    commute = config.projection_head == "linear" and config.pooling == "mean"
    orders = ("project_then_pool", "pool_then_project") if commute else ("project_then_pool",)
    known = {"pooling": ("mean", "lasttoken"), "projection_order": orders, "embedding_normalization": ("l2",)}
    for name, allowed in known.items():
        if (value := getattr(config, name)) not in allowed:
            message = (
                f"A SentenceTransformer does not support {name}={value!r}, only {' or '.join(map(repr, allowed))}."
            )
            raise UserError("checkpoint.not_servable", message)
