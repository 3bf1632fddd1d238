"""Parallel exercises: the same problem solved in many languages; text → code and code → code, MRR.

Protocol: for a pair of languages (or the description and a language), the exercises that both have; of one side's text,
find the other side's among all of them. Figures are per pair; tables average over the languages that one starts from.

Source: JSON lines with `slug`, `description` (Markdown) and `code` ({language: solution}); Exercism's tracks
(github.com/exercism, MIT) hold such. Flaws: pools are small (71 to 146), and solutions share the names that the
exercise prescribes: TF-IDF gets 81 from descriptions and 88 from code. The variant with masked names shows what is
left.
"""

from __future__ import annotations

from pathlib import Path

from modular_star_encoder.evaluation.benchmarks.rows import check_unique, read_jsonl, refuse, require_files
from modular_star_encoder.evaluation.masking import mask_names
from modular_star_encoder.evaluation.tasks import Judgements, RetrievalTask, Text, full_pool

PROMPT_NAMES = {"cpp": "c++", "csharp": "c#"}
"""Where the files' name of a language differs from the one in prompts."""

DESCRIPTION = "text"

Exercises = dict[str, dict[str, Text]]
"""{slug: {language or `DESCRIPTION`: text}}"""


def load_exercism(folder: Path, *, from_code: bool = False, masked: bool = False) -> list[RetrievalTask]:
    """Text → code: a task for each language. Code → code: one for each ordered pair of languages.

    Args:
        from_code: code → code.
        masked: replace names in code (see `masking`).

    Raises:
        ValueError: a damaged file, a slug that comes twice, or a solution that is no text.
        FileNotFoundError: there is no `exercises.jsonl`.
    """
    (path, *_) = require_files(folder, ("exercises.jsonl.gz", "exercises.jsonl"))
    exercises = _read(path, masked)
    languages = sorted({language for texts in exercises.values() for language in texts} - {DESCRIPTION})
    pairs = [(source, target) for target in languages for source in languages if source != target]
    if not from_code:
        pairs = [(DESCRIPTION, language) for language in languages]
    name = f"exercism-{'code' if from_code else 'text'}{'-masked' if masked else ''}"
    tasks = [task for pair in pairs if (task := _task(name, exercises, *pair))]
    return tasks or refuse(path, None, "two exercises that are solved in the same languages")


def _task(name: str, exercises: Exercises, source: str, target: str) -> RetrievalTask | None:
    shared = [slug for slug, texts in exercises.items() if source in texts and target in texts]
    if len(shared) < 2:
        return None
    return RetrievalTask(
        benchmark=name,
        name=f"{source} → {target}",
        queries=[exercises[slug][source] for slug in shared],
        documents=[exercises[slug][target] for slug in shared],
        query_ids=shared,
        judgements=Judgements.one_each(range(len(shared))),
        pools=full_pool(len(shared), len(shared)),
        column=f"→ {target}",
    )


def _read(path: Path, masked: bool) -> Exercises:
    rows = read_jsonl(path, {"slug": str, "description": str, "code": dict})
    check_unique(path, [row["slug"] for row in rows], "slug")
    exercises: Exercises = {}
    for number, row in enumerate(rows, start=1):
        texts = {DESCRIPTION: Text(row["description"])}
        for language, code in row["code"].items():
            if not isinstance(code, str) or not code.strip():
                refuse(path, number, f"a solution in {language}", "none")
            known_as = PROMPT_NAMES.get(language, language)
            texts[language] = Text(mask_names(code, known_as) if masked else code, known_as)
        exercises[row["slug"]] = texts
    return exercises
