import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, AutoTokenizer

import modular_star_encoder.cli.main as cli
from modular_star_encoder.data.prompts import text_prompt
from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import RetrievalRow, pairs_task
from modular_star_encoder.hub import onnx_export
from modular_star_encoder.hub.onnx_export import ONNX_FILE, QUANTIZED_FILE, check_onnx, export_onnx, export_onnx_folder
from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from modular_star_encoder.inference.encoders import ExitEncoder, Text, load_encoder
from modular_star_encoder.search.embedder import Embedder
from tests.errors import raises
from tests.evaluation.benchmarks.published import code_folder
from tests.processes import python
from tests.tiny import run, tiny_batch, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

EXITS = (1, 2)
DIFFERS = "onnx.difference"
SHAPE = {"num_hidden_layers": 2, "exit_layers": EXITS}
VERBS, NOUNS = ("add", "find", "show", "drop", "sort", "read"), ("file", "name", "list", "tree", "word")
ROWS = [RetrievalRow(f"{v} the {n}", f"def {v}_{n}(x):\n    return {n}(x)\n", "python") for v in VERBS for n in NOUNS]
TASK = pairs_task("tests", "python", ROWS, size=len(ROWS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("full") / "model"
    return save_retrieval_checkpoint(tiny_model(**SHAPE), tiny_tokenizer(), folder)


@pytest.fixture
def model(checkpoint):
    return AutoModel.from_pretrained(checkpoint).eval()


@pytest.fixture
def encoder(model):
    return ExitEncoder(model, tiny_tokenizer(), "model", exit_layers=(2,))


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    code_folder(folder)
    return folder


@pytest.fixture(scope="module")
def folders(checkpoint, code, tmp_path_factory):
    """{exit: folder}: the deepest with 8-bit weights from Python, the other from the command line."""
    out = tmp_path_factory.mktemp("out") / "shallow"
    arguments = ["export", str(checkpoint), "--exit-layer", "1", "--out", str(out), "--data", str(code)]
    assert cli.main(arguments) == 0
    return {1: out, 2: export_onnx_folder(checkpoint, int8=True, tasks=[TASK], progress=False).folder}


def run_onnx(folder, batch, file=ONNX_FILE):
    names = ["last_hidden_state", "sentence_embedding"]
    return onnx_export.open_session(folder / file).run(names, {name: tensor.numpy() for name, tensor in batch.items()})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("exit_layer", EXITS)
def test_a_file_takes_any_batch_and_length_and_either_padding(folders, model, exit_layer, side):
    for lengths in ((12, 7, 3), (1,), (1, 1, 1, 1), (128, 2), (5, 5)):
        batch = tiny_batch(side, lengths)
        tokens, embedding = run_onnx(folders[exit_layer], batch)
        expected = run(model, **batch, exit_layer=exit_layer)
        real = batch["attention_mask"].bool().numpy()
        np.testing.assert_allclose(tokens[real], expected.last_hidden_state.numpy()[real], rtol=0, atol=2e-5)
        np.testing.assert_allclose(embedding, expected.sentence_embedding.numpy(), rtol=0, atol=2e-6)


@torch.inference_mode()
def test_every_door_gives_the_same_embedding_with_one_length_and_one_prompt(checkpoint, folders, model):
    texts = ["add the file", "show the tree " * 300]  # the second is longer than the model's longest input
    sentence_transformer = SentenceTransformer(str(checkpoint), device="cpu")
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (checkpoint, folders[2])]
    assert {one.model_max_length for one in tokenizers} == {sentence_transformer.max_seq_length} == {128}
    prompt, encoder, index = sentence_transformer.prompts["query"], load_encoder(str(checkpoint)), Embedder(checkpoint)
    batches = [
        dict(tokenizer([prompt + text for text in texts], padding=True, truncation=True, return_tensors="pt"))
        for tokenizer in tokenizers
    ]
    found = {
        "AutoModel": model(**batches[0]).sentence_embedding.numpy(),
        "ONNX": run_onnx(folders[2], {name: batches[1][name] for name in ("input_ids", "attention_mask")})[1],
        "SentenceTransformer": sentence_transformer.encode_query(texts),
        "mose evaluate": encoder.encode([(encoder.prompt(Text(text)), text) for text in texts], [2], progress=False)[2],
        "index": index.questions(texts, (2,), index.check_dimension(None))[2],
    }
    for embeddings in found.values():
        np.testing.assert_allclose(embeddings, found["AutoModel"], rtol=0, atol=2e-6)


def test_inputs_and_outputs_have_the_names_and_axes_that_servers_need(folders):
    graph = onnx.load(folders[2] / ONNX_FILE).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)}
    axes = {name: [size.dim_param or size.dim_value for size in shape] for name, shape in shapes.items()}
    tokens = ["batch_size", "sequence_length"]
    assert axes.pop("last_hidden_state") == [*tokens, 16]
    assert axes.pop("sentence_embedding") == ["batch_size", 16]
    assert axes == {"input_ids": tokens, "attention_mask": tokens}


