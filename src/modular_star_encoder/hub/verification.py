"""What is looked at before anything goes up: files, secrets, the card, and whether strangers get equal embeddings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.hub.model_card import CARD, DEPTH_FIGURE, LATENCY_FIGURE, check_card
from modular_star_encoder.hub.staging import TOKENIZER, StagedRepository
from modular_star_encoder.inference.checkpoints import SENTENCE_TRANSFORMER_FILES
from modular_star_encoder.inference.exit_profile import PROFILE_NAME
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval


@dataclass(frozen=True, slots=True)
class ReloadRequest:
    """What to embed with which checkpoint.

    Args:
        checkpoint: folder of a retrieval or pre-trained checkpoint, or the id of a repository.
        texts: what to embed, as one padded batch.
        prompt: prefix of every text.
        exit_layers: exits to embed at one by one, beside the deepest.
        revision: of a repository.
    """

    checkpoint: str
    texts: Sequence[str]
    prompt: str = ""
    exit_layers: Sequence[int] = ()
    revision: str | None = None


@dataclass(frozen=True)
class ReloadedEmbeddings:
    """Embeddings (N, D) float32 of the same texts, by the two ways in which users load a checkpoint.

    Args:
        auto_model, sentence_transformer: at the deepest exit.
        exits: of the exits that were asked for, by `SentenceTransformer.encode(exit_layer=…)`.
        masked_lm: of a pre-trained model the logits (N, V) for the last token of each text; None for others.
    """

    auto_model: np.ndarray
    sentence_transformer: np.ndarray
    exits: Mapping[int, np.ndarray] = field(default_factory=dict)
    masked_lm: np.ndarray | None = None


def reload_in_clean_process(
    checkpoint: str | os.PathLike, texts: Sequence[str], *, prompt: str = "", progress: bool = True
) -> ReloadedEmbeddings:
    """Embed `texts` with a checkpoint in a fresh, offline process that runs the checkpoint's own code.

    Args:
        checkpoint: a checkpoint's folder, or the id of a repository that lies in the local Hub cache.
        texts: what to embed, at the checkpoint's deepest exit, as one padded batch.
        prompt: prefix of every text.
        progress: show a clock while the process runs.

    Raises:
        RuntimeError: the process failed; the message holds the last lines of what it said.
    """
    return reload_all_in_clean_process([ReloadRequest(os.fspath(checkpoint), texts, prompt)], progress=progress)[0]


def reload_all_in_clean_process(
    requests: Sequence[ReloadRequest], *, progress: bool = True, environment: Mapping[str, str] | None = None
) -> list[ReloadedEmbeddings]:
    """The same for several checkpoints, one after the other in one process.

    Args:
        requests: what to load, and what to embed with it.
        progress: show a clock while the process runs.
        environment: variables that differ from this process's; offline if None.

    Raises:
        RuntimeError: the process failed; the message holds the last lines of what it said.
    """
    script = Path(__file__).with_name("subprocess_check.py")
    with tempfile.TemporaryDirectory() as folder:
        request_file, result = Path(folder, "requests.json"), Path(folder, "result.npz")
        request_file.write_text(json.dumps([asdict(request) for request in requests]), encoding="utf-8")
        # As many threads as here: how sums are split decides their last bits.
        own = {"HF_MODULES_CACHE": str(Path(folder, "modules")), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        process = subprocess.Popen(  # noqa: S603 - our own script, arguments passed as a list
            [sys.executable, "-P", str(script), str(request_file), str(result)],
            env={**os.environ, **own, **({"HF_HUB_OFFLINE": "1"} if environment is None else environment)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        errors = wait_with_clock(process, "loading in a clean process", progress=progress)
        if process.returncode:
            tail = "\n".join(errors.strip().splitlines()[-5:])
            failed = re.findall(r"request (\d+): ", tail)
            number = int(failed[-1]) if failed else 0
            raise RuntimeError(f"{requests[number].checkpoint} cannot be loaded without this package:\n{tail}")
        with np.load(result, allow_pickle=False) as arrays:
            return [_embeddings(arrays, number, request) for number, request in enumerate(requests)]


def _embeddings(arrays: Mapping[str, np.ndarray], number: int, request: ReloadRequest) -> ReloadedEmbeddings:
    exits = {exit_layer: arrays[f"{number}/exit-{exit_layer}"] for exit_layer in request.exit_layers}
    return ReloadedEmbeddings(
        arrays[f"{number}/auto_model"],
        arrays[f"{number}/sentence_transformer"],
        exits,
        arrays.get(f"{number}/masked_lm"),
    )


def wait_with_clock(process: subprocess.Popen[str], description: str, *, progress: bool = True) -> str:
    """What a process wrote to stderr, once it has ended; it does not outlive an interruption of ours."""
    clock = "{desc} {elapsed}"
    with process, tqdm(desc=description, bar_format=clock, disable=not progress, leave=False) as bar:
        try:
            while True:
                try:
                    return process.communicate(timeout=0.5)[1]
                except subprocess.TimeoutExpired:
                    bar.update()
        except BaseException:
            process.kill()
            raise


CODE_FILES = ("configuration_modular_star_encoder.py", "modeling_modular_star_encoder.py")
REQUIRED = (CARD, "config.json", *CODE_FILES, TOKENIZER, "tokenizer_config.json", *SENTENCE_TRANSFORMER_FILES)
OPTIONAL = (PROFILE_NAME, LATENCY_FIGURE, DEPTH_FIGURE, "special_tokens_map.json", "added_tokens.json")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
INDEX = "model.safetensors.index.json"

SECRETS = (
    re.compile(rb"\b(hf|api_org)_[A-Za-z0-9]{20,}"),
    re.compile(rb"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,})"),
    re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    re.compile(rb"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(rb"\bxox[abposr]-[\w-]{10,}"),
    re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(rb"://[^/\s:@\"']+:[^/\s:@\"']+@"),
)
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pt2", ".pth")
TEXT_LIMIT = 64 << 20

TEXTS = ("add two numbers", "def subtract(first, second):\n    return first - second", "x")
TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}
"""How far a component of a unit vector may be off: strangers compute the same, but pooling outside the model rounds
elsewhere."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A repository that passed.

    Args:
        repository: its id.
        branch: of it.
        difference: the largest between a component of the source's embeddings and of those that a stranger gets.
    """

    repository: str
    branch: str
    difference: float


def verify_repositories(staged: Sequence[StagedRepository], *, progress: bool = True) -> list[Verified]:
    """Look at staged repositories as a stranger would who downloads them.

    Raises:
        ValueError: a file too many or too few, a pickle, what looks like a secret or a place of this machine, a card
            whose metadata can't be read, code that doesn't load without this package, or other embeddings than the
            source's.
    """
    for one in staged:
        check_files(one.folder, one.extra)
        check_card(one.folder / CARD)
        _check_tokenizer(one.folder)
    requests = [ReloadRequest(os.fspath(one.folder), TEXTS, _prompt(one), one.exit_layers) for one in staged]
    try:
        reloaded = reload_all_in_clean_process(requests, progress=progress)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return [
        Verified(one.repository, one.settings.branch, _compare(one, found))
        for one, found in zip(staged, reloaded, strict=True)
    ]


def check_files(folder: Path, extra: Sequence[str] = ()) -> None:
    """Refuse a folder that doesn't hold exactly the files of a repository.

    Args:
        folder: a staged repository.
        extra: paths of other files that it is meant to hold.

    Raises:
        ValueError: a file is missing, not expected, a pickle, no safetensors, or holds what no stranger should read.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    weights = {name for name in paths if WEIGHTS.fullmatch(name)}
    expected = {*REQUIRED, *extra, *weights} | ({INDEX} if len(weights) > 1 else set())
    if not weights:
        raise ValueError(f"{folder} holds no weights.")
    if missing := sorted(expected - set(paths)):
        raise ValueError(f"{folder} lacks {', '.join(missing)}.")
    if surplus := sorted(set(paths) - expected - set(OPTIONAL)):
        raise ValueError(f"{folder} holds {', '.join(surplus)}, which no repository of ours has.")
    for name, path in sorted(paths.items()):
        if path.is_symlink():
            raise ValueError(f"{folder} holds a link, {name}.")
        _check_content(name, path)


