"""Build a dataset from a recipe, stage by stage; a repeated call continues an interrupted build.

Each stage writes to a folder named after the stage, and is finished if this folder has a `report.json`.
"""

import json
import os
import platform
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, with_config
from pydantic import Field as Constraint
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.data.pairs import open_triplets
from modular_star_encoder.data.sources.dataset_rows import open_texts
from modular_star_encoder.data.splits import draw_repositories
from modular_star_encoder.synthconl import extraction
from modular_star_encoder.synthconl.extraction import clean_translation, function_rows, open_source
from modular_star_encoder.synthconl.near_duplicate_job import REPORT, drop_near_duplicates
from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings
from modular_star_encoder.synthconl.publishing import CARD, DATASET_SCHEMA, STATISTICS, dataset_card, dataset_statistics
from modular_star_encoder.synthconl.row_files import read_file, read_rows, row_files, write_rows, write_split
from modular_star_encoder.synthconl.translation import Languages, TranslationSettings, target_language, translate
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import LOCK, folder_lock, read_record, staged_folder, write_json
from modular_star_encoder.utils.settings import Count, Float, Int, Probability, settings_class

SPLITS = ("train", "validation")
LOG = "build.json"

Report = dict[str, Any]


@settings_class
class CardSettings:
    """Texts and metadata for the dataset's card (README.md).

    Args:
        name: title of the card.
        corpus: a sentence that says where the functions come from.
        license: the Hub's id of the dataset's licence, such as `mit`, or `other`.
        license_name, license_link: name and web address of the licence; only used with `license: other`.
        tags: tags in addition to `code` and `code-search`.
    """

    name: str = "SynthCoNL, rebuilt"
    corpus: str = ""
    license: str = "other"
    license_name: str = "as-in-the-repositories"
    license_link: str = ""
    tags: Sequence[str] = ()


@settings_class
class NearDuplicateSettings(DuplicateSettings):
    """Settings of the stage `near_duplicates`: those of `DuplicateSettings`, and the columns to compare.

    Args:
        columns: columns to compare: `func1_CSN` (the functions), `func2` (their translations), or both.
    """

    columns: Annotated[Sequence[Literal["func1_CSN", "func2"]], Constraint(min_length=1)] = ("func1_CSN", "func2")


@with_config({"extra": "allow"})
class TextColumn(TypedDict):
    """Names a column of a dataset: `column` of `source`; any other keys are arguments of `open_dataset_rows`."""

    source: Any
    column: str


Corpora = Annotated[
    tuple[Mapping[str, Any], ...],
    BeforeValidator(lambda corpus: [corpus] if isinstance(corpus, Mapping) else corpus),
    Constraint(min_length=1),
]


@settings_class
class DatasetRecipe:
    """Settings of `build_dataset`, which builds a dataset of functions and translations.

    Args:
        corpus: a source of functions with its options, or a list of such sources; see `extraction.open_source`.
        translation: the model that translates, and its prompt; see `TranslationSettings`.
        languages: languages of the functions to extract.
        max_characters: largest number of characters of a function; longer functions are left out.
        max_syntax_error_share: largest share of a translation's bytes that may fail to parse; 1 accepts any syntax.
        near_duplicates: which rows count as near-duplicates; see `NearDuplicateSettings`.
        against: {name of a benchmark: {`source`: file, folder or Hub id, `column`: name}}; rows that are
            near-duplicates of a text in this column are dropped.
        validation_rows: number of rows to hold out for validation, at most a fifth of all rows. A repository is held
            out as a whole or not at all.
        max_repository_share: a repository with a larger share of all rows is held out only if all smaller repositories
            together have too few rows.
        card: texts and metadata of the dataset's card; see `CardSettings`.
        processes: number of processes that extract functions.
        seed: seed of all random draws: target languages and the validation split.
    """

    corpus: Corpora
    translation: TranslationSettings
    languages: Languages = LANGUAGES
    max_characters: Count = 8000
    max_syntax_error_share: Probability = extraction.MAX_SYNTAX_ERROR_SHARE
    near_duplicates: NearDuplicateSettings = NearDuplicateSettings()
    against: Mapping[str, TextColumn] = field(default_factory=dict)
    validation_rows: Count = 2000
    max_repository_share: Annotated[Float, Constraint(gt=0, le=1)] = 0.05
    card: CardSettings = CardSettings()
    processes: Int = 2
    seed: Int = 0

    def __post_init__(self) -> None:
        for language in self.languages:
            target_language("", language, seed=0, targets=self.translation.targets)

    def stage_settings(self, last: str = "dataset") -> dict[str, dict[str, Any]]:
        """Return the settings that change each stage's result, up to stage `last`: {stage: {setting: JSON value}}."""

        def own(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names}

        settings = {
            "functions": {**own("corpus", "max_characters"), "languages": sorted(self.languages)},
            "translations": {**self.translation.identity(), "seed": self.seed},
            "triplets": own("max_syntax_error_share"),
            "near_duplicates": {**asdict(self.near_duplicates), "against": self.against},
            "split": own("validation_rows", "max_repository_share", "seed"),
            "dataset": {"card": asdict(self.card)},
        }
        some = dict(islice(settings.items(), list(settings).index(last) + 1))
        return json.loads(json.dumps(some, default=str))


