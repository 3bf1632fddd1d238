"""Load a retrieval checkpoint, and say in one sentence what is wrong with one that can't be loaded."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel

from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderPreTrainedModel,
)

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILE = "tokenizer.json"

_TRUNK = re.compile(r"(^|\.)(embed_tokens|layers|norm)\.")


def load_checkpoint(
    path: str | Path,
    exit_layer: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[ModularStarEncoderForRetrieval, Any]:
    """The model, ready for inference, and the tokenizer of a local folder or of a Hub repository.

    Args:
        path: a checkpoint folder, or a repository of the Hub ("owner/name"), of which no code is run.
        exit_layer: read only the layers up to this exit.
        device: where the model goes; a GPU if there is one and None is given.
        dtype: of the weights; the checkpoint's own if None.

    Raises:
        FileNotFoundError: no such folder, or one without config.json, weights or tokenizer.json.
        NotADirectoryError: `path` is a file.
        ValueError: not a retrieval checkpoint of ours, a damaged file, weights that aren't those of its configuration
            (a head that is missing would be drawn at random), or an exit that it doesn't have.
        OSError: the Hub has no such repository, or can't be reached.
    """
    config = load_config(path)
    path = os.path.expanduser(path)
    arguments = {} if exit_layer is None else {"exit_layer": config.check_exit(exit_layer)}
    if dtype is not None:
        arguments["dtype"] = dtype
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, TOKENIZER_FILE)):
        raise FileNotFoundError(f"{path} has no tokenizer: {TOKENIZER_FILE} is not there.")
    with _clear_errors(path):
        model, info = AutoModel.from_pretrained(path, trust_remote_code=False, output_loading_info=True, **arguments)
    if not isinstance(model, ModularStarEncoderForRetrieval):
        raise ValueError(f"{path} is a pre-trained model without projection heads: fine-tune it for retrieval first.")
    _check_names(path, info)
    tokenizer = load_own_tokenizer(path)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def load_config(path: str | Path) -> ModularStarEncoderConfig:
    """The configuration alone: which exits there are, and how texts are prompted.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError, OSError: as `load_checkpoint`.
    """
    check_checkpoint(path)
    path = os.path.expanduser(path)
    with _clear_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not isinstance(config, ModularStarEncoderConfig):
        raise ValueError(f"{path} holds a model of type {config.model_type!r}, not a ModularStarEncoder.")
    return config


def load_own_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint folder or of a Hub repository.

    Raises:
        ValueError: it is damaged or missing.
        OSError: a file can't be read, or had from the Hub.
    """
    with _clear_errors(path):
        try:
            return load_tokenizer(path)
        except OSError:
            raise
        except Exception as error:  # of a damaged file; tokenizers raises nothing narrower
            raise ValueError(f"The tokenizer of {path} is missing or damaged: {_one_line(error)}") from error


def _check_names(path: str, info: dict[str, Any]) -> None:
    """Refuse a model some of whose tensors were not in the file, or in whose file there is more of a trunk."""
    # A published model may lack its vocabulary's bias, which is a bias of zero then.
    missing = set(info["missing_keys"]) - {"heads.decoder.bias"}
    names = {"missing from": missing, "too many in": filter(_TRUNK.search, info["unexpected_keys"])}
    for problem, found in names.items():
        if listed := sorted(found):
            raise ValueError(
                f"{len(listed)} tensors are {problem} {path}, such as {listed[0]}: its configuration doesn't describe "
                "its weights."
            )


@contextmanager
def _clear_errors(path: str | Path) -> Iterator[None]:
    """Say in one sentence what is wrong with a checkpoint."""
    try:
        yield
    except (SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{path} can't be loaded: {_one_line(error)}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(f"{path} can't be loaded: its weights haven't the shapes of its configuration.") from error
    except OSError as error:
        if os.path.isdir(path):
            raise
        raise OSError(f"{path} is no folder here and can't be had from the Hub: {_one_line(error)}") from error


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Refuse a local path that is no checkpoint folder, before anything is loaded; names of the Hub pass.

    Raises:
        FileNotFoundError: no such folder, or one without config.json or weights.
        NotADirectoryError: `path` is a file.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if not isinstance(path, str) or not _could_be_on_the_hub(path):
            raise FileNotFoundError(f"There is no checkpoint folder {path}.")
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} is a file; a checkpoint is a folder.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no config.json.")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise FileNotFoundError(f"{path} has no weights: neither {' nor '.join(WEIGHT_FILES)} is there.")


