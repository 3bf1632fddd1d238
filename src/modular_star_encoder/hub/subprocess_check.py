"""Load checkpoints as users without this package do: in a new process that can't import it.

`verify_reload` starts the process, which runs this file as a script: subprocess_check.py REQUESTS.json RESULT.npz.
Therefore, this file does not import this package at its top.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.abc import MetaPathFinder
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
    exit_layers: Sequence[int] = ()  # further exits to embed at, besides the deepest
    revision: str | None = None  # revision of a repository


@dataclass(frozen=True)
class ReloadedEmbeddings:
    """Embeddings (N, D), float32, of a request's texts by `AutoModel` and by `SentenceTransformer`."""

    auto_model: np.ndarray  # at the deepest exit
    sentence_transformer: np.ndarray  # at the deepest exit
    exits: Mapping[int, np.ndarray] = field(default_factory=dict)  # from `SentenceTransformer.encode(exit_layer=…)`
    masked_lm: np.ndarray | None = None  # for a pre-trained model, logits (N, V) of the last token of each text


def verify_reload(requests: Sequence[ReloadRequest], *, progress: bool = True) -> list[ReloadedEmbeddings]:
    """Embed texts in a new offline process that loads each checkpoint with the model code in its folder.

    `progress` shows a clock. A checkpoint that can't be loaded raises the UserError `hub.reload.failed`.
    """
    import torch

    from modular_star_encoder.utils.errors import UserError
    from modular_star_encoder.utils.files import scratch_folder

    with scratch_folder("check") as folder:
        request_file, result = Path(folder, "requests.json"), Path(folder, "result.npz")
        request_file.write_text(json.dumps(list(map(asdict, requests))), encoding="utf-8")
        # The same number of threads as here, because it affects the last bits of sums.
        own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(  # noqa: S603 - our own script, arguments passed as a list
            [sys.executable, "-P", __file__, str(request_file), str(result)],
            env={**os.environ, **own, "HF_MODULES_CACHE": str(Path(folder, "modules"))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        errors = wait_with_clock(process, "loading in a clean process", progress=progress)
        if process.returncode:
            failed = requests[int((re.findall(r"^request (\d+)$", errors, re.MULTILINE) or ["0"])[-1])]
            tail = " ".join(" ".join(errors.strip().splitlines()[-5:]).split())
            message = f"{failed.checkpoint} can't be loaded without this package: {tail}"
            raise UserError("hub.reload.failed", message)
        with np.load(result, allow_pickle=False) as arrays:
            return [
                ReloadedEmbeddings(
                    arrays[f"{number}/auto_model"],
                    arrays[f"{number}/sentence_transformer"],
                    {k: arrays[f"{number}/exit-{k}"] for k in request.exit_layers},
                    arrays.get(f"{number}/masked_lm"),
                )
                for number, request in enumerate(requests)
            ]


def wait_with_clock(process: "subprocess.Popen[str]", description: str, *, progress: bool = True) -> str:
    """Wait for a process while showing a clock, and return its stderr; an interruption kills the process."""
    from tqdm.auto import tqdm

    clock = "{desc} {elapsed}"
    with process, tqdm(desc=description, bar_format=clock, disable=not progress, leave=False) as bar:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.communicate(timeout=0.5)[1]
                bar.update()
        finally:
            process.kill()


class Blocker(MetaPathFinder):
    """An import hook that makes imports of this package fail, even if it is installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"{PACKAGE} is not available in this process")


def main(request_file: str, result_file: str) -> None:
    sys.meta_path.insert(0, Blocker())
    arrays: dict[str, np.ndarray] = {}
    for number, request in enumerate(json.loads(Path(request_file).read_text(encoding="utf-8"))):
        print(f"request {number}", file=sys.stderr)  # `verify_reload` reads it if this request fails
        arrays |= {f"{number}/{name}": array for name, array in embed(**request).items()}
    np.savez(result_file, **arrays)  # type: ignore[arg-type]


def embed(
    checkpoint: str, texts: list[str], prompt: str, exit_layers: list[int], revision: str | None
) -> dict[str, np.ndarray]:
    """Embed texts with `AutoModel` and with `SentenceTransformer`, which both run the checkpoint's own code.

    For a pre-trained model, which returns no embeddings, `auto_model` is the normalised mean of the hidden states of
    the tokens, as in `SentenceTransformer`, and `masked_lm` holds the logits of the last token.
    """
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
        output = model(**batch)
        if hasattr(output, "sentence_embedding"):
            arrays["auto_model"] = output.sentence_embedding.float().numpy()
        else:
            mask = batch["attention_mask"][..., None]
            mean = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
            arrays["auto_model"] = torch.nn.functional.normalize(mean).numpy()
            masked_lm = AutoModelForMaskedLM.from_pretrained(checkpoint, **options).eval()
            arrays["masked_lm"] = masked_lm(**batch).logits[:, -1].float().numpy()
    sentence_transformer = SentenceTransformer(checkpoint, device="cpu", **options)
    encode = partial(sentence_transformer.encode, texts, prompt=prompt, show_progress_bar=False)
    arrays["sentence_transformer"] = encode()
    for exit_layer in exit_layers:
        arrays[f"exit-{exit_layer}"] = encode(exit_layer=exit_layer)
    return arrays


if __name__ == "__main__":
    main(*sys.argv[1:])
