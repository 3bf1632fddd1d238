from pathlib import Path

import pytest
import yaml

from modular_star_encoder.synthconl.recipe import EXAMPLE, DatasetRecipe, load_dataset_recipe

ROOT = Path(__file__).parent.parent.parent
TRANSLATION = {"backend": "openai", "model": "model", "options": {"base_url": "http://127.0.0.1:1/v1"}}
SETTINGS = {"corpus": {"folder": "code"}, "translation": TRANSLATION}


def test_the_example_is_a_recipe_of_the_papers_settings():
    recipe = load_dataset_recipe(ROOT / EXAMPLE, ["corpus.folder=/code", "translation.options.concurrency=3"])
    assert recipe.corpus == ({"folder": "/code"},)
    assert recipe.translation.model == "Qwen/Qwen2.5-Coder-7B-Instruct"
    assert recipe.translation.options["concurrency"] == 3
    assert recipe.duplicate_settings.threshold == 0.7
    assert tuple(recipe.duplicate_columns) == ("func1_CSN", "func2")
    recipe.translation.open()


def test_several_corpora_are_a_list():
    recipe = DatasetRecipe(**SETTINGS | {"corpus": [{"folder": "a"}, {"codesearchnet": "b"}]})
    assert recipe.corpus == ({"folder": "a"}, {"codesearchnet": "b"})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"corpora": 1}, "unknown settings corpora; known are against, card, corpus"),
        ({"corpus": None}, "corpus must be a mapping such as"),
        ({"corpus": []}, "corpus must be a mapping such as"),
        ({"translation": None}, "translation must be a mapping"),
        ({"translation": TRANSLATION | {"modle": 1}}, "translation has unknown settings modle"),
        ({"translation": {"backend": "vllm"}}, "translation is incomplete"),
        ({"translation": TRANSLATION | {"targets": ["go"]}}, "a language other than go"),
        ({"languages": ["cobol"]}, "'cobol' is unknown"),
        ({"max_syntax_error_share": 1.5}, "from 0 to 1"),
        ({"validation_rows": 0}, "at least 1"),
        ({"near_duplicates": {"threshold": 2}}, "threshold must be above 0 and at most 1"),
        ({"near_duplicates": {"columns": ["code"]}}, r"columns must be a list out of func1_CSN, func2, not \['code'\]"),
        ({"near_duplicates": {"columns": "func2"}}, "columns must be a list"),
        ({"against": {"benchmark": {"source": "a"}}}, r"against\.benchmark must have a source and a column"),
        ({"against": ["benchmark"]}, r"against must be a mapping of settings, not \['benchmark'\]"),
        ({"near_duplicates": 0.7}, r"near_duplicates must be a mapping of settings, not 0\.7"),
        ({"card": {"title": "x"}}, "card has unknown settings title"),
        ({"card": {"tags": "security"}}, "tags must be a list of words, not 'security'"),
        ({"card": {"tags": [2024]}}, r"tags must be a list of words, not \[2024\]"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, changes, sentence):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS | changes))
    with pytest.raises(ValueError, match=sentence) as error:
        load_dataset_recipe(tmp_path / "recipe.yaml")
    assert str(tmp_path / "recipe.yaml") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_there_names_one_that_is(tmp_path):
    with pytest.raises(ValueError, match=f"There is no recipe .*; ours are {EXAMPLE} and others"):
        load_dataset_recipe(tmp_path / "recipe.yaml")
