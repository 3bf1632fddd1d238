"""Interrupts each writing command by a fault, repeats it, and compares its files with those of an undisturbed run.

    python -m tests.fuzz.faults --tries 10 --commands slice,index     (or make faults ARGS="…")

A fault begins at a numbered write: the disk is full from then on, or the process gets SIGTERM or SIGKILL. Or the folder
is read-only. A command must end without a traceback, and its repetition must leave the same files and no hidden files.
"""

import argparse
import ctypes
import errno
import hashlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from functools import partial
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

import torch

from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from tests.fuzz.harness import End, make_world, run, temporary_files
from tests.fuzz.readers import CHECKPOINT, READERS, Reader, from_above, seed_rows
from tests.synthconl.openai_server import OpenAIServer
from tests.synthconl.samples import translation
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.test_distilling import EXIT_0

FAULTS = ("full", "term", "kill", "read-only")
COMMANDS = {  # name → (reader whose files are in the folder of the command, its words)
    "slice": ("rows", f"slice {CHECKPOINT} --exit-layer 2 out"),
    "grow": ("rows", "grow ../../world/grown out --exit-layers 0 1"),
    "export": ("rows", "export ../../world/static --format static --out out"),
    "index": ("checkout", f"index . --model {CHECKPOINT} --exit-layers 1,4"),
    "profile": ("config", "profile . --exit-layers 2 --rounds 1 --batch-sizes 1 --lengths 16"),
    "card": ("report", "card model --repository me/model --evaluation report.json --out out"),
    "evaluate": ("benchmark-folder", f"evaluate {CHECKPOINT} --data . --exit-layers 2 --out out --json out.json"),
    "finetune": ("finetune", "finetune finetune.yaml --out out"),
    "pretrain": ("pretrain", "pretrain pretrain.yaml --out out"),
    "dedup": ("rows", "dataset dedup ../../world/parquet --out out --columns func1_CSN"),
    "build": ("dataset", "dataset build dataset.yaml --out out translation.options.base_url={url}"),
    "corpus": ("corpus", "dataset corpus build corpus.yaml --packages raw --out out"),
}


def seed_parquet(folder: Path) -> None:
    seed_rows(folder)
    for path in set(folder.iterdir()) - {folder / "triplets.parquet"}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def begin(folder: Path, fault: str, at: int, writes: RawValue) -> None:
    """Count every opening for writing, new folder, renaming and removal below a folder, and begin the fault at one."""
    if fault == "read-only":
        for path in (*folder.rglob("*"), folder):
            os.chmod(path, 0o555 if path.is_dir() else 0o444)
        # Without its capabilities, root may write only what its owner may.
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    me = os.getpid()

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            is_write = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            is_write = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        is_below = is_write and os.path.abspath(os.fsdecode(str(arguments[0]))).startswith(f"{folder}")
        if not is_below or os.getpid() != me:
            return
        writes.value += 1
        if writes.value == at and fault in ("term", "kill"):
            os.kill(me, signal.SIGTERM if fault == "term" else signal.SIGKILL)
        if writes.value == at and fault == "full":
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))  # for libraries in C too
            if event in ("open", "os.mkdir", "os.rename") and at % 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])

    sys.addaudithook(hook)