def build_dataset(recipe: DatasetRecipe, out: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Build a dataset, or continue an interrupted build with the same recipe; return the dataset's folder.

    A repeated call repeats no finished stage, loses or duplicates no row, and requests only missing translations. `out`
    gets a folder for each of `STAGES`; the last folder, `dataset`, has parquet files in `data`, `statistics.json` and a
    card (README.md).
    """
    build = Build(recipe, Path(out).absolute(), progress)
    _read_log(build)
    _check_inputs(build)
    with folder_lock(build.out):
        log = _read_log(build)
        # Remove the temporary files of a killed process.
        for place in ("", *(f"{stage.__name__}/" for stage in _CONTINUED)):
            for path in build.out.glob(f"{place}.*.tmp"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for stage in STAGES:
            if not build.is_done(stage.__name__):
                _run(build, stage, log)
    return build.out / STAGES[-1].__name__


@dataclass(frozen=True, slots=True)
class Build:
    """A recipe, the folder to build it in, and whether to show progress bars."""

    recipe: DatasetRecipe
    out: Path
    progress: bool = True

    def report(self, stage: str) -> dict[str, Any]:
        """Return the content of a finished stage's `report.json`; UserError if it is damaged."""
        path = self.out / stage / REPORT
        # Answers cost money: with their functions in place, `translate` keeps them and only writes its report again.
        remedy = f"Remove {path if stage == 'translations' else path.parent}, and build again"
        remedy = "Restore the file, or build in another folder" if stage == "functions" else remedy
        return read_record(path, "synthconl.build.damaged", remedy, **_USED[stage])

    def is_done(self, stage: str) -> bool:
        return (self.out / stage / REPORT).is_file()


def functions(build: Build, out: Path) -> Report:
    """Extract the documented functions of the recipe's corpora to Parquet files in `out`; return counts."""
    recipe, counts = build.recipe, Counter[str]()
    options: dict[str, Any] = {"languages": recipe.languages, "max_characters": recipe.max_characters, "counts": counts}
    options |= {"processes": recipe.processes, "progress": build.progress}
    write_rows(out, function_rows(recipe.corpus, **options), extraction.FUNCTION_SCHEMA)
    repositories = {row["repository_name"] for row in read_rows(out, ["repository_name"])}
    if len(repositories) < 2:  # reported now, before the translation is paid for
        if repositories:
            message = f"All functions are in {repositories.pop()!r}. Add another repository to `corpus` for validation."
            raise UserError("synthconl.build.one_repository", message)
        message = f"`corpus` has no documented function to translate ({_listed(counts)})."
        raise UserError("synthconl.build.empty", message)
    return {"counts": dict(sorted(counts.items(), key=_place))}


def translations(build: Build, out: Path) -> Report:
    """Have the model translate each extracted function; write the answers to `out`; return `translate`'s report."""
    settings, seed = build.recipe.translation, build.recipe.seed
    return translate(build.out / "functions", out, settings, seed=seed, progress=build.progress)


def triplets(build: Build, out: Path) -> Report:
    """Write each function that has an accepted translation, with this translation, to `out`; return counts."""
    rejected, pairs = Counter[str](), defaultdict[str, Counter[str]](Counter)
    examples: dict[str, str] = {}
    recipe = build.recipe

    def accepted() -> Iterator[dict[str, Any]]:
        for function, completion in _answers(build.out):
            source = function["language1_CSN"]
            target = target_language(function["id"], source, seed=recipe.seed, targets=recipe.translation.targets)
            translation = clean_translation(
                completion["text"],
                completion["finish_reason"],
                source=function["func1_CSN"],
                source_language=source,
                target_language=target,
                max_error_share=recipe.max_syntax_error_share,
            )
            pairs[f"{source} → {target}"][translation.rejected or "accepted"] += 1
            if translation.rejected:
                rejected[translation.rejected] += 1
                examples.setdefault(translation.rejected, function["id"])
            else:
                source, target = ("c++" if name == "cpp" else name for name in (source, target))
                yield {**function, "language1_CSN": source, "language2": target, "func2": translation.code}

    if not (count := write_rows(out, accepted(), DATASET_SCHEMA)):
        message = f"No translation was accepted ({_listed(rejected)}). Read the model's answers in {build.out}."
        raise UserError("synthconl.build.empty", message)
    return {
        "accepted": count,
        "rejected": {reason: rejected[reason] for reason in extraction.REASONS if rejected[reason]},
        "examples": examples,
        "pairs": {pair: {"accepted": counts["accepted"], **counts} for pair, counts in sorted(pairs.items())},
    }


def near_duplicates(build: Build, out: Path) -> Report:
    """Copy the triplets to `out` without near-duplicates; return the report of `drop_near_duplicates`."""
    settings = build.recipe.near_duplicates
    options: dict[str, Any] = {"columns": settings.columns, "settings": settings, "progress": build.progress}
    against = {name: open_texts(**one) for name, one in build.recipe.against.items()}
    return drop_near_duplicates(build.out / "triplets", out, id_column="id", against=against, **options)


def split(build: Build, out: Path) -> Report:
    """Draw the repositories to hold out for validation; return their names, and the sizes of both splits."""
    recipe = build.recipe
    sizes = Counter(row["repository_name"] for row in read_rows(build.out / "near_duplicates", ["repository_name"]))
    share = recipe.max_repository_share
    held_out = draw_repositories(sizes, seed=recipe.seed, min_test=recipe.validation_rows, max_repository_share=share)
    splits = zip(SPLITS, (set(sizes) - held_out, held_out), strict=True)
    counts = {name: {"rows": sum(map(sizes.__getitem__, names)), "repositories": len(names)} for name, names in splits}
    return {"splits": counts, "validation": sorted(held_out)}


def dataset(build: Build, out: Path) -> Report:
    """Write the files of the finished dataset to `out`: both splits, `statistics.json` and the card."""
    report = build.report("split")
    held_out, licenses = set(report["validation"]), Counter[str]()

    def rows(name: str) -> Iterator[dict[str, Any]]:
        for row in read_rows(build.out / "near_duplicates"):
            if (row["repository_name"] in held_out) == (name == "validation"):
                licenses[row["license"] or "unknown"] += 1
                yield row

    (out / "data").mkdir()
    for name in SPLITS:
        write_split(out / "data", name, rows(name), DATASET_SCHEMA)
    # Read the rows as a user does. With `strict`, a row that is not a triplet, a bug in this package, is an error.
    statistics = dataset_statistics(chain.from_iterable(open_triplets(out, split=name, strict=True) for name in SPLITS))
    packages = ("modular-star-encoder", "rensa", "tree-sitter")
    card = dataset_card(
        settings=build.recipe.stage_settings(),
        reports={name: build.report(name) for name in ("functions", "translations", "triplets", "near_duplicates")},
        splits=report["splits"],
        statistics=statistics,
        licenses=dict(licenses.most_common()),
        versions={"Python": platform.python_version()} | {name: version(name) for name in packages},
    )
    (out / CARD).write_text(card, encoding="utf-8")
    write_json(out / STATISTICS, asdict(statistics))
    return {"rows": statistics.rows, "splits": report["splits"]}


Stage = Callable[[Build, Path], Report]
STAGES: tuple[Stage, ...] = (functions, translations, triplets, near_duplicates, split, dataset)
"""All stages in order. Each stage writes to a folder of its name, and returns the content of its `report.json`."""
_Counts = dict[str, int]
_USED: dict[str, dict[str, Any]] = {  # {stage: {name in its report that a later stage uses: type}}
    "functions": {"counts": _Counts},
    "translations": {
        "backends": list[dict[str, Any]],
        **dict.fromkeys(("completions", "prompt_tokens", "completion_tokens"), int),
    },
    "triplets": {"accepted": int, "rejected": _Counts, "pairs": dict[str, _Counts]},
    "near_duplicates": {"counts": _Counts},
    "split": {"splits": dict[str, _Counts], "validation": list[str]},
}
_CONTINUED = (translations, near_duplicates)  # stages that continue after an interruption; the others begin again


def _answers(out: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (row of an extracted function, row of the model's answer); UserError if their ids differ."""
    for file in row_files(out / "functions"):
        answers_file = out / "translations" / file.name
        rows, answers = read_file(file), read_file(answers_file)
        if [row["id"] for row in rows] != [answer["id"] for answer in answers]:
            message = f"{answers_file} has other ids than {file}. Remove {answers_file.parent}, and build again."
            raise UserError("synthconl.build.other_answers", message)
        yield from zip(rows, answers, strict=True)


def _place(count: tuple[str, int]) -> tuple[int, int]:
    """Return a sort key for a count (name, number): by how the name begins, then by number, largest first."""
    name, number = count
    starts = ("files", "rows", "documented", "dropped", "functions kept")
    return next((place for place, start in enumerate(starts) if name.startswith(start)), 2), -number


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "it is empty"


def _check_inputs(build: Build) -> None:
    """Open the inputs of all unfinished stages, so that a wrong input raises UserError before hours of translation."""
    recipe = build.recipe
    if not build.is_done("translations"):
        recipe.translation.open()
    if not build.is_done("functions"):
        for corpus in recipe.corpus:
            open_source(corpus, recipe.languages)
    if not build.is_done("near_duplicates"):
        for one in recipe.against.values():
            next(open_texts(**one), None)


def _run(build: Build, stage: Stage, log: dict[str, Any]) -> None:
    name, start = stage.__name__, time.monotonic()
    seconds = log.get(name, {}).get("seconds", 0.0)
    log[name] = {"settings": build.recipe.stage_settings(name), "seconds": seconds}
    write_json(build.out / LOG, log)
    out = build.out / name
    with nullcontext(out) if stage in _CONTINUED else staged_folder(out) as folder:
        folder.mkdir(exist_ok=True)
        write_json(folder / REPORT, stage(build, folder))
    log[name]["seconds"] = round(seconds + time.monotonic() - start, 3)
    write_json(build.out / LOG, log)


def _read_log(build: Build) -> dict[str, Any]:
    """Return the log of earlier builds in `out`; UserError if a setting has changed or `out` has unrelated files."""
    out, log, kinds = build.out, {}, {"settings": dict[str, Any], "seconds": float}
    if (out / LOG).is_file():
        log = read_record(out / LOG, "synthconl.build.damaged", "Build in another folder", each=True, **kinds)
    ours = (LOCK, f".{LOG}.")
    if not log and out.exists() and not (out.is_dir() and all(one.name.startswith(ours) for one in out.iterdir())):
        message = f"{out} contains files that no dataset build wrote; choose an empty or new folder."
        raise UserError("synthconl.build.out", message)
    for name in (stage.__name__ for stage in STAGES if stage.__name__ in log):
        other = _differences(log[name]["settings"], build.recipe.stage_settings(name))
        if other and (out / name).exists():
            made = f"{out / name} was made with other values of {', '.join(other)}"
            remedy = f"Build in another folder, or remove {out / name} and the folders of later stages"
            raise UserError("synthconl.build.other_settings", f"{made}. {remedy}.")
    return log


def _differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Return the dotted names, such as `dataset.card.name`, of the settings that differ between `before` and `now`."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [place[1:]]
    names = ((key, f"{place}.{key}") for key in {**before, **now})
    return [one for key, name in names for one in _differences(before.get(key), now.get(key), name)]
