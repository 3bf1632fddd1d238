"""The ablation of the paper's Table 5: is an exit that was trained together with others better than one trained alone?

A self-distilled model and one single-exit baseline per exit start from the same multi-exit pre-trained checkpoint and
see the same batches; variants of the recipe are compared by the same protocol. Every cell (one kind of model with one
seed) is a separate run of `finetune` and resumes separately.

Every estimate is a mean over queries of the mean over seeds. Its interval is a bootstrap over the queries, paired for
differences. Benchmarks of several tasks weigh every task equally (see `spread`).
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import AfterValidator
from pydantic import Field as Constraint

from modular_star_encoder.data.splits import RetrievalData
from modular_star_encoder.evaluation.benchmarks import choose_benchmarks, load_benchmark
from modular_star_encoder.evaluation.benchmarks.rows import read_json
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.metrics import bootstrap_interval, spread
from modular_star_encoder.evaluation.report import versions
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import RetrievalTask, held_out_tasks
from modular_star_encoder.inference.checkpoints import checkpoint_checksum, load_checkpoint
from modular_star_encoder.training import runs
from modular_star_encoder.training.finetuning import check_recipe, exit_encoder, finetune, prepare_data
from modular_star_encoder.training.recipes import ClassificationRecipe, FinetuningRecipe, PretrainingRecipe
from modular_star_encoder.training.starting_points import has_weights, starting_source
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_file, write_json, write_text
from modular_star_encoder.utils.reports import markdown_table, metric_label, percent
from modular_star_encoder.utils.settings import (
    Count,
    Different,
    Seed,
    Switch,
    build_settings,
    format_reference,
    set_dotted,
    settings_class,
)

SELF_DISTILLED = "self-distilled"
SCORES, STARTS = "scores.json", "starting_points.json"

# Cells that differ in these settings are not comparable.
_FIXED = {"data", "eval_fraction", "max_train_samples", "seed", "exit_layer", "eval_pairs", "task"}

# Task → query → value.
Values = Mapping[str, Mapping[str, float]]
# (Kind of model, seed) → benchmark → exit → the reciprocal rank of each query.
Scores = Mapping[tuple[str, int], Mapping[str, Mapping[int, Values]]]
# Metric → the function that computes it from a reciprocal rank.
METRICS: dict[str, Callable[[float], float]] = {"mrr": float, "recall@1": lambda rank: float(rank == 1.0)}


def _variant_name(name: str) -> str:
    """Return a variant's name; ValueError if it can't name a folder or already names another kind of model."""
    if not re.fullmatch(r"\w[\w.-]*", name) or name == SELF_DISTILLED or name.startswith("exit-"):
        raise ValueError(f"must be one word, not {SELF_DISTILLED}, and must not begin with exit-")
    return name


VariantName = Annotated[str, AfterValidator(_variant_name)]


class AblationCell(NamedTuple):
    """One model to train: its name (`self-distilled`, `exit-4` for the baseline at exit 4, or a variant) and recipe."""

    name: str
    recipe: FinetuningRecipe

    @property
    def folder(self) -> str:
        return f"cells/{self.name}/seed-{self.recipe.seed}"


@settings_class
class AblationRecipe:
    """The models to train and the benchmarks to measure them on.

    Args:
        finetuning: settings of the self-distilled model (see `FinetuningRecipe`), which trains all exits. Its seed
            decides which rows are held out in all cells.
        seeds: each seed trains one model of each kind and determines its new heads, batches, renaming and dropout.
        exit_layers: exits that get a single-exit baseline; all exits of the model if None.
        baselines: whether to train single-exit baselines: the same checkpoint, cut at the exit, with only this exit's
            head, on the same data, batches and steps. The exit's loss has weight 1 and no terms from other exits.
        variants: name → settings that differ from `finetuning`, with dots for settings inside settings, such as
            `objective.distillation_weight: 1`. Each is compared with the self-distilled model.
        held_out: whether to evaluate on the rows held out from the data.
        benchmarks: retrieval benchmarks to evaluate on, by their names in `mose evaluate`.
        benchmark_data: folder with the files of the benchmarks.
        allow_subset: whether to accept partial benchmark files.
        keep_models: whether to keep the weights of evaluated models on disk.
    """

    COMMAND: ClassVar[str] = "ablate"

    finetuning: Mapping[str, Any]
    seeds: Annotated[tuple[Seed, ...], Constraint(min_length=1), Different] = (0, 1, 2)
    exit_layers: tuple[Count, ...] | None = None
    baselines: Switch = True
    variants: Mapping[VariantName, Mapping[str, Any]] = field(default_factory=dict)
    held_out: Switch = True
    benchmarks: tuple[str, ...] = ()
    benchmark_data: str | None = None
    allow_subset: Switch = False
    keep_models: Switch = True

    def __post_init__(self) -> None:
        if not self.held_out and not self.benchmarks:
            raise UserError("ablation.benchmarks", "Nothing would be measured: set held_out=true or `benchmarks`.")
        if self.benchmarks and self.benchmark_data is None:
            raise UserError("ablation.benchmark_data", "`benchmarks` needs `benchmark_data`, the folder of its files.")
        for changes in self.variants.values():
            if fixed := [key for key in changes if key.partition(".")[0] in _FIXED]:
                message = f"`variants` must not change {', '.join(sorted(fixed))}: all models share these settings."
                raise UserError("ablation.variants", message)

    def base(self) -> FinetuningRecipe:
        """Return the recipe of the self-distilled model; its seed decides which rows are held out."""
        return self._recipe({}, "finetuning")

    def cells(self, exit_layers: Sequence[int]) -> list[AblationCell]:
        """Return all models to train from a checkpoint with these exits, seed by seed; UserError for wrong settings."""
        chosen = exit_layers if self.exit_layers is None else self.exit_layers
        if unknown := sorted(set(chosen) - set(exit_layers)):
            message = f"`exit_layers` names {unknown}, but the model's exits are {list(exit_layers)}."
            raise UserError("ablation.exit_layers", message)
        kinds: dict[str, Mapping[str, Any]] = {SELF_DISTILLED: {}}
        if self.baselines:
            kinds |= {f"exit-{exit_layer}": self._alone(exit_layer) for exit_layer in chosen}
        kinds |= self.variants
        return [
            AblationCell(name, self._recipe({**changes, "seed": seed}, name))
            for seed in self.seeds
            for name, changes in kinds.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values; `finetuning` includes its defaults."""
        return asdict(self) | {"finetuning": self.base().to_dict()}

    def _alone(self, exit_layer: int) -> dict[str, Any]:
        """Return the settings in which the single-exit baseline of `exit_layer` differs from the base recipe."""
        objective = self.base().objective
        changes = {"exit_layer": exit_layer, "exit_weights": "uniform", "exit_schedule": "all"}
        changes |= {"objective.distillation_weight": 0.0, "objective.alignment_weight": 0.0}
        if isinstance(objective.dimensions, Mapping):
            changes["objective.dimensions"] = objective.dimensions.get(exit_layer)
        return changes

    def _recipe(self, changes: Mapping[str, Any], name: str) -> FinetuningRecipe:
        settings = copy.deepcopy(dict(self.finetuning))
        for key, value in changes.items():
            set_dotted(settings, key, value, name)
        return build_settings(FinetuningRecipe, settings, name)


