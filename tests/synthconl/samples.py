"""Rows, and processes that are killed, for the tests of this folder."""

import multiprocessing
import os
import signal

import pyarrow as pa

from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.synthconl.backends import Completion
from modular_star_encoder.synthconl.translation import TranslationSettings

FUNCTION_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "language1_CSN", "func1_CSN")])


def function_rows(count):
    """Functions in all languages, each with its number in it, some of them twice or three times."""
    numbers = [number - max(number % 5 - 2, 0) for number in range(count)]
    return [
        {"id": f"id{row}", "language1_CSN": LANGUAGES[number % len(LANGUAGES)], "func1_CSN": f"function {number}"}
        for row, number in enumerate(numbers)
    ]


def echo(prompt):
    """An answer that tells its prompt."""
    return Completion("", f"<{prompt}>", "stop", 10, 2)


def endpoint_settings(server, **changes):
    """Settings of a back end that asks `server`."""
    options = {"base_url": server.base_url, "concurrency": 4, "pause": 0.01} | changes.pop("options", {})
    return TranslationSettings(backend="openai", model="model", options=options, **changes)


def start_process(target, *arguments, **options):
    """Start `target(*arguments, **options)` in a process of its own that has the modules loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.synthconl.build_samples"])
    process = context.Process(target=target, args=arguments, kwargs=options)
    process.start()
    return process


def ended_by_sigkill(process):
    """Wait for the process's end, and say whether it was killed."""
    process.join(timeout=60)
    return process.exitcode == -signal.SIGKILL


def kill(process):
    """Kill -9."""
    os.kill(process.pid, signal.SIGKILL)
