import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from modular_star_encoder.cli.main import main
from modular_star_encoder.hub.manifest import Manifest, RepositorySettings
from modular_star_encoder.hub.staging import stage_repositories
from modular_star_encoder.inference import profile_path, shipped_model
from modular_star_encoder.inference.checkpoints import load_checkpoint, slice_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.inference.encoders import load_encoder
from modular_star_encoder.inference.exit_profile import load_at_budget
from modular_star_encoder.search.index import open_for_search
from modular_star_encoder.training.recipes import hub_config_folder
from tests.errors import raises
from tests.processes import python

FOLDER = hub_config_folder("mose-code")
EXITS = (0, 1, 2, 4, 6)
QUERIES = ["read a json file and return its content", "compute the sha256 checksum of some bytes"]
CODES = [
    "def load_config(path):\n    with open(path) as handle:\n        return json.load(handle)",
    "func Digest(data []byte) string {\n\tsum := sha256.Sum256(data)\n\treturn hex.EncodeToString(sum[:])\n}",
    "function shuffle(list) {\n  for (let i = list.length - 1; i > 0; i--) {\n    swap(list, i, random(i));\n  }\n}",
    "def retry(times)\n  yield\nrescue Timeout::Error\n  (times -= 1).positive? ? retry : raise\nend",
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint(FOLDER, device="cpu")


def test_every_door_knows_the_model_by_its_name_whatever_folder_has_it(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "mose-code")
    assert shipped_model() == str(FOLDER)
    assert load_encoder("mose-code", [0]).name == "mose-code"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("def push(item):\n    return [item]\n")
    assert open_for_search(tmp_path / "code")[0].settings.exit_layers == (0,)  # the folder's model has no exit 0
    assert slice_checkpoint("mose-code", 0, "slice").is_dir()
    assert main(["export", "mose-code", "--format", "static", "--exit-layer", "0"]) == 0
    assert (tmp_path / "mose-code-0-static" / "modules.json").is_file()
    entry = RepositorySettings(name="model", checkpoint="mose-code")
    manifest = Manifest(namespace="me", title="Model", license="mit", repositories=(entry,))
    assert stage_repositories(manifest, "staged")[0].source == FOLDER
    with pytest.raises(FileNotFoundError, match="exit profile"):
        load_at_budget("mose-code", latency_ms=20)
    with raises("profile.out.missing", "mose-code", "--out"):
        profile_path("mose-code")


def test_a_missing_checkpoint_is_reported_at_once_with_the_names_there_are():
    named = {"no-such-folder": "mose-code", "./no/such": "mose-code", "runs/no/such": "mose-code"}
    named |= {"no/such": "HF_HUB_OFFLINE"}
    code = f"""import sys
from modular_star_encoder.cli.main import main
for name in {list(named)}:
    assert main(["slice", name, "--exit-layer", "1", "out"]) == 2
assert "torch" not in sys.modules and "transformers" not in sys.modules"""
    done = python("-c", code, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    for line, (name, shown) in zip(done.stderr.splitlines(), named.items(), strict=True):
        assert name in line
        assert shown in line


def encode(loaded, texts, exits=EXITS):
    return encode_exits(*loaded, texts, exit_layers=exits, progress=False)


def test_the_folder_has_small_weights_empty_prompts_and_no_code(loaded):
    assert (FOLDER / "model.safetensors").stat().st_size <= 32_000_000
    with safe_open(FOLDER / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert loaded[0].dtype == torch.float32
    assert tuple(loaded[0].config.exit_layers) == EXITS
    assert json.loads((FOLDER / "config.json").read_text())["instruction_prompts"] is False
    prompts = json.loads((FOLDER / "config_sentence_transformers.json").read_text())["prompts"]
    assert set(prompts) >= {"query", "document"}
    assert not any(prompts.values())
    # Saving and publishing add the model's two files.
    assert not list(FOLDER.rglob("*.py"))
    tokenizer = loaded[1]  # which reads special tokens in a text as text
    assert not {tokenizer.pad_token_id, tokenizer.unk_token_id, 2} & {
        *tokenizer("a <pad> b <mask> c <unk>")["input_ids"]
    }


def test_every_exit_ranks_the_right_code_first(loaded):
    queries, codes = encode(loaded, QUERIES), encode(loaded, CODES)
    for exit_layer in EXITS:
        assert (queries[exit_layer] @ codes[exit_layer].T).argmax(1).tolist() == [0, 1], exit_layer
        # All exits share one space.
        assert (queries[exit_layer] @ codes[6].T).argmax(1).tolist() == [0, 1], exit_layer


@pytest.mark.parametrize("exit_layer", [0, 2, 6])
def test_transformers_and_sentence_transformers_load_it_at_an_exit(loaded, exit_layer):
    texts = [*CODES, ""]
    own = encode(loaded, texts, [exit_layer])[exit_layer]
    assert not own[-1].any()
    model, tokenizer = AutoModel.from_pretrained(FOLDER, exit_layer=exit_layer), AutoTokenizer.from_pretrained(FOLDER)
    assert len(model.model.layers) == exit_layer
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        embeddings = model(**batch).sentence_embedding
    np.testing.assert_allclose(embeddings, own, atol=1e-6)
    stock = SentenceTransformer(str(FOLDER), device="cpu")
    np.testing.assert_allclose(stock.encode(texts, exit_layer=exit_layer), own, atol=1e-6)


@pytest.mark.slow
def test_fine_tuning_reads_texts_as_the_model_does_and_its_result_can_be_exported_as_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"query": f"return number {i}", "code": f"def f{i}():\n    return {i}"} for i in range(40)]
    rows[3]["query"] = "\x01"  # no tokens
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("data.pairs=pairs.jsonl", "max_steps=2", "batch_size=32", "learning_rate=1e-9", "eval_fraction=0.2")
    assert main(["finetune", "mose-code", "--out", "run", *settings]) == 0
    tuned = SentenceTransformer("run/model")
    assert tuned.tokenizer(QUERIES)["input_ids"] == AutoTokenizer.from_pretrained(FOLDER)(QUERIES)["input_ids"]
    before = SentenceTransformer(str(FOLDER)).encode(QUERIES)
    np.testing.assert_allclose(tuned.encode(QUERIES), before, atol=1e-3)
    assert main(["export", "run/model", "--format", "static", "--out", "table"]) == 0
