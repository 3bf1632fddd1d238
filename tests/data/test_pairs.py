import csv
import gzip
import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from datasets import IterableDataset

from modular_star_encoder.data import pairs
from modular_star_encoder.data.pairs import RetrievalExample, Snippet, TripletColumns, open_triplets, resolve_pairs
from modular_star_encoder.data.sources import dataset_rows
from modular_star_encoder.data.sources.dataset_rows import open_rows, open_texts
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_text
from tests.errors import raises
from tests.tiny import write_files

PYTHON, GO = "def add(a, b):\n    return a + b", "func add(a, b int) int {\n\treturn a + b\n}"
SURROGATES = "halves of characters (lone surrogates)"


def row(number=0, without=None, **changes):
    """A row as SynthCoNL publishes it."""
    values = {"repository_name": f"owner/name{number}", "func_path_in_repository": "a.py", "func_code_url": "url"}
    values |= {"func_documentation_string": f"Adds the two numbers of {number}."}
    values |= {"language1_CSN": "python", "func1_CSN": PYTHON, "language2": "Go", "func2": GO}
    return {name: value for name, value in (values | changes).items() if name != without}


TRIPLET = RetrievalExample("Adds the two numbers of 0.", (Snippet("python", PYTHON), Snippet("go", GO)), "owner/name0")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter=";" if path.suffix == ".csv" else "\t")
            writer.writerows([list(rows[0]), *([one] if isinstance(one, str) else one.values() for one in rows)])
    else:
        data = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def repositories(reader):
    return [triplet.repository.removeprefix("owner/name") for triplet in reader]


def rows_of(path):
    return [row for _, row in dataset_rows.open_dataset_rows(path, [])]


@pytest.fixture
def small_limits(monkeypatch):
    limits = {"_MAX_ROWS": 1000, "_MAX_CHARACTERS": 10_000, "_MAX_COLUMNS": 10, "_MAX_ROW_GROUPS": 10}
    for name, value in (limits | {"_MAX_LINE": 1000}).items():
        monkeypatch.setattr(dataset_rows, name, value)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl.gz", "\n" * 100_000, "too many for a file"),
        ("a.csv.gz", "query,positive\n" + "\n" * 100_000, "too many for a file"),
        ("b.csv.gz", "query,positive\n" + ",\n" * 100_000, "too many for a file"),
        ("c.csv.gz", "query,positive\n" + ("a" * 100 + "\n") * 100_000, "too many for a file"),
        ("b.jsonl.gz", "\n".join(map(str, range(3000))), "rows"),  # 2 bytes a row; a row of a gzip file needs 8
        ("a.csv", ",".join(map(str, range(20))), "10 columns"),
        ("a.jsonl", "x" * 2000, "1,000 characters"),
    ],
)
def test_a_text_file_that_unpacks_to_too_much_is_not_read_to_its_end(tmp_path, small_limits, name, content, fault):
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    with raises("data.source.damaged", tmp_path / name, fault):
        rows_of(tmp_path / name)


def test_an_error_of_any_kind_while_a_dataset_of_the_hub_is_read_is_one_sentence(monkeypatch):
    def rows():
        yield {"a": "x"}
        raise KeyError("a type that differs from the first rows'")

    monkeypatch.setattr(dataset_rows, "_streamed", lambda *_, **__: IterableDataset.from_generator(rows))
    with raises("data.source.damaged", "me/data", "a type that differs"):
        list(open_rows("me/data", columns=["a"]))


def one_text_in_every_row(rows):
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["f" * 500])


def one_text_in_lists(values):
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, values], pyarrow.int32()), one_text_in_every_row(values))


