import re
import shutil
import time
from html import unescape
from html.parser import HTMLParser

import pytest
from pygments.formatters import HtmlFormatter

from modular_star_encoder.demo.page import (
    FIRST_LINES,
    LONGEST_QUESTION,
    MOST_CHARACTERS,
    TOP_K,
    ExitCosts,
    Reply,
    SearchPage,
    circumstances,
    code_html,
    cost_card,
    highlighted,
    results_html,
    short_name,
)
from modular_star_encoder.inference import PROFILE_NAME
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.hits import Answer, Hit
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.vector_store import LONGEST_PATH
from tests.demo.conftest import HOSTILE_CODE, HOSTILE_NAME
from tests.search.conftest import build, write_code
from tests.tiny import save_tiny_checkpoint, tiny_profile


def page_of(index, checkpoint=None):
    return SearchPage(index, lambda path, hit: None, checkpoint)


@pytest.fixture(scope="module")
def page(index):
    return page_of(index)


def shown(html):
    """(path:line) of each hit, in order."""
    return re.findall(r'mose-place">(.*?) · ', html)


def test_each_side_shows_what_the_index_finds_at_its_exit(page):
    left, right = page.answer("push an item", [], "", 0, 0, 1)
    for html, exit_layer in ((left, 1), (right, 4)):
        (answer,) = page.index.search(["push an item"], top_k=TOP_K, exit_layer=exit_layer)
        assert len(shown(html)) == len(answer.hits) == TOP_K
        assert [place.rsplit(":", 1)[1] for place in shown(html)] == [str(hit.line) for hit in answer.hits]
        assert f"<b>exit {exit_layer}</b>" in html
    assert shown(left) != shown(right)
    assert all(one in page.header() for one in (f"{page.index.store.count():,} pieces", "exits 1, 4"))
    assert "/" not in page.header().replace("</", "")  # no folders of the machine


def test_filters_and_re_ranking_reach_the_index(page):
    left, right = page.answer("add", ["go"], "src/*", 4, 0, 1)
    assert shown(left) == shown(right) == ["src/add.go:3"]
    assert all("Nothing was found" in html for html in page.answer("add", [], "*.nothing", 0, 0, 1))
    left, right = page.answer("add", [], "", 4, 0, 1)
    assert "re-ranked by exit 4" in left
    assert "re-ranked" not in right  # exit 4 can't re-rank itself


def test_the_time_of_a_side_is_not_that_of_what_the_other_left_it(index, monkeypatch):
    page = page_of(index)
    encoded, original = [], Embedder.encoder
    monkeypatch.setattr(
        Embedder, "encoder", lambda self, exits, texts: encoded.append(texts) or original(self, exits, texts)
    )
    page.answer("add", [], "*.py", 2, 0, 0)
    assert (len(encoded), encoded[0], encoded[1] > 1, encoded[:2]) == (4, 1, True, encoded[2:])


