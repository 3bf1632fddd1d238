import pytest

from tests.data.samples import small_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()
