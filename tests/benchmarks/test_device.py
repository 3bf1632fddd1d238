"""The script for a machine with a GPU, rehearsed with a tiny model on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_runs_where_the_package_is_not_installed_and_writes_its_rows(tmp_path):
    environment = {**os.environ, "TOY": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "benchmarks" / "device.sh"), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=500)
    parts = ("correctness", "encode", "training")
    correctness, encode, training = (json.loads((tmp_path / f"{part}.json").read_text())["rows"] for part in parts)
    assert all(row["equal"] for row in correctness if row["name"].startswith("slice"))
    distances = [row["largest_cosine_distance_to_float32"] for row in correctness if "sdpa" in row["name"]]
    assert len(distances) == 3
    assert max(max(of_exits) for of_exits in distances) < 1e-3
    assert {"encode 2 × 32: exit 4", "encode 2 × 32: exit 4, compiled"} <= {row["name"] for row in encode}
    assert all(row["seconds"] > 0 for row in training if "step" in row["name"])
