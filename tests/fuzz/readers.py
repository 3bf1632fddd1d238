"""All readers of data from strangers: for each, a function that writes tiny files, and the commands that read them."""

import base64
import contextlib
import gzip
import importlib
import json
import pkgutil
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import yaml
from pyarrow import parquet

import modular_star_encoder
from modular_star_encoder.cli.main import main as mose
from modular_star_encoder.data.functions import open_corpus
from modular_star_encoder.data.pairs import read_labelled_pairs, read_retrieval_examples
from modular_star_encoder.evaluation.benchmarks import load_benchmark
from modular_star_encoder.inference.encoders import EndpointEncoder
from modular_star_encoder.synthconl import build
from modular_star_encoder.synthconl.row_files import write_rows
from modular_star_encoder.synthconl.translation import CompletionRequest, OpenAIBackend, TranslationSettings, translate
from modular_star_encoder.training import ablation, runs
from modular_star_encoder.utils.errors import UserError
from tests.data.polyglot import SOURCES
from tests.evaluation.benchmarks.published import WRITERS, code_folder
from tests.fuzz.harness import Lines, Step
from tests.hub.repositories import write_finetuned
from tests.search.conftest import FILES, write_code
from tests.synthconl.openai_server import OpenAIServer
from tests.synthconl.samples import FUNCTION_SCHEMA, echo, endpoint_settings, function_rows, write_corpus
from tests.synthconl.test_corpus import write_packages
from tests.tiny import change_json, save_tiny_checkpoint, tiny_model, tiny_tokenizer
from tests.training.retrieval_runs import finetuning_settings, write_triplets
from tests.utils.http_server import LocalServer

CHECKPOINT = "../../world/config"


def import_everything() -> None:
    """Import all modules now, so that forked processes need not import them."""
    for module in pkgutil.walk_packages(modular_star_encoder.__path__, "modular_star_encoder."):
        importlib.import_module(module.name)


def stop_before_training() -> None:
    """Let this process raise a UserError where a model would be trained or a language model asked."""

    def stop(*_: object, **__: object) -> None:
        raise UserError("fuzz.begins", "[begins]")

    def open_only(_: Path, __: Path, settings: TranslationSettings, **___: object) -> None:
        settings.open()
        stop()

    runs.train_to_the_end = ablation._Cells._train = stop
    build.translate = open_only


def write_json_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Checkpoints


def from_above(write: Step, folder: Path) -> None:
    """Call `write` in the folder above, because a checkpoint is not written to the current folder."""
    with contextlib.chdir(folder.parent):
        write(folder)


def with_code(write: Step, folder: Path) -> None:
    from_above(write, folder)
    write_code(folder / "code")


def seed_shards(folder: Path) -> None:
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)


def seed_exit_zero(folder: Path) -> None:
    weighted = {"projection_head": "linear", "projection_order": "pool_then_project", "token_weights": True}
    tiny_model(exit_layers=(0, 4), exit_norm="none", **weighted).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    change_json(folder, "tokenizer.json", post_processor=None)  # as static exports need it


def seed_unigram(folder: Path) -> None:
    charsmap = base64.b64encode((1024).to_bytes(4, "little") + bytes(1024) + b"a\0").decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    words = {"normalizer": normalizer, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "split": True}}
    seed_tokenizer(
        folder, lambda vocab: {"type": "Unigram", "unk_id": 0, "vocab": [[one, -1.0] for one in vocab]}, words
    )


def seed_wordpiece(folder: Path) -> None:
    model = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    cleaned = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    words = {"normalizer": {"type": "BertNormalizer", **cleaned}, "pre_tokenizer": {"type": "BertPreTokenizer"}}
    seed_tokenizer(folder, lambda vocab: model | {"vocab": vocab, "unk_token": next(iter(vocab))}, words)


