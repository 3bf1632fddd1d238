"""Manifests: the YAML files in hub_configs that say which repositories are published, and from what."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from modular_star_encoder.utils.hub import check_repository_id
from modular_star_encoder.utils.settings import build_settings, load_settings

MAIN = "main"


@dataclass(frozen=True, kw_only=True)
class RepositorySettings:
    """One repository, or one branch of a repository.

    Args:
        name: of the repository, without its namespace.
        checkpoint: folder of what is published, whole; or
        slice_of, exit_layer: the key of an entry above, and the exit at which it is cut.
        only_exit: a slice keeps this exit's head alone, as the published cut models do.
        branch: where it goes.
        trained_from: key of an entry above that this one's training started from.
        tokenizer: folder of the tokenizer; that of the checkpoint if None.
        evaluation: files of figures, as `mose evaluate` (report.json, or --json) or the quickstart (results.json)
            writes them; a slice has those of its parent, cut to its exits.
        profile: file of `mose profile`; `exit_profile.json` in the checkpoint's folder if None and it is there.
        training_log: file of `mose pretrain` and `mose finetune`; the one in the checkpoint's folder or in the folder
            around it if None and it is there.
        recipe: YAML or JSON file of the recipe, where the training log holds none.
        training_data: what it was trained on, in prose.
        files: other files that the repository holds: path there → file here, such as
            `onnx/model.onnx: runs/export/model.onnx`.
    """

    name: str
    checkpoint: str | None = None
    slice_of: str | None = None
    exit_layer: int | None = None
    only_exit: bool = False
    branch: str = MAIN
    trained_from: str | None = None
    tokenizer: str | None = None
    evaluation: Sequence[str] = ()
    profile: str | None = None
    training_log: str | None = None
    recipe: str | None = None
    training_data: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.slice_of is None):
            raise ValueError(f"{self.key} needs either checkpoint or slice_of.")
        if (self.slice_of is None) != (self.exit_layer is None):
            raise ValueError(f"{self.key}: exit_layer goes with slice_of, and slice_of with exit_layer.")
        if self.slice_of and (self.evaluation or self.profile or self.training_log or self.recipe or self.trained_from):
            raise ValueError(f"{self.key} is a slice: figures and training are those of {self.slice_of}.")
        _check_kinds(self, f"{self.key}: ")
        for path in self.files:
            parts = PurePosixPath(path).parts
            if not parts or parts[0] == "/" or ".." in parts or "\\" in path:
                raise ValueError(f"{self.key}: {path!r} must be a path inside the repository.")

    @property
    def key(self) -> str:
        """How other entries call it: its name, with the branch behind an @ where that isn't main."""
        return self.name if self.branch == MAIN else f"{self.name}@{self.branch}"

    @property
    def parent(self) -> str | None:
        """The key of the entry that it comes from."""
        return self.slice_of or self.trained_from


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is published together.

    Args:
        namespace: user or organisation of the Hub that owns the repositories.
        title: heading of the cards.
        license: the Hub's name for the licence of the weights; with `other` also `license_name` and `license_link`.
        repositories: in the order in which they are published: parents before what comes from them.
        datasets: ids of the Hub that were trained on.
        tags: more words to be found by.
        limits: what users should know, in prose.
    """

    namespace: str
    title: str
    license: str
    repositories: Sequence[RepositorySettings]
    license_name: str | None = None
    license_link: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    limits: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.namespace, str) or not self.namespace:
            raise ValueError("namespace must be yours on the Hub: namespace=NAME.")
        if not isinstance(self.license, str) or not self.license:
            raise ValueError("license must be the Hub's name for one, such as apache-2.0.")
        if self.license == "other" and not self.license_name:
            raise ValueError("license other needs license_name, and license_link where there is one.")
        if not isinstance(self.repositories, list | tuple) or not self.repositories:
            raise ValueError("repositories must be a list of at least one.")
        _check_kinds(self)
        entries = [
            entry
            if isinstance(entry, RepositorySettings)
            else build_settings(RepositorySettings, entry, f"repository {number}")
            for number, entry in enumerate(self.repositories, 1)
        ]
        object.__setattr__(self, "repositories", tuple(entries))
        above: set[str] = set()
        for entry in entries:
            check_repository_id(self.repository(entry))
            if entry.key in above:
                raise ValueError(f"{entry.key} stands twice among the repositories.")
            if entry.parent is not None and entry.parent not in above:
                raise ValueError(f"{entry.key} comes from {entry.parent}, which must stand above it.")
            above.add(entry.key)

    def repository(self, entry: RepositorySettings) -> str:
        """Its id on the Hub."""
        return f"{self.namespace}/{entry.name}"

    def entry(self, key: str) -> RepositorySettings:
        """The entry of this key."""
        return next(entry for entry in self.repositories if entry.key == key)


def _check_kinds(settings: Any, where: str = "") -> None:
    """Refuse values of another kind than the settings': YAML reads `1.0` as a number, and one word is no list.

    Raises:
        ValueError: the message names the setting.
    """
    for setting in fields(settings):
        kind, name, value = setting.type, setting.name, getattr(settings, setting.name)
        wanted = None
        # Prose that is left out may be written as nothing.
        if kind in (str, str | None) and not isinstance(value, kind) and (value is not None or setting.default != ""):
            wanted = "words (in quotes, if YAML takes them for something else)"
        elif kind is bool and not isinstance(value, bool):
            wanted = "true or false"
        elif kind == Sequence[str] and not (isinstance(value, list | tuple) and _all_words(value)):
            wanted = "a list of words"
        elif kind == Mapping[str, str] and not (isinstance(value, Mapping) and _all_words([*value, *value.values()])):
            wanted = "a mapping of files"
        if wanted:
            raise ValueError(f"{where}{name} must be {wanted}, not {value!r}.")


def _all_words(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def load_manifest(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Manifest:
    """Read a manifest.

    Args:
        path: a YAML file.
        overrides: `key=value`, such as `namespace=my-name`; values are YAML.

    Raises:
        ValueError: the file or an override is not of this form, or a setting is unknown, missing or out of range.
        OSError: the file is there and can't be read.
    """
    return load_settings(Manifest, path, overrides, example="hub_configs/quickstart/publish.yaml")


def folder_manifest(
    folder: str | os.PathLike,
    repository: str,
    *,
    license: str = "apache-2.0",
    evaluation: Sequence[str] = (),
) -> Manifest:
    """The manifest of one checkpoint folder.

    Raises:
        ValueError: `repository` is not of the form owner/name.
    """
    namespace, slash, name = repository.partition("/")
    if not slash:
        raise ValueError(f"{repository!r} is no id of a repository such as owner/name.")
    entry = RepositorySettings(name=name, checkpoint=os.fspath(folder), evaluation=tuple(evaluation))
    return Manifest(namespace=namespace, title=name, license=license, repositories=[entry])
