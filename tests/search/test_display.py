from modular_star_encoder.search.hits import Answer, Hit, format_answer, printable, score_bar


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
