import dataclasses
import fcntl
import inspect
import json
import platform
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

import modular_star_encoder.cli.main as cli
from modular_star_encoder import load_at_budget, select_exit
from modular_star_encoder.evaluation.report import add_quality, read_quality
from modular_star_encoder.inference import profile as profile_exits
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.inference.exit_profile import ExitProfile, Measurement, ProfiledExit, checkpoint_profile
from modular_star_encoder.inference.profile import ProfilePlan, measure_memory, profile_checkpoint, profile_to_file
from modular_star_encoder.utils.files import LOCK
from tests.errors import raises
from tests.processes import python
from tests.tiny import EXIT_LAYERS, REPOSITORY, cache_repository, run, save_tiny_checkpoint, tiny_batch, tiny_model


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
    with raises("evaluation.report.no_exits", "cosqa"):  # the scores of another benchmark would get its name
        read_quality(file, benchmark="cosqa")
    profile = made_up_profile().with_quality("csn", read_quality(file))
    assert [dict(profiled.quality) for profiled in profile.exits.values()] == [{"csn": 0.5}, {"csn": 0.5}, {}]
    with raises("profile.quality.other_exits", "csn", "exits 5,", "4, 9, 18"):
        profile.with_quality("csn", {5: 0.1})
    results_file(file, None, ("a", "mrr", float("nan")))
    with raises("evaluation.report.unreadable", "results.json"):
        read_quality(file)


def test_a_profile_says_what_its_numbers_are():
    text = profile_exits.format_profile(made_up_profile({4: 0.5}))
    first, second, legend, machine = (text.split("\n\n")[place] for place in (0, 2, -2, -1))
    assert (first, second) == ("Batches of 1 text of 128 tokens", "Batches of 8 texts of 128 tokens")
    assert text.count("| median ms | p95 ms | texts/s | peak MB |   mrr |") == 2
    assert legend == (
        "Times are those of a batch: the median and the 95th percentile (p95). 1 MB is 10^6 bytes. "
        "Scores (mrr) are fractions from 0 to 1."
    )
    assert machine == "cpu, float32, made up, 2 threads, 2026-11-21"
    one = dataclasses.replace(made_up_profile(), machine={"processor": "p", "threads": 1})
    assert profile_exits.format_profile(one).endswith(
        "(p95). 1 MB is 10^6 bytes.\n\ncpu, float32, p, 1 thread, 2026-11-21"
    )


def test_a_profile_is_changed_by_one_process_at_a_time(checkpoint, tmp_path, monkeypatch):
    """Scores that another process adds between the reading and the writing of a profile would be lost."""
    file, path, locked = tmp_path / "results.json", tmp_path / "profile.json", []

    def spied(name):
        method = getattr(ExitProfile, name)

        def call(*arguments):
            with (tmp_path / "modular-star-encoder" / "profiles" / LOCK).open("a") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return locked.append((name, False)) or method(*arguments)
            return locked.append((name, True)) or method(*arguments)

        return call

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured(checkpoint, out=path)
    results_file(file, None, ("a", "mrr", 0.5), exits=(1,))
    for name in ("load", "save"):
        monkeypatch.setattr(ExitProfile, name, spied(name))
    assert add_quality(path, "a", file).benchmarks == ("a",)
    assert locked == [("load", True), ("save", True)]
    assert measured(checkpoint, out=path).benchmarks == ("a",)
    assert locked[2:] == [("load", True), ("load", True), ("save", True)]  # the first before the long measurement


def command_for_quality(folder, profile, checksum):
    """Let `mose profile` add results of the weights `checksum` to a profile; return its status."""
    profile.save(folder / "profile.json")
    results_file(folder / "results.json", checksum, ("csn", "mrr", 0.5))
    words = ["--out", str(folder / "profile.json"), "--quality", f"csn={folder / 'results.json'}"]
    return cli.main(["profile", "mose-code", *words])


def test_quality_of_other_weights_is_an_error(tmp_path, capsys):
    for checksum, status, benchmarks in (("4567", 2, ()), ("0123", 0, ("csn",))):
        assert command_for_quality(tmp_path, made_up_profile(), checksum) == status
        assert ExitProfile.load(tmp_path / "profile.json").benchmarks == benchmarks
    assert "4567, not 0123" in capsys.readouterr().err


def test_a_stranger_s_profile_does_not_control_the_terminal(tmp_path, capsys):
    odd = made_up_profile().with_quality("\x1b[31mq", {4: 0.5, 9: 0.5, 18: 0.5})
    odd = dataclasses.replace(odd, machine={"processor": "\x1b]0;a\x07"}, date="\x1b[2J")
    assert command_for_quality(tmp_path, odd, "0123") == 0
    assert capsys.readouterr().out.replace("\n", "").isprintable()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")
    plan = ProfilePlan((1,), (8,), rounds=1, memory=False)
    profile, path = profile_to_file(folder, plan, device="cpu", progress=False)
    profile.with_quality("csn", {1: 0.2, 2: 0.5, 4: 0.4}).save(path)
    return folder


def test_the_model_is_the_checkpoint_cut_at_the_exit_chosen_which_is_logged(profiled, caplog):
    with caplog.at_level("INFO"):
        model = load_at_budget(profiled, min_quality=0.3)
    assert "exit 2 " in next(one.getMessage() for one in caplog.records if one.name.endswith("exit_profile"))
    assert model.config.num_hidden_layers == 2
    expected = run(tiny_model(), **tiny_batch(), exit_layer=2).sentence_embedding
    assert torch.equal(run(model, **tiny_batch()).sentence_embedding, expected)


