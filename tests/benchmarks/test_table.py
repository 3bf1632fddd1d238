import json
from pathlib import Path

from tests.benchmarks.conftest import BENCHMARKS


def results(folder: Path, **row):
    text = json.dumps({"figures": {"rows": [{"name": "time", "most": 1.1} | row]}})
    (folder / "forward.json").write_text(text, encoding="utf-8")


def test_the_readme_has_the_figures_of_the_committed_results(table):
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert table.with_table(text, table.results_table(table.COMMITTED)) == text


def test_a_ratio_that_got_worse_beyond_the_tolerance_is_named(table, tmp_path):
    import run

    before = {"time": {"value": 1.0, "most": 2}, "speed": {"value": 1.0, "least": 0.5}}
    results(tmp_path, value=1.5, low=1.4, high=1.6)
    measured = run.ratios_with_a_target(tmp_path)
    assert run.regressions(measured, before) == ["worse: time: 1.50 x, in results/quick.json 1.00 x"]
    results(tmp_path, value=1.5, low=1.2, high=1.6)  # its better end is within the tolerance
    assert run.regressions(run.ratios_with_a_target(tmp_path), before) == []
    slower = {"speed": {"value": 0.7, "low": 0.6, "high": 0.75, "least": 0.5}}
    assert run.regressions(slower, before) == ["worse: speed: 0.70 x, in results/quick.json 1.00 x"]
    assert run.regressions({"speed": {"value": 5.0, "least": 0.5}}, before) == []
