"""Manifests: what they say, and what they refuse."""

import pytest

from modular_star_encoder.hub.manifest import folder_manifest, load_manifest
from tests.hub.repositories import manifest

ENTRY = {"name": "a", "checkpoint": "runs/a"}


def test_a_manifest_is_read_with_overrides(tmp_path):
    path = tmp_path / "publish.yaml"
    path.write_text(
        "namespace: null\ntitle: T\nlicense: mit\nrepositories:\n"
        "- {name: a, checkpoint: runs/a}\n- {name: a, branch: exit-2, slice_of: a, exit_layer: 2}\n"
    )
    read = load_manifest(path, ["namespace=me"])
    assert [entry.key for entry in read.repositories] == ["a", "a@exit-2"]
    assert {read.repository(entry) for entry in read.repositories} == {"me/a"}
    with pytest.raises(ValueError, match=r"namespace must be yours on the Hub: namespace=NAME\."):
        load_manifest(path)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([], "a list of at least one"),
        ([{"name": "a"}], "a needs either checkpoint or slice_of"),
        ([{**ENTRY, "slice_of": "b", "exit_layer": 2}], "a needs either checkpoint or slice_of"),
        ([ENTRY, {"name": "b", "slice_of": "a"}], "exit_layer goes with slice_of"),
        ([{"name": "b", "slice_of": "a", "exit_layer": 2}, ENTRY], "b comes from a, which must stand above it"),
        ([ENTRY, ENTRY], "a stands twice"),
        ([{**ENTRY, "name": "a/b/c"}], "'me/a/b/c' is no id of a repository"),
        ([{**ENTRY, "evaluation": "report.json"}], "evaluation must be a list"),
        ([{**ENTRY, "evaluation": None}], "a: evaluation must be a list of words, not None"),
        ([{**ENTRY, "checkpoint": 5}], "a: checkpoint must be words"),
        ([{**ENTRY, "name": 5}], "5: name must be words"),
        (
            [{**ENTRY, "branch": 1.0}],
            r"a@1\.0: branch must be words .in quotes, if YAML",
        ),
        ([{**ENTRY, "training_data": ["x"]}], "training_data must be words"),
        ([{**ENTRY, "only_exit": "no"}], "only_exit must be true or false, not 'no'"),
        ([{**ENTRY, "files": ["x"]}], "files must be a mapping of files"),
        ([{**ENTRY, "files": {"../model.onnx": "x"}}], "'../model.onnx' must be a path inside the repository"),
        ([{**ENTRY, "weights": "x"}], "repository 1 has unknown settings weights"),
        (
            [ENTRY, {"name": "b", "slice_of": "a", "exit_layer": 2, "recipe": "x"}],
            "figures and training are those of a",
        ),
    ],
)
def test_a_contradiction_is_one_sentence(entries, sentence):
    with pytest.raises(ValueError, match=sentence):
        manifest(entries)


@pytest.mark.parametrize("changes", [{"datasets": "me/data"}, {"tags": "java"}, {"tags": None}, {"tags": [1]}])
def test_one_word_is_no_list(changes):
    with pytest.raises(ValueError, match="must be a list of words, not"):
        manifest([ENTRY], **changes)


def test_prose_may_be_left_empty():
    read = manifest([{**ENTRY, "training_data": None}], limits=None)
    assert (read.limits, read.repositories[0].training_data) == (None, None)
    with pytest.raises(ValueError, match="title must be words"):
        manifest([ENTRY], title=None)


def test_a_licence_has_a_name():
    for license in (None, ""):
        with pytest.raises(ValueError, match="the Hub's name for one"):
            manifest([ENTRY], license=license)
    with pytest.raises(ValueError, match="needs license_name"):
        manifest([ENTRY], license="other")


def test_a_folder_is_a_manifest_of_one_repository():
    (entry,) = folder_manifest("runs/a", "me/b", evaluation=["report.json"]).repositories
    assert (entry.key, entry.checkpoint, entry.evaluation) == ("b", "runs/a", ("report.json",))
    with pytest.raises(ValueError, match="'b' is no id"):
        folder_manifest("runs/a", "b")
