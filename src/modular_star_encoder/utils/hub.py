"""The Hub: its repositories' ids, its errors as one sentence, and the cards of what is published there."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import RepoCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FunctionLoader, StrictUndefined

from modular_star_encoder.utils.errors import UserError

Card = TypeVar("Card", bound=RepoCard)

CONFLICT = 412
"""Status of a commit that the Hub refuses because its parent is no longer the newest."""


def check_repository_id(repository: str) -> None:
    """Check that `repository` has the form owner/name.

    Raises:
        UserError: `hub.repository_id` if it has not.
    """
    try:
        validate_repo_id(repository)
        valid = "/" in repository
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError("hub.repository_id", f"{repository!r} is not the id of a repository, such as owner/name.")


@contextmanager
def wrap_hub_errors(repository: str) -> Iterator[None]:
    """Raise errors of the Hub and of the network as OSError with one sentence, without the access token.

    Args:
        repository: id of the repository that is read or written.

    Raises:
        OSError: the Hub refuses or can't be reached.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError("The Hub needs a token: log in with `hf auth login`, or set HF_TOKEN.") from error
    except Exception as error:
        if not isinstance(error, (HfHubHTTPError, RuntimeError, *network_errors())):
            raise
        raise OSError(_sentence(repository, error)) from error


def _sentence(repository: str, error: Exception) -> str:
    # The client wraps the error of a single file in a RuntimeError.
    cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code == CONFLICT:
        return f"{repository} was changed by someone else meanwhile; nothing was written. Check it and repeat."
    if isinstance(cause, network_errors()):
        return f"The Hub can't be reached ({type(cause).__name__}); the upload can be repeated."
    first_line = str(cause).strip().partition("\n")[0]
    token = get_token()
    return f"The Hub refuses the upload to {repository}: {first_line.replace(token, '***') if token else first_line}"


def network_errors() -> tuple[type[Exception], ...]:
    """The Hub client's exceptions for network failures: those of httpx, which newer versions call httpx2."""
    loaded = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return tuple(module.TransportError for module in loaded if module)


def load_card(kind: type[Card], path: Path, required: Sequence[str], key: str) -> Card:
    """Read a card that the Hub can read, with values for the required metadata.

    Raises:
        UserError: `key`: the card is no Markdown file with metadata, or a value is missing.
    """
    try:
        card = kind.load(path)
        missing = [name for name in required if not card.data.to_dict().get(name)]
        fault = f"lacks {', '.join(missing)}" if missing else ""
    except (ValueError, OSError, KeyError, TypeError) as error:
        fault = f"can't be read: {' '.join(str(error).split())}"
    if fault:
        raise UserError(key, f"The metadata of {path} {fault}.")
    return card


def render_card(template: str, **values: Any) -> str:
    """Render a card: YAML metadata and Markdown.

    Args:
        template: name of a file in model_cards.
        values: the template's variables; a missing one is an error.
    """
    environment = Environment(  # noqa: S701  Markdown, not HTML
        loader=FunctionLoader(_read_template),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = cell
    return environment.get_template(template).render(**values).lstrip()


def _read_template(name: str) -> str:
    return files("modular_star_encoder.model_cards").joinpath(name).read_text(encoding="utf-8")


def cell(value: Any) -> str:
    """The text of a value in a Markdown table's cell."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")