@pytest.mark.parametrize("store_schema", [True, False])
def test_dictionaries_and_lists_that_repeat_a_text_are_measured_before_they_are_decoded(
    tmp_path, monkeypatch, store_schema
):
    texts = one_text_in_lists(500)
    table = pyarrow.table({"a": texts, "b": pyarrow.StructArray.from_arrays([texts], ["c"]), "d": [[[1]]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", store_schema=store_schema)
    assert rows_of(tmp_path / "a.parquet") == [{"a": ["f" * 500] * 500, "b": {"c": ["f" * 500] * 500}, "d": [[1]]}]
    (batch,) = dataset_rows.parquet_batches(tmp_path / "a.parquet")
    assert batch.schema == dataset_rows.open_parquet(tmp_path / "a.parquet").schema_arrow
    table = pyarrow.table({"a": one_text_in_lists(260_000)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", store_schema=store_schema)
    pool = pyarrow.default_memory_pool()
    before = pool.max_memory()
    with raises("data.source.damaged", "characters"):
        rows_of(tmp_path / "a.parquet")
    assert pool.max_memory() < max(before + 1, 10**8)  # decoded, the list has 130 MB
    pyarrow.parquet.write_table(pyarrow.table({"a": one_text_in_every_row(900)}), tmp_path / "a.parquet")
    monkeypatch.setattr(dataset_rows, "_MAX_BATCH_BYTES", 10_000)
    assert max(map(len, dataset_rows.parquet_batches(tmp_path / "a.parquet"))) <= 20  # rows at a time


@pytest.mark.parametrize(
    ("columns", "groups", "fault"),
    [
        ({"a": pyarrow.nulls(3000, pyarrow.string())}, 1, "3,000 rows"),
        ({"a": one_text_in_every_row(100_000)}, 1, "100,000 rows"),
        ({"a": [["x"] * 3000]}, 1, "3,000 rows"),
        ({"a": one_text_in_every_row(900)}, 1, "characters"),
        ({f"c{number}": ["x"] for number in range(20)}, 1, "20 columns"),
        ({"a": ["x"] * 30}, 30, "30 row groups"),
    ],
)
def test_a_parquet_file_that_unpacks_to_more_than_its_share_is_not_read(tmp_path, small_limits, columns, groups, fault):
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=len(table) // groups)
    with raises("data.source.damaged", tmp_path / "a.parquet", fault):
        rows_of(tmp_path / "a.parquet")


def test_columns_may_have_other_names_and_be_fewer(tmp_path):
    columns = {"description": "nl", "code": "a", "language": "la", "other_code": "b", "other_language": "lb"}
    other = {"nl": "Adds.", "a": "x", "la": "C++", "b": "y", "lb": "JavaScript", "r": None}
    file = write(tmp_path / "a.parquet", [other])
    (triplet,) = open_triplets(file, columns=columns | {"repository": "r"})
    assert triplet == RetrievalExample("Adds.", (Snippet("cpp", "x"), Snippet("javascript", "y")))
    (pair,) = open_triplets(file, columns=columns | {"other_code": None, "repository": None})
    assert pair == replace(triplet, snippets=triplet.snippets[:1])


@pytest.mark.parametrize(("column", "language"), [(None, "python"), ("lb", "ruby"), ("language2", "go")])
def test_a_hard_negative_has_its_own_language_or_that_of_a_code(tmp_path, column, language):
    file = write(tmp_path / "a.parquet", [row(bad="def sub(x): ...", lb="Ruby"), row(1, bad=" ", lb="Ruby")])
    columns = TripletColumns(negative="bad", negative_language=column)
    reader = open_triplets(file, columns=columns)
    assert list(reader) == [replace(TRIPLET, negative=Snippet(language, "def sub(x): ..."))]
    assert reader.skipped == {"empty bad": 1}
    with raises("data.row"):
        list(open_triplets(file, columns=columns, strict=True))


def test_a_folder_gives_the_files_of_a_split(tmp_path, monkeypatch):
    for number, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]):
        write(tmp_path / "data" / f"{name}.parquet", [row(number)])
    assert repositories(open_triplets(tmp_path)) == ["0", "1"]
    assert repositories(open_triplets(tmp_path, split="validation")) == ["2"]
    with raises("data.source.split", "test"):
        open_triplets(tmp_path, split="test")
    # A folder without splits, or a list of files, is read whole in order.
    write(tmp_path / "whole" / "b" / "c.jsonl", [row(1)])
    write(tmp_path / "whole" / "a.jsonl.gz", [row(0)])
    assert repositories(open_triplets(tmp_path / "whole")) == ["0", "1"]
    monkeypatch.setenv("HOME", str(tmp_path / "whole"))
    assert repositories(open_triplets(["~/b/c.jsonl", "~/a.jsonl.gz"])) == ["1", "0"]
    write(tmp_path / "parquet" / "a.parquet", [row(2)])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row()]).slice(0, 0), tmp_path / "parquet" / "b.parquet")
    write(tmp_path / "parquet" / "c.parquet", [row(3)])
    # The report of near-deduplication holds no rows.
    write(tmp_path / "parquet" / "dropped.jsonl", [{"id": 1, "reason": "near another row"}])
    assert repositories(open_triplets(tmp_path / "parquet")) == ["2", "3"]
    write(tmp_path / "alone" / "dropped.jsonl", [row(4)])
    assert repositories(open_triplets(tmp_path / "alone")) == ["4"]