def _check_content(name: str, path: Path) -> None:
    """Refuse pickles, damaged weights and secrets."""
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix in PICKLES or re.match(rb"\x80[\x02-\x05]|PK\x03\x04", start):
        raise ValueError(f"{path} may be a pickle; only safetensors are published.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as tensors:
                text = json.dumps(tensors.metadata() or {}).encode()
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}.") from error
    else:
        with path.open("rb") as file:
            text = file.read(TEXT_LIMIT)
    found = next((match for pattern in SECRETS if (match := pattern.search(text))), None)
    token = get_token()
    if found or (token and token.encode() in text):
        line = text[: found.start() if found else text.index(token.encode())].count(b"\n") + 1
        raise ValueError(f"{name} of {path.parent} has what looks like a secret in line {line}.")
    home = os.path.expanduser("~").rstrip("/").encode()
    if len(home) > 1 and home + b"/" in text:
        raise ValueError(f"{name} of {path.parent} names a folder of this machine, below {home.decode()}.")


def _check_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    missing = [name for name in ("pad", "sep", "cls", "mask") if getattr(tokenizer, f"{name}_token") is None]
    if missing:
        raise ValueError(f"The tokenizer of {folder} has no {' and no '.join(missing)} token.")
    declared = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    if declared not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        raise ValueError(f"The tokenizer of {folder} is declared a {declared}, which splits numbers in another way.")


