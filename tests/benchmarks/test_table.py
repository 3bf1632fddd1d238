import json
import sys
from pathlib import Path

from tests.benchmarks.conftest import BENCHMARKS


def results(folder: Path, **row):
    row = {"name": "ours / theirs", "value": 1.2, "low": 1.1, "high": 1.3, "most": 1.1} | row
    about = {
        "command": "python x.py",
        "machine": {"cpu": "a CPU", "cores": 2},
        "versions": {"torch": "2", "transformers": "5"},
    }
    text = json.dumps(about | {"figures": {"rows": [row]}})
    (folder / "forward.json").write_text(text, encoding="utf-8")


def test_the_readme_has_the_figures_of_the_committed_results(table):
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert table.with_table(text, table.results_table(table.COMMITTED)) == text


def test_the_table_names_figures_targets_reasons_and_missing_results(table, tmp_path, monkeypatch):
    assert table.results_table(tmp_path).count("not measured yet") == len(table.SOURCES)
    results(tmp_path)
    first = table.results_table(tmp_path)
    assert "1.20 × (1.10–1.30) | ≤ 1.1 × |  no |" in first
    assert "`python x.py`" in first
    monkeypatch.setitem(table.REASONS, "ours /", "the profile says so")
    assert "no: the profile says so" in table.results_table(tmp_path)
    results(tmp_path, value=1.05)
    assert "1.05 × (1.10–1.30) | ≤ 1.1 × | yes |" in table.results_table(tmp_path)


def test_a_benchmark_that_fails_is_named_and_stops_nothing(table, tmp_path, monkeypatch, capfd):
    import run

    assert all((BENCHMARKS / f"{one.script}.py").is_file() for one in run.QUICK)
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    (tmp_path / "fine.py").write_text("print('it ran')")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "QUICK", (run.Benchmark("broken"), run.Benchmark("fine"), run.Benchmark("rows", (), True)))
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick"])
    monkeypatch.delenv("MOSE_DATA", raising=False)
    assert run.main() == 1
    out = capfd.readouterr().out
    assert "it ran" in out
    assert "broken: failed with status 3" in out
    assert "rows: skipped: MOSE_DATA is not set" in out


def test_a_ratio_that_got_worse_beyond_the_tolerance_is_named(table, tmp_path):
    import run

    before = {"time": {"value": 1.0, "most": 2}, "speed": {"value": 1.0, "least": 0.5}}
    results(tmp_path, name="time", value=1.5, low=1.4, high=1.6)
    measured = run.ratios_with_a_target(tmp_path)
    assert run.regressions(measured, before) == ["worse: time: 1.50 x, in results/quick.json 1.00 x"]
    results(tmp_path, name="time", value=1.5, low=1.2, high=1.6)  # its better end is within the tolerance
    assert run.regressions(run.ratios_with_a_target(tmp_path), before) == []
    slower = {"speed": {"value": 0.7, "low": 0.6, "high": 0.75, "least": 0.5}}
    assert run.regressions(slower, before) == ["worse: speed: 0.70 x, in results/quick.json 1.00 x"]
    assert run.regressions({"speed": {"value": 5.0, "least": 0.5}}, before) == []


def test_ratios_are_medians_over_rounds_with_an_interval_around_them(table):
    import ratios

    seconds = {"a": [2.0, 4.0, 60.0], "b": [1.0, 2.0, 20.0]}
    measured = ratios.ratio(seconds, "a", "b", scale=0.5)
    assert measured["value"] == 1.0
    assert measured["low"] == 1.0 < measured["high"] == 1.5
    assert ratios.is_met(ratios.figure("x", measured, least=1.0)) is True
    assert ratios.is_met(ratios.figure("x", measured, most=0.9)) is False
    assert ratios.is_met(ratios.figure("x", measured)) is None
    assert ratios.describe({"value": 0.00042, "unit": ""}).strip() == "4.2e-04"


def test_rows_are_written_as_json_markdown_and_picture(table, tmp_path, monkeypatch):
    import report
    from ratios import figure

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = [figure("ours / theirs", {"value": 1.2, "low": 1.1, "high": 1.3}, least=1.0), figure("x", {"value": 2.0})]
    path = report.write_rows("forward", rows, {"layers": 2})
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["figures"] == {"settings": {"layers": 2}, "rows": rows}
    assert written["command"].startswith("python ")
    assert "1.20 × (1.10–1.30) |  ≥ 1 × | met |" in path.with_suffix(".md").read_text(encoding="utf-8")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