def seed_tokenizer(folder: Path, model: Callable[[dict[str, int]], dict], steps: dict) -> None:
    """Write a checkpoint with a tokenizer of another kind that has the same tokens."""
    with_code(save_tiny_checkpoint, folder)
    known = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    vocab = dict(sorted(known.items(), key=lambda item: item[1]))
    change_json(folder, "tokenizer.json", model=model(vocab), post_processor=None, decoder=None, **steps)


def seed_finetuned(folder: Path) -> None:
    write_finetuned(folder / "model")
    entries = [{"name": "a", "checkpoint": "model", "evaluation": ["report.json"], "training_data": "code"}]
    entries += [{"name": "b", "slice_of": "a", "exit_layer": 2, "only_exit": True, "files": {"x.json": "report.json"}}]
    settings = {"namespace": "me", "title": "Tiny", "license": "mit", "datasets": ["me/data"], "tags": ["code"]}
    (folder / "publish.yaml").write_text(yaml.safe_dump(settings | {"repositories": entries}))


# Recipes

SHORT = {"model": CHECKPOINT, "max_steps": 2, "learning_rate": 0.1}
FINETUNING = finetuning_settings(CHECKPOINT, "triplets.jsonl")
OPENAI = {"base_url": "http://127.0.0.1:1/v1", "attempts": 1, "timeout": 5, "concurrency": 2}
DATASET = {"corpus": {"folder": "corpus"}, "validation_rows": 5, "max_repository_share": 0.5, "processes": 0, "seed": 3}
RECIPES = {
    "pretrain": SHORT
    | {"corpus": {"folder": "corpus"}, "tokens_per_step": 128, "rows_per_device": 1, "max_tokens": 64}
    | {"eval_fraction": 0.4, "eval_rows": 2},
    "finetune": FINETUNING,
    "classify": SHORT
    | {"task": "classification", "data": dict.fromkeys(("train", "valid"), "pairs.jsonl")}
    | {"batch_size": 2, "max_tokens": 96},
    "ablate": {"finetuning": FINETUNING, "seeds": [0, 1], "variants": {"uniform": {"exit_weights": "uniform"}}},
    "dataset": DATASET
    | {"near_duplicates": {"threshold": 0.7, "columns": ["func2"]}, "card": {"name": "Rebuilt", "tags": ["code"]}}
    | {"translation": {"backend": "openai", "model": "m", "max_tokens": 64, "options": OPENAI}},
}


def seed_recipes(folder: Path) -> None:
    write_triplets(folder)
    for path in write_corpus(folder / "corpus", 5, 2).glob("*/*.py"):
        path.with_name("more.py").write_text("".join(f"{path.parent.name}_{n} = {n}\n" for n in range(30)))
    pairs = [{"first": f"int f() {{ return {n}; }}", "second": "int g() {}", "label": n % 2} for n in range(8)]
    write_json_lines(folder / "pairs.jsonl", pairs)
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


# Rows


def seed_rows(folder: Path) -> None:
    seed_recipes(folder)
    triplets = (folder / "triplets.jsonl").read_bytes()
    parquet.write_table(pa.Table.from_pylist([*map(json.loads, triplets.splitlines())]), folder / "triplets.parquet")
    (folder / "triplets.jsonl.gz").write_bytes(gzip.compress(triplets))
    parallel = [{"slug": f"s{n}", "code": {"go": f"func F() {{ {n} }}", "c": f"int f() {{ {n} }}"}} for n in range(4)]
    write_json_lines(folder / "parallel.jsonl", parallel)
    files = [{"repo_name": f"r{n}", "path": "a.py", "content": f"x = {n}\n", "license": "mit"} for n in range(4)]
    parquet.write_table(pa.Table.from_pylist(files), folder / "files.parquet")


def read_rows(_: Path) -> None:
    for name in ("triplets.jsonl", "triplets.parquet", "triplets.jsonl.gz"):
        read_retrieval_examples({"triplets": name}, progress=False)
    read_retrieval_examples({"parallel": "parallel.jsonl"}, progress=False)
    read_labelled_pairs({"train": "pairs.jsonl", "valid": "pairs.jsonl"})
    columns = {"repository": "repo_name", "path": "path", "text": "content", "license": "license"}
    list(open_corpus({"rows": "files.parquet", "columns": columns}))


