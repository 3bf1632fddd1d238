"""Several processes evaluate as one does, each encoding its share; each is a run of this module as a program."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from modular_star_encoder.evaluation import multi_exit_evaluator
from modular_star_encoder.evaluation.multi_exit_evaluator import MultiExitEvaluator
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.training.trainer import MultiExitTrainer
from tests.processes import leave_together, run_processes
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [(f"{verb} {noun}", f"def {verb}_{noun}(): pass", "python") for verb in ("add", "cut", "see") for noun in "abc"]


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(tmp_path, tokenizer):
    run_processes("tests.training.test_distributed_evaluation", tmp_path)
    first, second = (json.loads((tmp_path / f"process-{rank}.json").read_text()) for rank in range(2))
    expected = MultiExitEvaluator.from_pairs(ROWS, tokenizer=tokenizer)(tiny_model())
    for name, value in expected.items():
        assert first["metrics"]["ddp"][f"eval_{name}"] == pytest.approx(value, abs=1e-6), name
        assert first["metrics"]["fsdp2"][name] == pytest.approx(value, abs=1e-6), name
        assert second["metrics"]["ddp"][f"eval_{name}"] == first["metrics"]["ddp"][f"eval_{name}"]
    # Nine queries, nine documents: divided under DDP, encoded by each process where every pass needs all of them.
    assert (first["texts"], second["texts"]) == ([5, 5, 9, 9], [4, 4, 9, 9])


def main(out, rank):
    torch.set_num_threads(1)
    encode, texts = multi_exit_evaluator.encode_exits, []

    def counted(model, tokenizer, share, **options):
        texts.append(len(share))
        return encode(model, tokenizer, share, **options)

    multi_exit_evaluator.encode_exits = counted
    evaluator = MultiExitEvaluator.from_pairs(ROWS, tokenizer=tiny_tokenizer())
    arguments = TrainingArguments(str(out), use_cpu=True, disable_tqdm=True, report_to="none")
    trainer = MultiExitTrainer(tiny_model(), arguments, ContrastiveObjective(), evaluator=evaluator)
    metrics = {"ddp": trainer.evaluate()}
    split = tiny_model()
    for layer in split.model.layers:
        fully_shard(layer)
    metrics["fsdp2"] = evaluator(fully_shard(split), across_processes=True)
    (out / f"process-{rank}.json").write_text(json.dumps({"metrics": metrics, "texts": texts}))
    leave_together(out, int(rank), 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.environ["RANK"])
