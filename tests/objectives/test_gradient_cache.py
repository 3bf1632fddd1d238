import pytest
import torch

from modular_star_encoder.objectives.contrastive import ContrastiveObjective, losses_from_embeddings
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.gradient_cache import cut_mini_batches, split_further
from tests.errors import raises
from tests.objectives.contrastive_batches import (
    WEIGHTS,
    assert_same_gradients,
    every_option,
    every_side,
    gradients,
    pair_batch,
    texts,
    with_dropout,
)
from tests.tiny import EXIT_LAYERS


def losses_of_mini_batches_in_one_graph(model, batch, settings, tokens):
    """What the cache has to equal: the same mini-batches in the same order, all of their graphs kept."""
    stacks, logit_scale = {}, None
    parts = {side: [] for side in batch}
    mini_batches = cut_mini_batches(batch, tokens)
    for mini_batch in mini_batches:
        output = model(**mini_batch.cut(batch[mini_batch.side]), exit_layers=EXIT_LAYERS)
        logit_scale = output.logit_scale
        parts[mini_batch.side].append((mini_batch.rows, output.exit_embeddings))
    for side, found in parts.items():
        order = torch.cat([rows for rows, _ in found]).argsort()
        stacks[side] = torch.cat([stack for _, stack in found], dim=1)[:, order]
    return losses_from_embeddings(stacks, EXIT_LAYERS, settings, logit_scale).losses


def cached_backward(model, batch, settings):
    """The losses, after a backward pass with the same dropout each time from empty gradients."""
    model.zero_grad()
    torch.manual_seed(5)
    losses = ContrastiveObjective(settings)(model, batch, EXIT_LAYERS).losses
    (losses * WEIGHTS).sum().backward()
    return losses.detach()


@pytest.mark.parametrize("tokens", [1, 13, 40, 10_000])
def test_any_mini_batch_size_gives_plain_autograds_losses_and_gradients_with_dropout_and_every_option(tokens):
    settings, batch = every_option(mini_batch_tokens=tokens), every_side()
    model = with_dropout(0.2, logit_scale_init_value=12.0)
    torch.manual_seed(5)
    expected_losses = losses_of_mini_batches_in_one_graph(model, batch, settings, tokens)
    (expected_losses * WEIGHTS).sum().backward()
    expected, state_after = gradients(model), torch.get_rng_state()
    losses = cached_backward(model, batch, settings)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
    assert "logit_scale.log_scale" in expected
    assert_same_gradients(gradients(model), expected)
    assert torch.equal(torch.get_rng_state(), state_after), "the generator must go on as after one forward pass"
    with torch.no_grad():
        assert not ContrastiveObjective(settings)(model, batch, EXIT_LAYERS).losses.requires_grad


def test_two_forward_passes_before_the_first_backward_pass_do_not_mix():
    settings, model = ContrastiveSettings(mini_batch_tokens=13), with_dropout(0.2)
    sides = every_side()
    batches = [pair_batch(), {"query": sides["negative"], "document": sides["translation"]}]
    objective = ContrastiveObjective(settings)
    torch.manual_seed(5)
    for batch in batches:
        objective(model, batch, EXIT_LAYERS).losses.sum().backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    losses = [objective(model, batch, EXIT_LAYERS).losses.sum() for batch in batches]
    for loss in losses:
        loss.backward()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("whole_step_under_autocast", [False, True])
def test_autocast_is_on_in_the_second_pass_as_in_the_first(whole_step_under_autocast):
    settings, batch, model = ContrastiveSettings(mini_batch_tokens=20), pair_batch(), with_dropout(0.1)
    dtypes, found = [], []
    model.projection_heads["1"].dense.register_forward_hook(lambda module, _, output: dtypes.append(output.dtype))
    for losses_of, cache_enabled in (
        # With its cache of cast weights, autograd would add the mini-batches' gradients up in bfloat16.
        (lambda: losses_of_mini_batches_in_one_graph(model, batch, settings, 20), False),
        (lambda: ContrastiveObjective(settings)(model, batch, EXIT_LAYERS).losses, True),
    ):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache_enabled):
            total = (losses_of() * WEIGHTS).sum()
            if whole_step_under_autocast:
                total.backward()
        if not whole_step_under_autocast:
            total.backward()
        found.append(gradients(model))
        model.zero_grad()
    assert set(dtypes) == {torch.bfloat16}
    assert_same_gradients(*found)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    settings, batch, model = ContrastiveSettings(mini_batch_tokens=20), pair_batch(), with_dropout(0.2)
    cached_backward(model, batch, settings)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    cached_backward(model, batch, settings)
    assert_same_gradients(gradients(model), expected)


def test_only_one_mini_batchs_graph_is_alive():
    """Counted by what autograd keeps: the largest sum of saved numbers does not grow with the batch."""
    model = with_dropout(0.0)

    def most_kept(rows, tokens):
        alive, most = 0, 0

        class Kept:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor = tensor
                alive += tensor.numel()
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.tensor.numel()

        sides = {"query": texts([8] * rows, 1), "document": texts([8] * rows, 2)}
        objective = ContrastiveObjective(ContrastiveSettings(mini_batch_tokens=tokens))
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            objective(model, sides, EXIT_LAYERS).losses.sum().backward()
        return most

    kept = {rows: most_kept(rows, 32) for rows in (4, 32)}
    assert kept[32] < 1.3 * kept[4]
    assert most_kept(32, None) > 5 * kept[32]


def test_mini_batches_hold_every_row_once_without_shared_padding_on_the_right():
    batch = {side: inputs | {"other": torch.arange(6)} for side, inputs in every_side().items()}
    mini_batches = cut_mini_batches(batch, 20)
    for side, inputs in batch.items():
        own = [mini_batch for mini_batch in mini_batches if mini_batch.side == side]
        assert sorted(torch.cat([mini_batch.rows for mini_batch in own]).tolist()) == list(range(6))
        for mini_batch in own:
            cut = mini_batch.cut(inputs)
            assert cut["input_ids"].numel() <= 20 or len(mini_batch.rows) == 1
            assert cut["attention_mask"][:, -1].any()
            assert cut["attention_mask"].shape[1] == mini_batch.width
            assert torch.equal(cut["attention_mask"].sum(dim=1), inputs["attention_mask"][mini_batch.rows].sum(dim=1))
            assert torch.equal(cut["other"], mini_batch.rows)
            for row, ids, mask in zip(mini_batch.rows, cut["input_ids"], cut["attention_mask"], strict=True):
                assert torch.equal(ids[mask.bool()], inputs["input_ids"][row][inputs["attention_mask"][row].bool()])


def test_mini_batches_are_split_until_there_are_as_many_as_elsewhere():
    mini_batches = cut_mini_batches(pair_batch(), 1000)
    assert len(mini_batches) == 2
    for count in (2, 5, 12):
        split = split_further(mini_batches, count)
        assert len(split) == count
        assert sorted((part.side, row) for part in split for row in part.rows.tolist()) == sorted(
            (side, row) for side in ("query", "document") for row in range(6)
        )


def test_packed_texts_are_refused():
    batch = pair_batch() | {"query": {"input_ids": torch.ones(1, 8), "cu_seq_lens_q": torch.arange(7)}}
    with raises("contrastive.mini_batches.packed", "'query'"):
        ContrastiveObjective(ContrastiveSettings(mini_batch_tokens=8))(with_dropout(0.0), batch, EXIT_LAYERS)
