"""Embed texts with sentence-transformers' own ONNX back end; run by the interpreter of an environment that has it.

Usage: onnx_back_end.py FOLDER REQUEST.json RESULT.npz
"""

import json
import sys

import numpy as np
from sentence_transformers import SentenceTransformer


def main(folder, request_file, result_file):
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    results = {}
    for name in request["files"]:
        model = SentenceTransformer(folder, backend="onnx", device="cpu", model_kwargs={"file_name": name})
        if type(model[0].auto_model).__name__ != "ORTModelForFeatureExtraction":
            raise RuntimeError(f"{type(model[0].auto_model)} is not optimum's")
        results[name] = model.encode(request["texts"], prompt_name=request["prompt_name"], show_progress_bar=False)
    np.savez(result_file, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