EVALUATE = f"evaluate {CHECKPOINT} --data code --exit-layers 2 --out out"


def seed_results(folder: Path) -> None:
    code_folder(folder / "code")
    mose(EVALUATE.split())


def seed_evaluation_sets(folder: Path) -> None:
    for name in ("cosqa", "codesearchnet-full", "exercism-text"):
        WRITERS[name](folder / "sets" / name)
    write_json_lines(folder / "pairs.jsonl", [{"package": "npm:a", "code": "f(1)", "description": "Calls f."}] * 3)


# Code


def seed_archives(folder: Path) -> None:
    write_code(folder / "code")
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz"), (".tar.bz2", "w:bz2")):
        with tarfile.open(folder / f"a{suffix}", mode) as archive:
            archive.add(folder / "code", "code")
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)


def seed_checkout(folder: Path) -> None:
    write_code(folder)
    (folder / ".git" / "info").mkdir(parents=True)
    (folder / ".gitignore").write_text("*.log\n!/keep.log\nbuild/\n**/x[a-c]*?.py\n\\#a\nsrc/**/gen\n")
    (folder / ".git" / "info" / "exclude").write_text("secret*\n")
    (folder / ".git" / "index").write_bytes(b"DIRC\0\0\0\2\0\0\0\1" + bytes(60) + b"\0\4a.py" + bytes(6))


def seed_sources(folder: Path) -> None:
    suffixes = {"python": "py", "javascript": "js", "ruby": "rb"}
    for language, text in SOURCES.items():
        (folder / f"file.{suffixes.get(language, language)}").write_text(text)
    for suffix in ("rs", "ts", "cs", "kt", "swift", "scala", "lua", "sh", "sql", "html", "md", "hs", "ex", "zig", "r"):
        (folder / f"file.{suffix}").write_text("/** Adds x. */\nfn add(x: int) -> int {\n  return x + 1 # <b>\n}\n" * 3)


def seed_index(folder: Path) -> None:
    write_code(folder / "code")
    mose(f"index code --model {CHECKPOINT} --exit-layers 1,4".split())


# Servers and jobs


