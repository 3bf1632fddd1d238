"""Turn texts into vectors with a checkpoint. This file finds a checkpoint by name and checks it, without torch.

A name is a folder, a Hub repository (OWNER/NAME), or a model that comes with this package, such as `mose-code`.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import leads_outside, read_json, user_path

PROFILE_NAME = "exit_profile.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_READ = ("*.json", "*.jinja", "*.txt", "*.safetensors")  # files of a checkpoint, and of folders in it
_MOST = {"num_labels": 10**5} | dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), 1000)
ADAPTER = "its adapter_config.json would change the weights: merge the adapter first"
_MAX_CONFIG, _MAX_INDEX, _MAX_HEADER, _MAX_WEIGHTS = 2**17, 2**22, 2**20, 2**34  # bytes


def shipped_models() -> tuple[str, ...]:
    """Return the names of the models that come with this package."""
    folders = Path(str(files("modular_star_encoder.hub_configs"))).glob("*/model.safetensors")
    return tuple(sorted(path.parent.name for path in folders))


def shipped_model(name: str = "mose-code") -> str:
    """Return the folder of a model that comes with this package. Other libraries can load the model from this folder.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> SentenceTransformer(shipped_model()).encode(["parse a header"]).shape  # doctest: +SKIP
        (1, 384)
    """
    if name not in shipped_models():
        raise FileNotFoundError(f"This package has no model {name!r}. Available: {', '.join(shipped_models())}.")
    return str(Path(str(files("modular_star_encoder.hub_configs"))) / name)


def resolve_checkpoint(name: str | os.PathLike[str]) -> str:
    """Return the folder of the model `name` of this package; if there is no such model, `name` with `~` expanded.

    If a folder of yours is called like a model of this package, write `./mose-code` instead of `mose-code`.
    """
    if not isinstance(name, str | os.PathLike):
        known = f"a folder, a Hub repository (OWNER/NAME) or a model of this package ({', '.join(shipped_models())})"
        raise UserError("checkpoint.name", f"A checkpoint is {known}, not {name!r:.40}.")
    path = os.path.expanduser(os.fspath(name))
    return shipped_model(path) if path in shipped_models() else path


def local_folder(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a local checkpoint; None for a shipped model or a Hub repository."""
    path = resolve_checkpoint(name)
    return Path(path) if path == os.path.expanduser(os.fspath(name)) and os.path.isdir(path) else None


def check_checkpoint(name: str | os.PathLike[str], *, of_modules: bool = False) -> None:
    """Raise FileNotFoundError if a checkpoint's folder is missing, incomplete or unsafe. Hub repositories always pass.

    `of_modules` also accepts any SentenceTransformer, whose config.json and weights may be in its modules' folders.
    """
    folder = Path(resolve_checkpoint(name))
    if is_repository(name):
        return
    has_modules = of_modules and (folder / "modules.json").is_file()
    if not folder.is_dir():
        known = f"a Hub repository (OWNER/NAME) or a model of this package ({', '.join(shipped_models())})"
        raise FileNotFoundError(f"There is no checkpoint folder {name}: give a folder that exists, {known}.")
    if not has_modules and not (folder / "config.json").is_file():
        inner = Path(name, "model") if (folder / "model" / "config.json").is_file() else None  # of a training run
        advice = f"Give the folder {inner}." if inner else "Give a folder that has config.json and weights."
        if (folder / "adapter_config.json").is_file():
            advice = "It is only an adapter: give the merged model, which `mose finetune` writes to the folder model/."
        raise FileNotFoundError(f"{name} is not a checkpoint: it has no config.json. {advice}")
    if not has_modules and not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise FileNotFoundError(f"{name} has no weights: neither {' nor '.join(WEIGHT_FILES)} exists.")
    if fault := next(_faults(folder, of_modules), ""):
        raise FileNotFoundError(f"{name} is not a checkpoint: {fault}.")


