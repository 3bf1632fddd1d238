import pytest
from huggingface_hub import HfApi, constants

from tests.hub.stand_in_hub import TOKEN, StandInHub


@pytest.fixture
def hub(monkeypatch):
    """A Hub of this test's own; uploads are not by Xet, and what is retried is retried at once."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with StandInHub() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=TOKEN)
