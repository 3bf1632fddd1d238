"""Code translation as retrieval: of a Java function, find the C# one, and the other way round; MRR.

Protocol: CodeXGLUE's code-to-code-trans test split, line-aligned; every line of the other language is a candidate. Text
that comes twice ties with the answer and counts against the system: the test files hold 997 different Java and 995
different C# lines.

Source: Lu et al. 2021, github.com/microsoft/CodeXGLUE, Code-Code/code-to-code-trans: `test.java-cs.txt.java` and
`test.java-cs.txt.cs`. Flaw: nearly solved by shared names. Word TF-IDF gets 98.1 MRR; the variant with masked names
shows what is left.
"""

from __future__ import annotations

from pathlib import Path

from modular_star_encoder.evaluation.benchmarks.rows import check_size, read_lines, refuse, require_files
from modular_star_encoder.evaluation.masking import mask_names
from modular_star_encoder.evaluation.tasks import Judgements, RetrievalTask, Text, full_pool

SIZE = 1_000
LANGUAGES = {"java": "java", "cs": "c#"}


def load_translation(folder: Path, *, masked: bool = False, allow_subset: bool = False) -> list[RetrievalTask]:
    """Java → C# and C# → Java.

    Args:
        masked: replace names (see `masking`).

    Raises:
        ValueError: a partial file, an empty line, or files of different lengths.
        FileNotFoundError: one of the two files is missing.
    """
    (first, *_), (second, *_) = (require_files(folder, [f"test.java-cs.txt.{ending}"]) for ending in LANGUAGES)
    texts = {"java": _read(first, "java", masked), "c#": _read(second, "c#", masked)}
    notes = check_size(first, len(texts["java"]), SIZE, "lines", allow_subset=allow_subset)
    if len(texts["java"]) != len(texts["c#"]):
        refuse(second, None, f"{len(texts['java']):,} lines, as in {first.name}", f"{len(texts['c#']):,}")
    size = len(texts["java"])
    return [
        RetrievalTask(
            benchmark="translation-masked" if masked else "translation",
            name=f"{source} → {target}",
            queries=texts[source],
            documents=texts[target],
            query_ids=[f"line {number}" for number in range(1, size + 1)],
            judgements=Judgements.one_each(range(size)),
            pools=full_pool(size, size),
            notes=notes,
        )
        for source, target in (("java", "c#"), ("c#", "java"))
    ]


def _read(path: Path, language: str, masked: bool) -> list[Text]:
    texts = []
    for number, line in read_lines(path):
        if not line.strip():
            refuse(path, number, "a function", "an empty line")
        texts.append(Text(mask_names(line, language) if masked else line, language))
    return texts or refuse(path, 1, "a function", "an empty file")
