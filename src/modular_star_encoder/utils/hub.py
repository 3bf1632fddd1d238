"""What the Hub's client raises, as one sentence."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FunctionLoader, StrictUndefined

CONFLICT = 412
"""The status by which the Hub refuses a commit whose parent is no longer the newest."""


def check_repository_id(repository: str) -> None:
    """Refuse what is no id of a repository.

    Raises:
        ValueError: `repository` is not of the form owner/name.
    """
    try:
        validate_repo_id(repository)
        valid = "/" in repository
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(f"{repository!r} is no id of a repository such as owner/name.")


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into an OSError of one sentence, without any access token.

    Args:
        repository: id of the repository that is read or written.

    Raises:
        OSError: the Hub refuses, or can't be reached.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError("The Hub needs a token: log in with `hf auth login`, or set HF_TOKEN.") from error
    except (HfHubHTTPError, RuntimeError, *network_errors()) as error:
        raise OSError(_sentence(repository, error)) from error


def _sentence(repository: str, error: Exception) -> str:
    """What happened; the client wraps the error of a single file into a RuntimeError."""
    cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code == CONFLICT:
        return f"{repository} was changed by someone else meanwhile; nothing was written: look again, then repeat."
    if isinstance(cause, network_errors()):
        return f"The Hub can't be reached ({type(cause).__name__}); the upload can be repeated."
    first_line = str(cause).strip().partition("\n")[0]
    token = get_token()
    return f"The Hub refuses the upload to {repository}: {first_line.replace(token, '***') if token else first_line}"


def network_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises when the network fails: httpx's errors, under one of two names by its version."""
    loaded = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return tuple(module.TransportError for module in loaded if module)


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
