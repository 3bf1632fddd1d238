"""Load checkpoints as a stranger would: in a fresh process in which our package cannot be imported.

Run as a script by `reload_all_in_clean_process`; it must import nothing of ours, for it proves that nothing of ours is
needed. Usage: subprocess_check.py REQUESTS.json RESULT.npz
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


def main(request_file: str, result_file: str) -> None:
    """Answer every request; the arrays of request number i are called `{i}/…`."""
    sys.meta_path.insert(0, Blocker())
    with open(request_file, encoding="utf-8") as file:
        requests = json.load(file)
    arrays = {}
    for number, request in enumerate(requests):
        try:
            arrays |= {f"{number}/{name}": array for name, array in embed(**request).items()}
        except Exception as error:
            raise RuntimeError(f"request {number}: {type(error).__name__}: {error}") from error
    np.savez(result_file, **arrays)


def embed(
    checkpoint: str, texts: list[str], prompt: str, exit_layers: list[int], revision: str | None
) -> dict[str, np.ndarray]:
    """Embed texts through `AutoModel` and through `SentenceTransformer`, both by remote code alone.

    A pre-trained model has no embeddings of its own: there, `auto_model` is the normalised mean of the tokens' states,
    which is what `SentenceTransformer` computes, and `masked_lm` is what it predicts for the last token.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

    options = {"trust_remote_code": True, "revision": revision}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
    model = AutoModel.from_pretrained(checkpoint, **options).eval()
    if not type(model).__module__.startswith("transformers_modules."):
        raise RuntimeError(f"{type(model)} does not come from the checkpoint's own code")
    # SentenceTransformer cuts texts to this length, too.
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
    encode = {"prompt": prompt, "show_progress_bar": False}
    arrays["sentence_transformer"] = sentence_transformer.encode(texts, **encode)
    for exit_layer in exit_layers:
        arrays[f"exit-{exit_layer}"] = sentence_transformer.encode(texts, exit_layer=exit_layer, **encode)
    return arrays


if __name__ == "__main__":
    main(*sys.argv[1:])
