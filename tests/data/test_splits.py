import json
from collections import Counter
from dataclasses import replace

import pytest

from modular_star_encoder.data import splits
from modular_star_encoder.data.functions import code_key, description_key
from modular_star_encoder.data.pairs import RetrievalExample, Snippet, resolve_pairs
from modular_star_encoder.data.splits import CODE_TO_CODE, TEXT_TO_CODE, BatchPlan, PairGroups, draw_repositories
from tests.errors import raises


def test_only_small_repositories_are_held_out_and_the_seed_alone_decides():
    sizes = {f"r{i}": 10 for i in range(50)} | {"huge": 300, "large": 200}
    drawn = [draw_repositories(sizes, seed=seed, min_test=95) for seed in range(5)]
    assert all(len(one) == 10 and not {"huge", "large"} & one for one in drawn)  # no more than needed
    assert len(set(map(frozenset, drawn))) == 5
    assert draw_repositories(dict(reversed(sizes.items())), seed=1, min_test=95) == drawn[1]
    assert draw_repositories({f"r{i}": 1 for i in range(40)}, seed=7, min_test=5) == {"r8", "r12", "r21", "r27", "r37"}
    with raises("data.split.too_few_repositories", 1):
        draw_repositories({"a": 5}, seed=0)


@pytest.mark.parametrize(
    ("sizes", "options", "drawn"),
    [
        ({"a": 30, "b": 10, "c": 60}, {"min_test": 1}, {"b"}),  # large ones only: the smallest first
        ({"a": 50, "b": 50}, {}, {"a"}),  # one always remains for training
        ({"a": 90, "b": 5}, {}, {"b"}),
        (dict.fromkeys("abcde", 1), {}, {"a"}),  # about a fifth of few
    ],
)
def test_few_or_large_repositories_are_split_too(sizes, options, drawn):
    assert draw_repositories(sizes, seed=0, **options) == drawn


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
    return splits.prepare_retrieval_data(settings, folder, **options)


def contents(texts):
    return {description_key(text.description) for text in texts if text.description} | {
        code_key(snippet.code) for text in texts for snippet in text.snippets
    }


def test_held_out_rows_of_every_source_share_nothing_with_those_trained_on(tmp_path, capsys):
    data = prepare(write_rows(tmp_path), tmp_path / "data")
    assert not {text.repository for text in data.train} & {text.repository for text in data.held_out}
    assert not contents(data.train) & contents(data.held_out)
    assert {bool(text.description) for text in data.held_out} == {True, False}
    shared = data.report["shared_with_held_out"]
    assert shared > 0
    assert len(data.train) + len(data.held_out) + shared == 80
    assert data.report["sources"]["parallel"]["skipped"] == {"unsupported language rust": 20}
    assert data.report["held_out_repositories"] == sorted({text.repository for text in data.held_out})
    # Few held-out rows are said, with what holds out more.
    for number, (triplets, share, said) in enumerate([(500, 0.1, True), (60, 0.2, False), (700, 0.1, False)]):
        prepare(write_rows(tmp_path, triplets), tmp_path / f"{number}", eval_fraction=share, progress=True)
        assert ("eval_fraction=0.2 and another --out hold out more" in capsys.readouterr().out) is said


