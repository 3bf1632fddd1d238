"""Shards of extract.py -> decontaminated, de-duplicated, balanced pairs, texts, validation pairs; counts.

usage: assemble.py [OUTPUT_FOLDER]
"""
import os
import gzip, hashlib, json, random, re, sys, time
from collections import Counter, defaultdict
from pathlib import Path
import numpy as np
from modular_star_encoder.dataset.near_duplicates.in_memory import find_near_duplicates
from modular_star_encoder.dataset.near_duplicates.settings import DuplicateSettings

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
OUT.mkdir(exist_ok=True)
SHARED = Path(os.environ["MOSE_DATA"])
LANGUAGE_SHARE, PACKAGE_SHARE, SAME_DESCRIPTION, VALID_SHARE, VALID_MIN, EVAL_JACCARD = 0.22, 0.03, 3, 0.015, 3000, 0.7
MAX_TEXTS_PER_LANGUAGE = 70_000
began = time.time()
def say(*x): print(f"{time.time()-began:6.0f}s", *x, flush=True)
def key(text): return re.sub(r"[^a-z0-9]+", "", text.lower())
def digest(text): return hashlib.blake2b(key(text).encode(), digest_size=8).digest()
TOKEN = re.compile(r"[a-z0-9_]+|[^\sa-z0-9_]")
WORD = re.compile(r"[a-z0-9_]+")
def shingles(text, pattern):
    t = pattern.findall(text.lower())
    return {hash(tuple(t[i:i + 5])) for i in range(len(t) - 4)}

# --- evaluation texts
def first_paragraph(t): return re.split(r"\n\s*\n", t.strip(), maxsplit=1)[0]
evals = defaultdict(list)   # (set, kind) -> texts
for f in sorted((SHARED / "codesearchnet").glob("*.gz")):
    for l in gzip.open(f, "rt"):
        r = json.loads(l); name = f.name.split(".")[0]
        evals[name, "code"].append(r["func_code_string"]); evals[name, "description"].append(first_paragraph(r["func_documentation_string"]))
for f in sorted((SHARED / "exercism").glob("*.gz")):
    for l in gzip.open(f, "rt"):
        r = json.loads(l)
        evals["exercism", "description"] += [p for p in re.split(r"\n\s*\n", r["description"]) if len(p.split()) > 4] + [r["description"]]
        codes = r["code"].values() if isinstance(r["code"], dict) else r["code"] if isinstance(r["code"], list) else [r["code"]]
        evals["exercism", "code"] += [c if isinstance(c, str) else json.dumps(c) for c in codes]
for f in sorted((SHARED / "semble/annotations").glob("*.json")):
    evals["semble", "description"] += [q["query"] for q in json.loads(f.read_text())]
exact, index, sizes, origin = {"code": {}, "description": {}}, {"code": {}, "description": {}}, {"code": [], "description": []}, {"code": [], "description": []}
for (name, kind), items in evals.items():
    for text in items:
        for cut in {text, text[:1000] if kind == "code" else text[:400]}:
            exact[kind].setdefault(digest(cut), name)
            number = len(sizes[kind]); s = shingles(cut, TOKEN if kind == "code" else WORD)
            sizes[kind].append(len(s)); origin[kind].append(name)
            for x in s: index[kind].setdefault(x, []).append(number)
