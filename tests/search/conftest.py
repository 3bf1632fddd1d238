import pytest

from tests.search.samples import build, write_code
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def code(tmp_path):
    return write_code(tmp_path / "code")


@pytest.fixture(scope="session")
def shared_index(tmp_path_factory, checkpoint):
    """An index at exits 1 and 4 that no test changes."""
    folder = tmp_path_factory.mktemp("shared")
    return build(write_code(folder / "code"), folder / "index", checkpoint, exit_layers=(1, 4))
