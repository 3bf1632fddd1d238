"""Prove that a checkpoint is complete: reload it where our package cannot be imported."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm


@dataclass(frozen=True)
class ReloadedEmbeddings:
    """Embeddings (N, D) float32 of the same texts, by the two ways in which users load a checkpoint."""

    auto_model: np.ndarray
    sentence_transformer: np.ndarray


def reload_in_clean_process(
    checkpoint: str | os.PathLike, texts: Sequence[str], *, prompt: str = "", progress: bool = True
) -> ReloadedEmbeddings:
    """Embed `texts` with a checkpoint in a fresh, offline process that runs the checkpoint's own code.

    Args:
        checkpoint: a retrieval checkpoint's folder, or the id of a repository that lies in the local Hub cache.
        texts: what to embed, at the checkpoint's deepest exit, as one padded batch.
        prompt: prefix of every text.
        progress: show a clock while the process runs.

    Raises:
        RuntimeError: the process failed; the message holds the last lines of what it said.
    """
    script = Path(__file__).with_name("clean_process.py")
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.npz")
        request.write_text(json.dumps({"texts": list(texts), "prompt": prompt}), encoding="utf-8")
        offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(folder, "modules"))}
        process = subprocess.Popen(  # noqa: S603 - our own script, arguments passed as a list
            [sys.executable, "-P", str(script), os.fspath(checkpoint), str(request), str(result)],
            env={**os.environ, **offline},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        errors = wait_with_clock(process, "loading in a clean process", progress=progress)
        if process.returncode:
            tail = "\n".join(errors.strip().splitlines()[-5:])
            raise RuntimeError(f"{checkpoint} cannot be loaded without this package:\n{tail}")
        with np.load(result, allow_pickle=False) as arrays:
            return ReloadedEmbeddings(arrays["auto_model"], arrays["sentence_transformer"])


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
