"""A map over several processes that goes on when one of them dies: parsers written in C can crash on bad input."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[list[Item]], Result],
    items: Iterable[Item],
    *,
    processes: int,
    chunk_size: int,
    crashed: Callable[[Item], Result],
) -> Iterator[Result]:
    """Yield the results of `function` on one chunk of `items` after the other, in order.

    When a process dies, the chunk that it may have died of is divided until a single item is left, and that item's
    result is `crashed(item)`. Ctrl-C is the business of the calling process.

    Args:
        function: A function of a module, so that it can be pickled.
        items: Read as they are needed: a few chunks for each process.
        processes: Number of processes; with 0 or 1 the work is done in this one, which nothing protects.
        chunk_size: Number of items that are handed over at once.
        crashed: Gives the result for an item that kills its process; called here.
    """
    iterator = iter(items)
    chunks = iter(lambda: list(islice(iterator, chunk_size)), [])
    if processes <= 1:
        yield from map(function, chunks)
        return
    pool = _SurvivingPool(function, processes, crashed)
    try:
        for chunk in chunks:
            pool.submit(chunk)
            # A short queue, so that a large corpus is never all in memory.
            if len(pool.waiting) > 4 * processes:
                yield from pool.next_results()
        while pool.waiting:
            yield from pool.next_results()
    finally:
        pool.executor.shutdown(cancel_futures=True)


class _SurvivingPool(Generic[Item, Result]):
    def __init__(
        self, function: Callable[[list[Item]], Result], processes: int, crashed: Callable[[Item], Result]
    ) -> None:
        self.function, self.processes, self.crashed = function, processes, crashed
        self.executor = _new_executor(processes)
        self.waiting: deque[tuple[list[Item], Future[Result], ProcessPoolExecutor]] = deque()

    def submit(self, chunk: list[Item]) -> None:
        try:
            future = self.executor.submit(self.function, chunk)
        except BrokenProcessPool:
            self._replace_executor()
            future = self.executor.submit(self.function, chunk)
        self.waiting.append((chunk, future, self.executor))

    def next_results(self) -> Iterator[Result]:
        """Yield the result of the first chunk that waits, or the results of its parts."""
        chunk, future, executor = self.waiting.popleft()
        try:
            yield future.result()
        except BrokenProcessPool:  # all that waited for this executor comes here, one chunk after the other
            if executor is self.executor:
                self._replace_executor()
            yield from self._divided(chunk)

    def _replace_executor(self) -> None:
        self.executor.shutdown()
        self.executor = _new_executor(self.processes)

    def _divided(self, chunk: list[Item]) -> Iterator[Result]:
        executor = _new_executor(1)
        try:
            yield executor.submit(self.function, chunk).result()
        except BrokenProcessPool:
            if len(chunk) == 1:
                yield self.crashed(chunk[0])
            else:
                middle = len(chunk) // 2
                yield from self._divided(chunk[:middle])
                yield from self._divided(chunk[middle:])
        finally:
            executor.shutdown()


def _new_executor(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, initializer=_prepare_worker)


def _prepare_worker() -> None:
    # The parent alone handles Ctrl-C; workers would each print a traceback of their own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers of a parent that is killed would wait for work for ever, and keep what they inherited: open files, locks.
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