@pytest.mark.parametrize(
    ("question", "path", "named"),
    [
        ("x" * (LONGEST_QUESTION + 1), "", "2,000"),
        ("add", "x" * (LONGEST_PATH + 1), "4,096"),
        ("add", "[", "["),
        (" ", "", "press Enter"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(page, question, path, named):
    left, right = page.answer(question, [], path, 0, 0, 1)
    is_error = re.fullmatch('<p class="mose-error" role="alert">[^<]*</p>', left)
    assert (bool(is_error), named in left, right) == (bool(question.strip()), True, "")


@pytest.mark.parametrize("position", [-5, 99, None, 0.4, float("nan"), float("inf"), [1]])
def test_whatever_a_client_sends_is_an_exit_of_the_index(page, position):
    assert re.search(r"<b>exit [14]</b>", page.answer("add", [], "", 0, position, 0)[0])
    assert re.match(r"<h2>Exit [14]</h2>", page.costs_at(position))


@pytest.mark.parametrize("rerank", [True, 1.0, float("nan"), "1", [1], None])
def test_only_the_number_of_a_deeper_exit_re_ranks(page, monkeypatch, rerank):
    monkeypatch.setattr(page, "exit_layers", (0, 1))
    monkeypatch.setattr(page, "rerank_exit_layers", (1,))
    asked = []
    monkeypatch.setattr(page, "_ask", lambda *values: asked.append(values[2]) or Reply(Answer("add", []), 0, 1.0))
    page.answer("add", [], "", rerank, 0)
    page.answer("add", [], "", 1, 0)
    assert asked == [0, 1]
    assert type(asked[0]) is int


def test_an_index_of_another_checkpoint_is_refused_on_the_page(index, tmp_path):
    other = save_tiny_checkpoint(tmp_path / "other", intermediate_size=48)
    page = page_of(CodeIndex.open(index.store), str(other))
    for html in (page.header(), page.answer("add", [], "", 0, 0, 1)[0]):
        assert ("built with another checkpoint" in html, "Traceback" in html) == (True, False)
    assert page.rerank_exit_layers == ()


def test_an_index_of_one_exit_has_one_side_and_its_checkpoint_may_have_moved(checkpoint, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    build(write_code(tmp_path / "code"), tmp_path / "index", moved, exit_layer=1)
    shutil.rmtree(moved)
    assert page_of(CodeIndex.open(tmp_path / "index")).problem
    page = page_of(CodeIndex.open(tmp_path / "index"), str(checkpoint))
    assert page.problem == ""
    (only,) = page.answer("add", [], "", 0, 0)
    assert (page.sides, page.rerank_exit_layers) == (1, (2, 4))
    assert ("mose-badge" in only, "--exit-layers all" in page.footer()) == (False, True)


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "my-model")


def costs_of(folder, **options):
    fingerprint = checkpoint_checksum(folder)
    tiny_profile(options.pop("fingerprint", fingerprint), **options).save(folder / PROFILE_NAME)
    return ExitCosts.of(str(folder), fingerprint, "my-model")


def test_every_figure_is_the_one_of_the_checkpoints_own_profile(copy):
    costs = costs_of(copy)
    assert re.findall("<b>(.*?)</b>", cost_card(costs, 1)) == ["1.2 ms", "101 MB", "1.1 M", "0.111"]
    assert re.findall("<b>(.*?)</b>", cost_card(costs, 4)) == ["4.9 ms", "104 MB", "4.4 M", "0.444"]
    assert re.findall(r"width:([\d.]+)%", cost_card(costs, 1)) == ["25.0", "97.1", "25.0", "25.0"]
    assert "<script>" not in cost_card(ExitCosts(costs.profile.with_quality("<script>", {1: 0.5})), 1)
    assert all(one in circumstances(costs) for one in ("1 × 32 tokens", "2026-01-02"))


def test_a_checkpoint_without_a_profile_of_its_weights_says_so_and_how_to_make_one(copy):
    card = cost_card(ExitCosts.of(str(copy), checkpoint_checksum(copy), "my-model"), 1)
    assert all(one in card for one in ("my-model has no exit profile", "mose profile my-model"))
    names = {"/gone/from/here/model": "model", "someone/model": "someone/model"}  # the page may be public
    assert {name: short_name(name) for name in names} == names
    assert not re.search(r"\d ms|MB", card)
    assert "other weights" in cost_card(costs_of(copy, fingerprint="of another model"), 1)
    (copy / PROFILE_NAME).write_text("{}")
    assert "can&#x27;t be read" in cost_card(ExitCosts.of(str(copy), "f", "my-model"), 1)


def test_an_unmeasured_quality_or_exit_and_times_of_another_machine_are_named_as_such(copy):
    costs = costs_of(copy, exits=(1,), quality=False)
    assert ("--quality" in cost_card(costs, 1), "exit 4" in cost_card(costs, 4)) == (True, True)
    assert "another machine" not in circumstances(costs)
    elsewhere = {"processor": "another", "threads": 99}
    assert "another machine" in circumstances(costs_of(copy, machine=elsewhere))


# ---- Hits as HTML

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
    assert (re.sub("<[^>]*>", "", html).count("\n"), "END" in html) == (25_001, True)


def test_long_functions_are_folded_and_very_long_ones_cut():
    lines = [f"line_{number:04} = {'x' * 15}" for number in range(MOST_CHARACTERS)]  # of 28 characters, with its end
    short = html_of(hit(text="\n".join(lines[:FIRST_LINES])))
    long = Tags(html_of(hit(text="\n".join(lines))))
    assert ("<details>" in short, "details" in long.found) == (False, True)
    assert f"line_{MOST_CHARACTERS // 28 - 1:04} = {'x' * 15}" in long.text
    assert f"line_{MOST_CHARACTERS // 28 + 1:04}" not in long.text
    assert "… more in the file" in long.text


def test_each_hit_says_where_the_other_exit_ranks_it():
    first, second, third = (hit(line=line, name=f"f{line}") for line in (1, 2, 3))
    other = Reply(Answer("q", [second, first]), 4, 1.0)
    badges = re.findall('mose-badge (.*?)">(.*?)<', html_of(first, second, third, other=other))
    moved = [("mose-moved", f"#{rank} at exit 4") for rank in (2, 1)]
    assert badges == [*moved, ("mose-new", "not among the 2 found at exit 4")]


def test_the_bar_of_a_hit_is_its_score_relative_to_the_best():
    scores = (2.5, 1.0, -0.5)
    html = html_of(*(hit(line=line, score=score) for line, score in enumerate(scores, 1)))
    assert re.findall("width:(.*?)%", html) == ["100.0", "40.0", "0.0"]
    assert re.findall("width:(.*?)%", html_of(hit(score=0.0))) == ["0.0"]


def test_places_are_paths_from_the_folder_with_a_link_where_there_is_one():
    plain = html_of(hit("src/a.py"))
    assert [one in plain for one in ("src/a.py:3", FOLDER, "<a ")] == [True, False, False]
    assert "Nothing was found" in html_of()
    linked = html_of(hit("src/a.py"), link_to=lambda path, hit: f"https://x/{path}")
    assert 'href="https://x/src/a.py"' in linked
