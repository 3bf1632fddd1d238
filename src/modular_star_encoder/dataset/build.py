"""Build a dataset from a recipe, stage by stage, going on where an earlier call was interrupted."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from modular_star_encoder.data.dataset_rows import open_texts
from modular_star_encoder.data.files import write_json
from modular_star_encoder.dataset.extraction import open_source
from modular_star_encoder.dataset.near_duplicates.fingerprints import minhash_class
from modular_star_encoder.dataset.recipe import DatasetRecipe
from modular_star_encoder.dataset.stages import STAGES, Build

LOG, LOCK = "build.json", ".lock"

# The workers of a process that was killed hold its lock for a moment.
LOCK_SECONDS = 5.0


def build_dataset(recipe: DatasetRecipe, out: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Build a dataset, or go on with what an earlier call with this recipe left in `out`.

    Killed at any point, the same call goes on: a finished stage is not done again, no row is lost, doubled or given
    another's translation, and of the translations at most those under way are asked for again.

    Args:
        recipe: What to build.
        out: The folder to work in: one that does not exist, is empty, or was begun with the same settings. It gets a
            folder for each stage; see `stages`.
        progress: Whether to show progress bars.

    Returns:
        The folder of the finished dataset, `out/dataset`: parquet files in `data`, `statistics.json` and a card,
        `README.md`.

    Raises:
        ValueError: If `out` holds something else, was begun with other settings, or another process is at work in it;
            if the corpus, a benchmark to be kept away from or the endpoint's settings can't be used, or nothing passes
            a stage.
        BackendError: If the back end can't go on. What it had answered is kept.
        ImportError: If a package that is needed isn't installed.
    """
    build = Build(recipe, Path(out).absolute(), progress)
    log = _read_log(build.out)
    _check_settings(build, log)
    # What can be told before the first stage is told now, not after hours of translation.
    minhash_class()
    if not build.is_done("translations"):
        recipe.translation.open()
    if not build.is_done("functions"):
        for corpus in recipe.corpus:
            open_source(corpus, recipe.languages)
    if not build.is_done("near_duplicates"):
        for one in recipe.against.values():
            next(open_texts(**one), None)
    build.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(build.out / LOCK, timeout=LOCK_SECONDS):
            log = _read_log(build.out)
            _clear(build.out)
            for stage in STAGES:
                if not build.is_done(stage.__name__):
                    _run(build, stage, log)
    except Timeout:
        raise ValueError(f"Another process is at work in {build.out}.") from None
    return build.out / STAGES[-1].__name__


def _run(build: Build, stage: Any, log: dict[str, Any]) -> None:
    name, start = stage.__name__, time.monotonic()
    seconds = log.get(name, {}).get("seconds", 0.0)
    log[name] = {"settings": _settings_up_to(build.recipe, name), "seconds": seconds}
    write_json(build.out / LOG, log)
    stage(build, build.out / name)
    log[name]["seconds"] = round(seconds + time.monotonic() - start, 3)
    write_json(build.out / LOG, log)


def _clear(out: Path) -> None:
    """Remove what a killed process was about to rename."""
    for path in out.glob(f".{LOG}.*.tmp"):
        path.unlink()
    for stage in STAGES:
        for path in out.glob(f".{stage.__name__}-*"):
            shutil.rmtree(path)


def _settings_up_to(recipe: DatasetRecipe, name: str) -> dict[str, Any]:
    """By stage up to this one, what decides its result."""
    settings = recipe.stage_settings()
    names = list(settings)
    return {one: settings[one] for one in names[: names.index(name) + 1]}


def _read_log(out: Path) -> dict[str, Any]:
    path = out / LOG
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    ours = (LOCK, f".{LOG}.")
    if out.exists() and (not out.is_dir() or not all(entry.name.startswith(ours) for entry in out.iterdir())):
        raise ValueError(f"{out} holds something else; name a folder that does not exist yet, or an empty one.")
    return {}


def _check_settings(build: Build, log: dict[str, Any]) -> None:
    """Check that what is there was made with the same settings; what is not there yet may have others.

    Raises:
        ValueError: A stage that was begun has others.
    """
    for stage in STAGES:
        name = stage.__name__
        if name not in log or not (build.out / name).exists():
            continue
        other = list(_differences(log[name]["settings"], _settings_up_to(build.recipe, name)))
        if other:
            raise ValueError(
                f"{build.out / name} was made with another {', '.join(other)}; name another folder, or remove that one "
                "and those of the stages after it, to make them anew."
            )


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of the settings that differ."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        if before != now:
            yield name
        return
    for key in {**before, **now}:
        yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
