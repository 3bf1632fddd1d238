"""One process of a training shared by several: shard a model with FSDP2, train one step, save.

Run by `test_wrapping.py`, once per process. Usage: RANK WORLD_SIZE FOLDER; FOLDER receives `checkpoint/`,
`embeddings.safetensors`, the sharded model's own embeddings after the step, and for each process `process-RANK/`, where
it has saved an unsharded model.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.processes import leave_together
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    model = tiny_model().eval()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings.sum().backward()
    optimizer.step()
    with torch.no_grad():
        embeddings = model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings
    # Every process calls alike; whose turn it is to write is the model's affair.
    model.save_pretrained(folder / "checkpoint")
    if rank == 0:
        save_file({"embeddings": embeddings}, folder / "embeddings.safetensors")
    tiny_model().save_pretrained(folder / f"process-{rank}")
    leave_together(folder, rank, world_size)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
