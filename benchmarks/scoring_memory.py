"""Rank every one of 100,000 documents for each of 100,000 queries: the peak memory of the process that does it.

    python benchmarks/scoring_memory.py                       # 100,000 × 100,000, 256 dimensions
    python benchmarks/scoring_memory.py --size 20000

Embeddings lie in a cache on disk, as the harness leaves them there; one process writes them and another ranks. Peak is
the largest resident set (VmHWM of /proc/self/status, Linux only), mapped files included; "imports" is the resident set
before the first embedding is read. The matrix of all scores would take 40 GB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from report import write

SPACE = "random/full"
LIMIT_MB = 2 * 2**30 / 1e6


def main() -> int:
    """Parse, measure, print, write; 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000, help="queries, and documents (default: %(default)s)")
    parser.add_argument("--dimensions", type=int, default=256, help="of an embedding (default: %(default)s)")
    parser.add_argument("--run", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        step, folder = arguments.run
        print(json.dumps((fill if step == "fill" else rank)(Path(folder), arguments.size, arguments.dimensions)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for step in ("fill", "rank"):
            options = [f"--size={arguments.size}", f"--dimensions={arguments.dimensions}", "--run", step, folder]
            command = [sys.executable, __file__, *options]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = {"size": arguments.size, "dimensions": arguments.dimensions, **json.loads(output.splitlines()[-1])}
    print(json.dumps(figures, indent=2))
    print(f"\n{write('scoring_memory', figures)}")
    return int(figures["peak_mb"] > LIMIT_MB)


def texts(kind: str, size: int) -> list[tuple[str, str]]:
    """Stand-ins for prompts and texts."""
    return [("", f"{kind} {number}") for number in range(size)]


def fill(folder: Path, size: int, dimensions: int) -> None:
    """Queries are random; document i is near query i."""
    from modular_star_encoder.evaluation.retrievers import EmbeddingCache

    cache, generator, shard = EmbeddingCache(folder), np.random.default_rng(0), 4096
    queries, documents = texts("query", size), texts("document", size)
    for start in range(0, size, shard):
        part = slice(start, start + shard)
        embeddings = generator.normal(size=(len(queries[part]), dimensions)).astype(np.float32)
        noise = generator.normal(size=embeddings.shape).astype(np.float32)
        cache.add(SPACE, queries[part], embeddings)
        cache.add(SPACE, documents[part], embeddings + 3 * noise)


def rank(folder: Path, size: int, dimensions: int) -> dict[str, float]:
    """Peak memory, and the MRR as a sign that it did rank."""
    from modular_star_encoder.evaluation.metrics import query_values, rank_judged
    from modular_star_encoder.evaluation.retrievers import CosineScores, EmbeddingCache
    from modular_star_encoder.evaluation.tasks import Judgements

    imports = resident_mb("VmRSS")
    cache = EmbeddingCache(folder)
    scores = CosineScores(*(cache.rows(SPACE, texts(kind, size)) for kind in ("query", "document")))
    ranking = rank_judged(scores, Judgements.one_each(range(size)))
    return {
        "imports_mb": round(imports, 1),
        "peak_mb": round(resident_mb("VmHWM"), 1),
        "mrr": round(float(query_values(ranking, "mrr").mean()), 4),
    }


def resident_mb(field: str) -> float:
    """A line of /proc/self/status in MB (10^6 bytes)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
