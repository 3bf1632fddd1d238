"""CodeSearchNet's human judgements: 99 web queries, NDCG within the annotated functions and of the full ranking.

Protocol (relevanceeval.py): grades 0 to 3, averaged over annotators; gain 2^grade − 1, discount log2(rank + 1); a
system returns its first 300 functions per query and language. `ndcg-judged@300` counts ranks among annotated functions
only, `ndcg-full@300` among all; queries without a positive grade are left out. Languages and queries are compared in
lower case.

Source: github.com/github/CodeSearchNet, `resources/annotationStore.csv` and src/relevanceeval.py. The candidates are
all functions of a language, documented or not. Their authors publish these as pickles
(`{language}_dedupe_definitions_v2.pkl`), which can run code when they are read and aren't read here: convert them to
JSON lines with `url` and `function`. The documented functions alone (`{language}/final/jsonl/…`) lack many annotated
ones, which takes `allow_subset`. Python code keeps its docstrings: they aren't the queries, and the annotators saw
them.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from modular_star_encoder.evaluation.benchmarks.codesearchnet import LANGUAGES
from modular_star_encoder.evaluation.benchmarks.rows import read_jsonl, read_lines, refuse, require_files
from modular_star_encoder.evaluation.tasks import Judgements, RetrievalTask, Text, full_pool

ANNOTATIONS = "annotationStore.csv"
ANNOTATION_ROWS = 4_006
COLUMNS = ("Language", "Query", "GitHubUrl", "Relevance")
CODE_FIELDS = ("function", "code", "func_code_string")

Grades = dict[str, dict[str, list[float]]]
"""{query: {url: the annotators' grades}}"""


def load_human(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """One task for each language whose functions are there.

    Args:
        folder: holds `annotationStore.csv` (also under `resources/`) and a folder of JSON lines for each language.

    Raises:
        ValueError: a damaged or partial file, or an annotated function that isn't there.
        FileNotFoundError: no annotations, or no functions.
    """
    (annotations, *_) = require_files(folder, (ANNOTATIONS, f"resources/{ANNOTATIONS}"))
    grades, rows = _read_grades(annotations)
    if rows != ANNOTATION_ROWS and not allow_subset:
        refuse(annotations, None, f"{ANNOTATION_ROWS:,} annotations", f"{rows:,}")
    patterns = [f"{language}/**/*.jsonl*" for language in LANGUAGES]
    require_files(folder, patterns)
    tasks = []
    for language in LANGUAGES:
        if files := sorted(folder.glob(f"{language}/**/*.jsonl*")):
            if language not in grades:
                refuse(annotations, None, f"annotations of {language}")
            tasks.append(_task(annotations, language, grades[language], _read_functions(files), allow_subset))
    return tasks


def _task(path: Path, language: str, grades: Grades, functions: dict[str, str], allow_subset: bool) -> RetrievalTask:
    places = {url: place for place, url in enumerate(functions)}
    annotated = {url for judged in grades.values() for url in judged}
    missing = sorted(annotated - set(functions))
    if missing and not allow_subset:
        refuse(path, None, f"the annotated functions of {language}", f"{len(missing)} missing, such as {missing[0]}")
    gains = [
        {places[url]: sum(given) / len(given) for url, given in judged.items() if url in places}
        for judged in grades.values()
    ]
    return RetrievalTask(
        benchmark="codesearchnet-human",
        name=language,
        queries=[Text(query) for query in grades],
        documents=[Text(code, language) for code in functions.values()],
        query_ids=list(grades),
        judgements=Judgements.of(gains),
        pools=full_pool(len(grades), len(functions)),
        metrics=("ndcg-judged@300", "ndcg-full@300"),
        notes=(f"{len(missing)} of {len(annotated)} annotated functions are missing",) if missing else (),
    )


def _read_grades(path: Path) -> tuple[dict[str, Grades], int]:
    """{language: grades} in lower case, and the number of annotations."""
    grades: dict[str, Grades] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    reader = csv.DictReader(line + "\n" for _, line in read_lines(path))
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        refuse(path, 1, f"the columns {', '.join(COLUMNS)}", f"no {missing[0]}")
    count = 0
    for row in reader:
        count += 1
        grade, url = row["Relevance"] or "", row["GitHubUrl"] or ""
        if grade not in {"0", "1", "2", "3"} or not url or not row["Query"] or not row["Language"]:
            refuse(path, reader.line_num, "a language, a query, a url and a relevance from 0 to 3", repr(grade))
        grades[row["Language"].lower()][row["Query"].lower()][url].append(float(grade))
    return grades, count


def _read_functions(paths: list[Path]) -> dict[str, str]:
    """{url: code}; of the same function in several files, the first."""
    functions: dict[str, str] = {}
    for path in paths:
        for number, row in enumerate(read_jsonl(path, {}), start=1):
            url = row.get("url", row.get("func_code_url"))
            code = next((row[name] for name in CODE_FIELDS if name in row), None)
            if not isinstance(url, str) or not isinstance(code, str) or not code.strip():
                refuse(path, number, "a url and the code of a function as 'function' or 'code'")
            functions.setdefault(url, code)
    return functions
