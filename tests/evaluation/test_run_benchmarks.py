import dataclasses
import json
import runpy
import shutil
from pathlib import Path

import pytest

from modular_star_encoder.evaluation.run import run_benchmarks
from modular_star_encoder.inference import PROFILE_NAME, encoders
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from tests.cli import conftest
from tests.errors import raises
from tests.evaluation.benchmarks import published
from tests.inference.test_exit_profile import made_up_profile
from tests.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.slow
mose = conftest.mose


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    published.codesearchnet(folder / "codesearchnet")
    published.exercism(folder / "exercism")
    published.cosqa(folder / "cosqa")
    return folder


def run(checkpoint, data, out, *names, **options):
    return run_benchmarks(str(checkpoint), names or ["cosqa"], data, out, allow_subset=True, progress=False, **options)


def test_one_command_runs_all_benchmarks_of_a_folder_through_a_model_and_baselines(mose, checkpoint, data, tmp_path):
    out = tmp_path / "out"
    options = ("--allow-subset", "--baselines", "bm25", "--exit-layers", "1,4", "--out", out)
    status, shown, _ = mose("evaluate", checkpoint, "--benchmark", "all", "--data", data, *options)
    assert status == 0
    assert shown == (out / "report.md").read_text()
    tables = json.loads((out / "report.json").read_text())["tables"]
    assert [table["benchmark"] for table in tables] == [
        "codesearchnet-999", "cosqa", "exercism-text", "exercism-text-masked", "exercism-code", "exercism-code-masked",
    ]  # fmt: skip
    for table in tables:
        rows = [(row["retriever"].split("/")[-1], row["exit_layer"]) for row in table["rows"]]
        assert rows == [("model", 1), ("model", 4), ("BM25", None)]
    names = {path.name for path in out.iterdir()}
    assert {"report.csv", "report.tex", "quality_by_depth.png", "cells", "embeddings"} <= names


def test_without_out_the_same_report_goes_to_the_terminal_and_to_a_json_file(
    mose, checkpoint, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOSE_DATA", str(data))
    monkeypatch.setattr("sys.argv", ["mose", "evaluate", "--data", str(data)])
    options = ("--benchmark", "cosqa", "--data", data, "--allow-subset", "--exit-layers", "4")
    assert mose("evaluate", checkpoint, *options, "--baselines", "bm25", "--out", tmp_path / "out")[0] == 0
    status, shown, _ = mose("evaluate", checkpoint, *options, "--json", tmp_path / "results.json")
    assert status == 0
    assert "BM25" in shown
    stored, written = (json.loads((tmp_path / name).read_text()) for name in ("out/report.json", "results.json"))
    assert {**stored, "command": ""} == {**written, "command": ""}
    assert written["command"] == "mose evaluate --data $MOSE_DATA"  # no place of this machine
    assert written["checkpoint_checksum"] == checkpoint_checksum(checkpoint)


def test_latencies_are_plotted_if_the_checkpoint_has_a_profile_of_the_exits(checkpoint, data, tmp_path, capsys):
    model, out = str(shutil.copytree(checkpoint, tmp_path / "model")), tmp_path / "out"
    made_up_profile().save(Path(model, PROFILE_NAME))  # of exits 4, 9 and 18
    run(model, data, out)
    assert (out / "quality_by_latency.png").is_file()
    run(model, data, out, exit_layers=(1,))
    assert "a plot could not be made" in capsys.readouterr().err
    Path(model, PROFILE_NAME).unlink()
    run(model, data, out)
    assert (out / "report.md").is_file()
    assert (out / "quality_by_depth.png").is_file()
    assert not (out / "quality_by_latency.png").exists()  # it would show the earlier run's


@pytest.mark.parametrize(("changes", "drawn"), [({"dtype": "bfloat16"}, True), ({"device": "cuda"}, False)])
def test_latencies_that_were_not_measured_alike_are_not_drawn_together(data, tmp_path, capsys, changes, drawn):
    names = [str(save_tiny_checkpoint(tmp_path / name / "model")) for name in ("a", "b")]
    for name, differing in zip(names, ({}, changes), strict=True):
        dataclasses.replace(made_up_profile(), **differing).save(Path(name, PROFILE_NAME))
    run(names[0], data, tmp_path / "out", baselines=names[1:])
    assert (tmp_path / "out" / "quality_by_latency.png").is_file() == drawn
    assert ("a/model and b/model can't be compared" in capsys.readouterr().err) != drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected 6,267 codes, found 4"),
        ({"exit_layers": (3,), "allow_subset": True}, "its exits are 1, 2, 4"),
        ({"baselines": ["./no"], "allow_subset": True}, "no checkpoint folder"),
    ],
)
def test_mistakes_are_reported_before_anything_is_embedded_or_written(
    checkpoint, data, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(encoders, "encode_exits", lambda *_, **__: pytest.fail("embedded before the error"))
    with pytest.raises((ValueError, OSError), match=message):
        run_benchmarks(str(checkpoint), ["cosqa"], data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_two_retrievers_of_one_name_are_an_error(checkpoint, data, tmp_path):
    names = [tmp_path / place / "runs" / "model" for place in ("a", "b")]
    for name in names:
        shutil.copytree(checkpoint, name)
    with raises("evaluation.retriever.same_name", "'runs/model'"):
        run(str(names[0]), data, tmp_path / "out", baselines=[str(names[1])])


def test_the_example_runs_the_same(checkpoint, data, tmp_path, capsys, monkeypatch):
    script = Path(__file__).parents[2] / "examples" / "evaluate.py"
    options = ["--data", str(data), "--benchmarks", "cosqa", "--allow-subset", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [str(script), str(checkpoint), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "cosqa, mrr" in shown
    assert "BM25" in shown
    assert (tmp_path / "report.md").is_file()
