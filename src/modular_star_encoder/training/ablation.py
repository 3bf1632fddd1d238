"""The ablation of the paper's Table 5: is an exit that was trained together with others better than one trained alone?

A self-distilled model and one single-exit baseline per exit start from the same multi-exit pre-trained checkpoint and
see the same batches; variants of the recipe are tried by the same protocol. Every cell (a kind of model, a seed) is a
run of `finetune` of its own, and resumes on its own.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modular_star_encoder.data.retrieval_data import RetrievalData
from modular_star_encoder.evaluation.benchmarks import choose_benchmarks, load_benchmark
from modular_star_encoder.evaluation.benchmarks.rows import read_json
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import RetrievalTask, TaskResult, held_out_tasks
from modular_star_encoder.inference.load import checkpoint_checksum
from modular_star_encoder.training.ablation_recipe import AblationCell, AblationRecipe
from modular_star_encoder.training.ablation_report import Values, compare, without_places, write_ablation_report
from modular_star_encoder.training.finetuning import check_recipe, evaluate_checkpoint, finetune, prepare_data
from modular_star_encoder.training.recipes import has_weights, open_run, processes_of_run
from modular_star_encoder.training.starting_points import ADAPTER, MODEL, starting_source
from modular_star_encoder.utils.files import write_json

SCORES, STARTS = "scores.json", "starting_points.json"


def ablate(
    recipe: AblationRecipe,
    out: str | os.PathLike,
    *,
    command: str = "",
    progress: bool = True,
    announce: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and measure every cell, and compare them; what is finished in `out` is kept.

    `out` gets `data/` (rows, shared by all cells), `starting_points.json` (fingerprints of the models that cells start
    from), `cells/{name}/seed-{seed}/` (each a run of `finetune` with `scores.json`), and in the end `ablation.md`,
    `ablation.json` and, where matplotlib is installed, `ablation.png`. Later calls may have more seeds, variants and
    benchmarks; models that were not kept are trained again for these. With several processes each calls this.

    Args:
        recipe: what to do.
        out: folder of the ablation.
        command: what made it; stands in the reports.
        progress: whether to show progress bars.
        announce: called with a line about each cell.

    Returns:
        The content of `ablation.json`; see `ablation_results.compare`.

    Raises:
        ValueError: the recipe contradicts itself or the model, or `out` holds cells of other settings or of
            another starting point.
    """
    out, state, base = Path(out), processes_of_run(), recipe.base()
    blueprint, _ = check_recipe(base, out, state.num_processes, progress)
    exits = tuple(blueprint.config.exit_layers)
    cells = recipe.cells(exits)
    for cell in cells:
        try:
            check_recipe(cell.recipe, out, state.num_processes, progress)
        except ValueError as error:
            raise ValueError(f"The model {cell.name} can't be trained: {error}") from error
    benchmarks = _benchmarks(recipe)
    with state.main_process_first():
        _refuse_other_folders(out)
        data = prepare_data(base, out / "data", progress and state.is_main_process)
        if state.is_main_process:
            _refuse_other_starting_points(cells, out / STARTS)
    tasks = [*(held_out_tasks(data.held_out, limit=base.eval_pairs) if recipe.held_out else []), *benchmarks]
    scores: dict[tuple[str, int], dict[str, dict[int, Values]]] = {}
    for number, cell in enumerate(cells, 1):
        if state.is_main_process:
            announce(f"cell {number} of {len(cells)}: {cell.name}, seed {cell.recipe.seed}")
        scores[cell.name, cell.recipe.seed] = _run_cell(recipe, cell, data, tasks, out / "cells", progress)
    if not state.is_main_process:
        return {}
    results = {
        "command": without_places(command),
        "recipe": without_places(recipe.to_dict()),
        "seconds": _seconds(cells, out),
        "bm25": _lexical(tasks, progress),
        **compare(scores, exits, recipe.seeds, list(recipe.variants)),
    }
    write_ablation_report(results, out)
    return results


def _refuse_other_folders(out: Path) -> None:
    """Raise ValueError if a folder holds something that no ablation wrote; hidden files are what a kill leaves."""
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if out.is_file() or (visible and "data" not in visible):
        raise ValueError(f"{out} is not empty and holds no ablation; name another folder.")


