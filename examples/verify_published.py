"""Compare the outputs of a published checkpoint, loaded by this package, with those of the code in its repository.

    python examples/verify_published.py modularStarEncoder/ModularStarEncoder-finetuned

Both models embed the same prompts, padded in one batch and one by one. The repository's code is downloaded and run in a
separate process without this package. Read the code first if you do not trust it.

Exit code: 0 if all outputs agree, 1 if they don't, 2 on wrong input or if the repository's code does not run here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

# This file is also what runs in the separate process, perhaps under an older transformers: what is imported from this
# package, or is new in its dependencies, is imported where it is used.
PACKAGE = "modular_star_encoder"
OWN_CODE = "--own-code"

Answers = dict[str, np.ndarray]
"""{key: array}. The keys "padded/{name}/{prompt}" and "alone/{name}/{prompt}" have outputs, float32 (D,), or
(T, D), one vector for each of T tokens, without padding. The key "ids/{prompt}" has the token ids (T,)."""

WAYS = {"padded": "all prompts in one padded batch", "alone": "each prompt alone"}
MAX_TOKENS = 2048
MISSING = float("inf")
DEFAULT_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}

CODE = (
    ("python", "def add(first, second):\n    return first + second\n"),
    ("java", "public static int count(List<String> words) {\n    return words.size();\n}\n"),
    ("c++", "std::sort(v.begin(), v.end());"),
)
DESCRIPTIONS = (
    "Add two numbers.",
    "Read a file line by line, skip those that start with a hash sign, and return the rest as a list of strings.",
    "How many words are there?",
)

ALTERNATIVES = {
    "pooling": ("mean", "lasttoken", "legacy"),
    "projection_act": ("leaky_relu", "relu", "gelu", "gelu_pytorch_tanh", "tanh", "linear"),
    "projection_order": ("project_then_pool", "pool_then_project"),
    "embedding_normalization": ("l2", "clip"),
    "exit_norm": ("last", "all", "none"),
    "is_causal": (False, True),
    "pooler_position": ("last", "first"),
}
"""{configuration option with an undocumented published value: the values that the option may have}."""

FINETUNED_OPTIONS = (
    "pooling",
    "projection_act",
    "projection_order",
    "embedding_normalization",
    "exit_norm",
    "is_causal",
)
PRETRAINED_OPTIONS = ("exit_norm", "is_causal", "pooler_position")


def main(argv: list[str] | None = None) -> int:
    """Compare the outputs; return 0 if all agree, 1 if not, 2 on wrong input, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    try:
        return verify(arguments)
    except KeyboardInterrupt:
        print("\nverify_published: interrupted.", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"verify_published: error: {one_line(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    purpose, _, _, exit_codes = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(description=purpose, epilog=exit_codes)
    parser.add_argument("repository", help="a repository of the Hub (owner/name), or a folder that holds its files")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument(
        "--dtype",
        choices=tuple(DEFAULT_TOLERANCE),
        default="float32",
        help="precision of both models (default: float32)",
    )
    parser.add_argument(
        "--exit-layer", metavar="K", type=int, help="compare this exit alone, cut at loading (default: all exits)"
    )
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=float,
        help="largest difference that counts as agreement; if an output has values above 1, relative to the largest "
        "value (default: 1e-4 in float32, 3e-2 in bfloat16)",
    )
    parser.add_argument(
        "--device", default="cpu", help="where both models run, one after the other: cpu, cuda, cuda:1 (default: cpu)"
    )
    parser.add_argument(
        "--attention",
        choices=("sdpa", "flash_attention_2"),
        default="sdpa",
        help="attention of the repository's code (default: sdpa)",
    )
    parser.add_argument(
        "--remote-python",
        metavar="FILE",
        default=sys.executable,
        help="Python interpreter that runs the repository's code (default: this one); if the code fails, use an "
        "interpreter with transformers 4.39.3, for which the published code was written",
    )
    return parser