say("evaluation texts", {f"{a} {b}": len(v) for (a, b), v in evals.items()})
def contamination(text, kind):
    hit = exact[kind].get(digest(text))
    if hit: return "exact", hit
    t = (TOKEN if kind == "code" else WORD).findall(text.lower()); n = len(t) - 4
    if n < 3: return None
    ix = index[kind]; common = Counter()
    # of 12 shingles of a text near another, 0.7 are shared: that none is has a probability of 5e-7
    if n > 12 and not any(hash(tuple(t[i:i + 5])) in ix for i in range(0, n, max(1, n // 12))): return None
    s = {hash(tuple(t[i:i + 5])) for i in range(n)}
    for x in s:
        if x in ix:
            for n in ix[x]: common[n] += 1
    for n, c in common.most_common(3):
        if c / (len(s) + sizes[kind][n] - c) >= EVAL_JACCARD: return "near", origin[kind][n]
    return None

# --- load
shards = sorted(p for p in (HERE / "extracted").glob("*/*.jsonl.gz"))
heads, pairs, texts, seen_code, same = {}, [], [], set(), Counter()
drop, dropped_texts, dec = Counter(), Counter(), Counter()
shards.sort(key=lambda p: hashlib.sha1(p.name.encode()).hexdigest())
BAD = re.compile(r"Microsoft.*Corporation|This code was generated|^(Gets|Sets|Gets or sets) the \w+\.?$|^\W*(optional|required|private|public|internal|static|protected)\W*$", re.I)
eval_descriptions = {}
for p in shards:
    it = gzip.open(p, "rt"); h = json.loads(next(it))
    if not h.get("permitted"): drop["packages not permitted (licence, or an evaluation repository)"] += 1; heads[h["package"]] = heads.get(h["package"]) or h; continue
    heads[h["package"]] = h
    for l in it:
        r = json.loads(l)
        if "p" in r:
            r = r["p"]; d = digest(r["code"])
            if d in seen_code: drop["pair: code equal to an earlier one"] += 1; continue
            seen_code.add(d)
            if BAD.search(r["description"]): drop["pair: empty phrase"] += 1; continue
            k = digest(r["description"]); same[k] += 1
            if same[k] > SAME_DESCRIPTION: drop[f"pair: description in more than {SAME_DESCRIPTION} rows"] += 1; continue
            pairs.append(r)
        else: texts.append(r["t"])
say("pairs after exact de-duplication", len(pairs), Counter(r["language"] for r in pairs), dict(drop))
raw_pairs = Counter(r["language"] for r in pairs)
rng = random.Random(0); rng.shuffle(pairs)

# --- language and package caps, first loosely, so that the near-duplicate search has less to do
def cap(pairs, share):
    have = Counter(r["language"] for r in pairs); total = len(pairs)
    for _ in range(200): total = sum(min(n, share * total) for n in have.values())
    goal = {l: int(min(n, share * total)) for l, n in have.items()}
    package_limit = int(PACKAGE_SHARE * total)
    out = []
    by = defaultdict(lambda: defaultdict(list))
    for r in pairs: by[r["language"]][r["package"]].append(r)
    for language, packages in by.items():
        low, high = 1, package_limit
        while low < high:   # the largest number of rows a package that keeps within the goal
            mid = (low + high + 1) // 2
            if sum(min(len(v), mid) for v in packages.values()) <= goal[language]: low = mid
            else: high = mid - 1
        for v in packages.values(): out += v[:low]
    return out, package_limit
before = len(pairs)
pairs, _ = cap(pairs, LANGUAGE_SHARE + 0.03)
drop["pair: over the share of a language or package, before"] = before - len(pairs)
clean = []
for r in pairs:
    hit = None
    for kind in ("code", "description"):
        hit = contamination(r[kind], kind)
        if hit: dec[f"pair: {kind} {hit[0]} {hit[1]}"] += 1; break
    if not hit: clean.append(r)
say("decontaminated: dropped", len(pairs) - len(clean)); pairs = clean
say("before near-de-duplication", len(pairs), Counter(r["language"] for r in pairs))
near = find_near_duplicates({"code": [r["code"] for r in pairs]}, settings=DuplicateSettings(threshold=0.8, bucket_limit=20))
drop["pair: code near (0.8) an earlier one"] = int(len(pairs) - near.kept.sum())
pairs = [r for r, k in zip(pairs, near.kept) if k]
say("after near-de-duplication", len(pairs))
before = len(pairs)
pairs, package_limit = cap(pairs, LANGUAGE_SHARE)
drop["pair: over the share of a language or package"] = before - len(pairs)

# --- validation by package
by = defaultdict(Counter)
for r in pairs: by[r["language"]][r["package"]] += 1
main = {}
total_by_package = Counter(r["package"] for r in pairs)
for language, c in by.items():
    for p, n in c.items():
        if n > total_by_package[p] / 2: main.setdefault(language, []).append(p)
family = lambda p: re.sub(r"^(deb|npm|pypi|src):", "", p)
# packages of one source are held out together
sources = {}
for f in ("debian.tsv",):
    for l in (HERE / f).read_text().splitlines():
        x = l.split("\t"); sources["deb:" + x[1]] = x[3]
stem = lambda p: re.sub(r"(-v?\d+|\.v\d+)?(-dev)?$", "", sources.get(p, re.sub(r"^\w+:", "", p)))
by_stem = Counter()
for p, n in total_by_package.items(): by_stem[stem(p)] += n
valid = set()
for language, packages in sorted(main.items()):
    packages.sort(); rng.shuffle(packages)
    small = [p for p in packages if by_stem[stem(p)] <= 600]
    want, got = max(1, round(VALID_SHARE * len(packages))), 0
    need = min(450, 0.05 * sum(by[language].values())) if language in ("go", "ruby", "javascript", "python", "java", "php", "typescript", "rust", "c", "cpp", "csharp") else 60
    for i, p in enumerate(small):
        if i >= want and got >= need: break
        valid.add(p); got += total_by_package[p]
# other packages of the same source leave with them
stems = {stem(p) for p in valid}
valid |= {p for p in total_by_package if stem(p) in stems}
held = [r for r in pairs if r["package"] in valid]
train = [r for r in pairs if r["package"] not in valid]
held_keys = {digest(r["description"]) for r in held}
before = len(train)
train = [r for r in train if digest(r["description"]) not in held_keys]
drop["pair: description equal to one held out"] = before - len(train)

# --- texts
codes = {digest(r["code"]) for r in train + held}
descriptions = {digest(r["description"]) for r in train + held}
rng.shuffle(texts)
count, per_package, kept = Counter(), Counter(), []
for r in texts:
    if r["package"] in valid: continue
    if count[r["language"]] >= MAX_TEXTS_PER_LANGUAGE: dropped_texts["over the language's number"] += 1; continue
    d = digest(r["text"])
    if d in codes or d in descriptions: dropped_texts["equal to another"] += 1; continue
    hit = contamination(r["text"], r["kind"])
    if hit: dec[f"text: {r['kind']} {hit[0]} {hit[1]}"] += 1; continue
    (codes if r["kind"] == "code" else descriptions).add(d)
    count[r["language"]] += 1; kept.append(r)
say("texts", len(kept), dict(dropped_texts))

def write(name, rows):
    with open(OUT / name, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as f:
        for r in rows: f.write((json.dumps(r, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    return hashlib.sha256((OUT / name).read_bytes()).hexdigest()
digests = {name: write(name, rows) for name, rows in (("pairs.jsonl.gz", train), ("pairs_valid.jsonl.gz", held), ("texts.jsonl.gz", kept))}
used = Counter(r["package"] for r in train + held)
text_used = Counter(r["package"] for r in kept)
licences = Counter(); packages_by_licence = Counter()
for p, n in used.items(): licences[heads[p]["licence"]] += n; packages_by_licence[heads[p]["licence"]] += 1
stats = {"pairs": len(train), "pairs_valid": len(held), "texts": len(kept), "texts_with_pairs_as_two": len(kept) + 2 * len(train), "pairs_before_caps_by_language": dict(raw_pairs.most_common()), "packages": len(used),
  "packages_with_texts": len(used.keys() | text_used.keys()), "packages_valid": sorted(valid), "package_limit": package_limit, "dropped": dict(drop), "dropped_texts": dict(dropped_texts),
  "pairs_by_language": dict(Counter(r["language"] for r in train).most_common()), "pairs_valid_by_language": dict(Counter(r["language"] for r in held).most_common()),
  "texts_by_language": {f"{a} {b}": n for (a, b), n in Counter((r["language"], r["kind"]) for r in kept).most_common()},
  "packages_by_language": {l: len(p) for l, p in by.items()}, "packages_by_registry": dict(Counter(p.split(":")[0] for p in used)),
  "pairs_by_licence": dict(licences.most_common()), "packages_by_licence": dict(packages_by_licence.most_common()), "sha256": digests, "pairs_by_package": dict(used.most_common())}
(OUT / "stats.json").write_text(json.dumps(stats, indent=1))
(OUT / "decontamination.json").write_text(json.dumps({"rule": f"normalised equality, or Jaccard of token 5-grams >= {EVAL_JACCARD}, of code or description", "evaluation_texts": {f"{a} {b}": len(v) for (a, b), v in evals.items()},
  "dropped": dict(sorted(dec.items())), "dropped_pairs": sum(n for k, n in dec.items() if k.startswith("pair")), "dropped_texts": sum(n for k, n in dec.items() if k.startswith("text")),
  "excluded_repositories": sorted({h["banned"] for h in heads.values() if h.get("banned")}), "excluded_by_selection": (HERE / "excluded_debian.tsv").read_text().split("\n")}, indent=1))
say({k: v for k, v in stats.items() if k not in ("pairs_by_package", "packages_valid", "packages_by_licence")})
