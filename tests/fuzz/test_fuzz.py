"""A short run of the two harnesses; `make fuzz` and `make faults` are the long ones."""

import pytest

from tests.processes import python

pytestmark = pytest.mark.slow


def run(*words):
    """Run a harness in a process of its own, because it forks; return the last line."""
    process = python("-m", *words, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.splitlines()[-1].split()


def test_a_hundred_changed_files_end_in_a_result_or_a_sentence_and_leave_nothing():
    assert sum(map(int, run("tests.fuzz.fuzz", "--count", "100")[1:3])) == 100


def test_a_full_disk_a_signal_and_a_read_only_folder_lose_nothing_and_leave_nothing():
    assert run("tests.fuzz.faults", "--tries", "2", "--commands", "slice") == ["slice", "7", "7"]