def _faults(folder: Path, of_modules: bool) -> Iterator[str]:
    """Yield a phrase for each entry of a checkpoint that is unsafe to read, such as "its config.json is not a file"."""
    for file in (path for pattern in _READ for place in ("", "*/") for path in folder.glob(place + pattern)):
        is_config = re.fullmatch(r"modules\.json|(?!tokenizer_).*config.*", file.name)
        if not file.is_file():  # reading a pipe would never end
            yield f"its {file.name} is not a file"
        elif file.suffix == ".safetensors":
            yield from (f"its {file.name} {fault}" for fault in _weights_faults(file))
        elif leads_outside(file, folder):  # it would be copied
            yield f"its {file.name} is a link to a file outside the folder"
        elif is_config and file.stat().st_size > _MAX_CONFIG:  # a value costs transformers up to a millisecond
            yield f"its {file.name} has more than the limit of {_MAX_CONFIG:,} bytes"
    for place in (folder, *folder.glob("*/")) if of_modules else (folder,):
        yield from _index_faults(place)
        with suppress(OSError, ValueError, AttributeError):  # the loader reports it
            config = read_json(place / "config.json") if of_modules else {}
            for name, most in _MOST.items():  # larger numbers let transformers fill the memory
                if isinstance(config.get(name), int) and config[name] > most:
                    yield f"its config.json has {name} above the limit of {most:,}"


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a checked checkpoint's weights: one file, or an index file and the files that it lists."""
    whole, index = (folder / name for name in WEIGHT_FILES)
    if whole.is_file():
        return [whole]
    return [index, *sorted(folder / name for name in set(read_json(index)["weight_map"].values()))]


def _index_faults(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the choice of weight files of a checkpoint or of one of its modules."""
    whole, index = (folder / name for name in WEIGHT_FILES)
    if (folder / "adapter_config.json").exists() and (folder / "config.json").exists():
        yield ADAPTER
    if not whole.is_file() and not index.exists():
        for pickled in folder.glob("pytorch_model*.bin"):
            yield f"its {pickled.name} is pickled: store the weights in {whole.name}"
    elif not whole.is_file():
        try:
            shards = {str(shard) for shard in read_json(index, most_bytes=_MAX_INDEX)["weight_map"].values()}
        except (ValueError, TypeError, LookupError, AttributeError):
            shards = set()
            yield f"its {index.name} does not list the weight files"
        for odd in sorted(one for one in shards if Path(one).name != one or not (folder / one).is_file()):
            yield f"its weight file {odd} is not in its folder"


def _weights_faults(file: Path) -> Iterator[str]:
    """Yield why a safetensors file is too large to read; safetensors itself reports damaged headers."""
    with file.open("rb") as opened:
        header = opened.read(min(int.from_bytes(opened.read(8), "little"), _MAX_HEADER + 1))
    if len(header) > _MAX_HEADER:
        yield f"has a header of more than the limit of {_MAX_HEADER:,} bytes"
    try:
        tensors = [one for name, one in json.loads(header).items() if name != "__metadata__"]
        size = 8 + len(header) + max(one["data_offsets"][1] for one in tensors)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # safetensors reports it
        size = _MAX_WEIGHTS
    if file.stat().st_size > min(size, _MAX_WEIGHTS):
        yield f"has more bytes than its header says, or more than the limit of {_MAX_WEIGHTS:,}"


def is_repository(name: str | os.PathLike[str]) -> bool:
    """Return whether `name` has the form OWNER/NAME of a Hub repository and is not a local path."""
    return isinstance(name, str) and not os.path.exists(name) and bool(re.fullmatch(r"(?![.~]+/)[^/]+/[^/]+", name))


def profile_path(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a checkpoint's exit profile: `out`, or exit_profile.json in the folder of the checkpoint."""
    if out is not None:
        return user_path(out)
    check_checkpoint(checkpoint)
    folder = local_folder(checkpoint)
    if folder is None:
        raise UserError("profile.out.missing", f"{checkpoint} is not a local folder: give the profile a file (--out).")
    return folder / PROFILE_NAME
