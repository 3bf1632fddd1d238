import pytest
import torch

from tests.evaluation.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    # Models this small lose more to waiting for threads than they gain.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="package")
def tokenizer():
    return tiny_tokenizer()
