import os
from importlib import metadata

import pytest

from modular_star_encoder.data.functions import open_corpus
from modular_star_encoder.data.languages.registry import SEARCH_LANGUAGES
from modular_star_encoder.data.sources import FileFilters
from modular_star_encoder.data.sources.repositories import STANDARD_LIBRARY, folder_repositories, installed_repositories
from tests.errors import raises
from tests.tiny import write_files


def names(reader):
    return [(file.repository, file.path) for file in reader]


def install(root, name, files):
    """Lay out an installed distribution: its files, and a RECORD that lists them."""
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    about = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"}
    about |= {f"{info}/RECORD": "".join(f"{path},,\n" for path in [*files, "../../bin/tool.py"])}
    write_files(root, files | about)


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """Only the distributions of this folder are installed, and the standard library is two files."""
    site, stdlib = tmp_path / "site", tmp_path / "stdlib"
    install(site, "Zeta.Tools", {"zeta/core.py": "x = 1\n", "zeta/_vendor/six.py": "y = 1\n", "zeta/data.txt": "no"})
    install(site, "alpha", {"alpha.py": "a = 1\n", "alpha_tests/t.py": "b = 1\n", "pkg/test_it.py": "c = 1\n"})
    install(site, "modular-star-encoder", {"own.py": "o = 1\n"})
    write_files(stdlib, {"json.py": "j = 1\n", "test/big.py": "t = 1\n", "site-packages/other.py": "s = 1\n"})
    monkeypatch.setattr(metadata, "distributions", lambda: metadata.Distribution.discover(path=[str(site)]))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(stdlib))
    return site


def test_every_installed_distribution_and_the_standard_library_are_repositories(site_packages):
    reader = installed_repositories()
    assert names(reader) == [("alpha", "alpha.py"), (STANDARD_LIBRARY, "json.py"), ("zeta-tools", "zeta/core.py")]
    assert reader.repositories == ("alpha", STANDARD_LIBRARY, "zeta-tools")
    assert reader.skipped == {"vendored code": 1, "test code": 3}
    assert installed_repositories(exclude=["zeta_TOOLS", STANDARD_LIBRARY]).repositories == ("alpha",)
    assert installed_repositories(exclude="zeta-tools").repositories == ("alpha", STANDARD_LIBRARY)
    install(site_packages, "mixed", {"mixed/a.py": "x", "mixed/a.js": "x", "mixed/a.h": "x"})
    assert {file.language for file in installed_repositories()} == {"python"}
    found = names(installed_repositories(languages=("javascript", "c")))
    assert found == [("mixed", "mixed/a.h"), ("mixed", "mixed/a.js")]


@pytest.mark.parametrize("parent", ["code", "tests/.hidden/site-packages"])
def test_each_sub_folder_with_python_is_a_repository_wherever_it_is(tmp_path, parent):
    tmp_path /= parent
    write_files(tmp_path, {"b/x.py": "1", "a/z.py": "1", "a/deep/y.py": "1", "docs/readme.md": "no", "loose.py": "1"})
    expected = [(".", "loose.py"), ("a", "deep/y.py"), ("a", "z.py"), ("b", "x.py")]
    assert names(folder_repositories(tmp_path)) == expected


def test_hidden_folders_environments_and_links_are_not_entered(tmp_path):
    outside = tmp_path / "outside"
    write_files(outside, {"secret.py": "1"})
    root = tmp_path / "root"
    write_files(root, {"a/ok.py": "1", "a/.tox/x.py": "1", "a/env/pyvenv.cfg": "", "a/env/lib/x.py": "1"})
    write_files(root, {"a/node_modules/x.py": "1", "a/tests/x.py": "1", "tests/x.py": "1"})
    (root / "link").symlink_to(outside)
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "linked.py").symlink_to(outside / "secret.py")
    reader = folder_repositories(root)
    assert names(reader) == [("a", "ok.py")]
    assert reader.skipped == {"test code": 2}


def test_unsuitable_files_are_counted_by_reason_in_every_iteration(tmp_path):
    files = {"ok": b"\xef\xbb\xbfx = 1\r\n", "latin": b"# \xe9", "big": "x = 1\n" * 100, "minified": "x" * 60}
    files |= {"blank": " \n", "null": "x = '\0'", "gone": "x"}
    write_files(tmp_path, {f"a/{name}.py": content for name, content in files.items()})
    reader = folder_repositories(tmp_path, filters=FileFilters(max_bytes=300, max_line_length=50))
    (tmp_path / "a" / "gone.py").unlink()
    reasons = ("not UTF-8", "too large", "very long lines", "empty", "contains null bytes", "unreadable")
    for _ in range(2):
        (file,) = reader
        assert (file.path, file.language, file.text) == ("ok.py", "python", "x = 1\r\n")
        assert reader.skipped == dict.fromkeys(reasons, 1)


