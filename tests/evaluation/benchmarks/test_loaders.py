import re

import numpy as np
import pytest

from modular_star_encoder.evaluation.benchmarks import BENCHMARKS, choose_benchmarks, load_benchmark
from modular_star_encoder.evaluation.benchmarks import codesearchnet as codesearchnet_999
from modular_star_encoder.evaluation.benchmarks.codesearchnet import query_of, strip_docstring
from modular_star_encoder.evaluation.benchmarks.codexglue import mask_names
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.run import evaluate_tasks
from tests.errors import raises
from tests.evaluation.benchmarks import published
from tests.evaluation.benchmarks.published import NAMES, WRITERS

URLS = [published.url_of(name) for name in NAMES]


def load(name, folder, **options):
    WRITERS[name](folder)
    return {task.name: task for task in load_benchmark(name, folder, **{"allow_subset": True} | options)}


def answers(task):
    """{query: its relevant documents} by their texts."""
    found = {text.text: [] for text in task.queries}
    for query, document in zip(task.judgements.query, task.judgements.document, strict=True):
        found[task.queries[query].text].append(task.documents[document].text)
    return found


def test_every_benchmark_has_a_tiny_form_here_and_runs(tmp_path):
    assert set(WRITERS) == set(BENCHMARKS)
    for name in BENCHMARKS:
        tasks = list(load(name, tmp_path / name).values())
        cells = evaluate_tasks(tasks, [BM25()], progress=False)
        assert {cell.benchmark for cell in cells} == {name}
        assert all(0 <= cell.estimates[cell.main].value <= 1 for cell in cells)


def test_codesearchnet_is_read_from_the_hub_the_archive_and_plain_files(tmp_path):
    tasks = load("codesearchnet-999", tmp_path)
    assert list(tasks) == ["go", "python", "ruby"]
    for language, task in tasks.items():
        assert [text.text for text in task.queries] == [f"{name.title()} a file." for name in NAMES]
        assert {text.language for text in task.queries} == {None}
        assert {text.language for text in task.documents} == {language}
        assert list(task.query_ids) == URLS
        assert task.metrics[0] == "mrr"
        assert len(task.notes) == 1


def test_python_docstrings_are_stripped_unless_leaky(tmp_path):
    bare, leaky = (load(name, tmp_path) for name in ("codesearchnet-999", "codesearchnet-999-leaky"))
    assert list(leaky) == ["python"]
    assert [one.text for one in bare["python"].documents] == [f"def {n}(file):\n    return {n}er(file)" for n in NAMES]
    assert [one.text for one in leaky["python"].documents] == [published.python_code(name) for name in NAMES]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('def a():\n    "One."\n    return 1', "def a():\n    return 1"),
        ('    def a():\n        """One."""\n        return 1', "def a():\n    return 1"),
        ('def a(x="):"):\n    """One."""\n    return x)', 'def a(x="):"):\n    \n    return x)'),
        ("def a(b={'c': 1}):\n    u'''One\n    two'''\n    x = = b", "def a(b={'c': 1}):\n    \n    x = = b"),
        ("def a():\n    # first\n    '''One.'''\n    x = ='b'", "def a():\n    # first\n    \n    x = ='b'"),
        ("def a():\n    print 'b'", "def a():\n    print 'b'"),
        ('def a():\n    """Only this."""', "def a():\n    "),
    ],
)
def test_docstrings_go_from_python_2_too_and_from_what_does_not_parse(code, expected):
    assert strip_docstring(code) == expected


@pytest.mark.parametrize(
    ("documentation", "query"),
    [
        ("Reads a\nfile.", "Reads a\nfile."),
        ("Reads a\nfile.\n \nMore.", "Reads a\nfile."),
        ("Reads a\nfile. @param path", "Reads a\nfile."),
        ("Reads a\nfile.\n@see\n\nMore.", "Reads a\nfile."),
        ("\n\nReads. @see me", "Reads."),
        ("@return it\n", "@return it"),
    ],
)
def test_the_query_ends_at_the_first_blank_line_or_tag_unless_it_begins_with_one(documentation, query):
    assert query_of(documentation) == query


def test_candidates_are_those_of_the_authors_shuffle(tmp_path, monkeypatch):
    monkeypatch.setattr(codesearchnet_999, "POOL", 2)
    task = load("codesearchnet-999", tmp_path)["go"]
    assert [pool.queries.tolist() for pool in task.pools] == [[2, 3], [1, 0]]  # np.random.seed(0)


@pytest.mark.parametrize(
    ("name", "expected", "metric"),
    [
        ("codesearchnet-full", {f"{n.title()} a file .": [f"func {n} ( )"] for n in NAMES[:2]}, "mrr@1000"),
        ("advtest", {f"{n.title()} a file .": [f"def Func ( {n} )"] for n in NAMES}, "mrr"),
        ("cosqa", {f"python {n} file": [published.python_code(n)] for n in NAMES}, "mrr"),
    ],
)
def test_queries_and_documents_are_those_of_the_files(tmp_path, name, expected, metric):
    (task,) = load(name, tmp_path).values()
    assert answers(task) == expected
    assert task.metrics[0] == metric
    assert len(task.documents) == 4


def test_translation_goes_both_ways_line_by_line(tmp_path):
    tasks = load("translation", tmp_path / "a")
    assert list(tasks) == ["java → c#", "c# → java"]
    first = tasks["java → c#"]
    assert [text.language for text in (first.queries[0], first.documents[0])] == ["java", "c#"]
    assert first.documents[1].text == "public void Close(File file) { }"
    assert list(answers(tasks["c# → java"])["public void Read(File file) { }"]) == ["public void read(File file) { }"]
    masked = load("translation-masked", tmp_path / "b")["java → c#"]
    assert {text.text for text in masked.queries} == {"public void name1(name2 name3) { }"}