def test_a_file_says_nothing_of_the_machine_that_wrote_it(folders):
    for file in (folders[1] / ONNX_FILE, folders[2] / QUANTIZED_FILE):
        content = file.read_bytes()
        assert b"weight" in content
        assert not any(part in content for part in (str(Path(torch.__file__).parents[1]).encode(), b'File "', b".py"))


def test_the_folder_holds_what_text_embeddings_inference_reads(folders, checkpoint):
    files = {path.relative_to(folders[1]).as_posix() for path in folders[1].rglob("*") if path.is_file()}
    modules = {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "2_Normalize/config.json"}
    own = {"config.json", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"}
    assert files == own | modules | {"onnx/model.onnx", "onnx/export.json"}
    read = {name: json.loads((folders[1] / name).read_text()) for name in files if name.endswith(".json")}
    # Fields of its structs `ModelConfig`, `Config`, `PoolConfig` and `STConfig` that have no default.
    config = read["config.json"]
    assert all(type(config[name]) is int for name in ("max_position_embeddings", "pad_token_id", "hidden_size"))
    assert not config["architectures"][0].endswith("Classification")
    assert config["eos_token_id"] is None or type(config["eos_token_id"]) is int
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} < set(read["1_Pooling/config.json"])
    assert read["sentence_bert_config.json"]["max_seq_length"] == 128
    assert read["tokenizer_config.json"]["padding_side"] == "left"
    assert all(isinstance(prompt, str) for prompt in read["config_sentence_transformers.json"]["prompts"].values())
    pooling = read["1_Pooling/config.json"]
    assert {name for name, value in pooling.items() if value is True} == {"pooling_mode_mean_tokens"}
    batch = tiny_batch()
    tokens, embedding = run_onnx(folders[1], batch)
    mask = batch["attention_mask"].numpy()[:, :, None]
    pooled = (tokens * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), embedding, rtol=0, atol=1e-6)
    found, expected = AutoConfig.from_pretrained(folders[1]), AutoConfig.from_pretrained(checkpoint)
    assert (found.model_type, found.num_hidden_layers) == ("starcoder2", 1)
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "rope_parameters", "norm_epsilon", "hidden_act"):
        assert getattr(found, name) == getattr(expected, name)


