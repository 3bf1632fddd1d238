"""Models that other libraries have wrapped, FSDP2 and peft, save as whole checkpoints of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderForSequenceClassification,
)
from tests.modeling.test_saving import CODE_FILES
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model

pytestmark = pytest.mark.slow

CHECKPOINT_FILES = CODE_FILES | {"config.json", "model.safetensors"}
ROOT = Path(__file__).parents[2]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]


def embed(model):
    with torch.inference_mode():
        return model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings


def train_one_step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings.sum().backward()
    optimizer.step()
    return model.eval()


def run_processes(world_size, folder):
    """Run `sharded_training.py` in each of `world_size` processes."""
    arguments = [sys.executable, "-m", "tests.modeling.sharded_training"]
    processes = [
        subprocess.Popen(
            [*arguments, str(rank), str(world_size), str(folder)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(errors)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_model_sharded_by_fsdp2_saves_a_whole_checkpoint(tmp_path, world_size):
    run_processes(world_size, tmp_path)
    checkpoint = tmp_path / "checkpoint"
    assert {path.name for path in checkpoint.iterdir()} == CHECKPOINT_FILES
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["ModularStarEncoderForRetrieval"]
    tiny_model().save_pretrained(tmp_path / "untouched")
    assert config["auto_map"] == json.loads((tmp_path / "untouched" / "config.json").read_text())["auto_map"]
    saved, untouched = load_file(checkpoint / "model.safetensors"), tiny_model().state_dict()
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in untouched.items()}
    again = AutoModel.from_pretrained(checkpoint)
    assert type(again) is ModularStarEncoderForRetrieval
    assert torch.equal(embed(again), load_file(tmp_path / "embeddings.safetensors")["embeddings"])
    assert (embed(again) - embed(tiny_model().eval())).abs().max() > 0.1
    for rank in range(world_size):
        written = {path.name for path in (tmp_path / f"process-{rank}").iterdir()}
        assert written == (CHECKPOINT_FILES if rank == 0 else set()), "only the first process writes"


@pytest.fixture
def base(tmp_path):
    """The folder of a checkpoint to adapt."""
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# Projection heads lie in a `ModuleDict`, which peft does not take whole: its entries are named, or what is inside them.
@pytest.fixture(params=[["dense", "out_proj"], [f"projection_heads.{exit_layer}" for exit_layer in EXIT_LAYERS]])
def adapted(base, request):
    """That checkpoint after one step of LoRA on every linear layer of the trunk, with its heads trained in full."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, modules_to_save=request.param)
    return train_one_step(get_peft_model(AutoModel.from_pretrained(base), lora))


def test_lora_trains_every_linear_layer_and_every_head(base, adapted):
    before = AutoModel.from_pretrained(base).state_dict()
    after = adapted.merge_and_unload().state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    linear = {
        f"model.layers.{i}.{part}.weight"
        for i in range(4)
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.c_fc",
            "mlp.c_proj",
        )
    }
    heads = {name for name in before if name.startswith("projection_heads.")}
    assert changed == linear | heads


def test_an_adapter_reloads_onto_its_base_with_identical_embeddings(base, adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter").eval()
    assert torch.equal(embed(again), embed(adapted))
    assert (embed(again) - embed(AutoModel.from_pretrained(base))).abs().max() > 0.1


def test_merged_lora_saves_a_checkpoint_like_any_other(base, adapted, tmp_path):
    expected = embed(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == CHECKPOINT_FILES
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged")]
    assert configs[0] == configs[1]
    again, report = AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(embed(again), expected, rtol=0, atol=1e-5)


def test_an_adapter_saved_beside_its_base_leaves_the_base_whole(base):
    model = AutoModel.from_pretrained(base)
    model.add_adapter(LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=False))
    weights = (base / "model.safetensors").read_bytes()
    model.eval().save_pretrained(base)
    assert (base / "model.safetensors").read_bytes() == weights
    assert torch.equal(embed(AutoModel.from_pretrained(base).eval()), embed(model))


def test_lora_trains_the_shared_heads_of_pretraining():
    lora = LoraConfig(r=4, target_modules=LAYERS, modules_to_save=["heads"])
    model = get_peft_model(tiny_model(ModularStarEncoderForPreTraining), lora)
    labels = torch.where(tiny_batch()["attention_mask"] == 1, tiny_batch()["input_ids"], -100)
    model(**tiny_batch(), labels=labels, icc_labels=torch.tensor([1, 0, 1])).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert any("heads.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    assert idle == []


def test_a_classifier_trained_with_lora_in_the_trainer_merges_into_a_checkpoint(tmp_path):
    tiny_model(ModularStarEncoderForSequenceClassification, num_labels=3).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, target_modules=LAYERS, modules_to_save=["exit_embedding", "pooler"]
    )
    batch = tiny_batch()
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], (0, 1, 2), strict=True)
    ]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=1, learning_rate=0.1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(get_peft_model(base, lora), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    untrained = base(**batch).logits
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.inference_mode():
        expected = trainer.model.eval()(**batch).logits
        assert torch.equal(reloaded(**batch).logits, expected)
        reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-5)
    assert (untrained - expected).abs().max() > 1e-2
