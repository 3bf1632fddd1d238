import os
from unittest import mock

import pytest
import torch
from huggingface_hub import constants

from tests.tiny import save_tiny_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Models this small lose more to waiting for threads than they gain.
    torch.set_num_threads(1)


@pytest.fixture
def model():
    return tiny_model().eval()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a model that no test changes."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Indexes of searched folders go to a cache of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _own_environment():
    """A command that works offline because it reaches no Hub leaves the next test on-line."""
    with mock.patch.dict(os.environ), mock.patch.object(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE):
        yield
