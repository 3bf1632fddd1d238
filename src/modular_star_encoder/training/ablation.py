"""The ablation of the paper's Table 5: is an exit that was trained together with others better than one trained alone?

A self-distilled model and one single-exit baseline per exit start from the same multi-exit pre-trained checkpoint and
see the same batches; variants of the recipe are compared by the same protocol. Every cell (a kind of model, a seed) is
a run of `finetune` of its own, and resumes on its own.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator
from pydantic import Field as Constraint

from modular_star_encoder.data.splits import RetrievalData
from modular_star_encoder.evaluation.benchmarks import choose_benchmarks, load_benchmark
from modular_star_encoder.evaluation.benchmarks.rows import read_json
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import RetrievalTask, TaskResult, held_out_tasks
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.training.ablation_report import (
    SELF_DISTILLED,
    Values,
    compare,
    without_places,
    write_ablation_report,
)
from modular_star_encoder.training.finetuning import check_recipe, checkpoint_encoder, finetune, prepare_data
from modular_star_encoder.training.recipes import ClassificationRecipe, FinetuningRecipe, PretrainingRecipe
from modular_star_encoder.training.runs import ADAPTER, CHECKPOINTS, LOG, MODEL, open_run, processes_of_run
from modular_star_encoder.training.starting_points import has_weights, starting_source
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_json
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

SCORES, STARTS = "scores.json", "starting_points.json"

# Cells that differ in these settings are not comparable.
_FIXED = {"data", "eval_fraction", "max_train_samples", "seed", "exit_layer", "eval_pairs", "task"}
_OLD_KEYS = FinetuningRecipe.OLD_KEYS


def _variant_name(name: str) -> str:
    """Names are folders, and those of the self-distilled model and the baselines are taken."""
    if not re.fullmatch(r"\w[\w.-]*", name) or name == SELF_DISTILLED or name.startswith("exit-"):
        raise ValueError(f"must be a word other than {SELF_DISTILLED} and exit-K")
    return name


VariantName = Annotated[str, AfterValidator(_variant_name)]


class AblationCell(NamedTuple):
    """One model to train.

    Attributes:
        name: `self-distilled`, `exit-4` for the baseline of that exit, or that of a variant.
        recipe: its fine-tuning; the seed of the recipe is that of the cell.
    """

    name: str
    recipe: FinetuningRecipe

    @property
    def folder(self) -> str:
        """Its folder, relative to that of the cells."""
        return f"{self.name}/seed-{self.recipe.seed}"


@settings_class
class AblationRecipe:
    """The models to train and the benchmarks to measure them on.

    Args:
        finetuning: settings of the self-distilled model (see `FinetuningRecipe`), which trains all exits. Its seed
            decides which rows are held out in all cells.
        seeds: one model of each kind for each seed; seeds decide new heads, batches, renaming and dropout.
        exit_layers: exits with a single-exit baseline; all of the model if None.
        baselines: whether to train single-exit baselines: the same checkpoint cut at that exit, its own head only, and
            the same data, batches and steps. The loss of the one exit has weight 1, and has no terms of other exits.
        variants: name → settings that differ from `finetuning`, with dots for settings inside settings, such as
            `objective.distillation_weight: 1`. Each is compared with the self-distilled model.
        held_out: whether the rows held out from the data are measured.
        benchmarks: further ones, by the names of `mose evaluate`; retrieval only.
        benchmark_data: folder of their files.
        allow_subset: whether partial files of benchmarks are accepted.
        keep_models: whether the weights of measured models stay on disk.
    """

    EXAMPLE: ClassVar[str] = "hub_configs/small/ablation.yaml"

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
            raise UserError("ablation.benchmarks", "Nothing is measured: set held_out, or name benchmarks.")
        if self.benchmarks and self.benchmark_data is None:
            raise UserError("ablation.benchmark_data", "benchmarks need benchmark_data, the folder of their files.")
        for changes in self.variants.values():
            parts = {key: key.partition(".")[0] for key in changes}
            if fixed := sorted(key for key, part in parts.items() if {part, _OLD_KEYS.get(part)} & _FIXED):
                raise UserError(
                    "ablation.variants", f"variants must not change {', '.join(fixed)}: all cells share it."
                )

    def base(self) -> FinetuningRecipe:
        """The recipe of the self-distilled model, with the seed of the data."""
        return self._recipe({}, "finetuning")

    def cells(self, exit_layers: Sequence[int]) -> list[AblationCell]:
        """Every model to train, seed by seed.

        Args:
            exit_layers: exits of the model.

        Raises:
            UserError: the recipe names an exit that the model does not have, or the settings of a cell are wrong.
        """
        wanted = list(exit_layers if self.exit_layers is None else self.exit_layers)
        if unknown := sorted(set(wanted) - set(exit_layers)):
            exits = ", ".join(map(str, exit_layers))
            raise UserError(
                "ablation.exit_layers",
                f"exit_layers names {', '.join(map(str, unknown))}; the model's exits are {exits}.",
            )
        kinds: dict[str, Mapping[str, Any]] = {SELF_DISTILLED: {}}
        if self.baselines:
            kinds |= {f"exit-{exit_layer}": self._alone(exit_layer) for exit_layer in wanted}
        kinds |= self.variants
        return [
            AblationCell(name, self._recipe({**changes, "seed": seed}, name))
            for seed in self.seeds
            for name, changes in kinds.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values; those of `finetuning` with their defaults."""
        return asdict(self) | {"finetuning": self.base().to_dict()}

    def _alone(self, exit_layer: int) -> dict[str, Any]:
        """The changes of a baseline: its exit, and the base's options about other exits switched off."""
        changes: dict[str, Any] = {"exit_layer": exit_layer, "exit_weights": "uniform", "rotate_shallow_exits": False}
        objective = self.base().objective
        for weight in ("distillation_weight", "alignment_weight"):
            if getattr(objective, weight):
                changes[f"objective.{weight}"] = 0.0
        if isinstance(objective.dimensions, Mapping):
            changes["objective.dimensions"] = objective.dimensions.get(exit_layer)
        return changes

    def _recipe(self, changes: Mapping[str, Any], name: str) -> FinetuningRecipe:
        settings = copy.deepcopy(dict(self.finetuning))
        for key, value in changes.items():
            set_dotted(settings, key, value, name)
        return build_settings(FinetuningRecipe, settings, name)


