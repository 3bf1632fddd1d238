"""Training steps of distillation on a CPU: `MultiExitTrainer` against `SentenceTransformerTrainer`.

    python benchmarks/distillation_step.py
    python benchmarks/distillation_step.py --batch-size 16 --steps 2 --rounds 1      # rehearsal

Every contender trains mose-code on the same documented functions of transformers' models, in the same batches, with
the same loss (1 - cosine to a given vector per text) and AdamW, under bfloat16 autocast if the processor has it:

    ours, exit 6                `DistillationObjective` with the cosine term alone, without padding
    sentence-transformers       `SentenceTransformerTrainer`, the cosine as a loss module, its own collator
    ours, five exits            the same step for every exit, which the other trainer cannot do in one pass

Teacher vectors are computed before and are random here: time does not depend on them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from ratios import Seconds, figure, ratio
from report import write_rows
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from tqdm.auto import tqdm
from transformers import TrainerCallback

from modular_star_encoder import (
    DistillationObjective,
    MultiExitTrainer,
    MultiExitTrainingArguments,
)
from modular_star_encoder.data.collators import RetrievalCollator
from modular_star_encoder.data.functions import collect_functions
from modular_star_encoder.data.sources.repositories import folder_repositories
from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encode import bf16_is_faster
from modular_star_encoder.objectives.distillation import DistillationSettings

CHECKPOINT = Path(__file__).parent.parent / "hub_configs" / "mose-code"
SIDES = ("query", "document")


class Clock(TrainerCallback):
    """Seconds of each optimiser step, from the end of the one before."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


class CosineToTeacher(torch.nn.Module):
    """The cosine term of `DistillationObjective`, as a loss of sentence-transformers."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Any, labels: torch.Tensor) -> torch.Tensor:
        found = self.model(next(iter(features)))["sentence_embedding"]
        return (1 - torch.nn.functional.cosine_similarity(found.float(), labels.float())).mean()


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="measured in each turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of a text (default: %(default)s)")
    parser.add_argument("--name", default="distillation_step", help="of the results (default: %(default)s)")
    arguments = parser.parse_args()
    files = folder_repositories(Path(transformers.__file__).parent / "models", depth=0)
    functions, _ = collect_functions(files)
    pairs = [(one.description, one.code) for one in functions]
    # Steps from all over the corpus, so that lengths are those of a shuffled one.
    rows = (arguments.steps + 1) * arguments.batch_size
    pairs = pairs[:: len(pairs) // rows][:rows]
    torch.manual_seed(0)
    targets = torch.nn.functional.normalize(torch.randn(rows, 2, 384), dim=-1)
    contenders: dict[str, Callable[[], list[float]]] = {
        "ours, exit 6": partial(ours, arguments, pairs, targets, [6]),
        "ours, five exits": partial(ours, arguments, pairs, targets, None),
        "sentence-transformers": partial(theirs, arguments, pairs, targets),
    }
    seconds: Seconds = {name: [] for name in contenders}
    for _ in tqdm(range(arguments.rounds), desc="rounds", leave=False):
        for name, train in contenders.items():
            ends = train()
            seconds[name].append((ends[-1] - ends[0]) / (len(ends) - 1))
    write_rows(
        arguments.name,
        [
            figure(
                "distillation step on a CPU: steps/s, exit 6 / sentence-transformers",
                ratio(seconds, "sentence-transformers", "ours, exit 6"),
                least=1.5,
            ),
            figure(
                "distillation step on a CPU: steps/s, five exits / sentence-transformers",
                ratio(seconds, "sentence-transformers", "ours, five exits"),
            ),
        ],
        {**vars(arguments), "seconds per step": seconds},
    )


def ours(
    arguments: argparse.Namespace, pairs: list[Any], targets: torch.Tensor, exits: list[int] | None
) -> list[float]:
    """`MultiExitTrainer` on rows with the teacher's vectors, as `mose finetune` builds them."""
    model, tokenizer = load_checkpoint(CHECKPOINT, device="cpu")
    model.config.unpad_inputs = True
    limit: dict[str, Any] = {"truncation": True, "max_length": arguments.max_tokens}
    rows = [
        {
            f"{side}_ids": torch.tensor(tokenizer(text, **limit)["input_ids"])
            for side, text in zip(SIDES, pair, strict=True)
        }
        | {f"{side}_teacher": vector for side, vector in zip(SIDES, vectors, strict=True)}
        for pair, vectors in zip(pairs, targets, strict=True)
    ]
    objective = DistillationObjective(DistillationSettings(contrastive_weight=0))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        MultiExitTrainer(
            model,
            MultiExitTrainingArguments(folder, **options(arguments, arguments.batch_size), exit_weights="uniform"),
            objective,
            exit_layers=exits,
            train_dataset=rows,
            data_collator=RetrievalCollator(tokenizer),
            callbacks=[clock],
        ).train()
    return clock.ends


def theirs(arguments: argparse.Namespace, pairs: list[Any], targets: torch.Tensor) -> list[float]:
    """`SentenceTransformerTrainer`; both texts of a pair are rows, so that a batch has the same texts."""
    model = SentenceTransformer(str(CHECKPOINT), device="cpu", trust_remote_code=True)
    model.max_seq_length = arguments.max_tokens
    texts = [text for pair in pairs for text in pair]
    dataset = Dataset.from_dict({"sentence": texts, "label": targets.flatten(0, 1).tolist()})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(folder, **options(arguments, 2 * arguments.batch_size)),
            train_dataset=dataset,
            loss=CosineToTeacher(model),
            callbacks=[clock],
        ).train()
    return clock.ends


def options(arguments: argparse.Namespace, rows: int) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "per_device_train_batch_size": rows,
        "max_steps": arguments.steps + 1,
        "learning_rate": 1e-5,
        "use_cpu": True,
        "bf16": bf16_is_faster(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


if __name__ == "__main__":
    main()