def verify(arguments: argparse.Namespace) -> int:
    """Run both models and print the comparison; return 0 if all outputs agree, otherwise 1."""
    transformers.logging.set_verbosity_error()
    folder = fetch(arguments.repository, arguments.revision)
    check_exit(arguments.exit_layer, published_exits(folder))
    finetuned = has_projection_heads(folder)
    prompts = published_prompts(load_tokenizer(folder), instructions=finetuned)
    settings = {name: getattr(arguments, name) for name in ("dtype", "device", "attention", "exit_layer")}
    theirs = run_own_code(folder, {"texts": prompts, **settings}, arguments.remote_python)

    def run(options: Mapping[str, Any]) -> Answers:
        return our_answers(folder, prompts, settings, options, finetuned=finetuned)

    print("Loading it with this package ...", flush=True)
    ours = run({})
    tolerance = DEFAULT_TOLERANCE[arguments.dtype] if arguments.tolerance is None else arguments.tolerance
    comparisons = compare(theirs, ours)
    print(f"\n{format_tables(comparisons, prompt_labels())}\n")
    print(f"padded against alone, largest difference: theirs {self_difference(theirs):.1e}, ours", end=" ")
    print(f"{self_difference(ours):.1e}")
    disagreeing = [comparison for comparison in comparisons if not comparison.within(tolerance)]
    if not disagreeing:
        print(f"All {len(comparisons)} outputs agree within {tolerance:g}.")
        return 0
    print(f"{len(disagreeing)} of {len(comparisons)} outputs differ by more than {tolerance:g}.")
    if any(comparison.difference == MISSING for comparison in comparisons):
        print("An output is missing, infinite or of another shape in one model: no option explains such a difference.")
        return 1
    transformers.utils.logging.disable_progress_bar()
    names = FINETUNED_OPTIONS if finetuned else PRETRAINED_OPTIONS
    print(format_trials(try_alternatives(run, theirs, current_options(folder, names), tolerance), tolerance))
    return 1


# ---- The repository


