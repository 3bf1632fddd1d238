import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel

from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from tests.modeling.test_saving import CHECKPOINT_FILES
from tests.processes import leave_together, run_processes
from tests.tiny import EXIT_LAYERS, contents, run, tiny_batch, tiny_model

pytestmark = pytest.mark.slow

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]


def embed(model):
    return run(model, **tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_sharded_by_fsdp2_saves_a_whole_checkpoint(tmp_path, world_size):
    run_processes("tests.modeling.test_wrapping", tmp_path, world=world_size)
    checkpoint = tmp_path / "checkpoint"
    assert set(contents(checkpoint)) == CHECKPOINT_FILES
    tiny_model().save_pretrained(tmp_path / "untouched")
    for key in ("architectures", "auto_map"):
        assert read_config(checkpoint)[key] == read_config(tmp_path / "untouched")[key]
    saved, untouched = load_file(checkpoint / "model.safetensors"), tiny_model().state_dict()
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in untouched.items()}
    again = AutoModel.from_pretrained(checkpoint)
    assert type(again) is ModularStarEncoderForRetrieval
    assert torch.equal(embed(again), load_file(tmp_path / "embeddings.safetensors")["embeddings"])
    assert (embed(again) - embed(tiny_model())).abs().max() > 0.1
    for rank in range(world_size):
        expected = CHECKPOINT_FILES if rank == 0 else set()
        assert set(contents(tmp_path / f"process-{rank}")) == expected, "only the first process writes"


@pytest.fixture
def base(tmp_path):
    """The folder of a checkpoint to adapt."""
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# Projection heads are in a `ModuleDict`, which peft does not take whole: name its entries, or the layers in them.
@pytest.fixture(params=[["dense", "out_proj"], [f"projection_heads.{exit_layer}" for exit_layer in EXIT_LAYERS]])
def adapted(base, request):
    """The model in `base` after a step of LoRA on every linear layer of the trunk; its heads are trained in full."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, modules_to_save=request.param)
    model = get_peft_model(AutoModel.from_pretrained(base), lora).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings.sum().backward()
    optimizer.step()
    return model.eval()


def test_lora_trains_every_linear_layer_and_head_reloads_onto_its_base_and_merges_into_a_checkpoint(
    base, adapted, tmp_path
):
    expected, plain = embed(adapted), AutoModel.from_pretrained(base)
    assert (expected - embed(plain)).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(embed(again), expected)
    before, merged = plain.state_dict(), adapted.merge_and_unload()
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    linear = {name for name in before if name.split(".")[-2] in LAYERS and name.endswith(".weight")}
    assert len(linear) == 4 * len(LAYERS)
    assert changed == linear | {name for name in before if name.startswith("projection_heads.")}
    merged.save_pretrained(tmp_path / "merged")
    assert set(contents(tmp_path / "merged")) == CHECKPOINT_FILES
    assert read_config(base) == read_config(tmp_path / "merged")
    again, report = AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(embed(again), expected, rtol=0, atol=1e-5)


def test_an_adapter_saved_beside_its_base_leaves_the_base_whole(base):
    model = AutoModel.from_pretrained(base)
    model.add_adapter(LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=False))
    weights = (base / "model.safetensors").read_bytes()
    model.save_pretrained(base)
    assert (base / "model.safetensors").read_bytes() == weights
    assert torch.equal(embed(AutoModel.from_pretrained(base)), embed(model))


def main(folder):
    """One process: shard a model, train a step, save it, and save an unsharded model."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world_size,))
    model = tiny_model().eval()
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings.sum().backward()
    optimizer.step()
    with torch.no_grad():
        embeddings = model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings
    # Every process calls; the model decides which one writes.
    model.save_pretrained(folder / "checkpoint")
    if rank == 0:
        save_file({"embeddings": embeddings}, folder / "embeddings.safetensors")
    tiny_model().save_pretrained(folder / f"process-{rank}")
    leave_together(folder, rank, world_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
