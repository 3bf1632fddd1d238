"""Load a checkpoint at the exit that keeps a budget of time, memory or quality."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModel

from modular_star_encoder.evaluation.checkpoint import check_checkpoint
from modular_star_encoder.evaluation.exit_profile import PROFILE_NAME, ExitProfile, select_exit
from modular_star_encoder.evaluation.machine import machine_kind

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from modular_star_encoder.modeling import ModularStarEncoderForRetrieval


def load_at_budget(
    checkpoint: str | os.PathLike,
    *,
    profile: ExitProfile | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **budget: Any,
) -> ModularStarEncoderForRetrieval:
    """Load the model at the exit that `select_exit` chooses: `load_at_budget(folder, latency_ms=20)`.

    Only the layers up to that exit are read, in the dtype that was profiled; `model.config.num_hidden_layers` says
    which exit it is. The device is the caller's affair, as with `AutoModel`.

    Args:
        checkpoint: folder or Hub id.
        profile: what the exits cost; by default `exit_profile.json` of the checkpoint, with a warning where that was
            measured on another kind of machine.
        model_kwargs: for `AutoModel.from_pretrained`.
        budget: `latency_ms`, `memory_mb`, `min_quality` and the other arguments of `select_exit`.

    Raises:
        FileNotFoundError: the checkpoint has no profile.
        ValueError: no exit keeps the budget; the message names what the nearest exits offer.
    """
    profile = profile or checkpoint_profile(checkpoint)
    options = {"dtype": profile.dtype, **(model_kwargs or {})}
    path = os.path.expanduser(os.fspath(checkpoint))
    return AutoModel.from_pretrained(path, exit_layer=select_exit(profile, **budget), **options).eval()


def load_sentence_transformer_at_budget(
    checkpoint: str | os.PathLike,
    *,
    profile: ExitProfile | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: str | None = None,
    **budget: Any,
) -> SentenceTransformer:
    """The same for a SentenceTransformer.

    Args:
        checkpoint, profile, budget: as for `load_at_budget`.
        model_kwargs: as SentenceTransformer's argument of this name.
        device: where it goes; if None the device that was profiled, or the CPU where there is no GPU.

    Raises:
        FileNotFoundError, ValueError: as `load_at_budget`.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    profile = profile or checkpoint_profile(checkpoint)
    if device is None:
        device = profile.device if torch.cuda.is_available() else "cpu"
    return SentenceTransformer(
        os.path.expanduser(os.fspath(checkpoint)),
        device=device,
        config_kwargs={"exit_layer": select_exit(profile, **budget)},
        model_kwargs={"dtype": profile.dtype, **(model_kwargs or {})},
    )


def checkpoint_profile(checkpoint: str | os.PathLike) -> ExitProfile:
    """The profile that lies beside a checkpoint, local or on the Hub.

    Warns where it was measured on another kind of processor or GPU, or with another number of threads.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file isn't one.
        OSError: the Hub has no such repository, or can't be reached.
    """
    file = _profile_file(os.path.expanduser(os.fspath(checkpoint)))
    profile = ExitProfile.load(file)
    here, decisive = machine_kind(), ("processor", "threads")
    if profile.device == "cuda":
        import torch

        here, decisive = machine_kind("cuda") if torch.cuda.is_available() else {"gpu": None}, ("gpu",)
    other = [
        f"{name} {profile.machine.get(name)!r}, here {here[name]!r}"
        for name in decisive
        if profile.machine.get(name) != here[name]
    ]
    if other:
        warnings.warn(
            f"{file} was measured on another machine ({'; '.join(other)}): its times may not hold.", stacklevel=3
        )
    return profile


def _profile_file(checkpoint: str) -> str:
    check_checkpoint(checkpoint)
    if os.path.isdir(checkpoint):
        return os.path.join(checkpoint, PROFILE_NAME)
    try:
        return hf_hub_download(checkpoint, PROFILE_NAME)
    except LocalEntryNotFoundError as error:
        raise OSError(f"The exit profile of {checkpoint} can't be had from the Hub: {error}") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{checkpoint} has no {PROFILE_NAME}: measure one (`mose profile --out FILE`) and give it as `profile`."
        ) from error
