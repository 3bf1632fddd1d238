"""Load a checkpoint as a stranger would: in a fresh process in which our package cannot be imported.

Run as a script by `reload_in_clean_process`; it must import nothing of ours, for it proves that nothing of ours is
needed. Usage: clean_process.py CHECKPOINT REQUEST.json RESULT.npz
"""

import json
import sys
from importlib.abc import MetaPathFinder

import numpy as np

PACKAGE = "modular_star_encoder"


class Blocker(MetaPathFinder):
    """Make our package unimportable, however it is installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Refuse our package and leave every other name to the finders behind."""
        if fullname.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"{PACKAGE} is not available in this process")


def main(checkpoint: str, request_file: str, result_file: str) -> None:
    """Embed the requested texts through `AutoModel` and through `SentenceTransformer`, both by remote code alone."""
    sys.meta_path.insert(0, Blocker())
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    if not type(model).__module__.startswith("transformers_modules."):
        raise RuntimeError(f"{type(model)} does not come from the checkpoint's own code")
    batch = tokenizer([request["prompt"] + text for text in request["texts"]], padding=True, return_tensors="pt")
    with torch.inference_mode():
        auto_model = model(**batch).sentence_embedding.float().numpy()
    sentence_transformer = SentenceTransformer(checkpoint, trust_remote_code=True, device="cpu")
    encoded = sentence_transformer.encode(request["texts"], prompt=request["prompt"], show_progress_bar=False)
    np.savez(result_file, auto_model=auto_model, sentence_transformer=encoded)


if __name__ == "__main__":
    main(*sys.argv[1:])
