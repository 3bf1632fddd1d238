"""Ends every command that writes by a fault, repeats the command, and compares its files with those of a whole run.

    python -m tests.fuzz.faults --tries 10 --commands slice,index     (or make faults ARGS="…")

A fault is at a numbered write: from then on the disk is full, or the process gets SIGTERM or SIGKILL. Or the folder is
read-only. A command must end without a traceback, and its repetition must leave the same files and no hidden ones.
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
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from modular_star_encoder.cli.main import main as mose
from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from tests.fuzz import readers
from tests.fuzz.fuzz import make_world
from tests.synthconl.openai_server import OpenAIServer
from tests.synthconl.samples import translation
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.test_distilling import EXIT_0

FAULTS = ("full", "term", "kill", "read-only")
CHECKPOINT = readers.CHECKPOINT
COMMANDS = {  # name → (reader whose files are in the folder of the command, its words)
    "slice": ("rows", f"slice {CHECKPOINT} --exit-layer 2 out"),
    "grow": ("rows", "grow ../../world/exit-0 out --exit-layers 0 1"),
    "export": ("rows", "export ../../world/static/0 --format static --out out"),
    "index": ("checkout", f"index . --model {CHECKPOINT} --exit-layers 1,4"),
    "profile": ("config", "profile . --exit-layers 2 --rounds 1 --batch-sizes 1 --lengths 16"),
    "card": ("report", "card model --repository me/model --evaluation report.json --out out"),
    "evaluate": ("benchmark-folder", f"evaluate {CHECKPOINT} --data . --exit-layers 2 --out out --json out.json"),
    "finetune": ("finetune", "finetune recipe.yaml --out out"),
    "pretrain": ("pretrain", "pretrain recipe.yaml --out out"),
    "dedup": ("rows", "dataset dedup ../../world/parquet --out out --columns func1_CSN"),
    "build": ("dataset", "dataset build recipe.yaml --out out translation.options.base_url={url}"),
    "corpus": ("corpus", "dataset corpus build corpus.yaml --packages raw --out out"),
}


class End(NamedTuple):
    """How a command ended: exit status, or minus the number of the signal; its stderr; the number of its writes."""

    status: int
    errors: str
    writes: int


def run(words: str, folder: Path, fault: str = "", at: int = 0) -> End:
    """Run `mose WORDS` in a folder, in a process of its own that has the fault at its write number `at`."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    counted, counting = os.pipe()
    shown, showing = os.pipe()  # to a file, the message would not fit on the full disk
    if (child := os.fork()) == 0:
        status, count = 1, [0]
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(showing, 2)
            os.chdir(folder)
            tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
            if fault == "read-only":
                _make_read_only(folder)
            count = _count_writes(str(folder), fault, at)
            status = mose(words.split())
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(counting, str(count[0]).encode())
            sys.stderr.flush()
            os._exit(status)
    os.close(counting)
    os.close(showing)
    with os.fdopen(shown, errors="replace") as errors, os.fdopen(counted) as counts:
        end = errors.read(), int(counts.read() or 0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if fault == "read-only":
        for path in (folder, *folder.rglob("*")):
            os.chmod(path, 0o755)
    return End(status, *end)


def _make_read_only(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        os.chmod(path, 0o777 if path.name == "tmp" else 0o555 if path.is_dir() else 0o444)
    # Without its capabilities, root may write only what its owner may.
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def _count_writes(folder: str, fault: str, at: int) -> list[int]:
    """Count every opening for writing, new folder, renaming and removal below a folder, and begin the fault at one."""
    count, me = [0], os.getpid()

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            is_write = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            is_write = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if not is_write or not os.path.abspath(os.fsdecode(str(arguments[0]))).startswith(folder) or os.getpid() != me:
            return
        count[0] += 1
        if count[0] == at and fault in ("term", "kill"):
            os.kill(me, signal.SIGTERM if fault == "term" else signal.SIGKILL)
        if count[0] == at and fault == "full":
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))  # for libraries in C too
            if event in ("open", "os.mkdir", "os.rename") and at % 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])

    sys.addaudithook(hook)
    return count


