import os
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

from modular_star_encoder.demo.serving import LARGEST_FILE, LocalFiles, repository_links
from modular_star_encoder.search.hits import Hit
from modular_star_encoder.search.vector_store import file_id
from tests.demo.conftest import HOSTILE_NAME
from tests.errors import raises

HIT = Hit(path="", line=2, name="", score=0.0, exit_layer=1, last_line=4)


@pytest.fixture
def folder(tmp_path):
    """An indexed folder next to a secret; `known` are the paths in its index."""
    folder = tmp_path / "code"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.py").write_text("SECRET = 1\n")
    (folder / "sub" / "a b.py").write_text("one = 1\ntwo = 2\nthree = '<script>'\n")
    (folder / "unindexed.env").write_text("SECRET = 2\n")
    os.symlink(tmp_path / "secret.py", folder / "link.py")
    os.symlink(tmp_path, folder / "linked")
    return folder


def files_of(folder, *known):
    store = SimpleNamespace(files=lambda: {file_id(path): None for path in known})
    return LocalFiles(SimpleNamespace(folder=str(folder), store=store))


def test_a_file_of_the_index_is_shown_escaped_with_its_lines_marked(folder, index):
    page = files_of(folder, "sub/a b.py").page("sub/a b.py", 2, 2)
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    marked = page.split('class="hll"')[1].split("\n")[0]
    assert "two" in marked
    assert page.count('class="hll"') == 1
    named = LocalFiles(index).page(HOSTILE_NAME)
    assert "&lt;img" in named
    assert "<img" not in named


OUTSIDE = ["../secret.py", "sub/../../secret.py", "link.py", "linked/secret.py", "unindexed.env"]


@pytest.mark.parametrize("path", [*OUTSIDE, "sub", "", "a\0b", "gone.py"])
def test_nothing_but_indexed_files_inside_the_folder_is_shown(folder, path):
    known = {path} - {"unindexed.env", "sub", ""}  # even if an index claimed to hold the file
    with raises("demo.file.missing"):
        files_of(folder, *known).page(path)
    for absolute in (folder / "link.py", folder / "sub" / "a b.py"):
        with raises("demo.file.missing"):
            files_of(folder, "sub/a b.py").page(str(absolute))
    with open(folder / "huge.py", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with raises("demo.file.large"):
        files_of(folder, "huge.py").page("huge.py")


def test_links_lead_to_the_page_of_the_file_and_are_absent_where_it_is_gone(folder):
    link_to = files_of(folder, "sub/a b.py")
    address = urlsplit(link_to("sub/a b.py", HIT))
    assert (address.scheme, address.netloc, address.path, address.fragment) == ("", "", "source", "L-2")
    assert parse_qs(address.query) == {"path": ["sub/a b.py"], "first": ["2"], "last": ["4"]}
    assert link_to("gone.py", HIT) is None
    assert link_to("link.py", HIT) is None
    assert files_of(folder.parent / "nowhere")("a.py", HIT) is None


def test_repository_links_name_revision_and_lines_and_stay_on_their_host():
    link_to = repository_links("https://github.com/o/n/blob/abc/src/")
    assert link_to("sub/a b#?.py", HIT) == "https://github.com/o/n/blob/abc/src/sub/a%20b%23%3F.py#L2-L4"
    one_line = Hit(path="", line=7, name="", score=0.0, exit_layer=1, last_line=7)
    assert link_to("//evil.example/x", one_line) == "https://github.com/o/n/blob/abc/src///evil.example/x#L7"


@pytest.mark.parametrize(
    "address", ["javascript:alert(1)", "github.com/o/n", "https://", "https://h/x?y", "file:///etc"]
)
def test_what_is_no_address_of_a_repository_is_refused(address):
    with raises("demo.source"):
        repository_links(address)
