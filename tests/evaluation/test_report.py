import csv
import io
import json
import re

import numpy as np
import pytest

from modular_star_encoder.evaluation.harness import evaluate_tasks
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.plots import median_latencies, plot_quality_by_depth, plot_quality_by_latency
from modular_star_encoder.evaluation.report import build_tables, to_csv, to_latex, to_markdown, write_report
from tests.evaluation.samples import given_system, pair_task, retrieval_task
from tests.inference.test_exit_profile import made_up_profile

TASKS = [
    retrieval_task(notes=("half of it",)),
    retrieval_task(name="two_b", n=40, seed=1),
    pair_task(),
]
SYSTEMS = ("given", "BM25")


@pytest.fixture(scope="module")
def cells():
    return evaluate_tasks(TASKS, [given_system(), BM25()], progress=False)


@pytest.fixture(scope="module")
def tables(cells):
    return build_tables(TASKS, cells)


def test_a_table_has_a_row_for_each_exit_and_system_and_the_mean_of_its_columns(tables, cells):
    toy, pairs = tables
    assert [row.label for row in toy.rows] == ["given, exit 1", "given, exit 2", "given, exit 3", "BM25"]
    for row in toy.rows:
        figures = {cell.task: cell.figures["mrr"].value for cell in cells if _is(cell, row, "toy")}
        assert {column: figure.value for column, figure in row.columns.items()} == figures
        assert row.mean.value == pytest.approx(np.mean(list(figures.values())))
        assert row.mean.low < row.mean.value < row.mean.high
    assert (pairs.metric, pairs.size) == ("f1", "15 pairs")
    assert toy.size == "60 queries, 20 to 40 candidates each"


def _is(cell, row, benchmark):
    return (cell.benchmark, cell.system, cell.exit_layer) == (benchmark, row.system, row.exit_layer)


def test_differences_are_to_the_deepest_exit(tables):
    toy = tables[0]
    assert toy.reference == "given, exit 3"
    last = toy.rows[2]
    assert last.difference is None
    for row in (toy.rows[0], toy.rows[3]):
        assert row.difference.value == pytest.approx(row.mean.value - last.mean.value)
        assert 0 < row.difference.p <= 1
    assert toy.rows[3].difference.p < 0.05  # numbers without words in common


def test_tasks_of_one_column_share_it(cells):
    tasks = [retrieval_task(column="all"), retrieval_task(name="two_b", n=40, seed=1, column="all")]
    (table,) = build_tables(tasks, cells)
    assert list(table.rows[0].columns) == ["all"]
    assert table.rows[0].columns["all"] == table.rows[0].mean


def test_a_missing_cell_is_told(cells):
    with pytest.raises(ValueError, match="given has no figure for toy, one"):
        build_tables(TASKS, cells[1:])


def test_markdown_shows_figures_intervals_command_and_notes(tables):
    text = to_markdown(tables, "mose evaluate MODEL")
    row = next(line for line in text.splitlines() if line.startswith("| given, exit 2 "))
    mean = tables[0].rows[1].mean
    assert f"{100 * mean.value:.1f}" in row
    assert f"{100 * mean.low:.1f}–{100 * mean.high:.1f}" in row
    for part in (
        "    mose evaluate MODEL",
        "torch ",
        "Note: half of it.",
        "ties count against the system",
        "paired permutation",
    ):
        assert part in text
    widths = {len(line) for line in text.split("## pairs")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_csv_has_every_metric_of_every_cell(cells):
    rows = list(csv.DictReader(io.StringIO(to_csv(cells))))
    assert len(rows) == sum(len(cell.figures) for cell in cells)
    first = next(row for row in rows if row["task"] == "two_b" and row["exit_layer"] == "3" and row["metric"] == "mrr")
    cell = next(cell for cell in cells if (cell.task, cell.exit_layer) == ("two_b", 3))
    assert float(first["value"]) == cell.figures["mrr"].value
    assert (first["queries"], first["candidates"]) == ("40", "40")


def test_latex_is_escaped_and_has_as_many_cells_as_columns(tables):
    text = to_latex(tables)
    assert r"two\_b" in text
    assert not re.search(r"(?<!\\)[%_&#](?=[a-zA-Z])", text)
    for table in re.findall(r"\\begin\{tabular\}\{(lr+)\}(.*?)\\end", text, re.DOTALL):
        rows = [line for line in table[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(table[0])}


def test_all_reports_are_written_and_json_holds_what_tables_show(tmp_path, tables, cells):
    paths = write_report(tmp_path / "out", tables, cells, "mose evaluate")
    assert sorted(path.name for path in paths) == ["report.csv", "report.json", "report.md", "report.tex"]
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["tables"][0]["rows"][1]["mean"]["value"] == tables[0].rows[1].mean.value
    assert len(data["cells"]) == len(cells)
    assert "values" not in data["cells"][0]


def test_figures_show_each_exit_at_its_depth_and_latency(tmp_path, tables, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, _plot=Axes.plot, **k: drawn.append((x, y)) or _plot(self, x, y, **k)
    )
    assert plot_quality_by_depth(tables, tmp_path / "depth.png").stat().st_size > 5000
    means = [100 * row.mean.value for row in tables[0].rows if row.exit_layer is not None]
    assert drawn[0] == ([1, 2, 3], means)
    plot_quality_by_latency(tables, {"given": {1: 5.0, 3: 20.0}}, tmp_path / "latency.png")
    assert drawn[-2] == ([5.0, 20.0], [means[0], means[2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth.png", "latency.png"]
    with pytest.raises(ValueError, match="No exit"):
        plot_quality_by_latency(tables, {"BM25": {1: 1.0}}, tmp_path / "none.png")


def test_without_matplotlib_the_extra_is_named(tmp_path, tables, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"modular-star-encoder\[plots\]"):
        plot_quality_by_depth(tables, tmp_path / "depth.png")


def test_latencies_are_the_medians_of_the_first_shape():
    assert median_latencies(made_up_profile()) == {4: 10.0, 9: 22.5, 18: 45.0}
