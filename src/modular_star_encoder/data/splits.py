"""Train and test rows that share no repository, no function and no description."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from modular_star_encoder.data.functions import DocumentedFunction, code_key, description_key

MAX_TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Split:
    """Rows for training and rows held out.

    Attributes:
        train: In the order of the input.
        test: In the order of the input; none of its repositories is in `train`.
        removed_from_train: Number of training rows left out since their code or description is also in `test`.
    """

    train: list[DocumentedFunction]
    test: list[DocumentedFunction]
    removed_from_train: int


def drop_near_identical_descriptions(functions: Iterable[DocumentedFunction]) -> list[DocumentedFunction]:
    """Return `functions` without those whose description or code repeats that of an earlier one that was kept.

    Descriptions are equal when their letters and digits are, in any case; code when it differs in white space only.
    In a contrastive batch such rows would be negatives of each other, and in a benchmark, wrong answers that are right.
    """
    descriptions: set[str] = set()
    codes: set[str] = set()
    kept = []
    for function in functions:
        description, code = description_key(function.description), code_key(function.code)
        if description not in descriptions and code not in codes:
            descriptions.add(description)
            codes.add(code)
            kept.append(function)
    return kept


def split_by_repository(
    functions: Sequence[DocumentedFunction], *, seed: int, min_test: int = 2000, max_repository_share: float = 0.05
) -> Split:
    """Hold out whole repositories until they have `min_test` functions; train on the others.

    Only repositories with at most `max_repository_share` of all functions are drawn, so that no single project decides
    the figures. When these do not suffice, the smallest of the others follow. A small corpus holds out about a fifth
    of its functions if that is less than `min_test`. One repository at least is left for training. Training rows whose
    code or description (compared as in `drop_near_identical_descriptions`) is also held out are removed.

    Args:
        functions: The rows to split.
        seed: Decides which repositories are drawn. The draw depends on nothing but the seed and the repositories'
            names and sizes: not on the order of the rows, the Python version or the machine.
        min_test: Number of functions to hold out, at least.
        max_repository_share: Largest share of all functions, above 0 and up to 1, of a repository that may be drawn.

    Raises:
        ValueError: If there are fewer than two repositories, an argument is out of range, or nothing is left to train
            on because the repositories hold the same functions.
    """
    sizes = Counter(function.repository for function in functions)
    held_out = draw_repositories(sizes, seed=seed, min_test=min_test, max_repository_share=max_repository_share)
    test = [function for function in functions if function.repository in held_out]
    descriptions = {description_key(function.description) for function in test}
    codes = {code_key(function.code) for function in test}
    candidates = [function for function in functions if function.repository not in held_out]
    train = [
        function
        for function in candidates
        if description_key(function.description) not in descriptions and code_key(function.code) not in codes
    ]
    if not train:
        raise ValueError("Every training function is also in a held-out repository; add repositories that differ.")
    return Split(train, test, removed_from_train=len(candidates) - len(train))


def draw_repositories(
    sizes: Mapping[str, int], *, seed: int, min_test: int = 2000, max_repository_share: float = 0.05
) -> set[str]:
    """Return the names of the repositories to hold out.

    Args:
        sizes: The number of functions of each repository.
        seed: See `split_by_repository`, as for the following.
        min_test: Number of functions to hold out, at least, if that is not more than a fifth.
        max_repository_share: Largest share of all functions of a repository that may be drawn.

    Raises:
        ValueError: If there are fewer than two repositories, or an argument is out of range.
    """
    if min_test < 1 or not 0 < max_repository_share <= 1:
        raise ValueError("min_test must be at least 1, and max_repository_share above 0 and up to 1.")
    if len(sizes) < 2:
        raise ValueError(
            f"A split by repository needs functions of at least two repositories; these are of {len(sizes)}."
        )
    total = sum(sizes.values())
    target = min(min_test, max(1, round(MAX_TEST_SHARE * total)))
    allowed = [name for name in sizes if sizes[name] <= max_repository_share * total]
    others = [name for name in sizes if sizes[name] > max_repository_share * total]
    # A hash rather than a generator's shuffle: stable everywhere, and a new repository does not reorder the others.
    order = sorted(allowed, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    order += sorted(others, key=lambda name: (sizes[name], name))
    held_out: set[str] = set()
    count = 0
    for name in order[: len(sizes) - 1]:
        if count >= target:
            break
        held_out.add(name)
        count += sizes[name]
    return held_out
