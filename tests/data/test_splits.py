import json
from dataclasses import replace

import pytest

from modular_star_encoder.data.functions import code_key, description_key, drop_near_identical_descriptions
from modular_star_encoder.data.splits import draw_repositories, prepare_retrieval_data
from tests.data.samples import function
from tests.errors import raises


def test_near_identical_descriptions_and_codes_are_kept_once():
    first = function()
    same_words = replace(first, description="run ALL the steps", code="def other(): ...")
    same_code = replace(first, description="Something else.", code=first.code.replace("    ", "\t"))
    different = replace(first, description="Something else.", code="def other(): ...")
    assert drop_near_identical_descriptions([first, same_words, same_code, different]) == [first, different]


SIZES = {f"r{i}": 10 for i in range(50)} | {"huge": 300, "large": 200}


def test_only_small_repositories_are_held_out_and_no_more_than_needed():
    for seed in range(5):
        drawn = draw_repositories(SIZES, seed=seed, min_test=95)
        assert len(drawn) == 10
        assert not {"huge", "large"} & drawn


def test_the_seed_alone_decides_the_draw():
    backwards = dict(reversed(SIZES.items()))
    one = draw_repositories(SIZES, seed=1, min_test=100)
    assert draw_repositories(backwards, seed=1, min_test=100) == one
    assert draw_repositories(SIZES, seed=2, min_test=100) != one
    assert draw_repositories({f"r{i}": 1 for i in range(40)}, seed=7, min_test=5) == {"r8", "r12", "r21", "r27", "r37"}


@pytest.mark.parametrize(
    ("sizes", "options", "drawn"),
    [
        ({"a": 30, "b": 10, "c": 60}, {"min_test": 1}, {"b"}),  # large ones only: the smallest first
        ({"a": 50, "b": 50}, {}, {"a"}),  # one always remains for training
        ({"a": 90, "b": 5}, {}, {"b"}),
    ],
)
def test_few_or_large_repositories_are_split_too(sizes, options, drawn):
    assert draw_repositories(sizes, seed=0, **options) == drawn


def test_a_small_corpus_holds_out_about_a_fifth():
    assert len(draw_repositories({f"r{i}": 1 for i in range(100)}, seed=0)) == 20


def test_splits_that_cannot_be_drawn_are_refused():
    with raises("data.split.too_few_repositories", 1):
        draw_repositories({"a": 5}, seed=0)
    for wrong in ({"min_test": 0}, {"max_repository_share": 0}):
        with raises("data.split.arguments", 0):
            draw_repositories({"a": 5, "b": 5}, seed=0, **wrong)


def rewrite(path, change):
    """Replace each row of a file, numbered from 0."""
    rows = [json.loads(line) for line in path.open()]
    path.write_text("\n".join(json.dumps(row | change(i, row)) for i, row in enumerate(rows)))
    return rows


