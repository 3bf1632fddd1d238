"""Several processes: the gradients of one on the joint batch."""

import json

import pytest
from safetensors.torch import load_file

from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from tests.objectives.contrastive_batches import assert_same_gradients, every_option, every_side, gradients, pair_batch
from tests.objectives.contrastive_processes import VARIANTS, new_model, pretraining_backward, weighted_loss
from tests.processes import run_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_processes("tests.objectives.contrastive_processes", folder)
    return folder


# Sums are taken in another order, and mini-batches have other widths: float64 shows that it is rounding alone.
@pytest.mark.parametrize(("dtype", "relative"), [("float32", 5e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_give_the_gradients_of_one_with_every_option(folder, variant, dtype, relative):
    model = new_model(dtype)
    weighted_loss(model, every_side(), every_option()).backward()
    assert_same_gradients(load_file(folder / f"{variant}-{dtype}.safetensors"), gradients(model), relative)


def test_two_processes_give_the_gradients_of_one_through_the_loss_for_sentence_transformers(folder):
    model = new_model()
    weighted_loss(model, pair_batch(), ContrastiveSettings()).backward()
    assert_same_gradients(load_file(folder / "sentence_transformer.safetensors"), gradients(model), relative=5e-6)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one_in_pretraining(folder, wrapper):
    model = pretraining_backward()
    assert_same_gradients(load_file(folder / f"pretraining-{wrapper}.safetensors"), gradients(model), relative=5e-6)


def test_batches_that_are_not_equally_large_are_refused_in_every_process(folder):
    for rank in (0, 1):
        message = json.loads((folder / f"refused-{rank}.json").read_text())
        assert "2/2/2/2 and 3/3/3/3 texts" in message
        assert "must be equally large" in message
