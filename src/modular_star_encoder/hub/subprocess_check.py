"""Load checkpoints as users without this package do: in a new process that can't import this package.

`verify_reload` starts the process, which runs this file: subprocess_check.py FOLDER. The process reads
FOLDER/requests.json and writes the arrays of request N to FOLDER/N.npz. In this file, only `verify_reload` may import
this package.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "modular_star_encoder"


@dataclass(frozen=True, slots=True)
class ReloadRequest:
    """A checkpoint, and the texts to embed with it in a new process."""

    checkpoint: str  # folder of a retrieval or pre-trained checkpoint, or the id of a repository in the local Hub cache
    texts: Sequence[str]  # texts to embed, as one padded batch
    prompt: str = ""  # prefix of every text
    exit_layers: Sequence[int] = ()  # exits at which SentenceTransformer embeds, in addition to the deepest
    revision: str | None = None  # revision of a repository


def verify_reload(requests: Sequence[ReloadRequest], *, progress: bool = True) -> list[dict[str, np.ndarray]]:
    """Embed texts with checkpoints in a new offline process, with the model code in each checkpoint's folder.

    Return a dictionary of float32 arrays for each request (N texts, embeddings of size D, a vocabulary of size V):

        auto_model             embeddings (N, D) from AutoModel, at the deepest exit
        sentence_transformer   embeddings (N, D) from SentenceTransformer, at the deepest exit
        exit-K                 embeddings (N, D) from SentenceTransformer, at exit K of the request's `exit_layers`
        masked_lm              logits (N, V) of each text's last token; only for a pre-trained model

    Raises UserError (`hub.reload.failed`) if a checkpoint can't be loaded.
    """
    import torch
    from tqdm.auto import tqdm

    from modular_star_encoder.utils.errors import UserError
    from modular_star_encoder.utils.files import scratch_folder

    with scratch_folder("check") as folder:
        Path(folder, "requests.json").write_text(json.dumps(list(map(asdict, requests))), encoding="utf-8")
        # The same number of threads as here, because it affects the last bits of sums.
        own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **own, "HF_MODULES_CACHE": str(Path(folder, "modules"))}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        command = [sys.executable, "-P", __file__, str(folder)]
        results = [Path(folder, f"{number}.npz") for number in range(len(requests))]
        bar = tqdm(total=len(requests), desc="loading in a clean process", disable=not progress, leave=False)
        process = subprocess.Popen(command, env=environment, text=True, **pipes)  # noqa: S603 - our own script
        errors = ""
        with bar, process, contextlib.ExitStack() as stack:
            stack.callback(process.kill)  # has an effect only if this process is interrupted
            while process.returncode is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    errors = process.communicate(timeout=1)[1]
                bar.n = sum(map(Path.is_file, results))
                bar.refresh()
        if process.returncode:
            failed = requests[min(sum(map(Path.is_file, results)), len(requests) - 1)]
            tail = " ".join(" ".join(errors.strip().splitlines()[-5:]).split())
            message = f"{failed.checkpoint} can't be loaded without this package: {tail}"
            raise UserError("hub.reload.failed", message)
        return [dict(np.load(result, allow_pickle=False)) for result in results]


def main(folder: str) -> None:
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # its import fails, even if it is installed
    for number, request in enumerate(json.loads(Path(folder, "requests.json").read_text(encoding="utf-8"))):
        np.savez(Path(folder, f"{number}.npz"), **embed(**request))  # type: ignore[arg-type]


def embed(
    checkpoint: str, texts: list[str], prompt: str, exit_layers: list[int], revision: str | None
) -> dict[str, np.ndarray]:
    """Embed texts with a checkpoint in every way that users load it; return the arrays that `verify_reload` lists."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": True, "revision": revision}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
    model = AutoModel.from_pretrained(checkpoint, **options).eval()
    # SentenceTransformer cuts texts to the same length.
    cut = {"truncation": True, "max_length": model.config.max_position_embeddings}
    batch = tokenizer([prompt + text for text in texts], padding=True, return_tensors="pt", **cut)
    arrays = {}
    with torch.inference_mode():
        arrays["auto_model"] = embed_batch(model, batch)
        if not hasattr(model, "projection_heads"):
            masked_lm = AutoModelForMaskedLM.from_pretrained(checkpoint, **options).eval()
            arrays["masked_lm"] = masked_lm(**batch).logits[:, -1].float().numpy()
    sentence_transformer = SentenceTransformer(checkpoint, device="cpu", **options)
    encode = partial(sentence_transformer.encode, texts, prompt=prompt, show_progress_bar=False)
    arrays["sentence_transformer"] = encode()
    for exit_layer in exit_layers:
        arrays[f"exit-{exit_layer}"] = encode(exit_layer=exit_layer)
    return arrays


def embed_batch(model: Any, batch: Mapping[str, Any], **options: Any) -> np.ndarray:
    """Return embeddings of N texts, float32 (N, size); of a pre-trained model, normalised means of token states."""
    import torch

    output = model(**batch, **options)
    if hasattr(output, "sentence_embedding"):
        return output.sentence_embedding.float().numpy()
    mask = batch["attention_mask"][..., None]
    mean = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean).numpy()


if __name__ == "__main__":
    main(*sys.argv[1:])