def write_rows(folder, triplets=60, exercises=20):
    """Triplets of 12 repositories, in which every tenth description is one of three; and exercises."""
    rows = [
        {
            "repository_name": f"repository{i % 12}",
            "func_documentation_string": f"Common {i % 3}." if i % 10 == 0 else f"Computes number {i} ünd more.",
            "func1_CSN": f"def f{i}(x):\n    return x + {i}",
            "language1_CSN": "python",
            "func2": f"int f{i}(int x) {{ return x + {i}; }}",
            "language2": "C++",
        }
        for i in range(triplets)
    ]
    (folder / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    solved = [
        {"slug": f"exercise{i}", "code": {"go": f"func E{i}() {{}}", "ruby": f"def e{i}; end", "rust": "fn e() {}"}}
        for i in range(exercises)
    ]
    (folder / "exercises.jsonl").write_text("\n".join(map(json.dumps, solved)))
    return {"triplets": str(folder / "triplets.jsonl"), "parallel": str(folder / "exercises.jsonl")}


def prepare(settings, folder, **changes):
    options = {"eval_fraction": 0.1, "seed": 0, "progress": False} | changes
    return prepare_retrieval_data(settings, folder, **options)


def contents(texts):
    return {description_key(text.description) for text in texts if text.description} | {
        code_key(snippet.code) for text in texts for snippet in text.snippets
    }


def test_held_out_rows_of_every_source_share_nothing_with_those_trained_on(tmp_path):
    data = prepare(write_rows(tmp_path), tmp_path / "data")
    assert not {text.repository for text in data.train} & {text.repository for text in data.held_out}
    assert not contents(data.train) & contents(data.held_out)
    assert {bool(text.description) for text in data.held_out} == {True, False}
    shared = data.report["shared_with_held_out"]
    assert shared > 0
    assert len(data.train) + len(data.held_out) + shared == 80
    assert data.report["sources"]["parallel"]["skipped"] == {"language rust, none of ours": 20}
    assert data.report["held_out_repositories"] == sorted({text.repository for text in data.held_out})


def test_a_repository_that_one_source_holds_out_is_not_trained_on_from_another(tmp_path):
    settings = write_rows(tmp_path)
    rewrite(tmp_path / "exercises.jsonl", lambda i, _: {"slug": f"repository{i % 12}"})
    data = prepare(settings, tmp_path / "data", eval_fraction=0.2)
    assert not {text.repository for text in data.train} & set(data.report["held_out_repositories"])
    assert {bool(text.description) for text in data.train} == {bool(text.description) for text in data.held_out}
    assert len(data.train) + len(data.held_out) + data.report["shared_with_held_out"] == 80


def test_rows_whose_hard_negative_is_held_out_are_not_trained_on_and_the_others_keep_theirs(tmp_path):
    write_rows(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "triplets.jsonl").open()]
    rows = [row | {"worse": rows[(i + 7) % 60]["func1_CSN"]} for i, row in enumerate(rows)]
    (tmp_path / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"source": str(tmp_path / "triplets.jsonl"), "columns": {"negative": "worse"}}
    data = prepare({"triplets": source}, tmp_path / "data")
    held_out = {code_key(text.snippets[0].code) for text in data.held_out}
    negatives = {code_key(text.negative.code) for text in data.train}
    assert negatives
    assert not negatives & held_out
    plain = prepare({"triplets": source["source"]}, tmp_path / "plain")
    assert {code_key(rows[i]["worse"]) for i in range(60)} & held_out
    assert len(data.train) < len(plain.train)
    assert {text.negative for text in plain.train} == {None}


def test_data_of_which_nothing_is_left_to_train_on_is_refused_and_not_written(tmp_path):
    settings = {"triplets": write_rows(tmp_path)["triplets"]}
    rewrite(tmp_path / "triplets.jsonl", lambda *_: {"func2": "int same() { return 1; }"})
    with raises("data.split.nothing_to_train"):
        prepare(settings, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_second_call_reads_what_the_first_one_wrote(tmp_path):
    settings = write_rows(tmp_path)
    first = prepare(settings, tmp_path / "data")
    (tmp_path / "triplets.jsonl").unlink()
    again = prepare(settings, tmp_path / "data")
    assert (again.train, again.held_out, again.report) == (first.train, first.held_out, first.report)
    assert "ü" in "".join(text.description for text in again.train)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 1}, "seed"), ({"max_train_samples": 3}, "max_train_samples"), ({"eval_fraction": 0.2}, "eval_fraction")],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, change, name):
    settings = write_rows(tmp_path)
    prepare(settings, tmp_path / "data")
    with raises("data.split.other_settings", name):
        prepare(settings, tmp_path / "data", **change)


def test_samples_are_drawn_by_seed_in_the_order_of_the_sources(tmp_path):
    settings = write_rows(tmp_path)
    all_rows = prepare(settings, tmp_path / "all").train
    some = [prepare(settings, tmp_path / f"some{i}", max_train_samples=20).train for i in range(2)]
    assert some[0] == some[1] == [text for text in all_rows if text in some[0]]
    assert len(some[0]) == 20
    with raises("data.split.max_train_samples", 1000):
        prepare(settings, tmp_path / "many", max_train_samples=1000)
    assert not (tmp_path / "many").exists()


def test_rows_of_unknown_repository_are_held_out_one_by_one(tmp_path):
    write_rows(tmp_path)
    rewrite(tmp_path / "triplets.jsonl", lambda *_: {"repository_name": ""})
    data = prepare({"triplets": str(tmp_path / "triplets.jsonl")}, tmp_path / "data")
    assert data.report["held_out"] == len(data.held_out) == 6
    assert data.report["held_out_repositories"] == []
