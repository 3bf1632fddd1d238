"""Publish repositories on the Hub: check them, then report the changes or upload them, one commit per repository."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open

from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.hub import model_card
from modular_star_encoder.hub.manifest import MAIN, Manifest
from modular_star_encoder.hub.model_card import CARD, StagedRepository, check_card, write_card
from modular_star_encoder.hub.staging import TOKENIZER, stage_repositories
from modular_star_encoder.hub.subprocess_check import ReloadRequest, embed_batch, verify_reload
from modular_star_encoder.inference import PROFILE_NAME
from modular_star_encoder.inference.checkpoints import SENTENCE_TRANSFORMER_FILES
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import fits, scratch_folder, staged_file, staged_folder
from modular_star_encoder.utils.http import check_hub, wrap_hub_errors

KEPT = (".gitattributes",)  # files that the Hub creates and no commit deletes
ADDED, CHANGED, DELETED = "+", "~", "-"

# All files except weights that `stage_repositories` may write. If a needed file is missing, loading fails later.
EXPECTED = {
    *("configuration_modular_star_encoder.py", "modeling_modular_star_encoder.py", "config.json"),
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(CARD, PROFILE_NAME, model_card.LATENCY_FIGURE, model_card.DEPTH_FIGURE),
    *SENTENCE_TRANSFORMER_FILES,
}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

SECRETS = (
    re.compile(rb"\b(hf|api_org)_[A-Za-z0-9]{20,}"),
    re.compile(rb"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,})"),
    re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    re.compile(rb"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(rb"\bxox[abposr]-[\w-]{10,}"),
    re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(rb"://[^/\s:@\"']+:[^/\s:@\"']+@"),
)
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pt2", ".pth")
TEXT_LIMIT = 64 << 20

TEXTS = ("add two numbers", "def subtract(first, second):\n    return first - second", "x")
TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}
"""{dtype: largest allowed difference in a component between embeddings of a repository and of its checkpoint}."""


class Change(NamedTuple):
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
    revision: str | None  # latest commit of the branch; None if the branch does not exist or the Hub is unreachable
    uploaded: bool = False  # whether the changes were uploaded
    difference: float | None = None  # largest difference between embeddings of repository and source checkpoint
    url: str = ""  # web address of the branch; empty if nothing was uploaded
    private: bool = True  # whether the repository is private; only meaningful after an upload
    unreachable: str = ""  # why a dry run could not compare the files with the Hub; `changes` then has all files

    def __str__(self) -> str:
        name = self.repository if self.branch == MAIN else f"{self.repository}, branch {self.branch}"
        lines = [f"{change.size:>14,}  {change.kind} {change.path}" for change in self.changes]
        if self.difference is not None:
            lines.append(
                "verified: no secret, pickle or unexpected file; the model loads without this package, and gives "
                f"the checkpoint's embeddings at all exits, with differences of at most {self.difference:.1e}"
            )
        if self.unreachable:
            lines.append(f"not compared with the Hub: {self.unreachable}")
        if not self.changes:
            lines.append(f"nothing differs from revision {self.revision}")
        elif self.uploaded:
            arguments = f'"{self.repository}", revision="{self.revision}", trust_remote_code=True'
            lines.append("load the model with transformers or sentence-transformers:")
            lines += [f"  {name}({arguments})" for name in ("AutoModel.from_pretrained", "SentenceTransformer")]
            lines.append("`mose` accepts the repository's name too, for example as --model of `mose search`")
            kind = "private" if self.private else "public"
            lines.append(f"uploaded revision {self.revision} to the {kind} repository {self.url}")
        else:
            lines.append("nothing was uploaded: a dry run; --upload uploads the changes")
        return "\n".join([f"{name}:", *lines])


def publish(
    manifest: Manifest,
    *,
    upload: bool = False,
    private: bool = True,
    staging: str | os.PathLike[str] | None = None,
    api: HfApi | None = None,
    progress: bool = True,
) -> list[Publication]:
    """Stage and verify all repositories of a manifest, then upload them or report what an upload would change.

    Staging writes each repository to a folder: checkpoint, SentenceTransformer files, exit profile, figure and card.
    Verification looks for secrets, pickles and unexpected files. It also loads each repository in a new process without
    this package, and compares its embeddings with those of the source checkpoint. If one repository fails, none is
    uploaded. Each changed repository gets one commit, parents first. If an upload fails, each repository has either its
    old or its new revision, and the next call uploads the rest.

    Args:
        manifest: the repositories; see `load_manifest` (a YAML file) and `folder_manifest` (one checkpoint folder).
        upload: whether to upload; if False, nothing is sent, and the call works without a connection to the Hub.
        private: whether new repositories are private; existing repositories stay private or public.
        staging: folder that keeps the staged repositories; it must be empty or not exist. By default, the staged
            repositories are removed.
        api: client of the Hub; by default one for `HF_ENDPOINT`, with the token of `hf auth login` or `HF_TOKEN`.
        progress: whether to show progress.

    Returns:
        One `Publication` per repository, in the order of the manifest; its `str` is what `mose publish` prints.

    Raises:
        UserError: no licence is given for an upload, or a checkpoint can't be staged or fails the verification;
            nothing was sent.
        OSError: the Hub rejects the request or can't be reached.

    Example:
        >>> from modular_star_encoder.hub.manifest import folder_manifest
        >>> manifest = folder_manifest("runs/finetuned/model", "my-name/my-encoder")
        >>> print(*publish(manifest), sep="\\n")  # doctest: +SKIP
        my-name/my-encoder:
                 5,123  + README.md
        ...
        nothing was uploaded: a dry run; --upload uploads the changes
    """
    if upload and manifest.license is None:
        message = "Name the licence of the weights before the upload: --license NAME, or `license:` in publish.yaml."
        raise UserError("hub.license", message)
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
    """Return the card of a manifest's first repository; if `out` is given, write card and figure to this folder."""
    with scratch_folder("card") as folder:
        staged = stage_repositories(manifest, folder)[0]
        check_card(staged.folder / CARD)
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            for name in filter(None, (CARD, staged.figure)):
                with staged_file(Path(out, name)) as temporary:  # a link is replaced, not followed
                    shutil.copyfile(staged.folder / name, temporary)
        return (staged.folder / CARD).read_text(encoding="utf-8")


