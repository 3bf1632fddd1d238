import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer


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
