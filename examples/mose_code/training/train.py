"""Train mose-code on one GPU within a time budget. See RUN.md.

python train.py prepare --part DIR --prep DIR --teacher DIR     tokenise and embed one part of the data with the teacher
python train.py train --parts DIR [DIR] --prep DIR --teacher DIR --out DIR --budget-s 470
"""

import argparse
import json
import lzma
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
START = time.time()
STOP = False


class Log:
    def __init__(self):
        self.file = None

    def open(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = open(Path(folder) / "log.jsonl", "a")

    def __call__(self, stage, **fields):
        fields = {k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()}
        row = {"t": round(time.time() - START, 1), "stage": stage, **fields}
        print(json.dumps(row), flush=True)
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


log = Log()

# ---------------------------------------------------------------------------------------------------------------- data

TEXTS = []  # read by forked workers
TOKENIZERS = {}


def read_lines(path):
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rb") as file:
        text = file.read().decode("utf-8")
    lines = text.split("\n")
    return lines[:-1] if lines and lines[-1] == "" else lines


def _work(task):
    """(kind of text, start, end, crops, lengths, seed) → student and teacher ids of these texts, and of crops of them."""
    group, start, end, crops, student_len, teacher_len, chars, seed, folder = task
    from tokenizers import Tokenizer

    if not TOKENIZERS:
        TOKENIZERS["student"] = Tokenizer.from_file(folder + "/tokenizer.json")
        TOKENIZERS["student"].enable_truncation(student_len)
        TOKENIZERS["teacher"] = Tokenizer.from_file(folder + "/teacher_tokenizer.json")
        TOKENIZERS["teacher"].enable_truncation(teacher_len)
        TOKENIZERS["teacher"].no_padding()
    rng = np.random.default_rng(seed)
    texts = [text[:chars] for text in TEXTS[group][start:end]]
    result = [group, start, _ids(texts)]
    if crops:
        pieces = []
        for text in texts:
            for _ in range(crops):
                if len(text) < 160:
                    break
                size = int(rng.integers(60, max(61, min(500, len(text) // 2))))
                at = int(rng.integers(0, len(text) - size))
                at = text.find(" ", at) + 1
                end_at = text.rfind(" ", at, at + size)
                if end_at - at > 40:
                    pieces.append(text[at:end_at])
        result.append(_ids(pieces))
    else:
        result.append(None)
    return result


def _ids(texts):
    out = []
    for name, empty in (("student", 1), ("teacher", 100)):
        rows = [np.array(e.ids, dtype=np.int16) for e in TOKENIZERS[name].encode_batch(texts)]
        rows = [r if len(r) else np.array([empty], dtype=np.int16) for r in rows]
        lengths = np.array([len(r) for r in rows], dtype=np.int32)
        out += [np.concatenate(rows) if rows else np.zeros(0, np.int16), lengths]
    return out


def tokenise(part, teacher_dir, a, groups):
    """{group: (student flat, lengths, teacher flat, lengths)} of the groups of one part; `crops` made from the code."""
    import multiprocessing

    t0 = time.time()
    part, found = Path(part), {}
    for group in groups:
        paths = sorted(part.glob(f"{group}*.xz"))
        found[group] = [line for path in paths for line in read_lines(path)]
    found = {g: lines[: a.limit] if a.limit else lines for g, lines in found.items() if lines}
    log("prepare", read_s=time.time() - t0, texts={g: len(v) for g, v in found.items()})
    TEXTS.clear()
    names = list(found)
    TEXTS.extend(found[g] for g in names)
    tasks = []
    for number, g in enumerate(names):
        crops = a.crops if g in ("code", "texts") else 0
        for start in range(0, len(found[g]), 2000):
            end = min(start + 2000, len(found[g]))
            tasks.append((number, start, end, crops, a.max_tokens, a.teacher_tokens, a.max_chars, start + number, str(teacher_dir)))
    workers = min(a.workers or len(os.sched_getaffinity(0)), max(1, len(tasks)))
    with multiprocessing.get_context("fork").Pool(workers, signal.signal, (signal.SIGTERM, signal.SIG_DFL)) as pool:
        results = list(pool.imap_unordered(_work, tasks))
    results.sort(key=lambda r: (r[0], r[1]))

    def join(parts):
        return tuple(np.concatenate([p[i] for p in parts]) for i in range(4))

    out = {names[n]: join([r[2] for r in results if r[0] == n]) for n in range(len(names))}
    pieces = [r[3] for r in results if r[3] is not None and len(r[3][1])]
    if pieces:
        out["crops"] = join(pieces)
    log("prepare", tokenise_s=time.time() - t0, workers=workers, tokens={g: [int(v[1].sum()), int(v[3].sum())] for g, v in out.items()})
    return out


class Flat:
    """Token ids of many texts in one tensor of the device."""

    def __init__(self, flat, lengths, device):
        import torch

        self.flat = torch.from_numpy(flat).to(device)
        self.lengths = lengths.astype(np.int64)
        self.gpu_lengths = torch.from_numpy(self.lengths).to(device)
        self.offsets = self.gpu_lengths.cumsum(0) - self.gpu_lengths
        self.device = device

    def batch(self, rows, multiple=8):
        """ids (B, T) long and mask (B, T) bool of these rows (numpy)."""
        import torch

        longest = int(self.lengths[rows].max())
        longest = -(-longest // multiple) * multiple
        index = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device, non_blocking=True)
        places = torch.arange(longest, device=self.device)
        mask = places < self.gpu_lengths[index][:, None]
        at = (self.offsets[index][:, None] + places).clamp(max=self.flat.numel() - 1)
        return self.flat[at].long().masked_fill(~mask, 0), mask


def embed_teacher(teacher, flat, rows, deadline, a, out):
    """Write the teacher's vectors of these rows (sorted by length inside) into `out`; returns how many were done."""
    import torch

    rows = np.asarray(rows)
    rows = rows[np.argsort(-flat.lengths[rows], kind="stable")]
    done, at = 0, 0
    while at < len(rows):
        if time.time() > deadline or STOP:
            break
        longest = -(-int(flat.lengths[rows[at]]) // 8) * 8
        take = rows[at : at + max(8, a.teacher_batch // longest)]
        ids, mask = flat.batch(take)
        out[torch.from_numpy(take).to(out.device)] = teacher(ids, mask).to(out.dtype)
        at += len(take)
    return at


def prepared(part, prep):
    """The stored result of `embed_part`, or None."""
    import torch

    target = Path(prep) / (Path(part).name + ".pt")
    if target.exists():
        log("prepare", loaded=str(target))
        return torch.load(target, map_location="cpu", weights_only=False)
    return None


def tokenise_part(part, a, valid):
    groups = ["desc", "code", "texts"] + (["valid_desc", "valid_code"] if valid else [])
    return tokenise(part, a.teacher, a, groups)


def embed_part(part, tokens, device, a, deadline):
    """Embed one part with the teacher; returns and stores {student: {group: (flat, lengths)}, vectors: {group: half}}."""
    import torch
    from teacher import Teacher

    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[a.teacher_dtype]
    teacher = Teacher(find_teacher(a.teacher), device, dtype)
    result = {"student": {}, "vectors": {}}
    t0 = time.time()
    # What is needed most comes first: time may run out among the rest.
    for group in ("valid_desc", "valid_code", "desc", "code", "texts", "crops"):
        if group not in tokens:
            continue
        s_flat, s_len, t_flat, t_len = tokens[group]
        flat = Flat(t_flat, t_len, device)
        n = len(t_len)
        out = torch.zeros(n, 384, dtype=torch.float16, device=device)
        optional = group in ("texts", "crops")
        if a.no_teacher:
            result["student"][group], result["vectors"][group] = (s_flat, s_len), torch.nn.functional.normalize(torch.randn(n, 384), dim=1).half()
            continue
        order = np.random.default_rng(1).permutation(n) if optional else np.arange(n)
        done = 0
        for start in range(0, n, 100_000):
            rows = order[start : start + 100_000]
            count = embed_teacher(teacher, flat, rows, deadline if optional else deadline + 120, a, out)
            done += count
            if count < len(rows):
                break
        if device.type == "cuda":
            torch.cuda.synchronize()
        result["student"][group], result["vectors"][group] = (s_flat, s_len), out.cpu()
        bad = int((~out.isfinite()).any(1).sum())
        log("teacher", group=group, texts=n, embedded=done, bad=bad, tokens=int(t_len.sum()), s=time.time() - t0)
    if a.save_prep:
        target = Path(a.prep) / (Path(part).name + ".pt")
        Path(a.prep).mkdir(parents=True, exist_ok=True)
        torch.save(result, str(target) + ".tmp")
        os.replace(str(target) + ".tmp", target)
    return result


def find_teacher(folder):
    folder = Path(folder)
    plain = folder / "teacher.safetensors"
    if not plain.exists():
        data = lzma.open(folder / "teacher.safetensors.xz").read()
        temporary = folder / f"teacher.{os.getpid()}.tmp"
        temporary.write_bytes(data)
        os.replace(temporary, plain)
    return plain


def synthetic(n, a):
    """A prepared part of random texts of realistic lengths: to try every stage on a device before the real data."""
    import torch

    rng = np.random.default_rng(0)
    result = {"student": {}, "vectors": {}}
    for group, count, mean in (("desc", n, 14), ("code", n, 60), ("texts", n, 70), ("valid_desc", 2000, 14), ("valid_code", 2000, 60)):
        lengths = np.clip(rng.lognormal(math.log(mean), 0.7, count), 3, a.max_tokens).astype(np.int32)
        flat = (5 + rng.zipf(1.3, int(lengths.sum())) % (a.vocab - 5)).astype(np.int16)
        result["student"][group] = flat, lengths
        base = torch.randn(count, 384, generator=torch.Generator().manual_seed(len(result["vectors"]) // 2))
        result["vectors"][group] = torch.nn.functional.normalize(base + 1.0, dim=1).half()
    for pair in (("desc", "code"), ("valid_desc", "valid_code")):
        d, c = (result["vectors"][g].float() for g in pair)
        result["vectors"][pair[0]] = torch.nn.functional.normalize(d + c, dim=1).half()
    return result


class Corpus:
    """All texts in one index space: descriptions [0, N), code [N, 2N), extra [2N, 2N + M), then the held-out pairs."""

    def __init__(self, preps, device, center):
        import torch

        def gather(group):
            flats, lengths, vectors = [], [], []
            for prep in preps:
                if group in prep["student"]:
                    (flat, length), vector = prep["student"][group], prep["vectors"][group]
                    flats.append(flat)
                    lengths.append(length)
                    vectors.append(vector)
            return flats, lengths, vectors

        flats, lengths, vectors, self.sizes = [], [], [], {}
        for group in ("desc", "code", "texts", "crops", "valid_desc", "valid_code"):
            f, l, v = gather(group)
            self.sizes[group] = sum(map(len, l))
            flats += f
            lengths += l
            vectors += v
        self.n = self.sizes["desc"]
        assert self.n == self.sizes["code"], self.sizes
        self.m = self.sizes["texts"] + self.sizes["crops"]
        self.nv = self.sizes["valid_desc"]
        self.flat = Flat(np.concatenate(flats), np.concatenate(lengths), device)
        raw = torch.cat(vectors).to(device)
        good = raw.float().isfinite().all(1) & (raw.float().norm(dim=1) > 0.5)
        raw[~good] = 0
        self.raw = raw  # (all, 384) half, unit norm
        good = good.cpu().numpy()
        n = self.n
        self.pairs = np.flatnonzero(good[:n] & good[n : 2 * n])
        self.extra = np.flatnonzero(good[2 * n : 2 * n + self.m]) + 2 * n
        self.valid_d = np.arange(self.nv) + 2 * n + self.m
        self.valid_c = self.valid_d + self.nv
        if self.nv < 100:  # no held-out packages: the last pairs
            held = min(4000, max(16, len(self.pairs) // 10))
            self.valid_d, self.valid_c = self.pairs[-held:], self.pairs[-held:] + n
            self.pairs = self.pairs[:-held]
        # Means by kind: a description's and a code's. What all texts of a kind share says nothing about which one it is
        # (held-out MRR of the teacher: raw 75.8, one mean 80.2, means by kind 81.5). Unpaired texts: the nearer one.
        means = torch.stack([raw[torch.from_numpy(rows).to(device)].float().mean(0) for rows in (self.pairs, self.pairs + n)])
        if center < 2:
            means = means.mean(0, keepdim=True).repeat(2, 1) * center
        self.mean = means
        self.kind = torch.zeros(len(raw), dtype=torch.long, device=device)
        self.kind[n : 2 * n] = 1
        if center == 2 and self.m:
            middle, gap = means.mean(0), means[1] - means[0]
            for start in range(2 * n, 2 * n + self.m, 1 << 18):
                end = min(start + (1 << 18), 2 * n + self.m)
                self.kind[start:end] = ((raw[start:end].float() - middle) @ gap > 0).long()
            self.kind[2 * n + self.sizes["texts"] : 2 * n + self.m] = 1
        self.kind[2 * n + self.m + self.nv :] = 1
        self.device = device

    def targets(self, index):
        import torch.nn.functional as F

        return F.normalize(self.raw[index].float() - self.mean[self.kind[index]], dim=1)


def token_vectors(teacher_dir, device, a, shape):
    """(V, 384) of the teacher for each token's string alone, minus their mean; and the tokens' strings."""
    import torch
    from teacher import Teacher
    from tokenizers import Tokenizer

    import hashlib

    data = (Path(teacher_dir) / "tokenizer.json").read_bytes()
    cached = Path(a.prep) / f"token-vectors-{hashlib.sha1(data).hexdigest()[:12]}.pt"
    if cached.exists():
        return torch.load(cached).to(device)
    student = Tokenizer.from_str(data.decode())
    vocab = student.get_vocab()
    strings = [""] * shape.vocab
    for token, i in vocab.items():
        strings[i] = token.removeprefix("##") if len(token) > 2 else token
    tokenizer = Tokenizer.from_file(str(Path(teacher_dir) / "teacher_tokenizer.json"))
    tokenizer.no_padding()
    rows = [np.array(e.ids, dtype=np.int16) for e in tokenizer.encode_batch(strings)]
    flat = Flat(np.concatenate(rows), np.array([len(r) for r in rows], dtype=np.int32), device)
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[a.teacher_dtype]
    out = torch.zeros(shape.vocab, 384, device=device)
    embed_teacher(Teacher(find_teacher(teacher_dir), device, dtype), flat, np.arange(shape.vocab), time.time() + 600, a, out)
    out = out - out[5:].mean(0)
    out[:5] = 0
    cached.parent.mkdir(parents=True, exist_ok=True)
    torch.save(out.cpu(), cached)
    return out


# ----------------------------------------------------------------------------------------------------------- training


class Run:
    def __init__(self, a, shape, corpus, params, device):
        import torch

        self.a, self.shape, self.corpus, self.device = a, shape, corpus, device
        self.p = {n: t.to(device).float().requires_grad_(True) for n, t in params.items()}
        self.ema = None
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[a.dtype]
        self.rng = np.random.default_rng(a.seed)
        self.best, self.last_save, self.last_valid = None, 0.0, 0.0
        self.history, self.exits_now = [], (0,)
        self.neighbours = None
        self.batch = a.batch

    # -- forward over many texts, in chunks of similar length

    def encode(self, rows, exits, params=None, drop=0.0, budget=None, pooled_only=False):
        """{exit: (rows, out)} in the order given; differentiable if gradients are on."""
        import torch
        from student import cast, embed

        p = cast(self.p if params is None else params, self.dtype)
        lengths = self.corpus.flat.lengths[rows]
        order = np.argsort(lengths, kind="stable")
        budget = budget or self.a.chunk_tokens
        outs, at = {e: [] for e in exits}, 0
        sorted_lengths = lengths[order]
        while at < len(order):
            # As many texts as fit the tokens, but none more than 1.3 times (and 8 tokens) longer than the shortest.
            limit = sorted_lengths[at] * 1.3 + 8
            end = int(np.searchsorted(sorted_lengths, limit, side="right"))
            longest = int(sorted_lengths[end - 1])
            end = min(end, at + max(1, budget // (-(-longest // 8) * 8)))
            ids, mask = self.corpus.flat.batch(rows[order[at:end]])
            for e, v in embed(p, ids, mask, self.shape, exits, self.dtype, drop, pooled_only).items():
                outs[e].append(v)
            at = end
        inverse = torch.from_numpy(np.argsort(order)).to(self.device)
        return {e: torch.cat(v)[inverse] for e, v in outs.items()}

    # -- validation

    def validate(self, stage, exits, final=False, **fields):
        import torch

        results = {}
        for kind, params in (("raw", self.p), ("ema", self.ema)):
            if params is None:
                continue
            with torch.no_grad():
                d = self.encode(self.corpus.valid_d, exits, params)
                c = self.encode(self.corpus.valid_c, exits, params)
            results[kind] = {e: self.mrr(d[e], c[e]) for e in exits}
            cos = {e: float((c[e] * self.corpus.targets(torch.from_numpy(self.corpus.valid_c).to(self.device))).sum(1).mean()) for e in exits}
            log(stage, valid=kind, mrr={e: round(v, 2) for e, v in results[kind].items()}, cos={e: round(v, 3) for e, v in cos.items()}, **fields)
            if final:
                log(stage, cross=kind, rows_query_columns_document=[[round(self.mrr(d[i], c[j]), 2) for j in exits] for i in exits])
        self.best = max(results, key=lambda kind: sum(results[kind].values()))
        self.last_valid, self.exits_now = time.time(), exits
        self.history.append({"t": round(time.time() - START, 1), "stage": stage, "mrr": results})
        return results

    def mrr(self, q, d, pool=1000):
        import torch

        n = len(q)
        pools = [slice(s, s + pool) for s in range(0, n - pool + 1, pool)] or [slice(0, n)]
        total = 0.0
        for s in pools:
            sims = q[s].float() @ d[s].float().T
            right = sims.diagonal()[:, None]
            rank = (sims >= right).sum(1).clamp(min=1)
            total += float((1.0 / rank).mean())
        return 100 * total / len(pools)

    def teacher_mrr(self):
        import torch

        out = {}
        for name, f in (("raw", lambda i: self.corpus.raw[i].float()), ("centered", self.corpus.targets)):
            d, c = (f(torch.from_numpy(r).to(self.device)) for r in (self.corpus.valid_d, self.corpus.valid_c))
            out[name] = round(self.mrr(d, c), 2)
        log("teacher", valid_mrr=out)

    # -- optimiser

    def optimiser(self, lrs, names=None):
        import torch

        groups = {}
        for n, t in self.p.items():
            if names is not None and not names(n):
                continue
            kind = (
                "table" if n.endswith("embed_tokens.weight")
                else "weights" if "token_weights" in n
                else "heads" if "projection_heads" in n
                else "matrices" if t.dim() == 2
                else "vectors"
            )
            if lrs.get(kind, 0) > 0:
                groups.setdefault(kind, []).append(t)
        groups = [
            {"params": t, "peak": lrs[k], "lr": lrs[k], "weight_decay": self.a.weight_decay if k == "matrices" else 0.0}
            for k, t in groups.items()
        ]
        return torch.optim.AdamW(groups, betas=(0.9, self.a.beta2), eps=1e-8, fused=self.device.type == "cuda")

    def step(self, optimiser, loss, factor, state):
        import torch

        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        params = [t for g in optimiser.param_groups for t in g["params"] if t.grad is not None]
        norm = torch.nn.utils.get_total_norm([t.grad for t in params])
        value = float(norm)
        if not math.isfinite(value):
            state["skipped"] = state.get("skipped", 0) + 1
            return value
        # Clip spikes only: three times the running norm.
        mean = state.get("norm")
        if mean is not None and value > 3 * mean:
            torch._foreach_mul_([t.grad for t in params], 3 * mean / value)
        state["norm"] = value if mean is None else 0.95 * mean + 0.05 * min(value, 3 * mean)
        optimiser.step()
        return value

    def update_ema(self, step):
        import torch

        if self.ema is None:
            self.ema = {n: t.detach().clone() for n, t in self.p.items()}
            return
        decay = min(self.a.ema, (1 + step) / (10 + step))
        names = list(self.p)
        torch._foreach_lerp_([self.ema[n] for n in names], [self.p[n].detach() for n in names], 1 - decay)

    # -- losses

    def retrieval_loss(self, emb, pairs, extra, exits, cos_w, nce_w, rel_w=0.0):
        """Cosine to the teacher for all texts + InfoNCE both ways with masked false negatives, averaged over exits."""
        import torch
        import torch.nn.functional as F

        a, c = self.a, self.corpus
        b = len(pairs)
        rows = torch.from_numpy(np.concatenate([pairs, pairs + c.n, extra])).to(self.device)
        target = c.targets(rows)
        if nce_w or rel_w:
            d_raw, c_raw = c.raw[rows[:b]].float(), c.raw[rows[b : 2 * b]].float()
            cross = target[:b] @ target[b : 2 * b].T
            right = cross.diagonal()
            same = (d_raw @ d_raw.T > a.false_negative) | (c_raw @ c_raw.T > a.false_negative)
            eye = torch.eye(b, dtype=torch.bool, device=self.device)
            mask_d = (same | (cross > right[:, None] + a.gist)) & ~eye
            mask_c = (same | (cross > right[None, :] + a.gist)).T & ~eye
            where = torch.arange(b, device=self.device)
            if rel_w:
                soft = F.log_softmax(a.scale * (target[:b] @ target[b : 2 * b].T), dim=1)
        total, parts, weights = 0.0, {}, 0.0
        for e in exits:
            s = emb[e]
            cos = 1 - (s * target).sum(1).mean()
            loss = cos_w * cos
            parts[f"cos{e}"] = cos.detach()
            if nce_w:
                logits = a.scale * (s[:b] @ s[b : 2 * b].T)
                nce = 0.5 * (
                    F.cross_entropy(logits.masked_fill(mask_d, -1e4), where)
                    + F.cross_entropy(logits.T.masked_fill(mask_c, -1e4), where)
                )
                loss = loss + nce_w * nce
                parts[f"nce{e}"] = nce.detach()
                if rel_w:
                    rel = F.kl_div(F.log_softmax(logits, dim=1), soft, log_target=True, reduction="batchmean")
                    loss = loss + rel_w * rel
                    parts[f"rel{e}"] = rel.detach()
            w = a.exit_weights.get(e, 1.0)
            total, weights = total + w * loss, weights + w
        if a.cross_w and nce_w and len(exits) > 1:
            i = exits[int(self.rng.integers(len(exits) - 1))]
            logits = a.scale * (emb[i][:b] @ emb[exits[-1]][b : 2 * b].T)
            total = total + weights * a.cross_w * F.cross_entropy(logits.masked_fill(mask_d, -1e4), where)
        return total / weights, parts

    def sampler(self, batch, hard):
        """Endless batches of pairs: seeds in the order of a permutation, each with `hard` mined neighbours."""
        pairs = self.corpus.pairs
        while True:
            order = self.rng.permutation(len(pairs))
            seeds = max(1, batch // (1 + hard)) if self.neighbours is not None else min(batch, len(order))
            for at in range(0, max(1, len(order) - seeds + 1), seeds):
                take = order[at : at + seeds]
                if self.neighbours is not None and hard:
                    near = self.neighbours[take][:, self.rng.permutation(self.neighbours.shape[1])[:hard]].reshape(-1)
                    take = np.concatenate([take, near])
                yield pairs[take], at + seeds >= len(order)

    def mine(self, deadline):
        """For each pair, other pairs whose code the teacher finds close to its description, though under 0.95 of its own."""
        import torch

        a, c, pairs = self.a, self.corpus, self.corpus.pairs
        t0, k = time.time(), a.neighbours
        if len(pairs) < 4 * k:
            return
        result = self.rng.integers(0, len(pairs), (len(pairs), k))
        order = self.rng.permutation(len(pairs))
        done = 0
        for start in range(0, len(order), a.mine_shard):
            shard = order[start : start + a.mine_shard]
            if len(shard) <= k or time.time() > deadline or STOP:
                break
            index = torch.from_numpy(pairs[shard]).to(self.device)
            half = torch.float16 if self.device.type == "cuda" else torch.float32
            d, code = c.targets(index).to(half), c.targets(index + c.n).to(half)
            right = (d.float() * code.float()).sum(1)
            for at in range(0, len(shard), 4096):
                sims = d[at : at + 4096] @ code.T
                sims.masked_fill_(sims > (0.95 * right[at : at + 4096, None]).to(half), -1)
                near = sims.topk(k, dim=1).indices
                result[shard[at : at + 4096]] = shard[near.cpu().numpy()]
            done += len(shard)
        self.neighbours = result
        log("mine", pairs=done, of=len(pairs), s=time.time() - t0)

    # -- stages

    def texts_stage(self, stage, exits, seconds, lrs, batch, extra, hard, cos_w, nce_w, rel_w, names, epochs, warm, drop, hold):
        """Distillation + contrastive at these exits for a time."""
        import torch

        a, c = self.a, self.corpus
        optimiser = self.optimiser(lrs, names)
        state, began, step, texts = {}, time.time(), 0, 0
        batches = self.sampler(batch, hard)
        epoch, last_log, pairs_seen = 0.0, 0.0, 0
        while True:
            used = max((time.time() - began) / seconds, epoch / epochs if epochs else 0.0)
            if used >= 1 or STOP or time.time() > a.deadline:
                break
            factor = min(1.0, (step + 1) / 20, used / warm + 0.02 if warm else 1.0)
            if used > hold:
                factor *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (used - hold) / (1 - hold)))
            pairs, _ = next(batches)
            pairs_seen += len(pairs)
            epoch = pairs_seen / max(1, len(c.pairs))
            more = c.extra[self.rng.integers(0, len(c.extra), int(extra * len(pairs)))] if len(c.extra) else c.extra
            rows = np.concatenate([pairs, pairs + c.n, more])
            try:
                emb = self.encode(rows, exits, drop=drop)
                loss, parts = self.retrieval_loss(emb, pairs, more, exits, cos_w, nce_w, rel_w)
                norm = self.step(optimiser, loss, factor, state)
            except torch.cuda.OutOfMemoryError:
                emb = loss = parts = None
                optimiser.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                batch = max(64, batch // 2)
                batches = self.sampler(batch, hard)
                log(stage, out_of_memory=True, batch=batch)
                continue
            step += 1
            texts += len(rows)
            self.update_ema(step)
            now = time.time()
            if now - last_log > a.log_s:
                log(stage, step=step, used=used, epoch=epoch, loss=float(loss), norm=norm, lr=factor, texts_s=texts / (now - began),
                    parts={k: round(float(v), 4) for k, v in parts.items()}, skipped=state.get("skipped", 0), gb=self.memory())
                last_log = now
            self.between(stage, exits, step)
        log(stage, done=True, step=step, epoch=epoch, seconds=time.time() - began, texts_s=texts / max(1e-9, time.time() - began), gb=self.memory())

    def memory(self):
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**30, 1) if self.device.type == "cuda" else 0

    def between(self, stage, exits, step):
        if time.time() - self.last_valid > self.a.valid_s:
            self.validate(stage, exits, step=step)
        if time.time() - self.last_save > self.a.save_s:
            self.save(stage)

    def grow(self):
        """From exit 0 to all exits: the table to unit deviation, silent layers, heads of exit 0 for all."""
        import torch
        from student import TABLE, grow_layers

        base = {n: t.detach().clone() for n, t in (self.ema if self.best == "ema" and self.ema is not None else self.p).items()}
        scale = 1 / base[TABLE][5:].std()
        p = {n: t for n, t in base.items() if "projection_heads" not in n}
        p[TABLE] = base[TABLE] * scale
        generator = torch.Generator().manual_seed(self.a.seed)
        p |= {n: t.to(self.device) for n, t in grow_layers(self.shape, generator).items()}
        for e in self.shape.exits:
            for end in ("weight", "bias"):
                value = base[f"projection_heads.0.dense.{end}"]
                # The bias speaks to pooled states, which are larger now; the result is normalised, so scale it alike.
                p[f"projection_heads.{e}.dense.{end}"] = value * scale if end == "bias" else value.clone()
        self.p = {n: t.contiguous().requires_grad_(True) for n, t in p.items()}
        self.ema = None
        log("grow", scale=float(scale), parameters=sum(t.numel() for t in self.p.values()))

    def ridge_heads(self, count=60_000):
        """Heads of the exits above 0 solved by least squares from pooled states to the teacher's vectors, where better."""
        import torch
        import torch.nn.functional as F

        c = self.corpus
        rows = np.concatenate([c.pairs, c.pairs + c.n])
        rows = self.rng.permutation(rows)[:count]
        held = np.concatenate([c.valid_d, c.valid_c])
        with torch.no_grad():
            pooled = self.encode(rows, self.shape.exits, pooled_only=True)
            check = self.encode(held, self.shape.exits, pooled_only=True)
            target = c.targets(torch.from_numpy(rows).to(self.device))
            right = c.targets(torch.from_numpy(held).to(self.device))
            for e in self.shape.exits[1:]:
                weight, bias = (self.p[f"projection_heads.{e}.dense.{end}"] for end in ("weight", "bias"))
                x = torch.cat([pooled[e], torch.ones(len(rows), 1, device=self.device)], 1).double()
                gram = x.T @ x
                gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=self.device, dtype=gram.dtype)
                solved = torch.linalg.solve(gram, x.T @ target.double()).float()
                quality = []
                for w, b in ((weight, bias), (solved[:-1].T, solved[-1])):
                    out = F.normalize(F.linear(check[e], w, b), dim=1)
                    quality.append((self.mrr(*out.chunk(2)), float((out * right).sum(1).mean())))
                (mrr_before, cos_before), (mrr_after, cos_after) = quality
                log("ridge", exit=e, mrr=[mrr_before, mrr_after], cos=[cos_before, cos_after])
                if mrr_after > mrr_before:
                    # The scale of a head doesn't matter to its output; keep it at the identity's, for the rate's sake.
                    scale = weight.norm() / solved[:-1].norm()
                    weight.copy_(solved[:-1].T * scale)
                    bias.copy_(solved[-1] * scale)

    def mlm_stage(self, seconds):
        """Masked language modelling of the trunk, table frozen, with a decoder that is thrown away."""
        import torch
        import torch.nn.functional as F
        from student import TABLE, cast, states

        a, c, s = self.a, self.corpus, self.shape
        table = self.p[TABLE].detach().clone()
        table[0] = 0
        unit = (table / table.std()).to(self.dtype)
        gen = torch.Generator().manual_seed(1)
        extra = {
            "mask": torch.randn(s.hidden, generator=gen) * 0.5,
            "dense": torch.randn(s.hidden, s.hidden, generator=gen) * s.hidden**-0.5,
            "bias": torch.zeros(s.vocab),
            "norm": torch.ones(s.hidden),
        }
        extra = {n: t.to(self.device).requires_grad_(True) for n, t in extra.items()}
        optimiser = self.optimiser({"matrices": a.mlm_lr, "vectors": a.mlm_lr}, lambda n: ".layers." in n)
        optimiser.add_param_group({"params": list(extra.values()), "peak": a.mlm_lr, "lr": a.mlm_lr, "weight_decay": 0.0})
        pool = np.concatenate([c.pairs + c.n, c.pairs, c.extra[c.extra < 2 * c.n + c.sizes["texts"]]])
        pool = pool[c.flat.lengths[pool] >= 12]
        state, began, step, tokens, last_log = {}, time.time(), 0, 0, 0.0
        deep = s.exits[-1]
        while True:
            used = (time.time() - began) / seconds
            if used >= 1 or STOP or time.time() > a.deadline:
                break
            factor = min(1.0, (step + 1) / 50) * (1.0 if used < 0.6 else 0.05 + 0.95 * (1 - used) / 0.4)
            # One chunk of texts of similar length.
            rows = pool[self.rng.integers(0, len(pool), 8192)]
            rows = rows[np.argsort(c.flat.lengths[rows])]
            lengths = c.flat.lengths[rows]
            at = int(self.rng.integers(0, len(rows)))
            size = max(8, a.mlm_tokens // int(-(-lengths[at] // 8) * 8))
            take = rows[at : at + size] if at + size <= len(rows) else rows[-size:]
            ids, mask = c.flat.batch(take)
            hidden = mask & (torch.rand(ids.shape, device=self.device) < 0.3)
            roll = torch.rand(ids.shape, device=self.device)
            swap = hidden & (roll < 0.1)
            shown = torch.where(swap, torch.randint(5, s.vocab, ids.shape, device=self.device), ids)
            x = torch.where((hidden & (roll >= 0.2))[..., None], extra["mask"], F.embedding(shown, table))
            exits = tuple(sorted({deep, s.exits[1 + int(self.rng.integers(len(s.exits) - 1))]}))
            hs = states(cast(self.p, self.dtype), x, mask, s, exits, self.dtype)
            labels, loss = ids[hidden], 0.0
            for e in exits:
                h = F.gelu(F.linear(F.layer_norm(hs[e][hidden], (s.hidden,)), extra["dense"]), approximate="tanh")
                h = (F.layer_norm(h, (s.hidden,), extra["norm"]) * s.hidden**-0.5).to(self.dtype)
                logits = F.linear(h, unit, extra["bias"].to(self.dtype))
                one = F.cross_entropy(logits.float(), labels)
                loss = loss + (one if e == deep else 0.5 * one)
                if e == deep:
                    deep_loss, accuracy = one.detach(), (logits.argmax(1) == labels).float().mean()
            self.step(optimiser, loss, factor, state)
            step += 1
            tokens += int(lengths[:1].size and c.flat.lengths[take].sum())
            if time.time() - last_log > a.log_s:
                last_log = time.time()
                log("mlm", step=step, used=used, loss=float(deep_loss), accuracy=float(accuracy), tokens_s=tokens / (last_log - began), lr=factor, gb=self.memory())
        log("mlm", done=True, step=step, tokens=tokens, seconds=time.time() - began)

    # -- output

    def save(self, stage):
        import torch
        from safetensors.torch import save
        from student import LOG_WEIGHTS, config_json

        a, s, out = self.a, self.shape, Path(self.a.out)
        t0 = time.time()
        source = self.ema if self.best == "ema" and self.ema is not None else self.p
        tensors = {n: t.detach().float() for n, t in source.items()}
        tensors[LOG_WEIGHTS] = tensors[LOG_WEIGHTS].exp()
        tensors[LOG_WEIGHTS][0] = 0
        tensors = {n: t.to(torch.float16).cpu().contiguous() for n, t in sorted(tensors.items())}
        shards, size = [{}], 0
        for n, t in tensors.items():
            if size + t.nbytes > a.shard_mib * 2**20 and shards[-1]:
                shards.append({})
                size = 0
            shards[-1][n] = t
            size += t.nbytes
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {n: name for name, shard in zip(names, shards) for n in shard},
        }
        files = {name: save(shard, metadata={"format": "pt"}) for name, shard in zip(names, shards)}
        files["model.safetensors.index.json"] = json.dumps(index, indent=1).encode()
        exits = list(s.exits) if any(".layers." in n for n in tensors) else [0]
        extra = {"exit_layers": exits, "num_hidden_layers": exits[-1]}
        files["config.json"] = json.dumps(config_json(s, extra), indent=1).encode()
        files["tokenizer.json"] = (Path(a.teacher) / "tokenizer.json").read_bytes()
        files["training.json"] = json.dumps(
            {
                "arguments": {k: v for k, v in vars(a).items() if k not in ("deadline",)},
                "sizes": self.corpus.sizes,
                "teacher_means": {k: [round(float(v), 6) for v in row] for k, row in zip(("description", "code"), self.corpus.mean)},
                "saved": {"stage": stage, "which": self.best, "t": round(time.time() - START, 1)},
                "history": self.history,
            },
            default=str,
        ).encode()
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("model-*.safetensors"):
            if old.name not in names:
                old.unlink()
        for name, data in files.items():
            temporary = out.parent / f".{out.name}-{name}.tmp"
            try:
                temporary.write_bytes(data)
                os.replace(temporary, out / name)
            except OSError:
                (out / name).write_bytes(data)
                temporary.unlink(missing_ok=True)
        self.last_save = time.time()
        log(stage, saved=len(files), which=self.best, s=time.time() - t0)


def train(a):
    import torch

    global STOP
    device = torch.device(a.device)
    torch.manual_seed(a.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # cuDNN attention plans each new shape anew; flash and the memory-efficient kernel do not.
        torch.backends.cuda.enable_cudnn_sdp(False)
    from student import LOG_WEIGHTS, TABLE, Shape

    log.open(a.out)
    log("start", torch=torch.__version__, device=a.device,
        cpus=len(os.sched_getaffinity(0)), age=START - a.started if a.started else 0.0)
    a.deadline = (a.started or START) + a.budget_s - a.reserve_s
    shape = Shape(vocab=a.vocab, hidden=a.hidden, heads=a.heads, kv_heads=a.kv_heads, inter=a.inter, layers=a.layers, exits=tuple(a.exits))

    # All tokenising before the first use of the GPU: its workers are forks.
    preps, tokens = {}, {}
    if a.synthetic:
        a.parts = []
    for number, part in enumerate(a.parts):
        running = Path(a.prep) / (Path(part).name + ".running")
        target = Path(a.prep) / (Path(part).name + ".pt")
        waited = time.time()
        if running.exists() and not target.exists():
            continue  # being embedded by `prepare`: see below
        preps[part] = None if target.exists() else False
        if not target.exists():
            tokens[part] = tokenise_part(part, a, number == 0)
    for number, part in enumerate(a.parts):
        running = Path(a.prep) / (Path(part).name + ".running")
        target = Path(a.prep) / (Path(part).name + ".pt")
        waited = time.time()
        while part not in tokens and not target.exists() and time.time() - waited < a.wait_s and alive(running):
            time.sleep(0.2)
        if part not in tokens and not target.exists():
            log("prepare", lost=str(part))
            tokens[part] = tokenise_part(part, a, number == 0)
    if device.type == "cuda":
        log("start", gpu=torch.cuda.get_device_name(), free=torch.cuda.mem_get_info()[0] >> 30)
    for number, part in enumerate(a.parts):
        try:
            preps[part] = embed_part(part, tokens[part], device, a, time.time() + a.prepare_s) if part in tokens else prepared(part, a.prep)
        except Exception:
            log("prepare", failed=str(part), error=traceback.format_exc()[-2000:])
            preps.pop(part, None)
            if number == 0:
                raise
    preps = [preps[part] for part in a.parts if preps.get(part)]
    tokens.clear()
    if a.synthetic:
        preps = [synthetic(a.synthetic, a)]
    corpus = Corpus(preps, device, a.center)
    del preps
    log("corpus", sizes=corpus.sizes, pairs=len(corpus.pairs), extra=len(corpus.extra), valid=len(corpus.valid_d),
        student_tokens=int(corpus.flat.lengths.sum()), code_texts=int(corpus.kind.sum()), mean_norm=float(corpus.mean.mean(0).norm()), gap=float((corpus.mean[0] - corpus.mean[1]).norm()), mean_pair_tokens=float(corpus.flat.lengths[corpus.pairs].mean() + corpus.flat.lengths[corpus.pairs + corpus.n].mean()))

    # Exit 0: the teacher's vectors of single tokens, and a/(a + frequency).
    vectors = token_vectors(a.teacher, device, a, shape)
    if shape.hidden < 384:
        basis = torch.linalg.svd(vectors.float(), full_matrices=False)[2][: shape.hidden].T.contiguous()
    else:
        basis = torch.eye(384, device=device)
    counts = torch.bincount(corpus.flat.flat[: int(corpus.flat.lengths[: 2 * corpus.n].sum())].long(), minlength=shape.vocab).double()
    frequency = (counts / counts.sum()).float()
    weights = a.sif / (a.sif + frequency)
    weights[1] = 0.05
    params = {
        TABLE: vectors @ basis,
        LOG_WEIGHTS: weights.log()[:, None],
        "projection_heads.0.dense.weight": basis.clone(),
        "projection_heads.0.dense.bias": torch.zeros(384, device=device),
    }
    run = Run(a, shape, corpus, params, device)
    run.teacher_mrr()
    run.validate("start", (0,))

    def guarded(name, function):
        if STOP or time.time() > a.deadline:
            return
        try:
            function()
        except Exception:
            log(name, error=traceback.format_exc()[-3000:])
            if device.type == "cuda":
                torch.cuda.empty_cache()

    guarded("mine", lambda: run.mine(time.time() + a.mine_s))

    def exit0():
        run.texts_stage(
            "exit0", (0,), a.exit0_s, {"table": a.exit0_lr, "weights": 2 * a.exit0_lr, "heads": a.exit0_lr / 4},
            a.exit0_batch, a.extra, 0, a.cos_w, a.nce_w, 0.0, None, a.exit0_epochs, 0.0, 0.0, 0.0,
        )
        run.validate("exit0", (0,))
        run.save("exit0")

    if a.exit0_s:
        guarded("exit0", exit0)
    run.grow()
    exits = shape.exits
    guarded("grow", lambda: run.validate("grow", exits))
    if a.mlm_s:
        def mlm():
            run.mlm_stage(a.mlm_s)
            run.validate("mlm", exits)
            run.ridge_heads()
            run.validate("ridge", exits)
            run.save("mlm")

        guarded("mlm", mlm)

    def joint():
        left = a.deadline - time.time()
        seconds = min(a.joint_s, left) if a.joint_s else left
        run.texts_stage(
            "joint", exits, max(1.0, seconds),
            {"table": a.table_lr, "weights": a.table_lr, "heads": a.head_lr, "matrices": a.lr, "vectors": a.lr},
            run.batch, a.extra, a.hard, a.joint_cos_w, a.joint_nce_w, a.rel_w, None, a.joint_epochs, a.warm, a.token_drop, a.hold,
        )

    guarded("joint", joint)
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        run.validate("final", exits, final=True)
    except Exception:
        log("final", error=traceback.format_exc()[-3000:])
    run.save("final")
    log("end", seconds=time.time() - START, stopped=STOP)


def alive(running):
    try:
        os.kill(int(running.read_text()), 0)
        return True
    except (OSError, ValueError):
        return False


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("prepare", "train"))
    add = parser.add_argument
    add("--parts", nargs="+", default=[])
    add("--prep", default="prepared")
    add("--teacher", required=True, help="folder of teacher.safetensors[.xz], teacher_tokenizer.json, tokenizer.json")
    add("--out", default="out")
    add("--device", default="cuda")
    add("--dtype", default="bfloat16")
    add("--teacher-dtype", default="float16")
    add("--teacher-batch", type=int, default=131072, help="tokens of a teacher batch")
    add("--teacher-tokens", type=int, default=256)
    add("--max-tokens", type=int, default=160)
    add("--max-chars", type=int, default=1200)
    add("--crops", type=int, default=1)
    add("--workers", type=int, default=0)
    add("--limit", type=int, default=0, help="texts of a group at most, for rehearsals")
    add("--save-prep", type=int, default=1)
    add("--synthetic", type=int, default=0, help="try all stages on this many random pairs")
    add("--no-teacher", type=int, default=0, help="random vectors in place of the teacher's, for rehearsals (with --cos-w 0 --gist 9)")
    add("--seed", type=int, default=0)
    # time
    add("--started", type=float, default=0.0, help="epoch seconds from which the budget counts")
    add("--budget-s", type=float, default=470)
    add("--reserve-s", type=float, default=15, help="kept for the last validation and save")
    add("--prepare-s", type=float, default=80, help="seconds after which unpaired texts are left out")
    add("--wait-s", type=float, default=90)
    add("--mine-s", type=float, default=20)
    add("--exit0-s", type=float, default=40)
    add("--exit0-epochs", type=float, default=10)
    add("--mlm-s", type=float, default=0)
    add("--joint-s", type=float, default=0, help="0: what is left")
    add("--joint-epochs", type=float, default=0)
    add("--valid-s", type=float, default=60)
    add("--save-s", type=float, default=90)
    add("--log-s", type=float, default=5)
    # shape
    add("--vocab", type=int, default=16384)
    add("--hidden", type=int, default=384)
    add("--heads", type=int, default=6)
    add("--kv-heads", type=int, default=2)
    add("--inter", type=int, default=1408)
    add("--layers", type=int, default=6)
    add("--exits", type=int, nargs="+", default=[0, 1, 2, 4, 6])
    # losses
    add("--center", type=int, default=2, help="teacher vectors minus: 0 nothing, 1 their mean, 2 the mean of their kind (description or code)")
    add("--sif", type=float, default=1e-3)
    add("--scale", type=float, default=20.0)
    add("--cos-w", type=float, default=1.0)
    add("--nce-w", type=float, default=1.0)
    add("--joint-cos-w", type=float, default=2.0)
    add("--joint-nce-w", type=float, default=1.0)
    add("--rel-w", type=float, default=0.0)
    add("--cross-w", type=float, default=0.0)
    add("--false-negative", type=float, default=0.95)
    add("--gist", type=float, default=0.0, help="a candidate is no negative if the teacher's score exceeds the right one's by this")
    add("--exit-weights", type=json.loads, default="{}", help='as {"6": 1.5}')
    # optimisation
    add("--batch", type=int, default=4096)
    add("--extra", type=float, default=0.5, help="unpaired texts per pair of a batch")
    add("--hard", type=int, default=1)
    add("--neighbours", type=int, default=8)
    add("--mine-shard", type=int, default=65536)
    add("--exit0-batch", type=int, default=2048)
    add("--exit0-lr", type=float, default=5e-3)
    add("--lr", type=float, default=1e-3)
    add("--table-lr", type=float, default=2e-3)
    add("--head-lr", type=float, default=5e-4)
    add("--mlm-lr", type=float, default=1.5e-3)
    add("--mlm-tokens", type=int, default=131072)
    add("--weight-decay", type=float, default=0.05)
    add("--beta2", type=float, default=0.98)
    add("--ema", type=float, default=0.99)
    add("--warm", type=float, default=0.05)
    add("--hold", type=float, default=0.3)
    add("--token-drop", type=float, default=0.05)
    add("--chunk-tokens", type=int, default=131072)
    add("--shard-mib", type=float, default=13.5)
    a = parser.parse_args()
    a.exit_weights = {int(k): v for k, v in (json.loads(a.exit_weights) if isinstance(a.exit_weights, str) else a.exit_weights).items()}
    return a


def main():
    global STOP

    def stop(*_):
        global STOP
        STOP = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    a = arguments()
    if a.command == "train":
        train(a)
        return
    import torch

    device = torch.device(a.device)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # a flag alone: the GPU is first used after the workers' forks
    log.open(a.out)
    Path(a.prep).mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(a.parts):
        running = Path(a.prep) / (Path(part).name + ".running")
        running.write_text(str(os.getpid()))
        try:
            if not (Path(a.prep) / (Path(part).name + ".pt")).exists():
                tokens = tokenise_part(part, a, number == 0)
                embed_part(part, tokens, device, a, time.time() + a.prepare_s)
        finally:
            running.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
