"""Training: finds packaged configurations and recipes by name. Importing this package does not import torch."""

import re
import textwrap
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import similar_files

_COMMANDS = {"corpus": "pretrain", "data": "finetune", "finetuning": "ablate"}
# The first of these files is the recipe that a folder's name alone names.
_MAIN = {command: place for place, command in enumerate(("finetune", "recipe", "ablation"))}


@dataclass(frozen=True, slots=True)
class PackagedRecipe:
    """A recipe that comes with the package: its name `folder/stem`, the `mose` command that runs it, and its file."""

    name: str
    command: str
    path: Path

    @property
    def summary(self) -> str:
        """Return the beginning of the comment at the top of the recipe, in one line."""
        comment = re.match(r"(?:#.*\n)*", self.path.read_text(encoding="utf-8"))
        text = " ".join(line.lstrip("# ") for line in (comment[0] if comment else "").splitlines())
        return textwrap.shorten(re.split(r"[.:] |:$| mose ", text)[0], 90, placeholder=" …")


def packaged_recipes() -> list[PackagedRecipe]:
    """Return all packaged recipes, sorted by folder; in a folder, the main recipe of each command comes first."""
    found = []
    for path in _root().glob("*/*.yaml"):
        if key := re.search(rf"^({'|'.join(_COMMANDS)}):", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            found.append(PackagedRecipe(f"{path.parent.name}/{path.stem}", _COMMANDS[key[1]], path))
    return sorted(found, key=lambda one: (one.path.parent.name, _MAIN.get(one.path.stem, len(_MAIN)), one.name))


def find_recipe(name: str, command: str | None = None) -> Path:
    """Return the YAML file that `name` names: a path, or a packaged recipe such as `small/finetune`.

    A folder's name alone, such as `small`, names its first recipe. With `command`, only packaged recipes of this `mose`
    command are searched. UserError (`settings.file`), which lists these recipes, if none has the name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    # Also the path that a packaged recipe has in a clone.
    wanted = name.removeprefix("hub_configs/").removesuffix(".yaml")
    recipes = [one for one in packaged_recipes() if command in (None, one.command)]
    for one in recipes:
        if wanted in (one.name, one.name.partition("/")[0]):
            return one.path
    names = ", ".join(one.name for one in recipes)
    message = f"Recipe {name} not found. Give the path of a YAML file{similar_files(path)}, or one of: {names}."
    raise UserError("settings.file", message)


def hub_config_folder(name: str) -> Path:
    """Return the folder of a packaged configuration such as `"small"`; UserError if unknown (`config.unknown`)."""
    names = sorted(path.parent.name for path in _root().glob("*/config.json"))
    if name not in names:
        raise UserError("config.unknown", f"Configuration {name!r} not found. Available: {', '.join(names)}.")
    return _root() / name


def starting_source(name: str) -> tuple[str | Path, bool]:
    """Return the folder or Hub id that a recipe's `model` names, and whether it has weights.

    A name is first looked up among the packaged configurations, then as a folder, then as a Hub id `owner/name`.
    UserError if none of these fits (`config.unknown`).
    """
    folder = Path(name).expanduser()
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not folder.exists():
        return name, True
    try:
        folder = hub_config_folder(name)
    except UserError as error:
        if not (folder / "config.json").is_file():
            advice = f"No folder {name} with a config.json exists. Run `mose pretrain` first, or set `model` to "
            advice += "a Hub id owner/name or to mose-code, the trained model of this package."
            raise UserError(error.key, f"{error} {advice}") from error
    return folder, any(folder.glob("model*.safetensors"))


def _root() -> Path:
    return Path(str(files("modular_star_encoder.hub_configs")))
