"""Evaluate retrievers on benchmarks and report the results.

`mose evaluate` calls `run_benchmarks`; training calls `evaluate_tasks`. If a folder `out` is given, each result is
stored in `out/cells/`, named by a hash of task, retriever, exit and embedding size. So a repeated run computes only
missing results.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from sklearn.metrics import precision_recall_fscore_support
from tqdm.auto import tqdm

from modular_star_encoder.evaluation import metrics
from modular_star_encoder.evaluation.benchmarks import choose_benchmarks, load_benchmark
from modular_star_encoder.evaluation.lexical import BM25, TfIdf
from modular_star_encoder.evaluation.report import Report, make_report, plot_report
from modular_star_encoder.evaluation.retrievers import EmbeddingCache, EmbeddingRetriever, ExitVariant, Retriever
from modular_star_encoder.evaluation.tasks import Estimate, PairTask, Task, TaskResult
from modular_star_encoder.inference import PROFILE_NAME, resolve_checkpoint
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.inference.encoders import ExitEncoder, load_encoder
from modular_star_encoder.modeling import ModularStarEncoderForSequenceClassification
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import check_types, read_json, user_path, write_json
from modular_star_encoder.utils.reports import without_places

PROTOCOL = 1  # version of the evaluation's rules; increase it when a change of the rules gives other results
LEXICAL: dict[str, Callable[[], Retriever]] = {"bm25": BM25, "tfidf": TfIdf}


def run_benchmarks(
    model: str,  # a name for `open_retriever`
    benchmarks: Sequence[str],  # names in `BENCHMARKS`, or "all"
    data: str | Path,  # their folder, or "hub" (see `load_benchmark`)
    out: str | Path | None = None,  # folder for reports, plots, stored results and embeddings
    *,
    exit_layers: Sequence[int] | None = None,  # of the model; None: all
    baselines: Sequence[str] | None = None,  # names for `open_retriever`; None: BM25 if `out` is None
    allow_subset: bool = False,  # whether to accept files with fewer rows than published, with a note
    cache: str | Path | None = None,  # folder for embeddings, which several runs may share
    command: str = "",  # shown in the report
    progress: bool = True,
) -> Report:
    """Evaluate a model and baselines on benchmarks; return a report with one table per benchmark."""
    folder = None if out is None else user_path(out)
    chosen = choose_benchmarks(benchmarks, data)
    tasks = [task for name in chosen for task in load_benchmark(name, data, allow_subset=allow_subset)]
    cache = cache or (None if folder is None else folder / "embeddings")
    store = EmbeddingCache(None if cache is None else user_path(cache))
    if baselines is None:
        baselines = ["bm25"] if folder is None else []
    retrievers = _open_all(model, baselines, store, exit_layers)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # fails before the evaluation, not after it
    results = evaluate_tasks(tasks, list(retrievers.values()), out=folder, progress=progress)
    is_ours = isinstance(getattr(retrievers[model], "encoder", None), ExitEncoder)
    checksum = checkpoint_checksum(model) if is_ours or user_path(model).is_dir() else None
    report = make_report(tasks, results, command=without_places(command), checksum=checksum)
    if folder is not None:
        report.write(folder)
        profiles = {one.name: Path(resolve_checkpoint(name), PROFILE_NAME) for name, one in retrievers.items()}
        try:
            plot_report(report.tables, profiles, folder)
        except (ImportError, ValueError) as error:  # the reports are already written, so a missing plot is only a note
            print(f"mose: note: a plot could not be made: {error}", file=sys.stderr)
    return report


def evaluate_tasks(
    tasks: Sequence[Task], retrievers: Sequence[Retriever], *, out: str | Path | None = None, progress: bool = True
) -> list[TaskResult]:
    """Return a result per retriever, task and variant (exit and size), in this order; reuse results in `out/cells/`."""
    checksums, results = [task.checksum() for task in tasks], []
    for retriever in retrievers:
        runs = [
            (task, variant, _path(out, checksum, retriever, variant))
            for task, checksum in zip(tasks, checksums, strict=True)
            for variant in retriever.variants
        ]
        if missing := [(task, variant) for task, variant, path in runs if path is None or not path.exists()]:
            texts = dict.fromkeys(text for task in dict.fromkeys(task for task, _ in missing) for text in task.texts())
            retriever.prepare(list(texts), list(dict.fromkeys(one for _, one in missing)), progress=progress)
        bar = tqdm(runs, desc=f"scoring, {retriever.name}", unit="task", disable=not progress, leave=False)
        for task, variant, path in bar:
            if path is not None and path.exists():
                stored = read_result(path, task, variant)
                result = replace(stored, benchmark=task.benchmark, task=task.name, retriever=retriever.name)
            else:
                result = evaluate_task(task, retriever, variant)
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, asdict(result))
            results.append(result)
    return results


def evaluate_task(task: Task, retriever: Retriever, variant: ExitVariant) -> TaskResult:
    """Return the result of one variant of a retriever, such as an exit, on a task; call `retriever.prepare` first."""
    names = (task.benchmark, task.name, retriever.name, *variant)
    if isinstance(task, PairTask):
        return TaskResult(*names, *_evaluate_pairs(task, retriever, variant))

    ranking, _ = metrics.rank_task(task, lambda pool: retriever.scores(*task.texts_of(pool), variant))
    values = {metric: metrics.query_values(ranking, metric) for metric in task.metrics}
    estimates = {name: Estimate(float(one.mean()), *metrics.bootstrap_interval(one)) for name, one in values.items()}
    return TaskResult(*names, estimates, values[task.metrics[0]].tolist(), *_shape(task)[1:])


def _shape(task: Task) -> tuple[list[str], list[str], int]:
    """Return (metrics, ids of the queries, number of candidates), which all results on a task share."""
    if isinstance(task, PairTask):
        return ["f1", "precision", "recall"], [], 0
    ids = [task.query_ids[row] for pool in task.pools for row in pool.queries]
    candidates = max(len(pool.documents) for pool in task.pools) - task.exclude_self
    return list(dict.fromkeys(task.metrics)), ids, candidates


def _evaluate_pairs(
    task: PairTask, retriever: Retriever, variant: ExitVariant
) -> tuple[dict[str, Estimate], list[int], list[str], int, float]:
    """Classify the pairs of a task; return the fields of a `TaskResult` from `estimates` to `threshold`, in order."""
    scores = retriever.scores(task.documents, task.documents, variant)
    valid, test = (scores.of_pairs(*pairs.T) for pairs in (task.valid_pairs, task.pairs))
    metrics.check_scores(test)
    threshold = metrics.best_f1_threshold(valid, task.valid_labels)
    results = metrics.outcomes((test >= np.float32(threshold)).astype(int), task.labels)
    value = float(metrics.f1(np.bincount(results, minlength=4)))
    estimates = {"f1": Estimate(value, *metrics.bootstrap_f1_interval(results))}
    for name, members in (("precision", results >= metrics.FALSE_POSITIVE), ("recall", results % 2 == 1)):
        hits = results[members] == metrics.TRUE_POSITIVE if members.any() else np.zeros(1)
        estimates[name] = Estimate(float(np.mean(hits)), *metrics.bootstrap_interval(hits))
    return estimates, results.tolist(), [], 0, threshold


def read_result(path: Path, task: Task, variant: ExitVariant) -> TaskResult:
    """Read a stored result, in which names may be outdated; UserError if it is damaged or of another task or exit."""
    with suppress(TypeError, ValueError):
        result = TypeAdapter(TaskResult).validate_python(read_json(path))
        check_types(result)  # TypeAdapter accepts "nan"
        shape = (list(result.estimates), list(result.ids), result.candidates)
        if shape == _shape(task) and (result.exit_layer, result.dimensions) == variant and _in_range(result, task):
            return result
    raise UserError("evaluation.result.damaged", f"{path} is damaged: delete it, then evaluate again.")


def _in_range(result: TaskResult, task: Task) -> bool:
    """Return whether all numbers in a result are possible for the queries or pairs of its task."""
    values, most = np.array(result.values), 1 + 1e-9  # a sum of NDCG may be rounded up
    if isinstance(task, PairTask):
        fits = result.threshold is not None and np.array_equal(values % 2, task.labels) and (values < 4).all()
    else:
        fits = result.threshold is None and len(values) == len(result.ids) and (values <= most).all()
    bounds = [(one.value, one.low, one.high) for one in result.estimates.values()]
    return bool(fits and (values >= 0).all()) and all(0 <= v <= most and 0 <= a <= b <= most for v, a, b in bounds)


def _path(out: str | Path | None, task: str, retriever: Retriever, variant: ExitVariant) -> Path | None:
    if out is None:
        return None
    identity = json.dumps([PROTOCOL, task, retriever.checksum, variant.exit_layer, variant.dimensions])
    return Path(out) / "cells" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


def open_retriever(
    name: str, cache: EmbeddingCache | None = None, exit_layers: Sequence[int] | None = None
) -> Retriever:
    """Open "bm25", "tfidf", or a model (see `load_encoder`) with the exits `exit_layers`, or all its exits if None."""
    if name not in LEXICAL:
        return EmbeddingRetriever(load_encoder(name, exit_layers), cache)
    if exit_layers:
        raise UserError("encoder.no_exits", f"{name} is not a ModularStarEncoder and has no exits: omit `exit_layers`.")
    return LEXICAL[name]()


def _open_all(
    model: str, baselines: Sequence[str], store: EmbeddingCache, exit_layers: Sequence[int] | None
) -> dict[str, Retriever]:
    retrievers = {model: open_retriever(model, store, exit_layers)}
    retrievers |= {name: open_retriever(name, store) for name in dict.fromkeys(baselines) if name != model}
    names = [retriever.name for retriever in retrievers.values()]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        message = f"Two models have the name {repeated[0]!r} in the tables: rename the folder of one of them."
        raise UserError("evaluation.retriever.same_name", message)
    return retrievers


@torch.inference_mode()
def classification_scores(
    model: ModularStarEncoderForSequenceClassification, batches: Iterable[Mapping[str, Any]], *, progress: bool = True
) -> dict[int, dict[str, float]]:
    """Classify `batches`; return {exit: {metric: fraction}}: accuracy, and precision, recall and F1 of class 1."""
    exits, device = tuple(model.config.exit_layers), next(model.parameters()).device
    decisions, labels = [], []
    for batch in tqdm(batches, desc="classifying", unit="batch", disable=not progress, leave=False):
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        decisions.append(model(**inputs, exit_layers=exits).exit_logits.argmax(dim=-1).cpu().numpy())
        labels.append(batch["labels"].numpy())
    found, truth, scores = np.concatenate(decisions, axis=1), np.concatenate(labels), {}
    for k, of_exit in zip(exits, found, strict=True):  # as in BigCloneBench's evaluator since 2021-09-13
        others = precision_recall_fscore_support(truth, of_exit, average="binary", zero_division=0)[:3]
        values = map(float, (np.mean(of_exit == truth), *others))
        scores[k] = dict(zip(("accuracy", "precision", "recall", "f1"), values, strict=True))
    return scores
