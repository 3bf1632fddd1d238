"""Search a code folder with questions in prose and keep nothing: everything is embedded for every call.

For a folder that is asked more than once there is `index`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modular_star_encoder.data.functions import DocumentedFunction, extract_functions
from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.data.sources.repositories import CHECKOUT_MARKERS, folder_repositories
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.search.hits import Hit
from modular_star_encoder.search.snippets import last_line


def search_folder(
    folder: str | os.PathLike[str],
    queries: Sequence[str],
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    exit_layer: int | None = None,
    top_k: int = 5,
    progress: bool = True,
) -> list[list[Hit]]:
    """The `top_k` functions of `folder` nearest to each query by cosine similarity, best first.

    Every function of the eight languages counts, documented or not. Documentation is not embedded: what is found is
    what the code does. Which files are read is told by `data.repositories.folder_repositories` (no tests, no vendored
    code).

    Args:
        exit_layer: the exit that embeds functions and queries; the deepest of the model if None.

    Returns:
        One list per query, shorter than `top_k` where the folder has fewer functions.

    Raises:
        ValueError: no such folder, no function in it, a blank query, no query, or an exit that the model doesn't have.
    """
    if isinstance(queries, str) or not queries or not all(query.strip() for query in queries):
        raise ValueError("queries must be a list of at least one question, none of them blank.")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    exit_layer = model.config.check_exit(model.config.num_hidden_layers if exit_layer is None else exit_layer)
    functions = folder_functions(folder, progress=progress)

    def embed(texts: list[str], prompt: str) -> np.ndarray:
        options = {"exit_layers": (exit_layer,), "prompt": prompt, "progress": progress}
        return encode_exits(model, tokenizer, texts, **options)[exit_layer]

    instructions = model.config.instruction_prompts
    prompted = [code_prompt(function.language, instructions=instructions) + function.code for function in functions]
    codes = embed(prompted, prompt="")
    scores = embed(list(queries), prompt=text_prompt(instructions=instructions)) @ codes.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    prefix = _prefixes(folder, functions)
    return [
        [
            Hit(
                prefix[functions[i].repository] + functions[i].path,
                functions[i].line,
                functions[i].name,
                float(scores[row, i]),
                exit_layer,
                last_line(functions[i].line, functions[i].source),
                functions[i].language,
                functions[i].code,
            )
            for i in columns
        ]
        for row, columns in enumerate(best)
    ]


def folder_functions(folder: str | os.PathLike[str], *, progress: bool = True) -> list[DocumentedFunction]:
    """All functions of a code folder, in the order of its files; those without documentation have an empty description.

    Raises:
        ValueError: no such folder, or no function in it.
    """
    reader = folder_repositories(folder)
    functions: list[DocumentedFunction] = []
    files = tqdm(reader, total=length_hint(reader), desc="reading", unit="file", disable=not progress, leave=False)
    for file in files:
        functions += extract_functions(file, documented_only=False)
    if not functions:
        raise ValueError(f"{os.fspath(folder)!r} holds no function in {', '.join(LANGUAGES)}.")
    return functions


def _prefixes(folder: str | os.PathLike[str], functions: Sequence[DocumentedFunction]) -> dict[str, str]:
    """What goes before a path, for each repository: paths are relative to their repository, not to `folder`."""
    root = Path(folder)
    is_repository = any((root.expanduser() / marker).exists() for marker in CHECKOUT_MARKERS)
    names = {function.repository for function in functions}
    return {name: os.path.join(root if is_repository or name == "." else root / name, "") for name in names}
