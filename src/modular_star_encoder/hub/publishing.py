"""Publish repositories on the Hub: report what would change, or upload it in one commit per repository."""

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from modular_star_encoder.hub.manifest import MAIN, Manifest
from modular_star_encoder.hub.model_card import CARD, StagedRepository, check_card, write_card
from modular_star_encoder.hub.staging import stage_repositories
from modular_star_encoder.hub.verification import verify_repositories
from modular_star_encoder.utils.files import scratch_folder, staged_folder
from modular_star_encoder.utils.http import check_hub, wrap_hub_errors

KEPT = (".gitattributes",)  # files that the Hub creates
ADDED, CHANGED, DELETED = "+", "~", "-"


@dataclass(frozen=True, slots=True)
class Change:
    """A file that a commit adds (+), changes (~) or deletes (-), with its size in bytes."""

    kind: str
    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Publication:
    """The files that were, or would be, changed in one repository on the Hub."""

    repository: str
    branch: str
    changes: tuple[Change, ...]  # differences between the staged files and the Hub
    revision: str | None  # latest commit of the branch; None if the branch does not exist or `unreachable`
    uploaded: bool = False  # whether the changes were uploaded
    difference: float | None = None  # largest difference between embeddings of repository and source checkpoint
    unreachable: str = ""  # why a dry run could not compare the files with the Hub; `changes` then has all files

    def __str__(self) -> str:
        name = self.repository if self.branch == MAIN else f"{self.repository}, branch {self.branch}"
        lines = [f"{change.size:>14,}  {change.kind} {change.path}" for change in self.changes]
        if self.difference is not None:
            lines.append(
                "verified: no secret, pickle or unexpected file; loaded without this package, all exits embed as the "
                f"checkpoint does, with differences of at most {self.difference:.1e}"
            )
        if self.unreachable:
            lines.append(f"not compared with the Hub: {self.unreachable}")
        end = f"revision {self.revision}" if self.uploaded else "nothing was uploaded: a dry run"
        end = end if self.changes else f"nothing differs from revision {self.revision}"
        return "\n".join([f"{name}:", *lines, end])


def publish(
    manifest: Manifest,
    *,
    upload: bool = False,
    private: bool = True,
    staging: str | os.PathLike[str] | None = None,
    api: HfApi | None = None,
    progress: bool = True,
) -> list[Publication]:
    """Stage and verify all repositories of a manifest, then upload them or report the changes.

    Staging writes each repository to a folder: checkpoint, SentenceTransformer files, exit profile, figure and card.
    Verification looks for secrets, pickles and unexpected files, and compares the embeddings of each source checkpoint
    with those of a new process that has the repository's code but not this package. If a repository fails, nothing is
    uploaded. Each changed repository gets one commit, parents first. If an upload fails, each repository has either its
    old or its new revision, and the next call uploads the rest.

    Args:
        manifest: the repositories; see `load_manifest` (a YAML file) and `folder_manifest` (one checkpoint folder).
        upload: whether to upload; if False, nothing is sent, and the call works without a connection to the Hub.
        private: whether new repositories are private.
        staging: folder in which to keep the staged repositories; it must be empty or not exist. By default they are
            removed.
        api: client of the Hub; by default it uses `hf auth login`, `HF_TOKEN` and `HF_ENDPOINT`.
        progress: whether to show progress.

    Returns:
        One `Publication` per repository, in the order of the manifest; its `str` is what `mose publish` prints.

    Raises:
        UserError: a checkpoint can't be staged or fails the verification; nothing was sent.
        OSError: the Hub rejects the request or can't be reached.

    Example:
        >>> from modular_star_encoder.hub.manifest import folder_manifest
        >>> manifest = folder_manifest("runs/finetuned/model", "my-name/my-encoder")
        >>> print(*publish(manifest), sep="\\n")  # doctest: +SKIP
        my-name/my-encoder:
                 5,123  + README.md
        ...
        nothing was uploaded: a dry run
    """
    api, unreachable = api or HfApi(), ""
    try:
        check_hub(api.endpoint)
    except OSError as error:
        if upload:
            raise
        unreachable = str(error)
    kept = scratch_folder("publish") if staging is None else staged_folder(staging)
    with kept as folder:
        staged = stage_repositories(manifest, folder)
        differences = verify_repositories(staged, progress=progress)
        published: dict[str, Publication] = {}
        for one in staged:
            parent = published.get(one.settings.parent or "")
            if parent is not None:
                # In a dry run, a changed parent has no new commit, so its revision is unknown.
                write_card(one, manifest, None if parent.changes and not parent.uploaded else parent.revision)
                check_card(one.folder / CARD)
            key, place = one.settings.key, (one.repository, one.settings.branch)
            if unreachable:
                done = Publication(*place, compare(one.folder, {}), None, unreachable=unreachable)
            else:
                done = push(one, api, upload=upload, private=private)
            published[key] = replace(done, difference=differences.get(key))
    return list(published.values())


