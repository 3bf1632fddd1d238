"""Renaming of frequent words."""

import re

import numpy as np

from modular_star_encoder.data.retrieval import rename_frequent_words

CODE = "def total(values, start):\n    # values, values\n    x = start\n    for value in values:\n        x += value"


def rename(code=CODE, seed=0):
    return rename_frequent_words(code, np.random.default_rng(seed))


def test_every_occurrence_of_a_frequent_word_gets_the_same_new_name():
    renamed = rename()
    pattern = re.escape(CODE).replace("values", "(?P<name>[a-z]{3,8})", 1).replace("values", "(?P=name)")
    match = re.fullmatch(pattern, renamed)
    assert match
    assert match["name"] not in re.findall(r"\w+", CODE)


def test_only_words_that_occur_three_times_and_have_three_characters_are_replaced():
    renamed = rename("ab ab ab; twice twice; abc abc abc; 100 100 100")
    assert re.fullmatch(r"ab ab ab; twice twice; ([a-z]{3,8}) \1 \1; 100 100 100", renamed)


def test_numbers_with_letters_in_them_are_no_words():
    code = "0xFFFF | 0xFFFF | 0xFFFF; 100ULL, 100ULL, 100ULL"
    assert rename(code) == code


def test_parts_of_longer_words_stay():
    assert re.fullmatch(r"([a-z]{3,8}) \1 \1 name_of rename names", rename("name name name name_of rename names"))


def test_two_words_never_get_one_name():
    words = [f"word{number}" for number in range(300)]
    renamed = rename(" ".join(words * 3)).split()
    assert len(set(renamed)) == 300
    assert renamed[:300] == renamed[300:600] == renamed[600:]


def test_equal_generators_give_equal_results_and_others_do_not():
    assert rename(seed=3) == rename(seed=3) != rename(seed=4)