def contents(folder: Path) -> dict[str, str]:
    """Return {path: hash of the content} of the files below a folder; random parts of names are left out."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"[0-9a-f]{32}", "*", path.relative_to(folder).as_posix())
        hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return hashes


def strange(folder: Path, expected: set[str]) -> list[str]:
    """Return the files, not in `expected`, that are hidden, temporary or in the temporary folder."""
    names = set(contents(folder)) - expected
    names = {name for name in names if "/." in f"/{name}" or name.endswith(".tmp")}
    return sorted(names | set(os.listdir(temporary_files(folder))))


def try_command(name: str, tries: int, root: Path, url: str) -> Counter[str]:
    """Run a command with every fault; print what went wrong, and return the number of each outcome."""
    reader, words = COMMANDS[name][0], COMMANDS[name][1].format(url=url)
    folder, outcomes, writes = root / "case" / name, Counter[str](), RawValue("l")

    def attempt(fault: str = "", at: int = 0, again: bool = False) -> End:
        if not again:
            for old in (folder, temporary_files(folder)):
                shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(root / "world" / reader, folder)
        writes.value = 0
        end = run(folder, (words,), partial(begin, folder, fault, at, writes))
        if fault == "read-only":
            for path in (folder, *folder.rglob("*")):
                os.chmod(path, 0o755)
        return end

    def fault_of(fault: str, at: int) -> str:
        """Interrupt the command, and repeat it; return a description of what was wrong, or an empty text."""
        end = attempt(fault, at)
        allowed = {"full": (0, 2), "read-only": (0, 2), "term": (0, 130, 143), "kill": (-signal.SIGKILL,)}[fault]
        if "Traceback" in end.errors or end.status not in allowed:
            return f"status {end.status}: {end.errors[-300:]}"
        if fault != "kill" and (left := [one for one in strange(folder, set(whole)) if "near-duplicate" not in one]):
            return f"left {left}"
        is_whole = not set(whole) - set(contents(folder))  # then a command may refuse to write it again
        repeated, found = attempt(again=True), contents(folder)
        if repeated.status and not (is_whole and repeated.status == 2):
            return f"repetition: {repeated.errors[-300:]}"
        lost = [path for path, value in whole.items() if (found.get(path) != value if value else path not in found)]
        # A run that SIGTERM ended has a checkpoint of another step, so of the older ones another is kept.
        steps = {int(step) for step in re.findall(r"checkpoint-(\d+)/", " ".join(whole))}
        if lost := [path for path in lost if not any(f"/checkpoint-{step}" in path for step in sorted(steps)[:-1])]:
            return f"lost or different: {lost}"
        return f"left after the repetition: {left}" if (left := strange(folder, set(whole))) else ""

    if (end := attempt()).status:
        raise RuntimeError(f"{name}: {end.errors}")
    number, whole = writes.value, contents(folder)
    attempt()
    other = contents(folder)
    whole = {path: value if other.get(path) == value else "" for path, value in whole.items()}  # "": differs each time
    places = sorted({1 + round(place * (number - 1) / max(1, tries - 1)) for place in range(tries)})
    for fault, at in [(fault, at) for fault in FAULTS[:3] for at in places] + [(FAULTS[3], 0)]:
        wrong = fault_of(fault, at)
        outcomes[wrong.partition(":")[0].partition(" ")[0] or "ok"] += 1
        if wrong:
            print(f"{name}, {fault} at write {at} of {number}: {wrong}", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=4, help="numbers of writes at which each fault is tried")
    parser.add_argument("--commands", type=lambda text: text.split(","), default=list(COMMANDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = {}
    grown = partial(from_above, partial(save_retrieval_checkpoint, tiny_model(**EXIT_0), tiny_tokenizer()))
    more = READERS | {"parquet": Reader(seed_parquet, ()), "grown": Reader(grown, ())}
    names = ["config", "static", "parquet", "grown", *(COMMANDS[name][0] for name in arguments.commands)]
    with tempfile.TemporaryDirectory(prefix="mose-faults-") as temporary:
        root = Path(temporary)
        make_world(root / "world", [(name, more[name].seed) for name in dict.fromkeys(names)])
        reading, writing = os.pipe()
        if (server := os.fork()) == 0:  # a process that answers requests for translations, and never ends
            with OpenAIServer(translation) as answering:
                os.write(writing, answering.base_url.encode())
                signal.pause()
        url = os.read(reading, 99).decode()
        try:
            print(f"{'command':12}{'runs':>8}{'ok':>8}  other outcomes")
            for name in arguments.commands:
                found = counts[name] = try_command(name, arguments.tries, root, url)
                others = ", ".join(f"{count} {outcome}" for outcome, count in found.items() if outcome != "ok")
                print(f"{name:12}{found.total():>8}{found['ok']:>8}  {others}", flush=True)
        finally:
            os.kill(server, signal.SIGKILL)
    return any(outcome != "ok" for found in counts.values() for outcome in found)


if __name__ == "__main__":
    sys.exit(main())
