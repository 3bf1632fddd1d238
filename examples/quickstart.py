"""The whole way, small but real: train a multi-exit code encoder, measure every exit, slice it, load it back, search.

    python examples/quickstart.py                      # on the packages installed beside this one
    python examples/quickstart.py --data ~/checkouts   # on a folder of your own repositories

Everything lands in the output folder. An interrupted run continues when it is started again with the same settings.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

# Two threads that spin while they wait for each other lose their time as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modular_star_encoder import ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval
from modular_star_encoder.cli.main import keep_few_compiled_operations
from modular_star_encoder.data.collators import PaddingCollator, RetrievalCollator
from modular_star_encoder.data.finetuning_rows import RetrievalTexts
from modular_star_encoder.data.functions import (
    DocumentedFunction,
    collect_functions,
    drop_near_identical_descriptions,
)
from modular_star_encoder.data.in_context import InContextPairs
from modular_star_encoder.data.pairs import described
from modular_star_encoder.data.sources.repositories import folder_repositories, installed_repositories
from modular_star_encoder.data.splits import draw_repositories
from modular_star_encoder.data.tokenizer import token_spellings, train_tokenizer
from modular_star_encoder.evaluation.report import Report
from modular_star_encoder.evaluation.run import evaluate_exits
from modular_star_encoder.evaluation.tasks import RetrievalRow
from modular_star_encoder.hub.subprocess_check import ReloadRequest, verify_reload
from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint, slice_checkpoint
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.exit_losses import InContextObjective
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.local_store import LocalStore
from modular_star_encoder.training.recipes import TrainingSettings, hub_config_folder, load_config, load_recipe
from modular_star_encoder.training.runs import train_to_the_end
from modular_star_encoder.training.starting_points import start_from_spellings, start_from_unigrams
from modular_star_encoder.training.trainer import MultiExitTrainer
from modular_star_encoder.utils.files import staged_folder, write_json
from modular_star_encoder.utils.settings import Count, Seed, settings_class

# Never trained on: `transformers` is what later examples search, and the default folder to search here is held out too.
KEPT_OUT = ("transformers", "huggingface-hub")
SEARCHED_PACKAGE = "huggingface_hub"
QUESTIONS = ("download a file from a repository", "delete a branch", "format a number of bytes for humans")


@settings_class
class StageSettings(TrainingSettings):
    """One stage of the quickstart.

    Args:
        batch_size: rows of one step.
        max_tokens: longest row in tokens; None where other settings limit it.
    """

    # 0.999 as adam_beta2 would remember more steps than a short stage has.
    DEFAULTS: ClassVar[dict[str, Any]] = TrainingSettings.DEFAULTS | {
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-8,
        "eval_strategy": "no",
        "dataloader_drop_last": True,
    }

    batch_size: Count
    max_tokens: Count | None = None


@settings_class
class QuickstartRecipe:
    """How a small model is pre-trained and fine-tuned in one go by this script.

    Args:
        vocab_size: number of tokens.
        max_query_tokens, max_document_tokens: longest description and code, prompt and special tokens included.
        pretraining, finetuning: the two stages.
        max_functions: number of functions to train on, drawn at random; all if None.
        attn_implementation: attention to train with.
        seed: seed of everything random.
    """

    EXAMPLE: ClassVar[str] = "hub_configs/quickstart/recipe.yaml"

    vocab_size: Count
    max_query_tokens: Count
    max_document_tokens: Count
    pretraining: StageSettings
    finetuning: StageSettings
    max_functions: Count | None = None
    attn_implementation: str = "sdpa"
    seed: Seed = 0


def main(argv: list[str] | None = None) -> int:
    """Run every stage; 0 on success, 2 after wrong input, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    keep_few_compiled_operations()
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; start it again to continue from the last checkpoint.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"quickstart: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", metavar="FOLDER", help="folder of repositories to use in place of installed packages")
    parser.add_argument("--out", metavar="FOLDER", default="runs/quickstart", help="where everything is written")
    parser.add_argument(
        "--recipe", metavar="FILE", help="training recipe (default: hub_configs/quickstart/recipe.yaml)"
    )
    parser.add_argument("--slice-exit-layer", metavar="K", type=int, help="exit to slice at (default: the middle one)")
    parser.add_argument(
        "--search-folder", metavar="FOLDER", help="code to search (default: a package kept out of training)"
    )
    parser.add_argument("--question", metavar="TEXT", action="append", help="question to answer; may be repeated")
    parser.add_argument("--restart", action="store_true", help="remove what an earlier run left in the output folder")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """All stages in order; each is skipped when its result is there already."""
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    recipe = load_recipe(QuickstartRecipe, arguments.recipe or hub_config_folder("quickstart") / "recipe.yaml")
    config = load_config("quickstart")
    middle = config.exit_layers[len(config.exit_layers) // 2]
    slice_exit = config.check_exit(arguments.slice_exit_layer or middle)
    if arguments.data:
        reader = folder_repositories(arguments.data, languages=("python",))
    else:
        reader = installed_repositories(KEPT_OUT)
    out = open_output(arguments, recipe)

    announce("1/7  Collect documented functions")
    functions, held_out = collect(reader, recipe)
    announce("2/7  Train the tokenizer")
    tokenizer = make_tokenizer(functions, recipe, out)
    config.vocab_size = len(tokenizer)
    announce("3/7  Pre-train: masked tokens, and do two functions come from the same repository?")
    pretraining_log = pretrain(functions, tokenizer, config, recipe, out)
    announce("4/7  Fine-tune: descriptions against code, at every exit")
    finetuning_log = finetune(functions, tokenizer, config, recipe, out)
    announce(f"5/7  Evaluate every exit on held-out repositories ({len(held_out)} functions)")
    results = evaluate(held_out, tokenizer, out)
    announce(f"6/7  Slice at exit {slice_exit} and load it back where this package does not exist")
    slice_report = slice_and_reload(held_out, slice_exit, out)
    announce("7/7  Search")
    hits = search(arguments, out)

    seconds = round(time.perf_counter() - start, 1)
    report = {
        "data": arguments.data or "installed packages",
        "repositories": {"train": names(functions), "test": names(held_out)},
        "functions": {"train": len(functions), "test": len(held_out)},
        "parameters": ModularStarEncoderForRetrieval(config).num_parameters(),
        "retrieval": results.to_dict(),
        "slice": slice_report,
        "search": hits,
        "pretraining": pretraining_log,
        "finetuning": finetuning_log,
        "seconds": seconds,
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
    }
    write_json(out / "results.json", report)
    print(f"\n{results.to_markdown()}\n")
    print(
        f"{report['parameters']:,} parameters · {seconds:.0f} s · checkpoint {out / 'model'} · {out / 'results.json'}"
    )


def announce(title: str) -> None:
    """A heading between the stages."""
    print(f"\n== {title}", flush=True)


def names(functions: list[DocumentedFunction]) -> list[str]:
    """Their repositories."""
    return sorted({function.repository for function in functions})


def open_output(arguments: argparse.Namespace, recipe: QuickstartRecipe) -> Path:
    """The output folder, new or left by an interrupted run with the same settings.

    Raises:
        ValueError: the folder holds a run with other settings, or something that no quickstart wrote.
    """
    out = Path(arguments.out)
    data = os.path.abspath(arguments.data) if arguments.data else None
    settings = json.loads(json.dumps({"data": data, "recipe": asdict(recipe)}))  # tuples become lists, as in the file
    written = out / "settings.json"
    if arguments.restart and written.is_file():
        shutil.rmtree(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not written.is_file():
            raise ValueError(f"{out} is not empty and holds no quickstart run; name another folder with --out.")
        if json.loads(written.read_text(encoding="utf-8")) != settings:
            raise ValueError(
                f"{out} holds a run with other settings; use --restart, or name another folder with --out."
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(written, settings)
    return out


def collect(reader: Any, recipe: QuickstartRecipe) -> tuple[list[DocumentedFunction], list[DocumentedFunction]]:
    """Documented functions to train on and held-out ones: no repository, description or code is in both."""
    collection = collect_functions(reader)
    for reason, count in reader.skipped.most_common():
        print(f"skipped {count} files: {reason}")
    functions = drop_near_identical_descriptions(collection.functions)
    sizes = Counter(function.repository for function in functions)
    drawn = draw_repositories(sizes, seed=recipe.seed, max_repository_share=0.015)
    train = [function for function in functions if function.repository not in drawn]
    held_out = [function for function in functions if function.repository in drawn]
    if recipe.max_functions is not None and len(train) > recipe.max_functions:
        print(f"{recipe.max_functions} of {len(train)} functions are drawn for training")
        rows = np.sort(np.random.default_rng(recipe.seed).permutation(len(train))[: recipe.max_functions])
        train = [train[row] for row in rows]
    print(
        f"{len(train)} functions of {len(names(train))} repositories to train on, "
        f"{len(held_out)} of {len(names(held_out))} held out: {', '.join(names(held_out))}"
    )
    return train, held_out


def make_tokenizer(functions: list[DocumentedFunction], recipe: QuickstartRecipe, out: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the training split."""
    folder = out / "tokenizer"
    if not folder.exists():
        texts = [text for function in functions for text in (function.description, function.code)]
        with staged_folder(folder) as staging:
            train_tokenizer(texts, recipe.vocab_size).save_pretrained(staging)
    return AutoTokenizer.from_pretrained(folder)


def pretrain(
    functions: list[DocumentedFunction],
    tokenizer: PreTrainedTokenizerFast,
    config: transformers.PreTrainedConfig,
    recipe: QuickstartRecipe,
    out: Path,
) -> dict[str, Any]:
    """In-context pre-training on the code of the training split."""
    folder, stage = out / "pretrained", recipe.pretraining
    if not folder.exists():
        code = defaultdict(list)
        for function in functions:
            code[function.repository].append(function.code)
        pairs = InContextPairs(
            code, tokenizer, length=stage.max_steps * stage.batch_size, max_tokens=stage.max_tokens, seed=recipe.seed
        )
        torch.manual_seed(recipe.seed)
        model = ModularStarEncoderForPreTraining(config)
        start_from_spellings(model.get_input_embeddings(), token_spellings(tokenizer), seed=recipe.seed)
        start_from_unigrams(model.heads.decoder, pairs.token_counts())
        model.set_attn_implementation(recipe.attn_implementation)
        log = train(model, InContextObjective(), pairs, PaddingCollator(tokenizer), stage, out / "pretraining", recipe)
        with staged_folder(folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            write_json(staging / "training_log.json", log)
    return finish_stage(folder, out / "pretraining")


def finetune(
    functions: list[DocumentedFunction],
    tokenizer: PreTrainedTokenizerFast,
    config: transformers.PreTrainedConfig,
    recipe: QuickstartRecipe,
    out: Path,
) -> dict[str, Any]:
    """Contrastive fine-tuning of the pre-trained trunk with a new projection head per exit."""
    folder, stage = out / "model", recipe.finetuning
    if not folder.exists():
        pairs = RetrievalTexts(
            described(functions),
            tokenizer,
            max_text_tokens=recipe.max_query_tokens,
            max_code_tokens=recipe.max_document_tokens,
            prompts=config.instruction_prompts,
        )
        torch.manual_seed(recipe.seed)
        model = ModularStarEncoderForRetrieval.from_pretrained(
            out / "pretrained", attn_implementation=recipe.attn_implementation
        )
        log = train(
            model, ContrastiveObjective(), pairs, RetrievalCollator(tokenizer), stage, out / "finetuning", recipe
        )
        save_retrieval_checkpoint(model, tokenizer, folder)
        write_json(folder / "training_log.json", log)
    return finish_stage(folder, out / "finetuning")


def train(
    model: transformers.PreTrainedModel,
    objective: Any,
    dataset: Any,
    collator: Any,
    stage: StageSettings,
    folder: Path,
    recipe: QuickstartRecipe,
) -> dict[str, Any]:
    """Train a model in place, from the last complete checkpoint in the folder if there is one; its log."""
    arguments = stage.arguments(folder, stage.batch_size, progress=True)
    arguments.seed = recipe.seed
    trainer = MultiExitTrainer(model, arguments, objective, train_dataset=dataset, data_collator=collator)
    return train_to_the_end(trainer, folder)


def finish_stage(folder: Path, checkpoints: Path) -> dict[str, Any]:
    """Remove the checkpoints of a stage whose result is saved; return its log."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    print(f"{log['steps']} steps; result in {folder}")
    return log


def evaluate(functions: list[DocumentedFunction], tokenizer: PreTrainedTokenizerFast, out: Path) -> Report:
    """MRR with 999 distractors at every exit, beside BM25 and the untrained model."""
    model = ModularStarEncoderForRetrieval.from_pretrained(out / "model")
    rows = [RetrievalRow(function.description, function.code, function.language) for function in functions]
    return evaluate_exits(model, tokenizer, rows, untrained=True)


def slice_and_reload(functions: list[DocumentedFunction], exit_layer: int, out: Path) -> dict[str, Any]:
    """Cut the checkpoint and compare its embeddings, made without our package, with the full model's: bit for bit."""
    folder = out / f"slice-{exit_layer}"
    if not folder.exists():
        slice_checkpoint(out / "model", exit_layer, folder)
    texts = [function.description for function in functions[:16]]
    full = SentenceTransformer(str(out / "model"), device="cpu")
    prompt = full.prompts["query"]
    expected = full.encode(texts, prompt=prompt, exit_layer=exit_layer, show_progress_bar=False)
    (reloaded,) = verify_reload([ReloadRequest(str(folder), texts, prompt)])
    identical = {
        "AutoModel": bool(np.array_equal(expected, reloaded.auto_model)),
        "SentenceTransformer": bool(np.array_equal(expected, reloaded.sentence_transformer)),
    }
    sizes = {name: (out / name / "model.safetensors").stat().st_size for name in ("model", folder.name)}
    for loader, same in identical.items():
        print(f"{loader}: embeddings {'identical to' if same else 'DIFFER from'} exit {exit_layer} of the full model")
    print(f"{sizes[folder.name] / 1e6:.1f} MB instead of {sizes['model'] / 1e6:.1f} MB in {folder}")
    if not all(identical.values()):
        raise RuntimeError(f"The slice {folder} does not reproduce exit {exit_layer} of {out / 'model'}.")
    return {"exit_layer": exit_layer, "identical": identical, "bytes": sizes}


def search(arguments: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Answer questions over a code folder with the deepest exit."""
    folder = arguments.search_folder or arguments.data or Path(sys.modules[SEARCHED_PACKAGE].__file__).parent
    questions = arguments.question or list(QUESTIONS)
    index = CodeIndex.build(folder, LocalStore(), checkpoint=out / "model")
    answers = index.search(questions, top_k=3)
    for answer in answers:
        print(f"# {answer.question}", *answer.hits, sep="\n")
    return [{"question": answer.question, "hits": [asdict(hit) for hit in answer.hits]} for answer in answers]


if __name__ == "__main__":
    sys.exit(main())
