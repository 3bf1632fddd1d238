import contextlib
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from modular_star_encoder.data.functions import extract_functions
from modular_star_encoder.data.languages import function_finder, parsing
from modular_star_encoder.data.languages.function_finder import MAX_NESTING, find_functions, outline
from modular_star_encoder.data.languages.parsing import UnparsableSourceError
from modular_star_encoder.data.languages.registry import language_of_text
from modular_star_encoder.data.sources import SourceFile
from modular_star_encoder.search.pieces import file_pieces
from tests.data.polyglot import MARKED, NAMES, SOURCES, marked


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("language", MARKED)
def test_spans_are_exact_in_bytes_of_the_file(language, end):
    for mark in ("", "\ufeff"):
        text, expected = marked(mark + MARKED[language].replace("\n", end))
        found = find_functions(text, language)
        assert [(one.start_byte, one.end_byte) for one in found] == expected
        assert [one.code for one in found] == [one.code for one in find_functions(SOURCES[language], language)]
        for one in found:
            assert text.encode()[one.start_byte : one.end_byte].decode() == one.source
            before = text.encode()[: one.start_byte].decode().replace("\r\n", "\n").replace("\r", "\n")
            assert one.line == before.count("\n") + 1


DEDENTED = {
    "python": ("Ähre.wächst.inner", 'def inner():\n\treturn """ä\n\t\tkept\n"""'),
    "java": ("Größe.größe", '@Override("é")\npublic <T> List<T> größe(int a) throws E {\n'
             '\tString s = """\n\t\t  ü\n\t\t  """; return null;\n}'),
    "ruby": ("Größe.A.B.wächst", "def wächst(a)\n  x = <<~EOS\n        ü\n    not code\n      EOS\n  x\nend"),
    "php": ("T.tut", "#[X]\npublic static function tut() { return 'a\n\t b'; }"),
    "cpp": ("B.operator==", 'bool operator==(const B& o) { return R"(\n\tkept)"; }'),
}  # fmt: skip


@pytest.mark.parametrize("language", MARKED)
def test_names_and_descriptions_are_a_reader_s_and_code_is_dedented_except_inside_strings(language):
    found = find_functions(SOURCES[language], language)
    assert {one.name: one.description for one in found} == NAMES[language]
    documented = find_functions(SOURCES[language], language, documented_only=True)
    assert documented == [one for one in found if one.description]
    if language in DEDENTED:
        assert DEDENTED[language] in [(one.name, one.code) for one in found]


BROKEN = {
    "python": "def {name}():\n    return {error}1\n",
    "java": "class A {{ int {name}() {{ return {error}1; }} }}\n",
    "go": "func {name}() int {{ return {error}1 }}\n",
    "php": "<?php\nfunction {name}() {{ return {error}1; }}\n",
    "ruby": "def {name}\n  x = {error}1\nend\n",
    "javascript": "function {name}() {{ return {error}1; }}\n",
    "c": "int {name}() {{ return {error}1; }}\n",
    "cpp": "int A::{name}() {{ return {error}1; }}\n",
}


@pytest.mark.parametrize("language", MARKED)
def test_a_syntax_error_costs_its_function_and_no_other(language):
    counts = Counter()
    good, bad, after = (
        BROKEN[language].format(name=name, error=error) for name, error in (("good", ""), ("bad", "* )"), ("after", ""))
    )
    names = [one.name for one in find_functions(good + bad + after, language, counts=counts)]
    assert [name.rpartition(".")[2] for name in names] == ["good", "after"]
    assert counts == {"files with a syntax error": 1, "functions with a syntax error": 1}
    with pytest.raises(UnparsableSourceError, match="no function without a syntax error"):
        find_functions(bad, language)