def contents(folder: Path) -> dict[str, str]:
    """Return {path: hash of the content} of the files below a folder; random parts of names are left out."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"[0-9a-f]{32}", "*", path.relative_to(folder).as_posix())
        hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return hashes


def strange(folder: Path, expected: set[str], is_finished: bool) -> list[str]:
    """Return the files that a whole run does not leave and that are hidden, temporary or in the temporary folder."""
    names = set(contents(folder)) - expected
    names = {name for name in names if name.startswith("tmp/") or "/." in f"/{name}" or name.endswith(".tmp")}
    return sorted(name for name in names if is_finished or ".near-duplicate-job" not in name)


def faults_of(end: End, fault: str) -> str:
    """Return what was wrong with the end of a command, or an empty text."""
    allowed = {"full": (0, 2), "read-only": (0, 2), "term": (0, 130, 143), "kill": (-signal.SIGKILL,)}[fault]
    if "Traceback" in end.errors:
        return f"traceback: {end.errors.strip().splitlines()[-1]}"
    return "" if end.status in allowed else f"status {end.status}: {end.errors[-200:]}"


def try_command(name: str, tries: int, root: Path, url: str) -> Counter[str]:
    """Run a command with every fault; print what went wrong, and return the number of each outcome."""
    reader, words = COMMANDS[name][0], COMMANDS[name][1].format(url=url)
    folder, outcomes = root / "cases" / name, Counter[str]()

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "world" / reader / "0", folder)
        return folder

    whole = [(run(words, fresh()), contents(folder)) for _ in range(2)]
    if whole[0][0].status:
        raise RuntimeError(f"{name}: {whole[0][0].errors}")
    writes, expected = whole[0][0].writes, whole[0][1]
    stable = {path: value for path, value in expected.items() if whole[1][1].get(path) == value}
    places = sorted({1 + round(place * (writes - 1) / max(1, tries - 1)) for place in range(tries)})
    for fault, at in [(fault, at) for fault in FAULTS[:3] for at in places] + [(FAULTS[3], 0)]:
        wrong = faults_of(run(words, fresh(), fault, at), fault)
        if not wrong and fault != "kill" and (left := strange(folder, set(expected), False)):
            wrong = f"left {left}"
        is_whole = not set(expected) - set(contents(folder))  # then a command may refuse to write it again
        again = run(words, folder)
        found = contents(folder)
        lost = [path for path, value in stable.items() if found.get(path) != value]
        if not wrong and again.status and not (is_whole and again.status == 2):
            wrong = f"repetition: {again.errors.strip()[-300:]}"
        if not wrong and (lost or set(expected) - set(found)):
            wrong = f"lost or different: {lost or set(expected) - set(found)}"
        if not wrong and (left := strange(folder, set(expected), True)):
            wrong = f"left after the repetition: {left}"
        outcomes[wrong.partition(":")[0].partition(" ")[0] or "ok"] += 1
        if wrong:
            print(f"{name}, {fault} at write {at} of {writes}: {wrong}", flush=True)
    return outcomes


def serve(pipe: int) -> None:
    """Answer requests for translations, in this process, which never ends; write the address to `pipe` first."""
    with OpenAIServer(translation) as server:
        os.write(pipe, server.base_url.encode())
        os.close(pipe)
        signal.pause()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=4, help="numbers of writes at which each fault is tried")
    parser.add_argument("--commands", type=lambda text: text.split(","), default=list(COMMANDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = {}
    with tempfile.TemporaryDirectory(prefix="mose-faults-") as temporary:
        root = Path(temporary)
        reading, writing = os.pipe()
        if (server := os.fork()) == 0:
            serve(writing)
        make_world(root, ["static", "rows", *(COMMANDS[name][0] for name in arguments.commands)], seed_more)
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


def seed_more(world: Path) -> None:
    save_retrieval_checkpoint(tiny_model(**EXIT_0), tiny_tokenizer(), world / "exit-0")
    (world / "parquet").mkdir()
    shutil.copy(world / "rows" / "0" / "triplets.parquet", world / "parquet")


if __name__ == "__main__":
    sys.exit(main())
