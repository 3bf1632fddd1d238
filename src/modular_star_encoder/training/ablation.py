"""The ablation of the paper's Table 5 (arXiv 2503.03008): is an exit better if it is trained together with others?

From each *start* (weights and settings), models of several *kinds* are trained: all exits together, each exit alone,
and variants (all exits together, with changed settings). A *cell* is one training run: a start, a kind, a learning rate
and a seed; the run's result is stored in a file. Learning rates are chosen by scores on validation rows; all reported
differences come from test rows. The comparison makes sense only if deep exits are better than shallow exits. So first
the deepest and the shallowest exit are trained alone, and the other models of a start are trained only if the gain of
the deepest exit reaches the recipe's `gate`.
"""

import copy
import hashlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import AfterValidator
from pydantic import Field as Constraint
from transformers import PrinterCallback
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from modular_star_encoder.data.collators import RetrievalCollator
from modular_star_encoder.data.finetuning_rows import RetrievalBatches, RetrievalTexts
from modular_star_encoder.data.pairs import RetrievalExample
from modular_star_encoder.data.splits import BatchPlan, PairGroups, hashed_order, prepare_retrieval_data
from modular_star_encoder.evaluation.benchmarks.rows import read_json
from modular_star_encoder.evaluation.report import Row, Table, plot_quality, versions
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import Estimate, held_out_tasks
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.training import runs
from modular_star_encoder.training.distilling import load_teacher, teach, teaching_checksums, unpaired_texts
from modular_star_encoder.training.finetuning import exit_encoder
from modular_star_encoder.training.recipes import ClassificationRecipe, FinetuningRecipe, PretrainingRecipe
from modular_star_encoder.training.starting_points import StartingPoint, add_adapters
from modular_star_encoder.training.trainer import MultiExitTrainer, check_objective
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import user_path, write_json, write_text
from modular_star_encoder.utils.reports import markdown_table, without_places
from modular_star_encoder.utils.settings import (
    Different,
    ExitLayer,
    NonNegative,
    Positive,
    Probability,
    Seed,
    build_settings,
    format_reference,
    set_dotted,
    settings_class,
)

TOGETHER = "together"
RESAMPLES = 10_000
CELLS_PER_REPORT = 10

# Settings that no start and no variant may change, because the results would not be comparable.
_FIXED = {"data", "eval_fraction", "max_train_samples", "seed", "exit_layer", "eval_pairs", "task", "learning_rate"}


def _name(name: str) -> str:
    """Return the name of a start or variant unchanged; ValueError if it is reserved or has a forbidden character."""
    if not re.fullmatch(r"\w[\w.-]*", name) or name == TOGETHER or name.startswith("exit-"):
        raise ValueError(f"may have only letters, digits, _, ., -; must not be `{TOGETHER}` or begin with `exit-`")
    return name


Name = Annotated[str, AfterValidator(_name)]


_Finite = Annotated[float, Constraint(allow_inf_nan=False)]
_Ranks = dict[str, dict[str, Annotated[list[Probability], Constraint(min_length=1)]]]  # {task: {exit: of its queries}}


class _Content(TypedDict):
    """Keys and types of the file that stores the result of one training run (`AblationCell`)."""

    recipe: dict[str, Any]
    seconds: _Finite
    cosines: dict[str, _Finite]
    validation: _Ranks
    test: _Ranks


class AblationCell(NamedTuple):
    """One training run. `kind` says what is trained: `together` (all exits), `exit-4` (only exit 4), or a variant.

    `start` is the name of the starting point.
    """

    start: str
    kind: str
    recipe: FinetuningRecipe

    @property
    def name(self) -> str:
        rate = str(self.recipe.learning_rate).removesuffix(".0")
        return f"{self.start}/{self.kind}/rate-{rate}-seed-{self.recipe.seed}"


