import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modular_star_encoder.hub import publishing
from modular_star_encoder.hub.publishing import TEXTS, check_files, verify_repositories
from modular_star_encoder.hub.staging import stage_repositories
from modular_star_encoder.hub.subprocess_check import ReloadRequest, verify_reload
from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderForSequenceClassification
from modular_star_encoder.utils.files import write_text
from tests.errors import raises
from tests.hub.repositories import manifest
from tests.tiny import change_json, save_tiny_checkpoint, tiny_model, tiny_tokenizer

ONNX = "onnx/model.onnx"


def stage(checkpoint, staging, *slices, **changes):
    entry = {"name": "tiny", "checkpoint": str(checkpoint), **changes}
    return stage_repositories(manifest([entry, *slices]), staging)


@pytest.fixture(scope="module")
def staged(checkpoint, tmp_path_factory):
    return stage(checkpoint, tmp_path_factory.mktemp("staged"))[0]


@pytest.fixture
def folder(staged, tmp_path):
    return shutil.copytree(staged.folder, tmp_path / "copy")


def refused(fault, folder, *values, extra=()):
    with raises(f"hub.files.{fault}", *values) as raised:
        check_files(folder, extra)
    return str(raised.value)


def test_a_staged_repository_has_exactly_the_expected_files(folder):
    check_files(folder)
    (folder / "onnx").mkdir()
    (folder / ONNX).write_bytes(b"\x08\x08")
    refused("unexpected", folder, ONNX)
    check_files(folder, extra=[ONNX])
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="50KB")
    check_files(folder, extra=[ONNX])


@pytest.mark.parametrize(
    ("name", "write", "fault"),
    [
        ("weights.pt", lambda path: path.touch(), "pickle"),
        ("exit_profile.json", lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)), "pickle"),
        ("exit_profile.json", lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=5)), "pickle"),
        ("exit_profile.json", lambda path: torch.save({"a": 1}, path), "pickle"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]), "safetensors"),
    ],
)
def test_a_pickle_is_found_by_its_name_and_by_its_content_and_so_are_damaged_weights(folder, name, write, fault):
    write(folder / name)
    refused(fault, folder, name, extra=["weights.pt"])


SECRETS = (
    *("hf_" + "a" * 34, "ghp_" + "A1" * 18, "github_pat_" + "a" * 30, "sk-proj-" + "a1" * 20, "AKIA" + "A" * 16),
    *("-----BEGIN RSA " + "PRIVATE KEY-----", "https://me:pass" + "word@example.org/x"),
)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_found_and_not_repeated(folder, secret):
    write_text(folder / "README.md", (folder / "README.md").read_text() + f"\n{secret}\n")
    assert secret not in refused("secret", folder, "README.md", "line")


def test_the_own_token_and_a_place_of_this_machine_are_found(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unlikely token")
    monkeypatch.setenv("HOME", "/home/someone")
    check_files(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "unlikely token"})
    refused("secret", folder, "model.safetensors")
    write_text(folder / "README.md", (folder / "README.md").read_text() + "/home/someone/code")
    refused("local_path", folder, "/home/someone")


def test_other_embeddings_than_the_sources_are_found(staged, monkeypatch):
    own, _ = publishing._source_embeddings(staged)
    reloaded = {name: embeddings.copy() for name, embeddings in own.items()}
    monkeypatch.setattr(publishing, "verify_reload", lambda *_, **__: [reloaded])
    assert verify_repositories([staged]) == {"tiny": 0}
    for change, sentence in ((1e-3, "exit-2 differs by 0.001"), (np.nan, "exit-2 differs by nan")):
        reloaded["exit-2"][0, 0] += change
        with raises("hub.reload.differs", sentence):
            verify_repositories([staged])


@pytest.mark.slow
def test_a_repository_that_does_not_load_without_this_package_is_found(folder):
    (folder / "configuration_modular_star_encoder.py").unlink()
    with raises("hub.reload.failed", folder):
        verify_reload([ReloadRequest(str(folder), TEXTS)], progress=False)


@pytest.mark.slow
def test_other_precisions_short_inputs_and_other_pooling_pass(tmp_path):
    folders = {
        "double": save_retrieval_checkpoint(tiny_model().double(), tiny_tokenizer(), tmp_path / "double"),
        "short": save_tiny_checkpoint(tmp_path / "short", max_position_embeddings=8),
        "pretrained": tmp_path / "pretrained",
    }
    tiny_model(ModularStarEncoderForPreTraining, pooling="lasttoken").save_pretrained(folders["pretrained"])
    tiny_tokenizer().save_pretrained(folders["pretrained"])
    entries = [{"name": name, "checkpoint": str(folder)} for name, folder in folders.items()]
    verified = verify_repositories(stage_repositories(manifest(entries), tmp_path / "staged"), progress=False)
    assert set(verified) == set(folders)