def _prompt(staged: StagedRepository) -> str:
    return staged.card.prompts.get("query", "")


def _compare(staged: StagedRepository, found: ReloadedEmbeddings) -> float:
    """The largest difference from the source's embeddings.

    Raises:
        ValueError: it is too large, or there are numbers that are none.
    """
    own, masked_lm, dtype = _source_embeddings(staged)
    deepest = staged.exit_layers[-1]
    pairs = {f"exit {k}": (own[k], found.exits[k]) for k in own}
    pairs |= {"AutoModel": (own[deepest], found.auto_model)}
    pairs |= {"SentenceTransformer": (own[deepest], found.sentence_transformer)}
    differences = {name: float(np.abs(first - second).max()) for name, (first, second) in pairs.items()}
    if masked_lm is not None:
        difference = np.abs(masked_lm - found.masked_lm).max() / np.abs(masked_lm).max()
        differences["the masked-token logits"] = float(difference)
    for name, difference in differences.items():
        if not difference <= TOLERANCE[dtype]:
            raise ValueError(
                f"{staged.folder} does not reproduce {staged.source}: {name} differs by {difference:.2g}, more than "
                f"{TOLERANCE[dtype]:.2g}."
            )
    return max(differences.values())


@torch.inference_mode()
def _source_embeddings(staged: StagedRepository) -> tuple[dict[int, np.ndarray], np.ndarray | None, str]:
    """The source's embeddings (N, D) at the repository's exits, logits as in `ReloadedEmbeddings`, and its dtype."""
    model_class = ModularStarEncoderForRetrieval if staged.retrieval else ModularStarEncoderForPreTraining
    model = model_class.from_pretrained(staged.source).eval()
    tokenizer = load_tokenizer(staged.folder)
    cut = {"truncation": True, "max_length": model.config.max_position_embeddings}
    batch = tokenizer([_prompt(staged) + text for text in TEXTS], padding=True, return_tensors="pt", **cut)
    dtype = str(model.dtype).removeprefix("torch.")
    exits = staged.exit_layers
    if staged.retrieval:
        own = {k: model(**batch, exit_layer=k).sentence_embedding.float().numpy() for k in exits}
        return own, None, dtype
    own, mask = {}, batch["attention_mask"][..., None]
    for k in exits:
        states = model.model(**batch, exit_layer=k).last_hidden_state.float()
        own[k] = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()
    logits = model(**batch, exit_layer=exits[-1]).logits[:, -1].float().numpy()
    return own, logits, dtype