def write_folder_card(manifest: Manifest, out: str | os.PathLike[str] | None = None) -> str:
    """Return the card of the first repository in a manifest; write card and figure to the folder `out` if given."""
    with scratch_folder("card") as folder:
        staged = stage_repositories(manifest, folder)[0]
        check_card(staged.folder / CARD)
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            for name in filter(None, (CARD, staged.figure)):
                shutil.copyfile(staged.folder / name, Path(out, name))
        return (staged.folder / CARD).read_text(encoding="utf-8")


def push(staged: StagedRepository, api: HfApi, *, upload: bool = False, private: bool = True) -> Publication:
    """Make a branch on the Hub equal to the staged files, in one commit; raise OSError if someone else changes it."""
    repository, branch = staged.repository, staged.settings.branch
    with wrap_hub_errors(repository):
        head, there = _remote(api, repository, branch)
        changes = compare(staged.folder, there)
        if not upload or not changes:
            return Publication(repository, branch, changes, head)
        if head is None:
            api.create_repo(repository, private=private, exist_ok=True)
            if branch != MAIN:  # a new branch starts at the first, empty commit
                first = api.list_repo_commits(repository)[-1].commit_id
                api.create_branch(repository, branch=branch, revision=first, exist_ok=True)
            head, there = _remote(api, repository, branch)
            changes = compare(staged.folder, there)
        deleted = [change.path for change in changes if change.kind == DELETED]
        written = [CommitOperationAdd(one.path, staged.folder / one.path) for one in changes if one.kind != DELETED]
        edits: list[CommitOperationDelete | CommitOperationAdd] = [*map(CommitOperationDelete, deleted), *written]
        commit = api.create_commit(repository, edits, commit_message="Publish", revision=branch, parent_commit=head)
        left = compare(staged.folder, _remote(api, repository, commit.oid)[1])
    if left:
        raise OSError(f"After the upload, {left[0].path} in {repository} is not the staged file: publish again.")
    return Publication(repository, branch, changes, commit.oid, uploaded=True)


def compare(folder: Path, there: dict[str, RepoFile]) -> tuple[Change, ...]:
    """Return the changes, sorted by path, that turn files on the Hub, `there` {path: file}, into those of a folder."""
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    changes = [Change(DELETED, path, there[path].size) for path in set(there) - set(here) - set(KEPT)]
    for path, file in here.items():
        size = file.stat().st_size
        if path not in there:
            changes.append(Change(ADDED, path, size))
        elif size != there[path].size or not _same(file, there[path]):
            changes.append(Change(CHANGED, path, size))
    return tuple(sorted(changes, key=lambda change: change.path))


def _same(file: Path, there: RepoFile) -> bool:
    """Return whether a local file equals one on the Hub, by the Hub's checksum: SHA-256 in LFS, else git's SHA-1."""
    with file.open("rb") as content:
        if there.lfs is not None:
            return hashlib.file_digest(content, "sha256").hexdigest() == there.lfs.sha256
        data = content.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == there.blob_id


def _remote(api: HfApi, repository: str, revision: str) -> tuple[str | None, dict[str, RepoFile]]:
    """Return the latest commit of a branch on the Hub and {path: file}; (None, {}) if the branch does not exist."""
    try:
        head = api.model_info(repository, revision=revision).sha
        tree = api.list_repo_tree(repository, revision=head, recursive=True)
        return head, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None, {}
