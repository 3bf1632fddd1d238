"""Run the Python of model cards in a process in which our package cannot be imported, as a reader would.

Usage: run_snippets.py CLEAN_PROCESS.py CARDS.json; CARDS.json maps a card's name to its snippets.
"""

import importlib.util
import json
import sys

clean_process, cards = sys.argv[1:]
spec = importlib.util.spec_from_file_location("clean_process", clean_process)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.meta_path.insert(0, module.Blocker())

with open(cards, encoding="utf-8") as file:
    snippets = json.load(file)
for name, codes in snippets.items():
    for number, code in enumerate(codes):
        print(f"# {name} {number}", flush=True)
        exec(compile(code, f"{name} {number}", "exec"), {})
