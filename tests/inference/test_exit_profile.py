import dataclasses
import json
import shutil

import pytest
import torch
from huggingface_hub import constants

import modular_star_encoder.cli.main as cli
from modular_star_encoder.evaluation.report import read_quality
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.inference.exit_profile import (
    ExitProfile,
    Measurement,
    ProfiledExit,
    checkpoint_profile,
    load_at_budget,
    select_exit,
)
from modular_star_encoder.inference.profile import ProfilePlan, profile_to_file
from tests.errors import raises
from tests.tiny import REPOSITORY, cache_repository, save_tiny_checkpoint, tiny_batch, tiny_model


def made_up_profile(quality=None, memory=True):
    """Exits 4, 9 and 18: 20, 45 and 90 ms at the 95th percentile for one text, 400, 900 and 1800 MB."""
    exits = {}
    for k in (4, 9, 18):
        times = [(size, 2.5 * k * size, 5.0 * k * size) for size in (1, 8)]
        rest = (1.0, 128.0, 100.0 * k if memory else None, 30)
        measurements = tuple(Measurement(size, 128, 2e6, half, most, *rest) for size, half, most in times)
        exits[k] = ProfiledExit(k * 1000, k * 0.004, measurements)
    machine = {"processor": "made up", "cores": 2, "threads": 2, "memory_gb": 8.0}
    profile = ExitProfile(exits, "cpu", "float32", "sdpa", "0123", 300.0, machine, {"torch": "2.13.0"}, "2026-11-21")
    return profile if quality is None else profile.with_quality("mrr", quality)


@pytest.mark.parametrize(
    ("quality", "budget", "chosen"),
    [
        (None, {"latency_ms": 90}, 18),
        (None, {"latency_ms": 89.999}, 9),
        (None, {"latency_ms": 20}, 4),
        (None, {"memory_mb": 1799}, 9),
        (None, {"latency_ms": 90, "memory_mb": 400}, 4),
        (None, {"latency_ms": 160, "batch_size": 8}, 4),
        (None, {"latency_ms": 360, "batch_size": 8, "length": 128}, 9),
        ({4: 0.5, 9: 0.7, 18: 0.6}, {"latency_ms": 90}, 9),
        ({4: 0.5, 9: 0.7, 18: 0.7}, {"latency_ms": 90}, 9),  # the shallowest of equals
        ({4: 0.5, 9: 0.7, 18: 0.6}, {"latency_ms": 44}, 4),
        ({4: 0.5, 9: 0.7, 18: 0.8}, {"min_quality": 0.8}, 18),
        ({4: 0.5, 9: 0.7, 18: 0.8}, {"min_quality": 0.7, "latency_ms": 45}, 9),
        ({4: 0.5, 9: 0.7}, {"min_quality": 0.1}, 9),  # unknown is not enough
        ({4: 0.5, 9: 0.7}, {"latency_ms": 90}, 18),
    ],
)
def test_the_best_exit_that_just_reaches_the_budgets_is_chosen_or_the_deepest(quality, budget, chosen):
    assert select_exit(made_up_profile(quality), **budget) == chosen


@pytest.mark.parametrize(
    ("budget", "fault", "values"),
    [
        ({"latency_ms": 19.9}, "too_small", ["latency_ms=19.9", "1 × 128 ", "exit 4: latency_ms 20; exit 9: "]),
        ({"min_quality": 0.7, "latency_ms": 20}, "too_small", ["exit 9: latency_ms 45, min_quality 0.7;"]),
        ({"latency_ms": 1, "memory_mb": 1}, "too_small", ["exit 18: latency_ms 90, memory_mb 1800."]),
        ({}, "missing", ["`latency_ms`, `memory_mb` and `min_quality`."]),
        ({"latency_ms": 20, "length": 64}, "shape", ["any number of texts of 64 tokens", "1 × 128, 8 × 128 "]),
        ({"min_quality": 0.5, "benchmark": "cosqa"}, "benchmark.unknown", ["cosqa", "mrr."]),
    ],
)
def test_a_budget_that_no_exit_keeps_is_an_error_that_lists_the_exits(budget, fault, values):
    with raises(f"budget.{fault}", *values):
        select_exit(made_up_profile({4: 0.5, 9: 0.7, 18: 0.8}), **budget)


def test_budgets_on_what_is_not_known_are_an_error():
    with raises("budget.too_small", "exit 4: unknown;"):
        select_exit(made_up_profile(memory=False), memory_mb=1000)
    with raises("budget.benchmark.missing"):
        select_exit(made_up_profile(), min_quality=0.5)
    two = made_up_profile({4: 0.5, 9: 0.7, 18: 0.8}).with_quality("cosqa", {4: 0.9, 9: 0.1, 18: 0.2})
    with raises("budget.benchmark.missing", "cosqa, mrr"):
        select_exit(two, min_quality=0.5)
    assert select_exit(two, min_quality=0.5, benchmark="cosqa") == 4
    assert select_exit(two, latency_ms=90) == 18  # which of the two counts is not said


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:100],
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"runs"', '"times"'),
        lambda text: text.replace('"dtype": "float32",', ""),
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "exits": {}}),
        lambda text: text.replace('"batch_size": 8', '"batch_size": 9', 1),
    ],
    ids=["half", "later format", "unknown field", "missing field", "a list", "no exits", "unequal shapes"],
)
def test_a_file_that_is_no_profile_is_an_error(tmp_path, damage):
    path = tmp_path / "profile.json"
    made_up_profile().save(path)
    path.write_text(damage(path.read_text()))
    with raises("profile.file.unreadable", "profile.json"):
        ExitProfile.load(path)