def test_the_prompts_are_the_checkpoints_and_the_tokenizer_is_one_that_transformers_4_knows(folders, checkpoint):
    settings = json.loads((folders[1] / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_max_length"] == 128
    name = "config_sentence_transformers.json"
    assert (folders[1] / name).read_text() == (checkpoint / name).read_text()
    text = text_prompt() + ROWS[0].code
    for tokenizer in (AutoTokenizer.from_pretrained(folders[1]), load_tokenizer(folders[1])):
        assert tokenizer(text)["input_ids"] == load_tokenizer(checkpoint)(text)["input_ids"]


def test_the_report_compares_the_model_with_both_files(folders, encoder):
    report = json.loads((folders[2] / "onnx/export.json").read_text())
    assert report["exit_layer"] == 2
    assert 0 < report["differences_from_torch"]["sentence_embedding"] < 1e-6
    assert 0 < report["differences_from_torch"]["last_hidden_state"] < 1e-5
    assert report["versions"]["onnxruntime"]
    (table,) = report["tables"]
    model, float32, int8 = table["rows"]
    assert [row["retriever"] for row in table["rows"]] == ["model", "float32", "int8"]
    assert model["mean"] == float32["mean"]
    file = EmbeddingRetriever(onnx_export.OnnxEncoder(folders[2] / QUANTIZED_FILE, encoder, "int8"))
    results = evaluate_tasks([TASK], [EmbeddingRetriever(encoder), file], progress=False)
    assert [model["mean"]["value"], int8["mean"]["value"]] == [one.estimates["mrr"].value for one in results]
    assert int8["difference"]["value"] == pytest.approx(int8["mean"]["value"] - model["mean"]["value"])
    assert results[0].values != results[1].values
    assert report["bytes"]["int8"] == (folders[2] / QUANTIZED_FILE).stat().st_size
    operations = {node.op_type for node in onnx.load(folders[2] / QUANTIZED_FILE).graph.node}
    assert "MatMulInteger" in operations


def test_a_file_of_another_exit_is_found_out(folders, model):
    with raises(DIFFERS, "last_hidden_state"):
        check_onnx(model, folders[1] / ONNX_FILE)
    check_onnx(model, folders[1] / ONNX_FILE, 1)
    with raises(DIFFERS, "1e-09"):
        check_onnx(model, folders[1] / ONNX_FILE, 1, tolerance=1e-9)


@pytest.mark.parametrize("found_by", ["check_onnx", "compare_scores"])
def test_a_file_that_disagrees_leaves_nothing_behind(folders, checkpoint, tmp_path, monkeypatch, found_by):
    def export_another(model, path):
        path.write_bytes((folders[1] / ONNX_FILE).read_bytes())

    monkeypatch.setattr(onnx_export, "export_onnx", export_another)
    if found_by == "compare_scores":
        # As if the check of shapes had missed it.
        monkeypatch.setattr(onnx_export, "check_onnx", lambda model, path: check_onnx(model, path, 1))
    with raises(DIFFERS if found_by == "check_onnx" else "hub.onnx.rankings"):
        export_onnx_folder(checkpoint, 2, tmp_path / "out", tasks=[TASK], progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_export_leaves_no_file_of_a_library_in_the_temporary_folder(checkpoint, tmp_path, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    command = "import sys; from modular_star_encoder.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = python("-c", command, "export", checkpoint, "--out", tmp_path / "out", TMPDIR=str(tmp_path / "tmp"))
    assert (done.returncode, os.listdir(tmp_path / "tmp")) == (0, []), done.stderr


def test_weights_that_do_not_fit_into_one_file_are_stored_next_to_it(folders, tmp_path, monkeypatch):
    onnx_ir = pytest.importorskip("onnx_ir")
    expected = run_onnx(folders[2], tiny_batch())
    monkeypatch.setattr(onnx_export, "_LARGEST_FILE", 0)
    onnx_export.save_graph(onnx_ir.load(folders[2] / ONNX_FILE), tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx_data"}
    assert (tmp_path / "model.onnx_data").stat().st_size > (tmp_path / "model.onnx").stat().st_size
    for found, wanted in zip(run_onnx(tmp_path, tiny_batch(), "model.onnx"), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    monkeypatch.undo()
    onnx_export.quantize_onnx(tmp_path / "model.onnx", tmp_path / "small.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx_data", "small.onnx"}
    direct = run_onnx(folders[2], tiny_batch(), QUANTIZED_FILE)
    for found, wanted in zip(run_onnx(tmp_path, tiny_batch(), "small.onnx"), direct, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_wrong_arguments_write_nothing(checkpoint, tmp_path, capsys):
    for options in (["--int8"], ["--benchmark", "cosqa"]):
        assert cli.main(["export", str(checkpoint), *options]) == 2
        assert "--data" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1, 2"):
        export_onnx_folder(checkpoint, 3, tmp_path / "out")
    with raises("hub.onnx.int8"):
        export_onnx_folder(checkpoint, out=tmp_path / "out", int8=True)
    with raises("onnx.dtype", "torch.bfloat16"):
        export_onnx(tiny_model(**SHAPE).bfloat16(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("projection_order", "pool_then_project"), ("embedding_normalization", "clip"), ("pooling", "legacy")],
)
def test_an_embedding_that_sentence_transformers_cannot_make_is_refused(name, value, tmp_path):
    for part in (tiny_model(**SHAPE, **{name: value}), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    with raises("checkpoint.not_servable", f"{name}='{value}'"):
        export_onnx_folder(tmp_path / "model", out=tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_extra_is_named(folders, tmp_path, monkeypatch):
    for module in ("onnxruntime", "onnxruntime.quantization", "onnxscript"):
        monkeypatch.setitem(sys.modules, module, None)
    export = partial(export_onnx, tiny_model(**SHAPE))
    quantize = partial(onnx_export.quantize_onnx, target=tmp_path / "small.onnx")
    for function in (export, onnx_export.open_session, quantize):
        with pytest.raises(ImportError, match=r"pip install 'modular-star-encoder\[onnx\]'"):
            function(folders[1] / ONNX_FILE)


def test_the_command_prints_the_comparison_and_the_folder(folders, checkpoint, encoder, code, capsys, monkeypatch):
    def export_none(checkpoint, exit_layer, out, *, int8, tasks):
        files = {"float32": folders[2] / ONNX_FILE, "int8": folders[2] / QUANTIZED_FILE}
        return onnx_export.OnnxFolder(folders[2], onnx_export.compare_scores(encoder, files, tasks, progress=False))

    monkeypatch.setattr(onnx_export, "export_onnx_folder", export_none)
    assert cli.main(["export", str(checkpoint), "--int8", "--data", str(code)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert re.search(r"exit 2 as ONNX: float32 \d+ MB, int8 \d+ MB; load it with Sent.*model-2-onnx\", backend", err)
    assert [line[:9] for line in lines if line.startswith("| ")][1:] == ["| model, ", "| float32", "| int8, e"]
    assert lines[-1] == str(folders[2]) == str(checkpoint.parent / "model-2-onnx")  # the default


def test_the_last_token_learned_scale_and_unpadding_export_too(tmp_path):
    options = {"pooling": "lasttoken", "exit_norm": "all", "logit_scale_init_value": 10.0, "unpad_inputs": True}
    model = tiny_model(**SHAPE, **options).eval()
    checkpoint = save_retrieval_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    folder = export_onnx_folder(checkpoint, 1, tmp_path / "out", progress=False).folder
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert {name for name, value in pooling.items() if value is True} == {"pooling_mode_lasttoken"}
    for side in ("left", "right"):
        batch = tiny_batch(side)
        expected = run(model, **batch, exit_layer=1).sentence_embedding.numpy()
        np.testing.assert_allclose(run_onnx(folder, batch)[1], expected, rtol=0, atol=2e-6)
    assert model.config.unpad_inputs


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("order", ["pool_then_project", "project_then_pool"])
def test_8_bit_weights_leave_no_matrix_in_float_and_attention_copies_no_keys(tmp_path, head, order):
    model = tiny_model(projection_head=head, projection_order=order, projection_size=24, pooling="mean").eval()
    export_onnx(model, tmp_path / "model.onnx")
    onnx_export.quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    inputs = {name: value.numpy() for name, value in tiny_batch().items()}
    sessions = [onnx_export.open_session(tmp_path / file) for file in ("model.onnx", "int8.onnx")]
    exact, small = (session.run(["sentence_embedding"], inputs)[0] for session in sessions)
    assert ((exact * small).sum(axis=1) > 0.98).all()
    graph = onnx.load(tmp_path / "int8.onnx").graph
    assert not [one.name for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1]
    repeated = {"IsNaN", "Tile"} & {node.op_type for node in graph.node}
    assert not repeated
    assert sum(node.op_type == "Expand" for node in graph.node) < 2 * model.config.num_hidden_layers


@pytest.mark.skipif(
    "MOSE_ONNX_PYTHON" not in os.environ,
    reason="MOSE_ONNX_PYTHON names no Python with sentence-transformers 5.7, transformers 4.57 and optimum-onnx",
)
@pytest.mark.parametrize("exit_layer", EXITS)
def test_sentence_transformers_own_onnx_back_end_gives_our_embeddings(folders, checkpoint, tmp_path, exit_layer):
    texts = [ROWS[0].description, ROWS[0].code, "x", "a longer description " * 5]
    script, result = Path(__file__).with_name("scripts.py"), tmp_path / "result.npy"
    command = [os.environ["MOSE_ONNX_PYTHON"], script, "embed_by_onnx", folders[exit_layer], json.dumps(texts), result]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    model = SentenceTransformer(str(checkpoint), device="cpu")
    expected = model.encode(texts, prompt_name="query", exit_layer=exit_layer)
    np.testing.assert_allclose(np.load(result), expected, rtol=0, atol=1e-6)
