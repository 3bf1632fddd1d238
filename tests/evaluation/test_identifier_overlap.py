"""In-context classification by identifiers alone."""

import pytest
import torch

from modular_star_encoder.data.in_context import InContextPairs
from modular_star_encoder.evaluation.lexical import identifier_overlap, identifier_overlap_accuracy


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ("parse(tree)", "tree.parse", 1.0),
        ("parse tree", "parse file", 1 / 3),
        ("a + b == 12", "x", 0.0),
        ("_private1", "_private2", 0.0),
    ],
)
def test_overlap_is_jaccard_of_identifiers(first, second, overlap):
    assert identifier_overlap(first, second) == pytest.approx(overlap)


def pairs(tokenizer, same_words, seed):
    """Repositories whose functions share words of their own, or share nothing."""
    texts = {
        f"repository {r}": [
            " ".join(f"word{chr(97 + (r if same_words else 7 * f + r) % 26)}{i} = {i}" for i in range(6))
            for f in range(6)
        ]
        for r in range(4)
    }
    return InContextPairs(texts, tokenizer, length=200, max_tokens=128, seed=seed, progress=False)


def test_repositories_with_words_of_their_own_are_distinguished_and_others_are_not(tokenizer):
    clear = identifier_overlap_accuracy(pairs(tokenizer, True, 0), pairs(tokenizer, True, 1), tokenizer)
    assert clear["accuracy"] > 0.95
    assert 0 <= clear["threshold"] < 1
    blind = identifier_overlap_accuracy(pairs(tokenizer, False, 0), pairs(tokenizer, False, 1), tokenizer)
    assert blind["accuracy"] < 0.7


def test_masked_words_count(tokenizer):
    (row,) = (pairs(tokenizer, True, 0)[i] for i in range(1))
    everything_masked = {**row, "labels": torch.where(row["input_ids"] > 3, row["input_ids"], row["labels"])}
    everything_masked["input_ids"] = torch.where(row["input_ids"] > 3, tokenizer.mask_token_id, row["input_ids"])
    results = [identifier_overlap_accuracy([one], [one], tokenizer) for one in (row, everything_masked)]
    assert results[0]["threshold"] == results[1]["threshold"]
