import re
import time
from html import unescape
from html.parser import HTMLParser

import pytest
from pygments.formatters import HtmlFormatter

from modular_star_encoder.demo.page import (
    FIRST_LINES,
    MOST_CHARACTERS,
    Reply,
    code_html,
    highlighted,
    results_html,
)
from modular_star_encoder.search.hits import Answer, Hit
from tests.demo.conftest import HOSTILE_CODE, HOSTILE_NAME

OUR_TAGS = {"p", "b", "article", "header", "span", "i", "div", "pre", "a", "details", "summary"}
FOLDER = "/srv/code"


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def hit(path="a.py", text="return 1", **changes):
    values = {"line": 3, "name": "f", "score": 0.5, "exit_layer": 1, "last_line": 9, "language": "python"}
    return Hit(path=f"{FOLDER}/{path}", text=text, **(values | changes))


def html_of(*hits, other=None, link_to=lambda path, hit: None, **answer):
    return results_html(Reply(Answer("q", list(hits), **answer), 1, 12.3), other, FOLDER, link_to)


def test_code_paths_and_names_that_are_html_stay_text():
    one = hit("\u202e\x1b[2J" + HOSTILE_NAME, HOSTILE_CODE, name="<script>alert(1)</script>\u2066", language="<b>\x9b")
    shown = Tags(html_of(one, link_to=lambda path, hit: f"source?path={path}\"onclick='x'"))
    assert shown.found <= OUR_TAGS
    assert shown.attributes <= {"class", "style", "title", "href", "target", "rel", "role"}
    assert "<script>window.attacked = 2</script>" in shown.text
    assert f"��[2J{HOSTILE_NAME}:3" in shown.text
    assert shown.text.isprintable() or not {*"\u202e\u2066\x1b\x9b"} & {*shown.text}


def test_highlighted_code_is_the_code():
    code = "def f(a):\n\n    return a < 1  # größe 🐍"
    assert unescape(re.sub("<[^>]*>", "", code_html(code, "python"))) == code
    assert '<span class="k">def</span>' in code_html(code, "python")
    assert '<span class="nv">$a</span>' in code_html("return $a;", "php")
    assert '<span class="err">' not in code_html("a = 1  // the last line", "javascript")
    assert code_html("a < b", "no such language") == "a &lt; b"
    assert code_html("\x1b[31m\u202e", "") == "�[31m�"  # what would reorder or hide code


@pytest.mark.parametrize(("language", "text"), [("java", "a\n" * 25_000), ("python", " \n" * 25_000)])
def test_code_that_slows_a_lexer_down_is_shown_in_bounded_time(language, text):
    start = time.thread_time()
    html = highlighted(text + "END", language, HtmlFormatter(nowrap=True))
    assert time.thread_time() - start < 10  # without a limit, minutes
    assert re.sub("<[^>]*>", "", html).count("\n") == 25_001
    assert "END" in html


def test_long_functions_are_folded_and_very_long_ones_cut():
    lines = [f"line_{number:04} = {'x' * 15}" for number in range(MOST_CHARACTERS)]  # of 28 characters, with its end
    short = html_of(hit(text="\n".join(lines[:FIRST_LINES])))
    long = Tags(html_of(hit(text="\n".join(lines))))
    assert "<details>" not in short
    assert "details" in long.found
    assert f"line_{MOST_CHARACTERS // 28 - 1:04} = {'x' * 15}" in long.text
    assert f"line_{MOST_CHARACTERS // 28 + 1:04}" not in long.text
    assert "… more in the file" in long.text


def test_each_hit_says_where_the_other_exit_ranks_it():
    first, second, third = (hit(line=line, name=f"f{line}") for line in (1, 2, 3))
    other = Reply(Answer("q", [second, first]), 4, 1.0)
    badges = re.findall('mose-badge (.*?)">(.*?)<', html_of(first, second, third, other=other))
    moved = [("mose-moved", f"#{rank} at exit 4") for rank in (2, 1)]
    assert badges == [*moved, ("mose-new", "not among the 2 found at exit 4")]


def test_places_are_paths_from_the_folder_with_a_link_where_there_is_one():
    plain = html_of(hit("src/a.py"))
    assert "src/a.py:3" in plain
    assert FOLDER not in plain
    assert "<a " not in plain
    assert "Nothing was found" in html_of()
    linked = html_of(hit("src/a.py"), link_to=lambda path, hit: f"https://x/{path}")
    assert 'href="https://x/src/a.py"' in linked
