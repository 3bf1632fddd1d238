"""Retrievers, tasks and rows small enough to work out by hand."""

from dataclasses import replace

import numpy as np

from modular_star_encoder.evaluation.metrics import query_values, rank_judged
from modular_star_encoder.evaluation.retrievers import CosineScores, EmbeddingCache, EmbeddingRetriever, RowScores
from modular_star_encoder.evaluation.tasks import Judgements, PairTask, candidate_batches, ranking_task
from modular_star_encoder.inference.encoders import Text


def rank_matrix(scores, gains):
    """Rank D documents for each of Q queries by scores (Q, D); `gains` (Q, D) are 1 for relevant documents, else 0."""
    scores = np.array(scores, dtype=np.float32)
    given = RowScores(scores.shape, lambda start, end: scores[start:end])
    return rank_judged(given, Judgements(*np.nonzero(gains)))


class GivenEncoder:
    """Embeds a text as the numbers written in it; exit k sees the first k of them."""

    def __init__(self, name="given", exit_layers=(1, 2, 3), noise=0.0):
        self.name, self.exit_layers, self.dimensions = name, exit_layers, (None,)
        self.checksum = f"{name}-{noise}"
        self.noise, self.calls = noise, []

    def prompt(self, text):
        return ""

    def encode(self, texts, exit_layers, *, progress=True):
        self.calls.append((len(texts), tuple(exit_layers)))
        values = np.array([[float(part) for part in text.split()] for _, text in texts], dtype=np.float32)
        values += self.noise * np.random.default_rng(0).normal(size=values.shape)
        return {k: np.pad(values[:, :k], ((0, 0), (0, values.shape[1] - k))) for k in exit_layers}


def given_retriever(name="given", *, folder=None, **options):
    return EmbeddingRetriever(GivenEncoder(name, **options), EmbeddingCache(folder))


def vectors(n, size=3, seed=0):
    values = np.random.default_rng(seed).normal(size=(n, size)).round(3)
    return [Text(" ".join(map(str, row))) for row in values]


def retrieval_task(benchmark="toy", name="one", n=20, seed=0, **options):
    """Document i is query i with noise, so that deeper exits, which see more components, find it more often."""
    queries, noise = vectors(n, seed=seed), vectors(n, seed=seed + 100)
    values, others = (np.array([text.text.split() for text in texts], dtype=float) for texts in (queries, noise))
    documents = [Text(" ".join(map(str, row.tolist()))) for row in values + 0.3 * others]
    return replace(ranking_task(benchmark, name, queries, documents, [f"q{i}" for i in range(n)]), **options)


def pair_task(n=30, seed=0):
    """Neighbours in a list of vectors; alike where the label says so."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, size=n)
    first = generator.normal(size=(n, 3))
    second = np.where(labels[:, None] == 1, first, -first) + generator.normal(size=(n, 3))
    texts = [Text(" ".join(map(str, row.round(3)))) for row in np.concatenate([first, second])]
    pairs = np.stack([np.arange(n), np.arange(n) + n], axis=1)
    half = n // 2
    return PairTask("pairs", "test", texts, pairs[:half], labels[:half], pairs[half:], labels[half:])


def reciprocal_ranks(queries, documents, size, seed=0):
    """Of embeddings of pairs, in batches of candidates or (size None) among all documents."""
    everything = [np.arange(len(queries))]
    ranks = []
    for rows in everything if size is None else candidate_batches(len(queries), size, seed):
        scores = CosineScores(queries[rows], documents[rows])
        ranks.append(query_values(rank_judged(scores, Judgements.one_each(range(len(rows)))), "mrr"))
    return np.concatenate(ranks)


def code_rows(verbs, language_of):
    """(description, code, language) of every verb and noun."""
    return [
        (f"{verb} the {noun}", f"def {verb}_{noun}():\n    return {noun}", language)
        for verb in verbs
        for noun, language in language_of.items()
    ]
