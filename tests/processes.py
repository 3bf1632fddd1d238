"""Processes for tests: those that form one group, and one that is killed."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def run_processes(*command: object, world: int = 2) -> None:
    """Run `python -m command` in several processes that can form a group."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    arguments = [sys.executable, "-m", *map(str, command)]
    processes = [
        subprocess.Popen(arguments, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()


def python(
    *words: object, cwd: Path | None = None, timeout: float = 600, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these words, and these variables in its environment."""
    command = [sys.executable, *map(str, words)]
    options = {"cwd": cwd, "env": {**os.environ, **variables}, "timeout": timeout}
    return subprocess.run(command, capture_output=True, text=True, **options)


def leave_together(folder: Path, rank: int, world: int) -> None:
    """End this process, successfully, once all processes of the group have come here; `folder` is theirs alone.

    Destroying a gloo group can hang in one process when another has already gone, so nothing is destroyed.
    """
    (folder / f"left-{rank}").touch()
    while not all((folder / f"left-{other}").exists() for other in range(world)):
        time.sleep(0.01)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def start_process(target, *arguments, **options):
    """Start `target(*arguments, **options)` in a process of its own.

    It comes from a server that has the modules loaded already. A fork of the test's own process would inherit the locks
    that its other threads hold, and could wait for them for ever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.search.conftest", "tests.synthconl.samples"])
    process = context.Process(target=target, args=arguments, kwargs=options)
    process.start()
    return process


def ended_by_sigkill(process):
    """Wait for the process's end, and say whether it was killed."""
    process.join(timeout=300)
    return process.exitcode == -signal.SIGKILL