def fetch(repository: str, revision: str | None) -> Path:
    """Return the folder of a repository; if `repository` is no local folder, download it to the Hub's cache.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder is missing, or has no configuration, code or weights.
        OSError: the Hub lacks the repository or the revision, or can't be reached.
        ValueError: `revision` is given for a local folder, or config.json lacks a key.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from modular_star_encoder.inference.checkpoints import check_checkpoint

    check_checkpoint(repository)
    folder = Path(repository).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"--revision is for repositories on the Hub, but {repository} is a local folder: omit it.")
    else:
        print(f"Fetching {repository} ...", flush=True)
        patterns = ["*.json", "*.py", "*.txt", "*.safetensors"]
        try:
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
        except LocalEntryNotFoundError as error:
            raise OSError(f"{repository} is not a local folder, and the Hub can't be reached.") from error
        except (HfHubHTTPError, HFValidationError) as error:
            at = f" at revision {revision}" if revision else ""
            reason = one_line(error).partition(". ")[0]
            raise OSError(f"{repository} is not a local folder and can't be downloaded{at}: {reason}") from error
        check_checkpoint(folder)
    missing = [key for key in ("auto_map", "matryoshka_layers") if key not in read_config(folder)]
    if missing:
        raise ValueError(
            f"{repository} is not a published repository: its config.json has no {' and no '.join(missing)}."
        )
    return folder


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the content of config.json in `folder`; ValueError if it is not a JSON object."""
    path = Path(folder, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object, not {type(config).__name__}.")
    return config


def check_exit(exit_layer: int | None, exits: Sequence[int]) -> None:
    """Raise ValueError if `exit_layer` is not in `exits`; None is allowed."""
    if exit_layer is not None and exit_layer not in exits:
        raise ValueError(f"{exit_layer} is not an exit of this model; its exits are {', '.join(map(str, exits))}.")


def has_projection_heads(folder: Path) -> bool:
    """Return whether the weights have projection heads, as fine-tuned models do; ValueError if a file is damaged."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                names.update(tensors.keys())
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {one_line(error)}") from error
    return any("projection_heads." in name for name in names)


def load_tokenizer(folder: str | Path) -> Any:
    """Return the repository's tokenizer; no code of the repository is run."""
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def published_prompts(tokenizer: Any, *, instructions: bool) -> list[str]:
    """Return the six prompts in the form that the model cards give, with the tokenizer's special tokens as text.

    If `instructions` is false, the prompts have no instruction. ValueError if a special token is missing.
    """
    from modular_star_encoder.data.prompts import CODE_INSTRUCTION, TEXT_INSTRUCTION

    sep, cls = tokenizer.sep_token, tokenizer.cls_token
    if sep is None or cls is None:
        raise ValueError("The repository's tokenizer must have a sep_token and a cls_token; one is missing.")
    if not instructions:
        return [f"{sep}{text}{cls}" for text in (*(code for _, code in CODE), *DESCRIPTIONS)]
    code = [f"{sep}{CODE_INSTRUCTION.format(language=language)}{sep}{text}{cls}" for language, text in CODE]
    return code + [f"{sep}{TEXT_INSTRUCTION}{sep}{text}{cls}" for text in DESCRIPTIONS]


def prompt_labels() -> list[str]:
    """Return the names of the prompts in the tables, at most 26 characters each."""
    texts = [*(f"{language}: {one_line(code)}" for language, code in CODE), *DESCRIPTIONS]
    return [text if len(text) <= 26 else f"{text[:25]}…" for text in texts]


# ---- Answers: the outputs of a model for the prompts


def answer(tokenizer: Any, texts: Sequence[str], run: Callable[[Any], dict[str, torch.Tensor]]) -> Answers:
    """Run a model on all texts in one batch, then on each text alone; return all outputs.

    `run` takes a batch of B rows and returns {name: output}, (B, D) or (B, T, D).
    """
    answers: Answers = {}
    rows = [(("padded", range(len(texts))), list(texts))]
    rows += [(("alone", [index]), [text]) for index, text in enumerate(texts)]
    for (way, indices), batch_texts in rows:
        batch = tokenizer(batch_texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            outputs = run(batch)
        for position, index in enumerate(indices):
            real = batch["attention_mask"][position].bool()
            if way == "alone":
                answers[f"ids/{index}"] = batch["input_ids"][position].numpy()
            for name, output in outputs.items():
                values = output[position].float().cpu()
                answers[f"{way}/{name}/{index}"] = (values[real] if values.dim() == 2 else values).numpy()
    return answers


def named_outputs(output: Any, exits: Sequence[int], exit_layer: int | None) -> dict[str, torch.Tensor]:
    """Return {name: tensor} of the parts of a model's output that are compared.

    Args:
        output: has `projected_pooled_normalized` (a tensor, or a list with one per exit), or states and logits.
        exits: the exits of the full model.
        exit_layer: the exit to compare; all exits if None.
    """
    embeddings = getattr(output, "projected_pooled_normalized", None)
    if embeddings is None:
        names = ("last_hidden_state", "prediction_logits", "seq_relationship_logits")
        return {name: getattr(output, name) for name in names if getattr(output, name, None) is not None}
    if not isinstance(embeddings, list | tuple):
        embeddings = [embeddings]
    if exit_layer is not None:
        # A model that was cut there has it last; a full one, where it stands among the exits.
        complete = len(embeddings) == len(exits)
        return {f"exit {exit_layer}": embeddings[exits.index(exit_layer) if complete else -1]}
    if len(embeddings) == 1:
        return {"embedding": embeddings[0]}
    return {f"exit {exit}": embedding for exit, embedding in zip(exits, embeddings, strict=True)}


def published_exits(folder: str | Path) -> list[int]:
    """Return `matryoshka_layers` of config.json: the exits of the full model, even if the checkpoint is a slice."""
    return list(read_config(folder)["matryoshka_layers"])


def our_answers(
    folder: Path, texts: Sequence[str], settings: Mapping[str, Any], options: Mapping[str, Any], *, finetuned: bool
) -> Answers:
    """Return the outputs of the repository's model, loaded by this package with `options` set in the configuration.

    ValueError if the configuration rejects the value of an option, or if the model lacks the exit.
    """
    from huggingface_hub.errors import StrictDataclassError

    import modular_star_encoder  # noqa: F401 - registers our classes with the Auto classes

    exits, exit_layer = published_exits(folder), settings["exit_layer"]
    arguments = {"dtype": getattr(torch, settings["dtype"]), "trust_remote_code": False, **options}
    if exit_layer is not None:
        arguments["exit_layer"] = exit_layer
    auto_classes = [transformers.AutoModel]
    if not finetuned and exit_layer is None:
        auto_classes.append(transformers.AutoModelForPreTraining)
    answers: Answers = {}
    for auto_class in auto_classes:
        try:
            model = auto_class.from_pretrained(folder, **arguments).to(settings["device"]).eval()
        except StrictDataclassError as error:
            raise ValueError(f"This package rejects the configuration: {one_line(error)}") from error

        def run(batch: Any, model: Any = model) -> dict[str, torch.Tensor]:
            output = model(**batch.to(model.device))
            return named_outputs(output, exits, exit_layer)

        answers |= answer(load_tokenizer(folder), texts, run)
    return answers


# ---- The separate process


class Blocker(MetaPathFinder):
    """Import hook that hides this package, because its classes would replace those of the repository's code."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Raise ModuleNotFoundError for this package; return None, for the next finder, for all other modules."""
        if fullname.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"{PACKAGE} is not available in this process")


def own_code_main(folder: str, request_file: str, result_file: str) -> None:
    """In the separate process, load the model with the repository's code; write the outputs to `result_file`."""
    sys.meta_path.insert(0, Blocker())
    transformers.logging.set_verbosity_error()
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    model = transformers.AutoModel.from_pretrained(
        folder,
        trust_remote_code=True,
        use_safetensors=True,
        attn_implementation=request["attention"],
        torch_dtype=getattr(torch, request["dtype"]),
    )
    if not type(model).__module__.startswith("transformers_modules."):
        raise RuntimeError(f"{type(model)} is not a class of the repository's code: check `auto_map` in config.json")
    model = model.to(request["device"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    exits, exit_layer = published_exits(folder), request["exit_layer"]

    def run(batch: Any) -> dict[str, torch.Tensor]:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        if exit_layer is None:
            return named_outputs(model(input_ids=ids, attention_mask=mask), exits, None)
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        if getattr(output, "projected_pooled_normalized", None) is None:
            return {"last_hidden_state": output.hidden_states[exit_layer]}
        return named_outputs(output, exits, exit_layer)

    np.savez(result_file, **answer(tokenizer, request["texts"], run))


def run_own_code(folder: Path, request: Mapping[str, Any], python: str = sys.executable) -> Answers:
    """Return the outputs of the repository's code, run in a new process without this package and without the Hub.

    RuntimeError if the process fails, with the last line of its stderr in the message.
    """
    with tempfile.TemporaryDirectory() as scratch:
        question, result = Path(scratch, "request.json"), Path(scratch, "result.npz")
        question.write_text(json.dumps(request), encoding="utf-8")
        offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch, "modules"))}
        print("running the repository's own code in a separate process", file=sys.stderr)
        process = subprocess.run(  # noqa: S603 - this file, arguments passed as a list
            [python, str(Path(__file__).resolve()), OWN_CODE, os.fspath(folder), str(question), str(result)],
            env={**os.environ, **offline},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message on stderr"])[-1]
            message = f"The repository's code failed under {python}; try another Python with --remote-python: {last}"
            raise RuntimeError(message)
        with np.load(result, allow_pickle=False) as arrays:
            return dict(arrays)


# ---- Comparison


@dataclass(frozen=True)
class Comparison:
    """The difference between the two models in one output for one prompt.

    Args:
        difference: largest absolute difference, divided by the largest absolute value of the repository's output if
            this value exceeds 1; infinite if one model lacks the output or the shapes differ.
        cosine: cosine similarity of the two flattened outputs.
    """

    way: str
    name: str
    prompt: int
    difference: float
    cosine: float

    def within(self, tolerance: float) -> bool:
        """Return whether the difference is at most `tolerance`; False if it is NaN."""
        return self.difference <= tolerance


def compare(theirs: Answers, ours: Answers) -> list[Comparison]:
    """Compare every output of the two models, in the order of `theirs`; ValueError if a prompt's token ids differ."""
    for key in [key for key in theirs if key.startswith("ids/")]:
        if not np.array_equal(theirs[key], ours[key]):
            prompt = int(key.partition("/")[2]) + 1
            raise ValueError(f"Both models use the same tokenizer files, but prompt {prompt} has different token ids.")
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if not key.startswith("ids/")]
    comparisons = []
    for key in keys:
        way, name, prompt = key.split("/")
        comparisons.append(Comparison(way, name, int(prompt), *_distance(theirs.get(key), ours.get(key))))
    return comparisons


