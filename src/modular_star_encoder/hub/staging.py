"""Write the files of each repository to a folder before upload: checkpoint, exit profile, figure and card."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from modular_star_encoder import inference
from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.evaluation.report import read_tables
from modular_star_encoder.hub.manifest import Manifest, RepositorySettings
from modular_star_encoder.hub.model_card import CARD, Measurements, StagedRepository, draw, write_card
from modular_star_encoder.inference import PROFILE_NAME, checkpoints, resolve_checkpoint
from modular_star_encoder.inference.checkpoints import load_config
from modular_star_encoder.inference.exit_profile import ExitProfile
from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderPreTrainedModel,
)
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import leads_outside, read_json, user_path
from modular_star_encoder.utils.settings import read_mapping, read_yaml

TRAINING_LOG = "training_log.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model*.safetensors*"
HIDDEN = "(a local path)"
_USES = {"train": "to train on", "held_out": "held out"}


def stage_repositories(manifest: Manifest, folder: str | os.PathLike) -> list[StagedRepository]:
    """Write the files of each repository of a manifest to a new folder in `folder`; return the staged repositories.

    The name of the new folder is the `key` of the repository's entry, with `--` in place of `/`.
    """
    staged: dict[str, StagedRepository] = {}
    for entry in manifest.repositories:
        parent = staged[entry.parent] if entry.parent else None
        staged[entry.key] = _stage(manifest, entry, parent, Path(folder, entry.key.replace("/", "--")))
    for key, one in staged.items():
        cut = [other for other in staged.values() if other.settings.slice_of == key]
        slices = [(other.config.exit_layers[-1], other.link(), f"`{_weights_sha256(other.folder)}`") for other in cut]
        staged[key] = replace(one, slices=slices)
        write_card(staged[key], manifest)
    return list(staged.values())


def _stage(
    manifest: Manifest, entry: RepositorySettings, parent: StagedRepository | None, folder: Path
) -> StagedRepository:
    uncut = parent if entry.slice_of else None
    source = uncut.source if uncut else Path(resolve_checkpoint(str(entry.checkpoint)))
    tokenizer = entry.tokenizer or (uncut.folder if uncut else None)
    model_class = _check_source(source, tokenizer)
    if uncut and entry.exit_layer not in uncut.config.exit_layers:
        exits = ", ".join(map(str, uncut.config.exit_layers))
        message = f"{entry.key}: exit_layer={entry.exit_layer} must be one of the exits of {entry.slice_of}: {exits}."
        raise UserError("hub.staging.exit_layer", message)
    retrieval = issubclass(model_class, ModularStarEncoderForRetrieval)
    folder.mkdir(parents=True)
    checkpoints.write_checkpoint(source, folder, entry.exit_layer, only_exit=entry.only_exit, tokenizer=tokenizer)
    if not uncut:  # publish the original weights, because the loaded model may have another dtype than its files
        for weights in folder.glob(WEIGHTS):
            weights.unlink()
        for weights in inference.weight_files(source):
            if leads_outside(weights, source):
                message = f"{weights} is a link to a file outside the checkpoint: replace the link by the weights."
                raise UserError("hub.staging.weights", message)
            shutil.copyfile(weights, folder / weights.name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not (folder / "modules.json").is_file():
        published = sentence_transformer_prompts(instructions=config.instruction_prompts) if retrieval else {}
        # Use mean pooling for a pre-trained model, because the later check compares means of token states.
        own = {} if retrieval else {"dimension": config.hidden_size, "pooling": "mean"}
        checkpoints.write_sentence_transformer_files(folder, config, published, **own)
    prompts = checkpoints.stored_prompts(folder)
    if retrieval and not {"query", "document_python"} <= set(prompts):
        message = f"{source} has no prompt `query` or `document_python`: add it in config_sentence_transformers.json."
        raise UserError("hub.staging.prompts", message)
    with torch.device("meta"):  # counts parameters without memory for weights
        parameters = {k: model_class(config.cut(k)).num_parameters() for k in config.exit_layers}
    measured = uncut.measurements.cut(parameters) if uncut else _measure(entry, source, parameters)
    if measured.profile is not None:
        # The copy's checksum may differ from the source's, which another version of this package may have written.
        replace(measured.profile, checkpoint=checkpoints.checkpoint_checksum(folder)).save(folder / PROFILE_NAME)
    try:
        figure = draw(measured, folder)
    except ImportError as error:
        print(f"mose: note: the card of {folder.name} has no figure. {error}", file=sys.stderr)
        figure = None
    for path, file in entry.files.items():
        target = folder / path
        if target.exists() or any(one.is_file() or one == folder / CARD for one in (target, *target.parents)):
            message = f"{entry.key}: remove {path} from `files`: the repository already has a file or folder there."
            raise UserError("hub.staging.files", message)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(user_path(file), target)
    training_rows, recipe = ([], "") if uncut else _read_training(entry, source)
    return StagedRepository(
        settings=entry,
        repository=manifest.repository(entry),
        folder=folder,
        source=source,
        config=config,
        retrieval=retrieval,
        prompts=prompts,
        measurements=measured,
        figure=figure,
        parent=parent,
        training_rows=training_rows,
        recipe=recipe,
        sections=[(heading, _section(user_path(file))) for heading, file in entry.sections.items()],
    )


def _check_source(source: Path, tokenizer: str | Path | None) -> type[ModularStarEncoderPreTrainedModel]:
    inference.check_checkpoint(source)
    architecture = str((load_config(source).architectures or [""])[0])
    model_class = checkpoints.class_named(architecture, source)
    if not user_path(tokenizer or source, TOKENIZER).is_file():
        fault = f"{tokenizer or source} has no {TOKENIZER}; set `tokenizer` to a folder with this file."
    elif model_class is ModularStarEncoderPreTrainedModel:
        fault = f"{source} has the layout of the paper's models: convert it by `mose slice` at its deepest exit."
    elif not issubclass(model_class, (ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval)):
        fault = f"{source} has a model of class {architecture}; publish only pre-trained and retrieval models."
    else:
        return model_class
    raise UserError("hub.staging.checkpoint", fault)


def _measure(entry: RepositorySettings, source: Path, parameters: Mapping[int, int]) -> Measurements:
    checksum = checkpoints.checkpoint_checksum(source)
    path = user_path(entry.profile) if entry.profile else source / PROFILE_NAME
    profile = ExitProfile.load(path) if entry.profile or path.is_file() else None
    if profile is not None and profile.checkpoint != checksum:
        message = f"{path} was measured with other weights than those in {source}: run `mose profile` again."
        raise UserError("hub.staging.profile", message)
    results = [user_path(file) for file in entry.evaluation]
    tables = [table for file in results for table in read_tables(file, checksum)]
    if not results and (log := _training_log(entry, source)):
        with suppress(UserError):  # of another training or version, or of a copy in 16 bits, which was not measured
            tables = read_tables(log, checksum)
    return Measurements(parameters, profile, tables).cut(parameters)


def _training_log(entry: RepositorySettings, source: Path) -> Path | None:
    if entry.training_log:
        return user_path(entry.training_log)
    return next((one for one in (source / TRAINING_LOG, source.parent / TRAINING_LOG) if one.is_file()), None)


def _read_training(entry: RepositorySettings, source: Path) -> tuple[list[tuple[str, Any]], str]:
    """Return a list of facts (name, value) on the training, and the recipe as YAML; each is empty if unknown."""
    path = _training_log(entry, source)
    log = _read_settings(path) if path else {}
    try:  # the recipe in a log has the limits of a recipe
        recipe = read_yaml(json.dumps(log.get("recipe")).encode(), "its recipe")
    except (UserError, RecursionError) as error:
        raise UserError("hub.staging.settings", f"{path} can't be read as settings: {error}.") from error
    if entry.recipe:
        recipe = _read_settings(user_path(entry.recipe))
    data, held_out = (log.get(name) for name in ("data", "held_out_repositories"))
    settings = without_paths(recipe) if isinstance(recipe, dict) else {}
    # A pre-training's model may be a configuration, and its length is one of whole rows.
    tuned: dict[str, Any] = settings if log.get("retrieval") else {}
    start, limits = str(tuned.get("model")), [tuned.get(f"max_{kind}_tokens") for kind in ("text", "code")]
    values = {
        "started from": start if start in inference.shipped_models() or inference.is_repository(start) else None,
        "steps": log.get("steps"),
        "rows per step": settings.get("batch_size"),
        **{f"rows {use}": data.get(name) for name, use in _USES.items() if isinstance(data, dict)},
        "repositories held out": len(held_out) if isinstance(held_out, list) and held_out else None,
        "tokens at which held-out texts were cut": max((n for n in limits if isinstance(n, int)), default=None),
    }
    rows = [(name, value) for name, value in values.items() if isinstance(value, int) or name == "started from"]
    rows = [(name, value) for name, value in rows if value is not None]
    return rows, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True) if settings else ""


def _section(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise UserError("hub.staging.section", f"Save {path}, in `sections`, as text in UTF-8: {error}.") from error
    return text if path.suffix == ".md" else f"```{path.suffix[1:]}\n{text}\n```"


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path) if path.suffix == ".json" else read_mapping(path)
        if isinstance(content, dict):
            return content
        fault = "it must be a mapping"
    except (OSError, ValueError) as error:
        fault = " ".join(str(error).split())
    raise UserError("hub.staging.settings", f"{path} can't be read as settings: {fault}.")


# Also a path inside a text, such as `pairs=/home/me/pairs.csv`.
_PATH = re.compile(r"(^|[=:,\s\"'(\[])(~?/\w|~\w*/|file:)")


def without_paths(settings: Any) -> Any:
    """Return settings with "(a local path)" in place of each local path; Hub ids of models and datasets are kept."""
    if isinstance(settings, dict):
        return {name: without_paths(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [without_paths(value) for value in settings]
    if isinstance(settings, str) and (settings.startswith(".") or os.path.isabs(settings) or _PATH.search(settings)):
        return HIDDEN
    return settings


def _weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of the weights file, as the Hub shows it; of several files, that of the list of SHA-256s."""
    digests = []
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