@settings_class
class AblationRecipe:
    """Settings of an ablation: the models to train and to compare.

    Args:
        finetuning: settings that all models share; see `FinetuningRecipe`. The seed decides which rows are held out.
            Held-out rows are split by repository into validation rows (to choose learning rates) and test rows.
        starts: {name of a starting point: settings to change in `finetuning`}, such as `model: runs/pretrained/model`.
            Nested settings are written with a dot, such as `distillation.teacher`.
        learning_rates: rates to try, with the first seed, for each exit trained alone and for all exits together; by
            default only the rate in `finetuning`. The rate with the best validation MRR is used with all seeds.
        seeds: each model (of one exit, of all exits, or of a variant) is trained once with each seed.
        exit_layers: exits to train alone; all exits of the model if None.
        gate: smallest gain of the deepest exit over the shallowest, both trained alone, in points of MRR × 100. If the
            gain is smaller, or if its confidence interval includes 0, no other model of the start is trained.
        variants: {name of a variant: settings to change}; a variant trains all exits together with changed settings.
        variants_on: names of the starts from which variants are trained; by default only the start where training all
            exits together lowers MRR most.
    """

    COMMAND: ClassVar[str] = "ablate"

    finetuning: Mapping[str, Any]
    starts: Annotated[Mapping[Name, Mapping[str, Any]], Constraint(min_length=1)] = field(
        default_factory=lambda: {"start": {}}
    )
    learning_rates: Annotated[tuple[Positive, ...], Different] = ()
    seeds: Annotated[tuple[Seed, ...], Constraint(min_length=1), Different] = (0, 1, 2)
    exit_layers: tuple[ExitLayer, ...] | None = None
    gate: NonNegative = 3.0
    variants: Mapping[Name, Mapping[str, Any]] = field(default_factory=dict)
    variants_on: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        changed = {key for changes in (*self.starts.values(), *self.variants.values()) for key in changes}
        if fixed := sorted(name for name in changed if name.partition(".")[0] in _FIXED):
            message = f"`starts` and `variants` can't change {', '.join(fixed)}: remove these settings."
            raise UserError("ablation.variants", message)
        if unknown := sorted(set(self.variants_on or ()) - set(self.starts)):
            message = f"`variants_on` names {', '.join(unknown)}, but `starts` has only {', '.join(self.starts)}."
            raise UserError("ablation.starts", message)

    @property
    def rates(self) -> tuple[float, ...]:
        return self.learning_rates or (self.base().learning_rate,)

    def base(self) -> FinetuningRecipe:
        """Return `finetuning` as a recipe, without the changes of `starts` and `variants`."""
        return build_settings(FinetuningRecipe, copy.deepcopy(dict(self.finetuning)), "finetuning")

    def cell(self, start: str, kind: str, rate: float, seed: int) -> AblationCell:
        """Return the `AblationCell` of a start, a kind, a learning rate and a seed; UserError if a setting is wrong."""
        settings = copy.deepcopy(dict(self.finetuning))
        changes = {**self.starts[start], **self.variants.get(kind, {}), "learning_rate": rate, "seed": seed}
        if kind.startswith("exit-"):
            # Switch off all weights, schedules and terms of the loss that involve other exits.
            changes |= {"exit_layer": int(kind[5:]), "exit_weights": "uniform", "exit_schedule": "all"}
            changes |= dict.fromkeys(("detach_shallow_exits", "share_heads"), False)
            changes |= dict.fromkeys(("objective.alignment_weight", "objective.distillation_weight"), 0.0)
        for key, value in changes.items():
            set_dotted(settings, key, value, kind)
        return AblationCell(start, kind, build_settings(FinetuningRecipe, settings, f"{start}/{kind}"))

    def to_dict(self) -> dict[str, Any]:
        """Return {name: value} of all settings; `finetuning` includes the defaults of `FinetuningRecipe`."""
        return asdict(self) | {"finetuning": self.base().to_dict()}


