"""Near-deduplication: recall at known similarity, agreement with brute force, speed against other libraries, memory.

    python benchmarks/near_duplicates.py        # needs the dependency groups dev and bench; about half an hour

Rows are functions of the installed packages and, where MOSE_DATA names a folder that holds them, of CodeSearchNet's
test sets. Everything runs in one thread. Contenders take turns; seconds are processor seconds of the process. Memory is
that of a process of its own above what it used before: anonymous (RssAnon of /proc/self/status, Linux only), and all
that is resident, which includes pages of files that are mapped and can be dropped.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from minhash_contenders import end_to_end, signatures
from planted_duplicates import SIMILARITIES, Planted, jaccard, planted_rows, real_functions, shingles, synthetic_rows
from report import RESULTS, write
from tqdm.auto import tqdm

NAME, COLUMNS, ROWS_PER_SHARD = "near_duplicates", ("code", "translation"), 50_000
LIBRARIES = ("rensa", "numpy", "scipy", "pyarrow", "datasketch", "datatrove", "text-dedup", "xxhash")


def main() -> None:
    """Parse, measure, print, write, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="real functions (default: %(default)s)")
    parser.add_argument("--planted", type=int, default=200, help="pairs at each similarity (default: %(default)s)")
    parser.add_argument("--brute-force", type=int, default=3000, help="rows compared with all (default: %(default)s)")
    parser.add_argument("--timed", type=int, default=4000, help="rows for the contenders (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--stage", nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(*arguments.stage)))
        return
    functions, languages = real_functions(arguments.rows)
    rows, planted = planted_rows(functions, arguments.planted)
    figures = {
        "libraries": {name: installed_version(name) for name in LIBRARIES},
        "rows": {"real": len(functions), "planted": len(planted), "languages": languages},
        "recall": {recall: measure_recall(rows, planted, recall) for recall in ("default", "high")},
        "brute_force": compare_with_brute_force(rows, planted, arguments.brute_force),
        "speed": measure_speed(rows[: arguments.timed], arguments.repeats),
        "growth": measure_growth(functions, arguments.sizes),
    }
    print_summary(figures)
    print(f"\n{write(NAME, figures)}\n{plot(figures)}")


