"""An exit profile holds the cost and quality of each exit of a checkpoint; `select_exit` chooses one of the exits."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel

from modular_star_encoder.inference import PROFILE_NAME, check_checkpoint, resolve_checkpoint
from modular_star_encoder.inference.checkpoints import checkpoint_file
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import cache_folder, check_types, folder_lock, read_json, user_path, write_json
from modular_star_encoder.utils.reports import machine_kind

if TYPE_CHECKING:
    from modular_star_encoder.modeling import ModularStarEncoderForRetrieval

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The time and memory to embed a batch at one exit, for one batch shape (batch_size, length).

    Peak memory is measured in a process that loads the layers up to the exit and embeds the batch. On a CPU, it is the
    largest resident memory, with Python and its libraries; on a GPU, the largest memory that torch allocated.
    """

    batch_size: int  # number of texts in a batch
    length: int  # number of tokens of each text
    flops_per_token: float  # number of floating-point operations per token
    latency_ms_p50: float  # median time of a batch
    latency_ms_p95: float  # 95th percentile of the time of a batch
    texts_per_second: float  # at the median latency
    tokens_per_second: float
    peak_memory_mb: float | None  # None if the operating system does not report it
    runs: int  # number of timings


@dataclass(frozen=True, slots=True)
class ProfiledExit:
    """The size, cost and quality of one exit."""

    parameters: int  # number of parameters of the checkpoint cut at this exit, with the heads of shallower exits
    weights_mb: float  # size of the parameters in the profile's dtype
    measurements: tuple[Measurement, ...]  # one per batch shape
    quality: Mapping[str, float] = field(default_factory=dict)  # {name of a benchmark: score}, higher is better

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Return the batch shape (batch_size, length) of each measurement."""
        return tuple((one.batch_size, one.length) for one in self.measurements)


@dataclass(frozen=True, slots=True)
class ExitProfile:
    """The cost and quality of each exit of a checkpoint, the shallowest first, and the machine that measured them.

    `mose profile` measures a profile and writes it to a file.

    Example:
        >>> profile = ExitProfile.load("exit_profile.json")  # doctest: +SKIP
        >>> profile.measurement(2, profile.shapes[0]).latency_ms_p50  # doctest: +SKIP
        4.1
    """

    exits: Mapping[int, ProfiledExit]  # {exit_layer: its cost and quality}
    device: str  # "cpu" or "cuda"
    dtype: str  # "float32", "bfloat16" or "float16", of weights and computation
    attn_implementation: str
    checkpoint: str  # checksum of the weights (see `checkpoint_checksum`)
    base_memory_mb: float | None  # memory of Python and its libraries, part of each peak on a CPU; None if not measured
    machine: Mapping[str, Any]  # processor, cores, threads in use, memory; the GPU, if one was used
    versions: Mapping[str, str | None]  # versions of Python and of the libraries
    date: str  # date of the measurement, ISO 8601, UTC

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Return the measured batch shapes (batch_size, length), which are the same for all exits."""
        return next(iter(self.exits.values())).shapes

    def measurement(self, exit_layer: int, shape: tuple[int, int]) -> Measurement:
        """Return the measurement of one exit at one batch shape; the profile must contain both."""
        measured = self.exits[exit_layer]
        return measured.measurements[measured.shapes.index(shape)]

    def with_quality(self, benchmark: str, values: Mapping[int, float]) -> ExitProfile:
        """Return a copy of the profile with added scores on `benchmark`; `values` is {exit_layer: score}.

        Scores of exits that the profile lacks are left out. Raises UserError if all scores are left out.
        """
        exits, known = dict(self.exits), values.keys() & self.exits.keys()
        if not known:
            message = f"{benchmark} has scores for exits {_listed(values)}, but the profile has exits {_listed(exits)}."
            raise UserError("profile.quality.other_exits", message)
        for k in known:
            exits[k] = dataclasses.replace(exits[k], quality={**exits[k].quality, benchmark: values[k]})
        return dataclasses.replace(self, exits=exits)

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Return the sorted names of the benchmarks on which at least one exit has a score."""
        return tuple(sorted({name for profiled in self.exits.values() for name in profiled.quality}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a JSON file, atomically."""
        write_json(path, {"format": 1, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExitProfile:
        """Return a profile that `save` wrote; FileNotFoundError if the file is missing, UserError if it is damaged."""
        path = Path(path)
        if not path.is_file():
            how = "Measure one with `mose profile`, or give the profile in another file as `profile`."
            raise FileNotFoundError(f"There is no exit profile {path}. {how}")
        try:
            content = read_json(path, most_bytes=2**22)
            version, exits = content.pop("format"), {}
            for exit_layer, values in sorted(content.pop("exits").items(), key=lambda item: int(item[0])):
                measurements = tuple(Measurement(**measured) for measured in values.pop("measurements"))
                exits[int(exit_layer)] = ProfiledExit(measurements=measurements, **values)
            shapes = {one.shapes for one in exits.values()}
            if version == 1 and len(shapes) == 1 and shapes != {()}:
                profile = cls(exits=exits, **content)
                check_types(profile)
                return profile
            fault = "it needs `format` 1, at least one exit, and the same batch shapes for all exits"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fault = str(error)
        raise UserError("profile.file.unreadable", f"{path} is not a valid exit profile: {fault}.")


def profile_lock() -> AbstractContextManager[None]:
    """Context manager that keeps other processes of the user from changing a profile while its file is read or written.

    The lock file is in the user's cache, because a lock file next to the profile would stay there. Without a cache,
    nothing is locked.
    """
    cache = cache_folder("profiles", create=True)
    return folder_lock(cache) if cache else nullcontext()


def select_exit(
    profile: ExitProfile,
    *,
    latency_ms: float | None = None,
    memory_mb: float | None = None,
    min_quality: float | None = None,
    benchmark: str | None = None,
    batch_size: int | None = None,
    length: int | None = None,
) -> int:
    """Return the exit with the highest score on `benchmark` among the exits that stay within all given limits.

    If several exits have this score, return the shallowest of them. If an exit within the limits has no score, return
    the deepest exit within the limits. The logger of this module reports the exit and the reason at level INFO.

    Args:
        profile: cost and quality of each exit of a checkpoint.
        latency_ms: limit on the time to embed a batch (95th percentile), in milliseconds.
        memory_mb: limit on the peak memory, in MB (10^6 bytes).
        min_quality: the lowest acceptable score on `benchmark`.
        benchmark: name of the benchmark whose scores are compared; optional if the profile has only one.
        batch_size, length: number of texts in a batch and of tokens in a text. Time and memory are those measured with
            this batch shape; by default, with the first batch shape in the profile.

    Raises:
        UserError: no limit is given, the profile lacks the batch shape or the benchmark, or no exit stays within all
            limits (the message lists the values of the exits).

    Example:
        >>> profile = ExitProfile.load("runs/model/exit_profile.json")  # doctest: +SKIP
        >>> select_exit(profile, latency_ms=20, batch_size=1)  # doctest: +SKIP
        9
    """
    given = {"latency_ms": latency_ms, "memory_mb": memory_mb, "min_quality": min_quality}
    limits = {name: limit for name, limit in given.items() if limit is not None}
    if not limits:
        raise UserError("budget.missing", "Give at least one of `latency_ms`, `memory_mb` and `min_quality`.")
    shape = _shape(profile, batch_size, length)
    quality = _quality(profile, benchmark, needed=min_quality is not None)
    values: dict[int, dict[str, float | None]] = {}
    for k in profile.exits:
        cost = profile.measurement(k, shape)
        of_exit = {"latency_ms": cost.latency_ms_p95, "memory_mb": cost.peak_memory_mb, "min_quality": quality.get(k)}
        values[k] = {name: of_exit[name] for name in limits}
    exits = [k for k, of_exit in values.items() if all(_keeps(name, of_exit[name], limits[name]) for name in limits)]
    wanted = " and ".join(f"{name}={limit:g}" for name, limit in limits.items())
    if not exits:
        message = f"No exit meets {wanted} for batches of {shape[0]} × {shape[1]} (texts × tokens)"
        raise UserError("budget.too_small", f"{message}. Give a limit that an exit meets: {_listed_values(values)}.")
    is_known = set(exits) <= set(quality)
    exit_layer = max(exits, key=lambda k: (quality[k], -k)) if is_known else max(exits)
    why = f"has the highest quality ({quality[exit_layer]:.3f})" if is_known else "is the deepest"
    found = f"{why} of exits {_listed(exits)} within {wanted}: {_listed_values({exit_layer: values[exit_layer]})}"
    _logger.info("exit %s %s; batches of %s × %s (texts × tokens)", exit_layer, found, *shape)
    return exit_layer


def _keeps(name: str, value: float | None, limit: float) -> bool:
    return value is not None and (value >= limit if name == "min_quality" else value <= limit)


def _listed_values(values: Mapping[int, Mapping[str, float | None]]) -> str:
    """Return measured values of exits as text, with ten significant digits, so that users can copy a limit from it."""
    exits = []
    for k, of_exit in values.items():
        known = ("unknown" if value is None else f"{name} {value:.10g}" for name, value in of_exit.items())
        exits.append(f"exit {k}: {_listed(known)}")
    return "; ".join(exits)


def _shape(profile: ExitProfile, batch_size: int | None, length: int | None) -> tuple[int, int]:
    for shape in profile.shapes:
        if batch_size in (None, shape[0]) and length in (None, shape[1]):
            return shape
    measured = ", ".join(f"{size} × {tokens}" for size, tokens in profile.shapes)
    wanted = f"{batch_size or 'any number of'} texts of {length or 'any number of'} tokens"
    raise UserError("budget.shape", f"No batch of {wanted} was measured. Measured: {measured} (texts × tokens).")


def _quality(profile: ExitProfile, benchmark: str | None, needed: bool) -> dict[int, float]:
    known = profile.benchmarks
    if benchmark is None and len(known) == 1:
        benchmark = known[0]
    if benchmark is None and needed:
        how = f"one of {_listed(known)}" if known else "whose scores `mose profile --quality` adds to the profile"
        raise UserError("budget.benchmark.missing", f"`min_quality` needs a `benchmark`, {how}.")
    if benchmark not in (None, *known):
        message = f"The profile lacks the benchmark {benchmark}. It has: {_listed(known) or 'none'}."
        raise UserError("budget.benchmark.unknown", message)
    return {k: one.quality[benchmark] for k, one in profile.exits.items() if benchmark and benchmark in one.quality}


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def load_at_budget(
    checkpoint: str | os.PathLike[str],
    *,
    profile: ExitProfile | str | os.PathLike[str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **budget: Any,
) -> ModularStarEncoderForRetrieval:
    """Load a retrieval model in evaluation mode, up to the exit that `select_exit` chooses within the given limits.

    The chosen exit is `model.config.num_hidden_layers`. The weights are loaded in the profile's dtype on the CPU, or on
    the `device_map` in `model_kwargs`.

    Args:
        checkpoint: a folder, a Hub repository, or a model of this package.
        profile: an `ExitProfile`, or the path of its file; by default the checkpoint's `exit_profile.json`. If the
            profile in a file was measured on another kind of machine, there is a warning.
        model_kwargs: passed to `AutoModel.from_pretrained`.
        budget: limits and other arguments of `select_exit`: `latency_ms`, `memory_mb`, `min_quality`, …

    Raises:
        FileNotFoundError: the checkpoint has no profile.
        UserError: no exit stays within all limits; the message lists the values of the exits.

    Example:
        >>> model = load_at_budget("runs/model", latency_ms=20)  # doctest: +SKIP
        >>> model.config.num_hidden_layers  # doctest: +SKIP
        9
    """
    profile = profile if isinstance(profile, ExitProfile) else checkpoint_profile(checkpoint, profile)
    options = {"dtype": profile.dtype, "trust_remote_code": False, **(model_kwargs or {})}
    path = resolve_checkpoint(checkpoint)
    return AutoModel.from_pretrained(path, exit_layer=select_exit(profile, **budget), **options).eval()


def checkpoint_profile(checkpoint: str | os.PathLike[str], file: str | os.PathLike[str] | None = None) -> ExitProfile:
    """Load a profile from `file`, by default the checkpoint's exit_profile.json; warn if it is from another machine."""
    check_checkpoint(checkpoint)
    if file is None:
        file = checkpoint_file(checkpoint, PROFILE_NAME) or Path(checkpoint, PROFILE_NAME)
    file = user_path(file)
    profile = ExitProfile.load(file)
    here, decisive = machine_kind(), ["processor", "threads"]
    if profile.device == "cuda":
        here, decisive = machine_kind("cuda") if torch.cuda.is_available() else {}, ["gpu"]
    kinds = [(name, profile.machine.get(name), here.get(name)) for name in decisive]
    if other := [f"{name} {then!r}, but here {now!r}" for name, then, now in kinds if then != now]:
        message = f"{file} was measured on another machine ({'; '.join(other)}). Times may differ on this one."
        warnings.warn(message, stacklevel=3)
    return profile
