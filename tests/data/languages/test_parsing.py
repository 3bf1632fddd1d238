import random
import tracemalloc

import pytest
from tree_sitter import Parser

from modular_star_encoder.data.languages.function_finder import find_functions
from modular_star_encoder.data.languages.parsing import check_syntax, error_bytes, load_grammar, parse_once
from tests.data.polyglot import SOURCES


@pytest.mark.slow
@pytest.mark.parametrize("language", SOURCES)
def test_a_text_read_in_pieces_gives_the_tree_of_the_whole(language):
    grammar = load_grammar(language)
    draw = random.Random(0)
    for size in [*range(1, 24), 4096, 70_000]:
        text = SOURCES[language] + "\n// é\U0001f600 "
        text += "".join(draw.choice("aé\u20ac\U0001f600 \n") for _ in range(size))
        whole = Parser(grammar._grammar).parse(text.encode())
        assert str(parse_once(text.encode(), grammar).root_node) == str(whole.root_node)


@pytest.mark.slow
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


# What no text of `polyglot` holds.
SNIPPETS = [
    ("python", "    def f(self):\n        return 1\n"),
    ("java", "default int f() { return 1; }"),
    ("java", "import java.util.List;\n\npublic class A { int f() { return 1; } }"),
    ("go", "func (s *Stack) Push(x int) { s.items = append(s.items, x) }"),
    ("go", "package main\n\nfunc main() { f() }"),
    ("php", "<?php\nfunction f($x) { return $x; }"),
    ("php", "private function f() { ?><b><?php return 1; }"),
    ("ruby", "def f(x)\n  x\nend"),
    ("javascript", "async push(x) { this.items.push(x); }"),
    ("javascript", "export default async function f() {}"),
    ("cpp", "int f() const override { return 1; }"),
    ("cpp", "template <class T> T A<T>::f() { return T(); }"),
    ("cpp", "public:\n  int f() { return 1; }"),
]


@pytest.mark.parametrize(("language", "code"), SNIPPETS)
def test_a_bare_function_or_method_is_valid_and_one_cut_short_is_not(language, code):
    for end in ("\n", "\r\n"):
        assert check_syntax(code.replace("\n", end), language) == (0, True)
    if code.endswith(("}", "end")):
        assert check_syntax(code.removesuffix("end").rstrip("}\n "), language)[0] > 0.01


@pytest.mark.parametrize("language", SOURCES)
def test_every_function_that_is_found_stands_alone_and_prose_holds_none(language):
    for found in find_functions(SOURCES[language], language):
        assert check_syntax(found.code, language) == (0, True), found.code
    prose = "I am sorry, but I cannot translate this function, since it has no equivalent."
    share, has_function = check_syntax(prose, language)
    assert not has_function
    assert share > 0 or language == "ruby"


def test_another_language_code_that_closes_its_class_and_what_cannot_be_parsed_at_all_are_errors():
    codes = {"python": "int f() { return 1; }", "java": "def f(x):\n    return x", "go": "def f(x)\n  x\nend"}
    for language, code in codes.items():
        share, has_function = check_syntax(code, language)
        assert share > 0.2 or not has_function
    assert check_syntax("int f() { return 1; } }\nclass B { int g() { return 1; }", "java")[0] > 0
    for code in ("", " \n\t", "int f() {\0}", "x" * 20_000):
        assert check_syntax(code, "c") == (1, False)