@pytest.mark.parametrize(
    ("language", "text", "names"),
    [
        ("c", "int f(void) { else if (x) { y(); } return 1; }\n", ["f"]),
        ("c", "TEST(a, b) { x(); }\nint f(void) { return 1; }\n", ["f"]),
        ("c", 'MODULE("x")\nint f(int argc UNUSED, int v) { return (CAST int) v; }\n', ["f"]),
        ("c", "#define M(x) do { \\\n x; } while (0)\nint f(void) { M(1); return 1; }\n", ["f"]),
        ("cpp", "LIB_BEGIN\ntemplate <class T> T f(T x) LIB_NOEXCEPT { return x; }\nLIB_END\n", ["f"]),
        ("cpp", "template <class R> int f(R p) { return typename R::Point(p); }\n", ["f"]),
    ],
)  # fmt: skip
def test_macros_hide_no_function_and_become_none(language, text, names):
    found = find_functions(text, language)
    assert [one.name for one in found] == names
    assert all(one.source in text for one in found)


@pytest.mark.parametrize("language", MARKED)
@pytest.mark.parametrize("unit", ["(\n", "{\n", "[\n", "if (x)\n", "-\n", "'\"\n", "a.b(\n", "<<A\n"])
def test_deep_nesting_overflows_no_stack(language, unit):
    text = ("<?php\n" if language == "php" else "") + unit * 1000
    with contextlib.suppress(UnparsableSourceError):
        assert find_functions(text, language) == []


def test_texts_and_functions_beyond_a_limit_are_refused(monkeypatch):
    counts = Counter()
    text = "".join(f"function f{i}() {{ " for i in range(MAX_NESTING + 5)) + "}" * (MAX_NESTING + 5)
    assert len(find_functions(text, "javascript", counts=counts)) == MAX_NESTING
    assert counts == {"functions nested too deeply": 5}
    with pytest.raises(UnparsableSourceError, match="longer than 10,000 bytes"):
        find_functions("x = " + "a<" * 10_000, "java")
    with pytest.raises(UnparsableSourceError, match="null bytes"):
        find_functions("int x = 1;\0", "c")
    assert find_functions("x = 1\n" * 20_000, "python") == []
    for before in ("x = ", "def f():\n    y = "):
        with pytest.raises(UnparsableSourceError):  # thousands of brackets that nothing closes
            outline(before + "(\n" * 50_000, "python")
    with monkeypatch.context() as patched:
        patched.setattr(parsing, "MAX_PARSE_SECONDS", -1)
        with pytest.raises(UnparsableSourceError, match="takes longer"):
            find_functions("int f() { return 1; }\n" * 5000, "c")
    assert [one.name for one in find_functions("int g() { return 1; }", "c")] == ["g"]  # the next is not disturbed


STATEMENTS = {"go": ("package a\ntype (\n", "T% int\n", ")\n"), "c": ("typedef int z,\n", "f%,\n", "y;\n")}
STATEMENTS["typescript"] = ("const z = 1,\n", "f% = () => 1,\n", "y = 2\n")


@pytest.mark.parametrize("language", STATEMENTS)
def test_the_work_for_a_statement_grows_in_proportion_to_the_names_that_it_defines(monkeypatch, language):
    (before, each, after), children, line = STATEMENTS[language], [], function_finder._line
    monkeypatch.setattr(function_finder, "_line", lambda node: children.append(node.child_count) or line(node))
    for number in (2000, 4000):
        children.clear()
        text = before + "".join(each.replace("%", str(one)) for one in range(number)) + after
        names = {name for piece in file_pieces("a", language, text) for name in piece.defines}
        assert len(names) >= number
        assert sum(children) < 10 * number


HOSTILE = {
    "line comments": ("go", "package a\n" + "//\n" * 300_000 + "func F() {\n}\n"),
    "templates in templates": ("javascript", "`${\n" * 60_000 + "1" + "}`\n" * 60_000),
    "functions in names": ("javascript", "(function(){\n" * 20_000 + "x" + "\n}).x = function(){}" * 20_000),
}


