import dataclasses
import inspect
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

import modular_star_encoder.cli.main as cli
from modular_star_encoder.inference import profile as profile_exits
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.inference.exit_profile import ExitProfile
from modular_star_encoder.inference.profile import (
    ProfilePlan,
    flops_per_token,
    measure_memory,
    peak_memory_mb,
    profile_checkpoint,
    profile_to_file,
)
from modular_star_encoder.training.recipes import load_config
from tests.inference.test_exit_profile import results_file
from tests.tiny import EXIT_LAYERS, save_tiny_checkpoint, tiny_model

PLAN = ProfilePlan(batch_sizes=(2, 1), lengths=(8, 64), rounds=6, memory=False)


@pytest.mark.slow
def test_mose_profile_measures_a_checkpoint_and_adds_its_quality(capsys, checkpoint, tmp_path):
    file, results = tmp_path / "profile.json", tmp_path / "results.json"
    results_file(results, None, ("csn", "mrr", 0.25), exits=(2,))
    options = ["--batch-sizes", "1,2", "--lengths", "64", "--rounds", "2", "--device", "cpu", "--exit-layers", "2"]
    assert cli.main(["profile", str(checkpoint), *options, "--out", str(file)]) == 0
    out = capsys.readouterr().out
    profile = ExitProfile.load(file)
    measured = profile.measurement(2, (2, 64))
    assert list(profile.exits) == [2]
    assert profile.shapes == ((1, 64), (2, 64))
    assert (measured.runs, profile.device, profile.dtype) == (2, "cpu", "float32")
    assert 0 < measured.latency_ms_p50 <= measured.latency_ms_p95
    assert measured.tokens_per_second == pytest.approx(64 * measured.texts_per_second, rel=1e-2)
    # Libraries alone take more than 100 MB, this model next to nothing.
    assert 100 < profile.base_memory_mb < measured.peak_memory_mb < profile.base_memory_mb + 100
    assert f"{measured.latency_ms_p95:.2f}" in out
    assert out.splitlines()[-1] == str(file)
    assert platform.node() not in file.read_text()

    assert cli.main(["profile", str(checkpoint), "--quality", f"csn={results}", "--out", str(file)]) == 0
    assert ExitProfile.load(file) == profile.with_quality("csn", {2: 0.25})
    header, _, row = capsys.readouterr().out.splitlines()[2:5]
    assert (header.split("|")[-2].strip(), row.split("|")[-2].strip()) == ("csn", "0.250")


def test_parameters_are_those_of_the_checkpoint_loaded_at_the_exit(checkpoint):
    profile = profile_checkpoint(checkpoint, PLAN, dtype="bfloat16", device="cpu", progress=False)
    assert list(profile.exits) == list(EXIT_LAYERS)
    assert (profile.dtype, profile.base_memory_mb) == ("bfloat16", None)
    for exit_layer, profiled in profile.exits.items():
        parameters = AutoModel.from_pretrained(checkpoint, exit_layer=exit_layer).num_parameters()
        assert profiled.parameters == parameters
        assert profiled.weights_mb == pytest.approx(2 * parameters / 1e6)
        assert profiled.measurements[0].peak_memory_mb is None


def test_exits_take_turns_in_an_order_that_changes(checkpoint, monkeypatch):
    order, embed = [], profile_exits.embed
    monkeypatch.setattr(profile_exits, "embed", lambda *of_exit: order.append(of_exit[-1]) or embed(*of_exit))
    profile = profile_checkpoint(checkpoint, PLAN, device="cpu", progress=False)
    rounds = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == len(profile.shapes) * (PLAN.rounds + profile_exits.WARM_UP_ROUNDS)
    assert {tuple(sorted(turn)) for turn in rounds} == {EXIT_LAYERS}
    assert len(set(rounds)) > 3
    assert profile.measurement(4, (2, 64)).runs == PLAN.rounds


def test_percentiles_are_of_the_timed_rounds_and_slow_shapes_end_early(checkpoint, monkeypatch):
    seconds, calls = iter(np.arange(1, 1000)), []
    monkeypatch.setattr(profile_exits, "embed", lambda *_: calls.append(1) or float(next(seconds)))
    plan = ProfilePlan((1,), (8,), rounds=30, seconds_per_shape=1e-9, memory=False)
    profile = profile_checkpoint(checkpoint, plan, exit_layers=(4,), device="cpu", progress=False)
    measured = profile.measurement(4, (1, 8))
    assert measured.runs == profile_exits.FEWEST_ROUNDS
    timed = np.arange(1, 1000)[profile_exits.WARM_UP_ROUNDS :][: measured.runs]
    assert measured.latency_ms_p50 == 1000 * np.median(timed)
    assert measured.latency_ms_p95 == pytest.approx(1000 * np.percentile(timed, 95))
    assert measured.texts_per_second == pytest.approx(1 / np.median(timed), abs=0.01)


