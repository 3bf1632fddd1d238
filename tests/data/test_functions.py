import ast
import os
import warnings
from collections import Counter
from dataclasses import replace

import pytest

from modular_star_encoder.data import functions
from modular_star_encoder.data.functions import code_key, description_key, drop_reason, extract_functions, function_id
from modular_star_encoder.data.languages.function_finder import find_functions
from tests.data.samples import extract_one, function, source
from tests.errors import raises
from tests.tiny import write_files


def good(name, number=1, doc="Add a number to x."):
    return f'def {name}(x):\n    """{doc}"""\n    y = x + {number}\n    return y\n'


@pytest.mark.parametrize(
    "text",
    [
        'def f(x):\n    """SECRET words."""\n    return x\n',
        "def f(x):\n    r'''SECRET\n\n    SECRET too\n    '''  # SECRET comment\n\n    return x\n",
        'def f(x): "SECRET"; return x\n',
        'def f(x):\n    "SECRET"; return x\n',
        'def f(x):\n    ("SECRET "\n     "SECRET")\n    return x\n',
        'def f(x):\r\n    """SECRET\r\n    SECRET"""\r\n    return x\r\n',
        'def f(x):\r    """SECRET"""\r    return x\r',
        'def f(x):\n    """SECRET é""" ;\n    return x',
        'def f(x):\n    """SECRET""" \\\n    ; return x\n',
        'async def f(x):\n\t"""SECRET."""\n\t@x\n\tdef g(): pass\n\treturn x\n',
        "# coding: latin-1\ndef f(x):\n    'SECRET é'\n    é = 'ü'; return x\n",
    ],
)
def test_a_docstring_never_stays_in_the_code(text):
    found = extract_one(text)
    assert "SECRET" in found.description
    assert "SECRET" not in found.code
    assert "return x" in found.code
    assert isinstance(ast.parse(found.code).body[0], ast.FunctionDef | ast.AsyncFunctionDef)


def test_docstrings_of_what_is_defined_inside_leave_too():
    text = '''
def outer(x):
    """Outer."""
    def only():
        """SECRET"""
    class Inner:
        """SECRET"""
        def method(self):
            """SECRET"""
            return 1
    return only
'''
    found = {f.name: f for f in extract_functions(source(text))}
    assert set(found) == {"outer", "outer.Inner.method"}
    assert "SECRET" not in found["outer"].code
    assert "pass" in found["outer"].code
    ast.parse(found["outer"].code)


def test_spans_are_exact_after_characters_of_several_bytes_and_odd_line_breaks():
    # \x0c, \x1c and \u2028 break lines for str.splitlines, not for Python.
    text = (
        'a = "é\u2028ü"; b = "\x1c"\n\x0c\n'
        'class Ä:\n\x0c    def ö(self, ß="é"):\n        """Döcument."""\n        return "ö"  # ü\n'
    )
    found = extract_one(text)
    assert found.code == 'def ö(self, ß="é"):\n    return "ö"'
    assert (found.name, found.line, found.description) == ("Ä.ö", 4, "Döcument.")


@pytest.mark.parametrize(
    "text", ["def f(:", "x = '\0'", "x = " + "(" * 500, "x = " + "-" * 100_000 + "1", "x = '\ud800'"]
)
def test_a_file_that_does_not_parse_is_counted_and_not_fatal(text):
    counts = Counter()
    assert extract_functions(source(text), counts) == []
    assert counts == {"files that do not parse": 1}


def test_warnings_about_somebody_elses_code_are_silent():
    with warnings.catch_warnings(action="error"):
        assert extract_one('def f():\n    "Doc \\d."\n    return 1 is 1\n').code


BODY = "    # why\n    @cache\n    def g(): pass\n    return g"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f(x):\n    'Print it.'\n    print 'a', x\n    exec x\n", "def f(x):\n    print 'a', x\n    exec x"),
        # comments after the last statement belong to nobody
        ("def f(x):\n    'Doc.'\n    if x:\n        return 1\n        # no\n    # more\n",
         "def f(x):\n    if x:\n        return 1"),
        *((f'def f():\n    """Doc."""{end}\n\n{BODY}\n', f"def f():\n{BODY}") for end in ("", " ; # twice")),
    ],
)  # fmt: skip
def test_python_2_and_all_that_follows_a_docstring_are_read_and_trailing_comments_are_not(text, code):
    assert extract_one(text).code == code