def recipe_reference(command: str) -> str:
    """Return a text that lists the keys of a recipe for `command` (pretrain, finetune, ablate), with their meaning."""
    kinds: dict[str, type] = {"settings": PretrainingRecipe if command == "pretrain" else AblationRecipe}
    if command == "finetune":
        tasks = {"retrieval": FinetuningRecipe, "classification": ClassificationRecipe}
        kinds = {f"settings with task: {task}": kind for task, kind in tasks.items()}
    parts = [f"{title}:\n{format_reference(kind)}\n" for title, kind in kinds.items()]
    others = "Every other argument of transformers.TrainingArguments is a setting, too."
    shown = "The packaged recipes set all required keys, and change some defaults: see `mose recipes show NAME`."
    return "\n".join([*parts, others, shown, ""])


def ablate(
    recipe: AblationRecipe,
    out: str | os.PathLike,
    *,
    command: str = "",
    progress: bool = True,
    announce: Callable[[str], None] = print,  # called before each training run, and if checkpoints are removed
) -> dict[str, Any]:
    """Train and evaluate the models whose results are missing in the folder `out`, then compare all models.

    `out/data/` gets the rows of the data, `out/cells/` a file for each training run. `ablation.json` (the result, see
    `Results.summary`), `ablation.md` and `ablation.png` are written after every ten runs and at the end.
    """
    cells = _Cells(recipe, Path(out), progress, announce)

    def report(done: bool) -> dict[str, Any]:
        content = {"command": without_places(command), "recipe": without_places(recipe.to_dict()), "finished": done}
        content |= {**cells.results.summary(), "versions": dict(versions())}
        write_json(Path(out) / "ablation.json", content)
        write_text(Path(out) / "ablation.md", to_markdown(content))
        if find_spec("matplotlib"):
            plot_ablation(content, Path(out) / "ablation.png")
        return content

    for cell in _plan(cells.results):
        trained = cells.add(cell)
        cells.trained += trained
        if trained and cells.trained % CELLS_PER_REPORT == 1:
            report(done=False)
    return report(done=True)


