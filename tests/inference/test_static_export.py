"""Exit 0 as a static model: stock libraries embed as the checkpoint does, or nothing is written."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import modular_star_encoder.cli.main as cli
from modular_star_encoder import export_static
from modular_star_encoder.inference.checkpoints import load_checkpoint, save_retrieval_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from tests.errors import raises
from tests.tiny import tiny_model, tiny_tokenizer

STATIC = {
    "exit_layers": (0, 2),
    "num_hidden_layers": 2,
    "projection_head": "linear",
    "projection_order": "pool_then_project",
    "pooling": "mean",
    "exit_norm": "none",
    "token_weights": True,
}
SHORT = [
    "read the <mask> of a file",
    "",
    "def f(x):\n    return x + 1",
    "<pad> <cls> <unk>",
    "x " * 100 + " " * 900 + "y",
]
UNKNOWN, LONG = "größe 🐍 中文", "read the file " * 200


def exit_zero(texts):
    return encode_exits(*load_checkpoint("mose-code", 0, device="cpu"), texts, progress=False)[0]


def test_sentence_transformers_embeds_every_text_as_exit_0(tmp_path):
    texts = [*SHORT, UNKNOWN, LONG]
    model = SentenceTransformer(str(export_static("mose-code", tmp_path / "out")), device="cpu")
    embeddings = model.encode(texts)
    np.testing.assert_allclose(embeddings, exit_zero(texts), rtol=0, atol=1e-6)
    assert not embeddings[1].any()
    assert not list((tmp_path / "out").rglob("*.py"))


def test_a_model2vec_folder_embeds_short_texts_of_known_tokens_as_exit_0(tmp_path):
    folder = export_static("mose-code", tmp_path / "out", format="model2vec")
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    known = [SHORT[1], "read file", "def x"]
    expected = exit_zero(known)
    np.testing.assert_allclose(SentenceTransformer(str(folder)).encode(known), expected, rtol=0, atol=1e-6)
    found = pytest.importorskip("model2vec").StaticModel.from_pretrained(folder).encode(known)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_what_a_table_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "out"
    with raises("static.format", "onnx", "model2vec"):
        export_static("mose-code", out, format="onnx")
    changed = STATIC | {"projection_head": "mlp", "projection_order": "project_then_pool"}
    mlp = save_retrieval_checkpoint(tiny_model(**changed), tiny_tokenizer(), tmp_path / "mlp")
    with raises("static.exit_zero", mlp):
        export_static(mlp, out)
    special = save_retrieval_checkpoint(tiny_model(**STATIC), tiny_tokenizer(), tmp_path / "special")
    with raises("static.special_tokens", special, 2):
        export_static(special, out)
    deep = save_retrieval_checkpoint(tiny_model(), tiny_tokenizer(), tmp_path / "deep")
    with pytest.raises(ValueError, match="exits are 1, 2, 4"):
        export_static(deep, out)
    assert not out.exists()


def test_the_command_writes_a_static_model_and_refuses_what_is_for_onnx(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", "mose-code", "--format", "model2vec", "--out", str(out)]
    assert cli.main([*arguments, "--exit-layer", "2"]) == 2
    assert "--exit-layer" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert json.loads((out / "config.json").read_text())["normalize"] is True
