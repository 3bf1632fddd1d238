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


def gradients_of_processes(wrapper, out, world=2):
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tests.training.distributed_gradients", wrapper, str(out)]
    processes = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(world)]
    assert [process.wait(timeout=120) for process in processes] == [0] * world
    return load_file(out)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one_on_the_joint_batch(tmp_path, wrapper):
    model = new_model()
    weighted_loss(model, joint_batch()).backward()
    found = gradients_of_processes(wrapper, tmp_path / "gradients.safetensors")
    for name, parameter in model.named_parameters():
        expected = parameter.grad
        assert (found[name] - expected).norm() <= 1e-6 * expected.norm() + 1e-9, name
    assert torch.stack([gradient.norm() for gradient in found.values()]).norm() > 0.1
