"""Cards from the templates in model_cards."""

from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render_card(template: str, **values: Any) -> str:
    """A card: YAML metadata and Markdown.

    Args:
        template: name of a file in model_cards.
        values: what it shows; one that is missing is an error.
    """
    environment = Environment(  # noqa: S701  Markdown, not HTML
        loader=FunctionLoader(_read),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = cell
    return environment.get_template(template).render(**values).lstrip()


def _read(name: str) -> str:
    return files("modular_star_encoder.model_cards").joinpath(name).read_text(encoding="utf-8")


def cell(value: Any) -> str:
    """What stands in a cell of a Markdown table."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")
