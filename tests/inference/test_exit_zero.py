import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer

import modular_star_encoder.cli.main as cli
from modular_star_encoder import export_static
from modular_star_encoder.inference.checkpoints import load_checkpoint, save_retrieval_checkpoint, slice_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.inference.exit_zero import NumpyEncoder, has_exit_zero, has_layers, read_config
from modular_star_encoder.search.embedder import Embedder
from tests.errors import raises
from tests.processes import python
from tests.tiny import ZERO, save_tiny_checkpoint

MODEL = str(files("modular_star_encoder.hub_configs") / "mose-code")
TABLE = "model.embed_tokens.weight"
TEXTS = ["parse an HTTP header", "def f(x):\n    return x + 1\n" * 200, "", "größe 🐍", "a <mask> <pad>"]


def test_numpy_embeds_what_the_model_embeds():
    expected = encode_exits(*load_checkpoint(MODEL), TEXTS, exit_layers=(0, 2, 6), progress=False)
    encoder = NumpyEncoder(MODEL)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected[0], atol=1e-5)
    for exit_layer, vectors in encoder.encode_exits(TEXTS, (0, 2, 6)).items():
        np.testing.assert_allclose(vectors, expected[exit_layer], atol=1e-5)
        assert vectors[2].tolist() == [0.0] * 384
    # One float64 scalar would make all states after it float64, at half the speed.
    assert {states.dtype.name for states in encoder._states(np.arange(5), 6)} == {"float32"}


def test_a_checkpoint_in_bfloat16_is_computed_and_exported_as_its_weights_in_float32(tmp_path):
    model, tokenizer = load_checkpoint(MODEL, device="cpu")
    save_retrieval_checkpoint(model.bfloat16(), tokenizer, tmp_path / "halved")
    expected = encode_exits(model.float(), tokenizer, TEXTS, exit_layers=(0, 6), progress=False)
    for exit_layer, vectors in NumpyEncoder(tmp_path / "halved").encode_exits(TEXTS, (0, 6)).items():
        np.testing.assert_allclose(vectors, expected[exit_layer], atol=1e-5)
    (question,) = Embedder(tmp_path / "halved").questions(TEXTS[:1], (0,), 384)[0]
    np.testing.assert_allclose(question, expected[0][0], atol=1e-5)
    for format in ("sentence-transformers", "model2vec"):
        static = SentenceTransformer(str(export_static(tmp_path / "halved", tmp_path / format, format=format)))
        np.testing.assert_allclose(static.encode(TEXTS[:1]), expected[0][:1], atol=1e-5)


def test_words_have_the_tokens_of_the_whole_text():
    model = NumpyEncoder(MODEL)
    assert model._has_words
    pieces = ["HTTPServer", "aB", "A1b_c", "<mask>", "<", "ma", "é", "Ⅻ", "e\u0301", "\u0301", "\xa0", "\u2003"]
    pieces += ["ß", "中文", "ǅ", "x" * 70, "日本Go", "__", "!!!!", "->"] + [chr(code) for code in range(128)]
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(pieces, size)) for size in generator.integers(1, 60, 3000)]
    texts += [text for text in TEXTS if text] + ["word " * 9000, "größe " * 9000]
    texts += [path.read_text() for path in Path(__file__).parent.glob("*.py")]
    expected = [one.ids for one in model.tokenizer.encode_batch_fast(texts)]
    assert [ids.tolist() for ids in model._ids(texts)] == expected
    assert [ids.tolist() for ids in model._ids(texts)] == expected


