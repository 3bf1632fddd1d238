"""Read manifests: YAML files that list repositories to publish and their checkpoints, as in hub_configs."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import PurePosixPath

from pydantic import Field

from modular_star_encoder.inference import resolve_checkpoint
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.http import check_repository_id
from modular_star_encoder.utils.settings import Switch, load_settings, settings_class

MAIN = "main"
_MAX_SECTION = 2**20  # bytes of a section of a card
_LICENSES = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community "
    "h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl "
    "postgresql unknown unlicense wtfpl zlib"
)
"""Names of licences that the Hub accepts in a card."""


@settings_class
class RepositorySettings:
    """An entry of a manifest: one repository, or one branch of a repository.

    Args:
        name: name of the repository, without its namespace.
        checkpoint: folder to publish unchanged; use either `checkpoint` or `slice_of`.
        slice_of: NAME or NAME@BRANCH of the earlier entry from whose model this entry's model is cut.
        exit_layer: with `slice_of`, the exit at which the model is cut.
        only_exit: whether a slice keeps only the projection head of its last exit, as the paper's published slices do.
        branch: branch of the repository: letters, digits, `_`, and single `.`, `-`, `+` and `/`.
        trained_from: NAME or NAME@BRANCH of the earlier entry from whose model this entry's model was trained.
        tokenizer: folder of the tokenizer; by default the folder of the checkpoint.
        evaluation: files of results, from `mose evaluate` (report.json, or --json) or `mose finetune`
            (training_log.json); by default results in the training log. A slice has the results of the model from
            which it is cut, at the slice's exits.
        profile: file from `mose profile`; by default `exit_profile.json` in the checkpoint's folder, if it exists.
        training_log: file from `mose pretrain` or `mose finetune`; by default `training_log.json` in the checkpoint's
            folder or in the folder above, if it exists.
        recipe: YAML or JSON file of the training recipe; by default the recipe in the training log.
        training_data: description of the training data.
        sections: additional sections of the card, as `heading: local file`. A file without the ending .md is shown as
            code.
        files: additional files of the repository, as `path in the repository: local file`, such as
            `onnx/model.onnx: runs/export/model.onnx`.
    """

    name: str
    checkpoint: str | None = None
    slice_of: str | None = None
    exit_layer: int | None = None
    only_exit: Switch = False
    branch: str = MAIN
    trained_from: str | None = None
    tokenizer: str | None = None
    evaluation: Sequence[str] = ()
    profile: str | None = None
    training_log: str | None = None
    recipe: str | None = None
    training_data: str | None = None
    sections: Mapping[str, str] = Field(default_factory=dict)
    files: Mapping[str, str] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        own = ("checkpoint", "evaluation", "profile", "recipe", "sections", "trained_from", "training_log")
        given = [name for name in own if getattr(self, name)]
        parts = {path: PurePosixPath(path).parts for path in self.files}
        outside = [path for path in parts if parts[path][:1] in ((), ("/",)) or ".." in parts[path] or "\\" in path]
        local = [os.path.expanduser(file) for file in (*self.sections.values(), *self.files.values())]
        odd = [file for file in local if os.path.exists(file) and not os.path.isfile(file)]  # a pipe may have no end
        sections = filter(os.path.isfile, local[: len(self.sections)])
        odd += [file for file in sections if os.path.getsize(file) > _MAX_SECTION]
        key, fault = "", ""
        if self.slice_of and given:
            key, fault = "slice", f"is a slice: remove {', '.join(given)}, which a slice takes from {self.slice_of}"
        elif self.slice_of is None and self.checkpoint is None:
            key, fault = "checkpoint", "needs either `checkpoint` or `slice_of`"
        elif (self.slice_of is None) != (self.exit_layer is None):
            key, fault = "exit_layer", "needs both `slice_of` and `exit_layer`, or neither"
        elif not re.fullmatch(r"(?!.*(\.\.|--))\w[\w.+-]*(/\w[\w.+-]*)*", self.branch):
            allowed = "letters, digits and single `.`, `-`, `+`, with `/` between names"
            key, fault = "branch", f"has {self.branch!r} as `branch`; use {allowed}"
        elif outside:
            key, fault = "files", f"has {outside[0]!r} in `files`; use a relative path in the repository"
        elif odd:
            allowed = f"regular files, and in `sections` only files of at most {_MAX_SECTION:,} bytes"
            key, fault = "files", f"can't have the local file {odd[0]}; name {allowed}"
        if key:
            raise UserError(f"hub.manifest.{key}", f"{self.key} {fault}.")

    @property
    def key(self) -> str:
        """The name for this entry in `slice_of` and `trained_from`: NAME, or NAME@BRANCH if the branch isn't main."""
        return self.name if self.branch == MAIN else f"{self.name}@{self.branch}"

    @property
    def parent(self) -> str | None:
        """The key of the parent model's entry: the value of `slice_of` or `trained_from`; None without a parent."""
        return self.slice_of or self.trained_from


