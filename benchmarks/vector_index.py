"""A store of a million vectors, as `mose index` makes it: time of a question, recall, memory, disk.

    python benchmarks/vector_index.py                            # 1,000,000 vectors of width 256
    python benchmarks/vector_index.py --rows 200000 --width 128
    python benchmarks/vector_index.py --sweep                    # other numbers of probes and refinements too

Everything goes through the package's own store for LanceDB (search/lance_store.py), with its settings. Three processes
take turns: one writes rows and finds the exact answers, one makes the index, one asks. Peaks are the largest resident
set (VmHWM, Linux) above what each process had before it opened the store; mapped files and caches count. Processor time
is that of all threads together, and depends less than the clock on what else the machine does.

Vectors lie on the sphere in groups of groups, as embeddings of code do: N/200 centres, gathered around N/10,000 group
centres; sizes of clusters are log-normal and each has a spread of its own, larger in some directions than in others.
Questions are rows with noise of norm 0.3. A row's text is a few words, so that disk is that of vectors and their index.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from report import status_bytes, write

from modular_star_encoder.search import lance_store
from modular_star_encoder.search.lance_store import LanceStore
from modular_star_encoder.search.vector_store import Filter, Row, Snippet, content_hash, file_id, row_id
from modular_star_encoder.utils.reports import library_versions, markdown_table

CHUNK = 50_000
QUESTIONS = 200
WARM_UP = 20
TOP = 10
EXIT_LAYER = 1
LANGUAGES = ("c", "c++", "go", "java", "javascript", "php", "python", "ruby")
SWEEP = ((5, 5), (10, 5), (20, 2), (20, 5), (40, 5), (40, 20))
EVERYTHING = Filter()
LIMIT_MS, LEAST_RECALL = 50, 0.95


def main() -> int:
    """Parse, run the three processes, print, write; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=256, help="components of a vector (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="also ask with other settings")
    parser.add_argument("--note", help="goes into the results, such as what else ran on the machine")
    parser.add_argument("--name", default="vector_index", help="of the results (default: %(default)s)")
    parser.add_argument("--run", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        step, folder = arguments.run
        steps = {"fill": fill, "index": make_index, "ask": ask}
        print(json.dumps(steps[step](Path(folder), arguments)))
        return 0
    figures: dict[str, Any] = {"rows": arguments.rows, "width": arguments.width, "cores_used": cores()}
    with tempfile.TemporaryDirectory() as folder:
        for step in ("fill", "index", "ask"):
            command = [sys.executable, __file__, *sys.argv[1:], "--run", step, folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures[step] = json.loads(output.splitlines()[-1])
            print(f"{step}: {figures[step]}", file=sys.stderr)
    figures |= {"note": arguments.note, "lancedb": library_versions(("lancedb",))["lancedb"]}
    ours = figures["ask"]["settings"][0]
    figures["target_met"] = ours["p95_ms"] < LIMIT_MS and ours["recall_at_10"] >= LEAST_RECALL
    text = report_text(figures)
    print(f"{text}\n\n{write(arguments.name, figures, text)}")
    return int(not figures["target_met"])


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def chunks(rows: int, width: int) -> Iterator[np.ndarray]:
    """Vectors (≤ CHUNK, width) float32 of length 1, the same in every run; see the text above."""
    generator = np.random.default_rng(0)
    count = max(1, rows // 200)
    groups = generator.normal(size=(max(1, count // 50), width)).astype(np.float32)
    around = generator.normal(size=(count, width)).astype(np.float32)
    centres = normalised(groups[generator.integers(len(groups), size=count)] + 0.8 * around)
    sizes = generator.lognormal(0, 1, size=count)
    spreads = generator.uniform(0.3, 0.9, size=count).astype(np.float32)
    spectrum = (1 / np.sqrt(1 + np.arange(width) / 32)).astype(np.float32)
    spectrum /= np.linalg.norm(spectrum)
    for start in range(0, rows, CHUNK):
        own = np.random.default_rng((0, start + 1))
        size = min(CHUNK, rows - start)
        cluster = own.choice(count, size=size, p=sizes / sizes.sum())
        noise = own.standard_normal(size=(size, width), dtype=np.float32) * spectrum
        yield normalised(centres[cluster] + spreads[cluster, None] * noise)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def questions_near(vectors: np.ndarray) -> np.ndarray:
    """(QUESTIONS, width): some of the vectors, with noise of norm 0.3."""
    generator = np.random.default_rng(1)
    chosen = vectors[generator.choice(len(vectors), QUESTIONS, replace=False)]
    noise = generator.standard_normal(size=chosen.shape, dtype=np.float32) / np.sqrt(chosen.shape[1], dtype=np.float32)
    return normalised(chosen + 0.3 * noise)


def fill(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the rows, the questions and their exact answers."""
    store = LanceStore(str(folder / "index"))
    store.create({"exit_layers": [EXIT_LAYER], "dimension": arguments.width, "states": False})
    writing, best, questions = 0.0, np.empty((QUESTIONS, 0), dtype=[("score", "f4"), ("row", "i8")]), None
    for number, vectors in enumerate(chunks(arguments.rows, arguments.width)):
        if questions is None:
            questions = questions_near(vectors)
        scores = questions @ vectors.T
        found = np.empty(scores.shape, dtype=best.dtype)
        found["score"], found["row"] = scores, np.arange(len(vectors)) + number * CHUNK
        found = np.take_along_axis(found, np.argpartition(-scores, TOP, axis=1)[:, :TOP], axis=1)
        best = np.concatenate([best, found], axis=1)
        best = np.take_along_axis(best, np.argsort(-best["score"], axis=1)[:, :TOP], axis=1)
        start = perf_counter()
        store.replace_files((), [row(number * CHUNK + place, vector) for place, vector in enumerate(vectors)])
        writing += perf_counter() - start
    np.savez(folder / "exact.npz", questions=questions, rows=best["row"], scores=best["score"])
    return {
        "writing_seconds": round(writing, 1),
        "mean_similarity_of_best": round(float(best["score"][:, 0].mean()), 3),
        "mean_similarity_of_tenth": round(float(best["score"][:, -1].mean()), 3),
    }


def row(number: int, vector: np.ndarray) -> Row:
    """A row whose first line is its number."""
    path = f"folder_{number % 1000}/file_{number}.py"
    key, name = file_id(path), f"function_{number % 5000}"
    snippet = Snippet(path, LANGUAGES[number % len(LANGUAGES)], name, number, number + 9, "", name)
    return Row(
        row_id(key, 0), key, key, 1, content_hash(name), snippet, f"function {number % 5000}", {EXIT_LAYER: vector}
    )


def make_index(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the indexes that `mose index` makes at its end."""
    before = status_bytes("VmHWM")
    store = LanceStore(str(folder / "index"))
    start = perf_counter()
    store.finish()
    seconds = perf_counter() - start
    files = [path for path in (folder / "index").rglob("*") if path.is_file()]
    indexes = sum(path.stat().st_size for path in files if "_indices" in path.parts)
    return {
        "seconds": round(seconds, 1),
        "peak_mb": round((status_bytes("VmHWM") - before) / 1e6),
        "disk_mb": round(sum(path.stat().st_size for path in files) / 1e6),
        "of_which_indexes_mb": round(indexes / 1e6),
        "raw_vectors_mb": round(arguments.rows * arguments.width * 4 / 1e6),
    }


def ask(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask one question after the other, first with the package's settings."""
    exact = np.load(folder / "exact.npz")
    before = status_bytes("VmHWM")
    store = LanceStore(str(folder / "index"))
    ours = (lance_store.PROBES, lance_store.REFINE_FACTOR)
    settings = [measured(store, exact, ours)]
    peak = status_bytes("VmHWM") - before
    filtered = measured(store, exact, ours, Filter(languages=("python",)))
    del filtered["recall_at_10"]  # the exact answers are those of all languages
    if arguments.sweep:
        settings += [measured(store, exact, setting) for setting in SWEEP if setting != ours]
    return {"peak_mb": round(peak / 1e6), "settings": settings, "one_language_of_eight": filtered}


def measured(
    store: LanceStore, exact: Any, setting: tuple[int, int], where: Filter = EVERYTHING
) -> dict[str, int | float]:
    """Times of single questions, and the share of the exact ten that were found."""
    lance_store.PROBES, lance_store.REFINE_FACTOR = setting
    times, processor, found = [], [], 0
    for question in exact["questions"][:WARM_UP]:
        store.nearest(question, EXIT_LAYER, TOP, where)
    for question, wanted in zip(exact["questions"], exact["rows"], strict=True):
        start, busy = perf_counter(), process_time()
        hits = store.nearest(question, EXIT_LAYER, TOP, where)
        times.append(1000 * (perf_counter() - start))
        processor.append(1000 * (process_time() - busy))
        found += len({hit.snippet.first_line for hit in hits} & set(wanted.tolist()))
    return {
        "probes": setting[0],
        "refine_factor": setting[1],
        "recall_at_10": found / exact["rows"].size,
        "p50_ms": round(float(np.percentile(times, 50)), 1),
        "p95_ms": round(float(np.percentile(times, 95)), 1),
        "processor_ms_p50": round(float(np.percentile(processor, 50)), 1),
    }


def report_text(figures: dict[str, Any]) -> str:
    """A table of the settings, and what the index takes."""
    index, asked = figures["index"], figures["ask"]
    times = ("p50_ms", "p95_ms", "processor_ms_p50")
    header = ("probes, refinement", "recall@10", "p50, ms", "p95, ms", "processor time, p50, ms")
    rows = [
        (f"{one['probes']}, {one['refine_factor']}", f"{one['recall_at_10']:.3f}", *(f"{one[name]}" for name in times))
        for one in asked["settings"]
    ]
    filtered = asked["one_language_of_eight"]
    rows.append(("first row, one language of eight", "", *(f"{filtered[name]}" for name in times)))
    lines = [
        *markdown_table([header, *rows]),
        "",
        f"{figures['rows']:,} vectors of width {figures['width']}; the first row are the package's settings. "
        f"Cores used: {figures['cores_used']}.{' ' + figures['note'] if figures['note'] else ''}",
        f"Index made in {index['seconds']:.0f} s with a peak of {index['peak_mb']:,} MB; asked with a peak of "
        f"{asked['peak_mb']:,} MB; {index['disk_mb']:,} MB on disk, of which {index['of_which_indexes_mb']:,} MB of "
        f"indexes (the vectors alone are {index['raw_vectors_mb']:,} MB).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
