"""Several processes evaluate as one does, each encoding its share."""

import json
import os
import subprocess
import sys

import pytest

from modular_star_encoder.evaluation.multi_exit_evaluator import MultiExitEvaluator
from tests.processes import free_port
from tests.tiny import tiny_model
from tests.training.distributed_evaluation import ROWS


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(tmp_path, tokenizer):
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.training.distributed_evaluation", str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    first, second = (json.loads((tmp_path / f"process-{rank}.json").read_text()) for rank in range(2))
    expected = MultiExitEvaluator.from_pairs(ROWS, tokenizer=tokenizer)(tiny_model())
    for name, value in expected.items():
        assert first["metrics"]["ddp"][f"eval_{name}"] == pytest.approx(value, abs=1e-6), name
        assert first["metrics"]["fsdp2"][name] == pytest.approx(value, abs=1e-6), name
        assert second["metrics"]["ddp"][f"eval_{name}"] == first["metrics"]["ddp"][f"eval_{name}"]
    # Nine queries, nine documents: divided under DDP, encoded by each process where every pass needs all of them.
    assert (first["texts"], second["texts"]) == ([5, 5, 9, 9], [4, 4, 9, 9])
    assert len(list((tmp_path / "eval").iterdir())) == 1
