"""Expect an error by its key and by the values that its sentence must name, not by its English."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from modular_star_encoder.utils.errors import UserError


@contextmanager
def raises(key: str, *values: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Like `pytest.raises(UserError)`, with this key and with every value in the sentence."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.key == key, f"{caught.value.key}: {caught.value}"
    for value in values:
        assert str(value) in str(caught.value)
