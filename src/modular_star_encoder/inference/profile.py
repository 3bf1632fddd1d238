"""Measure the exit profile of a checkpoint on this machine: latency, memory, size and FLOPs of every exit.

Latency is timed on random tokens, with the exits in random order, so that other programs slow all exits alike. The
memory of each exit is measured in a new process, which runs this module as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modular_star_encoder.inference import profile_path, resolve_checkpoint
from modular_star_encoder.inference.checkpoints import checkpoint_checksum, load_checkpoint, load_config
from modular_star_encoder.inference.exit_profile import ExitProfile, Measurement, ProfiledExit, profile_lock
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import check_writable
from modular_star_encoder.utils.reports import library_versions, machine_kind, markdown_table

DTYPES = ("float32", "bfloat16", "float16")
WARM_UP_ROUNDS, FEWEST_ROUNDS = 2, 5

Shape = tuple[int, int]


def flops_per_token(config: ModularStarEncoderConfig, exit_layer: int, length: int) -> float:
    """Return the number of floating-point operations per token to embed a text of `length` tokens at one exit.

    Only matrix products are counted. A multiplication and an addition are two operations, as in Kaplan et al. (2020,
    arXiv 2001.08361, section 2.1) and in torch's `FlopCounterMode`.
    """
    config.check_exit(exit_layer)
    hidden, projection = config.hidden_size, config.projection_size
    keys = config.num_key_value_heads * config.head_dim
    # Queries and outputs; keys and values; the MLP.
    layer = 2 * (2 * hidden * hidden + 2 * hidden * keys + 2 * hidden * config.intermediate_size)
    attention = 4 * length * hidden  # scores, and the weighted sum of values
    head = 2 * projection * (hidden + (projection if config.projection_head == "mlp" else 0))
    if config.projection_order == "pool_then_project":
        head += head / length  # once per text
    return float(exit_layer * (layer + attention) + head)


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """Settings of `profile_checkpoint`, which measures every combination of `batch_sizes` and `lengths`."""

    batch_sizes: tuple[int, ...] = (1, 8)  # numbers of texts in a batch
    lengths: tuple[int, ...] = (128, 512)  # numbers of tokens of each text
    rounds: int = 30  # number of timings of each exit at each batch shape
    seconds_per_shape: float = 60.0  # timing of a batch shape ends after this time, but not before five rounds
    memory: bool = True  # whether to measure memory

    def __post_init__(self) -> None:
        numbers = (*self.batch_sizes, *self.lengths, self.rounds, self.seconds_per_shape)
        if not self.batch_sizes or not self.lengths or min(numbers) <= 0:
            message = "Profiling needs at least one batch size and one length, and only numbers above 0"
            raise UserError("profile.plan", f"{message}, not {numbers}.")

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Return all batch shapes (batch_size, length), those with the fewest tokens first."""
        shapes = {(size, length) for size in self.batch_sizes for length in self.lengths}
        return tuple(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape)))


