import pytest

from modular_star_encoder.cli.main import main
from tests.search.conftest import code, shared_index  # noqa: F401 (fixtures)


@pytest.fixture
def mose(capsys):
    """The command line: words → (status, stdout, stderr)."""

    def run(*words):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