@pytest.mark.parametrize(("language", "text"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_take_seconds(language, text):
    start = time.process_time()
    with contextlib.suppress(UnparsableSourceError):
        find_functions(text, language)
    assert time.process_time() - start < 30


@pytest.mark.parametrize(("seconds", "passes"), [(1, 3), (3, 1)])
def test_a_file_with_macros_is_parsed_again_only_if_that_is_quick(monkeypatch, seconds, passes):
    took, parse_once = [], parsing.parse_once
    monkeypatch.setattr(parsing, "time", SimpleNamespace(thread_time=lambda: sum(took)))
    monkeypatch.setattr(parsing, "parse_once", lambda *source: took.append(seconds) or parse_once(*source))
    outline("int UNUSED f(int a) { return a; }\nint main(int argc UNUSED UNUSED) { return 0; }\n", "c")
    assert len(took) == passes


def test_threads_may_parse_at_the_same_time():
    texts = {"c": "int f() { return 1; }\n" * 400, "python": "def f(x):\n    return x\n" * 200}
    expected = {language: find_functions(text, language) for language, text in texts.items()}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda language: find_functions(texts[language], language), [*texts] * 8))
    finally:
        sys.setswitchinterval(interval)
    assert found == list(expected.values()) * 8


def test_headers_and_an_upper_case_suffix_of_c_are_cpp_if_they_hold_it():
    for path in ("a.h", "A.H", "a.C", "a.c"):
        assert language_of_text("c", path, "class A {};\n") == ("c" if path == "a.c" else "cpp")
        assert language_of_text("c", path, "int a;\n") == "c"


MUTATIONS = int(os.environ.get("MOSE_MUTATIONS", "200"))  # files
SNIPPETS = [
    *"(){}[]<>;:,\"'`#@$\\/%\t\n\r",
    *('"""', "'''", "/*", "*/", "/**", "//", "<<~EOS\n", "<<<EOT\n", "?>", "<?php", "=begin\n", "=end\n", "\r\n", "#{"),
    *("é", "\u2028", "\x0c", "\ufeff", "\U0001f600", "e\u0301", "\0", "\ud800", "${", "\\\n", "def f():\n", "end\n"),
    *("class A {", "if (x) {", "template <", 'R"x(', "#ifdef A\n", "#endif\n", "MACRO(x)\n", "=> ", "func "),
]  # fmt: skip


def mutated(text, other, draw):
    """Replace parts of `text` by nothing, by a part of the other text, or by a snippet, and change line ends."""
    for _ in range(draw.randint(1, 6)):
        start, at = draw.randint(0, len(text)), draw.randint(0, len(other))
        end = min(len(text), start + draw.choice((0, 0, 1, 5, 40, 400)))
        new = draw.choice(("", other[at : at + end - start], draw.choice(SNIPPETS), draw.choice(SNIPPETS)))
        text = text[:start] + new + text[end:]
    return text.replace("\n", draw.choice(("\n", "\n", "\r\n", "\r", "\n\t")))


def check(file, counts):
    functions = extract_functions(file, counts, documented_only=False)
    encoded = file.text.encode(errors="surrogatepass")
    for function in functions:
        assert encoded[function.start_byte : function.end_byte].decode() == function.source
        before = encoded[: function.start_byte].decode().replace("\r\n", "\n").replace("\r", "\n")
        assert function.line == before.count("\n") + 1
        assert function.name
        assert function.code.strip() == function.code.rstrip()
        assert "\r" not in function.code
        assert "\n" not in function.description
        assert function.description.encode() is not None
    assert sorted(functions, key=lambda one: (one.start_byte, -one.end_byte)) == functions
    return functions


def test_mutated_files_never_crash_and_what_is_found_is_exact():
    sources, counts, found = list(SOURCES.items()), Counter(), 0
    for number in range(MUTATIONS):
        draw = random.Random(f"mutation {number}")
        language, source = sources[number % len(sources)]
        text = mutated(source, draw.choice(sources)[1], draw)
        try:
            found += len(check(SourceFile("repository", "file", language, text), counts))
        except Exception as error:
            raise AssertionError(f"mutation {number}, of {language}") from error
    # Neither harmless nor hopeless: most files are broken, and most of those still give functions.
    assert counts["files with a syntax error"] + counts["files that do not parse"] > MUTATIONS / 3
    assert counts["files with a syntax error"] > counts["files that do not parse"]
    assert found > MUTATIONS
