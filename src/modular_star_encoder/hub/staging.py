"""Repositories in a folder, as they will be on the Hub: checkpoint, SentenceTransformer, exit profile, figure, card."""

from __future__ import annotations

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
from modular_star_encoder.inference.checkpoints import class_named, write_checkpoint, write_sentence_transformer_files
from modular_star_encoder.inference.exit_profile import PROFILE_NAME, ExitProfile
from modular_star_encoder.inference.load import check_checkpoint, checkpoint_checksum
from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderPreTrainedModel,
)
from modular_star_encoder.utils.files import write_text

TRAINING_LOG = "training_log.json"
TOKENIZER = "tokenizer.json"
HIDDEN = "(a local path)"


@dataclass(frozen=True, slots=True)
class StagedRepository:
    """One repository, whole, in a folder.

    Args:
        settings: of the manifest.
        repository: its id on the Hub.
        folder: what it will hold.
        source: checkpoint folder whose outputs it must reproduce at its exits.
        retrieval: whether it embeds; otherwise it is a pre-trained model.
        card: what its card says.
        extra: paths of files beside those that every repository has.
    """

    settings: RepositorySettings
    repository: str
    folder: Path
    source: Path
    retrieval: bool
    card: CardContent
    extra: tuple[str, ...] = ()

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Its exits."""
        return tuple(self.card.config.exit_layers)


def stage_repositories(manifest: Manifest, folder: str | os.PathLike) -> list[StagedRepository]:
    """Write every repository of a manifest to a folder of its own, in the manifest's order.

    Args:
        manifest: what is published.
        folder: gets a folder for each repository, named by its key, with -- for the slashes of a branch.

    Raises:
        ValueError: a checkpoint that is no pre-trained or retrieval checkpoint of ours, an exit that it doesn't have,
            figures of other weights, a training log or recipe that is damaged, or a file of the manifest in place of
            one that the repository has itself.
        OSError: a file that the manifest names isn't there.
    """
    staged: dict[str, StagedRepository] = {}
    for entry in manifest.repositories:
        parent = staged[entry.parent] if entry.parent else None
        staged[entry.key] = _stage(manifest, entry, parent, Path(folder, entry.key.replace("/", "--")))
    for key, parent in staged.items():
        slices = [
            SliceLink(one.repository, one.settings.branch, one.settings.exit_layer, _weights_sha256(one.folder))
            for one in staged.values()
            if one.settings.slice_of == key
        ]
        staged[key] = replace(parent, card=replace(parent.card, slices=slices))
        write_card(staged[key], manifest)
    return list(staged.values())


def write_card(staged: StagedRepository, manifest: Manifest, parent_revision: str | None = None) -> None:
    """Write the card, once more where the revision of the parent has become known."""
    content = staged.card
    if content.parent is not None:
        content = replace(content, parent=replace(content.parent, revision=parent_revision))
    write_text(staged.folder / CARD, model_card(content, manifest))


def _stage(
    manifest: Manifest, entry: RepositorySettings, parent: StagedRepository | None, folder: Path
) -> StagedRepository:
    source = parent.source if entry.slice_of else Path(entry.checkpoint).expanduser()
    tokenizer = entry.tokenizer or (parent.folder if entry.slice_of else None)
    model_class = _check_source(source, tokenizer)
    if entry.slice_of and entry.exit_layer not in parent.exit_layers:
        exits = ", ".join(map(str, parent.exit_layers))
        raise ValueError(f"{entry.key}: exit_layer {entry.exit_layer} is none of {entry.slice_of}'s exits {exits}.")
    retrieval = issubclass(model_class, ModularStarEncoderForRetrieval)
    folder.mkdir(parents=True)
    write_checkpoint(source, folder, entry.exit_layer, only_exit=entry.only_exit, tokenizer=tokenizer)
    config = AutoConfig.from_pretrained(folder)
    if not (folder / "modules.json").is_file():
        published = sentence_transformer_prompts(instructions=config.instruction_prompts) if retrieval else {}
        # A pre-trained model is pooled where it is verified: the mean, whatever its retrieval heads would do.
        own = {} if retrieval else {"dimension": config.hidden_size, "pooling": "mean"}
        write_sentence_transformer_files(folder, config, published, **own)
    prompts = _read_settings(folder / "config_sentence_transformers.json").get("prompts") or {}
    if retrieval and not {"query", "document_python"} <= set(prompts):
        raise ValueError(f"{source} must name the prompts query and document_python, for its card uses them.")
    parameters = count_parameters(model_class, config)
    measured = parent.card.measurements.cut(parameters) if entry.slice_of else _measure(entry, source, parameters)
    if measured.profile is not None:
        # The same weights in another folder, perhaps written by another version.
        replace(measured.profile, checkpoint=checkpoint_checksum(folder)).save(folder / PROFILE_NAME)
    figure = _figure(measured, folder)
    _copy_files(entry, folder)
    training = {} if entry.slice_of else _training(entry, source)
    card = CardContent(
        repository=manifest.repository(entry),
        branch=entry.branch,
        heading=_heading(entry, retrieval),
        config=config,
        retrieval=retrieval,
        prompts=prompts,
        measurements=measured,
        figure=figure,
        parent=parent and _parent(parent, entry),
        only_exit=entry.only_exit,
        **training,
    )
    return StagedRepository(
        entry, manifest.repository(entry), folder, source, retrieval, card, extra=tuple(entry.files)
    )


def _copy_files(entry: RepositorySettings, folder: Path) -> None:
    """Add the files that a manifest names to a repository that is whole but for its card."""
    for path, file in entry.files.items():
        if (folder / path).exists() or (folder / path) == folder / CARD:
            raise ValueError(f"{entry.key}: files must not name {path}, which the repository has of its own.")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(file).expanduser(), folder / path)


def _check_source(source: Path, tokenizer: str | Path | None) -> type[ModularStarEncoderPreTrainedModel]:
    """The class of a checkpoint that can be published.

    Raises:
        ValueError: it is none.
        OSError: it isn't there.
    """
    if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
        raise ValueError(f"{source} holds an adapter: publish the merged model (`mose finetune` writes it, too).")
    check_checkpoint(source)
    if not Path(tokenizer or source, TOKENIZER).expanduser().is_file():
        raise ValueError(f"{tokenizer or source} has no {TOKENIZER}; name a folder that has one as `tokenizer`.")
    architecture = AutoConfig.from_pretrained(source).architectures[0]
    model_class = class_named(architecture, source)
    if model_class is ModularStarEncoderPreTrainedModel:
        raise ValueError(f"{source} is in another layout; `mose slice` at its deepest exit writes ours.")
    if not issubclass(model_class, (ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval)):
        raise ValueError(f"{source} holds a {architecture}; what is published are pre-trained and retrieval models.")
    return model_class


def _measure(entry: RepositorySettings, source: Path, parameters: Mapping[int, int]) -> Measurements:
    """What was measured of a checkpoint.

    Raises:
        ValueError, OSError: a file isn't there, or its figures are of other weights.
    """
    fingerprint = checkpoint_checksum(source)
    path = Path(entry.profile).expanduser() if entry.profile else source / PROFILE_NAME
    profile = ExitProfile.load(path) if entry.profile or path.is_file() else None
    if profile is not None and profile.checkpoint != fingerprint:
        raise ValueError(f"{path} was measured on other weights than those of {source}: run `mose profile` again.")
    tables = [table for file in entry.evaluation for table in read_tables(Path(file).expanduser(), fingerprint)]
    return Measurements(parameters, profile, tables).cut(parameters)


def _figure(measured: Measurements, folder: Path) -> str | None:
    try:
        return draw(measured, folder)
    except ImportError as error:
        print(f"mose: note: the card of {folder.name} has no figure. {error}", file=sys.stderr)
        return None


def _parent(parent: StagedRepository, entry: RepositorySettings) -> Parent:
    layers = parent.card.config.num_hidden_layers
    return Parent(parent.repository, parent.settings.branch, entry.slice_of is not None, layers)


def _heading(entry: RepositorySettings, retrieval: bool) -> str:
    if entry.slice_of:
        return f"the first {entry.exit_layer} layers"
    return "" if retrieval else "pre-trained"


def _training(entry: RepositorySettings, source: Path) -> dict[str, Any]:
    """What a card says about training, from the log and the recipe that are there."""
    named = [entry.training_log] if entry.training_log else [source / TRAINING_LOG, source.parent / TRAINING_LOG]
    path = next((Path(one).expanduser() for one in named if Path(one).expanduser().is_file()), None)
    if path is None and entry.training_log:
        raise ValueError(f"There is no training log {entry.training_log}.")
    log = {} if path is None else _read_settings(path)
    recipe = _read_settings(Path(entry.recipe).expanduser()) if entry.recipe else log.get("recipe")
    return {
        "training_data": entry.training_data,
        "training_rows": list(_training_rows(log)),
        "recipe": yaml.safe_dump(without_paths(recipe), sort_keys=False, allow_unicode=True) if recipe else "",
    }


def _read_settings(path: Path) -> dict[str, Any]:
    """A mapping in YAML or JSON.

    Raises:
        ValueError: the file holds none.
        OSError: it can't be read.
    """
    data = path.read_bytes()
    try:
        content = json.loads(data) if path.suffix == ".json" else yaml.safe_load(data)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of settings.")
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
    """Settings for strangers: places of this machine are left out, and names of models and datasets stay."""
    if isinstance(settings, dict):
        return {name: without_paths(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [without_paths(value) for value in settings]
    if isinstance(settings, str) and (settings.startswith(("/", "~", ".")) or os.path.isabs(settings)):
        return HIDDEN
    return settings


def _weights_sha256(folder: Path) -> str:
    """The SHA-256 of the weights: of the one file, as the Hub shows it, or of the list of its shards' sums."""
    files: Sequence[Path] = sorted(folder.glob("model*.safetensors"))
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
