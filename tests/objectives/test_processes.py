"""Several processes give the gradients of one on the joint batch; each is a run of this module as a program.

It writes the gradients of each variant, averaged over the processes, to the folder that it is given, and
`refused-{rank}.json`, the error of each process about batches that are not equally large.
"""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.distillation import DistillationObjective, DistillationSettings
from modular_star_encoder.objectives.exit_losses import InContextObjective
from modular_star_encoder.objectives.sentence_transformer_loss import MultiExitContrastiveLoss
from tests.objectives.contrastive_batches import (
    WEIGHTS,
    assert_same_gradients,
    every_option,
    every_side,
    gradients,
    pair_batch,
    taught_batch,
    with_dropout,
)
from tests.processes import leave_together, run_processes
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_tokenizer

pytestmark = pytest.mark.slow

ROWS = 6
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def new_model(dtype="float32"):
    learned_scale = 12.0 if dtype == "float32" else None  # it is float32 in any model
    return with_dropout(0.0, logit_scale_init_value=learned_scale).to(DTYPES[dtype])


def weighted_loss(model, batch, settings):
    return (ContrastiveObjective(settings)(model, batch, EXIT_LAYERS).losses * WEIGHTS).sum()


def distilled(wrap=lambda model: model, share=slice(None)):
    """A model with the gradients of its share of six pairs and texts with a teacher's vectors."""
    model, settings = new_model(), DistillationSettings(relational_weight=0.5)
    wrapped = wrap(model)
    own = rows(taught_batch(), share.start, share.stop)
    (DistillationObjective(settings)(wrapped, own, EXIT_LAYERS).losses * WEIGHTS).sum().backward()
    return model


def pretraining_backward(wrap=lambda model: model, share=slice(None)):
    """A model with the gradients of its share of four rows.

    They have very different numbers of masked tokens: averaging the processes' means would be wrong.
    """
    batch = tiny_batch(lengths=(12, 3, 9, 4))
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    labels[2:, :-1] = -100
    batch |= {"labels": labels, "icc_labels": torch.tensor([1, 0, 0, 1])}
    model = with_dropout(0.0, ModularStarEncoderForPreTraining)
    wrapped = wrap(model)  # DDP must outlive the forward pass
    own = {key: tensor[share] for key, tensor in batch.items()}
    (InContextObjective()(wrapped, own, EXIT_LAYERS).losses * WEIGHTS).sum().backward()
    return model


def rows(batch, first, last):
    return {side: {name: tensor[first:last] for name, tensor in inputs.items()} for side, inputs in batch.items()}


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def accumulated(model, wrapped, batch, settings):
    """Two equal halves of the gradient, of which only the second is synchronised."""
    with wrapped.no_sync():
        (weighted_loss(wrapped, batch, settings) / 2).backward()
    (weighted_loss(wrapped, batch, settings) / 2).backward()


def two_steps(model, wrapped, batch, settings):
    """Whatever a first step leaves in the wrapper must not disturb the second."""
    for _ in range(2):
        model.zero_grad()
        weighted_loss(wrapped, batch, settings).backward()


unused_parameters_looked_for = partial(DistributedDataParallel, find_unused_parameters=True)
VARIANTS = {
    "ddp": (DistributedDataParallel, None, two_steps),
    "ddp_cached": (DistributedDataParallel, 13, two_steps),
    "ddp_cached_accumulated": (DistributedDataParallel, 13, accumulated),
    "ddp_cached_unused": (unused_parameters_looked_for, 13, two_steps),
    "fsdp2_cached": (sharded, 13, two_steps),
}


def sentence_transformer(batch, folder):
    """Pairs alone, through the loss for sentence-transformers' trainer, which puts the wrapped model into it."""
    if distributed.get_rank() == 0:
        save_retrieval_checkpoint(new_model(), tiny_tokenizer(), folder)
    distributed.barrier()
    model = SentenceTransformer(str(folder), device="cpu").train()
    loss = MultiExitContrastiveLoss(model, ContrastiveSettings(mini_batch_tokens=13), weights=WEIGHTS.tolist())
    loss.model = unused_parameters_looked_for(model)
    sum(loss([batch["query"], batch["document"]]).values()).backward()
    return model[0].auto_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_processes("tests.objectives.test_processes", folder)
    return folder


# Sums are taken in another order, and mini-batches have other widths: float64 shows that it is rounding alone.
@pytest.mark.parametrize(("dtype", "relative"), [("float32", 5e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_give_the_gradients_of_one_with_every_option(folder, variant, dtype, relative):
    model = new_model(dtype)
    weighted_loss(model, every_side(), every_option()).backward()
    assert_same_gradients(load_file(folder / f"{variant}-{dtype}.safetensors"), gradients(model), relative)


def paired():
    model = new_model()
    weighted_loss(model, pair_batch(), ContrastiveSettings()).backward()
    return model


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("sentence_transformer", paired),
        ("distillation", distilled),
        ("pretraining-ddp", pretraining_backward),
        ("pretraining-fsdp2", pretraining_backward),
    ],
)
def test_two_processes_give_the_gradients_of_one_in_other_objectives(folder, name, alone):
    assert_same_gradients(load_file(folder / f"{name}.safetensors"), gradients(alone()), relative=5e-6)


def test_batches_that_are_not_equally_large_are_refused_in_every_process(folder):
    for rank in (0, 1):
        message = json.loads((folder / f"refused-{rank}.json").read_text())
        assert "2/2/2/2 and 3/3/3/3 texts" in message
        assert "need batches of equal size" in message


def main(folder):
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    batch = rows(every_side(), rank * ROWS // world, (rank + 1) * ROWS // world)

    def save(model, name):
        found = gradients(model)
        whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}
        if rank == 0:
            save_file({key: value.contiguous() for key, value in whole.items()}, folder / f"{name}.safetensors")

    for name, (wrap, tokens, run) in VARIANTS.items():
        for dtype in DTYPES:
            model = new_model(dtype)
            run(model, wrap(model), batch, every_option(mini_batch_tokens=tokens))
            save(model, f"{name}-{dtype}")
    save(distilled(DistributedDataParallel, slice(rank * ROWS // world, (rank + 1) * ROWS // world)), "distillation")
    save(sentence_transformer(batch, folder / "checkpoint"), "sentence_transformer")
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", sharded)):
        share = slice(rank * 4 // world, (rank + 1) * 4 // world)
        save(pretraining_backward(wrap, share), f"pretraining-{name}")
    try:
        weighted_loss(new_model(), rows(batch, 0, 2 + rank), every_option())
    except ValueError as error:
        (folder / f"refused-{rank}.json").write_text(json.dumps(str(error)))
    leave_together(folder, rank, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
