"""What is asked for each row: into which language, in which words.

The form of the prompt is the paper's (arXiv 2503.03008, section on SynthCoNL): an instruction, the source language, the
target language, the code.
"""

import hashlib
from collections.abc import Sequence
from string import Formatter

from modular_star_encoder.data.source_files import LANGUAGES
from modular_star_encoder.dataset.completions import CompletionRequest

LANGUAGE_NAMES = {
    "python": "Python",
    "javascript": "JavaScript",
    "go": "Go",
    "java": "Java",
    "php": "PHP",
    "ruby": "Ruby",
    "c": "C",
    "cpp": "C++",
}
"""The languages as prompts and tables write them."""

PROMPT = """\
Translate the function below from {source_language} to {target_language}. Keep what it does and the idiom of the \
target language. Answer with the translated code alone, in one code block, without explanations.

Source language: {source_language}
Target language: {target_language}
Code:
{code}
"""

_FIELDS = {"source_language", "target_language", "code"}


def target_language(row_id: str, source_language: str, *, seed: int, targets: Sequence[str] = LANGUAGES) -> str:
    """Draw the language that a row is translated to, uniformly among the `targets` other than its own.

    The draw is a function of the seed and the row's id alone: neither the order nor the number of the rows matters.

    Raises:
        ValueError: If `targets` has no language other than `source_language`.
    """
    others = sorted(set(targets) - {source_language})
    if not others:
        raise ValueError(f"There is no language to translate {source_language} to; targets are {', '.join(targets)}.")
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return others[int.from_bytes(digest[:8]) % len(others)]


def check_prompt(prompt: str) -> None:
    """Check a template of prompts.

    Raises:
        ValueError: If its fields are not `{source_language}`, `{target_language}` and `{code}`.
    """
    try:
        fields = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        raise ValueError(f"The prompt is not a template: {error}; other braces are written twice.") from error
    if fields != _FIELDS:
        raise ValueError(
            "The prompt must have the fields {source_language}, {target_language} and {code}, and no others; "
            "other braces are written twice."
        )


def translation_request(
    row_id: str, code: str, source_language: str, target: str, prompt: str = PROMPT
) -> CompletionRequest:
    """Return what a model is asked for one row.

    Args:
        row_id: Id of the row.
        code: The function.
        source_language: One of `LANGUAGES`, that of the code.
        target: One of `LANGUAGES`, to translate to.
        prompt: A template that `check_prompt` accepts.
    """
    names = {"source_language": LANGUAGE_NAMES[source_language], "target_language": LANGUAGE_NAMES[target]}
    return CompletionRequest(row_id, prompt.format(**names, code=code))
