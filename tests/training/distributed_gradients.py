"""One of several processes of tests/training/test_distributed.py: gradients of its share of a batch, averaged.

Usage: RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python -m tests.training.distributed_gradients WRAPPER OUT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.objectives.exit_losses import InContextObjective
from tests.processes import leave_together
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model

ROWS = 4


def joint_batch():
    """Rows with very different numbers of masked tokens: averaging the processes' means would be wrong."""
    batch = tiny_batch(lengths=(12, 3, 9, 4))
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    labels[2:, :-1] = -100
    return {**batch, "labels": labels, "icc_labels": torch.tensor([1, 0, 0, 1])}


def new_model():
    return tiny_model(
        ModularStarEncoderForPreTraining, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0
    )


def weighted_loss(model, batch):
    losses = InContextObjective()(model, batch, EXIT_LAYERS).losses
    return (losses * torch.tensor([1 / 4, 2 / 4, 1.0])).sum()


def main(wrapper, out):
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = new_model()
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    batch = {name: tensor[rank * ROWS // world : (rank + 1) * ROWS // world] for name, tensor in joint_batch().items()}
    weighted_loss(wrapped, batch).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    if rank == 0:
        save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, out)
    leave_together(out.parent, rank, world)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
