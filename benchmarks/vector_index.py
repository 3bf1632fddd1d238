"""An index of a million functions, as `mose index` writes it: time of a question, recall, disk, memory.

    python benchmarks/vector_index.py                    # 1,000,000 rows of width 384
    python benchmarks/vector_index.py --rows 200000

Vectors lie on the sphere in groups of groups, as embeddings of code do; questions are rows with noise of norm 0.3, and
the exact answers are those of the float32 vectors. A row's text is 25 lines of words drawn by a Zipf law, most of them
repeated within the row: as long as functions of transformers and SciPy, of as many different words. Three words drawn
by the same law are a question of words. Rows are written 256 at a time, as `mose index` does. One process writes and
another asks; memory is the largest resident set (VmHWM, Linux), mapped files included, above that at its start.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from time import perf_counter, process_time
from typing import Any
from zlib import crc32

import numpy as np
from report import status_bytes, write

from modular_star_encoder.search.local_store import LocalStore
from modular_star_encoder.search.pieces import Snippet, question_stems, snippet_words
from modular_star_encoder.search.vector_store import Filter, Row, file_id
from modular_star_encoder.utils.reports import markdown_table

CHUNK, BATCH = 10_240, 256
QUESTIONS, WARM_UP, TOP, EXIT_LAYER = 200, 20, 10, 0
LINES, WORDS_PER_LINE, VOCABULARY, REPEATED = 25, 4, 200_000, 0.6
ROWS_PER_FILE = 8
SYLLABLES = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "en", "i", "or", "u", "al")]


def main() -> None:
    """Write, ask, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=384, help="components of a vector (default: %(default)s)")
    parser.add_argument("--name", default="vector_index", help="of the results (default: %(default)s)")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"rows": arguments.rows, "width": arguments.width}
    with tempfile.TemporaryDirectory() as folder:
        for step in (partial(fill, rows=arguments.rows, width=arguments.width), ask):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                figures |= fresh.submit(step, Path(folder)).result()
                print(figures, file=sys.stderr)
    text = report_text(figures)
    print(f"{text}\n\n{write(arguments.name, figures, text)}")


def fill(folder: Path, rows: int, width: int) -> dict[str, float]:
    """Write the rows and finish; the questions with their exact answers go beside the index."""
    before, writing = status_bytes("VmHWM"), 0.0
    store = LocalStore(folder / "index")
    store.create({})
    maker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    questions = np.empty((0, width))
    best = np.empty((QUESTIONS, 0), dtype=[("score", "f4"), ("row", "i8")])
    for first, vectors in chunks(rows, width):
        questions = questions if len(questions) else questions_near(vectors)
        found = np.empty((QUESTIONS, len(vectors)), dtype=best.dtype)
        found["score"], found["row"] = questions @ vectors.T, np.arange(first, first + len(vectors))
        best = np.concatenate([best, found], axis=1)
        best = np.take_along_axis(best, np.argpartition(-best["score"], TOP, axis=1)[:, :TOP], axis=1)
        starts = range(0, len(vectors), BATCH)
        for batch in maker.map(rows_of, [first + one for one in starts], [vectors[one:][:BATCH] for one in starts]):
            writing -= perf_counter()
            store.replace_files((), batch)
            writing += perf_counter()
    maker.shutdown()
    start = perf_counter()
    store.finish()
    np.savez(folder / "exact.npz", questions=questions, rows=best["row"])
    return {
        "write_seconds": round(writing, 1),
        "finish_seconds": round(perf_counter() - start, 1),
        "write_peak_mb": round((status_bytes("VmHWM") - before) / 1e6),
        "disk_mb": round(sum(path.stat().st_size for path in (folder / "index").iterdir()) / 1e6),
    }


def ask(folder: Path) -> dict[str, float]:
    """One question after the other, by vectors and then by words."""
    exact = np.load(folder / "exact.npz")
    before = status_bytes("VmHWM")
    store, everything = LocalStore(folder / "index"), Filter()
    vectors, hits = timed("", lambda one: store.nearest(one, EXIT_LAYER, TOP, everything), exact["questions"])
    vector_peak = status_bytes("VmHWM") - before
    generator = np.random.default_rng(3)
    asked = [question_stems(" ".join(zipf(generator, 3))) for _ in range(QUESTIONS)]
    words, _ = timed("words_", lambda one: store.lexical(one, TOP, everything), asked)
    right = [
        len({one.snippet.first_line for one in found} & {*wanted})
        for found, wanted in zip(hits, exact["rows"].tolist(), strict=True)
    ]
    return {
        "recall_at_10": float(np.mean(right)) / TOP,
        **vectors,
        **words,
        "vector_peak_mb": round(vector_peak / 1e6),
        "ask_peak_mb": round((status_bytes("VmHWM") - before) / 1e6),
    }


def timed(name: str, call: Callable[[Any], Any], questions: Any) -> tuple[dict[str, float], list[Any]]:
    """Milliseconds by the clock and of processors, and the answers, after a few questions that warm up."""
    times, busy, answers = [], [], []
    for question in [*questions[:WARM_UP], *questions]:
        start, used = perf_counter(), process_time()
        answers.append(call(question))
        times.append(1000 * (perf_counter() - start))
        busy.append(1000 * (process_time() - used))
    figures = {}
    for kind, values in (("", times), ("processor_", busy)):
        for percent in (50, 95):
            figures[f"{name}{kind}p{percent}_ms"] = round(float(np.percentile(values[WARM_UP:], percent)), 1)
    return figures, answers[WARM_UP:]


