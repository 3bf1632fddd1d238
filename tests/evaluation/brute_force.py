"""Metrics written out literally, one query at a time, to compare ours with; nothing here imports what it checks."""

import math
import struct


def float32(value):
    return struct.unpack("f", struct.pack("f", float(value)))[0]


def ranked(scores, gains):
    """Gains in the order of the worst ranking that the scores allow."""
    return [gain for _, gain in sorted((-float32(score), gain) for score, gain in zip(scores, gains, strict=True))]


def reciprocal_rank(scores, gains, cutoff=None):
    for place, gain in enumerate(ranked(scores, gains), start=1):
        if gain > 0:
            return 1 / place if cutoff is None or place <= cutoff else 0.0
    raise AssertionError


def recall(scores, gains, k):
    return sum(gain > 0 for gain in ranked(scores, gains)[:k]) / sum(gain > 0 for gain in gains)


def ndcg(scores, gains, k):
    def dcg(order):
        return sum((2**gain - 1) / math.log2(place + 1) for place, gain in enumerate(order[:k], start=1))

    return dcg(ranked(scores, gains)) / dcg(sorted(gains, reverse=True))


def map_at_r(scores, gains):
    """POJ-104's evaluator as described: of R answers, the precision at each hit, summed and divided by R."""
    relevant = sum(gain > 0 for gain in gains)
    hits, total = 0, 0.0
    for place, gain in enumerate(ranked(scores, gains)[:relevant], start=1):
        if gain > 0:
            hits += 1
            total += hits / place
    return total / relevant


def f1(decisions, labels):
    pairs = list(zip(decisions, labels, strict=True))
    both, said, true = pairs.count((1, 1)), sum(decisions), sum(labels)
    return 2 * both / (said + true) if both else 0.0


def cosine(first, second):
    norms = [math.sqrt(math.fsum(x * x for x in vector)) for vector in (first, second)]
    return float32(math.fsum(x * y for x, y in zip(first, second, strict=True)) / (norms[0] * norms[1]))


def cosines(queries, documents):
    return [[cosine(query, document) for document in documents.tolist()] for query in queries.tolist()]


METRICS = {
    "mrr": reciprocal_rank,
    "mrr@3": lambda scores, gains: reciprocal_rank(scores, gains, 3),
    "recall@1": lambda scores, gains: recall(scores, gains, 1),
    "recall@5": lambda scores, gains: recall(scores, gains, 5),
    "ndcg": lambda scores, gains: ndcg(scores, gains, None),
    "ndcg@10": lambda scores, gains: ndcg(scores, gains, 10),
    "map@r": map_at_r,
}