def installed_version(name: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def measure_recall(rows: list[str], planted: list[Planted], recall: str) -> dict:
    """Which of the planted pairs are compared, and which found; and whether any pair found is none."""
    from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings, find_near_duplicates, fingerprint

    settings = DuplicateSettings(recall=recall)
    prints = fingerprint(rows, settings.banding)
    result = find_near_duplicates([[prints]], settings)
    keys = prints.field("keys").flatten().to_numpy().reshape(len(rows), -1)
    found = set(map(tuple, result.pairs.tolist()))
    false = sum(
        jaccard(shingles(rows[first]), shingles(rows[second])) < settings.threshold
        for first, second in tqdm(result.pairs.tolist(), desc=f"true similarity of pairs found ({recall})")
    )
    levels = []
    for level in SIMILARITIES:
        pairs = [pair for pair in planted if pair.level == level]
        compared = [bool((keys[pair.first] == keys[pair.second]).any()) for pair in pairs]
        near = [tuple(sorted((pair.first, pair.second))) in found for pair in pairs]
        expected = statistics.mean(float(settings.banding.candidate_probability(pair.jaccard)) for pair in pairs)
        levels.append(
            {
                "similarity": level,
                "mean_jaccard": statistics.mean(pair.jaccard for pair in pairs),
                "at_or_above_threshold": sum(pair.jaccard >= settings.threshold for pair in pairs),
                "pairs": len(pairs),
                "compared": statistics.mean(compared),
                "expected_compared": expected,
                "found": statistics.mean(near),
            }
        )
    return {
        "bands": settings.banding.bands,
        "rows_per_band": settings.banding.rows,
        "levels": levels,
        "mean_recall_0.8_to_0.95": statistics.mean(level["found"] for level in levels if level["similarity"] >= 0.8),
        "pairs_compared": result.compared,
        "pairs_found": len(result.pairs),
        "false_pairs": false,
        "counts": result.counts,
        "largest_clusters": result.cluster_sizes[:10].tolist(),
    }


def compare_with_brute_force(rows: list[str], planted: list[Planted], count: int) -> dict:
    """All pairs of a sample, by a product of sparse matrices, against what is found, in both modes."""
    from scipy.sparse import csr_array

    from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings, find_near_duplicates, fingerprint

    rng = random.Random(0)
    ends = {row for pair in rng.sample(planted, min(count // 10, len(planted))) for row in (pair.first, pair.second)}
    others = rng.sample(sorted(set(range(len(rows))) - ends), count - len(ends))
    sample = [rows[row] for row in sorted({*ends, *others})]
    numbers: dict[str, int] = {}
    sets = [sorted(numbers.setdefault(one, len(numbers)) for one in shingles(text)) for text in sample]
    sizes = np.array([len(one) for one in sets])
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    holds = csr_array((np.ones(bounds[-1], np.int32), np.concatenate(sets), bounds), shape=(count, len(numbers)))
    common = (holds @ holds.T).tocoo()
    upper = common.row < common.col
    first, second, shared = common.row[upper], common.col[upper], common.data[upper]
    similarity = shared / (sizes[first] + sizes[second] - shared)
    true = {
        (a, b): value
        for a, b, value in zip(first.tolist(), second.tolist(), similarity.tolist(), strict=True)
        if value >= 0.7 and sample[a] != sample[b]
    }
    figures = {"rows": count, "pairs_compared": count * (count - 1) // 2, "true_pairs": len(true)}
    for recall in ("default", "high"):
        settings = DuplicateSettings(recall=recall)
        result = find_near_duplicates([[fingerprint(sample, settings.banding)]], settings)
        found = dict(zip(map(tuple, result.pairs.tolist()), result.pair_similarities.tolist(), strict=True))
        figures[recall] = {
            "found": len(found),
            "found_that_are_not_true": len(found.keys() - true.keys()),
            "similarities_that_differ": sum(true.get(pair) != value for pair, value in found.items()),
            "missed": len(true.keys() - found.keys()),
            "missed_at_0.8_or_more": sum(value >= 0.8 for pair, value in true.items() if pair not in found),
            "true_at_0.8_or_more": sum(value >= 0.8 for value in true.values()),
        }
    return figures


def measure_speed(texts: list[str], repeats: int) -> dict:
    """Medians of texts per processor second, contenders in turns after a short unmeasured one."""
    figures: dict = {"texts": len(texts), "mean_characters": statistics.mean(map(len, texts))}
    for part, contenders in (("end_to_end", end_to_end()), ("signatures", signatures())):
        runs: dict[str, list[float]] = {name: [] for name in contenders}
        with tqdm(total=len(contenders) * repeats, desc=part) as bar:
            for contender in contenders.values():
                contender(texts[:100])
            for _ in range(repeats):
                for name, contender in contenders.items():
                    start = time.process_time()
                    contender(texts)
                    runs[name].append(len(texts) / (time.process_time() - start))
                    bar.update()
        figures[part] = {name: {"texts_per_second": statistics.median(rates)} for name, rates in runs.items()}
        ours = next(name for name in runs if name.startswith("ours"))
        for name, rates in runs.items():
            ratios = [mine / other for mine, other in zip(runs[ours], rates, strict=True)]
            figures[part][name]["ours_is_times_as_fast"] = {"median": statistics.median(ratios), "least": min(ratios)}
    return figures


def measure_growth(functions: list[str], sizes: list[int]) -> list[dict]:
    """Memory and processor seconds of the stage over parquet files with two columns of text, by number of rows."""
    growth = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder, "in"), Path(folder, "out")
            write_shards(source, functions, size)
            command = [sys.executable, __file__, "--stage", str(source), str(out)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            growth.append({"rows": size, **json.loads(output.splitlines()[-1])})
    return growth


def write_shards(folder: Path, functions: list[str], count: int) -> None:
    """Parquet files of synthetic rows; a seed per column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    columns = [synthetic_rows(functions, count, seed=seed) for seed in range(len(COLUMNS))]
    with tqdm(total=count, desc="making rows", unit_scale=True) as bar:
        for start in range(0, count, ROWS_PER_SHARD):
            ids = [f"row-{number:08d}" for number in range(start, min(start + ROWS_PER_SHARD, count))]
            table = {"id": ids} | {name: [next(rows) for _ in ids] for name, rows in zip(COLUMNS, columns, strict=True)}
            pq.write_table(pa.table(table), folder / f"{start // ROWS_PER_SHARD:05d}.parquet", row_group_size=10_000)
            bar.update(len(ids))


def run_stage(source: str, out: str) -> dict:
    """The stage in this process: its figures, peak memory above the start and processor seconds."""
    import rensa  # noqa: F401  (loaded before the memory is looked at)
    import scipy.sparse.csgraph  # noqa: F401

    from modular_star_encoder.synthconl.near_duplicate_job import drop_near_duplicates

    before, peak, done = memory(), {"RssAnon": 0, "VmRSS": 0}, threading.Event()

    def sample() -> None:
        while not done.is_set():
            now = memory()
            peak.update({name: max(peak[name], now[name]) for name in peak})
            time.sleep(0.02)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.process_time()
    report = drop_near_duplicates(source, out, columns=COLUMNS, id_column="id")
    seconds = time.process_time() - start
    done.set()
    sampler.join()
    return {
        "processor_seconds": seconds,
        "peak_anonymous_bytes": peak["RssAnon"] - before["RssAnon"],
        "peak_resident_bytes": peak["VmRSS"] - before["VmRSS"],
        "kept": report["counts"]["kept"],
        "clusters": report["clusters"],
        "pairs_compared": report["pairs_compared"],
        "near_pairs": report["near_pairs"],
        "largest_bucket": report["largest_bucket"],
    }


def memory() -> dict[str, int]:
    """Bytes of this process by kind."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")}


def print_summary(figures: dict) -> None:
    """The figures that matter, a line each."""
    for mode, one in figures["recall"].items():
        print(f"{mode}: recall {one['mean_recall_0.8_to_0.95']:.4f} over 0.8–0.95, {one['false_pairs']} false pairs")
    print("brute force:", figures["brute_force"])
    for part in ("end_to_end", "signatures"):
        for name, one in figures["speed"][part].items():
            print(f"{part:10} {name:32} {one['texts_per_second']:8.0f}/s  ours × {one['ours_is_times_as_fast']}")
    for one in figures["growth"]:
        print(
            f"{one['rows']:9} rows  {one['processor_seconds']:7.1f} s  {one['peak_anonymous_bytes'] / 1e6:6.0f} MB "
            f"anonymous  {one['peak_resident_bytes'] / 1e6:6.0f} MB resident"
        )


def plot(figures: dict) -> Path:
    """Recall by similarity, memory and time by rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from modular_star_encoder.synthconl.near_duplicates import Banding

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    curve = np.linspace(0.45, 1, 200)
    for colour, (mode, one) in zip(("tab:blue", "tab:orange"), figures["recall"].items(), strict=True):
        banding = Banding(one["bands"], one["rows_per_band"])
        at = [level["mean_jaccard"] for level in one["levels"]]
        left.plot(curve, banding.candidate_probability(curve), color=colour, alpha=0.4, lw=1)
        left.plot(at, [level["compared"] for level in one["levels"]], "o", mfc="none", color=colour)
        label = f"{mode}: {banding.bands} bands of {banding.rows}"
        left.plot(at, [level["found"] for level in one["levels"]], "x-", color=colour, label=label)
    left.axvline(0.7, color="grey", ls=":")
    left.set(
        title="found (×), compared (○), expected (line)", xlabel="true Jaccard similarity", ylabel="share of pairs"
    )
    left.legend()
    growth = figures["growth"]
    rows = [one["rows"] for one in growth]
    for key, label in (("peak_resident_bytes", "resident"), ("peak_anonymous_bytes", "anonymous")):
        middle.plot(rows, [one[key] / 1e6 for one in growth], "o-", label=label)
    middle.set(title="peak memory", xlabel="rows (two columns)", ylabel="MB above start", xscale="log", yscale="log")
    middle.legend()
    right.plot(rows, [one["processor_seconds"] for one in growth], "o-")
    right.set(
        title="time, one thread", xlabel="rows (two columns)", ylabel="processor seconds", xscale="log", yscale="log"
    )
    path = RESULTS / f"{NAME}.png"
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
