"""Benchmarks on systems, from files to reports: what `mose evaluate` and examples/evaluate.py call."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from modular_star_encoder.evaluation.benchmarks.codesearchnet_999 import write_candidates
from modular_star_encoder.evaluation.benchmarks.registry import (
    ALL,
    BENCHMARKS,
    WITH_CANDIDATES,
    choose_benchmarks,
    load_benchmark,
)
from modular_star_encoder.evaluation.embedding_cache import EmbeddingCache
from modular_star_encoder.evaluation.encoders import ExitEncoder
from modular_star_encoder.evaluation.exit_profile import PROFILE_NAME, ExitProfile
from modular_star_encoder.evaluation.figures import median_latencies, plot_quality_by_depth, plot_quality_by_latency
from modular_star_encoder.evaluation.fingerprint import checkpoint_fingerprint
from modular_star_encoder.evaluation.harness import evaluate_tasks
from modular_star_encoder.evaluation.opening import open_system
from modular_star_encoder.evaluation.report import write_report
from modular_star_encoder.evaluation.systems import EmbeddingSystem, System
from modular_star_encoder.evaluation.tables import Table, build_tables
from modular_star_encoder.evaluation.tasks import Task


def run_benchmarks(
    model: str,
    benchmarks: Sequence[str],
    data: str | Path,
    out: str | Path,
    *,
    exit_layers: Sequence[int] | None = None,
    baselines: Sequence[str] = (),
    untrained: bool = False,
    allow_subset: bool = False,
    candidates: str | Path | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> list[Table]:
    """Measure a model and baselines on benchmarks, and write reports and figures; what is finished isn't done again.

    Args:
        model: see `opening.open_system`; the deepest exit of this one is what differences are to.
        benchmarks: names of `benchmarks.registry`, or "all".
        data: their folder (see `load_benchmark`).
        out: folder for report.md, .csv, .tex, .json, figures, `cells/`, and the lists of candidates.
        exit_layers: exits of the model; all if None.
        baselines: other systems, by the names that `open_system` takes.
        untrained: also the model with fresh weights.
        allow_subset: take partial files, and say so under the tables.
        candidates: folder of the lists of candidates of an earlier run (CodeSearchNet with distractors).
        cache: folder for embeddings, shared by runs; `out/embeddings` if None.
        seed: of intervals, permutations and the untrained weights; candidates are always drawn as the protocol says.
        command: written into the reports.

    Raises:
        ValueError: an unknown name or none, a damaged or partial file, or an exit that the model doesn't have.
        OSError: something that isn't there, or `out` can't be written to.
    """
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for the reports.")
    tasks: list[Task] = []
    chosen = choose_benchmarks(benchmarks, data)
    if not chosen:
        raise ValueError(f"Name a benchmark: {', '.join(BENCHMARKS)}, or {ALL}.")
    if candidates is not None and not any(name in WITH_CANDIDATES for name in chosen):
        raise ValueError(f"Lists of candidates are only for {' and '.join(WITH_CANDIDATES)}.")
    for name in chosen:
        lists = candidates if name in WITH_CANDIDATES else None
        tasks += load_benchmark(name, data, allow_subset=allow_subset, candidates=lists)
    store = EmbeddingCache(out / "embeddings" if cache is None else Path(cache).expanduser())
    systems = _open(model, baselines, store, exit_layers, untrained, seed)
    out.mkdir(parents=True, exist_ok=True)  # if it can't be, say so before the work and not after it
    for task in tasks:
        if task.benchmark in WITH_CANDIDATES:
            write_candidates(task, out / "candidates" / task.benchmark)
    cells = evaluate_tasks(tasks, list(systems.values()), out=out, seed=seed, progress=progress)
    tables = build_tables(tasks, cells, seed=seed)
    folder = Path(model).expanduser()
    write_report(out, tables, cells, _shown(command), checkpoint_fingerprint(folder) if folder.is_dir() else None)
    _draw(tables, {name: system.name for name, system in systems.items()}, out)
    return tables


def _open(
    model: str,
    baselines: Sequence[str],
    store: EmbeddingCache,
    exit_layers: Sequence[int] | None,
    untrained: bool,
    seed: int,
) -> dict[str, System]:
    """Systems by what they were called; no two have the same name in tables."""
    systems: dict[str, System] = {model: open_system(model, store, exit_layers)}
    if untrained:
        own = systems[model]
        if not isinstance(own, EmbeddingSystem) or not isinstance(own.encoder, ExitEncoder):
            raise ValueError(f"{model} is none of our models, so it has no untrained counterpart.")
        systems["untrained"] = EmbeddingSystem(own.encoder.untrained(seed), store)
    for name in dict.fromkeys(baselines):
        if name not in systems:
            systems[name] = open_system(name, store)
    names = [system.name for system in systems.values()]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two systems would be called {repeated[0]!r} in the tables: rename a folder.")
    return systems


def _draw(tables: Sequence[Table], systems: dict[str, str], out: Path) -> None:
    """The figures, if there is anything to draw and to draw with; otherwise a note, and none of an earlier run."""
    by_depth, by_latency = out / "quality_by_depth.png", out / "quality_by_latency.png"
    for path in (by_depth, by_latency):
        path.unlink(missing_ok=True)
    if not any(row.exit_layer is not None for table in tables for row in table.rows):
        return
    profiles = {label: Path(name).expanduser() / PROFILE_NAME for name, label in systems.items()}
    try:
        plot_quality_by_depth(tables, by_depth)
        there = {label: ExitProfile.load(path) for label, path in profiles.items() if path.is_file()}
        if there:
            _check_comparable(there)
            latencies = {label: median_latencies(profile) for label, profile in there.items()}
            plot_quality_by_latency(tables, latencies, by_latency)
    except (ImportError, ValueError) as error:  # the reports are written; a profile of other exits mustn't hide that
        print(f"mose: note: a figure is missing. {error}", file=sys.stderr)


def _check_comparable(profiles: Mapping[str, ExitProfile]) -> None:
    """Refuse to draw latencies beside each other that were not measured alike.

    Raises:
        ValueError: two profiles are of different machines, devices, numbers of threads or shapes of batches.
    """
    parts = ("processor", "threads", "gpu")
    alike = {
        (profile.device, profile.shapes[0], *(profile.machine.get(part) for part in parts))
        for profile in profiles.values()
    }
    if len(alike) > 1:
        raise ValueError(
            f"The exit profiles of {' and '.join(profiles)} are of different machines, devices, threads or shapes of "
            "batches: measure them alike with `mose profile`."
        )


def _shown(command: str) -> str:
    """The command without the places of this machine."""
    for variable in ("MOSE_DATA", "HOME"):
        if place := os.environ.get(variable, "").rstrip("/"):
            command = command.replace(place, f"${variable}")
    return command
