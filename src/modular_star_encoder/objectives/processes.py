"""What processes that train together have to tell each other about a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import distributed


def rank_and_count() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) without `torch.distributed`."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """The whole numbers of every process, as many in each."""
    processes = rank_and_count()[1]
    if processes == 1:
        return [list(numbers)]
    own = torch.tensor(numbers, device=device)
    everyones = [torch.empty_like(own) for _ in range(processes)]
    distributed.all_gather(everyones, own)
    return torch.stack(everyones).tolist()


def gather_stacks(stacks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embeddings of all processes, with gradient, in one collective for all sides and exits.

    Under an averaging wrapper such as DDP, a loss of local rows against these columns has the exact gradient of the
    loss on the joint batch: the backward pass sums what every process found for a column, and needs no factor.

    Args:
        stacks: side → (E, B, D), of equal sizes in every process.

    Returns:
        side → (E, processes × B, D); the rows of process r begin at r × B.
    """
    if rank_and_count()[1] == 1:
        return dict(stacks)
    joint = _GatherWithGradient.apply(torch.cat(list(stacks.values()), dim=1))
    by_side = joint.split([stack.shape[1] for stack in stacks.values()], dim=2)
    return {side: part.transpose(0, 1).flatten(1, 2) for side, part in zip(stacks, by_side, strict=True)}


class _GatherWithGradient(torch.autograd.Function):
    """(E, N, D) of each process → (processes, E, N, D); the backward pass sums over processes (reduce-scatter)."""

    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor) -> torch.Tensor:
        gathered = stack.new_empty(rank_and_count()[1], *stack.shape)
        distributed.all_gather(list(gathered), stack.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        own = torch.empty_like(gradient[0])
        distributed.reduce_scatter(own, list(gradient.contiguous()))
        return own