def seed_answers(folder: Path) -> None:
    choice = {"message": {"role": "assistant", "content": "code"}, "finish_reason": "stop"}
    chat = {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    embeddings = {"data": [{"index": n, "embedding": [0.1, 0.2 * n]} for n in range(2)]}
    (folder / "chat.json").write_text(json.dumps(chat))
    (folder / "embeddings.json").write_text(json.dumps(embeddings))


def read_answers(folder: Path) -> None:
    for name in ("chat", "embeddings"):
        with LocalServer(lambda _, name=name: (200, (folder / f"{name}.json").read_bytes(), {})) as server:
            if name == "chat":
                list(OpenAIBackend("m", 64, base_url=server.url, attempts=1).complete([CompletionRequest("a", "b")]))
            else:
                encoder = EndpointEncoder("m", server.url, attempts=1)
                encoder.encode([("", "a"), ("", "b")], [None], progress=False)


def seed_journal(folder: Path) -> None:
    for name in ("functions", "out"):
        (folder / name).mkdir()
    write_rows(folder / "functions", function_rows(8), FUNCTION_SCHEMA)
    (rows,) = (folder / "functions").iterdir()
    counts = {"prompt_tokens": 1, "completion_tokens": 1}
    answers = [{"id": f"id{n}", "text": "x", "finish_reason": "stop", "error": ""} | counts for n in range(5)]
    write_json_lines(folder / "out" / f"{rows.name}.journal", answers)
    session = counts | {"seconds": 1.0, "completions": 5, "backend": {"model": "m"}}
    (folder / "out" / "sessions.json").write_text(json.dumps([session]))


def read_journal(folder: Path) -> None:
    with OpenAIServer(echo) as server:
        translate(folder / "functions", folder / "out", endpoint_settings(server), seed=3, progress=False)


class Reader(NamedTuple):
    """`seed` writes files to a new folder; `read` reads them in the current folder, a copy in which one has changed."""

    seed: Step
    read: Lines | Step
    changed: tuple[str, ...] = ("**/*",)  # patterns of the files that change
    by_strangers: bool = False  # whether links, pipes and devices may be among the files: in checkouts and archives


EMBED = ("index code --model . --out index", "search 'é <s>' --index index")
INDEX = (f"index . --model {CHECKPOINT} --exit-layers 1,4", "search add --index .mose --method lexical")
SEARCH = ("search parse --index code/.mose --method lexical --path *.js", "search parse --index code/.mose")
FUNCTIONS = f"evaluate {CHECKPOINT} --data . --exit-layers 1"
CHECK = "dataset corpus check pairs.jsonl --against sets/codesearchnet-full sets/exercism-text --drop out"
checkpoint, shards, exit_zero = (partial(with_code, one) for one in (save_tiny_checkpoint, seed_shards, seed_exit_zero))

READERS = {
    "config": Reader(checkpoint, EMBED, ("config.json",)),
    "tokenizer": Reader(checkpoint, EMBED, ("token*.json",)),
    "unigram": Reader(seed_unigram, EMBED, ("tokenizer.json",)),
    "wordpiece": Reader(seed_wordpiece, EMBED, ("tokenizer.json",)),
    "weights": Reader(checkpoint, EMBED, ("*.safetensors",)),
    "weights-index": Reader(shards, EMBED, ("*.index.json",)),
    "exit-zero": Reader(exit_zero, EMBED, ("*.json", "*.safetensors")),
    "sentence-transformers": Reader(checkpoint, ("slice . out --exit-layer 2",), ("*m*s.json", "1_*/*")),
    "static": Reader(exit_zero, ("export . --format static --out out",), ("*.json",)),
    "profile": Reader(
        seed_finetuned,
        ("profile model --quality a=report.json", "index . --model model --latency-ms 9"),
        ("model/exit_profile.json",),
    ),
    "report": Reader(seed_finetuned, ("card model --repository me/a --evaluation report.json",), ("report.json",)),
    "manifest": Reader(seed_finetuned, ("card publish.yaml --repository me/a",), ("publish.yaml",)),
    **{
        name: Reader(seed_recipes, (f"{command} {name}.yaml --out out",), (f"{name}.yaml",))
        for name, command in zip(RECIPES, ("pretrain", "finetune", "finetune", "ablate", "dataset build"), strict=True)
    },
    "corpus": Reader(write_packages, ("dataset corpus build corpus.yaml --packages raw --out out --processes 0",)),
    "rows": Reader(seed_rows, read_rows, ("*.jsonl*", "*.parquet")),
    **{
        f"benchmark-{name}": Reader(write, lambda folder, name=name: load_benchmark(name, folder, allow_subset=True))
        for name, write in WRITERS.items()
        if not name.endswith(("masked", "leaky", "m-code"))
    },
    "results": Reader(seed_results, (EVALUATE,), ("out/**/*.[jn]*",)),
    "evaluation-sets": Reader(seed_evaluation_sets, (CHECK,)),
    "archives": Reader(seed_archives, lambda _: list(open_corpus({"archives": "."})), ("a.*",), True),
    "checkout": Reader(seed_checkout, INDEX, (".gitignore", ".git/**/*", "*.py"), True),
    "sources": Reader(seed_sources, (*INDEX, FUNCTIONS), by_strangers=True),
    "index": Reader(seed_index, (*SEARCH, "related code/stack.py:2 --index code/.mose"), ("code/.mose/*",), True),
    "answers": Reader(seed_answers, read_answers),
    "journal": Reader(seed_journal, read_journal),
}
