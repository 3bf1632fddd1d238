import numpy as np
import pytest

from modular_star_encoder.search import ranking
from modular_star_encoder.search.hits import Answer, Hit, format_answer, score_bar
from modular_star_encoder.search.pieces import Snippet, question_stems, snippet_words, stems
from modular_star_encoder.search.ranking import Question
from modular_star_encoder.utils.reports import printable


def piece(path, *defines, text="x"):
    return Snippet(path, "python", defines[0] if defines else "", 1, 1, text, 1, defines)


def order(question, snippets, similarities=None, words=None):
    words = np.ones(len(snippets)) if words is None else np.array(words, dtype=float)
    similarities = None if similarities is None else np.array(similarities, dtype=float)
    return [candidate for candidate, *_ in placed(Question.of(question), snippets, similarities, words)]


def placed(question, snippets, similarities, words):
    candidates = [one.path for one in snippets]
    return ranking.place(question, candidates, definers(snippets), similarities, words, len(snippets))


def definers(snippets):
    names = {name for one in snippets for name in one.defines}
    return {name.lower(): [at for at, one in enumerate(snippets) if name in one.defines] for name in names}


@pytest.mark.parametrize(
    ("text", "is_symbol", "names"),
    [
        ("Router::Match", True, {"match": 1.0}),
        ("parse_header", True, {"parse_header": 1.0}),
        ("sort", False, {}),
        ("how is a header parsed", False, {}),
        ("where does HttpClient retry", False, {"httpclient": 0.5}),
        ("Where the Session is closed", False, {"session": 0.5}),
    ],
)
def test_a_question_is_a_symbol_or_a_sentence_with_names(text, is_symbol, names):
    question = Question.of(text)
    assert (question.is_symbol, dict(question.names)) == (is_symbol, names)


def test_identifiers_are_words_with_their_parts_and_stems():
    assert stems("getHTTPResponses") == "get http respons gethttprespons"
    assert question_stems("how are the headers parsed") == ["header", "pars"]
    assert question_stems("how is it") == ["how", "is", "it"]
    assert stems("silhouette_score") == "silhouet scor silhouette_scor"


def test_both_lists_count_by_how_sure_they_are():
    similarities, words = np.array([0.9, 0.5, 0.5, 0.5]), np.array([0.0, 3.0, 2.9, 2.8])
    scores = ranking.fused(similarities, words, 0.5)
    assert scores[0] != scores.max() or scores[1] < scores[0]
    assert [ranking.fused(similarities, words, weight).argmax() for weight in (1.0, 0.0)] == [0, 1]
    assert ranking.fused(None, words, 0.5).tolist() == words.tolist()
    assert scores.min() == 0


def test_the_definition_of_a_symbol_comes_first_and_most_of_all_in_its_own_file():
    snippets = [piece("a.py"), piece("b.py", "Stack"), piece("stack.py", "Stack")]
    assert order("Stack", snippets, words=[3, 1, 1]) == [2, 1, 0]
    gains = ranking.definitions(Question.of("Stack"), [one.path for one in snippets], definers(snippets))
    assert gains.tolist() == [0, ranking.DEFINITION, ranking.DEFINITION * ranking.OWN_FILE]


def test_a_sentence_finds_the_file_that_is_named_like_it():
    snippets = [piece("src/util.py"), piece("src/parsers.py"), piece("parse/other.py")]
    gains = ranking.paths(Question.of("how the parser works"), [one.path for one in snippets])
    assert gains[1] > gains[2] > gains[0] == 0
    assert order("how the parser works", snippets)[0] == 1


def test_a_file_with_several_good_pieces_is_a_good_file():
    snippets = [piece("one.py"), piece("many.py"), piece("many.py"), piece("many.py")]
    assert order("some question", snippets, words=[1.05, 1, 1, 1])[0] == 1


def test_tests_and_re_exports_count_less_unless_they_are_asked_for():
    snippets = [piece("tests/test_a.py"), piece("src/__init__.py"), piece("src/b.py")]
    assert order("close a socket", snippets, words=[1.2, 1.2, 1.0])[0] == 2
    assert order("tests of closing a socket", snippets, words=[2.0, 1, 1])[0] == 0


