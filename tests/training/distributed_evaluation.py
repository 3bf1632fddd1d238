"""Two processes that evaluate exits together, for tests/training/test_distributed_evaluation.py.

Usage: MASTER_ADDR=… MASTER_PORT=… python -m tests.training.distributed_evaluation OUT
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from modular_star_encoder.evaluation import multi_exit_evaluator
from modular_star_encoder.evaluation.multi_exit_evaluator import MultiExitEvaluator
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.training.trainer import MultiExitTrainer
from tests.processes import leave_together
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [(f"{verb} {noun}", f"def {verb}_{noun}(): pass", "python") for verb in ("add", "cut", "see") for noun in "abc"]


def main(out):
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
    result = {"metrics": metrics, "texts": texts}
    (Path(out) / f"process-{os.environ['RANK']}.json").write_text(json.dumps(result))
    leave_together(Path(out), int(os.environ["RANK"]), 2)


if __name__ == "__main__":
    # Forked after the imports, which take longer than all the rest.
    child = os.fork()
    rank = "0" if child else "1"
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
    main(*sys.argv[1:])