def results_file(path, checksum, *tables, exits=(4, 9)):
    """Write the results of these exits: one table for each (benchmark, metric, value)."""
    row = {"retriever": "m", "dimensions": None, "columns": {}, "others": {}, "difference": None}
    found = []
    for name, metric, value in tables:
        rows = [row | {"exit_layer": k, "mean": dict.fromkeys(("value", "low", "high"), value)} for k in exits]
        texts = {"benchmark": name, "metric": metric, "reference": "", "size": "", "notes": []}
        found.append(texts | {"rows": rows})
    path.write_text(json.dumps({"checkpoint_checksum": checksum, "tables": found}))


def test_quality_comes_from_the_results_of_an_evaluation(tmp_path):
    file = tmp_path / "results.json"
    results_file(file, None, ("a", "mrr", 0.5), ("b", "f1", 0.2))
    assert [read_quality(file, benchmark=one) for one in ("a", "b", "c")] == [{4: x, 9: x} for x in (0.5, 0.2, 0.5)]
    profile = made_up_profile().with_quality("csn", read_quality(file))
    assert [dict(profiled.quality) for profiled in profile.exits.values()] == [{"csn": 0.5}, {"csn": 0.5}, {}]
    with raises("profile.quality.other_exits", "csn", "exits 5,", "4, 9, 18"):
        profile.with_quality("csn", {5: 0.1})
    results_file(file, None, ("a", "mrr", float("nan")))
    with raises("evaluation.report.unreadable", "results.json"):
        read_quality(file)


def test_quality_of_other_weights_is_an_error(tmp_path, capsys):
    made_up_profile().save(tmp_path / "profile.json")
    file = tmp_path / "results.json"
    command = ["profile", "mose-code", "--out", str(tmp_path / "profile.json"), "--quality", f"csn={file}"]
    for checksum, status, benchmarks in (("4567", 2, ()), ("0123", 0, ("csn",))):
        results_file(file, checksum, ("csn", "mrr", 0.5))
        assert cli.main(command) == status
        assert ExitProfile.load(tmp_path / "profile.json").benchmarks == benchmarks
    assert "4567, not 0123" in capsys.readouterr().err


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


def test_a_profile_may_be_the_name_of_a_file_and_must_be_there(checkpoint, tmp_path):
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    file = (bare / "exit_profile.json").rename(tmp_path / "other.json")
    for profile in (file, str(file)):
        assert load_at_budget(bare, profile=profile, min_quality=0.3).config.num_hidden_layers == 2
    with pytest.raises(FileNotFoundError, match="There is no exit profile none"):
        load_at_budget(bare, profile="none", min_quality=0.3)
    with pytest.raises(FileNotFoundError, match="There is no exit profile"):
        load_at_budget(bare, latency_ms=20)


def test_the_log_says_which_exit_is_chosen_and_why(checkpoint, caplog):
    with caplog.at_level("INFO"):
        load_at_budget(checkpoint, min_quality=0.3, latency_ms=1e9)
    (record,) = [one for one in caplog.records if one.name.endswith("exit_profile")]
    for part in ("exit 2 ", "quality (0.500)", "2, 4", "latency_ms=1e+09", "exit 2: latency_ms", "1 × 8 tokens"):
        assert part in record.getMessage()


def test_the_model_has_the_dtype_of_the_profile_by_default(checkpoint):
    measured = ExitProfile.load(checkpoint / "exit_profile.json")
    assert measured.dtype == "float32"
    profile = dataclasses.replace(measured, dtype="bfloat16")
    assert load_at_budget(checkpoint, profile=profile, latency_ms=1e9).dtype == torch.bfloat16
    options = {"profile": profile, "latency_ms": 1e9, "model_kwargs": {"dtype": torch.float32}}
    assert load_at_budget(checkpoint, **options).dtype == torch.float32


def test_a_profile_of_another_machine_is_used_with_a_warning(checkpoint, monkeypatch):
    monkeypatch.setattr("modular_star_encoder.utils.reports.processor_model", lambda: "another processor")
    with pytest.warns(UserWarning, match=r"measured on another machine \(processor .*here 'another processor'\)"):
        load_at_budget(checkpoint, min_quality=0.3)


def test_a_repository_of_the_hub_brings_its_profile(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = cache_repository(checkpoint, tmp_path)
    assert checkpoint_profile(REPOSITORY) == ExitProfile.load(checkpoint / "exit_profile.json")
    assert checkpoint_checksum(REPOSITORY) == snapshot.name
    (snapshot / "exit_profile.json").unlink()
    with pytest.raises(OSError, match=f"no exit profile {REPOSITORY}"):
        checkpoint_profile(REPOSITORY)