def _refuse_other_starting_points(cells: Sequence[AblationCell], path: Path) -> None:
    """Raise ValueError if models that cells start from are not what they were in earlier calls, by their weights."""
    known = read_json(path) if path.is_file() else {}
    found = {name: checkpoint_checksum(starting_source(name)[0]) for name in {cell.recipe.model for cell in cells}}
    if other := ", ".join(sorted(name for name in found if known.get(name, found[name]) != found[name])):
        raise ValueError(
            f"The cells in {path.parent} start from another {other} than is there now; name another folder."
        )
    write_json(path, known | found)


def _benchmarks(recipe: AblationRecipe) -> list[RetrievalTask]:
    """Their tasks.

    Raises:
        ValueError: an unknown name, a damaged file, or a benchmark that ranks nothing.
    """
    tasks = []
    for name in choose_benchmarks(recipe.benchmarks, recipe.benchmark_data or ""):
        tasks += load_benchmark(name, recipe.benchmark_data, allow_subset=recipe.allow_subset)
    for task in tasks:
        if not isinstance(task, RetrievalTask) or task.metrics[0] != "mrr":
            raise ValueError(f"The benchmark {task.benchmark} can't be compared by MRR and Recall@1.")
    return tasks


def _run_cell(
    recipe: AblationRecipe,
    cell: AblationCell,
    data: RetrievalData,
    tasks: Sequence[RetrievalTask],
    folder: Path,
    progress: bool,
) -> dict[str, dict[int, Values]]:
    """Train and measure one model, unless that is done: benchmark → exit → reciprocal ranks, in every process."""
    run, state = folder / cell.folder, processes_of_run()
    settings, names = cell.recipe.to_dict(), [task.checksum() for task in tasks]
    with state.main_process_first():
        open_run(run, settings, "an ablation", until_trained=settings)
        known = _read_scores(run)
        if not set(names) <= set(known) and not has_weights(run / MODEL):
            # An earlier call kept no models: what is still to be measured needs this one again.
            shutil.rmtree(run / MODEL, ignore_errors=True)
    if not set(names) <= set(known):
        finetune(cell.recipe, run, data=data, progress=progress, announce=lambda _: None)
        if state.is_main_process:
            missing = [task for task, name in zip(tasks, names, strict=True) if name not in known]
            measured = evaluate_checkpoint(cell.recipe, run / MODEL, missing, progress=progress)
            write_json(run / SCORES, known | _by_task(missing, measured))
        state.wait_for_everyone()
        known = _read_scores(run)
    if state.is_main_process:
        _clean(run, recipe.keep_models)
    found: dict[str, dict[int, Values]] = {}
    for task, name in zip(tasks, names, strict=True):
        for exit_layer, ranks in known[name].items():
            found.setdefault(task.benchmark, {}).setdefault(int(exit_layer), {})[task.name] = ranks
    return found


def _by_task(tasks: Sequence[RetrievalTask], cells: Sequence[TaskResult]) -> dict[str, dict[str, dict[str, float]]]:
    """Fingerprint of a task → exit → query → reciprocal rank; embeddings whole, where they can be cut."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    fingerprints = {(task.benchmark, task.name): task.checksum() for task in tasks}
    for cell in sorted(cells, key=lambda cell: cell.dimensions or 0):
        place = found.setdefault(fingerprints[cell.benchmark, cell.task], {})
        place[str(cell.exit_layer)] = dict(zip(cell.ids, cell.values, strict=True))
    return found


def _read_scores(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Fingerprint of a task → exit → query → reciprocal rank; nothing before the cell is measured.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / SCORES
    return read_json(path) if path.is_file() else {}


def _clean(run: Path, keep_model: bool) -> None:
    """Remove what a measured cell needs no more."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    if not keep_model:
        for folder in (MODEL, ADAPTER):
            for file in run.glob(f"{folder}/*.safetensors"):
                file.unlink()


def _lexical(tasks: Sequence[RetrievalTask], progress: bool) -> dict[str, float]:
    """MRR of BM25, the mean over tasks, by benchmark."""
    found: dict[str, list[float]] = {}
    for cell in evaluate_tasks(tasks, [BM25()], progress=progress):
        found.setdefault(cell.benchmark, []).append(cell.estimates["mrr"].value)
    return {benchmark: sum(values) / len(values) for benchmark, values in found.items()}


def _seconds(cells: Sequence[AblationCell], out: Path) -> dict[str, float]:
    """What training each cell took, where it was not interrupted."""
    found = {}
    for cell in cells:
        log = json.loads((out / "cells" / cell.folder / MODEL / "training_log.json").read_text(encoding="utf-8"))
        if log["resumed_from"] is None:
            found[cell.folder] = log["seconds"]
    return found