def test_only_pretrained_and_retrieval_checkpoints_with_a_tokenizer_are_staged(tmp_path):
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({}))
    for folder, fault in ((tmp_path / "missing", "no checkpoint folder"), (adapter, "only an adapter")):
        with pytest.raises(FileNotFoundError, match=fault):
            stage(folder, tmp_path / "staged")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = {"tokenizer": str(tmp_path / "tokenizer")}
    bare, classifier = tmp_path / "bare", tmp_path / "classifier"
    tiny_model().save_pretrained(bare)
    tiny_model(ModularStarEncoderForSequenceClassification).save_pretrained(classifier)
    for folder, value, changes in ((bare, "tokenizer.json", {}), (classifier, "SequenceClassification", tokenizer)):
        with raises("hub.staging.checkpoint", folder, value):
            stage(folder, tmp_path / "staged", **changes)
    slices = [{"name": "2", "slice_of": "tiny", "exit_layer": 2}, {"name": "1", "slice_of": "2", "exit_layer": 1}]
    for one in stage(bare, tmp_path / "staged-slices", *slices, **tokenizer):
        check_files(one.folder)


OWN = ["README.md", "./README.md", "config.json", "model.safetensors", "README.md/x", "config.json/x"]


@pytest.mark.parametrize("path", OWN)
def test_files_of_the_manifest_replace_none_of_the_repositorys_own(staged, tmp_path, path):
    (tmp_path / "mine").write_text("mine")
    with raises("hub.staging.files", "tiny", path):
        stage(staged.source, tmp_path / "staged", files={path: str(tmp_path / "mine")})
    files = dict.fromkeys((ONNX, "./a.txt", "b//c.txt"), str(tmp_path / "mine"))
    (one,) = stage(staged.source, tmp_path / "again", files=files)
    assert {(one.folder / name).read_text() for name in files} == {"mine"}
    check_files(one.folder, tuple(one.settings.files))


@pytest.mark.parametrize(
    ("setting", "name", "text", "fault"),
    [
        ("training_log", "log.json", '{"steps"', "Expecting ':'"),
        ("training_log", "log.json", "[]", "mapping"),
        ("training_log", "log.json", '{"recipe": ' + '{"a":' * 40 + "1" + "}" * 41, "32 levels"),
        ("training_log", "log.json", '{"recipe": [' + "1," * 20_000 + "1]}", "20,000 values"),
        ("recipe", "recipe.yaml", "a: [\n", "while parsing"),
        ("recipe", "recipe.yaml", "\xff", "mapping"),
    ],
)
def test_a_damaged_log_or_recipe_is_one_sentence(staged, tmp_path, setting, name, text, fault):
    (tmp_path / name).write_text(text)
    with raises("hub.staging.settings", tmp_path / name, fault):
        stage(staged.source, tmp_path / "staged", **{setting: str(tmp_path / name)})


def test_odd_values_of_a_log_are_left_out_and_a_damaged_configuration_is_named(staged, tmp_path):
    copy = shutil.copytree(staged.source, tmp_path / "copy")
    log = {"steps": "\ud800\x1b", "data": [1], "held_out_repositories": 5, "recipe": "\x1b"}
    log |= {"retrieval": [], "seconds": 1}
    (copy / "training_log.json").write_text(json.dumps(log))
    (one,) = stage(copy, tmp_path / "staged")
    assert one.training_rows == []
    change_json(copy, "config.json", dtype="foo")
    with raises("checkpoint.damaged", copy):
        stage(copy, tmp_path / "again")


def test_only_weights_of_the_folder_that_are_loaded_are_published(staged, tmp_path):
    copy = shutil.copytree(staged.source, tmp_path / "copy")
    (copy / "model-00001-of-00002.safetensors").symlink_to(staged.source / "model.safetensors")
    (copy / "modelx.safetensors.x").touch()
    (one,) = stage(copy, tmp_path / "staged")
    assert [path.name for path in one.folder.glob("model*safetensors*")] == ["model.safetensors"]
    (copy / "model.safetensors").rename(tmp_path / "moved")
    (copy / "model.safetensors").symlink_to(tmp_path / "moved")
    with raises("hub.staging.weights", copy / "model.safetensors"):
        stage(copy, tmp_path / "again")


def test_a_checkpoint_without_the_prompts_of_its_card_is_refused(staged, tmp_path):
    copy = shutil.copytree(staged.source, tmp_path / "copy")
    (copy / "config_sentence_transformers.json").write_text("{}")
    with raises("hub.staging.prompts", copy):
        stage(copy, tmp_path / "staged")


def test_a_branch_stays_in_the_staging_folder(staged, tmp_path):
    entries = [{"name": "tiny", "checkpoint": str(staged.source), "branch": name} for name in ("x", "x/y", "x.z")]
    for one in stage_repositories(manifest(entries), tmp_path / "staged"):
        assert one.folder.parent == tmp_path / "staged"
        check_files(one.folder)
