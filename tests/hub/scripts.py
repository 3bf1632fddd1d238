"""Functions that tests run in new processes, where no library remembers another Hub: scripts.py COMMAND ARGUMENT…"""

import importlib.util
import json
import sys

import numpy as np


def push_by_trainer(source, folder, repository):
    """A Trainer pushes a checkpoint."""
    from transformers import Trainer, TrainingArguments

    from modular_star_encoder.inference.checkpoints import load_checkpoint

    model, tokenizer = load_checkpoint(source)
    arguments = TrainingArguments(folder, hub_model_id=repository, report_to="none", use_cpu=True)
    Trainer(model, arguments, processing_class=tokenizer).push_to_hub(tags=["code"])


def run_snippets(subprocess_check, requests, result):
    """Run the Python of model cards where our package cannot be imported, then embed without a network.

    The file of requests holds `cards` (a card's name → its snippets) and `offline`: what to embed from the cache alone,
    once the snippets have filled it.
    """
    spec = importlib.util.spec_from_file_location("subprocess_check", subprocess_check)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[module.PACKAGE] = None
    from huggingface_hub import constants

    with open(requests, encoding="utf-8") as file:
        asked = json.load(file)
    for name, codes in asked["cards"].items():
        for number, code in enumerate(codes):
            print(f"# {name} {number}", flush=True)
            exec(compile(code, f"{name} {number}", "exec"), {})
    print("# offline", flush=True)
    constants.HF_HUB_OFFLINE = True
    arrays = {}
    for number, request in enumerate(asked["offline"]):
        arrays |= {f"{number}/{name}": array for name, array in module.embed(**request).items()}
    np.savez(result, **arrays)


def embed_by_onnx(folder, texts, result):
    """Embed texts with sentence-transformers' own ONNX back end; run by an environment that has it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, backend="onnx", device="cpu", model_kwargs={"file_name": "model.onnx"})
    if type(model[0].auto_model).__name__ != "ORTModelForFeatureExtraction":
        raise RuntimeError(f"{type(model[0].auto_model)} is not optimum's")
    np.save(result, model.encode(json.loads(texts), prompt_name="query", show_progress_bar=False))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
