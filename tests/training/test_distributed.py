"""Several processes train as one does."""

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import run_processes
from tests.training.distributed_gradients import joint_batch, new_model, weighted_loss


@pytest.mark.slow
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