def profile_checkpoint(
    checkpoint: str | os.PathLike[str],
    plan: ProfilePlan | None = None,
    *,
    exit_layers: Sequence[int] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> ExitProfile:
    """Return the time and memory that each exit of a retrieval checkpoint needs to embed texts of the shapes in `plan`.

    By default, all exits are measured, on a GPU if there is one, in the dtype of the checkpoint. UserError if the
    device is not available, the dtype is unknown, or a length in `plan` is above the limit of the model.
    """
    plan = plan or ProfilePlan()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = resolve_checkpoint(checkpoint)
    config = load_config(path)
    config.resolve_exits(exit_layers=exit_layers or None)
    longest, limit = max(plan.lengths), config.max_position_embeddings
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError("profile.device", f"device={device!r} is not available: use 'cpu', or 'cuda' with a GPU.")
    if dtype not in (None, *DTYPES):
        raise UserError("profile.dtype", f"dtype={dtype!r}, but it must be one of {', '.join(DTYPES)}.")
    if longest > limit:
        message = f"The model reads texts of at most {limit} tokens, not {longest}. Give shorter lengths."
        raise UserError("profile.length", message)
    model, _ = load_checkpoint(path, max(exit_layers) if exit_layers else None, device, dtype)
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    exits = config.resolve_exits(exit_layers=exit_layers or config.exit_layers)
    times = _measure_times(model, exits, plan, progress)
    parameters = {k: model.slice(k).num_parameters() for k in exits}
    attention, bytes_each = config._attn_implementation, model.dtype.itemsize
    del model  # so that it takes no memory from the processes that measure the memory of each exit
    memory: dict[int, Any] = dict.fromkeys(exits, (None, [None] * len(plan.shapes)))
    for k in tqdm(exits if plan.memory else (), "measuring memory", unit="exit", disable=not progress, leave=False):
        memory[k] = measure_memory(path, k, device, dtype, plan.shapes, torch.get_num_threads())
    profiled = {}
    for k in exits:
        measurements = tuple(
            _measurement(shape, flops_per_token(config, k, shape[1]), times[k, shape], peak)
            for shape, peak in zip(plan.shapes, memory[k][1], strict=True)
        )
        profiled[k] = ProfiledExit(parameters[k], parameters[k] * bytes_each / 1e6, measurements)
    return ExitProfile(
        exits=profiled,
        device=device,
        dtype=dtype,
        attn_implementation=attention,
        checkpoint=checkpoint_checksum(path),
        base_memory_mb=memory[exits[0]][0],
        machine=machine_kind(device),
        versions=library_versions(),
        date=datetime.now(UTC).date().isoformat(),
    )


def _measurement(shape: Shape, flops_per_token: float, seconds: list[float], peak: float | None) -> Measurement:
    (size, length), (median, late) = shape, np.percentile(seconds, [50, 95])
    latencies = round(1000 * median, 4), round(1000 * late, 4)
    rates = round(size / median, 2), round(size * length / median, 1)
    peak = None if peak is None else round(peak, 1)
    return Measurement(size, length, flops_per_token, *latencies, *rates, peak, len(seconds))


def profile_to_file(
    checkpoint: str | os.PathLike[str],
    plan: ProfilePlan | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[ExitProfile, Path]:
    """Measure a checkpoint's profile (see `profile_checkpoint`), write it to a file, and return (profile, file).

    If the file has a profile of the same weights, its quality scores are kept. UserError if the file has exits that
    this call does not measure.
    """
    path = profile_path(checkpoint, out)
    check_writable(path)
    with profile_lock():  # a lock that can't be had is an error before the measurement
        _older_profile(path, options.get("exit_layers"))
    profile = profile_checkpoint(checkpoint, plan, **options)
    with profile_lock():
        older = _older_profile(path, options.get("exit_layers"))  # again: another process may have changed it meanwhile
        if older is not None and older.checkpoint == profile.checkpoint:
            for name in older.benchmarks:
                known = {k: one.quality[name] for k, one in older.exits.items() if name in one.quality}
                profile = profile.with_quality(name, known)
        profile.save(path)
    return profile, path


def _older_profile(path: Path, exit_layers: Sequence[int] | None) -> ExitProfile | None:
    older = ExitProfile.load(path) if path.is_file() else None
    if older is not None and (lost := set(older.exits) - set(exit_layers or older.exits)):
        message = f"{path} has a profile of exits {', '.join(map(str, sorted(lost)))}, which would be overwritten."
        raise UserError("profile.out.other_exits", f"{message} Measure these exits too, or set another file (--out).")
    return older


def random_batch(model: ModularStarEncoderForRetrieval, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Return a batch of texts of `length` tokens without padding; the token ids are random but equal in every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def embed(model: ModularStarEncoderForRetrieval, batch: dict[str, torch.Tensor], exit_layer: int) -> float:
    """Embed a batch at one exit, and return the time in seconds until the device has finished."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda device: None
    wait(model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        model(**batch, exit_layer=exit_layer)
    wait(model.device)
    return time.perf_counter() - start


def format_profile(profile: ExitProfile) -> str:
    """Return a profile as Markdown: a table per batch shape, an explanation, and device, dtype, machine and date."""
    blocks, scores = [], profile.benchmarks
    for shape in profile.shapes:
        rows = [["exit", "parameters", "MFLOP/token", "median ms", "p95 ms", "texts/s", "peak MB", *scores]]
        for k, one in profile.exits.items():
            cost = profile.measurement(k, shape)
            times = (f"{cost.latency_ms_p50:.2f}", f"{cost.latency_ms_p95:.2f}", f"{cost.texts_per_second:,.1f}")
            peak = "–" if cost.peak_memory_mb is None else f"{cost.peak_memory_mb:,.0f}"
            qualities = [f"{one.quality[name]:.3f}" if name in one.quality else "–" for name in scores]
            rows.append([f"{k}", f"{one.parameters:,}", f"{cost.flops_per_token / 1e6:,.1f}", *times, peak, *qualities])
        title = f"Batches of {_count(shape[0], 'text')} of {_count(shape[1], 'token')}"
        blocks.append("\n".join([title, "", *markdown_table(rows)]))
    legend = "Times are those of a batch: the median and the 95th percentile (p95). 1 MB is 10^6 bytes."
    legend += f" Scores ({', '.join(scores)}) are fractions from 0 to 1." * bool(scores)
    processor, threads = profile.machine.get("processor"), profile.machine.get("threads")
    machine = profile.machine.get("gpu") or f"{processor}, {_count(threads, 'thread')}"
    return "\n\n".join([*blocks, legend, f"{profile.device}, {profile.dtype}, {machine}, {profile.date}"])


def _count(number: Any, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _measure_times(
    model: ModularStarEncoderForRetrieval, exits: Sequence[int], plan: ProfilePlan, progress: bool
) -> dict[tuple[int, Shape], list[float]]:
    random = np.random.default_rng(0)
    times: dict[tuple[int, Shape], list[float]] = {(k, shape): [] for k in exits for shape in plan.shapes}
    total = len(plan.shapes) * (WARM_UP_ROUNDS + plan.rounds)
    with tqdm(total=total, desc="timing", unit="round", disable=not progress, leave=False) as bar:
        for shape in plan.shapes:
            batch, start = random_batch(model, *shape), time.perf_counter()
            for done in range(-WARM_UP_ROUNDS, plan.rounds):
                if done >= FEWEST_ROUNDS and time.perf_counter() - start > plan.seconds_per_shape:
                    bar.update(plan.rounds - done)
                    break
                for exit_layer in random.permutation(exits).tolist():
                    seconds = embed(model, batch, exit_layer)
                    if done >= 0:
                        times[exit_layer, shape].append(seconds)
                bar.update()
    return times


def measure_memory(
    checkpoint: str, exit_layer: int, device: str, dtype: str, shapes: Sequence[Shape], threads: int
) -> tuple[float | None, list[float | None]]:
    """Return (MB of a new process before it loads an exit, [its peak MB for each batch shape]); None for unknown MB."""
    request = json.dumps([checkpoint, exit_layer, device, dtype, shapes, threads])
    command = [sys.executable, "-P", "-m", __name__, request]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)  # noqa: S603
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"status {process.returncode}"])[-1]
        raise OSError(f"The memory of exit {exit_layer} can't be measured: the process that measures it failed: {last}")
    return tuple(json.loads(process.stdout.splitlines()[-1]))


def peak_memory_mb() -> float | None:
    """Return the largest resident memory of this process so far, in MB (10^6 bytes); None if it is unknown."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _measure_own_memory(checkpoint: str, exit_layer: int, device: str, dtype: str, shapes: Any, threads: int) -> Any:
    torch.set_num_threads(threads)
    on_gpu, peaks = device == "cuda", []
    base = None if on_gpu else peak_memory_mb()
    model, _ = load_checkpoint(checkpoint, exit_layer, device, dtype)
    for shape in shapes:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        embed(model, random_batch(model, *shape), exit_layer)
        peaks.append(torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_memory_mb())
    return base, peaks


if __name__ == "__main__":
    print(json.dumps(_measure_own_memory(*json.loads(sys.argv[1]))))
