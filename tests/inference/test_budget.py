"""One call from a budget to a model."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.inference.exit_profile import (
    ExitProfile,
    checkpoint_profile,
    load_at_budget,
    load_sentence_transformer_at_budget,
)
from modular_star_encoder.inference.profile import ProfilePlan, profile_to_file
from tests.errors import raises
from tests.hub.test_cached_repository import REPOSITORY, cache_repository
from tests.tiny import save_tiny_checkpoint, tiny_batch, tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")
    plan = ProfilePlan((1,), (8,), rounds=1, memory=False)
    profile, path = profile_to_file(folder, plan, device="cpu", progress=False)
    profile.with_quality("csn", {1: 0.2, 2: 0.5, 4: 0.4}).save(path)
    return folder


def test_the_model_is_the_checkpoint_cut_at_the_exit_chosen(checkpoint):
    model = load_at_budget(checkpoint, min_quality=0.3)
    assert model.config.num_hidden_layers == 2
    with torch.inference_mode():
        expected = tiny_model().eval()(**tiny_batch(), exit_layer=2).sentence_embedding
        assert torch.equal(model(**tiny_batch()).sentence_embedding, expected)


def test_the_sentence_transformer_is_cut_at_the_same_exit(checkpoint):
    model = load_sentence_transformer_at_budget(checkpoint, min_quality=0.3)
    only_exit_4 = ExitProfile.load(checkpoint / "exit_profile.json").with_quality("csn", {1: 0.1, 2: 0.1})
    full = load_sentence_transformer_at_budget(checkpoint, min_quality=0.3, profile=only_exit_4)
    assert (model[0].auto_model.config.num_hidden_layers, full[0].auto_model.config.num_hidden_layers) == (2, 4)
    assert np.array_equal(model.encode(["add two numbers"]), full.encode(["add two numbers"], exit_layer=2))


def test_the_model_has_the_dtype_of_the_profile_by_default(checkpoint):
    measured = ExitProfile.load(checkpoint / "exit_profile.json")
    assert measured.dtype == "float32"
    profile = dataclasses.replace(measured, dtype="bfloat16")
    assert load_at_budget(checkpoint, profile=profile, latency_ms=1e9).dtype == torch.bfloat16
    options = {"profile": profile, "latency_ms": 1e9, "model_kwargs": {"dtype": torch.float32}}
    assert load_at_budget(checkpoint, **options).dtype == torch.float32
    assert load_sentence_transformer_at_budget(checkpoint, **options)[0].auto_model.dtype == torch.float32


def test_a_profile_of_a_gpu_serves_where_there_is_none(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    profile = dataclasses.replace(ExitProfile.load(checkpoint / "exit_profile.json"), device="cuda")
    model = load_sentence_transformer_at_budget(checkpoint, profile=profile, min_quality=0.3)
    assert model.encode(["add two numbers"]).shape == (1, 16)


def test_a_profile_of_another_machine_is_used_with_a_warning(checkpoint, monkeypatch):
    monkeypatch.setattr("modular_star_encoder.utils.reports.processor_model", lambda: "another processor")
    with pytest.warns(UserWarning, match=r"measured on another machine \(processor .*here 'another processor'\)"):
        load_at_budget(checkpoint, min_quality=0.3)


def test_a_budget_too_small_or_a_missing_profile_is_an_error(checkpoint, tmp_path):
    with raises("budget.too_small", "min_quality 0.5 (exit 2)"):
        load_at_budget(checkpoint, min_quality=0.6)
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=lambda *_: ["exit_profile.json"])
    with pytest.raises(FileNotFoundError, match="There is no exit profile"):
        load_at_budget(bare, latency_ms=20)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        load_at_budget("./missing", latency_ms=20)


def test_a_repository_of_the_hub_brings_its_profile(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = cache_repository(checkpoint, tmp_path)
    assert checkpoint_profile(REPOSITORY) == ExitProfile.load(checkpoint / "exit_profile.json")
    assert checkpoint_checksum(REPOSITORY) == snapshot.name
    (snapshot / "exit_profile.json").unlink()
    with pytest.raises(OSError, match=f"no exit profile of {REPOSITORY}"):
        checkpoint_profile(REPOSITORY)
