import json
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from filelock import FileLock

from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.data.pairs import open_triplets
from modular_star_encoder.synthconl import build, near_duplicate_job, row_files
from modular_star_encoder.synthconl.build import SPLITS, STAGES, DatasetRecipe
from modular_star_encoder.synthconl.corpus import EvaluationTexts, build_corpus, check_corpus, read_packages
from modular_star_encoder.synthconl.near_duplicate_job import drop_near_duplicates
from modular_star_encoder.synthconl.publishing import MEANINGS
from modular_star_encoder.synthconl.row_files import count_rows, read_rows, write_rows, write_split
from modular_star_encoder.synthconl.translation import SCHEMA, target_language
from modular_star_encoder.utils.settings import load_settings
from tests.errors import raises
from tests.processes import ended_by_sigkill, start_process
from tests.synthconl.openai_server import OpenAIServer
from tests.synthconl.samples import build_and_die, marker, small_recipe, translation, write_corpus
from tests.synthconl.test_corpus import CLEAN, write_packages, write_sets
from tests.synthconl.test_near_duplicate_job import write_shards

SEED = 3
NOWHERE = "http://127.0.0.1:1/v1"


build_quietly = partial(build.build_dataset, progress=False)


def report(out, stage):
    return json.loads((out / stage / "report.json").read_text())


def published(out):
    """{id: (split, row)}, read by `datasets` with the card's metadata."""
    rows = {}
    for split, part in datasets.load_dataset(str(out / "dataset"), cache_dir=str(out.parent / "cache")).items():
        for row in part:
            assert row["id"] not in rows
            rows[row["id"]] = (split, row)
    return rows


def assert_rows_are_their_own(out):
    """Check that every row has the translation of its own function, in the language drawn for its id."""
    functions = {row["id"]: row for row in read_rows(out / "functions")}
    for split, row in published(out).values():
        function = functions[row["id"]]
        for name in ("func1_CSN", "func_documentation_string", "repository_name"):
            assert row[name] == function[name]
        assert marker(function["func1_CSN"]) in row["func2"]
        target = target_language(row["id"], function["language1_CSN"], seed=SEED)
        assert row["language2"] == ("c++" if target == "cpp" else target)
        assert split in SPLITS


def test_a_build_has_every_row_that_passes_once_and_with_its_own_translation(finished):
    assert_rows_are_their_own(finished)
    answers, accepted, kept = (report(finished, name) for name in ("translations", "triplets", "near_duplicates"))
    count = len(list(read_rows(finished / "functions")))
    assert answers["completions"] == count == 35
    assert set(accepted["rejected"]) == {"truncated", "refused"}
    assert accepted["accepted"] + sum(accepted["rejected"].values()) == count
    assert sum(sum(pair.values()) for pair in accepted["pairs"].values()) == count
    assert 0 < kept["counts"]["kept"] < kept["rows"] == accepted["accepted"]
    assert len(published(finished)) == kept["counts"]["kept"]
    triplets = {row["id"] for row in read_rows(finished / "triplets")}
    assert {row["id"] for row in read_rows(finished / "near_duplicates")} == set(published(finished)) < triplets


def test_the_result_reads_as_triplets_of_splits_without_a_common_repository(finished):
    rows = published(finished).values()
    repositories = {split: {row["repository_name"] for of, row in rows if of == split} for split in SPLITS}
    assert not set.intersection(*repositories.values())
    counts = Counter(split for split, _ in rows)
    expected = {name: {"rows": counts[name], "repositories": len(names)} for name, names in repositories.items()}
    assert report(finished, "split")["splits"] == expected
    assert all(counts.values())
    assert all(list(row) == list(MEANINGS) for _, row in rows)
    triplets = list(open_triplets(finished / "dataset", strict=True))
    assert [one.snippets[1].code for one in triplets] == [row["func2"] for split, row in rows if split == "train"]
    assert {one.snippets[0].language for one in triplets} == {"python"}
    assert {one.snippets[1].language for one in triplets} <= set(LANGUAGES) - {"python"}


def test_a_finished_build_is_not_built_again_and_how_it_is_run_may_change(corpus, finished, server):
    asked, before = len(server.bodies), (finished / "build.json").read_bytes()
    build_quietly(small_recipe(corpus, NOWHERE), finished)
    build_quietly(small_recipe(corpus, NOWHERE, options={"concurrency": 9}, processes=1), finished)
    assert len(server.bodies) == asked
    assert (finished / "build.json").read_bytes() == before


def done(out):
    return sum((out / stage.__name__ / "report.json").is_file() for stage in STAGES)


