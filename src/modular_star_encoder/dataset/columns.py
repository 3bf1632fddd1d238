"""The columns of the dataset: SynthCoNL's as published, an id for every row, and what is known of its licence."""

import pyarrow as pa

FUNCTION_COLUMNS = (
    "id",
    "repository_name",
    "func_path_in_repository",
    "func_code_url",
    "language1_CSN",
    "func1_CSN",
    "func_documentation_string",
    "license",
)
"""What is known of a function before it is translated."""

DATASET_COLUMNS = (
    "repository_name",
    "func_path_in_repository",
    "func_documentation_string",
    "func_code_url",
    "language1_CSN",
    "func1_CSN",
    "language2",
    "func2",
    "id",
    "license",
)

MEANINGS = {
    "repository_name": "repository that the function comes from",
    "func_path_in_repository": "its file in there",
    "func_documentation_string": "what its author says it does",
    "func_code_url": "where to read it, if known",
    "language1_CSN": "its language",
    "func1_CSN": "the function, as written by people",
    "language2": "the language that it was translated to",
    "func2": "the translation, as written by the model",
    "id": "id of the row, a function of where the function was found and of its code",
    "license": "licence of the repository or file, if the source says it",
}

FUNCTION_SCHEMA = pa.schema([(name, pa.string()) for name in FUNCTION_COLUMNS])
DATASET_SCHEMA = pa.schema([(name, pa.string()) for name in DATASET_COLUMNS])

CODE_COLUMNS = ("func1_CSN", "func2")

_PUBLISHED_NAMES = {"cpp": "c++"}


def published_name(language: str) -> str:
    """The name of one of `LANGUAGES` in the dataset and in prompts: `"cpp"` is `"c++"` there."""
    return _PUBLISHED_NAMES.get(language, language)