BAD = {
    "empty func2": row(func2="  \n"),
    "empty func1_CSN": row(func1_CSN=None),
    "empty func_documentation_string": row(func_documentation_string=""),
    "unknown language in language2": row(language2="cobol"),
    "unknown language in language1_CSN": row(language1_CSN=None),
}
# Parquet can't hold these: a column of several kinds, halves of characters, lines that are no rows.
BAD_IN_JSON = {
    "repository_name is not a text": row(repository_name=5),
    SURROGATES: row(repository_name="\ud800"),
    "not JSON": "[" * 100_000,
    "not a JSON object": "[1]",
    "no column func2; name the columns in `columns`": row(without="func2"),
}


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_bad_rows_are_skipped_with_count_and_example_or_refused(tmp_path, name):
    bad = BAD if name.endswith("parquet") else BAD | BAD_IN_JSON
    file = write(tmp_path / name, [row(), *bad.values(), row(func2=""), row(1, repository_name=None)])
    if name == "a.jsonl":  # a mark, line ends of Windows and blank lines cost no row
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    reader = open_triplets(file)
    for _ in range(2):
        first, second = reader
        assert (first, second.repository) == (TRIPLET, "")
        assert reader.skipped == dict.fromkeys(bad, 1) | {"empty func2": 2}
        assert f"{name}, " in reader.examples["unknown language in language2"][0]
        assert reader.examples["unknown language in language2"][0].partition(": ")[0].endswith(" 5")
    write_text(tmp_path / "report.json", str(reader.examples))  # UTF-8, whatever the rows hold
    with raises("data.row", 2):
        list(open_triplets(file, strict=True))


