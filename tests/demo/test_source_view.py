import os
import re
from html import unescape
from unittest.mock import Mock
from urllib.parse import parse_qs, urlsplit

import pytest

from modular_star_encoder.data.languages.registry import SEARCH_LANGUAGES
from modular_star_encoder.demo import serving
from modular_star_encoder.demo.serving import LocalFiles, repository_links
from modular_star_encoder.search.building import SEARCH_FILTERS
from modular_star_encoder.search.hits import Hit
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.vector_store import file_id
from tests.demo.conftest import HOSTILE_NAME
from tests.errors import raises
from tests.search.conftest import write_code

CLOSED = [".env", ".git/config", ".git/hook.py", "ignored.py", "private/key.py", "sub/.hidden/a.py"]
HIT = Hit(path="", line=2, name="", score=0.0, exit_layer=1, last_line=4)


@pytest.fixture
def folder(tmp_path):
    """An indexed folder next to a secret; `known` are the paths in its index."""
    files = dict.fromkeys([*CLOSED, "unindexed.env", "../secret.py"], "SECRET = 1\n")
    files |= {"sub/a b.py": "one = 1\ntwo = 2\nthree = '<script>'\n", ".gitignore": "ignored.py\nprivate/\n"}
    folder = write_code(tmp_path / "code", files)
    os.symlink(tmp_path / "secret.py", folder / "link.py")
    os.symlink(tmp_path, folder / "linked")
    return folder


def files_of(folder, *known):
    store, settings = Mock(), Mock(folder=str(folder), languages=SEARCH_LANGUAGES)
    store.files.return_value = {file_id(path): None for path in known}
    return LocalFiles(CodeIndex(store, settings))


def test_a_file_of_the_index_is_shown_escaped_with_its_lines_marked(folder, index):
    page = files_of(folder, "sub/a b.py").page("sub/a b.py", 2, 2)
    assert ("&lt;script&gt;" in page, "<script" in page) == (True, False)
    marked = page.split('class="hll"')[1].split("\n")[0]
    assert ("two" in marked, page.count('class="hll"')) == (True, 1)
    named = LocalFiles(index).page(HOSTILE_NAME)
    assert ("&lt;img" in named, "<img" in named) == (True, False)


OUTSIDE = [*CLOSED, "../secret.py", "sub/../../secret.py", "link.py", "linked/secret.py", "unindexed.env"]


@pytest.mark.parametrize("path", [*OUTSIDE, "sub", "", "a\0b", "gone.py"])
def test_nothing_but_indexed_files_inside_the_folder_is_shown(folder, path):
    known = {path} - {"unindexed.env", "sub", ""}  # even if an index claimed to hold the file
    with raises("search.file.missing", repr(path)):
        files_of(folder, *known).page(path)
    for absolute in (folder / "link.py", folder / "sub" / "a b.py"):
        with raises("search.file.missing"):
            files_of(folder, "sub/a b.py").page(str(absolute))


def test_a_file_that_an_index_may_no_longer_hold_is_not_shown(folder, monkeypatch):
    with open(folder / "huge.py", "wb") as file:
        file.truncate(SEARCH_FILTERS.max_bytes + 1)
    with raises("search.file.left_out", "huge.py"):
        files_of(folder, "huge.py").page("huge.py")
    os.mkfifo(folder / "pipe.py")
    with raises("search.file.missing"):
        files_of(folder, "pipe.py").page("pipe.py")
    monkeypatch.setattr("modular_star_encoder.search.index.file_inside", lambda *_: folder / "pipe.py")  # swapped later
    with raises("search.file.left_out", "'pipe.py' can't be shown: not a regular file"):
        files_of(folder, "pipe.py").page("pipe.py")


@pytest.mark.parametrize(("most_lines", "most_characters"), [(3, 50_000), (1000, 30)])
def test_a_long_file_is_shown_in_parts_that_link_to_one_another(folder, monkeypatch, most_lines, most_characters):
    monkeypatch.setattr(serving, "MOST_LINES", most_lines)
    monkeypatch.setattr(serving, "MOST_CHARACTERS", most_characters)
    (folder / "long.py").write_text("\n".join(f"line_{n:02} = 1" for n in range(1, 11)))  # 11 characters each
    files, seen, first = files_of(folder, "long.py"), [], 1
    while True:
        page = files.page("long.py", first, first)
        seen += re.findall(r"line_(\d\d)", page)
        assert f"line_{first:02}" in re.sub("<[^>]*>", "", page.split('class="hll"')[1].split("\n")[0])
        links = {
            name: parse_qs(urlsplit(unescape(to)).query)["first"][0]
            for to, name in re.findall('href="([^"]*)">(earlier|later) lines', page)
        }
        assert links.get("earlier") == (str(first - 1) if first > 1 else None)
        if "later" not in links:
            break
        first = int(links["later"])
    assert seen == [f"{n:02}" for n in range(1, 11)]
    assert "line_10" in files.page("long.py", 10**9, 10**9)


def test_links_lead_to_the_page_of_the_file_and_are_absent_where_it_is_gone(folder):
    link_to = files_of(folder, "sub/a b.py")
    address = urlsplit(link_to("sub/a b.py", HIT))
    assert (address.scheme, address.netloc, address.path, address.fragment) == ("", "", "source", "L-2")
    assert parse_qs(address.query) == {"path": ["sub/a b.py"], "first": ["2"], "last": ["4"]}
    assert [link_to(path, HIT) for path in ("gone.py", "link.py")] == [None, None]
    assert files_of(folder.parent / "nowhere")("a.py", HIT) is None


def test_repository_links_name_revision_and_lines_stay_on_their_host_and_need_an_address_of_the_web():
    link_to = repository_links("https://github.com/o/n/blob/abc/src/")
    assert link_to("sub/a b#?.py", HIT) == "https://github.com/o/n/blob/abc/src/sub/a%20b%23%3F.py#L2-L4"
    one_line = Hit(path="", line=7, name="", score=0.0, exit_layer=1, last_line=7)
    assert link_to("//evil.example/x", one_line) == "https://github.com/o/n/blob/abc/src///evil.example/x#L7"
    for address in ("javascript:alert(1)", "github.com/o/n", "https://", "https://h/x?y", "file:///etc"):
        with raises("demo.source"):
            repository_links(address)