def _distance(first: np.ndarray | None, second: np.ndarray | None) -> tuple[float, float]:
    if first is None or second is None or first.shape != second.shape:
        return MISSING, float("nan")
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    difference = float(np.abs(a - b).max() / max(1.0, np.abs(a).max()))
    if not np.isfinite(difference):
        return difference, float("nan")
    return difference, float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))


def worst(comparisons: Sequence[Comparison]) -> float:
    """Return the largest difference; infinity if a difference is NaN."""
    return max(float("inf") if np.isnan(item.difference) else item.difference for item in comparisons)


def self_difference(answers: Answers) -> float:
    """Return the largest difference, within one model, between a prompt in the padded batch and the prompt alone."""
    pairs = [(key, f"alone/{key.partition('/')[2]}") for key in answers if key.startswith("padded/")]
    return float(np.max([_distance(answers[alone], answers[padded])[0] for padded, alone in pairs]))


def format_tables(comparisons: Sequence[Comparison], labels: Sequence[str]) -> str:
    """Return a text with a table for each way of batching: largest difference and cosine by prompt and output."""
    names = list(dict.fromkeys(comparison.name for comparison in comparisons))
    cells = {(item.way, item.name, item.prompt): f"{item.difference:.1e} {item.cosine:.6f}" for item in comparisons}
    width = max(18, *(len(name) for name in names))
    tables = []
    for way, title in WAYS.items():
        lines = [f"{title}: largest difference, cosine", " " * 30 + "".join(f"{name:>{width + 2}}" for name in names)]
        for index, label in enumerate(labels):
            values = [cells.get((way, name, index), "missing") for name in names]
            lines.append(f"{index + 1} {label:<28}" + "".join(f"{value:>{width + 2}}" for value in values))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