def test_a_profile_may_be_the_name_of_a_file_and_must_be_there(profiled, tmp_path):
    bare = shutil.copytree(profiled, tmp_path / "bare")
    file = (bare / "exit_profile.json").rename(tmp_path / "other.json")
    for profile in (file, str(file)):
        assert load_at_budget(bare, profile=profile, min_quality=0.3).config.num_hidden_layers == 2
    with pytest.raises(FileNotFoundError, match="There is no exit profile none"):
        load_at_budget(bare, profile="none", min_quality=0.3)
    with pytest.raises(FileNotFoundError, match="There is no exit profile"):
        load_at_budget(bare, latency_ms=20)


def test_the_model_has_the_dtype_of_the_profile_by_default(profiled):
    measured = ExitProfile.load(profiled / "exit_profile.json")
    assert measured.dtype == "float32"
    profile = dataclasses.replace(measured, dtype="bfloat16")
    assert load_at_budget(profiled, profile=profile, latency_ms=1e9).dtype == torch.bfloat16
    options = {"profile": profile, "latency_ms": 1e9, "model_kwargs": {"dtype": torch.float32}}
    assert load_at_budget(profiled, **options).dtype == torch.float32


def test_a_profile_of_another_machine_is_used_with_a_warning(profiled, monkeypatch):
    monkeypatch.setattr("modular_star_encoder.utils.reports.processor_model", lambda: "another processor")
    with pytest.warns(UserWarning, match=r"measured on another machine \(processor .*here 'another processor'\)"):
        load_at_budget(profiled, min_quality=0.3)


def test_a_repository_of_the_hub_brings_its_profile(profiled, tmp_path, monkeypatch):
    snapshot = cache_repository(profiled, tmp_path, monkeypatch)
    assert checkpoint_profile(REPOSITORY) == ExitProfile.load(profiled / "exit_profile.json")
    assert checkpoint_checksum(REPOSITORY) == snapshot.name
    (snapshot / "exit_profile.json").unlink()
    with pytest.raises(OSError, match=f"no exit profile {REPOSITORY}"):
        checkpoint_profile(REPOSITORY)


# ---- Measuring

PLAN = ProfilePlan(batch_sizes=(2, 1), lengths=(8, 64), rounds=6, memory=False)


def measured(checkpoint, **options):
    return profile_to_file(checkpoint, PLAN, device="cpu", progress=False, **options)[0]


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
    options = {"out": tmp_path / "profile.json", "exit_layers": (1,)}
    known = measured(checkpoint, **options).with_quality("csn", {1: 0.5})
    for older, quality in ((known, {"csn": 0.5}), (dataclasses.replace(known, checkpoint="4567"), {})):
        older.save(options["out"])
        assert measured(checkpoint, **options).exits[1].quality == quality


def test_scores_that_are_added_during_a_measurement_stay(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    profile = measured(checkpoint, out=path)
    measure = lambda *_, **__: profile.with_quality("csn", {1: 0.5}).save(path) or profile  # noqa: E731
    monkeypatch.setattr(profile_exits, "profile_checkpoint", measure)
    assert measured(checkpoint, out=path).exits[1].quality == {"csn": 0.5}


def test_a_profile_of_fewer_exits_does_not_replace_a_fuller_one(checkpoint, tmp_path, capsys):
    out = tmp_path / "profile.json"
    full = measured(checkpoint, out=out)
    assert cli.main(["profile", str(checkpoint), "--out", str(out), "--exit-layers", "1"]) == 2
    assert "a profile of exits 2, 4, which would be overwritten" in capsys.readouterr().err
    assert ExitProfile.load(out) == full


def test_the_profile_is_stored_with_the_checkpoint_by_default(tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path / "model")
    assert measured(checkpoint) == ExitProfile.load(checkpoint / "exit_profile.json")
    before = checkpoint_checksum(checkpoint)
    assert before == ExitProfile.load(checkpoint / "exit_profile.json").checkpoint
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    assert checkpoint_checksum(checkpoint) != before


def test_a_process_that_cannot_measure_memory_is_reported_in_a_sentence(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho one >&2\necho 'MemoryError: no room' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(OSError, match=r"memory of exit 1 .* failed: MemoryError: no room"):
        measure_memory("checkpoint", 1, "cpu", "float32", [(1, 8)], 1)
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(OSError, match="failed: status -9"):
        measure_memory("checkpoint", 1, "cpu", "float32", [(1, 8)], 1)


def test_peak_memory_is_the_most_that_was_ever_resident():
    imports = "import sys\nfrom contextlib import suppress\nfrom pathlib import Path"
    program = f"{imports}\n{inspect.getsource(profile_exits.peak_memory_mb)}\n"
    program += "before = peak_memory_mb(); block = b'x' * 64_000_000; during = peak_memory_mb(); del block\n"
    program += "print(during - before, peak_memory_mb() - before)"
    assert [float(word) for word in python("-c", program).stdout.split()] == pytest.approx([64, 64], abs=4)


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
            counted = profile_exits.flops_per_token(model.config, exit_layer, length)
            assert counted == pytest.approx(expected, rel=1e-12)
