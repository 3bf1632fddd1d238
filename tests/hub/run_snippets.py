"""Run the Python of model cards in a process in which our package cannot be imported, then embed without a network.

Usage: run_snippets.py CLEAN_PROCESS.py REQUESTS.json RESULT.npz; REQUESTS.json holds `cards` (a card's name → its
snippets) and `offline`: what to embed from the cache alone, once the snippets have filled it.
"""

import importlib.util
import json
import sys

import numpy as np

subprocess_check, requests, result = sys.argv[1:]
spec = importlib.util.spec_from_file_location("subprocess_check", subprocess_check)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.meta_path.insert(0, module.Blocker())

from huggingface_hub import constants  # noqa: E402  after the blocker

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
