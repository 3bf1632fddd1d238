"""The other lexical baseline: TF-IDF cosine over the parts of identifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from modular_star_encoder.evaluation.bm25 import identifier_tokens
from modular_star_encoder.evaluation.scores import BLOCK, Block
from modular_star_encoder.evaluation.systems import Variant
from modular_star_encoder.evaluation.tasks import Text


class TfIdf:
    """TF-IDF as a `System`: sublinear term frequency, document frequencies of the candidates of each pool, cosine."""

    name = "TF-IDF"
    variants = (Variant(),)

    def __init__(self) -> None:
        self.fingerprint = f"tfidf-sublinear-{version('scikit-learn')}"

    def prepare(self, texts: Sequence[Text], variants: Sequence[Variant], *, progress: bool = True) -> None:
        """Nothing to do."""

    def scores(self, queries: Sequence[Text], documents: Sequence[Text], variant: Variant) -> SparseScores:
        """Cosine similarities of weights that are fitted on the documents."""
        vectorizer = TfidfVectorizer(analyzer=identifier_tokens, sublinear_tf=True)
        try:
            fitted = vectorizer.fit_transform([text.text for text in documents])
        except ValueError:  # not one term in any document
            empty = csr_matrix((len(documents), 1)), csr_matrix((len(queries), 1))
            return SparseScores(empty[1], empty[0])
        return SparseScores(vectorizer.transform([text.text for text in queries]), fitted)


class SparseScores:
    """Dot products of sparse unit rows (Q, V) and (D, V), always added up in the order of the terms."""

    def __init__(self, queries: csr_matrix, documents: csr_matrix) -> None:
        self.shape = (queries.shape[0], documents.shape[0])
        self._queries, self._documents = queries.sorted_indices(), documents.sorted_indices()

    def blocks(self) -> Iterator[Block]:
        """Blocks of whole rows."""
        columns = self._documents.T.tocsr()
        step = max(1, BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            product = (self._queries[start : start + step] @ columns).toarray()
            yield Block(start, 0, product.astype(np.float32))

    def of_pairs(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """See `Scores`."""
        scores = np.empty(len(queries), dtype=np.float32)
        for start in range(0, len(queries), 4096):
            part = slice(start, start + 4096)
            products = self._queries[queries[part]].multiply(self._documents[documents[part]])
            scores[part] = np.asarray(products.sum(axis=1)).ravel()
        return scores