def test_a_new_profile_keeps_the_quality_of_the_same_weights_alone(checkpoint, tmp_path):
    options = {"out": tmp_path / "profile.json", "device": "cpu", "progress": False, "exit_layers": (1,)}
    known = profile_to_file(checkpoint, PLAN, **options)[0].with_quality("csn", {1: 0.5})
    for older, quality in ((known, {"csn": 0.5}), (dataclasses.replace(known, checkpoint="4567"), {})):
        older.save(options["out"])
        assert profile_to_file(checkpoint, PLAN, **options)[0].exits[1].quality == quality


def test_a_profile_of_fewer_exits_does_not_replace_a_fuller_one(checkpoint, tmp_path, capsys):
    out = tmp_path / "profile.json"
    full, _ = profile_to_file(checkpoint, PLAN, out=out, device="cpu", progress=False)
    assert cli.main(["profile", str(checkpoint), "--out", str(out), "--exit-layers", "1"]) == 2
    assert "a profile of exits 2, 4, which would be overwritten" in capsys.readouterr().err
    assert ExitProfile.load(out) == full


def test_the_profile_is_stored_with_the_checkpoint_by_default(tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path / "model")
    _, path = profile_to_file(checkpoint, PLAN, device="cpu", progress=False)
    assert path == checkpoint / "exit_profile.json"
    before = checkpoint_checksum(checkpoint)
    assert before == ExitProfile.load(path).checkpoint
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    assert checkpoint_checksum(checkpoint) != before


def test_a_process_that_cannot_measure_memory_is_reported_in_a_sentence(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho one >&2\necho 'MemoryError: no room' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(OSError, match=r"memory of exit 1 .* ended with: MemoryError: no room"):
        measure_memory("checkpoint", 1, "cpu", "float32", [(1, 8)], 1)
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(OSError, match="ended with: status -9"):
        measure_memory("checkpoint", 1, "cpu", "float32", [(1, 8)], 1)


def test_peak_memory_is_the_most_that_was_ever_resident():
    imports = "import sys\nfrom contextlib import suppress\nfrom pathlib import Path"
    program = f"{imports}\n{inspect.getsource(peak_memory_mb)}\n"
    program += "before = peak_memory_mb(); block = b'x' * 64_000_000; during = peak_memory_mb(); del block\n"
    program += "print(during - before, peak_memory_mb() - before)"
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert [float(word) for word in output.split()] == pytest.approx([64, 64], abs=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_a_gpu_is_what_torch_allocated_for_that_exit_alone(checkpoint):
    plan = ProfilePlan((1,), (64,), rounds=2)
    profile = profile_checkpoint(checkpoint, plan, device="cuda", progress=False)
    peaks = [profiled.measurements[0].peak_memory_mb for profiled in profile.exits.values()]
    assert profile.machine["gpu"]
    for profiled, peak in zip(profile.exits.values(), peaks, strict=True):
        assert profiled.weights_mb <= peak
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("order", ["project_then_pool", "pool_then_project"])
def test_the_formula_counts_what_torch_counts(attention, order):
    model = tiny_model(projection_order=order).eval()
    model.set_attn_implementation(attention)
    for exit_layer in EXIT_LAYERS:
        for batch, length in ((1, 5), (3, 40)):
            ids = torch.full((batch, length), 7)
            # The counter knows no formula of the fused attention on CPUs.
            with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), exit_layer=exit_layer)
            expected = counter.get_total_flops() / (batch * length)
            assert flops_per_token(model.config, exit_layer, length) == pytest.approx(expected, rel=1e-12)


def test_the_papers_model_costs_about_two_operations_per_parameter():
    config = load_config("finetuned")
    # 36 layers of 27.8 million weights and their biases in matrix products; embeddings take part in none.
    assert flops_per_token(config, 36, 1) == pytest.approx(2 * 36 * 27.79e6, rel=0.01)
    assert flops_per_token(config, 36, 2048) > 1.1 * flops_per_token(config, 36, 1)
    with pytest.raises(ValueError, match="its exits are 4, 9, 18, 27, 36"):
        flops_per_token(config, 5, 10)