def test_collecting_filters_drops_repeated_code_and_counts_everything():
    files = [
        replace(source(good("a") + good("b", doc="Short.") + "def c(): return 1\n"), license="MIT"),
        source(good("a").replace("    ", "  "), path="copy.py"),
        source("def f(:", path="broken.py"),
        replace(source("x"), language="cobol"),
    ]
    found, counts = functions.collect_functions(files, processes=1, progress=False)
    origins = [(one.name, one.repository, one.path, one.language, one.license) for one in found]
    assert origins == [("a", "repo", "module.py", "python", "MIT")]
    assert counts == {
        "files": 4,
        "files that do not parse": 1,
        "files in an unsupported language": 1,
        "documented functions": 3,
        "dropped: description not of 3 to 256 words": 1,
        "dropped: same code as an earlier function": 1,
        "functions kept": 1,
    }


def find_or_die(text, *arguments, **options):
    if "DEADLY" in text:
        os._exit(1)
    return find_functions(text, *arguments, **options)


@pytest.mark.slow
def test_a_file_that_kills_its_process_is_counted_and_costs_no_other(monkeypatch):
    monkeypatch.setattr(functions, "_FILES_PER_CHUNK", 4)
    monkeypatch.setattr(functions, "find_functions", find_or_die)
    files = [source(good(f"f{i}", number=i), path=f"{i}.py") for i in range(40)]
    expected, counts = functions.collect_functions(files, processes=1, progress=False)
    files[7:7] = [source("# DEADLY\n", path="deadly.py")]
    counts += Counter({"files": 1, "files that crash the parser": 1})
    assert functions.collect_functions(files, processes=2, progress=False) == (expected, counts)


def test_keys_ignore_layout_and_punctuation_only_and_an_identifier_is_the_same_in_every_run():
    assert code_key("a =  1\n\tb") == code_key("a = 1\nb") != code_key("a = 1\nc")
    assert description_key("Return the Index.") == description_key("return (the) index") != description_key("the index")
    assert function_id(function()) == "cd8ab7017bc4282883e87ef5f3d2370e"
    assert function_id(function()) == function_id(replace(function(), name="x", description="y", license="MIT"))
    changes = {"repository": "r", "path": "p", "language": "go", "line": 9, "start_byte": 9, "source": "x", "code": "y"}
    others = {function_id(replace(function(), **{name: value})) for name, value in changes.items()}
    assert len(others - {function_id(function())}) == len(changes)
    one, other = replace(function(), repository="a", path="bc"), replace(function(), repository="ab", path="c")
    assert function_id(one) != function_id(other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"description": "Two words."}, "description not of 3 to 256 words"),
        ({"description": "One -- two --"}, "description not of 3 to 256 words"),
        ({"description": "word " * 257}, "description not of 3 to 256 words"),
        ({"description": "Возвращает сумму двух чисел of x"}, "description mostly not ASCII"),
        ({"code": "def f():\n\n\n    return 1"}, "code of fewer than 3 lines"),
        ({"name": "A.__len__"}, "special method"),
        ({"name": "A.runTest"}, "name contains test"),
        *(({"description": text}, None) for text in ("just three words", "word " * 256, "Résumé of the naïve façade")),
        ({"name": "TestCase.run"}, None),
    ],
)
def test_each_rule_drops_what_it_names_and_keeps_values_on_its_limit(changes, reason):
    assert drop_reason(replace(function(), **changes)) == reason


