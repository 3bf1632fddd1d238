"""A map over several processes, which continues if a process crashes, for example in a parser written in C."""

import errno
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def crash_safe_map(
    function: Callable[[list[Item]], Result],
    items: Iterable[Item],
    *,
    processes: int,
    chunk_size: int,
    crashed: Callable[[Item], Result],
    end: float | None = None,
) -> Iterator[Result]:
    """Call `function` on chunks of `chunk_size` items in several processes, and yield the results in order.

    A chunk that crashes its process is halved until the item that causes the crash is alone; the result of this item
    is `crashed(item)`. With 0 or 1 `processes`, the calling process does the work, without protection from crashes.
    With more processes (four per core at most), a result is left out if it is not ready when `time.monotonic()`
    reaches `end`.
    """
    processes = min(processes, 4 * (os.cpu_count() or 1))
    iterator = iter(items)
    chunks = iter(lambda: list(islice(iterator, chunk_size)), [])
    if processes <= 1:
        yield from map(function, chunks)
        return
    executor = _executor(processes)
    waiting: deque[tuple[list[Item], Future[Result]]] = deque()
    try:
        while True:
            # The queue is short, so that a large corpus is never entirely in memory.
            for chunk in islice(chunks, 4 * processes + 1 - len(waiting)):
                try:
                    future = executor.submit(function, chunk)
                except BrokenProcessPool:
                    executor.shutdown()
                    executor = _executor(processes)
                    future = executor.submit(function, chunk)
                waiting.append((chunk, future))
            if not waiting:
                break
            chunk, future = waiting.popleft()
            if not _is_done(future, end):
                _kill(executor)
                return
            try:
                yield future.result()
            except BrokenProcessPool:  # raised for each chunk that was submitted to the broken executor
                yield from _halved(function, chunk, crashed, end)
    except BaseException:
        _kill(executor)
        raise
    executor.shutdown()


def _is_done(future: Future[Any], end: float | None) -> bool:
    """Wait for a future until `time.monotonic()` reaches `end`; return whether the future is done."""
    return bool(futures.wait([future], None if end is None else max(0.0, end - time.monotonic())).done)


def _halved(
    function: Callable[[list[Item]], Result], chunk: list[Item], crashed: Callable[[Item], Result], end: float | None
) -> Iterator[Result]:
    executor = _executor(1)
    try:
        future = executor.submit(function, chunk)
        if not _is_done(future, end):
            _kill(executor)
            return
        yield future.result()
    except BrokenProcessPool:
        if len(chunk) == 1:
            yield crashed(chunk[0])
        else:
            middle = len(chunk) // 2
            yield from _halved(function, chunk[:middle], crashed, end)
            yield from _halved(function, chunk[middle:], crashed, end)
    except BaseException:
        _kill(executor)
        raise
    executor.shutdown()


def _executor(processes: int) -> ProcessPoolExecutor:
    try:
        return ProcessPoolExecutor(processes, initializer=_prepare_worker)
    except OSError as error:
        of_processes = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
        memory = " They need shared memory: mount /dev/shm as a writable folder with free space."
        advice = "" if error.errno in of_processes else memory
        raise OSError(f"Worker processes can't be started: {error}.{advice}") from error


def _kill(executor: ProcessPoolExecutor) -> None:
    """Kill the executor's processes, which may be busy for minutes. In Python 3.14, `kill_workers` does this."""
    workers = list((executor._processes or {}).values())
    results: Any = executor._result_queue
    executor.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.kill()
    if results is not None:
        results._writer.close()  # otherwise the executor's thread waits for ever for the rest of a result


def _prepare_worker() -> None:
    # Only the parent handles Ctrl-C; otherwise each worker prints a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # If the parent is killed, workers would otherwise wait for ever and keep the parent's files and locks open.
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
