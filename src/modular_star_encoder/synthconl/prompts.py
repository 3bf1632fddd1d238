"""What a model is asked for one function, and what is accepted of its answer."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from modular_star_encoder.data.functions import code_key
from modular_star_encoder.data.languages.parsing import holds_function, syntax_error_share
from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.synthconl.backends import ERROR, TOO_LONG, CompletionRequest
from modular_star_encoder.utils.errors import UserError

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
"""The languages in prompts and tables."""

PROMPT = """\
Translate the function below from {source_language} to {target_language}. Keep what it does and the idiom of the \
target language. Answer with the translated code alone, in one code block, without explanations.

Source language: {source_language}
Target language: {target_language}
Code:
{code}
"""


def target_language(row_id: str, source_language: str, *, seed: int, targets: Sequence[str] = LANGUAGES) -> str:
    """Draw the language to translate a row to, uniformly among the `targets` other than its own.

    The draw depends on the seed and the row's id alone: neither the order nor the number of the rows matters.

    Raises:
        UserError: `synthconl.targets`: `targets` has no other language.
    """
    others = sorted(set(targets) - {source_language})
    if not others:
        message = f"targets must have a language other than {source_language}, not only {', '.join(targets)}."
        raise UserError("synthconl.targets", message)
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return others[int.from_bytes(digest[:8]) % len(others)]


def check_prompt(prompt: str) -> str:
    """Check a template of prompts and return it.

    Raises:
        UserError: `synthconl.prompt`: its fields are not `{source_language}`, `{target_language}` and `{code}`.
    """
    try:
        fields = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        fields = {str(error)}
    if fields != {"source_language", "target_language", "code"}:
        message = (
            "The prompt must be a template with the fields {source_language}, {target_language} and {code} and no "
            f"others; write other braces twice. Found: {', '.join(sorted(fields))}."
        )
        raise UserError("synthconl.prompt", message)
    return prompt


def translation_request(
    row_id: str, code: str, source_language: str, target: str, prompt: str = PROMPT
) -> CompletionRequest:
    """The request for one row.

    Args:
        row_id: Id of the row.
        code: The function.
        source_language: One of `LANGUAGES`, that of the code.
        target: One of `LANGUAGES`, to translate to.
        prompt: A template that `check_prompt` accepts.
    """
    names = {"source_language": LANGUAGE_NAMES[source_language], "target_language": LANGUAGE_NAMES[target]}
    return CompletionRequest(row_id, prompt.format(**names, code=code))


MAX_SYNTAX_ERROR_SHARE = 0.05

REASONS = (
    "not answered",
    "prompt too long",
    "refused",
    "truncated",
    "empty",
    "same as the source",
    "not the target language",
    "unparsable",
    "no function",
)
"""Why a translation is rejected, in the order of the checks."""

_REASON_OF_FINISH = {
    ERROR: "not answered",
    TOO_LONG: "prompt too long",
    "content_filter": "refused",
    "length": "truncated",
}

_TAGS = {
    "python": ("python", "py", "python3"),
    "javascript": ("javascript", "js", "node", "jsx", "mjs"),
    "go": ("go", "golang"),
    "java": ("java",),
    "php": ("php",),
    "ruby": ("ruby", "rb"),
    "c": ("c", "h"),
    "cpp": ("cpp", "c++", "cc", "cxx", "hpp"),
}
_LANGUAGE_OF_TAG = {tag: language for language, tags in _TAGS.items() for tag in tags}

_BLOCK = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<tag>[\w+#.-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*(?P=fence)[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
# The text of reasoning models before their answer; its opening tag may have been part of the prompt.
_REASONING = re.compile(r"\A(?:\s*<think>.*?(?:</think>|\Z)|.*?^[ \t]*</think>[ \t]*$)", re.MULTILINE | re.DOTALL)
_OPENING = re.compile(
    r"\A\s*(?:sure|certainly|of course|okay|here(?:'s| is| are)|below|this is|the (?:following|translated))\b"
    r"[^\n]*[:.!][ \t]*\n",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\n[ \t]*\n(?:(?:notes?|explanation|key changes|key differences):|(?:note that|please note|let me know|i hope)\b|"
    r"(?:in )?(?:this|the (?:above|translated)) (?:code|function|method|translation|implementation|version)\b).*\Z",
    re.IGNORECASE | re.DOTALL,
)
_REFUSAL = re.compile(
    r"\A\s*(?:(?:sorry|unfortunately),|(?:i(?:'|’| a)m (?:sorry|unable|not able|afraid)|i apologi[sz]e|"
    r"i can(?:'|’|no)t|as an ai)\b)",
    re.IGNORECASE,
)
_PHP_TAGS = re.compile(r"\A\s*<\?php\b[ \t]*\n?|\n?\?>\s*\Z")


@dataclass(frozen=True, slots=True)
class Translation:
    """A translated function, or why there is none."""

    code: str  # the function; empty if it is rejected
    rejected: str = ""  # one of `REASONS`; empty if it is accepted


def clean_translation(
    text: str,
    finish_reason: str,
    *,
    source: str,
    source_language: str,
    target_language: str,
    max_error_share: float = MAX_SYNTAX_ERROR_SHARE,
) -> Translation:
    """Take the code out of an answer and accept or reject it.

    The code is that of the answer's code block, of several the longest in the target language; without a block, it is
    the answer without the sentences before and after. Reasoning (`<think>…</think>`) is removed first. The code is
    accepted if it contains a function and parses as the target language, or nearly so and not better as the source
    language. Grammars forgive much: of 200 real functions of one language, up to 72 % parse as another with few errors
    (JavaScript as C++); this rule accepts up to 23 % (Java as C++), and all as their own language.

    Args:
        text: The answer.
        finish_reason: Why it ended; see `Completion`.
        source: The function to translate.
        source_language: Its language.
        target_language: The language to translate to.
        max_error_share: Largest share of a translation that may fail to parse as the target language; 1 skips
            the check.
    """
    reason = _REASON_OF_FINISH.get(finish_reason)
    if reason:
        return Translation("", reason)
    text = _REASONING.sub("", text.replace("\r\n", "\n"))  # a fence ends with its line
    block = _block(text, target_language)
    language, code = block or ("", _CLOSING.sub("", _OPENING.sub("", text)))
    code = (_PHP_TAGS.sub("", code) if target_language == "php" else code).strip("\n").rstrip()
    if not code:
        reason = "empty"
    elif block is None and _REFUSAL.match(text):
        reason = "refused"
    elif code_key(code) == code_key(source):
        reason = "same as the source"
    elif language not in ("", target_language):
        reason = "not the target language"
    else:
        reason = _fault(code, source_language, target_language, max_error_share)
    return Translation("", reason) if reason else Translation(code)


def _block(text: str, target: str) -> tuple[str, str] | None:
    """The language that a code block says it is in, or "", and its code; None if there is no block."""
    blocks = [(_LANGUAGE_OF_TAG.get(block["tag"].lower(), ""), block["code"]) for block in _BLOCK.finditer(text)]
    # The longest in the target language, else in none that is known, else in another one.
    return max(blocks, key=lambda block: (block[0] == target, block[0] == "", len(block[1])), default=None)


def _fault(code: str, source: str, target: str, max_error_share: float) -> str:
    """Why the syntax of code is rejected; "" if it is accepted."""
    if max_error_share >= 1:
        return ""
    share = syntax_error_share(code, target)
    if share == 0 or (share <= max_error_share and syntax_error_share(code, source) > 0):
        return "" if holds_function(code, target) else "no function"
    others = (language for language in LANGUAGES if language != target)
    return "not the target language" if any(syntax_error_share(code, other) == 0 for other in others) else "unparsable"