def test_suffixes_count_in_any_letter_case_and_scripts_by_their_first_line_only_for_search(tmp_path):
    expected = ["DEFS.H", "LIST.CPP", "MAIN.C", "UTIL.PY", "a.py"]
    scripts = {"run": "/usr/bin/env python3", "bats": "/bin/bash -e", "env": "/usr/bin/env -S node --x"}
    scripts |= {".rc": "/bin/sh", "perl": "/usr/bin/perl"}  # these two are not read
    write_files(tmp_path, dict.fromkeys(expected, "1") | {name: f"#!{line}\n" for name, line in scripts.items()})
    write_files(tmp_path, {"LICENSE": "words"})
    assert [file.path for file in folder_repositories(tmp_path, depth=0)] == expected
    reader = folder_repositories(tmp_path, depth=0, languages=SEARCH_LANGUAGES, obey_ignore_files=True)
    found = {file.path: file.language for file in reader if file.path not in expected}
    assert found == {"run": "python", "bats": "bash", "env": "javascript"}


def test_files_that_are_left_out_are_listed_once_for_every_iteration_also_after_an_abandoned_one(tmp_path):
    write_files(tmp_path, {"a.py": "1", "b.py": b"\xe9", "c.py": "1", "test_a.py": "1"})
    reader = folder_repositories(tmp_path, depth=0)
    abandoned = iter(reader)
    next(abandoned)
    for _ in range(2):
        assert [path for _, path in names(reader)] == ["a.py", "c.py"]
        list(abandoned)
        assert sorted(reader.skipped_files) == [("b.py", "not UTF-8"), ("test_a.py", "test code")]
        assert reader.skipped == {"not UTF-8": 1, "test code": 1}
    assert reader.guessed_files == []
    reader = folder_repositories(tmp_path, depth=0, filters=FileFilters(any_encoding=True))
    assert len(names(reader)) == 3
    assert reader.guessed_files == ["b.py"]


def test_only_the_chosen_languages_are_read_and_folders_without_them_are_refused(tmp_path):
    write_files(tmp_path, {"docs/readme.md": "x", "r/a.py": "x", "r/a.go": "x", "r/a_test.go": "x", "r/test_a.rb": "x"})
    for chosen in (["go"], "go"):
        reader = folder_repositories(tmp_path, languages=chosen)
        assert names(reader) == [("r", "a.go")]
        assert reader.skipped == {"test code": 1}
    for wrong in (["cobol"], "cobol", []):
        with raises("data.language.unknown", "python, javascript"):
            folder_repositories(tmp_path, languages=wrong)
    with raises("data.source.no_files", "Ruby", "1 left out as test code"):
        folder_repositories(tmp_path, languages=["ruby"])
    for missing in ("missing", "docs/readme.md"):
        with raises("data.source.missing", missing):
            folder_repositories(tmp_path / missing)


def test_repositories_may_be_deeper(tmp_path):
    paths = ["a/b/c/x.go", "a/b/y.go", "a/d/x.go", "a/z.go", "w.go"]
    write_files(tmp_path, dict.fromkeys(["go.mod", *paths], "1"))
    expected = [(".", "w.go"), ("a", "z.go"), ("a/b", "c/x.go"), ("a/b", "y.go"), ("a/d", "x.go")]
    assert names(folder_repositories(tmp_path, depth=2)) == expected
    assert folder_repositories(tmp_path, depth=0).repositories == (tmp_path.name,)
    (tmp_path / ".git").mkdir()
    assert folder_repositories(tmp_path).repositories == (tmp_path.name,)
    assert folder_repositories(tmp_path, depth=1).repositories == (".", "a")
    with raises("data.folder.depth", -1):
        folder_repositories(tmp_path, depth=-1)


@pytest.mark.parametrize("obey", [False, True])
def test_folders_nested_too_deeply_are_left_out_and_listed(tmp_path, obey):
    deep = tmp_path.joinpath(*["d"] * 201)
    deep.mkdir(parents=True)
    for folder in (deep, deep.parent):
        (folder / "a.py").write_text("x = 1\n")
    reader = folder_repositories(tmp_path, depth=0, obey_ignore_files=obey)
    assert [file.path for file in reader] == ["d/" * 200 + "a.py"]
    assert reader.skipped_files == [("d/" * 200 + "d", "folder nested too deeply")]


@pytest.mark.parametrize("snippets", ["files", "functions"])
def test_names_outside_unicode_are_escaped_in_a_corpus_of_a_recipe(tmp_path, snippets):
    folder = os.fsencode(tmp_path) + b"/r\xffepository"
    os.mkdir(folder)
    with open(folder + b"/caf\xe9.py", "w") as file:
        file.write("def size(value):\n    return value.size\n")
    (raw,) = names(folder_repositories(tmp_path))
    assert raw == ("r\udcffepository", "caf\udce9.py")
    reader = open_corpus({"folder": str(tmp_path), "snippets": snippets})
    ((repository, path),) = names(reader)
    assert (repository, path.partition("#")[0]) == (r"r\udcffepository", r"caf\udce9.py")


def test_a_corpus_that_cannot_be_opened_is_refused():
    with raises("data.corpus.source", "False"):
        open_corpus({"installed": False})
    with raises("data.corpus.snippets", "classes"):
        open_corpus({"installed": True, "snippets": "classes"})
