"""A stand-in of the Hub on loopback: what `huggingface_hub` and `transformers` ask of it, kept in memory.

Repositories are chains of commits, whole or not there at all, as on the real one; large files go by Git LFS's basic
transfer (clients need HF_HUB_DISABLE_XET=1). A *fault* answers requests otherwise.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loopback import LoopbackHandler, LoopbackServer

TOKEN = "hf_" + "standin" * 4
DROP, DROP_REPLY = "drop", "drop reply"
"""Faults: close the connection without an answer, before or after the request is carried out."""

Fault = Callable[[str, str], int | str | None]
LFS = re.compile(r"\.(safetensors|png|onnx|bin)$")


@dataclass
class Repository:
    """Branches and commits; the files of a commit are {path: (content, whether it is stored by LFS)}."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, tuple[bytes, bool]], title: str) -> str:
        parent = self.branches.get(branch)
        sums = sorted((path, hashlib.sha1(content).hexdigest()) for path, (content, _) in files.items())
        name = hashlib.sha1(json.dumps([parent, sums, title, len(self.commits)]).encode()).hexdigest()
        self.commits[name] = {"parent": parent, "files": files, "title": title}
        self.branches[branch] = name
        return name

    def history(self, name: str | None) -> list[str]:
        names = []
        while name is not None:
            names.append(name)
            name = self.commits[name]["parent"]
        return names


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class StandInHub(LoopbackServer):
    """Serves while it is used as a context manager."""

    def __init__(self) -> None:
        super().__init__(_Handler, self)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # what was uploaded by LFS, by SHA-256, whether committed or not
        self.requests: list[tuple[str, str]] = []  # method and path
        self.fault: Fault | None = None  # sees method and path; may give a status, DROP or DROP_REPLY
        self.lock = threading.RLock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Any) -> dict[str, str]:
        """The environment of a process that knows no other Hub."""
        settings = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        return {**settings, "HF_HUB_CACHE": f"{home}/hub", "HF_HUB_OFFLINE": "0"}

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """{path: content} at the head of a branch, without the file that the Hub writes itself."""
        found = self.repositories[repository]
        files = found.commits[found.branches[branch]]["files"]
        return {path: content for path, (content, _) in files.items() if path != ".gitattributes"}

    def commits(self, repository: str, branch: str = "main") -> list[str]:
        """Commits of a branch, the newest first."""
        found = self.repositories[repository]
        return found.history(found.branches[branch])


