from pathlib import Path

import pytest
import yaml

from modular_star_encoder.synthconl.build import EXAMPLE, DatasetRecipe, load_dataset_recipe

ROOT = Path(__file__).parent.parent.parent
TRANSLATION = {"backend": "openai", "model": "model", "options": {"base_url": "http://127.0.0.1:1/v1"}}
SETTINGS = {"corpus": {"folder": "code"}, "translation": TRANSLATION}


def test_the_example_is_a_recipe_of_the_papers_settings():
    recipe = load_dataset_recipe(ROOT / EXAMPLE, ["corpus.folder=/code", "translation.options.concurrency=3"])
    assert recipe.corpus == ({"folder": "/code"},)
    assert recipe.translation.model == "Qwen/Qwen2.5-Coder-7B-Instruct"
    assert recipe.translation.options["concurrency"] == 3
    assert recipe.near_duplicates.threshold == 0.7
    assert tuple(recipe.near_duplicates.columns) == ("func1_CSN", "func2")
    recipe.translation.open()


def test_several_corpora_are_a_list():
    recipe = DatasetRecipe(**SETTINGS | {"corpus": [{"folder": "a"}, {"codesearchnet": "b"}]})
    assert recipe.corpus == ({"folder": "a"}, {"codesearchnet": "b"})


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"corpora": 1}, ["corpora", "corpus"]),
        ({"corpus": None}, ["corpus", "None"]),
        ({"corpus": []}, ["corpus", "[]"]),
        ({"translation": None}, ["translation"]),
        ({"translation": TRANSLATION | {"modle": 1}}, ["translation", "modle"]),
        ({"translation": {"backend": "vllm"}}, ["translation", "model"]),
        ({"translation": TRANSLATION | {"targets": ["go"]}}, ["targets", "go"]),
        ({"languages": ["cobol"]}, ["'cobol'"]),
        ({"max_syntax_error_share": 1.5}, ["max_syntax_error_share", "1.5"]),
        ({"validation_rows": 0}, ["validation_rows", "0"]),
        ({"near_duplicates": {"threshold": 2}}, ["threshold", "2"]),
        ({"near_duplicates": {"columns": ["code"]}}, ["columns", "'func1_CSN' or 'func2'", "'code'"]),
        ({"near_duplicates": {"columns": "func2"}}, ["columns", "'func2'"]),
        ({"near_duplicates": 0.7}, ["near_duplicates", "0.7"]),
        ({"against": {"benchmark": {"source": "a"}}}, ["against.benchmark", "{'source': 'a'}"]),
        ({"against": ["benchmark"]}, ["against", "['benchmark']"]),
        ({"card": {"title": "x"}}, ["card", "title"]),
        ({"card": {"tags": "security"}}, ["tags", "'security'"]),
        ({"card": {"tags": [2024]}}, ["tags", "2024"]),
    ],
)
def test_a_wrong_recipe_is_one_sentence_that_names_the_setting(tmp_path, changes, values):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS | changes))
    with pytest.raises(ValueError) as error:  # noqa: PT011  keys are those of the settings
        load_dataset_recipe(tmp_path / "recipe.yaml")
    sentence = str(error.value)
    assert all(value in sentence for value in [str(tmp_path / "recipe.yaml"), *values]), sentence
    assert "\n" not in sentence


def test_a_recipe_that_is_not_there_names_one_that_is(tmp_path):
    with pytest.raises(ValueError, match=EXAMPLE):
        load_dataset_recipe(tmp_path / "recipe.yaml")
