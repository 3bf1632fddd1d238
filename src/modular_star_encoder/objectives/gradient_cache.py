"""Embed a batch of any size, with gradient, in the memory that one mini-batch needs (GradCache, arXiv 2101.06983).

The forward pass embeds every mini-batch at all exits without a graph and remembers the random states. Autograd computes
the gradient of the loss with respect to these embeddings. The backward pass embeds each mini-batch once more, with the
same random states and autocast, and propagates the mini-batch's part of this gradient to the parameters. So weights of
losses and gradient accumulation work as usual, but `torch.autograd.grad` of parameters raises an error.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings, rank_and_count
from modular_star_encoder.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """Some texts of one side of a batch, such as `query`, cut to `width` tokens; all later tokens are padding."""

    side: str
    rows: torch.Tensor  # (R,) indices of these rows in the batch
    width: int

    def cut(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model's inputs for R of the B texts; tensors (B, T, …) of T tokens become (R, width, …)."""
        shape, parts = inputs["input_ids"].shape[:2], dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.shape[:1] == shape[:1]:
                parts[name] = value[self.rows, : self.width] if value.shape[:2] == shape else value[self.rows]
        return parts


def cut_mini_batches(sides: Mapping[str, Mapping[str, Any]], tokens: int) -> list[MiniBatch]:
    """Cut the sides of a batch, such as `query`, into mini-batches of at most `tokens` tokens, padding included.

    A text with more tokens is a mini-batch of its own. The longest texts come first: this saves padding, and a lack of
    memory shows at once. Padding on the left counts as text.
    """
    mini_batches = []
    for side, inputs in sides.items():
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        lengths = mask.shape[1] - mask.flip(1).long().argmax(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        sorted_lengths = lengths[order].tolist()
        begin = 0
        while begin < len(order):
            width = sorted_lengths[begin]
            rows = order[begin : begin + max(1, tokens // width)]
            mini_batches.append(MiniBatch(side, rows, width))
            begin += len(rows)
    return mini_batches


def split_further(mini_batches: list[MiniBatch], count: int) -> list[MiniBatch]:
    """Halve the largest mini-batch again and again until there are `count`; `count` is at most the number of rows."""
    mini_batches = list(mini_batches)
    while len(mini_batches) < count:
        place = max(range(len(mini_batches)), key=lambda index: len(mini_batches[index].rows))
        largest = mini_batches[place]
        middle = len(largest.rows) // 2
        halves = [replace(largest, rows=rows) for rows in (largest.rows[:middle], largest.rows[middle:])]
        mini_batches[place : place + 1] = halves
    return mini_batches


# One side's inputs → embeddings (E, B, D), and the model's learned logit scale (1,) if it has one.
Embed = Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor | None]]


def embed_sides(
    model: nn.Module, embed: Embed, sides: Mapping[str, Mapping[str, Any]], settings: ContrastiveSettings
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Embed the texts of all sides, such as `query`; return {side: embeddings} and the learned logit scale or None.

    Embeddings are (E, B, D): E exits, B texts, D components. `embed` computes them for some texts of a side. Under DDP,
    gradients are synchronised in the last mini-batch only.
    """
    device = next(iter(sides.values()))["input_ids"].device
    if settings.mini_batch_tokens is None:
        _check_processes(sides, 0, device)
        whole = {side: embed(dict(inputs)) for side, inputs in sides.items()}
        return {side: stack for side, (stack, _) in whole.items()}, next(iter(whole.values()))[1]
    model = getattr(model, "_orig_mod", model)
    if packed := [side for side, inputs in sides.items() if "cu_seq_lens_q" in inputs]:
        message = f"`mini_batch_tokens` needs one row per text, but the texts of {packed[0]!r} are packed into one row."
        raise UserError("contrastive.mini_batches.packed", message)
    if getattr(model, "static_graph", False):
        message = "`mini_batch_tokens` does not work with DDP's static_graph; set static_graph=False."
        raise UserError("contrastive.mini_batches.static_graph", message)
    mini_batches = cut_mini_batches(sides, settings.mini_batch_tokens)
    # FSDP's collectives need the same number of forward passes in each process.
    mini_batches = split_further(mini_batches, _check_processes(sides, len(mini_batches), device))
    left = len(mini_batches)
    mps_states: dict[int, Any] = {}  # mini-batch → random state of MPS, the only device whose state torch does not keep

    def run(anchor: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed mini-batch `number`: called without a graph in the forward pass, with a graph in the backward pass."""
        nonlocal left
        inputs = mini_batches[number].cut(sides[mini_batches[number].side])
        now = torch.mps.get_rng_state() if device.type == "mps" else None
        if not torch.is_grad_enabled():
            mps_states[number] = now
            return embed(inputs)
        if now is not None:
            torch.mps.set_rng_state(mps_states[number])
        left = (left or len(mini_batches)) - 1
        torch.clear_autocast_cache()  # it may hold weights that were cast without a graph
        # An outer no_sync (gradient accumulation) applies to the last mini-batch too.
        with model.no_sync() if left and isinstance(model, DistributedDataParallel) else nullcontext():
            outputs = embed(inputs)
        if now is not None:
            torch.mps.set_rng_state(now)
        return outputs

    # `anchor` requires grad, so that the outputs do too: the parameters are not inputs of the checkpointed function.
    anchor = torch.zeros((), device=device, requires_grad=True)
    outputs = [checkpoint(run, anchor, number, use_reentrant=True) for number in range(len(mini_batches))]
    # All sides are in one tensor, so that the backward pass also reaches a side that no loss uses.
    starts = dict(zip(sides, accumulate(map(number_of_texts, sides.values()), initial=0), strict=False))
    order = torch.cat([one.rows + starts[one.side] for one in mini_batches]).argsort()
    joint = torch.cat([stack for stack, _ in outputs], dim=1)[:, order]
    stacks = joint.split([number_of_texts(inputs) for inputs in sides.values()], dim=1)
    return dict(zip(sides, stacks, strict=True)), outputs[0][1]


def number_of_texts(inputs: Mapping[str, Any]) -> int:
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), torch.Tensor):
        return 0  # `check_sides` reports it
    bounds = inputs.get("cu_seq_lens_q")
    return inputs["input_ids"].shape[0] if bounds is None else len(bounds) - 1


def _check_processes(sides: Mapping[str, Mapping[str, Any]], mini_batches: int, device: torch.device) -> int:
    """Return the largest `mini_batches` of any process; UserError if processes have unequal numbers of texts."""
    if (processes := rank_and_count()[1]) == 1:
        return mini_batches
    numbers = torch.tensor([*map(number_of_texts, sides.values()), mini_batches], device=device)
    gathered = numbers.new_empty(processes, len(numbers))
    distributed.all_gather(list(gathered), numbers)
    everyones = gathered.tolist()
    if any(others[:-1] != everyones[0][:-1] for others in everyones):
        rows = " and ".join(sorted({"/".join(map(str, others[:-1])) for others in everyones}))
        message = f"Processes have {rows} texts, but need batches of equal size: set dataloader_drop_last=True."
        raise UserError("contrastive.processes", message)
    return max(others[-1] for others in everyones)
