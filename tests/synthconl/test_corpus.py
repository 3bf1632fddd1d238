import gzip
import io
import json
import os
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

import modular_star_encoder.cli.main as cli
from modular_star_encoder.synthconl import corpus
from modular_star_encoder.synthconl.corpus import EvaluationTexts, build_corpus, check_corpus, read_packages
from tests.errors import raises
from tests.processes import ended_by_sigkill, start_process
from tests.synthconl.samples import die_before_renaming

ROOT = Path(__file__).parent.parent.parent
LIST = "debian: |\n  go 1:2-1 X\n  bad 1 X\nnpm: |\n  @scope/js 1 X\n  gone 1 X\npypi: |\n  py 1 PSF\n  more 1 X\n"
GO = "package a\n\n// Sum adds all numbers of a list.\nfunc Sum(x int) int {\n\ty := x + 1\n\treturn y\n}\n"
BARE_GO = "\nfunc bare(x int) int {\n\tz := x * 2\n\treturn z\n}\n"
JS = "/** Joins the words of a sentence. */\nfunction join(words) {\n  const end = 1;\n  return words + end;\n}\n"
PY = 'def {0}(rows):\n    """Count the rows of a {0} table."""\n    {0} = len(rows) * {1}\n    return {0}\n\n\n'
BARE = "def bare_{0}(values):\n    largest = max(values)\n    return [value / largest / {1} for value in values]\n\n\n"
SAME = "def same_{0}(x):\n    'Do the same thing.'\n    y = x.{1}()\n    return y.{1}\n\n\n"
STEPS = "".join(f"    step_{n} = x[{n}]\n" for n in range(30)) + "    return "


def tar_of(name, text, mode):
    content, info = io.BytesIO(), tarfile.TarInfo(name)
    info.size = len(text)
    with tarfile.open(fileobj=content, mode=mode) as archive:
        archive.addfile(info, io.BytesIO(text.encode()))
    return content.getvalue()


def write_packages(folder):
    """Write the packages of `LIST`, except `gone`, to `folder / "raw"`; return the path of the list."""
    (folder / "corpus.yaml").write_text(LIST)
    deb, bad, js, _, py, more = (folder / "raw" / one.place for one in read_packages(folder / "corpus.yaml"))
    for one in (deb, bad, js, py, more):
        one.mkdir(parents=True)
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd"}
    members["data.tar.xz"] = tar_of("./usr/a.go", GO + BARE_GO, "w:xz")
    with (deb / "go.deb").open("wb") as file:
        file.write(b"!<arch>\n")
        for name, data in members.items():
            header = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
            file.write(header.encode() + data + b"\n" * (len(data) % 2))
    (bad / "one.deb").write_bytes(b"!<arch>\ndamaged")
    (js / "js.tgz").write_bytes(tar_of("package/index.js", JS, "w:gz"))
    for one, words in ((py, ("red", "green")), (more, ("red", "round"))):
        with zipfile.ZipFile(one / "one.whl", "w") as wheel:
            text = "".join(PY.format(word, len(word) * 7) + BARE.format(word, len(word)) for word in words)
            walk = f"def walk(x):\n    'Take steps of {words[1]}.'\n{STEPS}{words[1]}\n"
            wheel.writestr("one/module.py", text + walk)
            wheel.writestr("one/same.py", "".join(SAME.format(n, word * 9) for n, word in enumerate("abcde")))
    return folder / "corpus.yaml"


def build(path, out):
    return build_corpus(read_packages(path), path.parent / "raw", out, processes=0)


def build_and_die(path, out, number):
    die_before_renaming(number)
    build(path, out)


def lines_of(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_fetch_calls_each_client_once_and_reports_what_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "corpus.yaml").write_text(LIST.replace("pypi", "debian-source"))
    (tmp_path / "bin").mkdir()
    for name, missing in (("apt-get", "bad"), ("npm", "gone")):
        script = f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/log\ncase "$*" in *{missing}*) exit 1;; esac\n: >archive\n'
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    fetch = ["dataset", "corpus", "fetch", str(tmp_path / "corpus.yaml"), "--out", str(tmp_path / "raw")]
    assert cli.main(fetch) == 0
    assert (tmp_path / "log").read_text().splitlines() == [
        *(f"apt-get download --quiet {one}" for one in ("go=1:2-1", "bad=1")),
        *(f"npm pack --silent --ignore-scripts {one}" for one in ("@scope/js@1", "gone@1")),
        *(f"apt-get source --download-only --quiet {one}" for one in ("py=1", "more=1")),
    ]
    there = sorted(path.parent.name for path in (tmp_path / "raw").rglob("archive"))
    assert there == ["%40scope%2Fjs=1", "go=1%3A2-1", "more=1", "py=1"]
    assert "npm ended with status 1: npm gone 1" in capsys.readouterr().err
    (tmp_path / "bin" / "npm").unlink()
    assert cli.main(fetch) == 0
    assert (tmp_path / "log").read_text().count("\n") == 7  # only `bad` is asked for again
    assert "npm is not installed: npm gone 1" in capsys.readouterr().err


