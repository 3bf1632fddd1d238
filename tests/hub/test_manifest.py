from pathlib import Path

import pytest
import torch

from modular_star_encoder import modeling
from modular_star_encoder.hub.manifest import folder_manifest, load_manifest
from modular_star_encoder.hub.staging import stage_repositories
from modular_star_encoder.inference import shipped_model
from modular_star_encoder.inference.checkpoints import slice_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.training.recipes import hub_config_folder, load_config
from tests.errors import raises
from tests.hub.repositories import manifest

ROOT = Path(__file__).parents[2]
FOLDER = hub_config_folder("mose-code")
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
        ([SLICE, ENTRY], "hub.manifest.parent", "b is made from a"),
        ([ENTRY, ENTRY], "hub.manifest.twice", "a"),
        ([{**ENTRY, "name": "a/b/c"}], "hub.repository_id", "'me/a/b/c'"),
        ([{**ENTRY, "files": {"../model.onnx": "x"}}], "hub.manifest.files", "'../model.onnx'"),
        ([{**ENTRY, "files": {"model.onnx": "/dev/zero"}}], "hub.manifest.files", "/dev/zero"),
        ([{**ENTRY, "sections": {"A": "/dev/zero"}}], "hub.manifest.files", "/dev/zero"),
        ([{**ENTRY, "sections": {"A": f"{shipped_model()}/model.safetensors"}}], "hub.manifest.files", "1,048,576"),
        *(([{**ENTRY, "branch": name}], "hub.manifest.branch", repr(name)) for name in ("", "..", "a--b", 'a")')),
        ([{**ENTRY, "weights": "x"}], "settings.unknown", "weights"),
        ([{**ENTRY, "evaluation": "report.json"}], "settings.value", "'report.json'"),
        ([{**ENTRY, "only_exit": "no"}], "settings.value", "'no'"),
    ],
)
def test_a_contradiction_is_one_sentence(entries, key, value):
    with raises(key, value) as error:
        manifest(entries)
    assert "\n" not in str(error.value)


def test_a_licence_has_a_name_and_prose_may_be_left_empty():
    with raises("settings.value", "datasets"):
        manifest([ENTRY], datasets="me/data")
    for license in ("", "other", "Apache2"):
        with raises("hub.manifest.license", "such as apache-2.0" if license == "Apache2" else ""):
            manifest([ENTRY], license=license)
    read = manifest([{**ENTRY, "training_data": None}], limits=None)
    assert (read.limits, read.repositories[0].training_data) == (None, None)


def test_a_folder_is_a_manifest_of_one_repository():
    manifest = folder_manifest("runs/a", "me/b", evaluation=["report.json"])
    (entry,) = manifest.repositories
    assert manifest.license is None
    assert (entry.key, entry.checkpoint, entry.evaluation) == ("b", "runs/a", ("report.json",))
    with raises("hub.repository_id", "'b'"):
        folder_manifest("runs/a", "b")


def test_a_model_has_the_licence_that_is_given_or_its_parents_and_none_is_assumed(sources, tmp_path):
    sliced = slice_checkpoint("mose-code", 0, tmp_path / "slice")
    known = {"mose-code": "apache-2.0", sliced: "apache-2.0", sources["finetuned"]: None, sources["pretrained"]: None}
    for folder, license in known.items():
        assert folder_manifest(folder, "me/b").license == license
        assert folder_manifest(folder, "me/b", license="mit").license == "mit"
    for own in ("my-own", "[mit, x]", "null", "\n- mit", '"'):  # the Hub does not know it, or it is not one licence
        (sliced / "README.md").write_text(f"---\nlicense: {own}\n---\n")
        assert folder_manifest(sliced, "me/b").license is None


SIZES = {"pretrained": 1_104_091_214, "finetuned": 1_061_894_144, "finetuned-4": 163_663_872}
SIZES |= {"finetuned-9": 302_700_032, "finetuned-18": 552_965_120, "finetuned-27": 803_230_208}
SIZES |= {"small": 13_346_874, "mini": 2_868_790, "mose-code": 15_920_512}


@pytest.mark.parametrize("name", sorted(path.parent.name for path in FOLDER.parent.glob("*/config.json")))
def test_a_configuration_builds_on_the_meta_device_and_has_its_size(name):
    config = load_config(name)
    with torch.device("meta"):
        model = getattr(modeling, config.architectures[0])(config)
    assert model.num_parameters() == SIZES[name]


@pytest.mark.parametrize("exit_layer", [4, 9, 18, 27])
def test_a_cut_configuration_is_what_slicing_the_full_one_gives(exit_layer):
    expected = load_config("finetuned").cut(exit_layer)
    expected.exit_layers = [exit_layer]
    # With one exit, no list of all exits.
    expected.output_all_exits = None
    assert load_config(f"finetuned-{exit_layer}").to_diff_dict() == expected.to_diff_dict()


@pytest.mark.parametrize("name", ["small", "finetuned"])
def test_a_manifest_publishes_every_exit_of_its_model(name):
    manifest = load_manifest(hub_config_folder(name) / "publish.yaml", ["namespace=me", "license=apache-2.0"])
    assert len(manifest.repositories) == 6
    exits = ModularStarEncoderConfig.from_pretrained(hub_config_folder(name)).exit_layers
    sliced = [entry.exit_layer for entry in manifest.repositories if entry.only_exit]
    # The deepest exit is the fine-tuned model itself, or a slice without the other heads.
    assert sliced in (exits, exits[:-1])


@pytest.mark.slow
def test_the_folder_is_what_the_publisher_writes_with_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (staged,) = stage_repositories(load_manifest(FOLDER / "publish.yaml", ["namespace=YOUR-NAME"]), tmp_path / "staged")
    written = {path.relative_to(staged.folder).as_posix(): path for path in staged.folder.rglob("*") if path.is_file()}
    kept = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*") if path.is_file()}
    code = {"configuration_modular_star_encoder.py", "modeling_modular_star_encoder.py"}
    assert set(written) - set(kept) == code
    assert set(kept) - set(written) == {"publish.yaml", "exit-0.yaml", "recipe.yaml", "finetune.yaml"}
    # Only these two name the code, or how the tokenizer was loaded.
    for name in sorted((set(kept) & set(written)) - {"config.json", "tokenizer_config.json", "exit_profile.json"}):
        if name.endswith(".png"):
            continue  # another version of the plotting library may draw it differently
        assert written[name].read_bytes() == kept[name].read_bytes(), name