def test_poj_asks_for_the_other_solutions_of_a_problem(tmp_path):
    task = load("poj104", tmp_path)["test"]
    size = len(task.queries) // len({text.text[:25] for text in task.queries})
    assert task.exclude_self
    assert task.metrics[0] == "map@r"
    assert np.bincount(task.judgements.query).tolist() == [size - 1] * len(task.queries)
    assert not np.any(task.judgements.query == task.judgements.document)
    for query, document in zip(task.judgements.query, task.judgements.document, strict=True):
        assert task.queries[query].text[:25] == task.documents[document].text[:25]
    assert "é" in task.queries[0].text


def test_bigclonebench_takes_the_last_label_of_a_pair(tmp_path):
    task = load("bigclonebench", tmp_path)["test"]
    assert task.pairs.tolist() == [[1, 2], [2, 3], [3, 0]]
    assert task.labels.tolist() == [1, 0, 1]
    assert task.valid_pairs.tolist() == [[0, 1], [0, 2]]
    assert "threshold chosen on the validation pairs" in task.notes


def test_exercises_pair_what_both_languages_have(tmp_path):
    text, code, masked = (load(f"exercism-{kind}", tmp_path / kind) for kind in ("text", "code", "code-masked"))
    assert list(text) == ["text → csharp", "text → go", "text → python"]
    assert text["text → go"].query_ids == ["open", "close", "write"]
    assert len(code) == 6
    assert code["csharp → go"].queries[0] == ("class Open { }", "c#")
    assert code["csharp → go"].column == "→ go"
    assert {text.text for text in masked["csharp → go"].queries} == {"class name1 { }"}


def test_all_means_the_benchmarks_whose_folders_exist(tmp_path, monkeypatch):
    published.codesearchnet(tmp_path / "codesearchnet")
    published.exercism(tmp_path / "exercism")
    chosen = choose_benchmarks(["all"], tmp_path)
    exercises = [f"exercism-{kind}" for kind in ("text", "text-masked", "code", "code-masked")]
    assert chosen == ["codesearchnet-999", *exercises]
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert choose_benchmarks(["all"], f"~/{tmp_path.name}") == chosen
    assert [len(load_benchmark(name, tmp_path, allow_subset=True)) for name in chosen] == [3, 3, 3, 6, 6]
    for data in (tmp_path / "exercism", "hub"):
        with raises("benchmark.all.none", data, "one or more of advtest"):
            choose_benchmarks(["all"], data)
    with raises("benchmark.unknown", "'humaneval'", "Available: codesearchnet-999"):
        choose_benchmarks(["humaneval"], tmp_path)
    with raises("benchmark.missing", "Available: codesearchnet-999"):
        choose_benchmarks([], tmp_path)


def test_a_benchmark_on_the_hub_is_fetched_by_its_name(tmp_path, monkeypatch):
    published.codesearchnet(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    for data in ("hub", "hub:me/mine"):
        assert len(load_benchmark("codesearchnet-999", data, allow_subset=True)) == 3
    assert asked == [BENCHMARKS["codesearchnet-999"].hub, "me/mine"]
    with raises("benchmark.not_on_hub", "poj104"):
        load_benchmark("poj104", "hub")


SNIPPETS = {
    "python": (
        "import heapq\n\n# largest first\ndef pick_largest(items, *, limit):\n    '''Pick them.'''\n"
        "    if limit is None: return len(items)\n"
        "    return [heapq.nlargest(limit, items) for item in items if not item]\n",
        "import def if is None return for in not len",
    ),
    "java": (
        "/** Picks. */\npublic class Picker {\n  private final int limit;\n  int pickLargest(List<String> items) {"
        " return this.limit == 0 ? null : items.size(); }\n}\n",
        "public class private final int return this null",
    ),
    "php": (
        "<?php\nclass Picker {\n  public function pickLargest($items) { foreach ($items as $item) {"
        " return $this->limit; } }\n}\n",
        "class public function foreach as return this",
    ),
    "ruby": (
        "class Picker\n  attr_reader :limit\n  def pick_largest(items)\n"
        "    return nil unless items.any? && @limit\n  end\nend\n",
        "class def return nil unless end",
    ),
    "c": (
        '#include <stdio.h>\n#include "picker.h"\n#define LIMIT 3\n'
        "static int pick_largest(char *items) { while (1) return LIMIT; }\n",
        "include stdio define static int char while return",
    ),
}


@pytest.mark.parametrize("language", SNIPPETS)
def test_names_go_whatever_they_are_and_keywords_stay(language):
    code, keywords = SNIPPETS[language]
    masked = mask_names(code, language)
    words = re.findall(r"\w+", masked)
    assert not re.search(r"pick|largest|item|limit", masked, re.IGNORECASE)
    assert set(keywords.split()) <= set(words)
    assert "name1" in words
    renamed = re.sub(r"\bitems\b", "zebras", code)
    assert renamed != code
    assert mask_names(renamed, language) == masked


def test_comments_go_strings_stay_and_confused_names_give_other_code():
    masked = mask_names(SNIPPETS["python"][0] + 'print("items left")  # done\n', "python")
    assert "largest first" not in masked
    assert "done" not in masked
    assert '"items left"' in masked
    assert mask_names("return a - b", "python") != mask_names("return b - b", "python")
    with raises("benchmark.masking.language", "'klingon'"):
        mask_names("x", "klingon")
