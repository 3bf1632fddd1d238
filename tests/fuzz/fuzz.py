"""Reads changed files with every reader, in processes with limits of time and memory, and counts how each read ends.

    python -m tests.fuzz.fuzz --count 20000 --readers config,index     (or make fuzz ARGS="…")
    python -m tests.fuzz.fuzz --replay FILE

An input is a function of (--seed, reader, number). Those that end badly are kept in --out, one JSON file each.
"""

import argparse
import base64
import contextlib
import copy
import faulthandler
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml

from modular_star_encoder.utils.errors import UserError
from tests.fuzz.readers import READERS, TrainingBeginsError, stop_before_training

SECONDS, MEMORY = 10, 2 << 30
INPUTS_PER_PROCESS = 60
Case = dict[str, Any]  # reader, number, seed; later also outcome, error and seconds
GOOD = ("ok", "sentence", "library")
OUTCOMES = (*GOOD, "traceback", "crash", "time", "memory", "leftover")


# Values and bytes to put into files


class _Raw(float):
    """A number that JSON writes as `1e999`."""

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
CHUNKS += [b"\n", b"\r", b"(" * 3000, b"a" * 100_000, b"-", b"!!python/object/apply:os.system [id]\n"]
CHUNKS += [b"&a [*a]\n", b"HTTP/1.1 302 x\r\nLocation: /\r\n", b" " * 50_000]
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def change_tree(tree: Any, rng: random.Random) -> Any:
    """Change one to three places of a tree of JSON values."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        box = {"root": tree}
        places = list(_places(box))
        parent, key = rng.choice(places)
        value = parent[key]
        other_parent, other_key = rng.choice(places)
        kind = rng.randrange(8)
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
    content = path.read_bytes()
    kind = rng.randrange(20)
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
                text = yaml.safe_dump(change_tree(yaml.safe_load(lines[number]), rng), sort_keys=False)
                lines[number] = rng.choice((text,) * 9 + (ALIASES + text,))
            else:
                lines[number] = json.dumps(change_tree(json.loads(lines[number]), rng), ensure_ascii=rng.random() < 0.9)
        except (ValueError, yaml.YAMLError):
            lines[number] = change_bytes(lines[number].encode(), rng).decode(errors="replace")
        path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    else:
        path.write_bytes(change_bytes(content, rng))


# Inputs and what becomes of them


def make_world(root: Path, names: Sequence[str], more: Callable[[Path], object] = id) -> None:
    """Write the files of the named readers to `root`, in a process of its own, so that this one starts no threads."""
    for folder in ("cases", "tmp"):
        (root / folder).mkdir(parents=True)
    if (child := os.fork()) == 0:
        try:
            silence()
            for name in dict.fromkeys(["config", *names]):  # recipes name the checkpoint of `config`
                folder = root / "world" / name / "0"
                folder.mkdir(parents=True)
                os.chdir(folder.parent)
                READERS[name].seed(folder)
            more(root / "world")
        except BaseException:
            (root / "error").write_text(traceback.format_exc())
        os._exit(0)
    os.waitpid(child, 0)
    if (root / "error").exists():
        raise RuntimeError((root / "error").read_text())


def silence() -> None:
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    warnings.simplefilter("ignore")


def make_input(case: Case, root: Path) -> tuple[Path, Path]:
    """Copy the files of a reader to a new folder and change one; return the folder and the changed file."""
    name, number = case["reader"], case["number"]
    folder = root / "cases" / f"{name}-{number}-{os.getpid()}"
    shutil.copytree(root / "world" / name / "0", folder)
    rng = random.Random(f"{case['seed']}:{name}:{number}")
    paths = {path for one in READERS[name].changed for path in folder.glob(one) if path.is_file()}
    path = rng.choice(sorted(paths))
    if number is None:  # as it was
        return folder, path
    if case.get("content") is None:
        change(path, rng, READERS[name].by_strangers)
    else:
        path = folder / case["file"]
        path.write_bytes(base64.b64decode(case["content"]))
    return folder, path


def read_input(name: str, folder: Path) -> tuple[str, str]:
    """Read a folder with a reader; return the outcome and what was raised."""
    before, temporary = set(folder.rglob("*")), set(Path(tempfile.gettempdir()).iterdir())
    os.chdir(folder)
    outcome, shown = "ok", ""
    try:
        READERS[name].read(folder)
    except TrainingBeginsError:
        pass
    except BaseException as error:
        outcome, shown = judge(error), "".join(traceback.format_exception(error))[-8000:]
    os.chdir("/")
    left = [path for path in set(folder.rglob("*")) - before if path.suffix == ".tmp" or path.name[0] == "."]
    left = [path for path in left if path.name not in (".lock", ".mose", ".near-duplicate-job", ".gitignore")]
    left += set(Path(tempfile.gettempdir()).iterdir()) - temporary
    return ("leftover", f"{left}\n{shown}") if outcome in GOOD and left else (outcome, shown)


def judge(error: BaseException) -> str:
    """Return the outcome for an error: a sentence of ours, a library's own error, too much memory, or a bug."""
    if isinstance(error, MemoryError) or "allocate" in str(error):
        return "memory"
    if isinstance(error, (UserError, OSError)):
        return "sentence"
    by_library = "site-packages" in traceback.extract_tb(error.__traceback__)[-1].filename
    clear = isinstance(error, (ValueError, ImportError)) and not isinstance(error, (UnicodeError, json.JSONDecodeError))
    return "library" if by_library and clear else "traceback"


