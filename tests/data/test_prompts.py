import subprocess
import sys

import pytest

from modular_star_encoder.data.prompts import LANGUAGES, code_prompt, sentence_transformer_prompts, text_prompt
from tests.errors import raises


def test_prompts_are_worded_as_published_and_end_with_the_inner_separator():
    assert code_prompt("Python") == "Represent this python code snippet for retrieval:<sep>"
    assert code_prompt("cpp") == code_prompt("C++") == "Represent this c++ code snippet for retrieval:<sep>"
    assert code_prompt() == code_prompt("") == "Represent this code snippet for retrieval:<sep>"
    assert text_prompt() == "Represent this code description for retrieving supporting snippets of code:<sep>"
    for language in ("  ", "python<sep>"):
        with raises("data.prompt.language"):
            code_prompt(language)


def test_sentence_transformer_prompts_hold_queries_documents_and_every_language():
    prompts = sentence_transformer_prompts()
    assert prompts["query"] == text_prompt()
    assert prompts["document"] == code_prompt()
    assert {prompts[f"document_{language}"] for language in LANGUAGES} == set(map(code_prompt, LANGUAGES))
    assert len(prompts) == 2 + len(LANGUAGES)


@pytest.mark.slow
def test_reading_source_code_does_not_need_torch():
    script = "import sys; from modular_star_encoder.data import pairs, prompts; from modular_star_encoder.data.sources "
    script += "import dataset_files, repositories; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_model_without_instructions_keeps_the_prompt_names_and_empties_the_prompts():
    empty = sentence_transformer_prompts(instructions=False)
    assert set(empty) == set(sentence_transformer_prompts())
    assert set(empty.values()) == {""}
    assert text_prompt(instructions=False) == code_prompt("python", instructions=False) == ""
