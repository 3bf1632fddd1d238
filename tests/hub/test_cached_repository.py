"""A repository in the local Hub cache is all that a stranger needs: no network, and no package of ours."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from modular_star_encoder.data.prompts import text_prompt
from modular_star_encoder.hub.subprocess_check import ReloadRequest, verify_reload
from modular_star_encoder.hub.verification import TEXTS
from tests.tiny import save_tiny_checkpoint

REPOSITORY = "some-org/tiny.star-encoder"


def cache_repository(checkpoint, cache):
    """Lay a checkpoint out as a download would: files by their hash, and a snapshot of links to them."""
    repository = cache / f"models--{REPOSITORY.replace('/', '--')}"
    commit = hashlib.sha1(b"a commit", usedforsecurity=False).hexdigest()
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for file in [path for path in checkpoint.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = repository / "snapshots" / commit / file.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return repository / "snapshots" / commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hub cache, the only one that processes started from here know."""
    monkeypatch.delenv("SENTENCE_TRANSFORMERS_HOME", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return tmp_path / "hf" / "hub"


@pytest.mark.slow
def test_a_cached_repository_loads_by_its_id_with_identical_embeddings(tmp_path, cache):
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint")
    cache_repository(checkpoint, cache)
    (reloaded,) = verify_reload([ReloadRequest(REPOSITORY, TEXTS, text_prompt())], progress=False)

    texts = [text_prompt() + text for text in TEXTS]
    batch = AutoTokenizer.from_pretrained(checkpoint)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(checkpoint)(**batch).sentence_embedding.numpy()
    assert np.array_equal(reloaded["auto_model"], expected)
    # padded on the other side
    np.testing.assert_allclose(reloaded["sentence_transformer"], expected, rtol=0, atol=1e-6)
