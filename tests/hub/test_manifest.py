"""Manifests: their content, and the errors in it."""

import pytest

from modular_star_encoder.hub.manifest import folder_manifest, load_manifest
from tests.errors import raises
from tests.hub.repositories import manifest

ENTRY = {"name": "a", "checkpoint": "runs/a"}
SLICE = {"name": "b", "slice_of": "a", "exit_layer": 2}


def test_a_manifest_is_read_with_overrides(tmp_path):
    path = tmp_path / "publish.yaml"
    path.write_text(
        "namespace: null\ntitle: T\nlicense: mit\nrepositories:\n"
        "- {name: a, checkpoint: runs/a}\n- {name: a, branch: exit-2, slice_of: a, exit_layer: 2}\n"
    )
    read = load_manifest(path, ["namespace=me"])
    assert [entry.key for entry in read.repositories] == ["a", "a@exit-2"]
    assert {read.repository(entry) for entry in read.repositories} == {"me/a"}
    with raises("hub.manifest.namespace", "namespace=NAME"):
        load_manifest(path)


@pytest.mark.parametrize(
    ("entries", "key", "value"),
    [
        ([], "settings.value", "repositories"),
        ([{"name": "a"}], "hub.manifest.checkpoint", "a"),
        ([{**ENTRY, "slice_of": "b", "exit_layer": 2}], "hub.manifest.slice", "checkpoint"),
        ([ENTRY, {**SLICE, "recipe": "x"}], "hub.manifest.slice", "recipe"),
        ([ENTRY, {"name": "b", "slice_of": "a"}], "hub.manifest.exit_layer", "b"),
        ([SLICE, ENTRY], "hub.manifest.parent", "b comes from a"),
        ([ENTRY, ENTRY], "hub.manifest.twice", "a"),
        ([{**ENTRY, "name": "a/b/c"}], "hub.repository_id", "'me/a/b/c'"),
        ([{**ENTRY, "evaluation": "report.json"}], "settings.value", "evaluation"),
        ([{**ENTRY, "evaluation": None}], "settings.value", "evaluation"),
        ([{**ENTRY, "checkpoint": 5}], "settings.value", "checkpoint"),
        ([{**ENTRY, "name": 5}], "settings.value", "name"),
        ([{**ENTRY, "branch": 1.0}], "settings.value", "1.0"),
        ([{**ENTRY, "training_data": ["x"]}], "settings.value", "training_data"),
        ([{**ENTRY, "only_exit": "no"}], "settings.value", "'no'"),
        ([{**ENTRY, "files": ["x"]}], "settings.value", "files"),
        ([{**ENTRY, "files": {"../model.onnx": "x"}}], "hub.manifest.files", "'../model.onnx'"),
        ([{**ENTRY, "weights": "x"}], "settings.unknown", "weights"),
    ],
)
def test_a_contradiction_is_one_sentence(entries, key, value):
    with raises(key, value) as error:
        manifest(entries)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"datasets": "me/data"}, {"tags": "java"}, {"tags": None}, {"tags": [1]}, {"title": None}]
)
def test_one_word_is_not_a_list_and_a_title_is_needed(changes):
    with raises("settings.value", *changes):
        manifest([ENTRY], **changes)


def test_prose_may_be_left_empty():
    read = manifest([{**ENTRY, "training_data": None}], limits=None)
    assert (read.limits, read.repositories[0].training_data) == (None, None)


@pytest.mark.parametrize("license", [None, "", "other"])
def test_a_licence_has_a_name(license):
    with raises("hub.manifest.license"):
        manifest([ENTRY], license=license)


def test_a_folder_is_a_manifest_of_one_repository():
    (entry,) = folder_manifest("runs/a", "me/b", evaluation=["report.json"]).repositories
    assert (entry.key, entry.checkpoint, entry.evaluation) == ("b", "runs/a", ("report.json",))
    with raises("hub.repository_id", "'b'"):
        folder_manifest("runs/a", "b")
