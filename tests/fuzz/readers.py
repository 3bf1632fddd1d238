"""All readers of data from strangers: a function that writes tiny files of each kind, and what reads them."""

import gzip
import json
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import NamedTuple

import pyarrow as pa
import yaml
from pyarrow import parquet

from modular_star_encoder.cli.main import parse
from modular_star_encoder.data.functions import extract_functions, open_corpus
from modular_star_encoder.data.languages.parsing import check_syntax
from modular_star_encoder.data.languages.registry import LANGUAGES, language_of
from modular_star_encoder.data.pairs import read_labelled_pairs, read_retrieval_examples
from modular_star_encoder.data.sources import SourceFile
from modular_star_encoder.data.sources.decoding import decode_source
from modular_star_encoder.evaluation.benchmarks import load_benchmark
from modular_star_encoder.inference.encoders import EndpointEncoder
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.synthconl import build
from modular_star_encoder.synthconl.backends import CompletionRequest, OpenAIBackend
from modular_star_encoder.synthconl.row_files import write_rows
from modular_star_encoder.synthconl.translation import TranslationSettings, translate
from modular_star_encoder.training import ablation, runs
from modular_star_encoder.utils.http import HTTPClient
from tests.data.polyglot import SOURCES
from tests.evaluation.benchmarks.published import WRITERS, code_folder
from tests.hub.repositories import write_finetuned
from tests.search.conftest import FILES, write_code
from tests.synthconl.openai_server import OpenAIServer
from tests.synthconl.samples import FUNCTION_SCHEMA, echo, endpoint_settings, function_rows, write_corpus
from tests.synthconl.test_corpus import write_packages
from tests.tiny import save_tiny_checkpoint, tiny_model, tiny_tokenizer
from tests.training.retrieval_runs import finetuning_settings, write_triplets

Step = Callable[[Path], object]
CHECKPOINT = "../../world/config/0"


class TrainingBeginsError(Exception):
    """Raised in place of training and of asking a language model: everything is read by then."""


def stop_before_training() -> None:
    """Make this process raise TrainingBeginsError where a model would be trained or a language model asked."""

    def stop(*_: object, **__: object) -> None:
        raise TrainingBeginsError

    def open_only(_: Path, __: Path, settings: TranslationSettings, **___: object) -> None:
        settings.open()
        stop()

    runs.train_to_the_end = ablation._run_cell = stop
    build.translate = open_only


def mose(*commands: str) -> Step:
    """Return a step that runs commands in the current folder and raises their errors."""

    def read(_: Path) -> None:
        for words in commands:
            arguments = parse(words.split())
            arguments.run(arguments)

    return read


def write_json_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Checkpoints


def seed_shards(folder: Path) -> None:
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)


def seed_exit_zero(folder: Path) -> None:
    weighted = {"projection_head": "linear", "projection_order": "pool_then_project", "token_weights": True}
    tiny_model(exit_layers=(0, 4), exit_norm="none", **weighted).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None}))  # as static exports need it


def index_code(folder: Path) -> None:
    write_code(Path("code"))
    CodeIndex.build("code", checkpoint=folder, processes=0, progress=False).search(["é <s>"])


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


def seed_recipe(name: str, folder: Path) -> None:
    write_triplets(folder)
    for path in write_corpus(folder / "corpus", 5, 2).glob("*/*.py"):
        path.with_name("more.py").write_text("".join(f"{path.parent.name}_{n} = {n}\n" for n in range(30)))
    pairs = [{"first": f"int f() {{ return {n}; }}", "second": "int g() {}", "label": n % 2} for n in range(8)]
    write_json_lines(folder / "pairs.jsonl", pairs)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPES[name]))


# Rows


def seed_rows(folder: Path) -> None:
    seed_recipe("finetune", folder)
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


def seed_results(folder: Path) -> None:
    code_folder(folder / "code")
    mose(f"evaluate {CHECKPOINT} --data {folder}/code --exit-layers 2 --out {folder}/out")(folder)


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


def read_sources(folder: Path) -> None:
    index = CodeIndex.build(folder, "memory://", checkpoint=CHECKPOINT, processes=0, progress=False)
    index.search(["add"], method="lexical")
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink() and (language := language_of(path)) in LANGUAGES:
            text, _ = decode_source(path.read_bytes())
            extract_functions(SourceFile("r", path.name, language, text), Counter(), documented_only=False)
            check_syntax(text, language)


def seed_index(folder: Path) -> None:
    write_code(folder / "code")
    save_tiny_checkpoint(folder.parent / "model")  # an index holds its absolute path
    mose(f"index {folder}/code --model {folder.parent}/model --exit-layers 1,4")(folder)


SEARCHES = ("search parse --index code/.mose --method lexical --path *.js", "search parse --index code/.mose")
SEARCHES += ("related code/stack.py:2 --index code/.mose",)


# Servers and jobs