@pytest.mark.parametrize(
    ("query", "copied", "warned"),
    [("Adds the number {i}, then returns.", 30, True), ("Adds the number {i}.", 10, False), ("adds_{i}", 40, False)],
)
def test_descriptions_that_stand_in_their_code_give_a_warning(tmp_path, capsys, query, copied, warned):
    rows = [
        {"query": query.format(i=i), "code": f"def adds_{i}(x):\n" + note * (i < copied) + "    ..."}
        for i, note in enumerate(f"    # Adds the  number\n    # {i}, then returns\n" for i in range(40))
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = resolve_pairs({"pairs": str(tmp_path / "pairs.jsonl")})
    splits.prepare_retrieval_data(pairs, tmp_path / "out", eval_fraction=0.2, seed=1)
    assert ("held-out descriptions occur word for word in their code" in capsys.readouterr().out) is warned


def test_a_repository_that_one_source_holds_out_is_not_trained_on_from_another(tmp_path):
    settings = write_rows(tmp_path)
    rewrite(tmp_path / "exercises.jsonl", lambda i, _: {"slug": f"repository{i % 12}"})
    data = prepare(settings, tmp_path / "data", eval_fraction=0.2)
    assert not {text.repository for text in data.train} & set(data.report["held_out_repositories"])
    assert {bool(text.description) for text in data.train} == {bool(text.description) for text in data.held_out}
    # Rows of unknown repository are held out one by one.
    rewrite(tmp_path / "triplets.jsonl", lambda *_: {"repository_name": ""})
    data = prepare({"triplets": settings["triplets"]}, tmp_path / "unknown")
    assert data.report["held_out"] == len(data.held_out) == 6
    assert data.report["held_out_repositories"] == []


def test_rows_whose_hard_negative_is_held_out_are_not_trained_on_and_the_others_keep_theirs(tmp_path):
    path = write_rows(tmp_path)["triplets"]
    # The hard negative of each row is the code of another one.
    worse = "def f{0}(x):\n    return x + {0}".format
    rewrite(tmp_path / "triplets.jsonl", lambda i, _: {"worse": worse((i + 7) % 60)})
    data = prepare({"triplets": {"source": path, "columns": {"negative": "worse"}}}, tmp_path / "data")
    held_out = {code_key(text.snippets[0].code) for text in data.held_out}
    negatives = {code_key(text.negative.code) for text in data.train}
    assert negatives
    assert held_out
    assert not negatives & held_out
    plain = prepare({"triplets": path}, tmp_path / "plain")
    assert len(data.train) < len(plain.train)
    assert {text.negative for text in plain.train} == {None}


@pytest.mark.parametrize("content", ["{}", "[]", '{"settings": []}', ""])
def test_a_damaged_report_of_stored_rows_is_named(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with raises("data.split.damaged", tmp_path / "report.json"):
        prepare({"triplets": "missing.jsonl"}, tmp_path)


def test_a_second_call_reads_what_the_first_one_wrote_and_refuses_other_settings(tmp_path):
    settings = write_rows(tmp_path)
    first = prepare(settings, tmp_path / "data")
    (tmp_path / "triplets.jsonl").unlink()
    again = prepare(settings, tmp_path / "data")
    assert (again.train, again.held_out, again.report) == (first.train, first.held_out, first.report)
    assert "ü" in "".join(text.description for text in again.train)
    for change in ({"seed": 1}, {"max_train_samples": 3}, {"eval_fraction": 0.2}):
        with raises("data.split.other_settings", *change):
            prepare(settings, tmp_path / "data", **change)


def test_samples_are_drawn_by_seed_in_the_order_of_the_sources(tmp_path):
    settings = write_rows(tmp_path)
    all_rows = prepare(settings, tmp_path / "all").train
    drawn = [prepare(settings, tmp_path / f"some{i}", max_train_samples=20) for i in range(2)]
    some = [data.train for data in drawn]
    counts = ("train", "held_out", "shared_with_held_out", "not_drawn")
    assert sum(drawn[0].report[name] for name in counts) == 80
    assert drawn[0].report["not_drawn"] > 0
    assert some[0] == some[1] == [text for text in all_rows if text in some[0]]
    assert len(some[0]) == 20
    with raises("data.split.max_train_samples", 1000):
        prepare(settings, tmp_path / "many", max_train_samples=1000)
    rewrite(tmp_path / "triplets.jsonl", lambda *_: {"func2": "int same() { return 1; }"})
    with raises("data.split.nothing_to_train"):
        prepare({"triplets": settings["triplets"]}, tmp_path / "many")
    assert not (tmp_path / "many").exists()  # nothing is written


def triplet(number, description=None, code=None, other=None):
    return RetrievalExample(
        f"Does {number}." if description is None else description,
        (Snippet("python", code or f"def f{number}(): ..."), Snippet("go", other or f"func f{number}() {{}}")),
    )


def described(number):
    return RetrievalExample(f"Says {number}.", (Snippet("ruby", f"def g{number}; end"),))


def exercise(number):
    return RetrievalExample("", tuple(Snippet(name, f"{name} {number}") for name in ("c", "java", "php")))


def plan_of(texts, batch_size, seed=0):
    return BatchPlan(PairGroups(texts), batch_size, seed)


def texts_of_batch(texts, plan, step):
    """The texts of a batch and how often each occurs."""
    found = Counter()
    for row, *_ in plan.batch(step):
        found.update({description_key(texts[row].description)} - {""})
        found.update({code_key(snippet.code) for snippet in texts[row].snippets})
    return found


def test_rows_that_share_a_text_with_a_third_one_are_one_group():
    texts = [
        triplet(0, other="func same() {}"),
        triplet(1),
        triplet(2, description="DOES 3", other="func  same()\t{}"),
        triplet(3),
        exercise(4),
        exercise(5),  # an empty description is nobody's
    ]
    assert splits.same_content_groups(texts).tolist() == [0, 1, 0, 0, 2, 3]


def test_both_kinds_are_equally_present_and_no_text_is_twice_in_a_batch(monkeypatch):
    texts = [triplet(i, description=f"Does {i % 20}.") for i in range(40)]
    texts += [triplet(i + 100, code=f"def f{i % 7}(): ...") for i in range(20)]
    size = PairGroups(texts).largest_batch
    assert size > 10
    plan = plan_of(texts, size, seed=1)
    for step in range(40):
        assert [draw.kind for draw in plan.batch(step)] == [TEXT_TO_CODE, CODE_TO_CODE] * (size // 2)
        assert set(texts_of_batch(texts, plan, step).values()) == {1}
    # Chance alone would bring equal texts together.
    monkeypatch.setattr(BatchPlan, "_replace_taken", lambda self, places, *_: places)
    careless = plan_of(texts, size, seed=1)
    assert any(max(texts_of_batch(texts, careless, step).values()) > 1 for step in range(40))


def test_an_epoch_takes_each_group_once_epochs_differ_and_every_row_of_a_large_group_has_its_turn():
    plan = plan_of([described(i) for i in range(12)], 4, seed=0)
    epochs = [[draw.row for step in range(3) for draw in plan.batch(3 * epoch + step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    texts = [triplet(i, description=f"Does {i % 8}.") for i in range(24)]
    plan = plan_of(texts, 4, seed=0)
    seen = {(row, kind) for step in range(3 * 4) for row, kind, _ in plan.batch(step)}
    assert PairGroups(texts).counts == {TEXT_TO_CODE: 8, CODE_TO_CODE: 8}
    assert sum(kind == TEXT_TO_CODE for _, kind in seen) == 24
    assert sum(kind == CODE_TO_CODE for _, kind in seen) > 16


def with_negatives(texts, step):
    """Each row has the code of another one as its negative."""
    return [replace(text, negative=texts[(row + step) % len(texts)].snippets[0]) for row, text in enumerate(texts)]


def test_no_hard_negative_says_what_a_row_of_the_batch_says(monkeypatch):
    texts = with_negatives([triplet(i) for i in range(20)], step=3)
    plan = plan_of(texts, 8, seed=2)

    def collisions(plan, step):
        said = texts_of_batch(texts, plan, step)
        return [one for one in plan.batch(step) if code_key(texts[one.negative].negative.code) in said]

    for step in range(40):
        assert not collisions(plan, step)
        assert any(draw.negative == draw.row for draw in plan.batch(step))
    assert plan.batch(5) == plan_of(texts, 8, seed=2).batch(5)
    # Chance alone would bring them together.
    monkeypatch.setattr(
        BatchPlan, "_with_negatives", lambda _, draws, *__: [one._replace(negative=one.row) for one in draws]
    )
    assert any(collisions(plan, step) for step in range(40))


def test_a_batch_leaves_a_negative_outside():
    pool = [triplet(i) for i in range(6)]
    few = with_negatives([described(i) for i in range(10)], step=1)
    few = [replace(text, negative=few[row % 3].snippets[0]) for row, text in enumerate(few)]
    assert PairGroups(few).largest_batch == 2
    with raises("data.batch_size", 10, 3):
        plan_of(few, 4)
    with raises("data.batch_size", "At least 2", "1 group of"):
        plan_of([described(0)], 40)
    assert PairGroups([replace(text, negative=pool[0].snippets[0]) for text in few]).largest_batch == 10
    assert PairGroups([*few, described(20)]).negatives is None
    assert {draw.negative for draw in plan_of([*few, described(20)], 4).batch(0)} == {None}


def test_a_batch_is_a_function_of_seed_and_step_alone():
    texts = [triplet(i) for i in range(30)] + [exercise(i) for i in range(10)]
    forwards, backwards = ([plan_of(texts, 8, seed=5)] * 20, [plan_of(texts, 8, seed=5) for _ in range(20)])
    batches = [plan.batch(step) for step, plan in enumerate(forwards)]
    assert batches == [plan.batch(step) for step, plan in enumerate(backwards)]
    assert batches != [plan_of(texts, 8, seed=6).batch(step) for step in range(20)]
    assert len({tuple(batch) for batch in batches}) == 20
    # One kind alone fills the batch, and sources mix.
    exercises = plan_of([exercise(i) for i in range(6)], 5).batch(0)
    assert [draw.kind for draw in exercises] == [CODE_TO_CODE] * 5
    mixed = [described(i) for i in range(6)] + [exercise(i) for i in range(3)]
    assert [draw.row < 6 for draw in plan_of(mixed, 6, seed=0).batch(1)] == [True, False] * 3


@pytest.mark.parametrize(
    ("texts", "batch_size", "largest"),
    [
        ([triplet(i) for i in range(10)], 12, 10),
        ([triplet(i) for i in range(10)], 5, 10),  # odd
        ([triplet(i, description="Same.") for i in range(10)], 2, 0),
        ([described(i) for i in range(10)], 11, 10),
        ([described(i) for i in range(10)] + [exercise(i) for i in range(3)], 8, 6),
        ([], 2, 0),
    ],
)
def test_batches_that_cannot_be_filled_are_refused(texts, batch_size, largest):
    with raises("data.batch_size", f"from 2 to {largest} pairs" if largest else "At least 2"):
        plan_of(texts, batch_size, seed=0)
