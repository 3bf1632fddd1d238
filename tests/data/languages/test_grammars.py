import random
import tracemalloc

import pytest

from modular_star_encoder.data.languages.parsing import error_bytes, load_grammar, parse_once
from tests.data.polyglot import SOURCES


@pytest.mark.parametrize("language", SOURCES)
def test_a_text_read_in_pieces_gives_the_tree_of_the_whole(language):
    grammar = load_grammar(language)
    draw = random.Random(0)
    for size in [*range(1, 24), 4096, 70_000]:
        text = SOURCES[language] + "\n// é\U0001f600 "
        text += "".join(draw.choice("aé\u20ac\U0001f600 \n") for _ in range(size))
        whole = grammar.parser.parse(text.encode())
        assert str(parse_once(text.encode(), grammar).root_node) == str(whole.root_node)


def test_parsing_leaves_nothing_in_memory():
    grammar = load_grammar("c")
    source = b"int f(void) { return 1; }\n" * 5000
    parse_once(source, grammar)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(5):
        parse_once(bytes(bytearray(source)), grammar)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < len(source)


def test_errors_are_counted_in_bytes_and_missing_tokens_as_one():
    grammar = load_grammar("c")

    def errors(source, *span):
        return error_bytes(parse_once(source, grammar), grammar, *span)

    assert errors(b"int f(void) { return 1; }") == 0
    assert errors(b"int f(void) { return 1 }") == 1
    assert errors(b"int f(void) { return 1; @@ }") == errors(b"int f(void) { return 1; @@ }", 20, 28) == 2
    assert errors(b"int f(void) { return 1; @@ }", 0, 20) == 0
