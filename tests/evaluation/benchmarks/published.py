"""Tiny files in the format of each benchmark's authors."""

import gzip
import itertools
import json

import pyarrow as pa
from pyarrow import parquet

NAMES = ("open", "close", "read", "write")


def write_lines(path, lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_rows(path, rows):
    if path.suffix == ".parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_lines(path, [json.dumps(row) for row in rows])


def python_code(name):
    return f'def {name}(file):\n    """{name.title()} a file.\n\n    Slowly.\n    """\n    return {name}er(file)'


def url_of(name):
    return f"https://github.com/someone/files/{name}#L1"


def hub_rows(language, names=("func_code_string", "func_documentation_string", "func_code_url")):
    code = {"python": python_code}.get(language, lambda name: f"func {name.title()}() {{}}")
    return [
        dict(zip(names, (code(one), f"{one.title()} a file.\n\nSlowly.", url_of(one)), strict=True))
        | {"repository_name": "someone/files", "language": language}
        for one in NAMES
    ]


def original_rows(language):
    return [
        row | {"code_tokens": ["func", name, "(", ")"], "docstring_tokens": [name.title(), "a", "file", "."]}
        for name, row in zip(NAMES, hub_rows(language, ("code", "docstring", "url")), strict=True)
    ]


def codesearchnet(folder):
    write_rows(folder / "go_test.jsonl.gz", hub_rows("go"))
    write_rows(folder / "python" / "test-00000-of-00001.parquet", hub_rows("python"))
    half = original_rows("ruby")
    for number, rows in enumerate((half[:2], half[2:])):
        write_rows(folder / "ruby" / "final" / "jsonl" / "test" / f"ruby_test_{number}.jsonl.gz", rows)


def codesearchnet_full(folder):
    rows = original_rows("ruby")
    write_rows(folder / "ruby" / "test.jsonl", rows[:2])
    write_rows(folder / "ruby" / "codebase.jsonl", rows[::-1])


def translation(folder):
    for suffix, names, end in (("java", NAMES, "\n"), ("cs", map(str.title, NAMES), "\r\n")):
        write_lines(
            folder / f"test.java-cs.txt.{suffix}", [f"public void {one}(File file) {{ }}" for one in names], end
        )


def poj104(folder):
    rows = [
        {"label": f"{label}", "index": f"{40_000 + 3 * label + n}", "code": f"int main() {{ return {label}; }} // é{n}"}
        for label, n in itertools.product((81, 95, 104), range(3))
    ]
    write_rows(folder / "test.jsonl", rows)


def bigclonebench(folder):
    functions = [{"func": f"void {name}() {{}}", "idx": str(7 * i)} for i, name in enumerate(NAMES)]
    write_rows(folder / "data.jsonl", functions)
    write_lines(folder / "valid.txt", ["0\t7\t1", "0\t14\t0"])
    write_lines(folder / "test.txt", ["7\t14\t0", "14\t21\t0", "21\t0\t1", "7\t14\t1"])


def advtest(folder):
    rows = []
    for i, (name, row) in enumerate(zip(NAMES, original_rows("python"), strict=True)):
        del row["code_tokens"]
        tokens = ["def", "Func", "(", name, ")"]
        rows.append({**row, "idx": i, "function": "def Func(arg_0): pass", "function_tokens": tokens})
    write_rows(folder / "test.jsonl", rows)


def cosqa(folder):
    codes = {python_code(name): i for i, name in enumerate(NAMES)}
    queries = [
        {"idx": f"cosqa-train-{i}", "doc": f"python {name} file", "retrieval_idx": codes[python_code(name)]}
        for i, name in enumerate(NAMES[::-1])
    ]
    write_lines(folder / "code_idx_map.txt", [json.dumps(codes)])
    write_lines(folder / "cosqa-retrieval-test-500.json", json.dumps(queries, indent=1).splitlines())


def exercism(folder):
    rows = []
    for name in NAMES:
        code = {"python": python_code(name), "csharp": f"class {name.title()} {{ }}"}
        if name != "read":
            code["go"] = f"func {name.title()}() {{}}"
        description = f"# Instructions\n\n{name.title()} a file."
        rows.append({"slug": name, "description": description, "code": code})
    write_rows(folder / "exercises.jsonl.gz", rows)


def code_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    code = 'def {0}_file(path):\n    """{1} the file at a path."""\n    handle = {0}(path)\n    return handle\n\n\n'
    (folder / "files.py").write_text("".join(code.format(name, name.title()) for name in NAMES))


WRITERS = {"codesearchnet-999": codesearchnet, "codesearchnet-999-leaky": codesearchnet, "folder": code_folder}
WRITERS |= {"codesearchnet-full": codesearchnet_full, "translation": translation, "translation-masked": translation}
WRITERS |= {"poj104": poj104, "bigclonebench": bigclonebench, "advtest": advtest, "cosqa": cosqa}
WRITERS |= {f"exercism-{kind}": exercism for kind in ("text", "text-masked", "code", "code-masked")}