def verify_repositories(staged: Sequence[StagedRepository], *, progress: bool = True) -> dict[str, float]:
    """Check the files, card and tokenizer of staged repositories, and that each loads without this package.

    Returns {repository's key: largest difference from its source checkpoint's embeddings}; UserError if a check fails.
    """
    for one in staged:
        check_files(one.folder, tuple(one.settings.files))
        check_card(one.folder / CARD)
        _check_tokenizer(one.folder)
    requests = [
        ReloadRequest(str(one.folder), TEXTS, one.prompts.get("query", ""), one.config.exit_layers) for one in staged
    ]
    reloaded = verify_reload(requests, progress=progress)
    return {one.settings.key: _compare(one, found) for one, found in zip(staged, reloaded, strict=True)}


def check_files(folder: Path, extra: Sequence[str] = ()) -> None:
    """Raise UserError if a file in `folder` is unsafe, or is neither weights nor named in `EXPECTED` or `extra`."""
    extra = [PurePosixPath(path).as_posix() for path in extra]
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        key, fault = "unexpected", "is not expected; list it under `files` in the manifest"
        if name in EXPECTED or name in extra or WEIGHTS.fullmatch(name):
            key, fault = _content_fault(path)
        if key:
            raise UserError(f"hub.files.{key}", f"{name} in {folder} {fault}.")


def _content_fault(path: Path) -> tuple[str, str]:
    """Return (last part of an error key, description of the fault) if a file is unsafe to publish, else ("", "")."""
    token, home = (get_token() or "").encode(), os.path.expanduser("~").rstrip("/").encode()
    with path.open("rb") as file:
        text = file.read(TEXT_LIMIT)
    if path.suffix in PICKLES or re.match(rb"\x80[\x02-\x05]|PK\x03\x04", text):
        return "pickle", "may be a pickle; publish weights as safetensors only"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as tensors:
                text = json.dumps(tensors.metadata() or {}).encode()
        except SafetensorError as error:
            return "safetensors", f"is not a safetensors file: {error}"
    places = [match.start() for pattern in SECRETS if (match := pattern.search(text))]
    places += [text.index(token)] if token and token in text else []
    if places:
        line = text[: places[0]].count(b"\n") + 1
        return "secret", f"may contain a secret in line {line}: remove it"
    if len(home) > 1 and home + b"/" in text:
        return "local_path", f"contains a path inside your home folder, {home.decode()}: remove it"
    return "", ""


def _check_tokenizer(folder: Path) -> None:
    tokenizer, names = load_tokenizer(folder), ("pad", "sep", "cls", "mask")
    faults = [f"has no {name} token" for name in names if getattr(tokenizer, f"{name}_token") is None]
    declared = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    if declared not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        faults.append(f"has tokenizer_class {declared!r}, which splits numbers differently from TokenizersBackend")
    if faults:
        raise UserError("hub.tokenizer", f"The tokenizer of {folder} {' and '.join(faults)}.")


