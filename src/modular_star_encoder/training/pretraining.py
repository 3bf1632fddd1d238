"""In-context pre-training from a recipe: corpus → tokenizer → token store → model, restartable at every stage."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerFast, TrainingArguments

from modular_star_encoder.data.corpora import open_corpus
from modular_star_encoder.data.files import staged_folder, write_json
from modular_star_encoder.data.in_context import InContextPairs, PaddingCollator
from modular_star_encoder.data.packing import PackingCollator
from modular_star_encoder.data.token_store import TokenStore, build_token_store
from modular_star_encoder.data.tokenizer import load_tokenizer, token_spellings, train_tokenizer
from modular_star_encoder.evaluation.identifier_overlap import identifier_overlap_accuracy
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForPreTraining
from modular_star_encoder.objectives import InContextObjective, exit_weights
from modular_star_encoder.training.curves import plot_curves
from modular_star_encoder.training.initialization import start_from_spellings, start_from_unigrams
from modular_star_encoder.training.preflight import Preflight, preflight
from modular_star_encoder.training.pretraining_recipe import PretrainingRecipe
from modular_star_encoder.training.recipe import hub_config_folder
from modular_star_encoder.training.schedule import MultiStepSchedule
from modular_star_encoder.training.stages import bf16_is_faster, train_to_the_end
from modular_star_encoder.training.trainer import MultiExitTrainer

LOG, CURVES = Path("model", "training_log.json"), Path("model", "curves.png")

# Enough for the merges of a large vocabulary; more text makes training the tokenizer slower, not better.
TOKENIZER_CHARACTERS = 100_000_000


def pretrain(
    recipe: PretrainingRecipe,
    out: str | os.PathLike,
    *,
    progress: bool = True,
    announce: Callable[[Preflight], None] = print,
) -> dict[str, Any]:
    """Pre-train a model, continuing whatever an earlier call with this recipe left in `out`.

    `out` gets `tokenizer/`, `tokens/` (the tokenized corpus), `checkpoints/`, and in the end `model/`, a checkpoint
    with `training_log.json` and, where matplotlib is installed, `curves.png`; a run that has its log is finished, and
    the log is returned. With several processes (`accelerate launch`, `torchrun`) each calls this.

    Args:
        recipe: what to do.
        out: folder of this run.
        progress: whether to show progress bars.
        announce: called with the estimate of what the run will take, before anything is trained.

    Returns:
        The training log: that of `run_stage`, and `evaluation` at the end, `recipe`, `preflight`, `unigram_entropy`
        (nats per token of the training part), `identifier_overlap` (in-context classification without a model) and
        the names of the held-out repositories.

    Raises:
        ValueError: the recipe contradicts itself, the model or the machine, or `out` holds a run with another recipe.
    """
    out, state = Path(out), PartialState()
    config = model_config(recipe)
    # What can be told without the corpus is told before it is read.
    with torch.device("meta"):
        model = ModularStarEncoderForPreTraining(config)
    preflight(model, recipe, state.num_processes)
    model.set_attn_implementation(recipe.attn_implementation)
    exit_weights(recipe.exit_weights, config.exit_layers, config.parent_num_hidden_layers)
    arguments, schedule = _training_arguments(recipe, out / "checkpoints", state, progress), _schedule(recipe)
    open_corpus(recipe.corpus)
    with state.main_process_first():
        _open_run(recipe, out)
        if (out / LOG).is_file():
            return json.loads((out / LOG).read_text(encoding="utf-8"))
        tokenizer = _tokenizer(recipe, config, out, progress and state.is_main_process)
        store = _token_store(recipe, tokenizer, out, progress and state.is_main_process)
    train, held_out = store.split(recipe.held_out_share, recipe.seed)
    model = _model(recipe, config, len(tokenizer))
    estimate = preflight(model, recipe, state.num_processes)
    if state.is_main_process:
        announce(estimate)
    rows_per_step = recipe.rows_per_device * recipe.accumulation(state.num_processes) * state.num_processes
    options = {"max_tokens": recipe.max_tokens, "mask_probability": recipe.mask_probability, "progress": False}
    pairs = InContextPairs(train, tokenizer, length=recipe.steps * rows_per_step, seed=recipe.seed, **options)
    unseen = InContextPairs(held_out, tokenizer, length=recipe.eval_rows, seed=recipe.seed + 1, **options)
    if recipe.start_from_corpus and not _has_weights(recipe):
        start_from_spellings(model.get_input_embeddings(), token_spellings(tokenizer), seed=recipe.seed)
        start_from_unigrams(model.heads.decoder, pairs.token_counts())
    fitted = InContextPairs(train, tokenizer, length=recipe.eval_rows, seed=recipe.seed + 2, **options)
    overlap = identifier_overlap_accuracy(fitted, unseen, tokenizer)
    trainer = MultiExitTrainer(
        model,
        arguments,
        InContextObjective(),
        weights=recipe.exit_weights,
        normalize_weights=recipe.normalize_exit_weights,
        rotate_shallow_exits=recipe.rotate_shallow_exits,
        log_gradient_norms=recipe.log_gradient_norms,
        schedule=schedule,
        train_dataset=pairs,
        eval_dataset=unseen,
        data_collator=(PackingCollator if recipe.packing else PaddingCollator)(tokenizer),
    )
    log = train_to_the_end(trainer, out / "checkpoints", progress=progress)
    counts = pairs.token_counts().double()
    log |= {
        "evaluation": trainer.evaluate(),
        "recipe": recipe.to_dict(),
        "preflight": asdict(estimate),
        "unigram_entropy": torch.special.entr(counts / counts.sum()).sum().item(),
        "identifier_overlap": overlap,
        "held_out_repositories": list(held_out.repositories),
    }
    trainer.save_model(os.fspath(out / "model"))
    if state.is_main_process:
        tokenizer.save_pretrained(out / "model")
        if find_spec("matplotlib"):
            plot_curves(log, out / CURVES)
        write_json(out / LOG, _finite(log))
    return log


def model_config(recipe: PretrainingRecipe) -> ModularStarEncoderConfig:
    """The configuration that a recipe names: one of ours, or that of a folder.

    Raises:
        ValueError: there is neither.
    """
    return ModularStarEncoderConfig.from_pretrained(_model_folder(recipe), dtype=torch.float32)


def _model_folder(recipe: PretrainingRecipe) -> Path:
    """Names of ours come first, so that a folder that happens to be there does not change what a recipe means."""
    try:
        return hub_config_folder(recipe.model)
    except ValueError:
        if not Path(recipe.model, "config.json").is_file():
            raise
        return Path(recipe.model)


def _finite(value: Any) -> Any:
    """The same with None in place of infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _has_weights(recipe: PretrainingRecipe) -> bool:
    return any(_model_folder(recipe).glob("model*.safetensors"))