def recipe_reference(command: str) -> str:
    """Every key of the recipes of `pretrain`, `finetune` or `ablate`: type, default and meaning, one line each."""
    kinds: dict[str, dict[str, type]] = {
        "pretrain": {"settings": PretrainingRecipe},
        "finetune": {
            "settings with task: retrieval": FinetuningRecipe,
            "settings with task: classification": ClassificationRecipe,
        },
        "ablate": {"settings": AblationRecipe},
    }
    parts = [f"{title}:\n{format_reference(kind)}\n" for title, kind in kinds[command].items()]
    return "\n".join([*parts, "Every other argument of transformers.TrainingArguments is a setting, too.\n"])


def ablate(
    recipe: AblationRecipe,
    out: str | os.PathLike,
    *,
    command: str = "",
    progress: bool = True,
    announce: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and measure every cell, and compare them; finished cells in `out` are kept.

    `out` gets `data/` (rows, shared by all cells), `starting_points.json` (checksums of the models that cells start
    from), `cells/{name}/seed-{seed}/` (each a run of `finetune` with `scores.json`), and in the end `ablation.md`,
    `ablation.json` and, where matplotlib is installed, `ablation.png`. Later calls may have more seeds, variants and
    benchmarks; models that were not kept are trained again for these. With several processes each calls this.

    Args:
        recipe: the settings.
        out: folder of the ablation.
        command: the command line, for the reports.
        progress: whether to show progress bars.
        announce: called with a line about each cell.

    Returns:
        The content of `ablation.json`; see `compare`.

    Raises:
        UserError: the recipe contradicts itself or the model, or `out` holds cells of other settings or of another
            starting point.
    """
    out, state, base = Path(out), processes_of_run(), recipe.base()
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
    """Raise UserError if a folder holds something that no ablation wrote; a killed one leaves hidden files."""
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if out.is_file() or (visible and "data" not in visible):
        raise UserError("training.run.not_a_run", f"{out} is not empty and holds no ablation; name another folder.")


def _refuse_other_starting_points(cells: Sequence[AblationCell], path: Path) -> None:
    """Raise UserError if a model that cells start from has other weights than in an earlier call."""
    known = read_json(path) if path.is_file() else {}
    found = {name: checkpoint_checksum(starting_source(name)[0]) for name in {cell.recipe.model for cell in cells}}
    if other := ", ".join(sorted(name for name in found if known.get(name, found[name]) != found[name])):
        raise UserError(
            "ablation.starting_points",
            f"The cells in {path.parent} started from other weights of {other}; name another folder.",
        )
    write_json(path, known | found)


def _benchmarks(recipe: AblationRecipe) -> list[RetrievalTask]:
    """The tasks of the recipe's benchmarks.

    Raises:
        UserError: a benchmark that does not rank.
        ValueError: an unknown name or a damaged file.
    """
    tasks: list[RetrievalTask] = []
    folder = recipe.benchmark_data or ""
    for name in choose_benchmarks(recipe.benchmarks, folder):
        for task in load_benchmark(name, folder, allow_subset=recipe.allow_subset):
            if not isinstance(task, RetrievalTask) or task.metrics[0] != "mrr":
                raise UserError("ablation.benchmarks", f"{task.benchmark} has no MRR; choose a retrieval benchmark.")
            tasks.append(task)
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
    names = [task.checksum() for task in tasks]
    with state.main_process_first():
        open_run(run, cell.recipe, "an ablation", until_trained=cell.recipe.to_dict())
        known = _read_scores(run)
        if not set(names) <= set(known) and not has_weights(run / MODEL):
            # An earlier call kept no models, and this one is still to be measured on other tasks.
            shutil.rmtree(run / MODEL, ignore_errors=True)
    if not set(names) <= set(known):
        finetune(cell.recipe, run, data=data, progress=progress, announce=lambda _: None)
        if state.is_main_process:
            missing = [task for task, name in zip(tasks, names, strict=True) if name not in known]
            encoder = checkpoint_encoder(cell.recipe, run / MODEL)
            measured = evaluate_tasks(missing, [EmbeddingRetriever(encoder)], progress=progress)
            write_json(run / SCORES, known | _by_task(missing, measured))
        state.wait_for_everyone()
        known = _read_scores(run)
    if state.is_main_process:
        _clean(run, recipe.keep_models)
    found: dict[str, dict[int, Any]] = {}
    for task, name in zip(tasks, names, strict=True):
        for exit_layer, ranks in known[name].items():
            found.setdefault(task.benchmark, {}).setdefault(int(exit_layer), {})[task.name] = ranks
    return found


def _by_task(tasks: Sequence[RetrievalTask], cells: Sequence[TaskResult]) -> dict[str, dict[str, dict[str, float]]]:
    """Checksum of a task → exit → query → reciprocal rank; embeddings whole, where they can be cut."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    checksums = {(task.benchmark, task.name): task.checksum() for task in tasks}
    for cell in sorted(cells, key=lambda cell: cell.dimensions or 0):
        place = found.setdefault(checksums[cell.benchmark, cell.task], {})
        place[str(cell.exit_layer)] = dict(zip(cell.ids, cell.values, strict=True))
    return found


def _read_scores(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Checksum of a task → exit → query → reciprocal rank; empty before the cell is measured."""
    path = run / SCORES
    return read_json(path) if path.is_file() else {}


def _clean(run: Path, keep_model: bool) -> None:
    """Remove the checkpoints of a measured cell, and its weights unless they are kept."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
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
    """Seconds of the training of each cell that was not interrupted."""
    found = {}
    for cell in cells:
        log = json.loads((out / "cells" / cell.folder / LOG).read_text(encoding="utf-8"))
        if log["resumed_from"] is None:
            found[cell.folder] = log["seconds"]
    return found
