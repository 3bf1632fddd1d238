"""What search reads is what git lists: every test asks git itself."""

import os
import random
import re
import subprocess
import time

import pytest

from modular_star_encoder.data.sources import ignore_files
from modular_star_encoder.data.sources.ignore_files import glob_expression
from modular_star_encoder.data.sources.repositories import folder_repositories
from tests.errors import raises
from tests.tiny import write_files

IGNORES = {
    ".gitignore": "build/\n*.gen.py\n!keep.gen.py\n/top.py\nlogs/**/x.py\n# comment\n\\#odd.py\nspace\\ d.py\n",
    "src/.gitignore": "!important.gen.py\nlocal.py\n/deep/*\n!/deep/kept.py\n",
    ".git/info/exclude": "excluded.py\n",
}
FILES = ["top.py", "a.gen.py", "keep.gen.py", "build.py", "build/a.py", "src/build/b.py", "src/top.py", "local.py"]
FILES += ["src/important.gen.py", "src/local.py", "src/deep/a.py", "src/deep/kept.py", "src/deep/er/b.py"]
FILES += ["logs/a/b/x.py", "logs/x.py", "excluded.py", "src/excluded.py", "#odd.py", "space d.py", "src/plain.py"]


def git(folder, *words):
    command = ["git", "-c", "core.excludesFile=", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout


def make(folder, files, *options):
    """Write a repository of these Python files."""
    folder.mkdir()
    git(folder, "init", "-q", *options)
    write_files(folder, dict.fromkeys(files, "x = 1\n"))
    return folder


@pytest.fixture(autouse=True)
def own_ignore_file(tmp_path, monkeypatch):
    """The ignore file of the user, which is empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    write_files(tmp_path, {"config/git/ignore": ""})
    return tmp_path / "config" / "git" / "ignore"


@pytest.fixture
def repository(tmp_path):
    write_files(make(tmp_path / "repository", FILES), IGNORES)
    return tmp_path / "repository"


def read(folder):
    options = {"languages": ["python"], "obey_ignore_files": True, "may_be_empty": True}
    return sorted(file.path for file in folder_repositories(folder, depth=0, **options))


def listed(folder):
    names = git(folder, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split(b"\0")
    return sorted(name for name in map(os.fsdecode, names) if name.endswith(".py"))


@pytest.mark.parametrize("below", [".", "src", "src/deep"])
def test_the_files_are_those_that_git_lists(repository, below):
    assert listed(repository / below)
    assert read(repository / below) == listed(repository / below)


RULES = {
    "negation": (b"*.py\n!a.py\n", "a.py b.py d/a.py d/b.py"),
    "nothing in an ignored folder comes back": (b"d/\n!d/a.py\n", "d/a.py e/d/b.py c.py"),
    "its files come back if they are ignored alone": (b"d/*\n!d/a.py\n", "d/a.py d/b.py"),
    "folders only": (b"a.py/\nd/\n", "a.py d/b.py e/d/c.py e/a.py"),
    "a name at any depth": (b"a.py\n", "a.py d/a.py d/e/a.py b.py"),
    "anchored by a slash before": (b"/a.py\n", "a.py d/a.py"),
    "anchored by a slash inside": (b"d/a.py\n", "d/a.py e/d/a.py"),
    "stars": (b"a*c.py\nd*/x.py\n", "ac.py abc.py dd/x.py dd/e/x.py e/dd/x.py"),
    "two stars before": (b"**/d/a.py\n", "d/a.py e/d/a.py e/f/d/a.py d/b.py"),
    "two stars inside": (b"d/**/a.py\n", "d/a.py d/e/a.py d/e/f/a.py e/a.py"),
    "two stars after": (b"d/**\n", "d/a.py d/e/a.py a.py"),
    "two stars in a name": (b"d**/a.py\na**b.py\n", "d/a.py dd/a.py d/e/a.py axb.py"),
    "question mark": (b"?.py\n", "a.py ab.py \u00e9.py"),
    "sets": (b"[a-c].py\n[!x]y.py\n[^x]z.py\n", "a.py d.py xy.py ay.py xz.py az.py"),
    "signs in sets": (b"[]-]s.py\n[b-/]q.py\n", "]s.py -s.py bq.py"),
    "classes": (b"[[:digit:]_].py\n[[:upper:]]*x.py\n[[:nope:]].py\n", "1.py _.py a.py Abx.py abx.py n.py"),
    "sets without an end, and reversed ranges": (b"[a.py\n[z-a]b.py\n[a-[]c.py\n", "a.py [a.py zb.py bb.py ac.py"),
    "escapes": (b"\\#a.py\n\\!b.py\n\\*.py\nd\\", "#a.py !b.py *.py c.py"),
    "comments": (b"#a.py\n #b.py\n", "#a.py a.py"),
    "blanks at the end": (b"a.py  \nb.py\\ \nc.py\t\n  \n", "a.py b.py c.py"),
    "line ends of Windows, a mark, no end": (b"\xef\xbb\xbfa.py\r\nb.py\rc\r\nd.py", "a.py b.py d.py"),
    "form feeds and separators end no line": (b"a.py\x0cb.py\nc.py\xe2\x80\xa8\n", "a.py b.py c.py"),
    "the last rule decides": (b"a.py\n!a.py\nb.py\n!b.py\nb.py\n", "a.py b.py"),
    "a slash alone": (b"/\n//\n!\n", "a.py d/b.py"),
    "spaces inside": (b"a b.py\n", "a.py b.py"),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_read_as_git_reads_it(tmp_path, rule):
    content, paths = RULES[rule]
    folder = make(tmp_path / "repository", paths.split())
    (folder / ".gitignore").write_bytes(content)
    assert read(folder) == listed(folder)


def test_the_ignore_file_of_the_user_counts_least(repository, own_ignore_file):
    before = read(repository)
    own_ignore_file.write_text("plain.py\nkeep.gen.py\n")
    assert read(repository) == [path for path in before if path != "src/plain.py"]
    assert "keep.gen.py" in before


@pytest.mark.parametrize("hashes", ["sha1", "sha256"])
def test_tracked_files_are_read_even_where_a_pattern_matches(tmp_path, hashes):
    files = ["build/kept.py", "build/deep/kept.py", "build/new.py", "gen.py", "a.py", "long" * 30 + ".py"]
    folder = make(tmp_path / "repository", files, f"--object-format={hashes}")
    git(folder, "add", "-f", "build/kept.py", "build/deep/kept.py", "gen.py", files[-1])
    (folder / ".gitignore").write_text("build/\ngen.py\nlong*\n")
    for version in ("2", "3", "4"):
        git(folder, "update-index", "--index-version", version)
        if version == "3":  # an entry with more flags
            (folder / "intended.py").write_text("x = 1\n")
            git(folder, "add", "-f", "-N", "intended.py")
        assert {"build/kept.py", "build/deep/kept.py", "gen.py"} < set(listed(folder))
        assert read(folder) == listed(folder)
    (folder / ".moseignore").write_text("gen.py\n")
    assert "gen.py" not in read(folder)
    index = folder / ".git" / "index"
    for damaged in (b"", b"DIRC", index.read_bytes()[:200]):
        index.write_bytes(damaged)
        assert "a.py" in read(folder)


@pytest.mark.parametrize(
    ("name", "limit"), [("MAX_INDEX_BYTES", 200), ("MAX_INDEX_BYTES", 1000), ("_LONGEST_PATH", 100)]
)
def test_a_git_index_of_very_many_or_very_long_paths_is_not_used(tmp_path, monkeypatch, name, limit):
    folder = make(tmp_path / "repository", ["build/" + "long/" * 20 + "a.py", "b.py"])
    git(folder, "add", ".")
    (folder / ".gitignore").write_text("build/\n")
    assert len(read(folder)) == 2
    monkeypatch.setattr(ignore_files, name, limit)
    assert read(folder) == ["b.py"]


@pytest.mark.parametrize("name", [".gitignore", ".moseignore", ".git", "g/commondir", "g/index", "g/info/exclude"])
@pytest.mark.parametrize("device", [None, "/dev/zero"])
def test_pipes_and_devices_among_the_files_of_git_are_not_read(tmp_path, name, device):
    (tmp_path / "g" / "info").mkdir(parents=True)
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("b.py\n")
    (tmp_path / ".git").write_text("gitdir: g\n")
    (tmp_path / name).unlink(missing_ok=True)
    os.symlink(device, tmp_path / name) if device else os.mkfifo(tmp_path / name)
    assert read(tmp_path) == ["a.py"]


@pytest.mark.parametrize("limit", ["MOST_LINES", "MOST_WORK", "_MAX_BYTES"])
def test_an_ignore_file_with_too_many_patterns_is_named(repository, monkeypatch, limit):
    monkeypatch.setattr(ignore_files, limit, 2)
    named = {"MOST_LINES": ".gitignore", "MOST_WORK": repository, "_MAX_BYTES": repository / ".git/info/exclude"}
    with raises("data.ignore.too_large", named[limit]):
        read(repository)


def test_the_patterns_of_repositories_inside_count_too(tmp_path, monkeypatch):
    monkeypatch.setattr(ignore_files, "MOST_WORK", 200)  # three patterns of one letter cost 153
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("a\nb\nc\n")
    (tmp_path / "inner" / ".git").mkdir(parents=True)
    rules = ignore_files.IgnoreFiles(tmp_path)
    (tmp_path / "inner" / ".gitignore").write_text("d\n")
    with raises("data.ignore.too_large", tmp_path / "inner"):
        rules.ignores(str(tmp_path / "inner" / "x.py"), is_folder=False)


def test_a_repository_inside_and_a_second_work_tree_have_rules_of_their_own(repository):
    inner = make(repository / "inner", ["local.py", "a.gen.py", "b.py"])
    (inner / ".git/info/exclude").write_text("b.py\n")
    assert [path for path in read(repository) if path.startswith("inner/")] == ["inner/a.gen.py", "inner/local.py"]
    git(repository, "add", "src", ".gitignore")
    git(repository, "commit", "-qm", "a")
    second = repository.parent / "second"
    git(repository, "worktree", "add", "-q", second)
    write_files(second, {"excluded.py": "x = 1\n", "new.py": "x = 1\n"})
    assert read(second) == listed(second)
    assert "excluded.py" not in read(second)


PARTS = ["a", "b", "*", "?", "**", "[ab]", "[!a]", "[^b]", "[a-c]", "\\a", "\\*", "#a", "!b", " ", "\\ ", "[[:alpha:]]"]
PARTS += ["[", "]", "[]a]", "a*", "*.py", ".py", "\\", "é", "**a", "\t", "[b-", "{a,b}", "[a-", "/", "/", "\r"]
NAMES = ["a", "b", "ab", "aa", "#a", "!b", " ", "a ", "é", "a[b", "*", "]", "{a,b}", "\\"]


@pytest.mark.parametrize("seed", range(12))
def test_random_patterns_are_read_as_git_reads_them(tmp_path, seed):
    draw = random.Random(seed)
    folders = [""]
    for _ in range(5):
        folders.append(draw.choice(folders) + draw.choice(NAMES) + "/")
    folder = make(tmp_path / "repository", [f"{one}{name}.py" for one in folders for name in draw.sample(NAMES, 5)])
    tracked = [path for path in listed(folder) if draw.random() < 0.1]
    if tracked:
        git(folder, "--literal-pathspecs", "add", "--", *tracked)
    for one in draw.sample(folders, 3):
        lines = (draw.choice(["", "", "!"]) + "".join(draw.choices(PARTS, k=draw.randint(1, 5))) for _ in range(4))
        (folder / one / ".gitignore").write_text("\n".join(lines), newline="")
    assert read(folder) == listed(folder)


def test_our_own_ignore_file_counts_too_git_is_not_needed_and_training_reads_what_is_ignored(tmp_path):
    write_files(tmp_path, dict.fromkeys(("a.py", "b.py", "sub/c.py"), "x = 1\n") | {".moseignore": "b.py\nsub/\n"})
    assert read(tmp_path) == ["a.py"]
    assert len(list(folder_repositories(tmp_path, depth=0, languages=["python"]))) == 3


@pytest.mark.parametrize(
    ("glob", "path"),
    [
        (b"**/" * 20 + b"b", b"a/" * 120),
        (b"**/a*/" * 12 + b"b", b"aa/" * 200),
        (b"*a" * 30 + b"*b", b"a" * 240),
        (b"[" + b"[:" * 9000 + b"a" * 200_000 + b"]b", b"a"),
    ],
)
def test_a_hostile_pattern_takes_linear_time(glob, path):
    start = time.process_time()
    assert re.fullmatch(glob_expression(glob), path + b"c") is None
    assert re.fullmatch(glob_expression(glob), path + b"b") is not None
    assert time.process_time() - start < 10