def _open_run(recipe: PretrainingRecipe, out: Path) -> None:
    """Make the folder, or check that it holds a run with this recipe.

    As long as nothing is trained, only what the tokenizer and the token store were made from must be the same.
    """
    written = out / "recipe.json"
    settings = json.loads(json.dumps(recipe.to_dict(), default=str))
    if written.is_file():
        before = json.loads(written.read_text(encoding="utf-8"))
        trained = any((out / name).exists() for name in ("checkpoints", "model"))
        names = set(settings) if trained else {"corpus", "tokenizer", "model"}
        other = sorted(name for name in names if before.get(name) != settings[name])
        if other:
            raise ValueError(f"{out} holds a run with another {', '.join(other)}; name another folder.")
        write_json(written, settings)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and holds no run of pre-training; name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(written, settings)


def _tokenizer(
    recipe: PretrainingRecipe, config: ModularStarEncoderConfig, out: Path, progress: bool
) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer, or one trained on the corpus."""
    name = recipe.tokenizer or (recipe.model if _has_weights(recipe) else None)
    if name is not None:
        return load_tokenizer(name)
    folder = out / "tokenizer"
    if not folder.exists():

        def texts() -> Any:
            left = TOKENIZER_CHARACTERS
            for file in open_corpus(recipe.corpus):
                left -= len(file.text)
                if left < 0:
                    return
                yield file.text

        with staged_folder(folder) as staging:
            train_tokenizer(
                texts(), config.vocab_size, max_length=config.max_position_embeddings, progress=progress
            ).save_pretrained(staging)
    return load_tokenizer(folder)


def _token_store(
    recipe: PretrainingRecipe, tokenizer: PreTrainedTokenizerFast, out: Path, progress: bool
) -> TokenStore:
    """The tokenized corpus."""
    reader = open_corpus(recipe.corpus)
    store = build_token_store(reader, tokenizer, out / "tokens", progress=progress)
    if progress:
        for reason, count in reader.skipped.most_common():
            print(f"skipped {count} files: {reason}")
        print(f"{len(store):,} files of {len(store.repositories):,} repositories")
    return store


def _model(
    recipe: PretrainingRecipe, config: ModularStarEncoderConfig, vocab_size: int
) -> ModularStarEncoderForPreTraining:
    """A new model, or the one whose weights lie beside the configuration."""
    torch.manual_seed(recipe.seed)
    if _has_weights(recipe):
        model = ModularStarEncoderForPreTraining.from_pretrained(recipe.model, dtype=torch.float32)
    else:
        config.vocab_size = max(vocab_size, config.vocab_size if recipe.tokenizer else 0)
        model = ModularStarEncoderForPreTraining(config)
    if vocab_size > model.config.vocab_size:
        raise ValueError(f"The tokenizer has {vocab_size} tokens, more than the model's {model.config.vocab_size}.")
    model.set_attn_implementation(recipe.attn_implementation)
    return model


def _schedule(recipe: PretrainingRecipe) -> MultiStepSchedule | None:
    if not recipe.milestones and not recipe.fractions:
        return None
    return MultiStepSchedule(recipe.warmup_steps, recipe.milestones, recipe.fractions)


def _training_arguments(
    recipe: PretrainingRecipe, folder: Path, state: PartialState, progress: bool
) -> TrainingArguments:
    """The recipe in the words of `Trainer`."""
    settings = {
        "output_dir": os.fspath(folder),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.rows_per_device,
        "per_device_eval_batch_size": recipe.rows_per_device,
        "gradient_accumulation_steps": recipe.accumulation(state.num_processes),
        "learning_rate": recipe.learning_rate,
        "warmup_steps": recipe.warmup_steps,
        "lr_scheduler_type": "linear",
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "adam_epsilon": recipe.adam_epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "logging_steps": recipe.logging_steps,
        "eval_strategy": "steps",
        "eval_steps": recipe.eval_steps,
        "save_steps": recipe.save_steps,
        "save_total_limit": recipe.save_total_limit,
        "dataloader_num_workers": recipe.dataloader_workers,
        "seed": recipe.seed,
        "bf16": bf16_is_faster(),
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": not progress,
        "report_to": "none",
    }
    try:
        return TrainingArguments(**(settings | dict(recipe.trainer)))
    except TypeError as error:
        raise ValueError(f"trainer: {error}.") from error