@dataclass(frozen=True)
class Results:
    """The results of an ablation's training runs, and the comparison of their models."""

    recipe: AblationRecipe
    exits: Sequence[int]  # all exits of the model, ascending
    # {(start, kind of model, learning rate, seed): content of the file with the result of this run}
    found: dict[tuple[str, str, float, int], Mapping[str, Any]] = field(default_factory=dict)

    def best_rate(self, start: str, kind: str) -> float:
        """Return the learning rate with which models of `kind` have the best validation MRR with the first seed.

        The MRR is the mean over exits and tasks.
        """

        def mrr(rate: float) -> float:
            tasks = self.found[start, kind, rate, self.recipe.seeds[0]]["validation"].values()
            return float(np.mean([np.mean(values) for task in tasks for values in task.values()]))

        return max(self.recipe.rates, key=mrr)

    def tried(self, start: str) -> list[str]:
        """Return the kinds of models, such as `exit-4`, trained from `start` with every learning rate; no variants."""
        known = dict.fromkeys(kind for of_start, kind, _, _ in self.found if of_start == start)
        runs = {kind: [(start, kind, rate, self.recipe.seeds[0]) for rate in self.recipe.rates] for kind in known}
        return [kind for kind in runs if kind not in self.recipe.variants and self.found.keys() >= {*runs[kind]}]

    def ranks(self, start: str, kind: str, exit_layer: int) -> dict[str, np.ndarray] | None:
        """Return the reciprocal ranks of models of `kind` at an exit, as {task: array of shape (seeds, test queries)}.

        The models are those with the best learning rate; None if one of the seeds has no result.
        """
        own = TOGETHER if kind in self.recipe.variants else kind
        if own not in self.tried(start):
            return None
        keys = [(start, kind, self.best_rate(start, own), seed) for seed in self.recipe.seeds]
        if any(key not in self.found for key in keys):
            return None
        tasks = self.found[keys[0]]["test"]
        return {task: np.array([self.found[key]["test"][task][str(exit_layer)] for key in keys]) for task in tasks}

    def gate(self, start: str) -> dict[str, Any]:
        """Return the `estimate` of the gain of the deepest over the shallowest exit, both trained alone, and `passed`.

        `passed` says whether the gain reaches the recipe's `gate` and its interval is above 0; None means unknown.
        """
        first, last = (self.ranks(start, f"exit-{e}", e) for e in (self.exits[0], self.exits[-1]))
        if first is None or last is None:
            return {"passed": None}
        difference = estimate(_differences(last, first), len(self.recipe.starts))
        return {"passed": difference["value"] >= self.recipe.gate and difference["low"] > 0, **difference}

    def summary(self) -> dict[str, Any]:
        """Return a comparison of exits trained together, exits trained alone, and variants.

        An entry of `starts` has `gate`, `rates` {kind of model: best learning rate}, `exits` {exit: {`together`,
        `alone`, `difference`}}, `mean_difference` and `variants` {name: {`exits`: {exit: {`score`, `from_together`,
        `from_alone`}}}}; scores and differences are results of `estimate`, and models without results for all seeds
        are left out. Intervals of `difference` hold jointly for all exits and starts; intervals of `from_together` and
        `from_alone` hold jointly for all exits and variants of a start.
        """
        cells = []
        for (start, kind, rate, seed), content in self.found.items():
            scores = {part: _by_exit(content[part]) for part in ("validation", "test")}
            costs = {name: content[name] for name in ("seconds", "cosines")}
            cells.append({"start": start, "kind": kind, "rate": rate, "seed": seed, **scores, **costs})
        starts = {start: self._summary_of(start) for start in self.recipe.starts}
        return {"exits": list(self.exits), "seeds": list(self.recipe.seeds), "cells": cells, "starts": starts}

    def _summary_of(self, start: str) -> dict[str, Any]:
        def known(kind: str) -> dict[int, dict[str, np.ndarray]]:
            found = {e: self.ranks(start, kind.format(e), e) for e in self.exits}
            return {e: ranks for e, ranks in found.items() if ranks is not None}

        recipe, alone, together = self.recipe, known("exit-{}"), known(TOGETHER)
        rates = {kind: self.best_rate(start, kind) for kind in self.tried(start)}
        result: dict[str, Any] = {"gate": self.gate(start), "rates": rates, "exits": {}, "variants": {}}
        for e in self.exits:
            both = {kind: list(of[e].values()) for kind, of in ((TOGETHER, together), ("alone", alone)) if e in of}
            result["exits"][str(e)] = {kind: estimate(values) for kind, values in both.items()}
        differences = {e: _differences(together[e], alone[e]) for e in together if e in alone}
        for e, values in differences.items():
            result["exits"][str(e)]["difference"] = estimate(values, len(self.exits) * len(recipe.starts))
        if differences:
            means = [np.mean(of_task, axis=0) for of_task in zip(*differences.values(), strict=True)]
            result["mean_difference"] = estimate(means)
        comparisons = len(self.exits) * max(1, len(recipe.variants))
        for name in recipe.variants:
            by_exit = {}
            for e, own in known(name).items():
                others = {"from_together": together[e]} | ({"from_alone": alone[e]} if e in alone else {})
                changes = {to: estimate(_differences(own, other), comparisons) for to, other in others.items()}
                by_exit[str(e)] = {"score": estimate(list(own.values())), **changes}
            if by_exit:
                result["variants"][name] = {"exits": by_exit}
        return result