def work(cases: Sequence[Case], root: Path, results: Connection) -> None:
    """Read inputs in this process, which then ends; send the outcome, error and seconds of each."""
    os.setsid()
    silence()
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tempfile.tempdir = os.environ["TMPDIR"] = str(root / "tmp" / str(os.getpid()))
    os.mkdir(tempfile.tempdir)
    stop_before_training()
    with open(root / "stack", "w") as stack:
        for case in cases:
            folder, _ = make_input(case, root)
            faulthandler.dump_traceback_later(SECONDS - 1, file=stack)
            start = time.monotonic()
            outcome, error = read_input(case["reader"], folder)
            faulthandler.cancel_dump_traceback_later()
            results.send({"outcome": outcome, "error": error, "seconds": time.monotonic() - start})
            shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def run(cases: Iterable[Case], root: Path) -> Iterator[Case]:
    """Read inputs in processes, one at a time; yield each input with its outcome, error and seconds.

    A process that dies, or takes more than `SECONDS` for an input, ends the input only if another process does, too.
    """
    waiting, suspect = deque(cases), None
    while waiting:
        batch = list(islice(waiting, INPUTS_PER_PROCESS))
        ours, theirs = Pipe(duplex=False)
        if (child := os.fork()) == 0:
            work(batch, root, theirs)
        theirs.close()
        try:
            for case in batch:
                try:
                    result = ours.recv() if ours.poll(SECONDS) else {"outcome": "time", "seconds": float(SECONDS)}
                except EOFError:
                    result = {"outcome": "crash", "seconds": 0.0}
                is_bad = "error" not in result
                if is_bad and case is not suspect:
                    suspect = case
                    break
                waiting.popleft()
                yield case | {"error": (root / "stack").read_text() if is_bad else ""} | result
                if is_bad:
                    break
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for left in (*(root / "cases").iterdir(), *(root / "tmp").iterdir()):
            shutil.rmtree(left, ignore_errors=True)


def fuzz(names: Sequence[str], count: int, seed: int, out: Path | None = None) -> dict[str, Counter[str]]:
    """Read `count` inputs, as many with each reader; print and return the number of each outcome by reader."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    libraries = Counter[tuple[str, str]]()
    cases = [{"reader": names[n % len(names)], "number": n // len(names), "seed": seed} for n in range(count)]
    cases.sort(key=lambda case: (case["number"] // 50, case["reader"]))
    with tempfile.TemporaryDirectory(prefix="mose-fuzz-") as temporary:
        root = Path(temporary)
        make_world(root, names)
        for case in run([{"reader": name, "number": None, "seed": 0} for name in names], root):
            if case["outcome"] != "ok":
                raise RuntimeError(f"{case['reader']} cannot read its own files: {case['error']}")
        with contextlib.suppress(KeyboardInterrupt):  # the counts so far
            for case in run(cases, root):
                counts[case["reader"]][case["outcome"]] += 1
                if case["outcome"] not in GOOD and out is not None:
                    keep(case, root, out)
                if case["outcome"] == "library":
                    libraries[case["reader"], case["error"].strip().rpartition("\n")[2].partition(":")[0]] += 1
    print(f"{'reader':26}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        print(f"{name:26}" + "".join(f"{found[outcome]:>10,}" for outcome in OUTCOMES), flush=True)
    for (name, kind), count in libraries.most_common():
        print(f"{count:>10,} × {name}: {kind}")
    return counts


def keep(case: Case, root: Path, out: Path) -> None:
    """Write an input, what it did and the last line of its error, to a file that `--replay` reads."""
    folder, path = make_input(case, root)
    content = base64.b64encode(path.read_bytes()).decode() if path.is_file() and not path.is_symlink() else None
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{case['reader']}-{case['seed']}-{case['number']}.json"
    file.write_text(json.dumps(case | {"file": path.relative_to(folder).as_posix(), "content": content}))
    last = case["error"].strip().rpartition("\n")[2][:150]
    print(f"{case['outcome']:10} {file}: {last}", file=sys.stderr)
    shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", help=f"names or their beginnings, with commas: {', '.join(READERS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--replay", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = tuple(arguments.readers.split(",")) if arguments.readers else ("",)
    if arguments.replay:
        case = {name: value for name, value in json.loads(arguments.replay.read_text()).items() if name != "error"}
        with tempfile.TemporaryDirectory(prefix="mose-fuzz-") as temporary:
            make_world(Path(temporary), [case["reader"]])
            (case,) = run([case], Path(temporary))
        print(case["error"], case["outcome"], f"in {case['seconds']:.1f} s")
        return case["outcome"] not in GOOD
    names = [name for name in READERS if name.startswith(chosen)]
    counts = fuzz(names, arguments.count, arguments.seed, arguments.out)
    return any(outcome not in GOOD for found in counts.values() for outcome in found)


if __name__ == "__main__":
    sys.exit(main())