def test_any_damaged_byte_of_a_parquet_file_is_one_sentence(tmp_path):
    file, endings = tmp_path / "a.parquet", set()
    pyarrow.parquet.write_table(pyarrow.table({"content": ["abc", "def"] * 20}), file, compression=None)
    whole = file.read_bytes()
    for place in range(4, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            list(open_rows(file, columns=[]))
        except UserError as error:
            endings.add((error.key, "\n" in str(error), "a.parquet" in str(error)))
    assert endings == {("data.source.damaged", False, True), ("data.source.unreadable", False, True)}


def test_sources_without_rows_are_refused(tmp_path):
    with raises("data.source.options", "a.jsonl"):
        open_triplets(write(tmp_path / "a.jsonl", [row()]), strcit=True)
    with raises("data.source.column", "func2", "repository_name"):
        open_triplets(write(tmp_path / "a.parquet", [row(without="func2")]))
    with raises("data.triplets.negative_language", "lb"):
        TripletColumns(negative_language="lb")
    with raises("data.triplets.columns"):
        TripletColumns(language=None)
    with raises("data.row", "line 2", "func2"):
        list(open_texts(write(tmp_path / "texts.jsonl", [row(), row(func2=5)]), "func2"))
    (tmp_path / "folder").mkdir()
    with raises("data.source.no_files"):
        open_triplets(tmp_path / "folder")
    for name in ("a.parquet", "a.jsonl"):  # both kinds
        write(tmp_path / "folder" / name, [row()])
    with raises("data.source.no_files"):
        open_triplets(tmp_path / "folder")


def read(settings):
    return pairs.read_retrieval_examples(settings, progress=False)


BAD_FOR_TRAINING = {
    "description in place of code": row(func1_CSN="adds the two numbers of 0"),
    "prose in place of code": row(func2="This function adds two integers in Go."),
    SURROGATES: row(func2=GO + "// \ud800"),
    "not JSON": "{",
}


def test_rows_that_cannot_be_trained_on_are_skipped_or_refused(tmp_path):
    file = str(write(tmp_path / "rows.jsonl", [row(), *BAD_FOR_TRAINING.values()]))
    found = read({"triplets": file, "functions": None, "parallel": None})["triplets"]
    assert len(found.texts) == 1
    assert found.skipped == dict.fromkeys(BAD_FOR_TRAINING, 1)
    assert list(found.examples) == list(BAD_FOR_TRAINING)
    for line, (shown,) in enumerate(found.examples.values(), 2):
        assert f", line {line}: " in shown
        assert shown.encode()
    with raises("data.row", "description in place of code"):
        read({"triplets": {"source": file, "strict": True}})
    # Hard negatives are code that is not the row's own.
    rows = [row(worse=code) for code in ("def sub(a, b): ...", GO + "  ", "It takes the second number away.")]
    source = {"source": str(write(tmp_path / "rows.jsonl", rows)), "columns": {"negative": "worse"}}
    found = read({"triplets": source})["triplets"]
    assert [text.negative for text in found.texts] == [Snippet("python", "def sub(a, b): ...")]
    assert found.skipped == {"hard negative is the code itself": 1, "prose in place of code": 1}
    with raises("data.sources.negatives", "data.functions"):
        read({"functions": {"folder": str(tmp_path)}, "triplets": source})


def test_documented_functions_of_repositories_have_one_snippet(tmp_path):
    code = 'def add(a, b):\n    """Add two given numbers."""\n    total = a + b\n    return total\n'
    write_files(tmp_path, {"repository/a.py": code})
    (text,) = read({"functions": {"folder": str(tmp_path)}})["functions"].texts
    assert (text.description, text.repository) == ("Add two given numbers.", "repository")
    assert [snippet.language for snippet in text.snippets] == ["python"]


def test_parallel_solutions_have_no_description_and_only_our_languages(tmp_path):
    rows = [
        {"slug": "add", "description": "Add.", "code": {"python": PYTHON, "go": GO, "rust": "fn add() {}", "c": None}},
        {"slug": "lonely", "code": {"python": PYTHON}},
        {"slug": "wrong", "code": {"python": PYTHON, "go": "Adds two numbers in Go."}},
        {"slug": "none", "code": "def"},
        {"slug": "half \ud800", "code": {"python": PYTHON, "go": GO}},
        "{",
    ]
    found = read({"parallel": str(write(tmp_path / "exercises.jsonl", rows))})["parallel"]
    assert found.texts == [RetrievalExample("", (Snippet("python", PYTHON), Snippet("go", GO)), "add")]
    once = ["unsupported language rust", "prose in place of code", "no text in slug, or no mapping in code"]
    assert found.skipped == dict.fromkeys([*once, SURROGATES, "not JSON"], 1) | {"fewer than two solutions": 2}
    assert found.examples["fewer than two solutions"][0].endswith('line 2: "lonely"')
    assert found.examples["not JSON"][0].endswith("line 6: {")
    assert found.examples[SURROGATES][0].encode()


ADD, SUBTRACT = ('Add two numbers; "fast".', PYTHON), ("Take one away.", "def sub(a, b):\n\n    return a - b")


def pair(query=ADD[0], positive=ADD[1], **others):
    return {"ID": "1", "Question": query, "code": positive, **others}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_columns_of_pairs_are_guessed_from_their_names_in_files_of_any_kind(tmp_path, name):
    file = write(tmp_path / name, [pair(lang="Python", label="1"), pair(*SUBTRACT, lang="Perl 6", label="0.2")])
    (source, settings), *others = resolve_pairs({"functions": "replaced", "pairs": str(file)}).items()
    assert (source, others) == ("pairs", [])
    names = {"query": "Question", "positive": "code", "negative": None, "score": "label", "language": "lang"}
    assert settings == {"source": str(file), "columns": names | {"repository": None}}
    found = read({"pairs": settings})["pairs"]
    assert found.texts == [RetrievalExample(ADD[0], (Snippet("python", PYTHON),))]
    assert found.skipped == {"label below 0.5": 1}
    columns = {"query": "code", "positive": "Question", "language": None}
    found = read({"pairs": str(file), "columns": columns, "min_score": 0})["pairs"]
    assert [text.description for text in found.texts] == [ADD[1], SUBTRACT[1]]


@pytest.mark.parametrize(
    ("header", "query", "positive"),
    [
        ("title,answer_code,answer_id,code_language", "title", "answer_code"),
        ("Question text,code-text", "Question text", "code-text"),
        ("code,answer_code,the question", "the question", "code"),
        ("title,answer_code,code_2", "", "positive"),  # two columns fit
        ("question_answer,code", "query", ""),  # one column fits two roles
    ],
)
def test_a_column_that_alone_has_a_known_word_in_its_name_is_guessed(tmp_path, header, query, positive):
    (tmp_path / "pairs.csv").write_text(f"{header}\n" + ",".join("abcd"[: header.count(",") + 1]) + "\n")
    if missing := {"query", "positive"} & {query, positive}:
        with raises("data.pairs.columns", *missing):
            resolve_pairs({"pairs": str(tmp_path / "pairs.csv")})
    else:
        columns = resolve_pairs({"pairs": str(tmp_path / "pairs.csv")})["pairs"]["columns"]
        assert (columns["query"], columns["positive"]) == (query, positive)
        assert columns["language"] is None


def test_negatives_of_pairs_are_texts_or_lists_and_a_lone_repository_separates_nothing(tmp_path):
    rows = [pair(negatives=["x = 1", "x = 2"], repo="me/mine"), pair(*SUBTRACT, negatives="x = 3", repo="me/mine")]
    settings = resolve_pairs({"pairs": str(write(tmp_path / "a.jsonl", rows))})
    assert pairs.have_negatives(settings)
    found = read(settings)["pairs"].texts
    assert [(one.negative.code, one.repository) for one in found] == [("x = 1", ""), ("x = 3", "")]


def test_bad_pairs_are_counted_and_three_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_rows, "_MAX_LINE_VALUES", 1000)
    bad = {"empty Question": pair(" "), "empty code": pair(positive=None), "code is not a text": pair(positive=3)}
    bad |= {"code has more than 100,000 characters": pair(positive="x" * 100_001), SURROGATES: pair("\ud800")}
    bad |= {"code equals another text of the row": pair("x", "x"), "not JSON": "{"}
    bad |= {"more than 1,000 values": pair(values=[0] * 1000), "score is not a number": pair(score=10**4200 - 1)}
    rows = [row for row in bad.values() for _ in range(4)]
    rows[rows.index(bad[SURROGATES])] = pair(repo="\ud800")
    file = write(tmp_path / "a.jsonl", [one if isinstance(one, str) else {"score": 1} | one for one in [pair(), *rows]])
    found = read({"pairs": str(file)})["pairs"]
    assert (len(found.texts), found.skipped) == (1, dict.fromkeys(bad, 4))
    assert {reason: len(shown) for reason, shown in found.examples.items()} == dict.fromkeys(bad, 3)
    csv_file = write(tmp_path / "a.csv", [pair(), "lonely"])
    assert read({"pairs": str(csv_file)})["pairs"].skipped == {"not 3 fields": 1}


