"""Prove that checkpoints are complete: reload them where our package cannot be imported."""

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
from tqdm.auto import tqdm


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
    script = Path(__file__).with_name("clean_process.py")
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
