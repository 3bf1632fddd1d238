"""Benchmarks on systems, from files to reports: what `mose evaluate` and examples/evaluate.py call."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoConfig

from modular_star_encoder.evaluation.benchmarks.codesearchnet import write_candidates
from modular_star_encoder.evaluation.benchmarks.registry import (
    ALL,
    BENCHMARKS,
    WITH_CANDIDATES,
    choose_benchmarks,
    load_benchmark,
)
from modular_star_encoder.evaluation.harness import evaluate_tasks
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.plots import median_latencies, plot_quality_by_depth, plot_quality_by_latency
from modular_star_encoder.evaluation.report import Table, build_tables, write_report
from modular_star_encoder.evaluation.retrievers import EmbeddingSystem, Encoder, System
from modular_star_encoder.evaluation.tasks import Task
from modular_star_encoder.inference.embedding_cache import EmbeddingCache
from modular_star_encoder.inference.encoders import OPENAI_URL, EndpointEncoder, ExitEncoder, SentenceTransformerEncoder
from modular_star_encoder.inference.exit_profile import PROFILE_NAME, ExitProfile
from modular_star_encoder.inference.load import check_checkpoint, checkpoint_fingerprint, load_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderConfig

_ENDPOINT = "openai:"


def open_system(name: str, cache: EmbeddingCache | None = None, exit_layers: Sequence[int] | None = None) -> System:
    """The system of a name.

    Args:
        name: `bm25`, `tfidf`, `openai:MODEL` or `openai:MODEL@URL` (key in OPENAI_API_KEY), or the folder or Hub
            repository of one of our checkpoints or of any model that sentence-transformers loads.
        cache: where embeddings are kept.
        exit_layers: exits of one of our checkpoints; all if None.

    Raises:
        ValueError: an exit that the model doesn't have, or a model that can't be loaded.
        OSError: no such folder or repository.
    """
    if exit_layers and (name in ("bm25", "tfidf") or name.startswith(_ENDPOINT)):
        raise ValueError(f"{name} is no ModularStarEncoder, so it has no exits to choose.")
    if name == "bm25":
        return BM25()
    if name == "tfidf":
        from modular_star_encoder.evaluation.lexical import TfIdf  # scikit-learn is slow to import

        return TfIdf()
    if name.startswith(_ENDPOINT):
        model, _, url = name.removeprefix(_ENDPOINT).partition("@")
        return EmbeddingSystem(EndpointEncoder(model, url or OPENAI_URL), cache)
    return EmbeddingSystem(open_encoder(name, exit_layers), cache)


def open_encoder(name: str, exit_layers: Sequence[int] | None = None) -> Encoder:
    """One of our checkpoints, or any model that sentence-transformers loads; see `open_system`."""
    folder = Path(name).expanduser()
    label = "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else name
    if not (folder / "modules.json").is_file():
        check_checkpoint(name)
    if _is_ours(name):
        model, tokenizer = load_checkpoint(name, max(exit_layers) if exit_layers else None)
        return ExitEncoder(model, tokenizer, label, exit_layers=exit_layers)
    if exit_layers:
        raise ValueError(f"{name} is no ModularStarEncoder, so it has no exits to choose.")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformerEncoder(SentenceTransformer(str(folder) if folder.is_dir() else name), label)


def _is_ours(name: str) -> bool:
    try:
        config = AutoConfig.from_pretrained(Path(name).expanduser() if Path(name).expanduser().is_dir() else name)
    except ValueError:  # a type that transformers doesn't know: not ours, and sentence-transformers will say so
        return False
    except OSError:  # sentence-transformers' older layout has no config.json at the top
        return False
    return isinstance(config, ModularStarEncoderConfig)


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
