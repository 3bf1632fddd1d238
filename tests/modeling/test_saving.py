import json
import os
import re
import runpy
from importlib import metadata, resources

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)
from transformers.utils import PushToHubMixin

from modular_star_encoder import modeling
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval, ModularStarEncoderModel
from modular_star_encoder.utils.files import staged_folder
from tests.tiny import contents, run, tiny_batch, tiny_model

CODE_FILES = {"configuration_modular_star_encoder.py", "modeling_modular_star_encoder.py"}
CHECKPOINT_FILES = CODE_FILES | {"config.json", "model.safetensors"}


class UserModel(ModularStarEncoderForRetrieval):
    """A subclass defined in a user's script."""


@pytest.mark.parametrize(
    ("model_class", "auto_class", "auto_model"),
    [
        (ModularStarEncoderModel, AutoModel, "Model"),
        (ModularStarEncoderForRetrieval, AutoModel, "ForRetrieval"),
        (modeling.ModularStarEncoderForPreTraining, AutoModelForPreTraining, "Model"),
        (modeling.ModularStarEncoderForMaskedLM, AutoModelForMaskedLM, "Model"),
        (modeling.ModularStarEncoderForSequenceClassification, AutoModelForSequenceClassification, "Model"),
        (UserModel, None, "ForRetrieval"),
    ],
)
def test_a_checkpoint_carries_weights_code_and_the_full_auto_map(tmp_path, model_class, auto_class, auto_model):
    model = tiny_model(model_class)
    model.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == CHECKPOINT_FILES
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == f"modeling_modular_star_encoder.ModularStarEncoder{auto_model}"
    assert {"AutoConfig", "AutoModelForPreTraining"} <= set(auto_map)
    assert auto_map["AutoModelForMaskedLM"].endswith(".ModularStarEncoderForMaskedLM")
    if auto_class:
        again = auto_class.from_pretrained(tmp_path)
        assert type(again) is model_class
        assert torch.equal(run(model, **tiny_batch())[0], run(again, **tiny_batch())[0])


def test_others_may_read_every_file_as_far_as_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
        with staged_folder(tmp_path / "staged") as staging:
            save_file({"a": torch.ones(1)}, staging / "a.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert (tmp_path / "staged" / "a.safetensors") in files


def test_an_older_transformers_is_refused_by_the_version_that_is_needed(monkeypatch):
    (needed,) = re.findall(r"\ntransformers.*>=([\d.]+)", "\n".join(metadata.requires("modular-star-encoder")))
    found = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "5.2.0" if name == "transformers" else found(name))
    with pytest.raises(ImportError, match=rf"transformers>={needed}.*==5\.2\.0"):
        runpy.run_module(modeling.ModularStarEncoderConfig.__module__)
    card = resources.files("modular_star_encoder.model_cards").joinpath("model.md.jinja").read_text()
    assert f"`transformers` {needed} or newer" in card


def test_saving_over_the_files_it_was_loaded_from_is_safe_and_leaves_none_of_them(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.projection_heads["4"].out_proj.bias += 1.0
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again.projection_heads["4"].out_proj.bias, model.projection_heads["4"].out_proj.bias)
    assert [path.name for path in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]


def test_an_interrupted_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    before = contents(tmp_path)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("modular_star_encoder.modeling.modeling_modular_star_encoder.shutil.copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_model(initializer_range=0.1).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_an_exit_can_be_given_to_the_configuration_or_with_one(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert len(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path, exit_layer=1)).model.layers) == 1
    config = AutoConfig.from_pretrained(tmp_path)
    for load in (AutoModel.from_pretrained, ModularStarEncoderForRetrieval.from_pretrained):
        model = load(tmp_path, config=config, exit_layer=2)
        assert model.config.num_hidden_layers == 2
        assert set(model.projection_heads) == {"1", "2"}
    assert config.exit_layer is None


def test_a_model_converted_to_bfloat16_equals_the_one_loaded_in_it(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    converted, loaded = model.to(torch.bfloat16), AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert converted.model.rotary_emb.inv_freq.dtype == torch.float32
    long = {"input_ids": torch.arange(4, 120)[None]}
    assert torch.equal(run(converted, **long).sentence_embedding, run(loaded, **long).sentence_embedding)


def test_saving_and_pushing_keeps_a_private_model_private(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(PushToHubMixin, "push_to_hub", lambda _, *args, **kwargs: pushed.append((args, kwargs)))
    options = {"private": True, "revision": "draft", "commit_description": "Why.", "create_pr": True, "tags": ["code"]}
    options |= {"max_shard_size": "30KB", "token": "a-token"}
    tiny_model().save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/model", **options)
    assert pushed == [(("me/model",), options)]
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    tiny_model().save_pretrained(tmp_path / "model", push_to_hub=True)
    assert pushed[1:] == [(("model",), {})]
