import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from modular_star_encoder.evaluation import report as report_module
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.report import make_report, plot_quality, read_quality, read_tables, to_latex
from modular_star_encoder.evaluation.run import evaluate_tasks
from tests.errors import raises
from tests.evaluation.samples import given_retriever, pair_task, retrieval_task
from tests.inference.test_exit_profile import made_up_profile

TASKS = [retrieval_task(notes=("half of it",)), retrieval_task(name="two_b", n=40, seed=1), pair_task()]


@pytest.fixture(scope="module")
def results():
    return evaluate_tasks(TASKS, [given_retriever(), BM25()], progress=False)


@pytest.fixture(scope="module")
def report(results):
    return make_report(TASKS, results, command="mose evaluate MODEL")


def test_a_table_has_a_row_for_each_exit_and_retriever_and_the_mean_of_its_columns(report, results):
    toy, pairs = report.tables
    assert [row.label for row in toy.rows] == ["given, exit 1", "given, exit 2", "given, exit 3", "BM25"]
    for row in toy.rows:
        key = ("toy", row.retriever, row.exit_layer)
        own = [one for one in results if (one.benchmark, one.retriever, one.exit_layer) == key]
        figures = {one.task: one.estimates["mrr"].value for one in own}
        assert {column: figure.value for column, figure in row.columns.items()} == figures
        assert row.mean.value == pytest.approx(np.mean(list(figures.values())))
        assert row.mean.low < row.mean.value < row.mean.high
    (table,) = make_report([replace(task, column="all") for task in TASKS[:2]], results).tables
    assert table.rows[0].columns == {"all": table.rows[0].mean}
    assert (pairs.metric, pairs.size) == ("f1", "15 pairs")
    assert toy.size == "60 queries, 20 to 40 candidates each"
    last = toy.rows[2]
    assert (toy.reference, last.difference) == ("given, exit 3", None)  # the deepest
    for row in (toy.rows[0], toy.rows[3]):
        assert row.difference.value == pytest.approx(row.mean.value - last.mean.value)
        assert row.difference.low < row.difference.value < row.difference.high
        assert f" {row.difference.value * 100:+.1f} ({row.difference.low * 100:+.1f} to " in report.to_markdown()
    assert toy.rows[3].difference.p < 0.05  # BM25 finds no words in numbers
    assert pairs.rows[0].difference.low is None  # no interval for F1


def test_each_exit_is_compared_with_the_same_exit_before(tmp_path, results):
    exits = [one for one in results if one.retriever == "given"]
    before = [replace(one, retriever="before", exit_layer=4 - one.exit_layer) for one in exits]
    report = make_report(TASKS[:2], [*results, *before], before="before")
    (table,) = report.tables
    assert table.reference == "the same exit (before)"
    differences = {row.label: row.difference.value for row in table.rows if row.difference}
    one, two, three = (row.mean.value for row in table.rows[:3])
    expected = {"given, exit 1": one - three, "given, exit 2": 0, "given, exit 3": three - one}
    assert differences == pytest.approx(expected)
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))
    assert read_quality(tmp_path / "report.json") == {1: one, 2: two, 3: three}  # not those of `before`


