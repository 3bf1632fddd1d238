import json
import shutil

import pytest
import yaml

import modular_star_encoder.cli.main as cli
from tests.synthconl.openai_server import OpenAIServer
from tests.synthconl.samples import translation, write_corpus


def write_recipe(folder, base_url, **changes):
    recipe = {
        "corpus": {"folder": "no/such/folder"},
        "translation": {"backend": "openai", "model": "model", "options": {"base_url": base_url}},
        "max_repository_share": 0.5,
        "processes": 0,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder in which `mose dataset build` has worked, and what it printed."""
    folder = tmp_path_factory.mktemp("build")
    write_corpus(folder / "corpus")
    with OpenAIServer(translation) as server, pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(words))
        recipe, out = write_recipe(folder, server.base_url), folder / "out"
        arguments = [recipe, f"corpus.folder={folder / 'corpus'}", "--out", out, "validation_rows=4"]
        assert cli.main(["dataset", "build", *map(str, arguments)]) == 0
    return out, printed


def test_build_prints_where_the_dataset_is_and_push_what_it_would_upload(mose, built):
    folder, printed = built
    assert [str(word) for words in printed for word in words] == [str(folder / "dataset")]
    status, out, _ = mose("dataset", "push", folder, "owner/name")
    assert (status, "README.md" in out, "a dry run" in out) == (0, True, True)


def test_push_prints_no_control_characters_of_names(mose, built, tmp_path):
    folder = shutil.copytree(built[0] / "dataset", tmp_path / "out")
    next(folder.glob("data/*.parquet")).rename(folder / "data" / "\x1b[31m\n0  a.parquet")
    status, out, _ = mose("dataset", "push", folder, "owner/name")
    assert (status, "data/�[31m�0  a.parquet" in out) == (0, True)


def test_stats_prints_the_table_and_writes_the_same_figures(mose, built, tmp_path):
    status, out, err = mose("dataset", "stats", built[0], "--split", "validation", "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (status, err) == (0, "")
    assert f"| all | {figures['rows']} |" in out
    assert (figures["rows"] >= 4, set(figures["original"])) == (True, {"python"})


@pytest.mark.parametrize(
    "words", ["stats FILE", "corpus check OTHER FILE --against OTHER", "corpus check OTHER --against FILE"]
)
def test_json_never_replaces_a_file_that_is_read(mose, tmp_path, words):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"code": "x = 1"}\n')
    words = words.replace("FILE", str(tmp_path / "a.jsonl")).replace("OTHER", str(tmp_path / "b.jsonl"))
    status, _, err = mose("dataset", *words.split(), "--json", f"{tmp_path}/../{tmp_path.name}/a.jsonl")
    assert (status, "Name another file after --json" in err) == (2, True)
    assert (tmp_path / "a.jsonl").read_text() == '{"code": "x = 1"}\n'


def test_stats_says_what_it_left_out(mose, tmp_path):
    row = {"func_documentation_string": "Adds.", "func1_CSN": "x", "language1_CSN": "go", "repository_name": "r"}
    rows = [row | {"func2": "y", "language2": "c"}, row | {"func2": "", "language2": "c"}]
    (tmp_path / "rows.jsonl").write_text("\n".join([*map(json.dumps, rows), "\x1b[2J"]))
    status, out, err = mose("dataset", "stats", tmp_path / "rows.jsonl")
    assert (status, "| all | 1 | 1 | 1 | 1 |" in out) == (0, True)
    assert all(one in err for one in ("�[2J", "1 rows left out (empty func2), such as", "line 2"))


def test_dedup_writes_the_rows_that_are_kept(mose, built, tmp_path):
    options = ("--out", tmp_path / "out", "--columns", "func1_CSN", "--id-column", "id")
    status, out, _ = mose("dataset", "dedup", built[0] / "triplets", *options)
    assert status == 0
    counts = {line.split(maxsplit=1)[1]: int(line.split()[0].replace(",", "")) for line in out.splitlines()}
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["counts"]["kept"]
    assert counts["kept"] == kept < sum(counts.values())
    report = tmp_path / "out" / "report.json"
    report.write_text(report.read_text().replace('"kept"', '"\\u001b[31mkept"'))
    assert "�[31mkept" in mose("dataset", "dedup", built[0] / "triplets", *options)[1]
