"""What other libraries do for near-deduplication, as their documentation shows it, on the same shingles."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from planted_duplicates import shingles

PERMUTATIONS, THRESHOLD, SEED = 256, 0.7, 1


def end_to_end() -> dict[str, Callable[[Sequence[str]], Any]]:
    """From texts to near-duplicates; only the last, ours, compares the texts themselves."""
    return {
        "datasketch, plain": _datasketch_plain,
        "datasketch, bulk with xxhash": _datasketch_bulk,
        "rensa's deduplicator": _rensa_deduplicator,
        "ours, verified": _ours,
    }


def signatures() -> dict[str, Callable[[Sequence[str]], Any]]:
    """From texts to signatures."""
    contenders = {
        "datasketch, plain": lambda texts: [_plain_minhash(text) for text in texts],
        "datasketch, bulk with xxhash": _bulk_minhashes,
        "datatrove's formula with xxhash": _datatrove,
        "rensa on strings": _rensa_strings,
        "ours: rensa on hashes by numpy": _ours_signatures,
    }
    try:
        from text_dedup.minhash import embed_func
    except ImportError:  # its pins (urllib3 ≤ 2.0, rich < 14) exclude ours; it can be put beside them without its own
        return contenders
    return contenders | {"text-dedup's core with xxhash": lambda texts: _text_dedup(embed_func, texts)}


def _plain_minhash(text: str) -> Any:
    from datasketch import MinHash

    minhash = MinHash(num_perm=PERMUTATIONS)
    for shingle in shingles(text):
        minhash.update(shingle.encode("utf-8"))
    return minhash


def _bulk_minhashes(texts: Sequence[str]) -> Any:
    import xxhash
    from datasketch import MinHash

    encoded = ([shingle.encode("utf-8") for shingle in shingles(text)] for text in texts)
    return MinHash.bulk(encoded, num_perm=PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)


def _matches(minhashes: Any) -> list[list[Any]]:
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    found = []
    for row, minhash in enumerate(minhashes):
        found.append(index.query(minhash))
        index.insert(row, minhash)
    return found


def _datasketch_plain(texts: Sequence[str]) -> Any:
    return _matches(map(_plain_minhash, texts))


def _datasketch_bulk(texts: Sequence[str]) -> Any:
    return _matches(_bulk_minhashes(texts))


def _rensa_deduplicator(texts: Sequence[str]) -> Any:
    from rensa import RMinHashDeduplicator

    deduplicator = RMinHashDeduplicator(
        threshold=THRESHOLD, num_perm=250, use_lsh=True, num_bands=25, seed=SEED
    )  # bands of equal size: 25 of 10
    return deduplicator.add_pairs((str(row), list(shingles(text))) for row, text in enumerate(texts))


def _ours(texts: Sequence[str]) -> Any:
    from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings, find_near_duplicates

    return find_near_duplicates([[_ours_signatures(texts)]], DuplicateSettings())


def _rensa_strings(texts: Sequence[str]) -> Any:
    from rensa import RMinHash

    return RMinHash.digest_matrix_from_token_sets(
        [list(shingles(text)) for text in texts], PERMUTATIONS, SEED
    ).to_rows()


def _ours_signatures(texts: Sequence[str]) -> Any:
    from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings, fingerprint

    return fingerprint(texts, DuplicateSettings().banding)


def _datatrove(texts: Sequence[str]) -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig, create_hash_func

    # Without its constructor, which wants a word tokenizer.
    step = object.__new__(MinhashDedupSignature)
    step.config = MinhashConfig(
        num_buckets=25, hashes_per_bucket=10, hash_config=HashConfig(precision=64, hash_fc="xxhash")
    )
    step.num_hashes, step._parameters = 250, None
    hash_shingle = create_hash_func(step.config.hash_config)

    def hashed(text: str) -> np.ndarray:
        return np.fromiter((hash_shingle(one.encode("utf-8")) for one in shingles(text)), np.uint64).reshape(-1, 1)

    return [step.get_signature(hashed(text)) for text in texts]


def _text_dedup(embed: Callable[..., Any], texts: Sequence[str]) -> Any:
    from text_dedup.utils import xxh3_32hash

    prime, largest = np.uint32((1 << 32) - 5), np.uint32((1 << 32) - 1)
    random = np.random.RandomState(SEED)
    options = {
        "num_perm": PERMUTATIONS,
        "ngram_size": 5,
        "min_length": 0,
        "hashranges": [(start, start + 10) for start in range(0, 250, 10)],
        "permutations": tuple(random.randint(low, prime, PERMUTATIONS, np.uint32) for low in (1, 0)),
        "hash_func": xxh3_32hash,
        "dtype": np.uint32,
        "max_hash": largest,
        "modulo_prime": prime,
    }
    # It shingles words: with every character made one, there are as many shingles as in the others' work.
    return [embed(" ".join(text), row, **options) for row, text in enumerate(texts)]