PACKED = gzip.compress(b'{"query": "a", "code": "1"}\n' * 200, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "key", "value"),
    [
        ("a.csv", b"", "empty", "it is empty"),
        ("a.csv", b"query,code\n", "empty", "has no row"),
        ("a.csv", b'query,code\nx,y = 1,z\n"add,x = 1\nsub,x = 2\n', "empty", "a.csv, line 2"),
        ("a.csv", b'query,code\n"add,x = 1\nsub,x = 2\n', "empty", "quotation mark"),
        ("a.csv", "query,çode\nçédille,x\n".encode("latin-1"), "damaged", "read: line 1 is not in UTF-8"),
        ("a.csv", "query,code\na,x\n".encode("utf-16"), "damaged", "read: line 1 is not in UTF-8"),
        ("a.csv", b'query,code\n"a\nb",x\n"c\n\xe7",x\nd,y\n', "damaged", "a.csv, line 2: line 5 is not in UTF-8"),
        ("a.tsv", b"query\tcode\n" + b"a\tx\n" * 9000 + b"\xe7\ty\nb\tz\n" * 9000, "damaged", ": line 9002 is not"),
        ("a.jsonl", b"", "empty", "it is empty"),
        ("a.jsonl", b'{"query": ' + b"[" * 100_000, "empty", "a.jsonl, line 1: not JSON"),
        ("a.parquet", b"PAR1", "unreadable", "not parquet"),
        ("a.csv.gz", b"query,code\n", "damaged", "Not a gzipped file"),
        ("a.jsonl.gz", PACKED[:-9], "damaged", "ended before"),
        ("a.jsonl.gz", PACKED[:30] + bytes(20) + PACKED[50:], "damaged", "decompressing"),
    ],
)
def test_a_file_that_holds_no_pair_is_named_with_the_reason(tmp_path, name, content, key, value):
    (tmp_path / name).write_bytes(content)
    with raises(f"data.source.{key}", tmp_path / name, value):
        read({"pairs": str(tmp_path / name)})