def seed_answers(folder: Path) -> None:
    choice = {"message": {"role": "assistant", "content": "code"}, "finish_reason": "stop"}
    chat = {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    embeddings = {"data": [{"index": n, "embedding": [0.1, 0.2 * n]} for n in range(2)]}
    for name, content in (("chat", chat), ("embeddings", embeddings), ("plain", {"error": {"message": "no"}})):
        body = json.dumps(content)
        (folder / f"{name}.json").write_text(body)
        for encoding, data in (("identity", body.encode()), ("gzip", gzip.compress(body.encode()))):
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\nContent-Encoding: {encoding}\r\n\r\n"
            (folder / f"{name}.{encoding}").write_bytes(head.encode() + data)


def read_answers(folder: Path) -> None:
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            content = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        handler = type("Handler", (StreamRequestHandler,), {"handle": lambda self, data=content: _answer(self, data)})
        options = {"attempts": 2, "pause": 0.01, "timeout": 1}
        with ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}"
            try:
                if path.stem == "chat":
                    list(OpenAIBackend("m", 64, base_url=url, **options).complete([CompletionRequest("a", "b")]))
                elif path.stem == "embeddings":
                    EndpointEncoder("m", url, **options).encode([("", "a"), ("", "b")], [None], progress=False)
                else:
                    with HTTPClient(**options, total_time=4) as client:
                        client.request("GET", url).json()
            finally:
                server.shutdown()


def _answer(handler: StreamRequestHandler, data: bytes) -> None:
    while handler.rfile.readline() not in (b"\r\n", b""):
        pass
    handler.wfile.write(data)


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


def read_journal(_: Path) -> None:
    with OpenAIServer(echo) as server:
        translate("functions", "out", endpoint_settings(server), seed=3, progress=False)


PROFILE = ("profile model --quality a=report.json", "index . --model model --latency-ms 9")
CHECK = "dataset corpus check pairs.jsonl --against sets/codesearchnet-full sets/exercism-text --drop out"


class Reader(NamedTuple):
    """`seed` writes files to a new folder; `read` reads them in the current folder, a copy in which one has changed."""

    seed: Step
    read: Step
    changed: tuple[str, ...] = ("**/*",)  # patterns of the files that change
    by_strangers: bool = False  # whether links, pipes and devices may be among the files: in checkouts and archives


READERS = {
    "config": Reader(save_tiny_checkpoint, index_code, ("config.json",)),
    "tokenizer": Reader(save_tiny_checkpoint, index_code, ("token*.json",)),
    "weights": Reader(save_tiny_checkpoint, index_code, ("*.safetensors",)),
    "weights-index": Reader(seed_shards, index_code, ("*.index.json",)),
    "exit-zero": Reader(seed_exit_zero, index_code, ("*.json", "*.safetensors")),
    "sentence-transformers": Reader(save_tiny_checkpoint, mose("slice . out --exit-layer 2"), ("*m*s.json", "*/*")),
    "static": Reader(seed_exit_zero, mose("export . --format static --out out"), ("*.json",)),
    "profile": Reader(seed_finetuned, mose(*PROFILE), ("model/exit_profile.json",)),
    "report": Reader(seed_finetuned, mose("card model --repository me/a --evaluation report.json"), ("report.json",)),
    "manifest": Reader(seed_finetuned, mose("card publish.yaml --repository me/a"), ("publish.yaml",)),
    **{
        name: Reader(partial(seed_recipe, name), mose(f"{command} recipe.yaml --out out"), ("recipe.yaml",))
        for name, command in zip(RECIPES, ("pretrain", "finetune", "finetune", "ablate", "dataset build"), strict=True)
    },
    "corpus": Reader(write_packages, mose("dataset corpus build corpus.yaml --packages raw --out out --processes 0")),
    "rows": Reader(seed_rows, read_rows, ("*.jsonl*", "*.parquet")),
    **{
        f"benchmark-{name}": Reader(write, lambda folder, name=name: load_benchmark(name, folder, allow_subset=True))
        for name, write in WRITERS.items()
        if not name.endswith(("masked", "leaky", "m-code"))
    },
    "results": Reader(
        seed_results, mose(f"evaluate {CHECKPOINT} --data code --exit-layers 2 --out out"), ("out/**/*.[jn]*",)
    ),
    "evaluation-sets": Reader(seed_evaluation_sets, mose(CHECK)),
    "archives": Reader(seed_archives, lambda _: list(open_corpus({"archives": "."})), ("a.*",), True),
    "checkout": Reader(seed_checkout, read_sources, (".gitignore", ".git/**/*", "*.py"), True),
    "sources": Reader(seed_sources, read_sources, by_strangers=True),
    "index": Reader(seed_index, mose(*SEARCHES), ("code/.mose/*", "code/.mose/index.json"), True),
    "answers": Reader(seed_answers, read_answers),
    "journal": Reader(seed_journal, read_journal),
}
