"""A short run of the two harnesses; `make fuzz` and `make faults` are the long ones."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def run(*words):
    """Run a harness in a process of its own, because it forks."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-m", *words], env=os.environ | own, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.splitlines()


def test_a_hundred_changed_files_end_in_a_result_or_a_sentence_and_leave_nothing(tmp_path):
    *_, counts = [line for line in run("tests.fuzz.fuzz", "--count", "120", "--out", tmp_path) if "all" in line]
    assert sum(int(number) for number in counts.split()[1:4]) == 120


def test_a_full_disk_a_signal_and_a_read_only_folder_lose_nothing_and_leave_nothing():
    assert run("tests.fuzz.faults", "--tries", "2", "--commands", "slice")[-1].split() == ["slice", "7", "7"]