ODD = {
    "date": pyarrow.array([10**7], pyarrow.date32()),
    "zone": pyarrow.array([0], pyarrow.timestamp("us", tz="Mars/Olympus")),
    "span": pyarrow.array([2**62], pyarrow.duration("s")),
    "map": pyarrow.array([[("a", "x")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
}


@pytest.mark.parametrize("name", ODD)
def test_parquet_may_have_columns_of_any_type_that_are_not_read(tmp_path, name):
    table = pyarrow.table({"query": ["Adds."], "code": ["x = 1"], "odd": ODD[name]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [one.description for one in read({"pairs": str(tmp_path / "a.parquet")})["pairs"].texts] == ["Adds."]
    if name == "map":
        assert rows_of(tmp_path / "a.parquet")[0]["odd"] == [("a", "x")]
    else:
        with raises("data.source.damaged", tmp_path / "a.parquet"):
            rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"triplets": None}, "data.sources", "none"),
        ({}, "data.sources", "triplets, functions, parallel"),
        ({"tripletz": "x"}, "settings.unknown", "did you mean triplets?"),
        ({"triplets": {"source": None}}, "data.source.options", "data.triplets"),
        ({"triplets": {"source": "FOLDER/a.jsonl", "columns": {"text": "x"}}}, "data.source.options", "data.triplets"),
        *(({name: odd}, "data.source.no_files", "owner/name") for name in ("pairs", "triplets") for odd in ([None], 1)),
        ({"pairs": {"source": True}}, "data.source.no_files", "True"),
        ({"functions": "code"}, "data.source.missing", "code"),
        ({"triplets": "FOLDER/a.jsonl"}, "data.source.empty", "1 × empty func2"),
        ({"parallel": "missing.jsonl"}, "data.source.no_files", "missing.jsonl"),
        ({"pairs": "FOLDER/pair.csv"}, "data.source.no_files", "pairs.csv"),
        ({"pairs": "FOLDER/pairs"}, "data.source.no_files", "pairs.csv"),
        ({"pairs": "FOLDER/pairs.json"}, "data.source.no_files", ".jsonl"),
        ({"pairs": "FOLDER/pairs.csv", "columns": {"query": "c"}}, "data.source.column", "are a,  b"),
        ({"pairs": "FOLDER/pairs.csv"}, "data.pairs.columns", "query and the positive"),
        ({"pairs": "FOLDER/pairs.csv", "columns": {"quary": "a b"}}, "settings.unknown", "query"),
        ({"pairs": {"columns": {}}}, "data.pairs.columns", "data.pairs"),
        *(
            ({"pairs": "FOLDER/pairs.csv", "columns": one}, "data.pairs.columns", "{query: ")
            for one in (True, 5, "a b", ["a b"])
        ),
        ({"pairs": "FOLDER/twice.csv"}, "data.source.damaged", "the column code twice"),
        ({"pairs": "FOLDER/open.csv", "columns": {"query": "a", "positive": "b"}}, "data.source.damaged", "open.csv"),
    ],
)
def test_sources_that_cannot_be_used_are_refused_without_the_hub(tmp_path, settings, key, value):
    write(tmp_path / "a.jsonl", [row(func2="")])
    write(tmp_path / "pairs.csv", [{"a, b": 1}]).with_suffix(".json").write_text("{}")
    (tmp_path / "twice.csv").write_text("query,code,code\na,b,c\n")
    (tmp_path / "open.csv").write_text('a,b\n"open,' + "x" * 10_000_001)
    with raises(key, value):
        read(json.loads(json.dumps(settings).replace("FOLDER", str(tmp_path))))
