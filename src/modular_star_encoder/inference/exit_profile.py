"""The exit profile: what each exit of a checkpoint costs on one machine, and the choice of an exit by a budget.

It lies beside the checkpoint as `exit_profile.json`; `profile_exits` measures it. Times are milliseconds, MB are 10^6
bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModel

from modular_star_encoder.inference.load import check_checkpoint
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_json
from modular_star_encoder.utils.machine import machine_kind

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from modular_star_encoder.modeling import ModularStarEncoderForRetrieval


PROFILE_NAME = "exit_profile.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """One exit at one shape of batch.

    Args:
        batch_size: texts embedded at once.
        length: tokens of each.
        flops_per_token: by the formula of `profile_flops`.
        latency_ms_p50, latency_ms_p95: median and 95th percentile of the time of a batch.
        texts_per_second, tokens_per_second: at the median time.
        peak_memory_mb: on a CPU the largest resident memory of a process that loads the checkpoint at this exit and
            embeds such batches, interpreter and libraries included; on a GPU the most that torch had allocated. None
            where the system doesn't tell.
        runs: how often it was timed.
    """

    batch_size: int
    length: int
    flops_per_token: float
    latency_ms_p50: float
    latency_ms_p95: float
    texts_per_second: float
    tokens_per_second: float
    peak_memory_mb: float | None
    runs: int


@dataclass(frozen=True, slots=True)
class ProfiledExit:
    """One exit.

    Args:
        parameters: of the checkpoint loaded at this exit, shallower exits' heads included.
        weights_mb: their size in the profile's dtype.
        measurements: one per shape of batch.
        quality: benchmark → figure, higher is better.
    """

    parameters: int
    weights_mb: float
    measurements: tuple[Measurement, ...]
    quality: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExitProfile:
    """All exits that were measured, ascending, and the circumstances.

    Args:
        exits: exit_layer → what was measured.
        device: `"cpu"` or `"cuda"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, of weights and computation.
        attn_implementation: attention backend.
        checkpoint: fingerprint of the weights measured (see `fingerprint`).
        base_memory_mb: of the peaks on a CPU, what the interpreter and the libraries take before anything is loaded;
            None on a GPU, or where memory was not measured.
        machine: processor model, cores, threads used, memory; the GPU, if it was used.
        versions: of Python and of the libraries.
        date: day of the measurement, ISO 8601, UTC.
    """

    exits: Mapping[int, ProfiledExit]
    device: str
    dtype: str
    attn_implementation: str
    checkpoint: str
    base_memory_mb: float | None
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes (batch_size, length) measured, in the order of the measurement."""
        return _shapes(next(iter(self.exits.values())))

    def measurement(self, exit_layer: int, shape: tuple[int, int]) -> Measurement:
        """What was measured at one exit and shape, both of this profile."""
        measurements = self.exits[exit_layer].measurements
        return next(measured for measured in measurements if (measured.batch_size, measured.length) == shape)

    def with_quality(self, benchmark: str, values: Mapping[int, float]) -> ExitProfile:
        """A profile that also holds the quality of exits on a benchmark, in place of older figures of that name.

        Args:
            benchmark: a name for the figures, such as `"codesearchnet-python-mrr"`.
            values: exit_layer → figure, higher is better.

        Raises:
            ValueError: no exit of `values` is in this profile.
        """
        if not set(values) & set(self.exits):
            raise ValueError(
                f"{benchmark} has figures of exits {_listed(values)}, and the profile of exits {_listed(self.exits)}."
            )
        exits = {
            exit_layer: dataclasses.replace(profiled, quality={**profiled.quality, benchmark: values[exit_layer]})
            if exit_layer in values
            else profiled
            for exit_layer, profiled in self.exits.items()
        }
        return dataclasses.replace(self, exits=exits)

    def with_quality_of(self, other: ExitProfile) -> ExitProfile:
        """A profile with the quality figures of another one, if that is of the same weights."""
        profile = self
        if other.checkpoint == self.checkpoint:
            for benchmark in other.benchmarks:
                values = {k: one.quality[benchmark] for k, one in other.exits.items() if benchmark in one.quality}
                if set(values) & set(self.exits):
                    profile = profile.with_quality(benchmark, values)
        return profile

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Names of the quality figures, sorted."""
        return tuple(sorted({name for profiled in self.exits.values() for name in profiled.quality}))

    def to_dict(self) -> dict[str, Any]:
        """What the file holds; exits become strings, as JSON wants."""
        exits = {str(exit_layer): dataclasses.asdict(profiled) for exit_layer, profiled in self.exits.items()}
        others = {part.name: getattr(self, part.name) for part in dataclasses.fields(self) if part.name != "exits"}
        return {"format": FORMAT, **others, "exits": exits}

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> ExitProfile:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it isn't an exit profile, or one of a later format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no exit profile {path}: `mose profile` measures one.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            exits = {int(exit_layer): _profiled_exit(values) for exit_layer, values in content.pop("exits").items()}
            profile = cls(exits=dict(sorted(exits.items())), **content)
            shapes = {_shapes(profiled) for profiled in exits.values()}
            if len(shapes) != 1 or shapes == {()}:
                raise ValueError("it has no exits, or not the same measurements of each")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an exit profile as `mose profile` writes it: {error}.") from error
        return profile


def _shapes(profiled: ProfiledExit) -> tuple[tuple[int, int], ...]:
    return tuple((measured.batch_size, measured.length) for measured in profiled.measurements)


def _profiled_exit(values: dict[str, Any]) -> ProfiledExit:
    measurements = tuple(Measurement(**measured) for measured in values.pop("measurements"))
    return ProfiledExit(measurements=measurements, **values)


def quality_from_results(
    path: str | os.PathLike, metric: str = "mrr", *, checkpoint: str | None = None
) -> dict[int, float]:
    """{exit_layer: quality} from a file that `mose evaluate` wrote, also by older versions.

    Args:
        path: report.json, or a file of `--json`. Of a report with several tables the first is used.
        metric: `mrr`, or another metric in the file.
        checkpoint: checksum of the weights that the results must be of; a file without one passes.

    Raises:
        OSError: the file cannot be read.
        UserError: it holds no such results, or results of other weights.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if "tables" in content:
            values = _quality_in_table(content["tables"][0], metric)
        else:
            values = {int(exit_layer): float(scores[metric]) for exit_layer, scores in content["exits"].items()}
        if not values or not all(map(math.isfinite, values.values())):
            raise ValueError("no value, or one that is not a number")
        measured = content.get("checkpoint_checksum", content.get("checkpoint_fingerprint"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            "profile.quality.unreadable", f"{path} has no {metric} of each exit as `mose evaluate` writes it."
        ) from error
    if None not in (checkpoint, measured) and measured != checkpoint:
        raise UserError(
            "profile.quality.other_weights",
            f"{path} holds results of the weights {measured}, and the profile is of {checkpoint}: evaluate again.",
        )
    return values


def _quality_in_table(table: Mapping[str, Any], metric: str) -> dict[int, float]:
    """Of the evaluated model, whose deepest exit is the row without a difference; of several sizes the largest."""
    name = "retriever" if "retriever" in table["rows"][0] else "system"
    own = next(row[name] for row in table["rows"] if row["difference"] is None)
    rows = [row for row in table["rows"] if row[name] == own and row["exit_layer"] is not None]
    rows.sort(key=lambda row: (row["dimensions"] is None, row["dimensions"] or 0))
    return {
        row["exit_layer"]: row["mean"]["value"] if metric == table["metric"] else row["others"][metric] for row in rows
    }


class _Budget(NamedTuple):
    """One limit: what it is called, its value, an exit's own value, whether that satisfies, and the unit."""

    name: str
    limit: float
    value: Callable[[int], float | None]
    at_most: bool
    unit: str

    def is_kept_by(self, exit_layer: int) -> bool:
        value = self.value(exit_layer)
        return value is not None and (value <= self.limit if self.at_most else value >= self.limit)

    def nearest(self, exits: list[int]) -> str:
        """The best that these exits offer, in words."""
        known = [(value, exit_layer) for exit_layer in exits if (value := self.value(exit_layer)) is not None]
        if not known:
            return f"{self.name} is not known of any exit"
        value, exit_layer = min(known) if self.at_most else max(known)
        return f"{self.name} {value:.10g}{self.unit} (exit {exit_layer})"  # in full: a budget may be set to it


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
    """The best of the exits that keep all budgets.

    That is the one of the highest quality on `benchmark`, the shallowest of equals; where the quality of one of them is
    not known, the deepest.

    Args:
        profile: what each exit costs.
        latency_ms: the 95th percentile of a batch's time may reach this many milliseconds.
        memory_mb: the peak memory may reach this many MB (10^6 bytes).
        min_quality: the quality on `benchmark` must reach this.
        benchmark: which quality counts; may be left out if the profile knows one.
        batch_size, length: shape of the batch that the budgets are about; the first one of the profile that fits.

    Raises:
        ValueError: no budget is given, the profile lacks the shape or the benchmark, or no exit keeps all budgets; the
            message then names what the nearest exits offer.
    """
    if latency_ms is None and memory_mb is None and min_quality is None:
        raise ValueError("Give at least one budget: latency_ms, memory_mb or min_quality.")
    shape = _shape(profile, batch_size, length)
    quality = _quality(profile, benchmark, needed=min_quality is not None)
    limits = [
        _Budget("latency_ms", latency_ms, lambda k: profile.measurement(k, shape).latency_ms_p95, True, " ms"),
        _Budget("memory_mb", memory_mb, lambda k: profile.measurement(k, shape).peak_memory_mb, True, " MB"),
        _Budget("min_quality", min_quality, quality.get, False, ""),
    ]
    budgets = [budget for budget in limits if budget.limit is not None]
    exits = [exit_layer for exit_layer in profile.exits if all(budget.is_kept_by(exit_layer) for budget in budgets)]
    if not exits:
        raise ValueError(_none_fits(profile, budgets, shape))
    if set(exits) <= set(quality):
        return max(exits, key=lambda exit_layer: (quality[exit_layer], -exit_layer))
    return max(exits)


def _none_fits(profile: ExitProfile, budgets: list[_Budget], shape: tuple[int, int]) -> str:
    """Why no exit was chosen: for each budget the best value of the exits that keep the others, or of all."""
    asked = " and ".join(f"{budget.name}={budget.limit:g}" for budget in budgets)
    nearest = []
    for budget in budgets:
        others = [other for other in budgets if other is not budget]
        exits = [exit_layer for exit_layer in profile.exits if all(other.is_kept_by(exit_layer) for other in others)]
        if exits:
            nearest.append(budget.nearest(exits))
    if nearest:
        kept = " with the other budgets kept" if len(budgets) > 1 else ""
        possible = f"the nearest possible{kept}: {', or '.join(nearest)}"
    else:
        every = list(profile.exits)
        possible = f"the best of each alone: {', '.join(budget.nearest(every) for budget in budgets)}"
    return f"No exit keeps {asked} for batches of {shape[0]} × {shape[1]} tokens; {possible}."


def _shape(profile: ExitProfile, batch_size: int | None, length: int | None) -> tuple[int, int]:
    """The first shape of the profile that has what is asked for."""
    for shape in profile.shapes:
        if batch_size in (None, shape[0]) and length in (None, shape[1]):
            return shape
    measured = ", ".join(f"{size} × {tokens}" for size, tokens in profile.shapes)
    asked = f"{batch_size or 'any number of'} texts of {length or 'any number of'} tokens"
    raise ValueError(f"The profile has no batch of {asked}; it has {measured}.")


def _quality(profile: ExitProfile, benchmark: str | None, needed: bool) -> dict[int, float]:
    """Quality of each exit for which it is known, on the benchmark named or the only one."""
    known = profile.benchmarks
    if benchmark is None and len(known) == 1:
        benchmark = known[0]
    if benchmark is not None and benchmark not in known:
        raise ValueError(f"The profile knows no quality on {benchmark}; it knows {_listed(known) or 'none'}.")
    if benchmark is None and needed:
        raise ValueError(
            f"min_quality needs a benchmark; the profile knows {_listed(known)}: name one."
            if known
            else "The profile knows no quality, so min_quality can't be asked for: `mose profile --quality` adds it."
        )
    return {
        exit_layer: profiled.quality[benchmark]
        for exit_layer, profiled in profile.exits.items()
        if benchmark in profiled.quality
    }


def _listed(items: Any) -> str:
    return ", ".join(map(str, items))


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
