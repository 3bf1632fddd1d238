"""The folder of the shipped model is what the publisher writes, and int8 files of its kind can be made."""

from pathlib import Path

import pytest

from modular_star_encoder.hub.manifest import load_manifest
from modular_star_encoder.hub.onnx_export import export_onnx, open_session, quantize_onnx
from modular_star_encoder.hub.staging import stage_repositories
from modular_star_encoder.training.recipes import hub_config_folder
from tests.tiny import tiny_batch, tiny_model

FOLDER = hub_config_folder("mose-code")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_folder_is_what_the_publisher_writes_with_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (staged,) = stage_repositories(load_manifest(FOLDER / "publish.yaml", ["namespace=YOUR-NAME"]), tmp_path / "staged")
    written = {path.relative_to(staged.folder).as_posix(): path for path in staged.folder.rglob("*") if path.is_file()}
    kept = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*") if path.is_file()}
    code = {"configuration_modular_star_encoder.py", "modeling_modular_star_encoder.py"}
    assert set(written) - set(kept) == code
    assert set(kept) - set(written) == {"publish.yaml", "exit-0.yaml", "recipe.yaml", "finetune.yaml"}
    # Only these two name the code, or how the tokenizer was loaded.
    for name in sorted((set(kept) & set(written)) - {"config.json", "tokenizer_config.json", "exit_profile.json"}):
        if name.endswith(".png"):
            continue  # another version of the plotting library may draw it differently
        assert written[name].read_bytes() == kept[name].read_bytes(), name


@pytest.mark.slow
def test_8_bit_weights_of_a_linear_head_that_is_used_twice(tmp_path):
    head = {"projection_head": "linear", "projection_order": "pool_then_project", "projection_size": 32}
    model = tiny_model(**head, pooling="mean").eval()
    export_onnx(model, tmp_path / "model.onnx")
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    inputs = {name: value.numpy() for name, value in tiny_batch().items()}
    exact, small = (
        open_session(tmp_path / file).run(["sentence_embedding"], inputs)[0] for file in ("model.onnx", "int8.onnx")
    )
    assert ((exact * small).sum(axis=1) > 0.98).all()
