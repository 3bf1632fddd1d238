"""CodeSearchNet filtered by GraphCodeBERT, against every candidate of a language, query → code, MRR.

Protocol: queries are the test functions' documentation, candidates the code of development and test split
(`codebase.jsonl`); tokens joined by spaces; matched by url; a rank beyond 1000 counts 0; overall figure = unweighted
mean of the six languages. Ties count against the system here, where the authors' sort leaves them to chance.
`code_tokens` holds no docstring, so nothing leaks.

Source: Guo et al. 2021 (GraphCodeBERT), github.com/microsoft/CodeBERT, GraphCodeBERT/codesearch:
`{language}/test.jsonl` and `{language}/codebase.jsonl` as its preprocessing writes them. UniXcoder, CodeSage, CodeT5+,
CodeRankEmbed and nomic-embed-code report this one. The authors' models read 128 tokens of a query and 256 of code; here
the system's own limit holds.
"""

from __future__ import annotations

from pathlib import Path

from modular_star_encoder.evaluation.benchmarks.codesearchnet import LANGUAGES, joined_tokens
from modular_star_encoder.evaluation.benchmarks.rows import (
    check_size,
    check_unique,
    find_files,
    read_jsonl,
    refuse,
    require_files,
)
from modular_star_encoder.evaluation.tasks import Judgements, RetrievalTask, Text, full_pool

QUERIES = {"go": 8_122, "java": 10_955, "javascript": 3_291, "php": 14_014, "python": 14_918, "ruby": 1_261}
CANDIDATES = {"go": 28_120, "java": 40_347, "javascript": 13_981, "php": 52_660, "python": 43_827, "ruby": 4_360}


def load_full_pool(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """One task for each language whose folder is there.

    Raises:
        ValueError: a damaged or partial file, a url that comes twice, or a query whose code is no candidate.
        FileNotFoundError: no language, or one without its codebase.
    """
    require_files(folder, [f"{language}/test.jsonl*" for language in LANGUAGES])
    present = [language for language in LANGUAGES if find_files(folder, [f"{language}/test.jsonl*"])]
    return [_load_language(folder / language, language, allow_subset) for language in present]


def _load_language(folder: Path, language: str, allow_subset: bool) -> RetrievalTask:
    (test, *_), (codebase, *_) = (require_files(folder, [f"{name}.jsonl*"]) for name in ("test", "codebase"))
    queries = read_jsonl(test, {"url": str, "docstring_tokens": list})
    candidates = read_jsonl(codebase, {"url": str, "code_tokens": list})
    notes = check_size(test, len(queries), QUERIES[language], "queries", allow_subset=allow_subset)
    notes += check_size(codebase, len(candidates), CANDIDATES[language], "candidates", allow_subset=allow_subset)
    check_unique(test, [row["url"] for row in queries], "url")
    places = check_unique(codebase, [row["url"] for row in candidates], "url")
    relevant = []
    for number, row in enumerate(queries, start=1):
        if row["url"] not in places:
            refuse(test, number, f"a url that {codebase.name} holds", row["url"])
        relevant.append(places[row["url"]])
    return RetrievalTask(
        benchmark="codesearchnet-full",
        name=language,
        queries=[Text(joined_tokens(test, n, row, "docstring_tokens")) for n, row in enumerate(queries, start=1)],
        documents=[
            Text(joined_tokens(codebase, n, row, "code_tokens"), language) for n, row in enumerate(candidates, start=1)
        ],
        query_ids=[row["url"] for row in queries],
        judgements=Judgements.one_each(relevant),
        pools=full_pool(len(queries), len(candidates)),
        metrics=("mrr@1000", "recall@1", "recall@10", "ndcg@10"),
        notes=notes,
    )
