"""Rows of CodeSearchNet (Husain et al. 2019) as pairs to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modular_star_encoder.data.codesearchnet import codesearchnet_function
from modular_star_encoder.evaluation.exits import RetrievalRow


def codesearchnet_row(row: Mapping[str, Any]) -> RetrievalRow:
    """The evaluation pair of one row, with `data.codesearchnet`'s rules: Python code loses its docstring.

    Raises:
        ValueError: a column is missing, or the docstring can't be taken out of the code.
    """
    function = codesearchnet_function(row)
    return RetrievalRow(function.description, function.code, function.language)
