"""Find packaged model configurations and training recipes by name. Importing this module does not import torch."""

import re
import textwrap
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from modular_star_encoder.inference import check_checkpoint
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import similar_files, user_path

_COMMANDS = {"translation": "dataset build", "corpus": "pretrain", "data": "finetune", "finetuning": "ablate"}
# If only a folder is named, such as `small`, the first of these recipes in the folder is used.
_MAIN = {command: place for place, command in enumerate(("finetune", "recipe", "ablation"))}


@dataclass(frozen=True, slots=True)
class PackagedRecipe:
    """A recipe of this package: its name, such as `small/finetune`, the `mose` command that runs it, and its file."""

    name: str
    command: str
    path: Path

    @property
    def summary(self) -> str:
        """The first sentence of the comment at the top of the recipe's file, cut to 90 characters."""
        comment = re.match(r"(?:#.*\n)*", self.path.read_text(encoding="utf-8"))
        text = " ".join(line.lstrip("# ") for line in (comment[0] if comment else "").splitlines())
        return textwrap.shorten(re.split(r"[.:] |:$| mose ", text)[0], 90, placeholder=" …")


def packaged_recipes() -> list[PackagedRecipe]:
    """Return all packaged recipes, sorted by folder; in a folder, `finetune`, `recipe` and `ablation` come first."""
    found = []
    for path in _root().glob("*/*.yaml"):
        if key := re.search(rf"^({'|'.join(_COMMANDS)}):", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            found.append(PackagedRecipe(f"{path.parent.name}/{path.stem}", _COMMANDS[key[1]], path))
    return sorted(found, key=lambda one: (one.path.parent.name, _MAIN.get(one.path.stem, len(_MAIN)), one.name))


def find_recipe(name: str, command: str | None = None) -> Path:
    """Return the path of recipe `name`: a YAML file, a packaged recipe (`small/finetune`) or its folder (`small`).

    If `command` is given, only packaged recipes of this `mose` command are found. UserError if there is no recipe.
    """
    path = user_path(name)
    if path.is_file():
        return path
    # In a clone of this repository, the path of a packaged recipe is hub_configs/small/finetune.yaml.
    wanted = name.removeprefix("hub_configs/").removesuffix(".yaml")
    recipes = [one for one in packaged_recipes() if command in (None, one.command)]
    for one in recipes:
        if wanted in (one.name, one.name.partition("/")[0]):
            return one.path
    other = _root() / f"{wanted}.yaml"  # not a recipe: a manifest, or a list of packages
    if command is None and other in _root().glob("*/*.yaml"):
        return other
    names = [one.name for one in recipes]
    others = [one.command for one in packaged_recipes() if wanted in (one.name, one.name.partition("/")[0])]
    near = get_close_matches(wanted, dict.fromkeys(part for one in names for part in (one.partition("/")[0], one)), 1)
    hint = f": run it with `mose {others[0]}`" if others else f" (did you mean {near[0]}?)" if near else ""
    hint, similar = (": it is a folder", "") if path.is_dir() else (hint, similar_files(path))
    message = f"Recipe {name} not found{hint}. Give the path of a YAML file{similar}, or one of: "
    raise UserError("settings.file", f"{message}{', '.join(names)}.")


def hub_config_folder(name: str) -> Path:
    """Return the folder of the packaged model configuration `name`; UserError (`config.unknown`) if it is not found."""
    names = sorted(path.parent.name for path in _root().glob("*/config.json"))
    if name not in names:
        raise UserError("config.unknown", f"Model configuration {name!r} not found. Available: {', '.join(names)}.")
    return _root() / name


def starting_source(name: str) -> tuple[str | Path, bool]:
    """Return (folder or Hub id, whether weights exist) for a recipe's `model`; for a Hub id, weights are assumed."""
    folder = user_path(name)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not folder.exists():
        return name, True  # without a look at the Hub
    try:
        folder = hub_config_folder(name)
    except UserError as error:
        if not (folder / "config.json").is_file():
            advice = f"No folder {name} with a config.json exists. Run `mose pretrain` first, or set the recipe's "
            advice += "`model` to a Hub id owner/name or to mose-code, the trained model of this package."
            raise UserError(error.key, f"{error} {advice}") from error
    has_weights = any(folder.glob("model*.safetensors"))
    if has_weights:
        check_checkpoint(folder)
    return folder, has_weights


def _root() -> Path:
    return Path(str(files("modular_star_encoder.hub_configs")))