def test_a_checkpoint_without_such_an_exit_is_refused(tmp_path):
    assert has_exit_zero(read_config(MODEL))
    assert not has_exit_zero(read_config(tmp_path))
    wrong = [{"exit_layers": [1]}, {"exit_layers": [6, 0]}, {"projection_size": 0}, {"model_type": "bert"}]
    for change in ({"projection_head": "mlp"}, {"pooling": "lasttoken"}, *wrong):
        assert not has_exit_zero(read_config(MODEL) | change)
    assert has_layers(read_config(MODEL))
    for change in ({"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "yarn"}}, {"exit_norm": "all"}):
        assert not has_layers(read_config(MODEL) | change)
    with pytest.raises(ValueError, match="exit 0"):
        NumpyEncoder(tmp_path)


@pytest.mark.slow
def changed_copy(folder, weights=lambda tensors: tensors):
    """A slice of the model at exit 0 with other weights."""
    slice_checkpoint(MODEL, 0, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | weights(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_table_of_another_shape_than_the_configuration_says_is_damage(tmp_path):
    folder = changed_copy(tmp_path / "cut", lambda tensors: {TABLE: tensors[TABLE][:-1].copy()})
    with raises("checkpoint.damaged", folder, "(16383, 384)"):
        NumpyEncoder(folder)


def test_a_search_refuses_weights_that_give_no_finite_embeddings(tmp_path):
    folder = changed_copy(tmp_path / "nan", lambda tensors: {TABLE: np.full_like(tensors[TABLE], np.nan)})
    with raises("search.embeddings.not_finite", folder):
        Embedder(folder).questions(["add two numbers"], (0,), 384)


def test_search_imports_no_framework(tmp_path):
    (tmp_path / "a.py").write_text("def parse_header(text):\n    return text.split(':')\n")
    run = (
        "import sys; from modular_star_encoder.cli.main import main; "
        "folder = sys.argv[1]; "
        "status = main(['index', folder]) or main(['search', 'parse a header', folder, '--rerank-exit-layer', '6']); "
        "print(status, sorted({'torch', 'transformers', 'sentence_transformers', 'datasets'} & set(sys.modules)))"
    )
    printed = python("-c", run, tmp_path)
    assert "parse_header" in printed.stdout
    assert printed.stdout.splitlines()[-1] == "0 []"


STATIC = ZERO | {"exit_layers": (0, 2), "num_hidden_layers": 2}


def exit_zero(texts):
    return encode_exits(*load_checkpoint("mose-code", 0, device="cpu"), texts, progress=False)[0]


def test_sentence_transformers_embeds_every_text_as_exit_0(tmp_path):
    texts = ["read the <mask> of a file", "", "def f(x):\n    return x + 1", "<pad> <cls> <unk>", "größe 🐍 中文"]
    texts += ["x " * 100 + " " * 900 + "y", "read the file " * 200]
    model = SentenceTransformer(str(export_static("mose-code", tmp_path / "out")), device="cpu")
    embeddings = model.encode(texts)
    np.testing.assert_allclose(embeddings, exit_zero(texts), rtol=0, atol=1e-6)
    assert not embeddings[1].any()
    assert not list((tmp_path / "out").rglob("*.py"))


def test_a_model2vec_folder_embeds_short_texts_of_known_tokens_as_exit_0(tmp_path):
    folder = export_static("mose-code", tmp_path / "out", format="model2vec")
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    known = ["", "read file", "def x"]
    expected = exit_zero(known)
    np.testing.assert_allclose(SentenceTransformer(str(folder)).encode(known), expected, rtol=0, atol=1e-6)
    found = pytest.importorskip("model2vec").StaticModel.from_pretrained(folder).encode(known)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_what_a_table_cannot_hold_is_refused_and_nothing_is_written(checkpoint, tmp_path):
    out = tmp_path / "out"
    with raises("static.format", "onnx", "model2vec"):
        export_static("mose-code", out, format="onnx")
    changed = STATIC | {"projection_head": "mlp", "projection_order": "project_then_pool"}
    for key, changes, value in (("exit_zero", changed, ""), ("special_tokens", STATIC, 2)):
        model = save_tiny_checkpoint(tmp_path / key, **changes)
        with raises(f"static.{key}", model, value):
            export_static(model, out)
    with pytest.raises(ValueError, match="exits are 1, 2, 4"):
        export_static(checkpoint, out)
    assert not out.exists()


def test_a_fault_found_in_the_temporary_slice_names_the_checkpoint(tmp_path, monkeypatch):
    def find_fault(folder):
        raise ValueError(f"{folder} is odd")

    monkeypatch.setattr("modular_star_encoder.inference.exit_zero.check_tokenizer", find_fault)
    with raises("checkpoint.damaged", "mose-code cannot be used", "(mose-code is odd)"):
        export_static("mose-code", tmp_path / "out")


def test_the_command_writes_a_static_model_and_refuses_what_is_for_onnx(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", "mose-code", "--format", "model2vec", "--out", str(out)]
    assert cli.main([*arguments, "--exit-layer", "2"]) == 2
    assert "--exit-layer" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert f'float32 25 MB; load it with model2vec.StaticModel.from_pretrained("{out}")' in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["normalize"] is True
