"""Several processes train as one does."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.training.distributed_gradients import joint_batch, new_model, weighted_loss


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_processes(*command, world=2):
    """Run `python -m command` in several processes that can form a group."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", *map(str, command)]
    processes = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(world)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one_on_the_joint_batch(tmp_path, wrapper):
    model = new_model()
    weighted_loss(model, joint_batch()).backward()
    run_processes("tests.training.distributed_gradients", wrapper, tmp_path / "gradients.safetensors")
    found = load_file(tmp_path / "gradients.safetensors")
    for name, parameter in model.named_parameters():
        expected = parameter.grad
        assert (found[name] - expected).norm() <= 1e-6 * expected.norm() + 1e-9, name
    assert torch.stack([gradient.norm() for gradient in found.values()]).norm() > 0.1
