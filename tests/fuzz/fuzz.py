"""Reads changed files with every reader, in processes with limits of time and memory, and counts how each read ends.

    python -m tests.fuzz.fuzz --count 20000 --readers config,index     (or make fuzz ARGS="…")
    python -m tests.fuzz.fuzz --count 1 --readers config --first 17     repeat an input that ended badly

An input is a function of (--seed, reader, number).
"""

import argparse
import copy
import faulthandler
import gzip
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.fuzz.harness import End, make_world, run, temporary_files
from tests.fuzz.readers import READERS, import_everything, stop_before_training

SECONDS, MEMORY = 20, 2 << 30
GOOD = ("ok", "sentence")
OUTCOMES = (*GOOD, "traceback", "crash", "time", "memory", "leftover")


class _Raw(float):
    def __repr__(self) -> str:
        return "1e999"


def nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


VALUES: list[Any] = [None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, -(10**9), 0.5, 1e308, -0.0, float("nan")]
VALUES += [_Raw("inf"), "", "x", " ", "1", "1e5", "0.5", "nan", "\0", "é\ud800", "x" * 100_000, "../../x", "/dev/zero"]
VALUES += ["a/b", "@", "{}", "cuda", [], {}, [[]], [None], {"": None}, {"a": {"b": 1}}, [1, "a"], [0] * 1000]
VALUES += [nested(60)]
CHUNKS = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xff" * 8, b"\x7f\xff\xff\xff", b"{" * 50_000, b"[" * 50_000]
CHUNKS += [b"1e999", b"NaN", b'"', b"'", b"<" * 9, b"\\ud800", "é\u202e\u2028".encode(), b"\x1b[31m", b"*" * 2000]
CHUNKS += [b"\n", b"\r", b"(" * 3000, b"a" * 100_000, b"-", b"!!python/object/apply:os.system [id]\n", b"!!set{a:null}"]
CHUNKS += [b"&a [*a]\n", b"HTTP/1.1 302 x\r\nLocation: /\r\n", b" " * 50_000, b"2001-01-01", b"1:1:1", b"9" * 99]


def change_tree(tree: Any, rng: random.Random) -> Any:
    """Change one to three places of a tree of JSON values."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        box = {"root": tree}
        places = list(_places(box))
        (parent, key), (other_parent, other_key) = rng.choice(places), rng.choice(places)
        value, kind = parent[key], rng.randrange(8)
        if kind < 4:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 4 and parent is not box:
            del parent[key]
        elif kind == 5 and isinstance(value, dict):
            value[rng.choice(("x", "", "type", "__class__", *map(str, value)))] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 5 and isinstance(value, list):
            value += copy.deepcopy(value[:1]) * rng.choice((1, 3, 2000))
        elif kind == 6:
            parent[key] = copy.deepcopy(other_parent[other_key])
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            parent[key] = rng.choice((-value, value + 1, value - 1, value * 1000, value + 0.5, str(value), [value]))
        else:
            parent[key] = [value]
        tree = box["root"]
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(min(len(tree), 50)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change one to four places of a file's bytes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = rng.randrange(len(content) + 1), rng.choice((1, 4, 8, 100, len(content)))
        start, end = content[:at], content[at + length :]
        part = content[at : at + length]
        changes = (start, start + end, start + rng.choice(CHUNKS) + content[at:], start + rng.choice(CHUNKS) + end)
        changes += (start + part * rng.choice((2, 50)) + end, start + rng.randbytes(min(length, 100)) + end)
        flipped = bytes([content[at] ^ 1 << rng.randrange(8)]) if at < len(content) else b""
        content = rng.choice((*changes, start + flipped + content[at + 1 :], b"", content[::-1][: 10**6]))[: 10**7]
    return content


def change(path: Path, rng: random.Random, by_strangers: bool) -> None:
    """Change a file in place, by its content or as a whole."""
    content, kind = path.read_bytes(), rng.randrange(20)
    if kind == 0:
        path.unlink()
        if (what := rng.randrange(5 if by_strangers else 2)) == 1:
            path.mkdir()
        elif what == 2:
            os.mkfifo(path)
        elif what > 2:
            path.symlink_to("/dev/zero" if what == 3 else path.name)
    elif kind == 1 and path.suffix == ".gz":
        path.write_bytes(content + gzip.compress(bytes(10**7)) * 300)  # 3 GB of zeros
    elif kind < 14 and path.suffix in (".json", ".jsonl", ".yaml", ".txt", ".journal"):
        lines = content.decode().splitlines() if path.suffix in (".jsonl", ".journal") else [content.decode()]
        number = rng.randrange(len(lines))
        try:
            if path.suffix == ".yaml":
                lines[number] = yaml.safe_dump(change_tree(yaml.safe_load(lines[number]), rng), sort_keys=False)
            else:
                lines[number] = json.dumps(change_tree(json.loads(lines[number]), rng), ensure_ascii=rng.random() < 0.9)
        except (ValueError, yaml.YAMLError):
            lines[number] = change_bytes(lines[number].encode(), rng).decode(errors="replace")
        path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    else:
        path.write_bytes(change_bytes(content, rng))


def limit() -> None:
    """Limit time and memory of this process, and end it where training would begin."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stop_before_training()
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.stderr)


def read_changed(root: Path, name: str, number: int | None, seed: int) -> tuple[str, End]:
    """Copy the files of a reader, change one (none if `number` is None), read them; return the outcome and the end."""
    folder, reader = root / "case" / name, READERS[name]
    for old in (folder, temporary_files(folder)):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(root / "world" / name, folder)
    if number is not None:
        rng = random.Random(f"{seed}:{name}:{number}")
        paths = {path for one in reader.changed for path in folder.glob(one) if path.is_file()}
        change(rng.choice(sorted(paths)), rng, reader.by_strangers)
    before = set(folder.rglob("*"))
    end = run(folder, reader.read, limit)
    new = [path for path in set(folder.rglob("*")) - before if path.name[0] == "." or path.suffix == ".tmp"]
    left = [path.name for path in new if path.name not in (".lock", ".mose", ".gitignore")]
    left += os.listdir(temporary_files(folder))
    if "Timeout (" in end.errors:
        return "time", end
    if "MemoryError" in end.errors or "allocate" in end.errors:
        return "memory", end
    if end.status not in (0, 2):
        return ("crash" if end.status < 0 else "traceback"), end
    return ("leftover" if left else GOOD[end.status // 2]), End(end.status, f"{end.errors}{left}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each reader")
    parser.add_argument("--readers", default="", help=f"names or their beginnings, with commas: {', '.join(READERS)}")
    arguments = parser.parse_args()
    names = [name for name in READERS if name.startswith(tuple(arguments.readers.split(",")))]
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    torch.set_num_threads(1)
    import_everything()
    with tempfile.TemporaryDirectory(prefix="mose-fuzz-") as temporary:
        root = Path(temporary)
        # Recipes name the checkpoint of `config`.
        make_world(root / "world", [(name, READERS[name].seed) for name in dict.fromkeys(["config", *names])])
        for name in names:
            outcome, end = read_changed(root, name, None, 0)
            if (outcome, "error: [begins]" in end.errors) not in (("ok", False), ("sentence", True)):
                raise RuntimeError(f"{name} cannot read its own files: {end.errors}")
        for n in range(arguments.count):
            name, number = names[n % len(names)], arguments.first + n // len(names)
            outcome, end = read_changed(root, name, number, arguments.seed)
            counts[name][outcome] += 1
            if outcome not in GOOD:
                print(f"{outcome}: --readers {name} --seed {arguments.seed} --first {number}\n{end.errors}", flush=True)
    print(f"{'reader':26}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        print(f"{name:26}" + "".join(f"{found[outcome]:>10,}" for outcome in OUTCOMES))
    return any(outcome not in GOOD for found in counts.values() for outcome in found)


if __name__ == "__main__":
    sys.exit(main())
