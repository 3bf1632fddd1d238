"""Small source texts and functions that the tests of this folder share."""

import numpy as np

from modular_star_encoder.data.functions import DocumentedFunction, extract_functions
from modular_star_encoder.data.sources import SourceFile
from modular_star_encoder.data.token_store import TokenCorpus
from modular_star_encoder.data.tokenizer import ContentEncoder, encode_content, train_tokenizer

WORDS = ["load", "save", "parse", "build", "merge", "split", "index", "count", "table", "column", "buffer", "stream"]


def source(text, repository="repo", path="module.py"):
    return SourceFile(repository, path, "python", text)


def extract_one(text):
    (function,) = extract_functions(source(text))
    return function


def function(
    repository="repo", name="run", description="Run all the steps.", code="def run():\n    a = 1\n    return a"
):
    return DocumentedFunction(repository, "module.py", 1, "python", name, description, code)


def repository_texts(repositories=6, texts=5, lines=12):
    """Texts whose every line names their repository, so that a snippet tells where it is from."""
    return {
        f"repo{r}": [
            "\n".join(f"repo{r} file{t} {WORDS[(r + t + i) % len(WORDS)]} = {i}" for i in range(lines))
            for t in range(texts)
        ]
        for r in range(repositories)
    }


def small_tokenizer(max_length=128):
    texts = [text for texts in repository_texts().values() for text in texts]
    return train_tokenizer(texts, 400, max_length=max_length, progress=False)


def corpus_of(texts, tokenizer):
    """A tokenized corpus in memory: `texts` is repository → texts, all of one language, or a list of source files."""
    if isinstance(texts, dict):
        texts = [SourceFile(name, "", "", text) for name in sorted(texts) for text in texts[name]]
    rows = encode_content(tokenizer, [file.text for file in texts], progress=False)
    repositories, languages = (
        np.unique([getattr(file, name) for file in texts], return_inverse=True) for name in ("repository", "language")
    )
    repositories, languages = ((tuple(n.tolist()), i.astype(np.int32)) for n, i in (repositories, languages))
    return TokenCorpus(rows, np.arange(len(texts)), *repositories, *languages, ContentEncoder(tokenizer).checksum)
