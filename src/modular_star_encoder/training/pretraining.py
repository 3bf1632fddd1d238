"""Pre-train a tokenizer and a model on a corpus, as a recipe says. An interrupted run can be continued."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from modular_star_encoder.data.collators import PackingCollator, PaddingCollator
from modular_star_encoder.data.functions import open_corpus
from modular_star_encoder.data.in_context import InContextPairs
from modular_star_encoder.data.token_store import build_token_store
from modular_star_encoder.data.tokenizer import check_special_tokens, load_tokenizer, token_spellings, train_tokenizer
from modular_star_encoder.evaluation.lexical import identifier_overlap_accuracy
from modular_star_encoder.inference.checkpoints import clear_errors, note_parent, refuse_adapter
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForPreTraining
from modular_star_encoder.objectives.exit_losses import InContextObjective
from modular_star_encoder.training import runs, starting_source
from modular_star_encoder.training.recipes import PretrainingRecipe, check_length
from modular_star_encoder.training.starting_points import check_vocabulary, start_from_spellings, start_from_unigrams
from modular_star_encoder.training.trainer import MultiExitTrainer, check_objective
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_folder, write_text
from modular_star_encoder.utils.reports import markdown_table, percent, printable

# Number of characters to train a tokenizer on: enough for a large vocabulary; more text only takes longer.
TOKENIZER_CHARACTERS = 100_000_000
OVERLAP_ROWS = 2048  # held-out rows for `identifier_overlap`: their standard error is at most 1.1 points


def pretrain(
    recipe: PretrainingRecipe,
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
    announce: Callable[[runs.Preflight], None] = print,  # called with the size of the run before it begins
) -> dict[str, Any]:
    """Pre-train a model; if `out` has an interrupted run of this recipe, continue that run.

    `out` gets `tokenizer/`, `tokens/` (the tokenized corpus), `checkpoints/`, and at the end `report.md` (quality of
    all exits) and `model/`, a checkpoint with `training_log.json`; this log is returned. With several processes, every
    process calls this function.
    """
    out, state, objective = Path(out), runs.processes_of_run(), InContextObjective()
    progress_here, processes = progress and state.is_main_process, state.num_processes
    source, weights = starting_source(recipe.model)
    config = model_config(recipe)
    # Run all checks that need no corpus before reading the corpus.
    check_length(config, max_tokens=recipe.max_tokens)
    with torch.device("meta"):
        ModularStarEncoderForPreTraining(config).set_attn_implementation(recipe.attn_implementation)
    arguments = recipe.arguments(out / runs.CHECKPOINTS, processes, progress=progress)
    check_objective(objective, arguments, config, config.exit_layers)
    repositories = open_corpus(recipe.corpus).repositories
    if repositories is not None and len(repositories) < 4:  # None: not known before the whole corpus is read
        message = f"The corpus has {len(repositories)} repositories ({', '.join(repositories)}). Add repositories: two "
        message += "are needed to train on and two to hold out, because pairs need snippets of different repositories."
        raise UserError("training.corpus.too_few_repositories", message)
    run = runs.Run(out, recipe, "pre-training", until_trained=("corpus", "tokenizer", "model"))
    if run.log is not None:
        return run.log
    own = recipe.tokenizer or (source if weights else None)
    if (given := load_tokenizer(own) if own else None) is not None:
        check_special_tokens(given)
    with state.main_process_first():
        if state.is_main_process:
            run.begin()
        tokenizer = given or load_tokenizer(_train_tokenizer(recipe.corpus, config, out / "tokenizer", progress_here))
        collator = (PackingCollator if recipe.packing else PaddingCollator)(tokenizer)
        reader = open_corpus(recipe.corpus)
        store = build_token_store(reader, tokenizer, out / "tokens", progress=progress_here)
        if progress_here:
            for reason, count in reader.skipped.most_common():
                print(f"skipped {count} files: {reason}")
    torch.manual_seed(recipe.seed)
    if weights:
        refuse_adapter(source)
        with clear_errors(os.fspath(source)):
            model = ModularStarEncoderForPreTraining.from_pretrained(source, dtype=torch.float32)
        note_parent(model.config, source)
    else:
        config.vocab_size = max(len(tokenizer), config.vocab_size if recipe.tokenizer else 0)
        model = ModularStarEncoderForPreTraining(config)
    check_vocabulary(len(tokenizer), model.config.vocab_size)
    model.set_attn_implementation(recipe.attn_implementation)
    estimate = runs.pretraining_preflight(model, recipe, processes)
    if state.is_main_process:
        announce(estimate)

    train, held_out = store.split(recipe.eval_fraction, recipe.seed)
    if progress_here:
        snippets = recipe.corpus.get("snippets", "files")
        for part, use in ((train, "to train on"), (held_out, "held out")):
            names, more = part.repositories[:5], ", …" * (len(part.repositories) > 5)
            size = f"{len(part):,} {snippets} {use}, of {len(part.repositories):,} repositories"
            print(printable(f"{size}: {', '.join(names)}{more}"))
        if len(held_out.repositories) == 2 > round(recipe.eval_fraction * len(store.repositories)):
            print("two repositories are held out: the fewest that give pairs of snippets from different repositories")
    options: dict[str, Any] = {"max_tokens": recipe.max_tokens, "mlm_probability": recipe.mlm_probability}
    rows, eval_rows = recipe.max_steps * recipe.tokens_per_step // recipe.max_tokens, recipe.eval_rows
    pairs, unseen, fitted = (
        InContextPairs(part, tokenizer, length=length, seed=recipe.seed + number, **options)
        for number, (part, length) in enumerate([(train, rows), (held_out, eval_rows), (train, eval_rows)])
    )
    counts = pairs.token_counts()
    if recipe.start_from_corpus and not weights:
        # A given tokenizer may have fewer tokens than the model; each remaining vocabulary entry gets its own spelling.
        unused = range(len(tokenizer), model.config.vocab_size)
        spellings = token_spellings(tokenizer) + [f"<{index}> unused" for index in unused]
        start_from_spellings(model.get_input_embeddings(), spellings, seed=recipe.seed)
        start_from_unigrams(model.heads.decoder, torch.nn.functional.pad(counts, (0, len(unused))))
    known, new = (map(part.__getitem__, range(min(eval_rows, OVERLAP_ROWS))) for part in (fitted, unseen))
    overlap = identifier_overlap_accuracy(known, new, tokenizer)
    data: dict[str, Any] = {"train_dataset": pairs, "eval_dataset": unseen, "data_collator": collator}
    trainer = MultiExitTrainer(model, arguments, objective, **data)
    log = runs.train_to_the_end(trainer, out / runs.CHECKPOINTS, progress=progress)
    what, steps = f"{eval_rows:,} rows at {len(config.exit_layers)} exits", eval_rows / estimate.rows_per_step
    notice = runs.evaluation_notice(log, what, steps) if progress_here else ""
    log |= {"evaluation": runs.final_metrics(trainer, notice), "recipe": run.settings, "preflight": asdict(estimate)}
    log |= {"identifier_overlap": overlap, "held_out_repositories": list(held_out.repositories)}
    log["unigram_entropy"] = torch.special.entr(counts.double() / counts.sum()).sum().item()
    trainer.save_model(os.fspath(out / runs.MODEL))
    if state.is_main_process:
        write_text(out / runs.REPORT, exit_report(log))
        run.end(log)
    return log


def exit_report(log: Mapping[str, Any]) -> str:
    """Return a Markdown table from the log of `pretrain`: quality of each exit and of guesses on held-out rows."""
    found, prefix = log["evaluation"], "eval_mlm_loss_exit_"
    losses = {name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)}
    accuracies: dict[str, float] = {k: found[f"eval_icc_accuracy_exit_{k}"] for k in losses}
    accuracies |= {"guess": 0.5, "guess by common identifiers": log["identifier_overlap"]["accuracy"]}
    losses["guess"] = log["unigram_entropy"]
    rows = [["held out, exit", "MLM loss", "MLM perplexity", "ICC accuracy (%)"]]
    for name, accuracy in accuracies.items():
        loss = losses.get(name)
        shown = ["", ""] if loss is None else [f"{loss:.3f}", f"{torch.tensor(loss).exp():.1f}"]
        rows.append([name, *shown, percent(accuracy)])
    table, steps = "\n".join(markdown_table(rows)), f"After {log['steps']:,} steps, on held-out rows."
    guesses = "`guess` predicts by token frequency (MLM) or by chance (ICC), the last row by identifiers in common."
    tasks = "MLM: masked language modelling. ICC: do two snippets come from one repository (in-context classification)?"
    return f"{table}\n\n{steps} {tasks} {guesses}\n"


def model_config(recipe: PretrainingRecipe) -> ModularStarEncoderConfig:
    return ModularStarEncoderConfig.from_pretrained(starting_source(recipe.model)[0], dtype=torch.float32)


def _train_tokenizer(corpus: Mapping[str, Any], config: ModularStarEncoderConfig, folder: Path, progress: bool) -> Path:
    """If `folder` does not exist yet, train a tokenizer on the corpus and save it there; return `folder`."""

    def texts() -> Iterator[str]:
        left = TOKENIZER_CHARACTERS
        for file in open_corpus(corpus):
            left -= len(file.text)
            if left < 0:
                return
            yield file.text

    if not folder.exists():
        longest = config.max_position_embeddings
        with staged_folder(folder) as staging:
            tokenizer = train_tokenizer(texts(), config.vocab_size, max_length=longest, progress=progress)
            tokenizer.save_pretrained(staging)
    return folder
