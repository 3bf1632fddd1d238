"""The formula against torch's counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modular_star_encoder.inference.profile import flops_per_token
from modular_star_encoder.training.recipes import load_config
from tests.errors import raises
from tests.tiny import EXIT_LAYERS, tiny_model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("order", ["project_then_pool", "pool_then_project"])
def test_the_formula_counts_what_torch_counts(attention, order):
    model = tiny_model(projection_order=order).eval()
    model.set_attn_implementation(attention)
    for exit_layer in EXIT_LAYERS:
        for batch, length in ((1, 5), (3, 40)):
            ids = torch.full((batch, length), 7)
            # The counter knows no formula of the fused attention on CPUs.
            with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), exit_layer=exit_layer)
            expected = counter.get_total_flops() / (batch * length)
            assert flops_per_token(model.config, exit_layer, length) == pytest.approx(expected, rel=1e-12)


def test_the_papers_model_costs_about_two_operations_per_parameter():
    config = load_config("finetuned")
    # 36 layers of 27.8 million weights and their biases in matrix products; embeddings take part in none.
    assert flops_per_token(config, 36, 1) == pytest.approx(2 * 36 * 27.79e6, rel=0.01)
    assert flops_per_token(config, 36, 2048) > 1.1 * flops_per_token(config, 36, 1)


def test_what_has_no_cost_is_refused():
    config = load_config("finetuned")
    with pytest.raises(ValueError, match="its exits are 4, 9, 18, 27, 36"):
        flops_per_token(config, 5, 10)
    with raises("profile.length", 0):
        flops_per_token(config, 4, 0)
