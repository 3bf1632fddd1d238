"""The corpus as blocks of lines (one text each, white space collapsed), xz: python make_data.py OUT --pairs … --texts … --valid …

Both tokenizers drop white space, so it isn't carried. Blocks hold random packages: any subset of blocks is a fair sample.
"""

import argparse
import gzip
import hashlib
import json
import lzma
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 4, "lp": 0, "pb": 0, "dict_size": 64 << 20}]


def rows(path):
    if not path:
        return
    with gzip.open(path, "rt") as lines:
        for line in lines:
            yield json.loads(line)


def clean(text, chars):
    text = " ".join(text.split())
    if len(text) > chars:
        text = text[:chars].rsplit(" ", 1)[0]
    return text.encode("utf-8", "ignore").decode()


def squeeze(path_text):
    path, text = path_text
    data = lzma.compress(text.encode(), format=lzma.FORMAT_XZ, filters=FILTERS)
    Path(path).write_bytes(data)
    return path, len(text), len(data)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs")
    parser.add_argument("--texts")
    parser.add_argument("--valid")
    parser.add_argument("--chars", type=int, default=1000)
    parser.add_argument("--block", type=float, default=25e6)
    parser.add_argument("--valid-rows", type=int, default=5000)
    parser.add_argument("--max-mib", type=float, default=1000, help="stop once the blocks hold this")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for old in a.out.glob("*.xz"):
        old.unlink()
    jobs = []

    def blocks(name, items, size):
        """items: (package, language, fields by group); blocks of whole packages."""
        number = max(1, round(size / a.block))
        where = lambda package: int(hashlib.sha1(package.encode()).hexdigest()[:8], 16)
        members = [[] for _ in range(number)]
        for item in items:
            members[where(item[0]) % number].append(item)
        for i, rows_of in enumerate(members):
            rows_of.sort(key=lambda r: (r[1], r[0]))
            for group in rows_of[0][2] if rows_of else ():
                text = "".join(r[2][group] + "\n" for r in rows_of)
                jobs.append((str(a.out / f"{group}-{i:03d}.xz"), text))

    for path, prefix in ((a.pairs, ""), (a.valid, "valid_")):
        items, seen, size = [], set(), 0
        for row in rows(path):
            d, c = clean(row["description"], 400), clean(row["code"], a.chars)
            key = hash((d, c))
            if len(d) < 8 or len(c) < 20 or key in seen:
                continue
            seen.add(key)
            items.append((row["package"], row.get("language", ""), {prefix + "desc": d, prefix + "code": c}))
            size += len(d) + len(c)
            if a.limit and len(items) >= a.limit:
                break
        if prefix and len(items) > a.valid_rows:
            # Every k-th, grouped by language: pools of 1,000 neighbours are then of one language.
            items.sort(key=lambda r: hashlib.sha1((r[0] + r[2]["valid_code"]).encode()).hexdigest())
            items = items[: a.valid_rows]
        print(prefix or "pairs", len(items), "rows", size / 1e6, "MB")
        if items and prefix:
            items.sort(key=lambda r: r[1])
            for group in items[0][2]:
                jobs.append((str(a.out / f"{group}.xz"), "".join(r[2][group] + "\n" for r in items)))
        elif items:
            blocks("pairs", items, size)
    items, seen, size = [], set(), 0
    for row in rows(a.texts):
        t = clean(row["text"], a.chars)
        if len(t) < 20 or hash(t) in seen:
            continue
        seen.add(hash(t))
        items.append((row["package"], row.get("language", "") + row.get("kind", ""), {"texts": t}))
        size += len(t)
        if a.limit and len(items) >= a.limit:
            break
    print("texts", len(items), "rows", size / 1e6, "MB")
    if items:
        blocks("texts", items, size)
    # Held-out pairs, pairs, texts: what doesn't fit any bundle isn't compressed either.
    jobs.sort(key=lambda job: (not Path(job[0]).name.startswith("valid"), Path(job[0]).name.startswith("texts"), Path(job[0]).stem[-3:]))
    total = 0
    with ProcessPoolExecutor(a.workers) as pool:
        step = max(2, a.workers // 2 * 2)  # a block's descriptions and code stay together
        for start in range(0, len(jobs), step):
            if total > a.max_mib * 2**20:
                print("not needed:", [Path(path).name for path, _ in jobs[start:]])
                break
            for path, before, after in pool.map(squeeze, jobs[start : start + step]):
                total += after
                print(Path(path).name, f"{before / 1e6:.1f} MB → {after / 1e6:.2f} MB ({before / after:.2f})", flush=True)


if __name__ == "__main__":
    main()