# ---- Which option would explain a disagreement?


@dataclass(frozen=True)
class Trial:
    """Changed configuration options, the number of outputs that agree with them, and the largest difference."""

    options: dict[str, Any]
    agreeing: int
    difference: float


def current_options(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return {name: value} of the options `names` in this package's configuration of the repository, if they exist."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def try_alternatives(
    run: Callable[[Mapping[str, Any]], Answers], theirs: Answers, current: Mapping[str, Any], tolerance: float
) -> list[Trial]:
    """Try every other value of each option; if outputs still differ, try all pairs of options. Best trial first.

    Args:
        run: returns this package's outputs with changed options; ValueError if the options are not possible.
        current: {name: present value} of the options to change.
    """
    singles = list(_changes(current, 1))
    trials = _run_trials(run, theirs, singles, tolerance, "trying other options")
    if not any(trial.difference <= tolerance for trial in trials):
        trials += _run_trials(run, theirs, list(_changes(current, 2)), tolerance, "trying pairs of options")
    return sorted(trials, key=lambda trial: (-trial.agreeing, trial.difference))


def _changes(current: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    for names in combinations(current, count):
        values = [[value for value in ALTERNATIVES[name] if value != current[name]] for name in names]
        yield from (dict(zip(names, choice, strict=True)) for choice in product(*values))


def _run_trials(
    run: Callable[[Mapping[str, Any]], Answers],
    theirs: Answers,
    changes: Sequence[dict[str, Any]],
    tolerance: float,
    description: str,
) -> list[Trial]:
    trials = []
    for options in tqdm(changes, desc=description, leave=False):
        try:
            comparisons = compare(theirs, run(options))
        except ValueError:
            continue
        agreeing = sum(comparison.within(tolerance) for comparison in comparisons)
        trials.append(Trial(options, agreeing, worst(comparisons)))
    return trials


def format_trials(trials: Sequence[Trial], tolerance: float, shown: int = 5) -> str:
    """Return a text with the trials in which all outputs agree, or with the best `shown` trials if there is none."""
    agreeing = [trial for trial in trials if trial.difference <= tolerance]
    title = (
        "With these options all outputs agree:" if agreeing else "No option or pair of options explains it; closest:"
    )
    lines = [
        f"  {', '.join(f'{name}={value}' for name, value in trial.options.items())}  ({trial.agreeing} outputs agree, "
        f"largest difference {trial.difference:.1e})"
        for trial in agreeing or trials[:shown]
    ]
    return "\n".join([title, *lines]) if lines else "There is no option to try."


def one_line(text: object) -> str:
    """Return a text with each run of white space, such as a line break, replaced by one space."""
    return " ".join(str(text).split())


if __name__ == "__main__":
    if sys.argv[1:2] == [OWN_CODE]:
        own_code_main(*sys.argv[2:])
    else:
        sys.exit(main())
