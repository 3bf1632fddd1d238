"""One of several processes: shard a model with FSDP2, train one step, save. Run by `test_wrapping.py`.

Usage: FOLDER, which receives `checkpoint/`, the sharded model's `embeddings.safetensors` after the step, and for each
process `process-RANK/`, where it has saved an unsharded model.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.processes import leave_together
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model


def main(folder: Path) -> None:
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