def test_markdown_shows_values_intervals_command_and_notes(report):
    text, mean = report.to_markdown(), report.tables[0].rows[1].mean
    row = next(line for line in text.splitlines() if line.startswith("| given, exit 2 "))
    assert f"{100 * mean.value:.1f}" in row
    assert f"{100 * mean.low:.1f}–{100 * mean.high:.1f}" in row
    for part in ("    mose evaluate MODEL", "torch ", "Note: half of it.", "paired permutation"):
        assert part in text
    widths = {len(line) for line in text.split("## pairs")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_heading_and_the_text_below_a_table_say_what_its_numbers_are(report):
    ranked, pairs = report.to_markdown().split("## pairs")
    assert ranked.count("| MRR × 100 ") == pairs.count("| F1 × 100 ") == 1
    for part in ("All scores × 100; 60 queries, 20 to 40 candidates each; among equal scores, relevant documents rank",
                 " MRR: mean of 1 / rank of", " R@k: share of", " NDCG@k: sum of", "from given, exit 3,"):  # fmt: skip
        assert ranked.count(part) == to_latex(report.tables[:1]).replace(r"$\times$", "×").count(part) == 1
    assert "; 15 pairs. F1: harmonic mean of precision and recall. Intervals: bootstrap over pairs." in pairs
    assert "share of" not in pairs  # recall is that of pairs


def test_latex_is_escaped_and_has_as_many_cells_as_columns(report):
    text = to_latex(report.tables)
    assert r"two\_b" in text
    assert not re.search(r"(?<!\\)[%_&#](?=[a-zA-Z])", text)
    for table in re.findall(r"\\begin\{tabular\}\{(lr+)\}(.*?)\\end", text, re.DOTALL):
        rows = [line for line in table[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(table[0])}


def test_all_reports_are_written_and_json_holds_what_tables_show(tmp_path, report, results):
    report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"report.{kind}" for kind in ("csv", "json", "md", "tex")
    ]
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["tables"][0]["rows"][1]["mean"]["value"] == report.tables[0].rows[1].mean.value
    assert len(data["results"]) == len(results)
    assert "values" not in data["results"][0]
    rows = list(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    assert [float(row["value"]) for row in rows] == [one.value for r in results for one in r.estimates.values()]


@pytest.mark.slow
def test_plots_show_each_exit_at_its_depth_and_latency(tmp_path, report, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot, tables = [], Axes.plot, report.tables
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **k: drawn.append((x, y)) or plot(self, x, y, **k))
    plot_quality(tables, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 5000
    means = [100 * row.mean.value for row in tables[0].rows if row.exit_layer is not None]
    assert drawn[0] == ([1, 2, 3], means)
    plot_quality(tables, tmp_path / "latency.png", {"given": {1: 5.0, 3: 20.0}})
    assert drawn[-2] == ([5.0, 20.0], [means[0], means[2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth.png", "latency.png"]
    assert report_module.median_latencies(made_up_profile()) == {4: 10.0, 9: 22.5, 18: 45.0}
    odd = [replace(row, retriever=f"$\\frac{{a$\0{row.retriever}") for row in tables[0].rows]
    plot_quality([replace(tables[0], benchmark=rf"${'{' * 400}$", metric="$^$", rows=odd)], tmp_path / "depth.png")
    with raises("evaluation.plots.empty", "none.png"):
        plot_quality(tables, tmp_path / "none.png", {"BM25": {1: 1.0}})


def test_a_results_file_is_read_unless_it_is_of_other_weights_or_no_results_file(tmp_path, report):
    path, content = tmp_path / "results.json", report.to_dict() | {"checkpoint_checksum": "0123"}
    several_sizes = json.loads(json.dumps(content))
    rows = several_sizes["tables"][0]["rows"]  # with cut embeddings, of which the whole ones are read
    small = {**rows[2], "dimensions": 64, "difference": {"value": -0.1, "p": 0.5}}
    rows.insert(0, {**small, "mean": {"value": 0.1, "low": 0.0, "high": 0.2}})
    for text in (content, {"retrieval": content}, several_sizes):  # `mose evaluate` and `mose finetune`
        path.write_text(json.dumps(text))
        assert read_tables(path, "0123")[0] == report.tables[0]
        assert read_quality(path) == {row.exit_layer: row.mean.value for row in report.tables[0].rows[:3]}
    with raises("evaluation.report.other_weights", "0123", "4567"):
        read_tables(path, "4567")
    odd = json.dumps(content | {"tables": [content["tables"][0] | {"size": "\ud800"}]})
    without_mean = json.dumps(content).replace('"mean": {', '"other": {', 1)
    many = [content["tables"] * 101, [content["tables"][0] | {"rows": 1001 * rows[:1]}]]
    counts = [json.dumps(content | {"tables": tables}) for tables in ([], *many)]
    for text in ("{}", odd, *counts, without_mean):
        path.write_text(text)
        with raises("evaluation.report.unreadable", path):
            read_tables(path)
