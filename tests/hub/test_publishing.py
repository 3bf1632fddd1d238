import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from huggingface_hub import HfApi

from modular_star_encoder.hub import publishing
from modular_star_encoder.hub.publishing import publish, push
from modular_star_encoder.hub.staging import stage_repositories
from modular_star_encoder.utils.http import wrap_hub_errors
from tests.errors import raises
from tests.hub import stand_in_hub
from tests.hub.stand_in_hub import DROP, DROP_REPLY, TOKEN
from tests.tiny import contents

pytestmark = pytest.mark.slow

LARGE = {"model.safetensors", "quality_by_latency.png"}


@pytest.fixture(scope="module")
def staged(plan, tmp_path_factory):
    """Two versions of a repository, which differ in every large file and in the card."""
    first = stage_repositories(plan, tmp_path_factory.mktemp("first"))[1]
    folder = shutil.copytree(first.folder, tmp_path_factory.mktemp("second") / "tiny")
    for name in LARGE:
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "Second.\n")
    (folder / "exit_profile.json").unlink()
    return first, replace(first, folder=folder)


def test_a_dry_run_reports_what_differs_and_writes_nothing(hub, api, staged):
    first, second = staged
    dry = push(first, api)
    assert {(change.kind, change.path) for change in dry.changes} == {("+", name) for name in contents(first.folder)}
    assert str(dry).splitlines()[-1] == "nothing was uploaded: a dry run; --upload uploads the changes"
    assert hub.repositories == {}
    assert not [method for method, _ in hub.requests if method not in ("GET", "HEAD")]
    push(first, api, upload=True)
    changes = {change.path: change.kind for change in push(second, api).changes}
    assert changes == {"README.md": "~", "exit_profile.json": "-", **dict.fromkeys(LARGE, "~")}
    assert contents(first.folder) == hub.files("me/tiny")


def test_an_upload_is_one_commit_and_the_same_again_is_none(hub, api, staged):
    first, second = staged
    done = push(first, api, upload=True)
    assert hub.files("me/tiny") == contents(first.folder)
    assert hub.repositories["me/tiny"].private
    assert hub.commits("me/tiny")[:-1] == [done.revision]
    last = str(done).splitlines()[-1]
    assert last == f"uploaded revision {done.revision} to the private repository {hub.endpoint}/me/tiny"
    for name in ("AutoModel.from_pretrained", "SentenceTransformer"):
        assert f'{name}("me/tiny", revision="{done.revision}"' in str(done)
    again = push(first, api, upload=True)
    assert (again.changes, again.revision, again.uploaded) == ((), done.revision, False)
    assert "nothing differs" in str(again)
    sent = len([path for method, path in hub.requests if method == "PUT"])
    push(second, api, upload=True)
    assert hub.files("me/tiny") == contents(second.folder)
    assert len(hub.commits("me/tiny")) == 3
    assert len([path for method, path in hub.requests if method == "PUT"]) == sent + 2


def nth(number, method, words, fault):
    """Return `fault` for request `number` (from 0) of those with `method` and `words`; for all if it is negative."""
    seen = []

    def answer(asked, path):
        if asked != method or words not in path:
            return None
        seen.append(path)
        return fault if number < 0 or len(seen) == number + 1 else None

    return answer


