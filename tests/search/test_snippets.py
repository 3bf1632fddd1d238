import itertools

import pytest

from modular_star_encoder.data.sources import SourceFile
from modular_star_encoder.search.building import file_snippets
from modular_star_encoder.search.settings import Windows
from tests.data.polyglot import NAMES, SOURCES
from tests.errors import raises
from tests.search.samples import FILES


def snippets(path, text, language="python", windows=None):
    return file_snippets(SourceFile("code", path, language, text), windows or Windows())


@pytest.mark.parametrize("language", SOURCES)
def test_functions_of_every_language_are_found(language):
    assert len(snippets("a", SOURCES[language], language)) == len(NAMES[language])


def test_functions_know_their_lines_name_language_and_description():
    push, pop = snippets("stack.py", FILES["stack.py"])
    assert (push.name, push.first_line, push.last_line, push.description) == ("Stack.push", 2, 4, "Put an item on top.")
    assert (pop.name, pop.first_line, pop.last_line, pop.description) == ("Stack.pop", 6, 7, "")
    assert push.text == "def push(self, item):\n    self.items.append(item)"
    (add,) = snippets("src/add.go", FILES["src/add.go"], "go")
    assert (add.name, add.first_line, add.last_line, add.language) == ("Add", 3, 5, "go")


@pytest.mark.parametrize(("lines", "overlap"), [(40, 10), (7, 3), (1, 0), (100, 99), (200, 0)])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_windows_cover_every_line_and_overlap_as_asked(lines, overlap, end):
    text = FILES["settings.py"].replace("\n", end)
    windows = snippets("settings.py", text, windows=Windows(lines, overlap))
    assert {line for one in windows for line in range(one.first_line, one.last_line + 1)} == set(range(1, 101))
    for before, after in itertools.pairwise(windows):
        assert after.first_line == before.last_line - overlap + 1
        assert after.last_line > before.last_line
    for one in windows:
        assert one.text.split("\n") == [
            f"OPTION_{number} = {number}" for number in range(one.first_line, one.last_line + 1)
        ]
        assert one.name == ""


def test_blank_windows_are_left_out_and_no_file_is_lost():
    text = "A = 1\n" + "\n" * 50 + "B = 2\n"
    found = snippets("a.py", text, windows=Windows(10, 0))
    assert [(one.first_line, one.last_line) for one in found] == [(1, 10), (51, 52)]
    assert snippets("a.py", "x")[0].text == "x"


def test_form_feeds_and_unicode_separators_end_no_line():
    assert [one.last_line for one in snippets("a.py", "A = 1\x0c\nB = '\u2028'\n")] == [2]


def test_a_file_whose_functions_are_all_broken_gets_windows():
    (window,) = snippets("a.py", "def broken(:\n    return 1\n")
    assert (window.name, window.first_line, window.last_line) == ("", 1, 2)


@pytest.mark.parametrize(("lines", "overlap"), [(0, 0), (5, 5), (5, -1)])
def test_windows_that_do_not_move_on_are_refused(lines, overlap):
    with raises("search.windows", lines, overlap):
        Windows(lines, overlap)
