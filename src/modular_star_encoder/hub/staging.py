"""Write repositories to folders, as they will be on the Hub: checkpoint, exit profile, figure and card."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.evaluation.report import read_tables
from modular_star_encoder.hub.manifest import Manifest, RepositorySettings
from modular_star_encoder.hub.model_card import (
    CARD,
    CardContent,
    Measurements,
    Parent,
    SliceLink,
    count_parameters,
    draw,
    model_card,
)
from modular_star_encoder.inference.checkpoints import (
    check_checkpoint,
    checkpoint_checksum,
    class_named,
    write_checkpoint,
    write_sentence_transformer_files,
)
from modular_star_encoder.inference.exit_profile import PROFILE_NAME, ExitProfile
from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderPreTrainedModel,
)
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_text

TRAINING_LOG = "training_log.json"
TOKENIZER = "tokenizer.json"
HIDDEN = "(a local path)"


@dataclass(frozen=True, slots=True)
class StagedRepository:
    """One complete repository in a folder."""

    settings: RepositorySettings  # its entry in the manifest
    repository: str  # its id on the Hub
    folder: Path  # its files
    source: Path  # checkpoint folder whose outputs it must reproduce at its exits
    retrieval: bool  # whether it embeds; otherwise it is a pre-trained model
    card: CardContent  # content of its card
    extra: tuple[str, ...] = ()  # paths of files that not every repository has

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Its exits."""
        return tuple(self.card.config.exit_layers)


def stage_repositories(manifest: Manifest, folder: str | os.PathLike) -> list[StagedRepository]:
    """Write every repository of a manifest to a folder of its own, in the manifest's order.

    Args:
        manifest: what is published.
        folder: gets a folder for each repository, named by its key with -- for the slashes of a branch.

    Raises:
        UserError: `hub.staging.*`: a checkpoint that is not a pre-trained or retrieval checkpoint of ours, an exit that
            it doesn't have, results of other weights, a damaged training log or recipe, or a file of the manifest that
            would replace one of the repository.
        OSError: a file in the manifest doesn't exist.
    """
    staged: dict[str, StagedRepository] = {}
    for entry in manifest.repositories:
        parent = staged[entry.parent] if entry.parent else None
        staged[entry.key] = _stage(manifest, entry, parent, Path(folder, entry.key.replace("/", "--")))
    for key, parent in staged.items():
        slices = [
            SliceLink(one.repository, one.settings.branch, one.exit_layers[-1], _weights_sha256(one.folder))
            for one in staged.values()
            if one.settings.slice_of == key
        ]
        staged[key] = replace(parent, card=replace(parent.card, slices=slices))
        write_card(staged[key], manifest)
    return list(staged.values())


def write_card(staged: StagedRepository, manifest: Manifest, parent_revision: str | None = None) -> None:
    """Write the card; again when the revision of the parent has become known."""
    content = staged.card
    if content.parent is not None:
        content = replace(content, parent=replace(content.parent, revision=parent_revision))
    write_text(staged.folder / CARD, model_card(content, manifest))


def _stage(
    manifest: Manifest, entry: RepositorySettings, parent: StagedRepository | None, folder: Path
) -> StagedRepository:
    source = parent.source if parent and entry.slice_of else Path(str(entry.checkpoint)).expanduser()
    tokenizer = entry.tokenizer or (parent.folder if parent and entry.slice_of else None)
    model_class = _check_source(source, tokenizer)
    if parent and entry.slice_of and entry.exit_layer not in parent.exit_layers:
        exits = ", ".join(map(str, parent.exit_layers))
        message = f"{entry.key}: exit_layer {entry.exit_layer} is not an exit of {entry.slice_of}; its exits: {exits}."
        raise UserError("hub.staging.exit_layer", message)
    retrieval = issubclass(model_class, ModularStarEncoderForRetrieval)
    folder.mkdir(parents=True)
    write_checkpoint(source, folder, entry.exit_layer, only_exit=entry.only_exit, tokenizer=tokenizer)
    config = AutoConfig.from_pretrained(folder)
    if not (folder / "modules.json").is_file():
        published = sentence_transformer_prompts(instructions=config.instruction_prompts) if retrieval else {}
        # The verification pools a pre-trained model by the mean, whatever its retrieval heads would do.
        own = {} if retrieval else {"dimension": config.hidden_size, "pooling": "mean"}
        write_sentence_transformer_files(folder, config, published, **own)
    prompts = _read_settings(folder / "config_sentence_transformers.json").get("prompts") or {}
    if retrieval and not {"query", "document_python"} <= set(prompts):
        message = f"{source} must have the prompts query and document_python, which its card uses."
        raise UserError("hub.staging.prompts", message)
    parameters = count_parameters(model_class, config)
    if parent and entry.slice_of:
        measured = parent.card.measurements.cut(parameters)
    else:
        measured = _measure(entry, source, parameters)
    if measured.profile is not None:
        # The checksum of the copy: another version may have written the source.
        replace(measured.profile, checkpoint=checkpoint_checksum(folder)).save(folder / PROFILE_NAME)
    try:
        figure = draw(measured, folder)
    except ImportError as error:
        print(f"mose: note: the card of {folder.name} has no figure. {error}", file=sys.stderr)
        figure = None
    for path, file in entry.files.items():
        if (folder / path).exists() or (folder / path) == folder / CARD:
            message = f"{entry.key}: files must not name {path}, which the repository already has."
            raise UserError("hub.staging.files", message)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(file).expanduser(), folder / path)
    training = {} if entry.slice_of else _training(entry, source)
    card = CardContent(
        repository=manifest.repository(entry),
        branch=entry.branch,
        heading=f"the first {entry.exit_layer} layers" if entry.slice_of else "" if retrieval else "pre-trained",
        config=config,
        retrieval=retrieval,
        prompts=prompts,
        measurements=measured,
        figure=figure,
        parent=_parent(parent, entry),
        only_exit=entry.only_exit,
        **training,
    )
    return StagedRepository(
        entry, manifest.repository(entry), folder, source, retrieval, card, extra=tuple(entry.files)
    )