NO_PACKAGES = ["--registry=x 1 MIT", "name 1", "name --option MIT", "../x 1 MIT", "a/../x 1 MIT"]


@pytest.mark.parametrize("line", [*NO_PACKAGES, "a 1 BSD"])
def test_a_line_that_is_no_package_or_lists_one_twice_is_refused(tmp_path, line):
    (tmp_path / "corpus.yaml").write_text(f"npm: |\n  a 1 MIT\n  a 2 MIT\n  {line}\n")
    with raises("corpus.package", line):
        read_packages(tmp_path / "corpus.yaml")


def test_a_client_whose_child_keeps_its_output_open_ends_in_time(tmp_path, monkeypatch):
    path = write_packages(tmp_path)
    (tmp_path / "apt-get").write_text("#!/bin/sh\nsleep 60 &\nsleep 60\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(corpus, "_FETCH_SECONDS", 0.5)
    start = time.monotonic()
    (outcome,) = corpus.fetch_packages(read_packages(path)[:1], tmp_path / "out")
    assert (outcome, time.monotonic() - start < 20) == ("apt-get ended with status timeout", True)


def test_functions_of_every_archive_become_pairs_or_texts_once(tmp_path):
    path = write_packages(tmp_path)
    os.mkfifo(tmp_path / "raw" / "debian" / "bad=1" / "pipe.deb")  # no package, and opening it would wait for ever
    stats = build(path, tmp_path / "out")
    train, valid, texts = (lines_of(tmp_path / "out" / f"{one}.jsonl.gz") for one in ("pairs", "pairs_valid", "texts"))
    assert (tmp_path / "out" / "pairs.jsonl.gz").read_bytes()[3:8] == bytes(5)  # no name and time
    pairs = {row["name"]: row for row in train + valid}
    assert sorted(pairs) == ["Sum", "green", "join", "red", "round", "same_0", "same_1", "same_2", "walk"]
    assert pairs["red"]["package"] == "pypi:py"  # of equal functions, the first; and so of near ones
    assert pairs["Sum"]["description"] == "Sum adds all numbers of a list."
    assert '"""' not in pairs["red"]["code"]
    assert {row["package"] for row in valid}.isdisjoint(row["package"] for row in train + texts)
    assert {row["text"].split("(")[0] for row in texts} <= {"def bare_red", "def bare_green", "def bare_round"}
    assert (stats["pairs"], stats["pairs_valid"], stats["texts"]) == (len(train), len(valid), len(texts))
    dropped = [count for rule, count in stats["dropped"].items() if rule.startswith("code: ")]
    assert dropped == [0, 6, 2, 1, 0]  # too many, equal, of one description, near, of a held-out description
    assert (stats["packages_missing"], stats["extraction"]["packages without an archive"]) == (["npm:gone"], 1)
    with raises("corpus.packages", "0 of 6"):
        build_corpus(read_packages(tmp_path / "corpus.yaml"), tmp_path / "nothing", tmp_path / "out")


OTHER = {"package": "npm:other", "language": "c", "name": "f", "description": "x", "code": "y"}
COUNTS = {"counts": {}}


@pytest.mark.parametrize(
    "rows", [[{"counts": 3}], [[1]], [{"counts": {"files": "x"}}], [COUNTS, {"code": "y"}], [COUNTS, OTHER]]
)
def test_rows_of_packages_that_this_command_did_not_write_are_named(tmp_path, rows):
    path = write_packages(tmp_path)
    build(path, tmp_path / "out")
    file = next((tmp_path / "out" / "packages").rglob("*.jsonl.gz"))
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with raises("corpus.packages.file", file):
        build(path, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 7])
def test_a_killed_build_continues_and_ends_the_same(tmp_path, number):
    path = write_packages(tmp_path)
    assert ended_by_sigkill(start_process(build_and_die, path, tmp_path / "out", number))
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*=*.jsonl.gz")}
    assert len(done) == min(number - 1, 5)
    assert build(path, tmp_path / "out") == build(path, tmp_path / "whole")
    assert done == {file: file.stat().st_mtime_ns for file in done}


PROSE = "the quick brown fox jumps over the lazy dog and finds a table of rows in a file"
CODE = "\n".join(f"value_{n} = compute(value_{n - 1}, {n})" for n in range(1, 90))
CLEAN = {"package": "npm:a", "code": "let x = 1", "description": "Something else entirely."}


def write_sets(folder, row):
    """Write evaluation sets of each form, and `pairs.jsonl` with `CLEAN` and `row`; return the paths of the sets."""
    codes = {"go": CODE, "c": "int main(void) { return 42; }"}
    (folder / "exercises.jsonl").write_text(json.dumps({"code": codes, "description": f"{PROSE}\n\n{CODE}"}))
    (folder / "queries").mkdir()
    (folder / "queries" / "one.json").write_text(json.dumps([{"query": "Where are (the) LOCKS?"}]))
    documentation = "Sorts a list of numbers in place.\n\nArgs: many more words than that"
    row_of_go = {"func_documentation_string": documentation, "func_code_string": CODE[:40], "language": "go"}
    (folder / "go_test.jsonl").write_text(json.dumps(row_of_go | {"func_code_url": "url"}))
    (folder / "pairs.jsonl").write_text(f"{json.dumps(CLEAN)}\n{json.dumps(row)}\n")
    return [str(folder / name) for name in ("exercises.jsonl", "queries", "go_test.jsonl")]