def _could_be_on_the_hub(path: str) -> bool:
    owner, slash, name = path.partition("/")
    return bool(owner.strip(".~") and slash and name and "/" not in name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def load_whole(
    model_class: type[ModularStarEncoderPreTrainedModel], path: str | os.PathLike[str], exit_layer: int | None = None
) -> ModularStarEncoderPreTrainedModel:
    """A model of any of our classes, in the checkpoint's dtype, none of whose tensors is drawn at random.

    Raises:
        ValueError: damaged weights, or others than the configuration describes.
        OSError: a file can't be read, or had from the Hub.
    """
    path = os.path.expanduser(os.fspath(path))
    with _clear_errors(path):
        model, info = model_class.from_pretrained(path, exit_layer=exit_layer, output_loading_info=True)
    _check_names(path, info)
    return model


def checkpoint_file(path: str | os.PathLike[str], name: str) -> Path | None:
    """A file of a checkpoint folder or of a Hub repository; None if it has none, or offline if it was never fetched.

    Raises:
        OSError: the Hub has no such repository, or can't be reached.
    """
    path = os.path.expanduser(os.fspath(path))
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


TOKENS_PER_CHUNK = 1024


def compile_for_inference(
    model: ModularStarEncoderForRetrieval, *, tokens_per_chunk: int = TOKENS_PER_CHUNK, progress: bool = True
) -> ModularStarEncoderForRetrieval:
    """The same model with compiled MLPs, which shares its parameters; `model` itself stays as it is.

    Compiled code runs under `torch.inference_mode()` and without autocast, as `encode_exits` and
    `SentenceTransformer.encode` call a model; in any other mode the plain layers run. Weights are packed when this is
    called, and packed copies of the MLPs' are kept: later changes of the parameters have no effect, and memory for
    weights about doubles. Compiling takes a second or more per layer, and may need a C++ compiler.

    Args:
        model: on a CPU. Worth it in bfloat16, on processors with AVX512-BF16 or AMX.
        tokens_per_chunk: tokens that go through an MLP at once.
        progress: show a bar while compiling.

    Raises:
        ValueError: a model on another device, a chunk of fewer than two tokens, or torch.compile failed.
    """
    if model.device.type != "cpu":
        raise ValueError(f"compile_for_inference is for CPUs; the model is on {model.device}.")
    if tokens_per_chunk < 2:
        raise ValueError(f"tokens_per_chunk {tokens_per_chunk} must be at least 2.")
    compiled = model.slice(model.config.num_hidden_layers).eval()
    for layer in tqdm(compiled.model.layers, desc="compiling", unit="layer", disable=not progress, leave=False):
        # An attribute of the instance: names of parameters, and so saving, stay as they are.
        layer.mlp.forward = _in_chunks(layer.mlp.forward, _compile(layer.mlp, model), tokens_per_chunk)
    return compiled


def _compile(mlp: nn.Module, model: ModularStarEncoderForRetrieval) -> Callable[[torch.Tensor], torch.Tensor]:
    """One MLP with its weights frozen, for any number of tokens from two on."""
    import torch._dynamo.config
    import torch._inductor.config
    from torch._dynamo.exc import BackendCompilerFailed

    # All layers share one code object, and so count as recompilations of one function.
    limits = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
    compiled = torch.compile(mlp.forward, dynamic=True, fullgraph=True)
    # Several lengths, for what torch takes for constant at the first is compiled anew at the second.
    with limits, torch._inductor.config.patch(freezing=True), torch.inference_mode():
        try:
            for tokens in (64, 96):
                compiled(torch.zeros(tokens, model.config.hidden_size, dtype=model.dtype))
        except BackendCompilerFailed as error:
            reason = str(error.inner_exception).partition("\n")[0]
            raise ValueError(f"torch.compile failed; is there a C++ compiler? {reason}") from error
    return compiled


def _in_chunks(
    plain: Callable[[torch.Tensor], torch.Tensor], compiled: Callable[[torch.Tensor], torch.Tensor], chunk: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """An MLP's forward: compiled where it may be."""

    def forward(states: torch.Tensor) -> torch.Tensor:
        flat = states.flatten(0, -2)
        if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or len(flat) < 2:
            return plain(states)
        # Parts of equal length in place of a short last one.
        parts = flat.tensor_split(-(-len(flat) // chunk))
        outputs = [compiled(part) for part in parts]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view_as(states)

    return forward


DECISIVE_FILES = ("config.json", "tokenizer.json", "model*.safetensors")


def checkpoint_checksum(checkpoint: str | os.PathLike) -> str:
    """What tells these weights from others.

    Returns:
        Of a folder the first 16 hexadecimal digits of a SHA-256 of its configuration, tokenizer and weights (reads them
        all, about a second per GB); of a repository of the Hub the commit that is loaded.

    Raises:
        OSError: the Hub has no such repository, or can't be reached.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        # The Hub's cache keeps each commit in a folder of its name.
        return Path(hf_hub_download(os.fspath(checkpoint), "config.json")).parent.name
    digest = hashlib.sha256()
    for path in sorted({path for pattern in DECISIVE_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
