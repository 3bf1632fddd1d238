"""What the settings of mose-code's recipe are worth at exit 0: one changed at a time, several seeds, a small corpus.

    mose dataset corpus fetch PACKAGES.yaml --out packages      # some lines of hub_configs/mose-code/corpus.yaml
    mose dataset corpus build PACKAGES.yaml --packages packages --out corpus
    MOSE_DATA=~/data python benchmarks/tries.py corpus/pairs.jsonl.gz BAAI/bge-small-en-v1.5 runs/tries

Each run trains the token table alone, with smaller batches and a lower rate than the recipe's, so that it takes a
minute. Scores are MRR × 100 on CodeSearchNet's test tasks in `$MOSE_DATA` (999 distractors, mean of the languages). A
repeated command trains only the models that are missing, so use another folder for other settings.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from report import write

from modular_star_encoder.data.splits import RetrievalData, prepare_retrieval_data
from modular_star_encoder.evaluation.benchmarks import load_benchmark
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encoders import ExitEncoder
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.training.finetuning import finetune
from modular_star_encoder.training.recipes import FinetuningRecipe, load_recipe
from modular_star_encoder.utils.files import write_json
from modular_star_encoder.utils.reports import markdown_table

CHECKPOINT = Path(__file__).parent.parent / "hub_configs" / "mose-code"
Overrides = Mapping[str, Any]

# Recipe keys, or `rows` (share of the training rows) and `hidden_size` (of the model).
TRIES: dict[str, Overrides] = {
    "the recipe": {},
    "not trained (one step at a rate of 1e-9)": {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-9},
    "random token vectors": {"distillation.start_from_teacher": False},
    "contrastive loss alone": {"distillation.cosine_weight": 0.0},
    "cosine loss alone": {"distillation.contrastive_weight": 0.0},
    "relational loss added": {"distillation.relational_weight": 1.0},
    "teacher's vectors not centred": {"distillation.centre_by_kind": False},
    "no negatives masked": {"objective.false_negative_margin": None},
    "logit scale 10": {"objective.logit_scale": 10.0},
    "weights not averaged": {"ema_decay": 0.0},
    "learning rate 5e-3, the recipe's": {"learning_rate": 5e-3},
    "twice the steps": {"max_steps": 200},
    "hidden size 192": {"hidden_size": 192},
    "half of the rows": {"rows": 1 / 2},
    "a quarter of the rows": {"rows": 1 / 4},
}


def main() -> None:
    """Parse, train, evaluate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="pairs.jsonl.gz of `mose dataset corpus build`")
    parser.add_argument("teacher", help="name or folder of a SentenceTransformer model of embedding size 384")
    parser.add_argument("out", type=Path, help="folder of the trained models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16_000, help="pairs to train on (default: %(default)s)")
    parser.add_argument("--name", default="mose_code_tries", help="of the results (default: %(default)s)")
    arguments = parser.parse_args()
    if "MOSE_DATA" not in os.environ:
        return print("skipped: set MOSE_DATA to a folder that holds codesearchnet/ruby_test.jsonl.gz")
    runs = Runs(arguments)
    for seed, (name, overrides) in product(arguments.seeds, TRIES.items()):
        runs.run(name, overrides, seed)
        figures = runs.figures()
        text = markdown(figures)
        path = write(arguments.name, figures, text)
    print(f"{text}\n\n{path}")


class Runs:
    """The runs of one command: their rows, tasks and folders."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out = arguments.out
        columns = "{description: description, code: code, language: language, repository: package, other_code: null}"
        self.shared = [f"data.triplets.source={arguments.pairs}", f"data.triplets.columns={columns}"]
        self.shared += [
            f"distillation.teacher={arguments.teacher}",
            "distillation.max_characters=400",
            'save_strategy="no"',
            'eval_strategy="no"',
        ]
        base = load_recipe(FinetuningRecipe, "mose-code/exit-0", self.shared)
        self.rows = prepare_retrieval_data(
            base.data, self.out / "data", eval_fraction=0.005, seed=0, max_train_samples=arguments.rows
        )
        self.tasks = load_benchmark("codesearchnet-999", os.environ["MOSE_DATA"], allow_subset=True)

    def run(self, name: str, overrides: Overrides, seed: int) -> None:
        """Train and evaluate one model; do nothing if its scores are stored."""
        folder = self.out / name / str(seed)
        if (folder / "scores.json").exists():
            return
        print(f"\n{name}, seed {seed}", flush=True)
        settings: dict[str, Any] = {"batch_size": 256, "max_steps": 100, "learning_rate": 1e-3, "ema_decay": 0.97}
        settings |= {"seed": seed, **overrides}
        share, hidden_size = (settings.pop(key, None) for key in ("rows", "hidden_size"))
        settings |= {"eval_pairs": 200, "max_text_tokens": 64, "max_code_tokens": 96, "tokenizer": CHECKPOINT}
        settings |= {"model": self.blank(hidden_size)}
        given = [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in settings.items()]
        rows = self.part_of_rows(share, seed)
        recipe = load_recipe(FinetuningRecipe, "mose-code/exit-0", [*self.shared, *given])
        log = finetune(recipe, folder, data=rows, before=False)
        model, tokenizer = load_checkpoint(folder / "model", device="cpu")
        found = evaluate_tasks(self.tasks, [EmbeddingRetriever(ExitEncoder(model, tokenizer, "tried"))], progress=False)
        score = 100 * float(np.mean([result.estimates[result.main].value for result in found]))
        write_json(folder / "scores.json", {"score": score, "rows": len(rows.train), "seconds": log["seconds"]})
        shutil.rmtree(folder / "model")

    def part_of_rows(self, share: float | None, seed: int) -> RetrievalData:
        """Return the rows with a share of those to train on, drawn at random."""
        train = self.rows.train
        chosen = np.random.default_rng(seed).permutation(len(train))[: round((share or 1) * len(train))]
        return replace(self.rows, train=[train[i] for i in sorted(chosen)])

    def blank(self, hidden_size: int | None) -> Path:
        """Return a folder with the configuration of mose-code's exit 0 and no weights."""
        folder = self.out / f"blank-{hidden_size}"
        config = ModularStarEncoderConfig.from_pretrained(CHECKPOINT).cut(0).to_dict()
        config |= {"exit_embedding_rows": 1, "hidden_size": hidden_size or config["hidden_size"]}
        ModularStarEncoderConfig.from_dict(config).save_pretrained(folder)
        return folder

    def figures(self) -> dict[str, Any]:
        """Return {name: {"rows", "seconds", "scores": one for each seed}}."""
        figures = {}
        for name in TRIES:
            cells = [
                json.loads(path.read_text())
                for path in sorted((self.out / name).glob("*/scores.json"), key=lambda path: int(path.parent.name))
            ]
            if cells:
                seconds = float(np.median([cell["seconds"] for cell in cells]))
                scores = [cell["score"] for cell in cells]
                figures[name] = {"rows": cells[0]["rows"], "seconds": seconds, "scores": scores}
        return figures


def markdown(figures: Mapping[str, Any]) -> str:
    """Return a table: mean over seeds, lowest and highest, and the mean difference from the first row."""
    first = np.array(next(iter(figures.values()))["scores"])
    lines = [["exit 0", "rows", "seconds", "seeds", "MRR × 100", "from the first row"]]
    for name, one in figures.items():
        scores = np.array(one["scores"])
        both = min(len(scores), len(first))
        change = f"{(scores[:both] - first[:both]).mean():+.1f}"
        score = f"{scores.mean():.1f} ({scores.min():.1f}–{scores.max():.1f})"
        lines.append([name, f"{one['rows']:,}", f"{one['seconds']:.0f}", str(len(scores)), score, change])
    title = "CodeSearchNet, 999 distractors, mean of the languages (lowest and highest of the seeds)."
    return "\n\n".join([title, "\n".join(markdown_table(lines))])


if __name__ == "__main__":
    main()