@pytest.mark.parametrize(
    ("language", "constructors", "special", "kept"),
    [
        ("python", "Stack.__init__", "Stack.__len__", "__private|toString"),
        ("java", "Outer.Stack.Stack", "Stack.toString|Stack.hashCode", "Stack.stack|Stack.toStringList"),
        ("php", "Stack.__construct", "Stack.__get", "__"),
        ("ruby", "Stack.initialize", "Stack.==|Stack.to_s", "Stack.empty?|Stack.size="),
        ("javascript", "Stack.constructor", "Stack.toString", "Stack.Stack"),
        ("go", None, "Stack.String|main", "NewStack"),
        ("c", None, "main", "initialize"),
        ("cpp", "Stack.Stack|Stack.~Stack", "main|Stack.operator==|Stack.operator bool", "operate|Stack.operator_name"),
    ],
)
def test_names_of_constructors_and_special_methods_are_dropped_and_similar_ones_kept(
    language, constructors, special, kept
):
    for names, reason in ((constructors, "constructor"), (special, "special method"), (kept, None)):
        for name in names.split("|") if names else ():
            assert drop_reason(replace(function(), language=language, name=name)) == reason, name


OUTER = "def outer(a):\n    def inner():\n        return a\n\n    return inner"
ADD = "func Add(a int, b int) int {\n\treturn a + b\n}"


def test_each_outermost_function_is_a_text_of_a_corpus_of_functions(tmp_path):
    files = {"a/one.py": f"import os\n\n# Licence: any.\n\n\n{OUTER}\n\n\nx = 1\n", "b/broken.py": "def (:\n" * 20}
    write_files(tmp_path, files | {"b/two.go": f"package one\n\n// Add adds.\n{ADD}\n"})
    corpus = functions.open_corpus({"folder": str(tmp_path), "snippets": "functions"})
    found = {(file.repository, file.path, file.language): file.text for file in corpus}
    assert found == {("a", "one.py#L6", "python"): OUTER, ("b", "two.go#L4", "go"): ADD}
    assert corpus.skipped["does not parse"] == 1
    assert corpus.repositories == ("a", "b")


HUB = {
    "repository_name": "owner/name",
    "func_path_in_repository": "a.go",
    "func_name": "A",
    "whole_func_string": "func A() {}",
    "language": "go",
    "func_code_string": "func A() {}",
    "func_documentation_string": "Does it\nwell.\n\nSlowly.",
    "func_code_url": "https://github.com/owner/name/blob/0ab/a.go#L37-L60",
}
FIELDS = ["repo", "path", "func_name", "original_string", "language", "code", "docstring", "url"]
LINES = dict(zip(FIELDS, HUB.values(), strict=True)) | {"code_tokens": ["func"]}


def test_both_published_formats_give_the_same_function():
    code = "func A() {}"
    expected = functions.DocumentedFunction("owner/name", "a.go", 37, "go", "A", "Does it well.", code, code)
    assert functions.codesearchnet_function(HUB) == functions.codesearchnet_function(LINES) == expected


@pytest.mark.parametrize(
    ("code", "stripped"),
    [
        ('def a(self):\n        """Does it."""\n        return 1', "def a(self):\n        return 1"),
        ('    def a(self):\n        """Does it."""\n        return 1\n', "def a(self):\n    return 1"),
        ("@b\ndef a():\n    'Does it.'\n    print 1", "@b\ndef a():\n    print 1"),
        ("def a():\n    return 1", "def a():\n    return 1"),
        # No function: the code may still hold its docstring.
        *(
            (code, None)
            for code in ('def a(:\n    """Does it."""\n    return 1', 'def a():\n    """Does it."""', "a = 1")
        ),
    ],
)
def test_python_code_loses_its_docstring_and_the_source_keeps_it(code, stripped):
    row = {"language": "python", "func_code_string": code, "func_documentation_string": "Does it."}
    function = functions.codesearchnet_function(row)
    assert (function and (function.code, function.source)) == (stripped and (stripped, code))


def test_other_rows_are_refused():
    for column, shown in (("func_code_string", "func_code_string or code"), ("language", "language")):
        with raises("data.codesearchnet.column", shown):
            functions.codesearchnet_function({**HUB, column: None})
    with raises("data.language.unknown", "cobol"):
        functions.codesearchnet_function({**HUB, "language": "cobol"})