def _differences(own: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [own[task] - other[task] for task in own]


def _by_exit(tasks: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return {exit: mean score × 100}, the mean over tasks of the mean over queries.

    `tasks` is {task: {exit: score of each query}}.
    """
    exits = next(iter(tasks.values()))
    return {e: round(100 * float(np.mean([np.mean(task[e]) for task in tasks.values()])), 2) for e in exits}


def _plan(results: Results) -> Iterator[AblationCell]:
    """Yield the training runs in order; the caller adds each result to `results`, because later runs depend on it."""
    recipe, exits = results.recipe, results.exits

    def cells(start: str, kind: str) -> Iterator[AblationCell]:
        for rate in recipe.rates if kind not in recipe.variants else ():
            yield recipe.cell(start, kind, rate, recipe.seeds[0])
        rate = results.best_rate(start, kind if kind not in recipe.variants else TOGETHER)
        for seed in recipe.seeds:
            yield recipe.cell(start, kind, rate, seed)

    for start in recipe.starts:
        for e in (exits[0], exits[-1]):
            yield from cells(start, f"exit-{e}")
    passed = [start for start in recipe.starts if results.gate(start)["passed"]]
    alone = [f"exit-{e}" for e in (exits if recipe.exit_layers is None else recipe.exit_layers)]
    for start in passed:
        for kind in dict.fromkeys([TOGETHER, *alone]):
            yield from cells(start, kind)
    chosen = recipe.variants_on
    if chosen is None and passed:
        starts = results.summary()["starts"]
        chosen = (min(passed, key=lambda start: starts[start]["mean_difference"]["value"]),)
    for start in chosen or ():
        for kind in recipe.variants if start in passed else ():
            yield from cells(start, kind)


class _Cells:
    """Trains the models of an ablation and stores each result as a file in `out`; `results` has all results."""

    def __init__(self, recipe: AblationRecipe, out: Path, progress: bool, announce: Callable[[str], None]) -> None:
        base = recipe.base()
        self.out, self.progress, self.announce = out, progress, announce
        self._texts: dict[str, RetrievalTexts] = {}
        self._checksums: dict[Any, dict[str, str | None]] = {}
        self.trained = 0
        models: dict[str, list[int]] = {}  # {name of a model: its exits}
        for start in recipe.starts:
            varied = recipe.variants if start in (recipe.variants_on or recipe.starts) else ()
            for kind in (TOGETHER, *varied):
                cell = recipe.cell(start, kind, recipe.rates[0], recipe.seeds[0])
                try:
                    models[f"{start}/{kind}"] = list(self._start(cell, out)[0].config.exit_layers)
                except UserError as error:
                    raise UserError(error.key, f"{start}/{kind}: {error}") from error
        exits = next(iter(models.values()))
        if other := next((name for name, own in models.items() if own != exits), ""):
            message = f"All models must have the same exits. {other} has the exits {models[other]}, not {exits}."
            raise UserError("ablation.exits", message)
        if unknown := sorted(set(recipe.exit_layers or ()) - set(exits)):
            message = f"`exit_layers` contains {unknown}, but the model's exits are {exits}."
            raise UserError("ablation.exit_layers", message)
        self.results = Results(recipe, exits)
        if not (out / "cells").is_dir():  # `cells` may have been copied from another machine, without `data`
            runs.check_folder(out, "data", "ablation")
        self._held = runs.hold(out)
        self.data = prepare_retrieval_data(**base.rows(), folder=out / "data", progress=progress)
        self.groups = PairGroups(self.data.train)
        parts = _parts(self.data.held_out)
        self.tasks = {part: held_out_tasks(rows, limit=base.eval_pairs) for part, rows in parts.items()}
        if not all(self.tasks.values()):
            fault = "Too few rows are held out: 2 pairs are needed for validation, 2 of another repository for the test"
            raise UserError("ablation.held_out", f"{fault}. Add rows, or raise `eval_fraction` (at most 0.2).")

    @staticmethod
    def _start(cell: AblationCell, folder: Path) -> tuple[StartingPoint[ModularStarEncoderForRetrieval], Any, Any]:
        """Check the recipe of training run `cell`; return its starting point, training arguments and objective."""
        start = StartingPoint(ModularStarEncoderForRetrieval, cell.recipe)
        arguments = cell.recipe.arguments(folder, progress=False)
        objective = cell.recipe.make_objective()
        check_objective(objective, arguments, start.config, start.config.exit_layers)
        return start, arguments, objective

    def _start_checksums(self, recipe: FinetuningRecipe, with_texts: bool) -> dict[str, str | None]:
        teaching = recipe.distillation
        named = recipe.model, recipe.tokenizer, with_texts, teaching and (teaching.teacher, teaching.texts)
        if named not in self._checksums:
            taught = teaching_checksums(teaching, unpaired_texts(teaching) if with_texts else ())
            own = runs.start_checksums(recipe)
            # Files of older versions have the model's checksum under this name.
            self._checksums[named] = {"checksum": own.pop("model_checksum"), **own, **taught}
        return self._checksums[named]

    def add(self, cell: AblationCell) -> bool:
        """Add the result of run `cell` to `results`, from its file or by training; return whether it was trained."""
        path, recipe = self.out / "cells" / f"{cell.name}.json", cell.recipe
        known = path.is_file()
        teaching = recipe.distillation
        is_here = teaching is not None and os.path.isfile(user_path(teaching.texts or ""))
        checksums = self._start_checksums(recipe, with_texts=is_here or not known)  # finished cells may come without it
        made_from = without_places(recipe.to_dict())
        made_from |= {name: value for name, value in checksums.items() if value or not known}
        if known:
            content = read_json(path, _Content)
            exits = [cell.kind[5:]] if cell.kind.startswith("exit-") else [*map(str, self.results.exits)]
            for part, tasks in self.tasks.items():  # other held-out rows would have other numbers of queries
                made_from[part] = {one.benchmark: dict.fromkeys(exits, len(one.queries)) for one in tasks}
                ranks: Any = content[part]
                content["recipe"][part] = {name: {e: len(of[e]) for e in of} for name, of in ranks.items()}
            runs.check_same(path, {**made_from, **content["recipe"]}, made_from, made_from)
        else:
            begun, now = self.out / "training" / cell.name / "recipe.json", time.strftime("%H:%M:%S")
            if not begun.is_file() or made_from | read_json(begun, dict) != made_from:
                if any(begun.parent.glob("checkpoint-*")):
                    self.announce(f"{now} {cell.name}: removing checkpoints of another recipe or of an older version")
                if begun.parent.exists():
                    shutil.rmtree(begun.parent)
                begun.parent.mkdir(parents=True)
                write_json(begun, made_from)
            self.announce(f"{now} training {cell.name}")
            content = {"recipe": made_from, **self._train(cell)}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
        # Removed only now, because an interrupted evaluation continues from the trained model.
        shutil.rmtree(self.out / "training" / cell.name, ignore_errors=True)
        self.results.found[cell.start, cell.kind, recipe.learning_rate, recipe.seed] = content
        return not known

    def _train(self, cell: AblationCell) -> dict[str, Any]:
        """Train and evaluate the model of `cell`; return the content of the result's file, without `recipe`."""
        recipe, lengths = cell.recipe, cell.recipe.lengths()
        folder = self.out / "training" / cell.name
        start, arguments, objective = self._start(cell, folder)
        model, tokenizer = start.load()
        arguments.set_evaluate(strategy="no")
        key = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        prompts = model.config.instruction_prompts
        if key not in self._texts:
            self._texts[key] = RetrievalTexts(self.data.train, tokenizer, prompts=prompts, progress=False, **lengths)
        plan = BatchPlan(self.groups, recipe.batch_size, recipe.seed)
        renamed, texts = recipe.identifier_rename_prob, self._texts[key]
        rows: Any = RetrievalBatches(texts, plan, recipe.max_steps, identifier_rename_prob=renamed)
        if settings := recipe.distillation:
            teacher = load_teacher(settings, model.config.projection_size)
            unpaired, longest = unpaired_texts(settings), max(lengths.values())
            rows, _, _ = teach(settings, teacher, model, tokenizer, rows, rows, unpaired, longest, False)
        collator = RetrievalCollator(tokenizer)
        adapted = add_adapters(model, recipe.lora)
        trainer = MultiExitTrainer(adapted, arguments, objective, train_dataset=rows, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        log = runs.train_to_the_end(trainer, folder, progress=False)
        encoder = exit_encoder(model, tokenizer, cell.name, max(lengths.values()))
        scores: dict[str, Any] = {}
        for part, tasks in self.tasks.items():
            for result in evaluate_tasks(tasks, [EmbeddingRetriever(encoder)], progress=False):
                of_task = scores.setdefault(part, {}).setdefault(result.benchmark, {})
                # A model with nested embedding sizes has one result per size. The last, of the full size, is kept.
                of_task[str(result.exit_layer)] = [round(float(value), 5) for value in result.values]
        history = [line for line in log["log_history"] if "loss" in line]
        cosines = {name for line in history for name in line if name.startswith("gradient_cosine")}
        means = {name: float(np.mean([line[name] for line in history if name in line])) for name in cosines}
        by_layer = {name.rpartition("_")[2]: mean for name, mean in means.items()}
        loss = history[-1]["loss"] if history else None
        return {"seconds": log["seconds"], "loss": loss, "cosines": by_layer, **scores}


def _parts(rows: Sequence[RetrievalExample]) -> dict[str, list[RetrievalExample]]:
    """Return {"validation": rows, "test": rows}: `rows` split into about equal halves without a common repository."""
    names = [row.repository or str(place) for place, row in enumerate(rows)]
    sizes, first, taken = Counter(names), set(), 0
    for name in hashed_order(sizes, 0):
        if 2 * taken < len(rows):
            first.add(name)
        taken += sizes[name]
    parts: dict[str, list[RetrievalExample]] = {"validation": [], "test": []}
    for name, row in zip(names, rows, strict=True):
        parts["validation" if name in first else "test"].append(row)
    return parts


@cache
def _resamples(size: int, seed: int) -> np.ndarray:
    """Return bootstrap samples of `size` items, float32 (RESAMPLES, size): the weight of each item in each sample."""
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
    return np.divide(draws, size, dtype=np.float32)


def estimate(values: Sequence[np.ndarray], comparisons: int = 1) -> dict[str, Any]:
    """Return the mean × 100 of `values` as {`value`, `low`, `high`, `by_seed`}; `by_seed` lists the mean of each seed.

    `values` has an array of shape (seeds, queries) for each task. `low` and `high` are the bounds of a bootstrap
    interval, for which seeds and, within each task, queries are drawn. To compare two models, pass the differences of
    their values. For a family of `comparisons` estimates, all intervals hold jointly with 95 % (Bonferroni).
    """
    of_seeds = _resamples(len(values[0]), 0)
    draws = np.zeros(RESAMPLES)
    for task in values:
        draws += ((_resamples(task.shape[1], 1) @ task.T.astype(np.float32)) * of_seeds).sum(axis=1) / len(values)
    tail = 2.5 / comparisons
    low, high = np.percentile(draws, [tail, 100 - tail])
    by_seed = np.mean([task.mean(axis=1) for task in values], axis=0)
    found = {"value": by_seed.mean(), "low": low, "high": high}
    rounded = {name: round(100 * float(value), 2) for name, value in found.items()}
    return rounded | {"by_seed": [round(100 * float(value), 2) for value in by_seed]}


def to_markdown(results: Mapping[str, Any]) -> str:
    """Return the report of an ablation in Markdown; `results` is the dict that `ablate` returns."""
    recipe, exits = results["recipe"]["finetuning"], results["exits"]
    rows = [["start", "difference", "interval", "depth pays"]]
    for name, one in results["starts"].items():
        passed = {True: "yes", False: "no", None: "not run"}[one["gate"]["passed"]]
        rows.append([name, *_signed(one["gate"]), passed])
    parts = [
        "# Ablation: exits trained together and alone",
        *([f"    {results['command']}"] if results["command"] else []),
        f"MRR × 100 on test rows, means over seeds {', '.join(map(str, results['seeds']))}; {recipe['max_steps']} "
        f"steps of {recipe['batch_size']} pairs. Intervals: 95 % together (Bonferroni), bootstrap over queries and "
        "seeds, paired. The learning rate of each kind was chosen on validation rows.",
        *([] if results["finished"] else ["Training runs are missing; run the same command again to add them."]),
        "## Gate: deepest exit alone − shallowest exit alone",
        "\n".join(markdown_table(rows)),
    ]
    for name, found in results["starts"].items():
        if not found["rates"]:
            continue
        rows = [["exit", TOGETHER, "alone", "difference", "interval", "by seed"]]
        for e, one in found["exits"].items():
            difference = one.get("difference")
            seeds = ", ".join(f"{value:+.1f}" for value in difference["by_seed"]) if difference else ""
            scores = [f"{one[kind]['value']:.1f}" if kind in one else "" for kind in (TOGETHER, "alone")]
            rows.append([e, *scores, *_signed(difference), seeds])
        if "mean_difference" in found:
            rows.append(["mean", "", "", *_signed(found["mean_difference"]), ""])
        rates = ", ".join(f"{kind} {rate:g}" for kind, rate in found["rates"].items())
        parts += [f"## Start: {name}", "\n".join(markdown_table(rows)), f"Learning rates: {rates}."]
        for other in ("alone", TOGETHER) if found["variants"] else ():
            rows = [[f"difference from {other}", *(f"exit {e}" for e in exits)]]
            for kind in results["recipe"]["variants"]:
                by_exit = found["variants"].get(kind, {"exits": {}})["exits"]
                cells = [" (".join(filter(None, _signed(by_exit.get(str(e), {}).get(f"from_{other}")))) for e in exits]
                rows.append([kind, *(f"{cell})" if cell else "not run" for cell in cells)])
            parts.append("\n".join(markdown_table(rows)))
    return "\n\n".join(parts) + "\n"


def _signed(found: Mapping[str, Any] | None) -> list[str]:
    """Return the value and the interval of an estimate as two texts with signs; two empty texts if there is none."""
    if not found or "value" not in found:
        return ["", ""]
    return [f"{found['value']:+.1f}", f"{found['low']:+.1f} to {found['high']:+.1f}"]


def plot_ablation(results: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with a panel for each start: MRR × 100 by depth, one line for each kind of model.

    The kinds are exits trained together, exits trained alone and, if there are variants, the best variant.
    """
    tables = []
    for name, found in results["starts"].items():
        of_exits = found["exits"].items()
        lines = {kind: {e: one[kind] for e, one in of_exits if kind in one} for kind in (TOGETHER, "alone")}
        variants = {kind: one["exits"] for kind, one in found["variants"].items()}
        if variants and all("alone" in one for one in found["exits"].values()):
            best = max(variants, key=lambda kind: min(one["from_alone"]["value"] for one in variants[kind].values()))
            lines[best] = {e: one["score"] for e, one in variants[best].items()}
        points = [(kind, int(e), one) for kind, of_kind in lines.items() for e, one in of_kind.items()]
        means = [Estimate(*(one[bound] / 100 for bound in ("value", "low", "high"))) for _, _, one in points]
        rows = [Row(kind, e, None, {}, mean, {}, None) for (kind, e, _), mean in zip(points, means, strict=True)]
        if rows:
            tables.append(Table(name, "mrr", rows, "", "", ()))
    if tables:
        plot_quality(tables, path)
