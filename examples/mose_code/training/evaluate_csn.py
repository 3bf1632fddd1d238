"""A checkpoint on CodeSearchNet (999 distractors, MRR × 100), for evaluation only:

python evaluate_csn.py CHECKPOINT [--exits 0 1 2 4 6] [--data MOSE_DATA/codesearchnet] [--max-tokens 256] [--json OUT]

Per exit and language, the matrix query exit × document exit, and each exit fused with BM25 by the sum of standardised scores.
Protocol of the project's codesearchnet-999: shuffled with seed 0 by language, batches of 1,000 (the last incomplete one dropped),
query = first paragraph up to the first `@`, ties count against the system.
"""

import os
import argparse
import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from student import LOG_WEIGHTS, Shape, embed

_LETTER = r"[^\WA-Z\d_]"
_PART = re.compile(rf"[A-Z]+(?!{_LETTER})|[A-Z]?{_LETTER}+|\d+")


def query_of(documentation):
    return re.split(r"\n\s*\n|@", documentation.strip(), maxsplit=1)[0].strip() or documentation.strip()


def read(folder, language):
    rows = [json.loads(line) for line in gzip.open(Path(folder) / f"{language}_test.jsonl.gz", "rt")]
    return [query_of(r["func_documentation_string"]) for r in rows], [r["func_code_string"] for r in rows]


def batches(n, size=1000):
    order = np.random.RandomState(0).permutation(n)
    return [order] if n < size else [order[s : s + size] for s in range(0, n - size + 1, size)]


def mrr(scores):
    """Scores (Q, Q), the right one on the diagonal; ties count against."""
    return float((1 / (scores >= scores.diagonal()[:, None]).sum(1)).mean())


def standardise(scores):
    return (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-9)


def bm25(queries, documents, k1=1.2, b=0.75):
    """Lucene's BM25 over parts of identifiers, each term of a query once."""
    import scipy.sparse as sp

    tokens = [[part.lower() for part in _PART.findall(text)] for text in documents]
    vocab = {}
    rows, columns = [], []
    for i, document in enumerate(tokens):
        for token in document:
            rows.append(i)
            columns.append(vocab.setdefault(token, len(vocab)))
    tf = sp.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(documents), len(vocab))).tocsr()
    length = np.array([len(t) for t in tokens])
    df = np.asarray((tf > 0).sum(0)).ravel()
    idf = np.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
    coo = tf.tocoo()
    weight = idf[coo.col] * coo.data / (coo.data + k1 * (1 - b + b * length[coo.row] / length.mean()))
    matrix = sp.coo_matrix((weight, (coo.row, coo.col)), shape=tf.shape).tocsr()
    q_rows, q_columns = [], []
    for i, text in enumerate(queries):
        for token in {part.lower() for part in _PART.findall(text)}:
            if token in vocab:
                q_rows.append(i)
                q_columns.append(vocab[token])
    q = sp.coo_matrix((np.ones(len(q_rows)), (q_rows, q_columns)), shape=(len(queries), len(vocab))).tocsr()
    return np.asarray((q @ matrix.T).todense(), dtype=np.float32)


def load(checkpoint):
    checkpoint = Path(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    params = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        params |= {n: t.float() for n, t in load_file(path).items()}
    params[LOG_WEIGHTS] = params[LOG_WEIGHTS].clamp(min=1e-12).log()
    shape = Shape(
        vocab=config["vocab_size"], hidden=config["hidden_size"], heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"], inter=config["intermediate_size"], layers=config["num_hidden_layers"],
        exits=tuple(config["exit_layers"]), out=config["projection_size"],
    )
    return params, shape, Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@torch.no_grad()
def encode(params, shape, tokenizer, texts, exits, max_tokens):
    tokenizer.enable_truncation(max_tokens)
    ids = [e.ids or [1] for e in tokenizer.encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = {e: np.zeros((len(texts), shape.out), np.float32) for e in exits}
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        longest = max(len(ids[i]) for i in rows)
        batch = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in rows])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in rows]).bool()
        for e, v in embed(params, batch, mask, shape, exits, torch.float32).items():
            out[e][rows] = v.numpy()
    return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default=os.path.join(os.environ.get("MOSE_DATA", "."), "codesearchnet"))
    parser.add_argument("--languages", nargs="+", default=["ruby", "javascript", "go"])
    parser.add_argument("--exits", type=int, nargs="+")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--json")
    a = parser.parse_args()
    params, shape, tokenizer = load(a.checkpoint)
    exits = tuple(a.exits or shape.exits)
    result = {"mrr": {e: {} for e in exits}, "fused": {e: {} for e in exits}, "bm25": {}, "cross": {}}
    cross = {(i, j): [] for i in exits for j in exits}
    for language in a.languages:
        queries, codes = read(a.data, language)
        q, d = (encode(params, shape, tokenizer, t, exits, a.max_tokens) for t in (queries, codes))
        single, fused, lexical = {e: [] for e in exits}, {e: [] for e in exits}, []
        matrix = {(i, j): [] for i in exits for j in exits}
        for pool in batches(len(queries)):
            words = bm25([queries[i] for i in pool], [codes[i] for i in pool])
            lexical.append(mrr(words))
            for i in exits:
                for j in exits:
                    scores = q[i][pool] @ d[j][pool].T
                    matrix[i, j].append(mrr(scores))
                    if i == j:
                        single[i].append(matrix[i, j][-1])
                        fused[i].append(mrr(standardise(scores) + standardise(words)))
        for e in exits:
            result["mrr"][e][language] = 100 * np.mean(single[e])
            result["fused"][e][language] = 100 * np.mean(fused[e])
        result["bm25"][language] = 100 * np.mean(lexical)
        for key, values in matrix.items():
            cross[key].append(100 * np.mean(values))
    mean = lambda row: float(np.mean(list(row.values())))
    show = lambda row: "  ".join(f"{row[l]:5.1f}" for l in a.languages) + f"  mean {mean(row):5.2f}"
    print("           " + "  ".join(l[:5].rjust(5) for l in a.languages))
    print("BM25       " + show(result["bm25"]))
    for e in exits:
        print(f"exit {e}     " + show(result["mrr"][e]) + "   with BM25 " + show(result["fused"][e]))
    print("query exit (rows) × document exit (columns) " + " ".join(f"{e:6d}" for e in exits))
    for i in exits:
        print(f"{i:43d} " + " ".join(f"{np.mean(cross[i, j]):6.2f}" for j in exits))
    result["cross"] = {f"{i},{j}": float(np.mean(v)) for (i, j), v in cross.items()}
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1, default=float))


if __name__ == "__main__":
    main()