@pytest.mark.slow
def test_killed_before_every_renaming_nothing_is_lost_doubled_or_mismatched(corpus, finished, server, tmp_path):
    # A process dies before its first renaming, the next before its second, and so on until one finishes a stage; then
    # again from the first. What is on disk changes by renaming, so these are all the states that a death can leave.
    out, asked = tmp_path / "out", len(server.bodies)
    deaths = Counter()
    while (stage := done(out)) < len(STAGES):
        process = start_process(build_and_die, corpus, server.base_url, out, deaths[stage] + 1)
        killed = ended_by_sigkill(process)
        assert killed or process.exitcode == 0
        deaths[stage] += killed
    assert min(deaths[stage] for stage in range(len(STAGES))) >= 2
    build_quietly(small_recipe(corpus, server.base_url), out)
    assert_rows_are_their_own(out)
    assert published(out) == published(finished)
    names, expected = ({str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (out, finished))
    assert names == expected
    # The stage of translation starts as often as it is killed, with at most four requests under way.
    assert len(server.bodies) - asked <= 35 + 4 * deaths[1]


def test_what_a_killed_process_left_in_a_finished_stage_is_removed(corpus, finished, server, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for stage in ("translations", "near_duplicates"):
        (out / stage / ".report.json.1.tmp").touch()  # of a report that was being written again
    build_quietly(small_recipe(corpus, server.base_url), out)
    assert not [*out.rglob(".*.tmp")]


@pytest.mark.slow
def test_killed_while_several_processes_extract_it_leaves_none_behind(corpus, finished, server, tmp_path):
    # With two rows in a file, the second renaming, that of the first file, comes while the others are still at work.
    options = {"rows_per_file": 2, "processes": 2}
    assert ended_by_sigkill(start_process(build_and_die, corpus, server.base_url, tmp_path / "out", 2, **options))
    assert done(tmp_path / "out") == 0
    build_quietly(small_recipe(corpus, server.base_url), tmp_path / "out")
    assert published(tmp_path / "out") == published(finished)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"translation": {"model": "another"}}, "translations.model"),
        ({"seed": 4}, "translations.seed"),
        ({"options": {"body": {"seed": 1}}}, "translations.options.body"),
        ({"languages": ["python", "go"]}, "functions.languages"),
        ({"near_duplicates": {"threshold": 0.5}}, "near_duplicates.threshold"),
        ({"validation_rows": 6}, "split.validation_rows"),
        ({"card": {"name": "Mine"}}, "dataset.card.name"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(corpus, finished, server, changes, setting):
    with raises("synthconl.build.other_settings", setting, finished / setting.partition(".")[0]):
        build_quietly(small_recipe(corpus, server.base_url, **changes), finished)


def test_a_removed_stage_is_built_again_with_other_settings_but_not_with_answers_to_other_functions(
    corpus, finished, server, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    recipe = small_recipe(corpus, server.base_url, card={"name": "Mine"})
    shutil.rmtree(out / "dataset")
    build_quietly(recipe, out)
    assert "pretty_name: Mine" in (out / "dataset" / "README.md").read_text()
    assert published(out) == published(finished)
    shutil.rmtree(out / "triplets")
    file = out / "translations" / "rows-00000.parquet"
    row_files.write_parquet(file, [pq.read_table(file).take([1, 0, *range(2, 35)])], SCHEMA)
    with raises("synthconl.build.other_answers", "translations/rows-00000.parquet"):
        build_quietly(recipe, out)
    assert not (out / "triplets").exists()


@pytest.mark.parametrize("content", ["[1", "3", '{"functions": {}}'])
@pytest.mark.parametrize("name", ["build.json", *(f"{stage.__name__}/report.json" for stage in STAGES[:-1])])
def test_a_damaged_file_of_the_build_is_named(corpus, finished, server, tmp_path, name, content):
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "dataset")
    (out / name).write_text(content)
    with raises("synthconl.build.damaged", out / name):
        build_quietly(small_recipe(corpus, server.base_url), out)
    if name == "translations/report.json":
        (out / name).unlink()
        build_quietly(small_recipe(corpus, server.base_url), out)
        assert published(out) == published(finished)


def test_wrong_folders_and_those_of_a_running_build_are_refused_and_left_alone(corpus, server, tmp_path, monkeypatch):
    monkeypatch.setattr("modular_star_encoder.utils.files.LOCK_SECONDS", 0.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    recipe = small_recipe(corpus, server.base_url)
    with raises("synthconl.build.out", tmp_path / "mine"):
        build_quietly(recipe, tmp_path / "mine")
    folder = write_shards(tmp_path / "in", [{"id": n, "code": f"x = {n}"} for n in range(4)])
    dedup = partial(drop_near_duplicates, folder, tmp_path / "dedup", columns=["code"], progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicate_job, "find_near_duplicates", None)
        with pytest.raises(TypeError):
            dedup()  # interrupted
    (tmp_path / "corpus").mkdir()
    corpus_at = partial(build_corpus, read_packages(write_packages(tmp_path / "corpus")))
    sets = EvaluationTexts(write_sets(tmp_path, CLEAN))
    for name, second in {
        "out": lambda: build_quietly(recipe, tmp_path / "out"),
        "dedup": dedup,
        "pairs": lambda: corpus_at(tmp_path / "corpus" / "raw", tmp_path / "pairs", processes=0),
        "left": lambda: check_corpus([tmp_path / "pairs.jsonl"], sets, tmp_path / "left"),
    }.items():
        (folder := tmp_path / name).mkdir(exist_ok=True)
        with FileLock(folder / ".lock"), raises("files.locked", folder):
            second()
        if name != "out":
            second()  # nothing is left behind that a later run minds


@pytest.mark.parametrize(
    ("benchmark", "key", "value"),
    [
        ({"source": "none.jsonl", "column": "code"}, "data.source.no_files", "none.jsonl"),
        ({"source": "{rows}", "column": "cod"}, "data.row", "line 1"),
    ],
)
def test_a_benchmark_that_cannot_be_read_is_reported_before_any_request(corpus, tmp_path, benchmark, key, value):
    (tmp_path / "rows.jsonl").write_text('{"code": "x"}\n')
    benchmark = benchmark | {"source": benchmark["source"].format(rows=tmp_path / "rows.jsonl")}
    recipe = small_recipe(corpus, NOWHERE, against={"benchmark": benchmark})
    with raises(key, value):
        build_quietly(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_repository_nothing_to_translate_and_nothing_accepted_are_one_sentence(corpus, tmp_path):
    one = write_corpus(tmp_path / "one", repositories=1)
    for _ in range(2):
        with raises("synthconl.build.one_repository", "'repository0'"):
            build_quietly(small_recipe(one, NOWHERE), tmp_path / "out")
    assert not (tmp_path / "out" / "functions").exists()
    (one / "repository0" / "module.py").write_text("x = 1\n")
    with raises("synthconl.build.empty", "(files left out: few letters: 1)"):
        build_quietly(small_recipe(one, NOWHERE), tmp_path / "out")
    cut = OpenAIServer(lambda prompt: replace(translation(prompt), finish_reason="length"))
    with cut, raises("synthconl.build.empty", "(truncated: 35)"):
        build_quietly(small_recipe(corpus, cut.base_url), tmp_path / "two")


TRANSLATION = {"backend": "openai", "model": "model", "options": {"base_url": NOWHERE}}
SETTINGS = {"corpus": {"folder": "code"}, "translation": TRANSLATION}


def test_the_example_is_a_recipe_of_the_papers_settings():
    example = Path(__file__).parents[2] / "hub_configs" / "synthconl" / "recipe.yaml"
    recipe = load_settings(DatasetRecipe, example, ["corpus.folder=/code", "translation.options.concurrency=3"])
    assert recipe.corpus == ({"folder": "/code"},)
    assert recipe.translation.model == "Qwen/Qwen2.5-Coder-7B-Instruct"
    assert recipe.translation.options["concurrency"] == 3
    assert recipe.near_duplicates.threshold == 0.7
    assert tuple(recipe.near_duplicates.columns) == ("func1_CSN", "func2")
    recipe.translation.open()
    corpora = [{"folder": "a"}, {"codesearchnet": "b"}]
    assert DatasetRecipe(**SETTINGS | {"corpus": corpora}).corpus == tuple(corpora)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"corpus": None}, ["corpus", "None"]),
        ({"translation": TRANSLATION | {"modle": 1}}, ["translation", "modle"]),
        ({"translation": TRANSLATION | {"targets": ["go"]}}, ["targets", "go"]),
        ({"near_duplicates": {"threshold": 2}}, ["threshold", "2"]),
        ({"near_duplicates": {"columns": ["code"]}}, ["columns", "'func1_CSN' or 'func2'", "'code'"]),
        ({"against": {"benchmark": {"source": "a"}}}, ["against.benchmark.column"]),
        ({"card": {"tags": "security"}}, ["tags", "'security'"]),
    ],
)
def test_a_wrong_recipe_is_one_sentence_that_names_the_setting(tmp_path, changes, values):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS | changes))
    with pytest.raises(ValueError) as error:  # noqa: PT011  keys are those of the settings
        load_settings(DatasetRecipe, tmp_path / "recipe.yaml")
    sentence = str(error.value)
    assert all(value in sentence for value in [str(tmp_path / "recipe.yaml"), *values]), sentence
    assert "\n" not in sentence
    with raises("settings.file", "missing.yaml"):
        load_settings(DatasetRecipe, tmp_path / "missing.yaml")


IDS = pa.schema([("id", pa.string())])


def some_rows(count):
    return [{"id": str(i)} for i in range(count)]


@pytest.mark.parametrize("count", [0, 3, 14])
def test_rows_are_read_as_they_were_written_and_a_split_is_numbered_out_of_its_files(tmp_path, monkeypatch, count):
    monkeypatch.setattr(row_files, "ROWS_PER_FILE", 3)
    monkeypatch.setattr(row_files, "ROWS_PER_PUBLISHED_FILE", 6)
    monkeypatch.setattr(row_files, "_ROWS_PER_PUBLISHED_GROUP", 3)
    assert write_rows(tmp_path, iter(some_rows(count)), IDS) == count_rows(tmp_path) == count
    assert list(read_rows(tmp_path)) == some_rows(count)
    assert len(list(tmp_path.iterdir())) == -(-count // 3)
    write_split(tmp_path, "train", some_rows(count), IDS)
    files, number = sorted(tmp_path.glob("train-*")), -(-count // 6)
    assert [file.name for file in files] == [f"train-0000{i}-of-0000{number}.parquet" for i in range(number)]
    assert [row for file in files for row in pq.read_table(file).to_pylist()] == some_rows(count)