class _Handler(LoopbackHandler):
    def answer(self) -> None:
        hub: StandInHub = self.server.owner
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with hub.lock:
            hub.requests.append((self.command, path))
        fault = hub.fault(self.command, path) if hub.fault else None  # it may wait for another request
        try:
            if isinstance(fault, int):
                raise Refusal(fault, "A fault of the stand-in")
            with hub.lock:
                reply = None if fault == DROP else self._route(hub, path, parse_qs(url.query), body)
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            reply = refusal.status, {"error": str(refusal)}, headers
        if fault not in (DROP, DROP_REPLY):
            self.reply(*reply)
            return
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _route(
        self, hub: StandInHub, path: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        for method, pattern, answer, needs_token in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if self.headers.get("Authorization") and not signed:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                if needs_token and not signed:
                    raise Refusal(401, "Invalid username or password.")
                found = match.groupdict()
                if "id" in found:
                    repository = hub.repositories.get(found["id"])
                    if repository is None or (repository.private and not signed):
                        raise Refusal(404 if signed else 401, "Repository not found", "RepoNotFound")
                    found["repository"] = repository
                return answer(hub, body=body, query=query, **found)
        raise Refusal(404, f"The stand-in has no {self.command} {path}", "EntryNotFound")


def _revision(repository: Repository, revision: str) -> str:
    name = repository.branches.get(revision, revision)
    if name not in repository.commits:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return name


def _create(hub: StandInHub, body: bytes, **_: Any) -> Any:
    asked = json.loads(body)
    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
    url = {"url": f"{hub.endpoint}/{name}"}
    if name in hub.repositories:
        return 409, {"error": "You already created this model repo", **url}, {}
    private = asked.get("private") or asked.get("visibility") == "private"
    hub.repositories[name] = Repository(bool(private))
    attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
    hub.repositories[name].commit("main", {".gitattributes": (attributes, False)}, "initial commit")
    return 200, url, {}


def _info(hub: StandInHub, id: str, repository: Repository, revision: str = "main", **_: Any) -> Any:
    name = _revision(repository, revision)
    siblings = [{"rfilename": path} for path in repository.commits[name]["files"]]
    return 200, {"id": id, "sha": name, "private": repository.private, "siblings": siblings, "tags": []}, {}


def _sums(content: bytes, large: bool) -> dict[str, Any]:
    if not large:
        return {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    sha256 = hashlib.sha256(content).hexdigest()
    lfs = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return {"oid": hashlib.sha1(sha256.encode()).hexdigest(), "lfs": lfs}


def _tree(hub: StandInHub, repository: Repository, revision: str, folder: str = "", **_: Any) -> Any:
    if folder:  # clients look for folders that no repository of the tests has
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    files = repository.commits[_revision(repository, revision)]["files"].items()
    return 200, [{"type": "file", "path": path, "size": len(file[0]), **_sums(*file)} for path, file in files], {}


def _history(hub: StandInHub, repository: Repository, revision: str, **_: Any) -> Any:
    names = repository.history(_revision(repository, revision))
    fixed = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "message": ""}
    return 200, [{"id": name, "title": repository.commits[name]["title"], **fixed} for name in names], {}


def _branch(hub: StandInHub, repository: Repository, branch: str, body: bytes, **_: Any) -> Any:
    repository.branches[branch] = _revision(repository, json.loads(body or b"{}").get("startingPoint", "main"))
    return 200, {}, {}


def _preupload(hub: StandInHub, repository: Repository, revision: str, body: bytes, **_: Any) -> Any:
    files = repository.commits[_revision(repository, revision)]["files"]
    answers = []
    for asked in json.loads(body)["files"]:
        large = bool(LFS.search(asked["path"])) or b"\0" in base64.b64decode(asked["sample"])
        answers.append({"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        if asked["path"] in files:
            sums = _sums(*files[asked["path"]])
            answers[-1]["oid"] = sums.get("lfs", sums)["oid"]
    return 200, {"files": answers}, {}


def _batch(hub: StandInHub, body: bytes, **_: Any) -> Any:
    objects = []
    for one in json.loads(body)["objects"]:
        there = {} if one["oid"] in hub.objects else {"upload": {"href": f"{hub.endpoint}/lfs/{one['oid']}"}}
        objects.append({**one, **({"actions": there} if there else {})})
    return 200, {"transfer": "basic", "objects": objects}, {}


def _put(hub: StandInHub, oid: str, body: bytes, **_: Any) -> Any:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.objects[oid] = body
    return 200, {}, {}


def _commit(hub: StandInHub, id: str, repository: Repository, revision: str, body: bytes, **_: Any) -> Any:
    header, *operations = [json.loads(line) for line in body.splitlines()]
    head = repository.branches[revision]
    if header["value"].get("parentCommit", head) != head:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repository.commits[head]["files"])
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = (base64.b64decode(value["content"]), False)
        elif operation["key"] == "lfsFile":
            files[value["path"]] = (hub.objects[value["oid"]], True)
        else:
            assert operation["key"] == "deletedFile"
            del files[value["path"]]
    name = repository.commit(revision, files, header["value"]["summary"])
    return 200, {"commitUrl": f"{hub.endpoint}/{id}/commit/{name}", "commitOid": name, "success": True}, {}


def _resolve(hub: StandInHub, repository: Repository, revision: str, path: str, **_: Any) -> Any:
    name = _revision(repository, revision)
    if path not in repository.commits[name]["files"]:
        raise Refusal(404, f"{path} does not exist", "EntryNotFound")
    content, large = repository.commits[name]["files"][path]
    headers = {"X-Repo-Commit": name, "Content-Type": "application/octet-stream"}
    sums = _sums(content, large)
    if not large:
        return 200, content, {**headers, "ETag": f'"{sums["oid"]}"'}
    oid = sums["lfs"]["oid"]
    # As on the real Hub, large files are on another host; clients read the checksum in the Hub's headers.
    storage = hub.endpoint.replace("127.0.0.1", "localhost")
    linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(content), "Location": f"{storage}/lfs/{oid}"}
    return 302, b"", {**headers, **linked}


def _object(hub: StandInHub, oid: str, **_: Any) -> Any:
    return 200, hub.objects[oid], {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}


_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
_MODEL = rf"/api/models/{_ID}"
_READ = ("GET", "HEAD")
_ME = {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
ROUTES = (
    (_READ, "/api/whoami-v2", lambda hub, **_: (200, _ME, {}), True),
    (("POST",), "/api/repos/create", _create, True),
    (("POST",), "/api/validate-yaml", lambda hub, **_: (200, {"errors": [], "warnings": []}, {}), False),
    (_READ, _MODEL, _info, False),
    (_READ, rf"{_MODEL}/revision/(?P<revision>.+)", _info, False),
    (_READ, rf"{_MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _tree, False),
    (_READ, rf"{_MODEL}/commits/(?P<revision>.+)", _history, False),
    (("POST",), rf"{_MODEL}/branch/(?P<branch>.+)", _branch, True),
    (("POST",), rf"{_MODEL}/preupload/(?P<revision>.+)", _preupload, True),
    (("POST",), rf"{_MODEL}/commit/(?P<revision>.+)", _commit, True),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", _batch, True),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", _put, False),
    (_READ, r"/lfs/(?P<oid>[0-9a-f]{64})", _object, False),
    (_READ, rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve, False),
)