FAULTS = {
    "the batch of large files is refused": (nth(-1, "POST", "lfs/objects/batch", 500), "refuses the upload to me/tiny"),
    "the second large file fails": (nth(1, "PUT", "/lfs/", 403), "refuses the upload to me/tiny: "),
    "the connection breaks in a large file": (nth(-1, "PUT", "/lfs/", DROP), "can't be reached"),
    "the commit fails": (nth(0, "POST", "/commit/", 500), "refuses the upload to me/tiny: "),
    "the answer to the commit is lost": (nth(0, "POST", "/commit/", DROP_REPLY), "can't be reached"),
    "files cannot be listed": (nth(-1, "GET", "/tree/", DROP), "can't be reached"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_after_a_fault_a_revision_is_whole_and_the_second_attempt_completes(hub, api, staged, name):
    first, second = staged
    fault, sentence = FAULTS[name]
    push(first, api, upload=True)
    hub.fault = fault
    with pytest.raises(OSError, match=sentence) as raised:
        push(second, api, upload=True)
    assert TOKEN not in str(raised.value)
    assert "\n" not in str(raised.value)
    applied = name == "the answer to the commit is lost"
    assert hub.files("me/tiny") == contents((second if applied else first).folder)
    hub.fault = None
    assert push(second, api, upload=True).uploaded is not applied
    assert hub.files("me/tiny") == contents(second.folder)
    assert len(hub.commits("me/tiny")) == 3


def test_a_fault_in_a_new_repository_leaves_it_empty_and_a_transient_one_is_outlived(hub, api, staged):
    hub.fault = nth(1, "PUT", "/lfs/", 403)
    with pytest.raises(OSError, match="refuses the upload"):
        push(staged[0], api, upload=True)
    assert hub.files("me/tiny") == {}
    hub.fault = nth(0, "PUT", "/lfs/", 500)
    push(staged[0], api, upload=True)
    assert hub.files("me/tiny") == contents(staged[0].folder)


def test_a_commit_of_someone_else_is_not_overwritten(hub, api, staged):
    first, second = staged
    push(first, api, upload=True)

    def meanwhile(method, path):
        if "/commit/" in path:
            theirs = {"theirs.txt": (b"theirs", False)}
            hub.repositories["me/tiny"].commit("main", theirs, "theirs")

    hub.fault = meanwhile
    with pytest.raises(OSError, match="me/tiny was changed by someone else"):
        push(second, api, upload=True)
    assert hub.files("me/tiny") == {"theirs.txt": b"theirs"}
    hub.fault = None
    assert "-" in {change.kind for change in push(second, api, upload=True).changes}
    assert hub.files("me/tiny") == contents(second.folder)


def test_of_two_uploads_at_once_one_is_whole_and_the_other_changes_nothing(hub, api, staged):
    both_are_ready = threading.Barrier(2)

    def wait(method, path):
        if "/commit/" in path:
            both_are_ready.wait(60)

    def upload(one):
        try:
            return push(one, HfApi(endpoint=hub.endpoint, token=TOKEN), upload=True).uploaded
        except OSError as error:
            return str(error)

    hub.fault = wait
    with ThreadPoolExecutor(2) as pool:
        results = [*pool.map(upload, staged)]
    hub.fault = None
    assert results.count(True) == 1, results
    assert any("me/tiny was changed by someone else" in str(one) for one in results), results
    winner = results.index(True)
    assert hub.files("me/tiny") == contents(staged[winner].folder)
    assert push(staged[1 - winner], api, upload=True).uploaded
    assert hub.files("me/tiny") == contents(staged[1 - winner].folder)


def test_a_refused_token_writes_nothing_and_is_not_repeated_and_a_hub_may_be_away(hub, staged):
    for token in (wrong := "hf_" + "wrong" * 7, False):
        with pytest.raises(OSError, match="refuses the upload to me/tiny") as raised:
            push(staged[0], HfApi(endpoint=hub.endpoint, token=token), upload=True)
        assert wrong not in str(raised.value)
    assert hub.repositories == {}
    with pytest.raises(OSError, match="can't be reached"):
        push(staged[0], HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))


@pytest.mark.parametrize("answer", [[1, 2, 3], None, "text", {}, {"id": 5, "sha": 7, "siblings": "abc"}])
def test_an_answer_of_an_unknown_form_is_one_sentence(hub, api, staged, monkeypatch, answer):
    monkeypatch.setattr(stand_in_hub._Handler, "_route", lambda *_: (200, answer, {}))
    with pytest.raises(OSError, match="The Hub sent an answer of an unknown form"):
        push(staged[0], api)
    with pytest.raises(KeyError), wrap_hub_errors("me/b"):  # a fault of ours is not the Hub's
        {}["a"]


FILE = {"type": "file", "path": "a", "size": 1, "oid": "x"}
UNASKED = {"oid": "0" * 64, "size": 1, "actions": {}}
REFUSED = {"oid": "x", "size": 1, "error": {"code": 422, "message": f"no right for {TOKEN}"}}
ODD = {
    "not the gzip it says": ("/revision/main", (200, b"no", {"Content-Encoding": "gzip"})),
    "redirected to itself": ("/revision/main", (302, b"", {"Location": "/api/models/me/tiny/revision/main"})),
    "a date that is none": ("/revision/main", (200, {"id": "me/tiny", "sha": "a", "lastModified": "yesterday"}, {})),
    "a path that is a number": ("/tree/", (200, [FILE | {"path": 7}], {})),
    "a size that is null": ("/tree/", (200, [FILE | {"size": None}], {})),
    "an upload that nobody asked for": ("/batch", (200, {"objects": [UNASKED]}, {})),
    "the token in an error": ("/batch", (200, {"objects": [REFUSED]}, {})),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_a_sentence_on_the_hub_without_the_token(hub, api, staged, monkeypatch, name):
    push(staged[0], api, upload=True)
    (part, answer), route = ODD[name], stand_in_hub._Handler._route
    odd = lambda self, hub, path, *rest: answer if part in path else route(self, hub, path, *rest)  # noqa: E731
    monkeypatch.setattr(stand_in_hub._Handler, "_route", odd)
    with pytest.raises(OSError, match=r"[Tt]he Hub") as raised:
        str(push(staged[1], api, upload=part != "/tree/"))
    assert TOKEN not in str(raised.value)


def test_branches_start_empty_slices_name_their_parents_revision_and_the_same_again_is_nothing(
    hub, api, plan, monkeypatch, tmp_path
):
    monkeypatch.setattr(publishing, "verify_repositories", lambda *_, **__: {})
    publications = publish(plan, upload=True, api=api, progress=False, staging=tmp_path / "staged")
    places = [f"{one.repository} {one.branch}" for one in publications]
    names = ["tiny-pretrained", "tiny", "tiny-1", "tiny-2", "tiny-4"]
    assert places == [*(f"me/{name} main" for name in names), "me/tiny exit-2"]
    assert {path.name for path in (tmp_path / "staged").iterdir()} == {*names, "tiny@exit-2"}
    assert len(hub.commits("me/tiny", "exit-2")) == len(hub.commits("me/tiny")) == 2
    main, branch = hub.files("me/tiny"), hub.files("me/tiny", "exit-2")
    assert len(branch["model.safetensors"]) < len(main["model.safetensors"])
    for files, parent in ((hub.files("me/tiny-1"), 1), (branch, 1), (main, 0)):
        assert f"revision `{publications[parent].revision}`" in files["README.md"].decode()
    again = publish(plan, upload=True, api=api, progress=False)
    assert [(one.changes, one.revision) for one in again] == [((), one.revision) for one in publications]


def test_nothing_is_sent_if_one_repository_does_not_pass(hub, api, plan, monkeypatch, tmp_path):
    def spoilt(manifest, folder):
        staged = stage_repositories(manifest, folder)
        (staged[-1].folder / "notes.txt").write_text("mine")
        return staged

    monkeypatch.setattr(publishing, "stage_repositories", spoilt)
    with raises("hub.files.unexpected", "notes.txt"):
        publish(plan, upload=True, api=api, progress=False, staging=tmp_path / "staged")
    assert hub.requests == [("HEAD", "/")]  # whether the Hub answers
    assert list(tmp_path.iterdir()) == []


def test_without_a_licence_nothing_is_uploaded(hub, api, plan, tmp_path):
    with raises("hub.license", "--license NAME"):
        publish(replace(plan, license=None), upload=True, api=api, progress=False, staging=tmp_path / "staged")
    assert (hub.requests, list(tmp_path.iterdir())) == ([], [])


def test_without_a_hub_a_dry_run_verifies_and_an_upload_fails_at_once(plan, monkeypatch, tmp_path):
    differences = dict.fromkeys([one.key for one in plan.repositories], 1e-7)
    monkeypatch.setattr(publishing, "verify_repositories", lambda *_, **__: differences)
    away = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    done = publish(plan, api=away, progress=False)[1]
    assert {change.path for change in done.changes} >= {"README.md", "model.safetensors"}
    shown = str(done).splitlines()
    assert "1.0e-07" in shown[-3]
    assert "127.0.0.1" in shown[-2]
    with pytest.raises(OSError, match=r"127\.0\.0\.1 can't be reached"):
        publish(plan, upload=True, api=away, progress=False, staging=tmp_path / "staged")
    assert not list(tmp_path.iterdir())