def _compare(staged: StagedRepository, found: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference between the outputs `found` and the source's; UserError if above `TOLERANCE`."""
    own, dtype = _source_embeddings(staged)
    largest = 0.0
    for name, expected in own.items():
        scale = np.abs(expected).max() if name == "masked_lm" else 1.0
        difference = float(np.abs(expected - found[name]).max() / scale)
        if not difference <= TOLERANCE[dtype]:
            differs = f"{name} differs by {difference:.2g} (allowed: {TOLERANCE[dtype]:.2g})"
            message = f"{staged.folder} does not give the outputs of {staged.source}: {differs}."
            raise UserError("hub.reload.differs", message)
        largest = max(largest, difference)
    return largest


@torch.inference_mode()
def _source_embeddings(staged: StagedRepository) -> tuple[dict[str, np.ndarray], str]:
    model_class = ModularStarEncoderForRetrieval if staged.retrieval else ModularStarEncoderForPreTraining
    model = model_class.from_pretrained(staged.source).eval()
    tokenizer = load_tokenizer(staged.folder)
    cut = {"truncation": True, "max_length": model.config.max_position_embeddings}
    prompt, exits = staged.prompts.get("query", ""), staged.config.exit_layers
    batch = tokenizer([prompt + text for text in TEXTS], padding=True, return_tensors="pt", **cut)
    encoder = model if staged.retrieval else model.model
    own = {f"exit-{k}": embed_batch(encoder, batch, exit_layer=k) for k in exits}
    own["auto_model"] = own["sentence_transformer"] = own[f"exit-{exits[-1]}"]
    if not staged.retrieval:
        own["masked_lm"] = model(**batch, exit_layer=exits[-1]).logits[:, -1].float().numpy()
    return own, str(model.dtype).removeprefix("torch.")


def push(staged: StagedRepository, api: HfApi, *, upload: bool = False, private: bool = True) -> Publication:
    """Compare a staged repository with the Hub and, if `upload`, commit the changes; return a `Publication`.

    OSError if another commit changes the branch at the same time.
    """
    repository, branch = staged.repository, staged.settings.branch
    with wrap_hub_errors(repository):
        head, there, _ = _remote(api, repository, branch)
        changes = compare(staged.folder, there)
        if not upload or not changes:
            return Publication(repository, branch, changes, head)
        if head is None:
            api.create_repo(repository, private=private, exist_ok=True)
            if branch != MAIN:  # a new branch starts at the first, empty commit
                first = api.list_repo_commits(repository)[-1].commit_id
                api.create_branch(repository, branch=branch, revision=first, exist_ok=True)
            head, there, _ = _remote(api, repository, branch)
            changes = compare(staged.folder, there)
        deleted = [change.path for change in changes if change.kind == DELETED]
        written = [CommitOperationAdd(one.path, staged.folder / one.path) for one in changes if one.kind != DELETED]
        edits: list[CommitOperationDelete | CommitOperationAdd] = [*map(CommitOperationDelete, deleted), *written]
        commit = api.create_commit(repository, edits, commit_message="Publish", revision=branch, parent_commit=head)
        _, there, is_private = _remote(api, repository, commit.oid)
        left = compare(staged.folder, there)
    if left:
        raise OSError(f"{left[0].path} in {repository} differs from the local file after the upload. Publish again.")
    url = f"{api.endpoint}/{repository}{'' if branch == MAIN else f'/tree/{branch}'}"
    return Publication(repository, branch, changes, commit.oid, uploaded=True, url=url, private=is_private)


def compare(folder: Path, there: dict[str, RepoFile]) -> tuple[Change, ...]:
    """Return the changes, sorted by path, that make the files on the Hub, `there`, equal to the files in a folder."""
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
    """Return whether a local file equals the Hub's file `there`, by SHA-256 (files in LFS) or git's SHA-1."""
    with file.open("rb") as content:
        if there.lfs is not None:
            return hashlib.file_digest(content, "sha256").hexdigest() == there.lfs.sha256
        data = content.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == there.blob_id


def _remote(api: HfApi, repository: str, revision: str) -> tuple[str | None, dict[str, RepoFile], bool]:
    """Return (latest commit of `revision`, {path: file}, whether the repository is private).

    The commit is None if the repository or the revision does not exist.
    """
    try:
        info = api.model_info(repository, revision=revision)
        tree = api.list_repo_tree(repository, revision=info.sha, recursive=True)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None, {}, True
    if not fits([one.path for one in files], list[str]) or not fits([one.size for one in files], list[int]):
        raise OSError(f"The Hub's list of the files of {repository} has an unknown form. Check HF_ENDPOINT.")
    return info.sha, {one.path: one for one in files}, bool(info.private)
