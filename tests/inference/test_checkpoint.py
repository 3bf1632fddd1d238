import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.modeling import ModularStarEncoderModel
from tests.errors import raises
from tests.tiny import save_tiny_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoint")


def test_a_loaded_checkpoint_embeds_as_the_saved_model_did(checkpoint):
    model, tokenizer = load_checkpoint(checkpoint, device="cpu")
    assert not model.training
    expected = encode_exits(tiny_model(), tiny_tokenizer(), ["return x"], progress=False)
    loaded = encode_exits(model, tokenizer, ["return x"], progress=False)
    assert all(np.array_equal(loaded[exit_layer], expected[exit_layer]) for exit_layer in expected)


def test_only_the_layers_up_to_the_exit_are_loaded(checkpoint):
    model, _ = load_checkpoint(str(checkpoint), exit_layer=2)
    assert model.config.num_hidden_layers == 2
    assert list(model.config.exit_layers) == [1, 2]


def test_an_unknown_exit_lists_those_that_exist(checkpoint):
    with pytest.raises(ValueError, match="its exits are 1, 2, 4"):
        load_checkpoint(checkpoint, exit_layer=3)


def test_a_missing_folder_is_named(tmp_path):
    for path in (tmp_path / "no", str(tmp_path / "no"), "./no-such-folder", "no-such-folder"):
        with pytest.raises(FileNotFoundError, match=r"There is no checkpoint folder .*no"):
            load_checkpoint(path)


def test_a_file_is_not_a_checkpoint(checkpoint):
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_checkpoint(checkpoint / "config.json")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "has no tokenizer: tokenizer.json"),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(checkpoint, name, problem):
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=problem):
        load_checkpoint(checkpoint)


def test_damaged_weights_are_reported_in_one_line(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"not a tensor")
    with raises("checkpoint.damaged", checkpoint) as error:
        load_checkpoint(checkpoint)
    assert "\n" not in str(error.value)


def test_a_head_that_is_not_in_the_file_is_not_drawn_at_random(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    others = {name: tensor for name, tensor in weights.items() if not name.startswith("projection_heads.2.")}
    save_file(others, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with raises("checkpoint.tensors", "4 tensors are missing", "projection_heads.2."):
        load_checkpoint(checkpoint)
    assert load_checkpoint(checkpoint, exit_layer=1)[0].config.num_hidden_layers == 1  # needs none of them


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"vocab_size": 500}, "checkpoint.shapes", ""),
        ({"num_hidden_layers": 2, "exit_layers": [1, 2]}, "checkpoint.tensors", "too many"),
        ({"exit_layers": [2, 1]}, "checkpoint.damaged", "ascending"),
        ({"model_type": "bert"}, "checkpoint.other_model", "'bert'"),
    ],
)
def test_another_configuration_is_an_error_in_one_line(checkpoint, changes, key, value):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))
    with raises(key, checkpoint, value) as error:
        load_checkpoint(checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", '{"a": "b')])
def test_a_damaged_tokenizer_is_named(checkpoint, name, content):
    (checkpoint / name).write_text(content)
    with raises("checkpoint.tokenizer", checkpoint):
        load_checkpoint(checkpoint)


def test_a_model_without_projection_heads_is_an_error(tmp_path):
    torch.manual_seed(0)
    ModularStarEncoderModel(tiny_model().config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with raises("checkpoint.not_retrieval", tmp_path):
        load_checkpoint(tmp_path)


def test_a_repository_that_the_hub_does_not_give_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="owner/no-such-model is not a local folder and cannot be downloaded from the Hub"
    ):
        load_checkpoint("owner/no-such-model")