def test_the_path_says_what_a_test_is():
    side = ["tests/a.py", "src/a_test.go", "pkg/test_a.py", "src/a.spec.ts", "src/StackTest.java", "examples/a.py"]
    plain = ["src/testimony.py", "src/latest.py", "src/contest/a.py", "src/Inspec.cs"]
    factors = ranking.priors(Question.of("close a socket"), side + plain)
    assert (factors < 1).tolist() == [True] * len(side) + [False] * len(plain)


def test_further_pieces_of_a_file_give_way_to_other_files():
    factors = ranking.diversity(np.array([2.0, 4.0, 3.0, 1.0]), np.array([0, 0, 0, 1]))
    assert factors.tolist() == pytest.approx([0.8649, 1, 0.93, 1])


def test_reasons_add_up_to_the_score():
    snippets = [piece("tests/stack.py", "Stack"), piece("stack.py"), piece("stack.py", "push")]
    found = placed(Question.of("where Stack is"), snippets, np.array([0.5, 0.2, 0.1]), np.array([1.0, 0, 2]))
    assert [score for _, score, _ in found] == pytest.approx([sum(reasons.values()) for *_, reasons in found])
    assert placed(Question.of("x"), [], None, np.zeros(0)) == []


def test_a_piece_is_found_by_its_path_what_it_defines_and_its_name_which_counts_four_times():
    named = piece("src/HttpClient.py", "Retry", text="pass")
    words = snippet_words(named).split()
    assert {"http", "client", "httpclient", "src", "defines:retry"} <= set(words)
    assert words.count("retry") == named.embedded().count("Retry") == 4


def hit(score, name="Stack.push", text="def push(self):\n\n    return 1\n", exit_layer=9):
    return Hit("src/a.py", 12, name, score, exit_layer, 14, "python", text)


def test_a_hit_shows_place_score_name_exit_and_code():
    assert format_answer(Answer("?", [hit(0.5)], method="vector")).splitlines() == [
        "src/a.py:12  █████      0.500  Stack.push  (exit 9)",
        "    def push(self):",
        "        return 1",
    ]
    assert len(format_answer(Answer("?", [hit(0.5), hit(0.4)]), lines=0).splitlines()) == 2
    assert format_answer(Answer("?", [])) == "nothing found"
    assert str(hit(0.51249)) == "src/a.py:12  0.512  Stack.push  (exit 9)"


def test_scores_of_words_are_drawn_as_shares_of_the_best():
    answer = Answer("?", [hit(20.0, "", exit_layer=None), hit(10.0)], method="lexical")
    lines = format_answer(answer, lines=0).splitlines()
    assert lines[0] == "src/a.py:12  ██████████ 20.000  (lines)  (words)"
    assert lines[1] == "src/a.py:12  █████      10.000  Stack.push  (exit 9)"
    damaged = float("nan")  # the score of a model with damaged weights
    bars = {0: "    ", 1: "████", 2: "████", -1: "    ", damaged: "    ", 0.5625: "██▎ "}
    assert {share: score_bar(share, 4) for share in bars} == bars


def test_what_steers_a_terminal_is_not_printed():
    assert printable("\x1b[31m\u202ered\n\t\udcff") == "�[31m�red�    �"
    assert "\x1b" not in str(hit(0.5, "\x1b[2J"))
    assert "\x1b" not in format_answer(Answer("?", [hit(0.5, "\x1b[2J", "\x1b]0;title\x07 = 1")]))
    assert max(map(len, format_answer(Answer("?", [hit(0.5, text="x" * 500)]), width=80).splitlines())) == 80


def test_a_hit_inside_a_very_long_function_is_shown_from_its_best_line():
    found = Hit("a.py", 10, "f", 0.5, 0, text="a\x0cb\u2028\nc\nretry()\ndone()", best_line=12)
    place, *code = format_answer(Answer("?", [found], method="vector")).splitlines()
    assert (place.split()[0], [line.strip() for line in code]) == ("a.py:12", ["retry()", "done()"])
