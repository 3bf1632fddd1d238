"""Data, tokenizer and configuration of the ablation in docs/joint_training.md: python clones.py OUT

A row is a pair of clones of one function of an installed Python package. Identifiers get random one-letter names,
strings become "s", long numbers 9; each side loses every line after the first with probability 1/2: near-miss clones
by mutation, as in Roy and Cordy, "A Mutation/Injection-Based Automatic Framework for Evaluating Code Clone Detection
Tools", 2009. Words tell nothing here, so a model must read structure: depth pays even after seconds of training.
`described.jsonl` has the descriptions and the unchanged code of the same functions.
"""

import argparse
import json
import keyword
import random
import re
import string
import sys
from pathlib import Path

from modular_star_encoder import ModularStarEncoderConfig
from modular_star_encoder.data.pairs import read_retrieval_examples
from modular_star_encoder.data.tokenizer import train_tokenizer

TOKEN = re.compile(r"[^\W\d]\w*|\d+|\"[^\"\n]*\"|'[^'\n]*'|[-+*/%&|^=<>!@~]+|\S")
KEPT = {*keyword.kwlist, "self"}
LOST, CHARACTERS, PAIRS_OF_A_PACKAGE, CLONES_OF_A_FILE = 0.5, 160, 3000, 4
CONFIG = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "exit_layers": [0, 1, 2, 3],
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "exit_norm": "none",
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "instruction_prompts": False,
    "projection_head": "linear",
    "projection_size": 64,
    "token_weights": True,
    "initializer_range": 0.1,
}


def mutate(code: str, generator: random.Random) -> str:
    """Return a near-miss clone of a function."""
    first, *others = (line for line in code.splitlines() if line.strip() and not line.strip().startswith("#"))
    letters, names, lines = generator.sample(string.ascii_letters, 24), {}, []
    for line in (first, *(line for line in others if generator.random() >= LOST)):
        tokens = []
        for token in TOKEN.findall(line):
            written = token
            if token[0] in "\"'":
                written = "s"
            elif token[0].isdigit() and len(token) > 1:
                written = "9"
            elif (token[0].isalpha() or token[0] == "_") and token not in KEPT:
                written = names.setdefault(token, letters[len(names) % len(letters)])
            tokens.append(written)
        lines.append(" ".join(tokens))
    return "\n".join(lines)[:CHARACTERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=32_000)
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    functions = read_retrieval_examples({"functions": {"installed": True}})["functions"].texts
    generator, rows, described, taken = random.Random(0), [], [], {}
    generator.shuffle(functions)
    for one in functions:
        # No package may be most of the data.
        taken[one.repository] = taken.get(one.repository, 0) + 1
        if taken[one.repository] <= PAIRS_OF_A_PACKAGE and len(rows) < arguments.pairs:
            query, positive = (mutate(one.snippets[0].code, generator) for _ in range(2))
            rows.append({"query": query, "positive": positive, "repository": one.repository})
            described.append({**rows[-1], "query": one.description, "positive": one.snippets[0].code})
    for name, pairs in (("clones", rows), ("described", described)):
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    # For masked-token pre-training: the same texts as files, in one folder for each package.
    of_package: dict[str, list[str]] = {}
    for row in rows:
        of_package.setdefault(row["repository"], []).append(row["query"])
    for name, texts in of_package.items():
        (out / "corpus" / name).mkdir(parents=True, exist_ok=True)
        for start in range(0, len(texts), CLONES_OF_A_FILE):
            path = out / "corpus" / name / f"part{start // CLONES_OF_A_FILE}.py"
            path.write_text("\n".join(texts[start : start + CLONES_OF_A_FILE]), encoding="utf-8")
    for name, texts, size in (
        ("random", [row["query"] for row in rows], CONFIG["vocab_size"]),
        ("random-text", [text for row in described for text in (row["query"], row["positive"])], 4096),
    ):
        tokenizer = train_tokenizer(texts, size, max_length=64, progress=False)
        ModularStarEncoderConfig(**{**CONFIG, "vocab_size": size}).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    print(f"{len(rows):,} pairs of {len(taken)} packages", file=sys.stderr)


if __name__ == "__main__":
    main()