def recipe_reference(command: str) -> str:
    """Return the type, default and meaning of every recipe key of `pretrain`, `finetune` or `ablate`, one per line."""
    kinds: dict[str, type] = {"settings": PretrainingRecipe if command == "pretrain" else AblationRecipe}
    if command == "finetune":
        tasks = {"retrieval": FinetuningRecipe, "classification": ClassificationRecipe}
        kinds = {f"settings with task: {task}": kind for task, kind in tasks.items()}
    parts = [f"{title}:\n{format_reference(kind)}\n" for title, kind in kinds.items()]
    return "\n".join([*parts, "Every other argument of transformers.TrainingArguments is a setting, too.\n"])


def ablate(
    recipe: AblationRecipe,
    out: str | os.PathLike,
    *,
    command: str = "",
    progress: bool = True,
    announce: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and evaluate every cell (a model with a seed) that the folder `out` does not hold yet; compare all cells.

    `out` gets `data/` (rows, shared by all cells), `starting_points.json` (checksums of the models that cells start
    from), `cells/{name}/seed-{seed}/` (each a run of `finetune` with `scores.json`), and in the end `ablation.md`,
    `ablation.json` and, where matplotlib is installed, `ablation.png`. A later call may add seeds, variants and
    benchmarks; for new benchmarks, models that were not kept are trained again. Every process calls this function.
    UserError if the recipe contradicts itself or the model, or `out` holds cells of another recipe or starting point.

    Args:
        recipe: the settings.
        out: folder of the ablation.
        command: the command line, for the reports.
        progress: whether to show progress bars.
        announce: called with a line about each cell.

    Returns:
        The content of `ablation.json`; see `compare`.
    """
    out, state, base = Path(out), runs.processes_of_run(), recipe.base()
    blueprint, _ = check_recipe(base, out, state.num_processes, progress)
    exits = tuple(blueprint.config.exit_layers)
    cells = recipe.cells(exits)
    for cell in cells:
        try:
            check_recipe(cell.recipe, out, state.num_processes, progress)
        except UserError as error:
            raise UserError(error.key, f"{cell.name}: {error}") from error
    benchmarks = _benchmarks(recipe)
    with state.main_process_first():
        runs.check_folder(out, "data", "ablation")
        data = prepare_data(base.rows(), out / "data", progress and state.is_main_process)
        if state.is_main_process:
            _check_starting_points({cell.recipe.model for cell in cells}, out / STARTS)
    tasks = [*(held_out_tasks(data.held_out, limit=base.eval_pairs) if recipe.held_out else []), *benchmarks]
    scores: dict[tuple[str, int], dict[str, dict[int, Values]]] = {}
    for number, cell in enumerate(cells, 1):
        if state.is_main_process:
            announce(f"cell {number} of {len(cells)}: {cell.name}, seed {cell.recipe.seed}")
        found = _run_cell(cell, data, tasks, out / cell.folder, progress)
        if state.is_main_process:
            shutil.rmtree(out / cell.folder / runs.CHECKPOINTS, ignore_errors=True)
            for folder in () if recipe.keep_models else (runs.MODEL, runs.ADAPTER):
                for file in out.glob(f"{cell.folder}/{folder}/*.safetensors"):
                    file.unlink()
        scores[cell.name, cell.recipe.seed] = found
    if not state.is_main_process:
        return {}
    bm25: dict[str, list[float]] = {}
    for result in evaluate_tasks(tasks, [BM25()], progress=progress):
        bm25.setdefault(result.benchmark, []).append(result.estimates["mrr"].value)
    logs = {cell.folder.partition("/")[2]: read_json(out / cell.folder / runs.LOG) for cell in cells}
    results = {
        "command": _without_places(command),
        "recipe": _without_places(recipe.to_dict()),
        # Only of uninterrupted runs: the log of a resumed run has the seconds of its last call.
        "seconds": {name: log["seconds"] for name, log in logs.items() if log["resumed_from"] is None},
        "bm25": {benchmark: sum(values) / len(values) for benchmark, values in bm25.items()},
        **compare(scores, exits, recipe.seeds, list(recipe.variants)),
    }
    write_json(out / "ablation.json", {**results, "versions": dict(versions())})
    write_text(out / "ablation.md", to_markdown(results))
    if find_spec("matplotlib"):
        plot_ablation(results, out / "ablation.png")
    return results


def _benchmarks(recipe: AblationRecipe) -> list[RetrievalTask]:
    """Load the tasks of the recipe's benchmarks; UserError if one of them is not scored by MRR."""
    folder, found = recipe.benchmark_data or "", []
    for name in choose_benchmarks(recipe.benchmarks, folder) if recipe.benchmarks else ():
        for task in load_benchmark(name, folder, allow_subset=recipe.allow_subset):
            if not isinstance(task, RetrievalTask) or task.metrics[0] != "mrr":
                raise UserError("ablation.benchmarks", f"{task.benchmark} has no MRR; `benchmarks` must not name it.")
            found.append(task)
    return found


def _check_starting_points(models: set[str], path: Path) -> None:
    """Raise UserError if a starting checkpoint's weights changed since an earlier call wrote checksums to `path`."""
    known = read_json(path) if path.is_file() else {}
    found = {name: checkpoint_checksum(starting_source(name)[0]) for name in models}
    if other := ", ".join(sorted(name for name in found if known.get(name, found[name]) != found[name])):
        raise UserError(
            "ablation.starting_points",
            f"The weights of {other} changed since models in {path.parent} started from them; name another folder.",
        )
    write_json(path, known | found)


def _run_cell(
    cell: AblationCell, data: RetrievalData, tasks: Sequence[RetrievalTask], run: Path, progress: bool
) -> dict[str, dict[int, Values]]:
    """Train and evaluate a model unless `run` has its scores; return benchmark → exit → reciprocal ranks of queries."""
    state, path = runs.processes_of_run(), run / SCORES
    by_checksum = {task.checksum(): task for task in tasks}
    with state.main_process_first():
        runs.open_run(run, cell.recipe, "an ablation", until_trained=cell.recipe.to_dict())
        known = read_json(path) if path.is_file() else {}
        missing = [task for checksum, task in by_checksum.items() if checksum not in known]
        if missing and not has_weights(run / runs.MODEL):
            # An earlier call removed the weights, and new tasks need them: train the model again.
            shutil.rmtree(run / runs.MODEL, ignore_errors=True)
    if missing:
        finetune(cell.recipe, run, data=data, progress=progress, announce=lambda _: None, before=False)
        if state.is_main_process:
            checksums = {(task.benchmark, task.name): checksum for checksum, task in by_checksum.items()}
            encoder = exit_encoder(cell.recipe, *load_checkpoint(run / runs.MODEL), cell.name)
            results = evaluate_tasks(missing, [EmbeddingRetriever(encoder)], progress=progress)
            # Embeddings that can be cut have one result per size; the full size comes last and replaces the others.
            for result in sorted(results, key=lambda result: result.dimensions or 0):
                of_task = known.setdefault(checksums[result.benchmark, result.task], {})
                of_task[str(result.exit_layer)] = dict(zip(result.ids, result.values, strict=True))
            write_json(path, known)
        state.wait_for_everyone()
        known = read_json(path)
    found: dict[str, dict[int, Any]] = {}
    for checksum, task in by_checksum.items():
        for exit_layer, ranks in known[checksum].items():
            found.setdefault(task.benchmark, {}).setdefault(int(exit_layer), {})[task.name] = ranks
    return found


def compare(scores: Scores, exits: Sequence[int], seeds: Sequence[int], variants: Sequence[str]) -> dict[str, Any]:
    """Compare self-distilled exits with exits trained alone, and variants with the self-distilled model.

    Returns:
        `exits`, `seeds`, and `benchmarks`: name → `queries`, `exits` (exit → `self_distilled` and, with a baseline,
        `alone` and `difference`), `mean_difference` over these exits, and `variants` (name → see `_variant`). Each
        estimate is `mrr` and `recall@1`, as fractions: `value`, `low` and `high` (95 % interval) of the mean over
        seeds, and `by_seed`.
    """
    benchmarks, models = {}, dict.fromkeys(model for model, _ in scores)
    for name in scores[SELF_DISTILLED, seeds[0]]:
        # Model → exit → the values of each seed.
        by_model = {
            model: {e: [scores[model, seed][name][e] for seed in seeds] for e in scores[model, seeds[0]][name]}
            for model in models
        }
        own = by_model[SELF_DISTILLED]
        alone = {e: by_model[f"exit-{e}"][e] for e in exits if f"exit-{e}" in by_model}
        found: dict[str, Any] = {
            "queries": sum(map(len, own[exits[0]][0].values())),
            "exits": {str(e): {"self_distilled": _estimates([own[e]])} for e in exits},
            "variants": {variant: _variant(by_model[variant], own) for variant in variants},
        }
        for e, other in alone.items():
            found["exits"][str(e)] |= {"alone": _estimates([other]), "difference": _estimates([own[e]], [other])}
        if alone:
            found["mean_difference"] = _estimates([own[e] for e in alone], list(alone.values()))
        benchmarks[name] = found
    return {"exits": list(exits), "seeds": list(seeds), "benchmarks": benchmarks}


def _variant(own: Mapping[int, list[Values]], reference: Mapping[int, list[Values]]) -> dict[str, Any]:
    """Return a variant's scores per exit, their differences from the reference's, the mean difference and a verdict.

    A variant is `recommended` if it raises the mean MRR over exits (the interval of the difference is above 0) and
    lowers no exit (no interval of an exit's difference is below 0).
    """
    by_exit = {
        str(e): {"figures": _estimates([own[e]]), "difference": _estimates([own[e]], [reference[e]])} for e in own
    }
    mean = _estimates(list(own.values()), list(reference.values()))
    lowered = [int(e) for e, found in by_exit.items() if found["difference"]["mrr"]["high"] < 0]
    recommended = mean["mrr"]["low"] > 0 and not lowered
    return {"exits": by_exit, "mean_difference": mean, "lowered_exits": lowered, "recommended": recommended}


def _estimates(
    own: Sequence[list[Values]], reference: Sequence[list[Values]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return metric → mean over exits and seeds, with interval; if `reference` is given, of `own` minus `reference`."""
    found = {}
    for metric, of_rank in METRICS.items():
        by_seed = [_mean(of_seed, of_rank) for of_seed in zip(*own, strict=True)]
        if reference is not None:
            others = [_mean(of_seed, of_rank) for of_seed in zip(*reference, strict=True)]
            by_seed = [
                {task: {query: value - other[task][query] for query, value in of.items()} for task, of in one.items()}
                for one, other in zip(by_seed, others, strict=True)
            ]
        queries = spread(list(_mean(by_seed, float).values()))
        low, high = bootstrap_interval(queries, 0)
        means = [float(np.mean([np.mean(list(task.values())) for task in one.values()])) for one in by_seed]
        found[metric] = {"value": float(queries.mean()), "low": low, "high": high, "by_seed": means}
    return found


def _mean(several: Sequence[Values], function: Callable[[float], float]) -> Values:
    """Apply `function` to every value; return, for each query, the mean of the results over `several`."""
    return {
        task: {query: float(np.mean([function(values[task][query]) for values in several])) for query in queries}
        for task, queries in several[0].items()
    }


def _without_places(value: Any) -> Any:
    """Return a JSON value in which `$MOSE_DATA` and `$HOME` replace the paths that these variables hold."""
    text = json.dumps(value, default=str)
    for variable in ("MOSE_DATA", "HOME"):
        if place := os.environ.get(variable, "").rstrip("/"):
            text = text.replace(json.dumps(place)[1:-1], f"${variable}")
    return json.loads(text)


def to_markdown(results: Mapping[str, Any]) -> str:
    """Format as tables what `compare` returned, with `command`, `recipe` and `bm25` (benchmark → MRR) added to it."""
    seeds = ", ".join(map(str, results["seeds"]))
    recipe = results["recipe"]["finetuning"]
    parts = [
        "# Ablation: exits trained together and alone",
        *([f"    {results['command']}"] if results["command"] else []),
        f"{recipe['max_steps']} steps of {recipe['batch_size']} pairs from {recipe['model']}; means over seeds "
        f"{seeds}. Scores × 100. Intervals: 95 %, bootstrap over queries, paired for differences; ties count against "
        "the retriever.",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    for name, found in results["benchmarks"].items():
        parts.append(f"## {name}")
        parts.append(f"{found['queries']:,} queries; BM25 has an MRR of {percent(results['bm25'][name])}.")
        parts.append("\n".join(markdown_table(_exit_rows(found))))
        if found["variants"]:
            parts.append("Other recipes, compared with the self-distilled model by MRR:")
            parts.append("\n".join(markdown_table(_variant_rows(results["exits"], found["variants"]))))
    return "\n\n".join(parts) + "\n"


def _exit_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["exit"], *([exit_layer] for exit_layer in found["exits"])]
    ones = list(found["exits"].values())
    if "mean_difference" in found:
        rows.append(["mean"])
        ones.append({"difference": found["mean_difference"]})
    for metric in METRICS:
        rows[0] += [metric_label(metric), "alone", "difference", "interval", "by seed"]
        for row, one in zip(rows[1:], ones, strict=True):
            row += [percent(one[kind][metric]["value"]) if kind in one else "" for kind in ("self_distilled", "alone")]
            row += _difference(one["difference"][metric]) if "difference" in one else ["", "", ""]
    return rows


def _variant_rows(exits: Sequence[int], variants: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", *(f"exit {exit_layer}" for exit_layer in exits), "mean", "interval", "by seed", "verdict"]]
    for name, one in variants.items():
        changes = [f"{100 * one['exits'][str(e)]['difference']['mrr']['value']:+.1f}" for e in exits]
        verdict = "recommended" if one["recommended"] else "no gain"
        if one["lowered_exits"]:
            verdict = f"lowers {', '.join(map(str, one['lowered_exits']))}"
        rows.append([name, *changes, *_difference(one["mean_difference"]["mrr"]), verdict])
    return rows


def _difference(figure: Mapping[str, Any]) -> list[str]:
    numbers = [figure["value"], figure["low"], figure["high"], min(figure["by_seed"]), max(figure["by_seed"])]
    value, low, high, least, most = (f"{100 * number:+.1f}" for number in numbers)
    return [value, f"{low} to {high}", f"{least} to {most}"]


def plot_ablation(results: Mapping[str, Any], path: Path) -> None:
    """Plot MRR and Recall@1 of self-distilled and single-exit models against layers, in one row per benchmark."""
    from matplotlib.figure import Figure

    rows, columns = len(results["benchmarks"]), len(METRICS)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for row, (name, found) in zip(panels, results["benchmarks"].items(), strict=True):
        for axes, metric in zip(row, METRICS, strict=True):
            for key, label in (("self_distilled", "self-distilled"), ("alone", "single exits")):
                points = {int(e): one[key][metric] for e, one in found["exits"].items() if key in one}
                value, low, high = ([100 * one[bound] for one in points.values()] for bound in ("value", "low", "high"))
                (line,) = axes.plot(list(points), value, marker="o", label=label)
                axes.fill_between(list(points), low, high, alpha=0.15, color=line.get_color(), linewidth=0)
            axes.set(xlabel="layers", ylabel=f"{metric_label(metric)} × 100", title=name)
            axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    with staged_file(path) as staging:
        figure.savefig(staging, format="png", dpi=120)