def _parent(parent: StagedRepository | None, entry: RepositorySettings) -> Parent | None:
    if parent is None:
        return None
    layers = parent.card.config.num_hidden_layers
    return Parent(parent.repository, parent.settings.branch, entry.slice_of is not None, layers)


def _check_source(source: Path, tokenizer: str | Path | None) -> type[ModularStarEncoderPreTrainedModel]:
    """The class of a checkpoint that can be published."""
    if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
        message = f"{source} has an adapter: publish the merged model, which `mose finetune` writes too."
        raise UserError("hub.staging.checkpoint", message)
    check_checkpoint(source)
    architecture = AutoConfig.from_pretrained(source).architectures[0]
    model_class = class_named(architecture, source)
    if not Path(tokenizer or source, TOKENIZER).expanduser().is_file():
        fault = f"{tokenizer or source} has no {TOKENIZER}; name a folder that has one as `tokenizer`."
    elif model_class is ModularStarEncoderPreTrainedModel:
        fault = f"{source} is in another layout; `mose slice` at its deepest exit writes ours."
    elif not issubclass(model_class, (ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval)):
        fault = f"{source} is a {architecture}; only pre-trained and retrieval models are published."
    else:
        return model_class
    raise UserError("hub.staging.checkpoint", fault)


def _measure(entry: RepositorySettings, source: Path, parameters: Mapping[int, int]) -> Measurements:
    """The measurements of a checkpoint."""
    checksum = checkpoint_checksum(source)
    path = Path(entry.profile).expanduser() if entry.profile else source / PROFILE_NAME
    profile = ExitProfile.load(path) if entry.profile or path.is_file() else None
    if profile is not None and profile.checkpoint != checksum:
        message = f"{path} was measured on other weights than those of {source}: run `mose profile` again."
        raise UserError("hub.staging.profile", message)
    tables = [table for file in entry.evaluation for table in read_tables(Path(file).expanduser(), checksum)]
    return Measurements(parameters, profile, tables).cut(parameters)


def _training(entry: RepositorySettings, source: Path) -> dict[str, Any]:
    """The training in the card, from the log and the recipe that exist."""
    named = [entry.training_log] if entry.training_log else [source / TRAINING_LOG, source.parent / TRAINING_LOG]
    path = next((Path(one).expanduser() for one in named if Path(one).expanduser().is_file()), None)
    if path is None and entry.training_log:
        raise UserError("hub.staging.training_log", f"Training log {entry.training_log} not found.")
    log = {} if path is None else _read_settings(path)
    recipe = _read_settings(Path(entry.recipe).expanduser()) if entry.recipe else log.get("recipe")
    return {
        "training_data": entry.training_data,
        "training_rows": list(_training_rows(log)),
        "recipe": yaml.safe_dump(without_paths(recipe), sort_keys=False, allow_unicode=True) if recipe else "",
    }


def _read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    data = path.read_bytes()
    try:
        content = json.loads(data) if path.suffix == ".json" else yaml.safe_load(data)
    except (ValueError, yaml.YAMLError) as error:
        content = " ".join(str(error).split())
    if not isinstance(content, dict):
        raise UserError("hub.staging.settings", f"{path} must be a mapping of settings, not: {content}.")
    return content


def _training_rows(log: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if "steps" in log:
        yield "steps", log["steps"]
    data = log.get("data") or {}
    for name, words in (("train", "rows to train on"), ("held_out", "rows held out")):
        if isinstance(data.get(name), int):
            yield words, data[name]
    if held_out := log.get("held_out_repositories"):
        yield "repositories held out", len(held_out)


def without_paths(settings: Any) -> Any:
    """Settings without local paths; names of models and datasets stay."""
    if isinstance(settings, dict):
        return {name: without_paths(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [without_paths(value) for value in settings]
    if isinstance(settings, str) and (settings.startswith(("/", "~", ".")) or os.path.isabs(settings)):
        return HIDDEN
    return settings


def _weights_sha256(folder: Path) -> str:
    """The SHA-256 of the weights: of the one file, as the Hub shows it, or of the list of its shards' checksums."""
    files: Sequence[Path] = sorted(folder.glob("model*.safetensors"))
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
