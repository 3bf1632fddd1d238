"""The command `mose`: its parser, error messages and exit status. Also the command `mose doctor`.

The commands import the package when they run, so that `mose --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from modular_star_encoder import __version__
from modular_star_encoder.cli.dataset import add_dataset_commands
from modular_star_encoder.cli.evaluate import add_evaluate_commands
from modular_star_encoder.cli.publish import add_publish_commands
from modular_star_encoder.cli.search import add_search_commands
from modular_star_encoder.cli.train import add_train_commands
from modular_star_encoder.inference import shipped_model
from modular_star_encoder.utils.errors import UserError, is_panic, missing_extra
from modular_star_encoder.utils.files import cache_folder, check_writable, read_json
from modular_star_encoder.utils.reports import library_versions, machine_kind, printable

EXPECTED_ERRORS = (ValueError, OSError, MemoryError)
DISTRIBUTION = "modular-star-encoder"
CORE = (DISTRIBUTION, "torch", "transformers", "sentence-transformers", "huggingface_hub", "numpy")

CLEANUP_SECONDS = 5
_interrupted = -math.inf  # time of the last signal that `interrupt` did not ignore

EXAMPLES = {
    "mose index": 'mose index ~/code/requests\nmose search "merge two headers" --index ~/code/requests/.mose',
    "mose search": 'mose search "merge two headers" ~/code/requests',
    "mose related": "mose related src/app.py:120",
    "mose mcp": "mose mcp ~/code/requests",
    "mose demo": "mose demo --index ~/code/requests/.mose",
    "mose evaluate": "mose evaluate mose-code --data ~/code --baselines bm25\n"
    "mose evaluate mose-code --benchmark codesearchnet-999 --data hub --out runs/evaluation",
    "mose profile": "mose profile mose-code --out exit_profile.json",
    "mose slice": "mose slice mose-code --exit-layer 2 my-slice",
    "mose grow": "mose grow runs/exit-0/model runs/grown --exit-layers 0 1 2 4 6",
    "mose card": "mose card my-slice --repository me/my-slice --license apache-2.0",
    "mose publish": "mose publish my-slice --repository me/my-slice --license apache-2.0\n"
    "mose recipes copy small/publish publish.yaml\nmose publish publish.yaml namespace=me --upload",
    "mose export": "mose export mose-code --exit-layer 2 --out my-onnx\n"
    "mose export mose-code --format static --out my-table",
    "mose pretrain": "mose pretrain small --out runs/small corpus.folder=~/code",
    "mose finetune": "mose finetune mose-code --out runs/mine data.pairs=pairs.csv",
    "mose ablate": "mose ablate small --out runs/ablation",
    "mose recipes list": "mose recipes list",
    "mose recipes show": "mose recipes show small",
    "mose recipes copy": "mose recipes copy small my.yaml",
    "mose dataset build": "mose dataset build synthconl --out build corpus.folder=~/code",
    "mose dataset dedup": "mose dataset dedup data --out deduplicated --columns query,code",
    "mose dataset stats": "mose dataset stats build",
    "mose dataset push": "mose dataset push build me/my-dataset",
    "mose dataset corpus fetch": "mose recipes copy mose-code/corpus corpus.yaml\n"
    "mose dataset corpus fetch corpus.yaml --out packages",
    "mose dataset corpus build": "mose dataset corpus build corpus.yaml --packages packages --out pairs",
    "mose dataset corpus check": "mose dataset corpus check pairs/pairs.jsonl.gz --against test.jsonl --drop clean",
    "mose doctor": "mose doctor",
}
"""{command: example command lines, shown at the end of the command's help}. A test parses all of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 (an error that the user can fix), 130 (Ctrl-C or SIGTERM).

    Results go to stdout; progress and errors go to stderr, each error in one line. After wrong usage, argparse exits.
    """
    keep_few_compiled_operations()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a closed stream is None
            stream.reconfigure(errors="replace")  # a terminal may not have all characters
    room = ""  # last part of the name of the command's module, such as "search", for `missing_extra`
    arguments = argparse.Namespace()
    try:
        if threading.current_thread() is threading.main_thread():  # SIGTERM ends a command as Ctrl-C does
            signal.signal(signal.SIGTERM, interrupt)
        check_current_folder()
        arguments = parse(argv)
        check_folders(arguments)
        room = arguments.run.__module__.rpartition(".")[2]
        arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        resumes = getattr(arguments, "resumes", False) and arguments.out  # without --out, `evaluate` stores nothing
        hint = "; run the same command again to continue" if resumes else ""
        print(f"mose: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `| head`, has closed the pipe; without this, Python would report that again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BaseException as error:
        # For a full disk, safetensors raises an error of its own class; for some texts, tokenizers panics.
        is_known = isinstance(error, (*EXPECTED_ERRORS, ImportError)) or is_panic(error)
        shown = error if is_known or type(error).__name__ == "SafetensorError" else None
        if isinstance(error, RuntimeError) and re.search("can't allocate memory|out of memory", str(error)):  # torch's
            shown = MemoryError(f"Not enough memory: {str(error).partition('. GPU')[0]}")  # the rest is torch's advice
        if isinstance(error, ImportError) and error.name:  # a module can't be imported: a missing extra, or a bug
            shown = missing_extra(error, room) if isinstance(error, ModuleNotFoundError) else None
        if shown is None:
            raise
        words = " ".join((str(shown) or "Not enough memory.").split()) + value_of_environment(str(shown))
        sentence = printable(with_options(words, arguments))
        if len(sentence) > 2000:  # it quotes a long value
            sentence = f"{sentence[:1500]} … {sentence[-400:]}"
        print(f"mose: error: {sentence}", file=sys.stderr)
        return 2
    return 0


def interrupt(number: int, frame: object) -> None:
    """Signal handler: raise KeyboardInterrupt, but not again within `CLEANUP_SECONDS`, while the command cleans up."""
    global _interrupted
    if time.monotonic() > _interrupted + CLEANUP_SECONDS:
        _interrupted = time.monotonic()
        raise KeyboardInterrupt


def check_current_folder() -> None:
    """Raise FileNotFoundError with advice if the current folder was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError("The current folder no longer exists. Change to another folder.") from None


def check_folders(arguments: argparse.Namespace) -> None:
    """Raise UserError (`files.not_writable`) if a command can't write the folder or JSON file in its arguments.

    Also (`cli.json`) if the JSON file is a file to read.
    """
    if isinstance(file := getattr(arguments, "json", None), str):  # `search` and `index` have a switch of this name
        check_writable(file)
        lists = (one if isinstance(one, list) else [one] for name, one in vars(arguments).items() if name != "json")
        words = (os.path.expanduser(one) for one in chain.from_iterable(lists) if isinstance(one, str))
        inputs = [one for one in words if os.path.isfile(one)]
        if os.path.isfile(file) and any(os.path.samefile(file, one) for one in inputs):
            raise UserError("cli.json", f"{file} is a file that the command reads. Name another file after --json.")
    for folder in (getattr(arguments, "out", None), getattr(arguments, "drop", None)):
        # `profile` writes a file, and an index may be on a server.
        if folder and getattr(arguments.run, "__name__", "") != "run_profile" and not folder.startswith("qdrant:"):
            check_writable(os.path.expanduser(folder), is_folder=True)


def with_options(sentence: str, arguments: argparse.Namespace) -> str:
    """Return an error message with options (--latency-ms) in place of the names of given `arguments` (latency_ms)."""
    names = ("exit_layer", "exit_layers", "latency_ms", "memory_mb")
    given = "|".join(name for name in names if getattr(arguments, name, None) not in (None, ()))
    if not given:
        return sentence
    # Not an option: a name in a path, or after the name of a file, as in "config.json: exit_layer=7".
    name = rf"(?<![\w./'-])(?<!json: )`?({given})\b(?!\.\w)`?(=(?=\d))?"
    return re.sub(name, lambda one: f"--{one[1].replace('_', '-')}{' ' * bool(one[2])}", sentence)


def value_of_environment(error: str) -> str:
    """Return a note that names the environment variables whose values caused `error`; "" if no variable did."""
    if error == "Invalid IPv6 URL":  # huggingface_hub can't be imported
        return f" (in the environment: HF_ENDPOINT={os.environ.get('HF_ENDPOINT')})"
    if not error.startswith(("invalid literal for int() with base 10: ", "could not convert string to float: ")):
        return ""
    wrong = [f"{name}={value}" for name, value in os.environ.items() if error.endswith(f": {value!r}")]
    return f" (in the environment: {', '.join(wrong)})" if wrong else ""


def keep_few_compiled_operations() -> None:
    """Limit oneDNN's and PyTorch's caches of compiled CPU operations to 64 entries, before torch multiplies matrices.

    By default, memory grows, because a cache has up to 1,024 entries, one per matrix shape (benchmarks/NOTES.md).
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


class _Parser(argparse.ArgumentParser):
    """An argument parser that suggests the most similar command or option for an unknown command or option."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

    def parse_known_args(self, *words: Any, **options: Any) -> Any:
        arguments, rest = super().parse_known_args(*words, **options)
        for unknown in (text for text in rest if text.startswith("-")):
            nearest = _did_you_mean(unknown.partition("=")[0], [*self._option_string_actions])
            example = self.get_default("example")
            hint = nearest or (f" (settings are KEY=VALUE, such as {example})" if example else "")
            self.error(f"unrecognized argument: {unknown}{hint}")
        return arguments, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = list(action.choices or ())
        nearest = _did_you_mean(value, choices) if choices and isinstance(value, str) else ""
        if nearest and value not in choices:
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{nearest}")
        super()._check_value(action, value)


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Questions, the folder to search and KEY=VALUE may come before or after options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    words = getattr(arguments, "questions", getattr(arguments, "overrides", None))
    if rest and words is None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        words.extend(rest)
    for text in getattr(arguments, "overrides", ()):
        if "=" not in text:
            key = getattr(arguments, "example", "KEY=VALUE").partition("=")[0]
            parser.error(f"unrecognized argument: {text} (settings are KEY=VALUE: write {key}={text})")
    return arguments


def all_commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of each command that has no subcommands, in the order of the help text."""
    groups = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for below in groups:
        for one in below.values():
            yield from all_commands(one)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their options."""
    about = "Search code; train, measure and cut code encoders with exits, layers after which they can stop."
    start = 'start with: mose search "merge two headers" FOLDER; mose COMMAND --help shows the options and an example'
    parser = _Parser(prog="mose", description=about, epilog=start)
    parser.add_argument("--version", action="version", version=f"mose {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_search_commands(commands)
    add_evaluate_commands(commands)
    add_publish_commands(commands)
    add_train_commands(commands)
    add_dataset_commands(commands)
    doctor = commands.add_parser("doctor", help="print versions, devices, cache folders, and missing packages")
    doctor.set_defaults(run=run_doctor)
    for command in all_commands(parser):
        if example := EXAMPLES.get(command.prog):
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            command.epilog = "example:\n  " + example.replace("\n", "\n  ")
    return parser


def run_doctor(arguments: argparse.Namespace) -> None:
    """Print versions, devices and folders, and which extras are complete and which packages the others lack."""
    versions = library_versions(CORE)
    sections = {
        "Versions": {name: version or "not installed" for name, version in versions.items()},
        "Devices": devices() if versions["torch"] else {"torch": "not installed"},
        "Folders": folders(),
        "Indexes of mose search": indexes() or {"none": "the cache has no index"},
        "Extras": {
            extra: f"lacks {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'" if missing else "ready"
            for extra, missing in missing_packages().items()
        },
    }
    width = max(len(name) for section in sections.values() for name in section)
    for title, section in sections.items():
        print(title, *(f"  {name:{width}}  {text}" for name, text in section.items()), "", sep="\n")


def devices() -> dict[str, str]:
    """Return {name: description} of the devices that torch can use: the processor, and GPUs with their memory."""
    import torch

    cpu = machine_kind()
    found = {"cpu": f"{cpu['processor']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['memory_gb']} GB"}
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found if len(found) > 1 else found | {"gpu": "none found"}


def folders() -> dict[str, str]:
    """Return {name: text} for the folder of mose-code, the caches with their sizes, and the connection to the Hub."""
    from huggingface_hub import constants

    return {
        "mose-code": shipped_model(),
        "indexes of mose search": folder_size(cache_folder("search")),
        "vectors of teachers": folder_size(cache_folder("teacher-vectors")),
        "models of the Hub": folder_size(Path(constants.HF_HUB_CACHE)),
        "connection to the Hub": "off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "on",
    }


def indexes() -> dict[str, str]:
    """Return {name: indexed folder, size, exits, checkpoint and number of languages} of the indexes in the cache."""
    found = {}
    folder = cache_folder("search")
    for file in sorted(folder.glob("*/index.json")) if folder else ():
        with suppress(OSError, ValueError, LookupError, TypeError):
            settings, size = read_json(file)["settings"], folder_size(file.parent).rpartition(" (")[2]
            indexed = os.path.normpath(file.parent / settings["folder"])  # relative if the cache is in this folder
            exits = ", ".join(map(str, settings["exit_layers"]))
            model, languages = settings["checkpoint"], len(settings["languages"])
            model = "mose-code" if model == shipped_model() else model
            found[file.parent.name] = printable(f"{indexed} ({size}; exit {exits} of {model}, languages: {languages}")
    return found


def folder_size(folder: Path | None) -> str:
    """Return a folder's path and size, such as `/tmp/cache (12 MB)`; `(not there yet)` if it does not exist."""
    if folder is None:
        return "no cache: no home folder is known"
    if not folder.is_dir():
        return f"{folder} (not there yet)"
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return f"{folder} ({size / 1e6:,.0f} MB)"


def missing_packages() -> dict[str, list[str]]:
    """Return {extra of this package: its requirements that are not installed or have an unsuitable version}."""
    from packaging.requirements import Requirement

    own = distribution(DISTRIBUTION)
    requirements = [Requirement(line) for line in own.requires or ()]

    def missing(extra: str) -> set[str]:
        found: set[str] = set()
        for one in requirements:
            if one.marker is None or not one.marker.evaluate({"extra": extra}):
                continue
            if one.name == DISTRIBUTION:  # this extra includes another extra, as `search` includes `languages`
                found.update(*map(missing, one.extras - {extra}))
                continue
            try:
                version = distribution(one.name).version
                if not one.specifier.contains(version, prereleases=True):
                    found.add(f"{one.name}{one.specifier} (installed: {version})")
            except PackageNotFoundError:
                found.add(one.name)
        return found

    return {extra: sorted(missing(extra)) for extra in sorted(own.metadata.get_all("Provides-Extra") or ())}


if __name__ == "__main__":
    sys.exit(main())