def chunks(rows: int, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """First row and vectors (≤ CHUNK, width) float32 of length 1.

    N/200 centres around N/10,000 group centres; sizes of clusters are log-normal, and each has a spread of its own,
    larger in some directions than in others.
    """
    generator = np.random.default_rng(0)
    count = max(1, rows // 200)
    groups = generator.normal(size=(max(1, count // 50), width))
    centres = normalised(
        groups[generator.integers(len(groups), size=count)] + 0.8 * generator.normal(size=(count, width))
    )
    sizes, spreads = generator.lognormal(0, 1, size=count), generator.uniform(0.3, 0.9, size=count)
    spectrum = 1 / np.sqrt(1 + np.arange(width) / 32)
    spectrum /= np.linalg.norm(spectrum)
    for start in range(0, rows, CHUNK):
        cluster = generator.choice(count, size=min(CHUNK, rows - start), p=sizes / sizes.sum())
        noise = generator.normal(size=(len(cluster), width)) * spectrum
        yield start, normalised(centres[cluster] + spreads[cluster, None] * noise)


def questions_near(vectors: np.ndarray) -> np.ndarray:
    """(QUESTIONS, width): some of the vectors, with noise of norm 0.3."""
    generator = np.random.default_rng(1)
    chosen = vectors[generator.choice(len(vectors), QUESTIONS, replace=False)]
    return normalised(chosen + 0.3 * generator.normal(size=chosen.shape) / np.sqrt(chosen.shape[1]))


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Scaled to length 1, in float32."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def zipf(generator: np.random.Generator, size: int) -> list[str]:
    """Words, the first of the vocabulary the most frequent: P(n) ~ 1 / (n + 10)."""
    ranks = 10 * (VOCABULARY / 10 + 1) ** generator.random(size) - 10
    return [vocabulary()[rank] for rank in ranks.astype(int).tolist()]


@cache
def vocabulary() -> list[str]:
    """Of the rarer words every third is a name of two."""
    words = ["".join(parts[::-1]) for parts in islice(product(SYLLABLES, repeat=4), VOCABULARY)]
    words.sort(key=lambda word: crc32(word.encode()))
    return [
        f"{words[rank % 997]}_{word}" if rank > 1000 and rank % 3 == 0 else word[: 3 + rank % 5]
        for rank, word in enumerate(words)
    ]


def text_of(generator: np.random.Generator) -> str:
    """The next function."""
    repeats = (generator.random(LINES * WORDS_PER_LINE) / REPEATED).tolist()
    names = zipf(generator, len(repeats))
    for place, repeat in enumerate(repeats):
        if repeat < 1:
            names[place] = names[int(repeat * place)]
    lines = [f"    {a} = {b}({c}, {d})" for a, b, c, d in zip(*[iter(names)] * WORDS_PER_LINE, strict=True)]
    return "\n".join([f"def {names[0]}({names[1]}):", *lines[1:]])


def rows_of(first: int, vectors: np.ndarray) -> list[Row]:
    """A batch of rows, numbered from `first`."""
    generator = np.random.default_rng((2, first))
    return [row(first + place, vector, text_of(generator)) for place, vector in enumerate(vectors)]


def row(number: int, vector: np.ndarray, text: str) -> Row:
    """A row whose first line is its number; ROWS_PER_FILE belong to a file."""
    path = f"folder_{number // 1000}/file_{number // ROWS_PER_FILE}.py"
    key, name = file_id(path), text[4 : text.index("(")]
    snippet = Snippet(path, "python", name, number, number + LINES - 1, text, number, (name,))
    words = snippet_words(snippet)
    identity = (number % ROWS_PER_FILE, key, key, ROWS_PER_FILE)
    return Row(*identity, snippet, words, {EXIT_LAYER: vector})


def report_text(figures: dict[str, Any]) -> str:
    """A table."""
    rows = [
        (f"{figures['rows']:,} rows of width {figures['width']}", ""),
        ("recall@10 of vectors", f"{figures['recall_at_10']:.3f}"),
        *(
            (f"a question of {what}, p50 and p95, ms{kind}", f"{figures[f'{key}p50_ms']}, {figures[f'{key}p95_ms']}")
            for what, name in (("a vector", ""), ("three words", "words_"))
            for kind, key in (("", name), (" of processors", f"{name}processor_"))
        ),
        ("disk, MB", f"{figures['disk_mb']:,}"),
        (
            "memory of asking by vector, and by words too, MB",
            f"{figures['vector_peak_mb']:,}, {figures['ask_peak_mb']:,}",
        ),
        ("seconds to write, and to finish", f"{figures['write_seconds']:,.0f}, {figures['finish_seconds']:,.0f}"),
        ("memory of writing, MB", f"{figures['write_peak_mb']:,}"),
    ]
    return "\n".join(markdown_table(rows))


if __name__ == "__main__":
    main()
