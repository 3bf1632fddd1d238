"""Runs `mose` on a folder of small files, in a process of its own; `fuzz` and `faults` are built on it."""

import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from modular_star_encoder.cli import main as cli
from modular_star_encoder.utils.errors import UserError

Lines = tuple[str, ...]
Step = Callable[[Path], object]


class End(NamedTuple):
    """How a process ended: its status (0, 2 after an error that a user can fix), or minus a signal; and its stderr."""

    status: int
    errors: str


def read(what: Lines | Step) -> int:
    """Run `mose` lines, or call a function, in the current folder; return the status, or raise what is a bug."""
    steps = [what] if callable(what) else [lambda _, words=words: cli.main(words) for words in map(shlex.split, what)]
    status = 0
    for step in steps:
        try:
            found = step(Path.cwd())
            status = max(status, found if isinstance(found, int) else 0)
        except (UserError, OSError) as error:
            print("error:", error, file=sys.stderr)
            status = 2
        except (ValueError, ImportError) as error:  # a library's own sentence is good enough
            by_library = "site-packages" in traceback.extract_tb(error.__traceback__)[-1].filename
            if not by_library or isinstance(error, (UnicodeError, json.JSONDecodeError)):
                raise
            status = 2
    return status


def temporary_files(folder: Path) -> Path:
    """Return the folder for temporary files of a process whose folder is `folder`."""
    return folder.with_name(f"{folder.name}.tmp")


def run(folder: Path, what: Lines | Step, prepare: Callable[[], object] = int) -> End:
    """Call `prepare`, then `read`, in a process of its own, whose folder is `folder` and whose output is hidden."""
    temporary_files(folder).mkdir(exist_ok=True)
    shown, showing = os.pipe()  # to a file, nothing could be written on a full disk
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(showing, 2)
            # The old objects may remember a file that can seek.
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.chdir(folder)
            tempfile.tempdir = os.environ["TMPDIR"] = str(temporary_files(folder))
            warnings.simplefilter("ignore")
            cli.EXPECTED_ERRORS = (UserError, OSError)
            prepare()
            status = read(what)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(showing)
    with os.fdopen(shown, errors="replace") as errors:
        text = errors.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return End(status, text)


def make_world(root: Path, seeds: Iterable[tuple[str, Step]]) -> None:
    """Write the files of each seed to `root/NAME`, in processes, so that this one starts no threads."""
    for name, seed in seeds:
        folder = root / name
        folder.mkdir(parents=True)
        if (end := run(folder, seed)).status:
            raise RuntimeError(f"{name} ended with {end.status}: {end.errors}")
