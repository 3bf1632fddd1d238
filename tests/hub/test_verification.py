"""What must never go up is found before anything does."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modular_star_encoder.hub import verification
from modular_star_encoder.hub.staging import stage_repositories
from modular_star_encoder.hub.subprocess_check import ReloadedEmbeddings
from modular_star_encoder.hub.verification import check_files, verify_repositories
from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderForSequenceClassification
from modular_star_encoder.utils.files import write_text
from tests.errors import raises
from tests.hub.repositories import manifest
from tests.tiny import save_tiny_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    (model,) = stage_repositories(manifest([{"name": "tiny", "checkpoint": str(checkpoint)}]), folder)
    return model


@pytest.fixture
def folder(staged, tmp_path):
    return shutil.copytree(staged.folder, tmp_path / "copy")


def test_a_staged_repository_has_exactly_the_expected_files(folder):
    check_files(folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"\x08\x08")
    with raises("hub.files.unexpected", "onnx/model.onnx"):
        check_files(folder)
    check_files(folder, extra=["onnx/model.onnx"])
    with raises("hub.files.missing", "onnx/tokenizer.json"):
        check_files(folder, extra=["onnx/model.onnx", "onnx/tokenizer.json"])


@pytest.mark.parametrize("name", ["modules.json", "modeling_modular_star_encoder.py", "tokenizer.json", "README.md"])
def test_a_missing_file_is_found(folder, name):
    (folder / name).unlink()
    with raises("hub.files.missing", name):
        check_files(folder)


def test_shards_come_with_their_index(folder):
    (folder / "model.safetensors").unlink()
    with raises("hub.files.missing", "model.safetensors"):
        check_files(folder)
    tiny_model().save_pretrained(folder, max_shard_size="50KB")
    check_files(folder)
    (folder / "model.safetensors.index.json").unlink()
    with raises("hub.files.missing", "model.safetensors.index.json"):
        check_files(folder)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_is_found_by_its_name_and_by_its_content(folder, protocol):
    (folder / "weights.pt").write_bytes(b"")
    with raises("hub.files.pickle"):
        check_files(folder, extra=["weights.pt"])
    (folder / "weights.pt").unlink()
    (folder / "exit_profile.json").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    with raises("hub.files.pickle", "exit_profile.json"):
        check_files(folder)
    torch.save({"a": 1}, folder / "exit_profile.json")
    with raises("hub.files.pickle"):
        check_files(folder)


def test_damaged_weights_and_links_are_found(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    with raises("hub.files.safetensors", "model.safetensors"):
        check_files(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "config.json")
    with raises("hub.files.link", "model.safetensors"):
        check_files(folder)


SECRETS = (
    "hf_" + "a" * 34,
    "ghp_" + "A1" * 18,
    "github_pat_" + "a" * 30,
    "sk-proj-" + "a1" * 20,
    "AKIA" + "A" * 16,
    "-----BEGIN RSA " + "PRIVATE KEY-----",
    "https://me:pass" + "word@example.org/x",
)


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret_is_found_and_not_repeated(folder, secret):
    card = (folder / "README.md").read_text()
    write_text(folder / "README.md", f"{card}\n{secret}\n")
    with raises("hub.files.secret", "README.md", "line") as raised:
        check_files(folder)
    assert secret not in str(raised.value)


def test_the_own_token_is_found_whatever_it_looks_like(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unlikely token")
    check_files(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "unlikely token"})
    with raises("hub.files.secret", "model.safetensors"):
        check_files(folder)


def test_a_place_of_this_machine_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    check_files(folder)
    write_text(folder / "README.md", (folder / "README.md").read_text() + "/home/someone/code")
    with raises("hub.files.local_path", "/home/someone"):
        check_files(folder)


def test_other_embeddings_than_the_sources_are_found(staged, monkeypatch):
    own, _, _ = verification._source_embeddings(staged)
    exits = {k: embeddings.copy() for k, embeddings in own.items()}

    def reloaded(*_, **__):
        return [ReloadedEmbeddings(exits[4], exits[4], exits)]

    monkeypatch.setattr(verification, "verify_reload", reloaded)
    assert verify_repositories([staged]) == {"tiny": 0}
    exits[2][0, 0] += 1e-3
    with raises("hub.reload.differs", "exit 2 differs by 0.001"):
        verify_repositories([staged])
    exits[2][0, 0] = np.nan
    with raises("hub.reload.differs", "exit 2 differs by nan"):
        verify_repositories([staged])


@pytest.mark.slow
def test_other_precisions_short_inputs_and_other_pooling_pass(tmp_path):
    folders = {
        "double": save_retrieval_checkpoint(tiny_model().double(), tiny_tokenizer(), tmp_path / "double"),
        "short": save_retrieval_checkpoint(tiny_model(max_position_embeddings=8), tiny_tokenizer(), tmp_path / "short"),
        "pretrained": tmp_path / "pretrained",
    }
    tiny_model(ModularStarEncoderForPreTraining, pooling="cls").save_pretrained(folders["pretrained"])
    tiny_tokenizer().save_pretrained(folders["pretrained"])
    entries = [{"name": name, "checkpoint": str(folder)} for name, folder in folders.items()]
    verified = verify_repositories(stage_repositories(manifest(entries), tmp_path / "staged"), progress=False)
    assert set(verified) == set(folders)


def test_what_cannot_be_published_is_refused(tmp_path):
    def stage(folder, **changes):
        entry = {"name": "tiny", "checkpoint": str(folder), **changes}
        return stage_repositories(manifest([entry]), tmp_path / f"staged-{folder.name}")

    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        stage(tmp_path / "missing")
    bare = tmp_path / "bare"
    tiny_model().save_pretrained(bare)
    with raises("hub.staging.checkpoint", bare, "tokenizer.json"):
        stage(bare)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (one,) = stage(bare, tokenizer=str(tmp_path / "tokenizer"))
    check_files(one.folder)
    slices = [{"name": "2", "slice_of": "tiny", "exit_layer": 2}, {"name": "1", "slice_of": "2", "exit_layer": 1}]
    whole = {"name": "tiny", "checkpoint": str(bare), "tokenizer": str(tmp_path / "tokenizer")}
    for one in stage_repositories(manifest([whole, *slices]), tmp_path / "staged-slices"):
        check_files(one.folder)
    classifier = tmp_path / "classifier"
    tiny_model(ModularStarEncoderForSequenceClassification).save_pretrained(classifier)
    with raises("hub.staging.checkpoint", classifier, "SequenceClassification"):
        stage(classifier, tokenizer=str(tmp_path / "tokenizer"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({}))
    with raises("hub.staging.checkpoint", adapter, "adapter"):
        stage(adapter)


def stage_one(folder, staging, **changes):
    (one,) = stage_repositories(manifest([{"name": "tiny", "checkpoint": str(folder), **changes}]), staging)
    return one


@pytest.mark.parametrize("path", ["README.md", "./README.md", "config.json", "model.safetensors"])
def test_files_of_the_manifest_replace_none_of_the_repositorys_own(staged, tmp_path, path):
    (tmp_path / "mine").write_text("mine")
    with raises("hub.staging.files", "tiny", path):
        stage_one(staged.source, tmp_path / "staged", files={path: str(tmp_path / "mine")})
    one = stage_one(staged.source, tmp_path / "again", files={"onnx/model.onnx": str(tmp_path / "mine")})
    assert (one.folder / "onnx" / "model.onnx").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("log.json", '{"steps"', "Expecting ':'"),
        ("log.json", "[]", "[]"),
        ("recipe.yaml", "a: [\n", "while parsing"),
        ("recipe.yaml", "\xff", "ÿ"),
    ],
)
def test_a_damaged_log_or_recipe_is_one_sentence(staged, tmp_path, name, text, fault):
    (tmp_path / name).write_text(text)
    setting = {"log.json": "training_log", "recipe.yaml": "recipe"}[name]
    with raises("hub.staging.settings", tmp_path / name, fault):
        stage_one(staged.source, tmp_path / "staged", **{setting: str(tmp_path / name)})


def test_a_checkpoint_without_the_prompts_of_its_card_is_refused(staged, tmp_path):
    copy = shutil.copytree(staged.source, tmp_path / "copy")
    (copy / "config_sentence_transformers.json").write_text("{}")
    with raises("hub.staging.prompts", copy):
        stage_one(copy, tmp_path / "staged")


def test_a_branch_stays_in_the_staging_folder(staged, tmp_path):
    entries = [{"name": "tiny", "checkpoint": str(staged.source), "branch": name} for name in ("x", "x/y", "../../z")]
    for one in stage_repositories(manifest(entries), tmp_path / "staged"):
        assert one.folder.parent == tmp_path / "staged"
        check_files(one.folder)