@settings_class
class Manifest:
    """The repositories to publish, and metadata for the cards of all of them.

    Args:
        namespace: user or organisation on the Hub to which the repositories belong.
        title: title of the cards.
        license: licence of the weights, by its name on the Hub; `other` also needs `license_name` and `license_link`.
            Without a licence, nothing is uploaded.
        repositories: repositories in the order of publication, parents first.
        datasets: Hub ids of the training data.
        tags: additional tags.
        limits: text on the limitations of the models.
    """

    namespace: str | None
    title: str
    repositories: Sequence[RepositorySettings] = Field(min_length=1)
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    limits: str | None = None

    def __post_init__(self) -> None:
        for key, fault in self._faults():
            raise UserError(f"hub.manifest.{key}", f"{fault}.")

    def _faults(self) -> Iterator[tuple[str, str]]:
        if not self.namespace:
            yield "namespace", "Set `namespace` to your name on the Hub: namespace=NAME"
        names = _LICENSES.split()
        if self.license not in (None, *names) or (self.license == "other" and not self.license_name):
            near = get_close_matches(str(self.license).lower(), names, 1) or ["apache-2.0"]
            fault = f"`license` must be a name that the Hub knows, such as {near[0]}, or `other` with `license_name`"
            yield "license", f"{fault}; not {self.license!r}"
        above: set[str] = set()
        for entry in self.repositories:
            check_repository_id(self.repository(entry))
            if entry.key in above:
                yield "twice", f"{entry.key} is listed twice in `repositories`"
            if entry.parent is not None and entry.parent not in above:
                fault = f"{entry.key} is made from {entry.parent}, which must be listed above it in `repositories`"
                yield "parent", fault
            above.add(entry.key)

    def repository(self, entry: RepositorySettings) -> str:
        """Return the Hub id of an entry's repository, "namespace/name"."""
        return f"{self.namespace}/{entry.name}"


def load_manifest(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Manifest:
    """Read a manifest from a YAML file, changed by `overrides` (KEY=VALUE); UserError if a value is invalid."""
    return load_settings(Manifest, path, overrides)


def folder_manifest(
    folder: str | os.PathLike[str], repository: str, *, license: str | None = None, evaluation: Sequence[str] = ()
) -> Manifest:
    """Return a manifest that publishes one checkpoint folder as `repository` ("owner/name").

    If `license` is None, the licence is taken from the card of the checkpoint or of its parent (see `stored_license`).
    """
    check_repository_id(repository)
    namespace, _, name = repository.partition("/")
    if license is None and os.path.isdir(source := resolve_checkpoint(folder)):
        from modular_star_encoder.inference.checkpoints import stored_license

        license = known if (known := stored_license(source)) in _LICENSES.split() else None
    entry = RepositorySettings(name=name, checkpoint=os.fspath(folder), evaluation=tuple(evaluation))
    return Manifest(namespace=namespace, title=name, license=license, repositories=(entry,))
