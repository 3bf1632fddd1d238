"""Defines the prompts of the published models, and the special tokens that the encoder expects around a text.

A text enters the encoder as `<sep>{instruction}<sep>{text}<cls>`. The tokenizer's template adds the first `<sep>` and
the `<cls>`; a prompt is the instruction and the second `<sep>`. The instructions are those of the paper's model cards.
"""

from modular_star_encoder.data.languages import registry
from modular_star_encoder.data.languages.registry import display_name
from modular_star_encoder.utils.errors import UserError

PAD_TOKEN = "<pad>"  # noqa: S105 - a vocabulary entry, not a password
SEP_TOKEN = "<sep>"  # noqa: S105
CLS_TOKEN = "<cls>"  # noqa: S105
MASK_TOKEN = "<mask>"  # noqa: S105

SPECIAL_TOKENS = (PAD_TOKEN, SEP_TOKEN, CLS_TOKEN, MASK_TOKEN)  # in the order of their ids, 0 to 3, in our tokenizers

CODE_INSTRUCTION = "Represent this {language} code snippet for retrieval:"
ANY_CODE_INSTRUCTION = "Represent this code snippet for retrieval:"  # not published: those name the language
TEXT_INSTRUCTION = "Represent this code description for retrieving supporting snippets of code:"

LANGUAGES = tuple(sorted(map(display_name, registry.LANGUAGES)))  # as a prompt writes them


def code_prompt(language: str | None = None, *, instructions: bool = True) -> str:
    """Return the prompt to put before code in `language`: `"{instruction}<sep>"`; `""` if `instructions` is False."""
    if not instructions:
        return ""
    if not language:
        return ANY_CODE_INSTRUCTION + SEP_TOKEN
    name = display_name(language)
    if not name or any(token in name for token in SPECIAL_TOKENS):
        raise UserError("data.prompt.language", f"language must be a name such as 'python', or None; not {language!r}.")
    return CODE_INSTRUCTION.format(language=name) + SEP_TOKEN


def text_prompt(*, instructions: bool = True) -> str:
    """Return the prompt to put before a query in prose: `"{instruction}<sep>"`; `""` if `instructions` is False."""
    return TEXT_INSTRUCTION + SEP_TOKEN if instructions else ""


def sentence_transformer_prompts(*, instructions: bool = True) -> dict[str, str]:
    """Return {name: prompt} for `SentenceTransformer(prompts=…)`, with names such as query and document_python."""
    by_language = {f"document_{name}": code_prompt(name, instructions=instructions) for name in LANGUAGES}
    document = code_prompt(instructions=instructions)
    return {"query": text_prompt(instructions=instructions), "document": document, **by_language}
