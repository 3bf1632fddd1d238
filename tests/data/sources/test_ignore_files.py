import subprocess

import pytest

from modular_star_encoder.data.sources.repositories import folder_repositories

IGNORES = {
    ".gitignore": "build/\n*.gen.py\n!keep.gen.py\n/top.py\nlogs/**/x.py\n# comment\n\\#odd.py\nspace\\ d.py\n",
    "src/.gitignore": "!important.gen.py\nlocal.py\n/deep/*\n!/deep/kept.py\n",
    ".git/info/exclude": "excluded.py\n",
}
FILES = ["top.py", "a.gen.py", "keep.gen.py", "build.py", "build/a.py", "src/build/b.py", "src/top.py", "local.py"]
FILES += ["src/important.gen.py", "src/local.py", "src/deep/a.py", "src/deep/kept.py", "src/deep/er/b.py"]
FILES += ["logs/a/b/x.py", "logs/x.py", "excluded.py", "src/excluded.py", "#odd.py", "space d.py", "src/plain.py"]


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    for path in FILES:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x = 1\n")
    for path, text in IGNORES.items():
        (folder / path).write_text(text)
    return folder


def read(folder, **options):
    reader = folder_repositories(folder, depth=0, languages=["python"], obey_ignore_files=True, **options)
    return sorted(file.path for file in reader)


@pytest.mark.parametrize("below", [".", "src", "src/deep"])
def test_the_files_are_those_that_git_lists(repository, below):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.py"]
    listed = subprocess.run(command, cwd=repository / below, check=True, capture_output=True, text=True).stdout
    expected = sorted(path for path in listed.split("\0") if path)
    assert expected
    assert read(repository / below) == expected


def test_our_own_ignore_file_counts_too_and_git_is_not_needed(tmp_path):
    for name in ("a.py", "b.py", "sub/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / ".moseignore").write_text("b.py\nsub/\n")
    assert read(tmp_path) == ["a.py"]


def test_training_reads_what_is_ignored(repository):
    assert len(list(folder_repositories(repository, depth=0, languages=["python"]))) > len(read(repository))
