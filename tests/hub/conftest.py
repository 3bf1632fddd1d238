import pytest
from huggingface_hub import HfApi, constants

from tests.hub.repositories import finetuned_entry, manifest, write_finetuned, write_pretrained
from tests.hub.stand_in_hub import TOKEN, StandInHub
from tests.tiny import EXIT_LAYERS


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The folders of a pre-trained and of a fine-tuned checkpoint, which no test changes."""
    root = tmp_path_factory.mktemp("runs")
    return {"pretrained": write_pretrained(root / "pretrained"), "finetuned": write_finetuned(root / "model")}


@pytest.fixture(scope="session")
def plan(sources):
    """A manifest of both checkpoints, with a repository for each exit and a branch."""
    slices = [{"name": f"tiny-{k}", "slice_of": "tiny", "exit_layer": k, "only_exit": True} for k in EXIT_LAYERS]
    entries = [
        {"name": "tiny-pretrained", "checkpoint": str(sources["pretrained"]), "training_data": "Files."},
        finetuned_entry(sources["finetuned"], trained_from="tiny-pretrained"),
        *slices,
        {"name": "tiny", "branch": "exit-2", "slice_of": "tiny", "exit_layer": 2},
    ]
    return manifest(entries, limits="Few.", datasets=["some/data"])


@pytest.fixture
def hub(monkeypatch):
    """A Hub for one test; uploads do not use Xet, and clients retry without a pause."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with StandInHub() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=TOKEN)