CASES = {
    ("INT main(void)\n{\n  return (42)\n}", "x"): "code equal exercises",
    (CODE[:1000], "x"): "code equal exercises",  # the corpus cuts code at 1,000 characters
    (CODE.replace("value_7 ", "other "), "x"): "code near exercises",
    (CODE[:40], "x"): "code equal go_test",
    ("x", PROSE.replace("file", "folder")): "description near exercises",
    ("x", "where are the locks"): "description equal queries",
    ("x", "sorts a list of numbers in place"): "description equal go_test",
    (CODE[:400], "many more words than that"): None,
}


@pytest.mark.parametrize(("texts", "found"), CASES.items())
def test_texts_that_equal_or_resemble_an_evaluation_text_are_found_and_dropped(tmp_path, texts, found):
    row = {"package": "npm:b", "code": texts[0], "description": texts[1]}
    sets = EvaluationTexts(write_sets(tmp_path, row))
    report, hits = check_corpus([tmp_path / "pairs.jsonl"], sets, drop=tmp_path / "left")
    assert [hit.partition(" (npm:b): ")[2] for hit in hits] == ([found] if found else [])
    assert report["files"]["pairs.jsonl"]["rows_found"] == len(hits)
    assert lines_of(tmp_path / "left" / "pairs.jsonl.gz") == ([CLEAN] if found else [CLEAN, row])


def test_check_names_a_text_and_fails_and_its_counts_hold_no_text(tmp_path, capsys):
    sets = write_sets(tmp_path, {"kind": "description", "text": PROSE})
    check = ["dataset", "corpus", "check", str(tmp_path / "pairs.jsonl"), "--json", str(tmp_path / "counts.json")]
    assert cli.main([*check, "--against", *sets]) == 2
    assert "line 2 (None): description equal exercises" in capsys.readouterr().out
    counts = (tmp_path / "counts.json").read_text()
    assert json.loads(counts)["files"]["pairs.jsonl"]["description equal exercises"] == 1
    assert PROSE not in counts
    assert cli.main([*check, "--against", *sets[1:]]) == 0
    for row in ('{"code": 7}', '{"text": "x", "kind": ["code"]}'):
        (tmp_path / "pairs.jsonl").write_text(row)
        with raises("corpus.row", "line 1"):
            check_corpus([tmp_path / "pairs.jsonl"], EvaluationTexts(sets))


def test_check_prints_no_control_characters_of_rows_and_names(tmp_path, capsys):
    sets = write_sets(tmp_path, {"package": "\x1b[2J", "kind": "description", "text": PROSE})
    file = (tmp_path / "pairs.jsonl").rename(tmp_path / "\x1b[31m.jsonl")
    assert cli.main(["dataset", "corpus", "check", str(file), "--against", *sets]) == 2
    out = capsys.readouterr().out
    assert ("\x1b" in out, "(�[2J)" in out, "\n�[31m.jsonl: 1 of 2" in out) == (False, True, True)


def test_check_reports_files_of_one_name_and_refuses_copies_that_would_replace_a_file(tmp_path):
    sets = EvaluationTexts(write_sets(tmp_path, CLEAN))
    (tmp_path / "b").mkdir()
    plain, other, packed = tmp_path / "pairs.jsonl", tmp_path / "b" / "pairs.jsonl", tmp_path / "b" / "pairs.jsonl.gz"
    other.write_text(json.dumps(CLEAN))
    packed.write_bytes(gzip.compress(b""))
    assert set(check_corpus([plain, other], sets)[0]["files"]) == {str(plain), str(other)}
    for files, drop in (([plain, other], "left"), ([plain, packed], "left"), ([packed], "b"), ([other, packed], "b")):
        with raises("corpus.drop"):
            check_corpus(files, sets, tmp_path / drop)
    assert not lines_of(packed)


def test_the_shipped_models_corpus_is_listed_with_licences_and_holds_no_evaluation_code():
    path = ROOT / "hub_configs" / "mose-code" / "corpus.yaml"
    assert len({one.place for one in read_packages(path)}) == 6631
    assert path.stat().st_size < 700_000
    assert "://" not in path.read_text(encoding="utf-8")
    report = json.loads((ROOT / "benchmarks" / "results" / "mose-code-decontamination.json").read_text())
    # Thirteen descriptions in 714,903 pairs, such as "Rename a file.": the pairs were checked against whole first
    # paragraphs before training, and benchmarks cut these at the first tag.
    assert [one["rows_found"] for one in report["files"].values()] == [13, 0, 0]
    assert not any(key.startswith("code") for one in report["files"].values() for key in one)
