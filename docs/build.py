"""Generates pages of the documentation site: home, API, commands, recipe keys, benchmarks and changes.

`make docs` runs this file as a hook of MkDocs (mkdocs.yml). `python docs/build.py` draws docs/images/quality.svg.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {ROOT / "README.md": "index.md", ROOT / "benchmarks/README.md": "benchmarks.md"}
PAGES |= {ROOT / "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")

# Millions of parameters (model cards), and the MRR of models that others trained (examples/mose_code/README.md).
PARAMETERS = {0: 6.46, 1: 8.08, 2: 9.71, 4: 12.81, 6: 15.92}
OTHERS = {"all-MiniLM-L6-v2": (22.7, 72.1), "bge-small-en-v1.5": (33.4, 82.4)}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the files of the repository that pages link to, to the files of the site."""
    from mkdocs.structure.files import File

    for path, name in site_files().items():
        if path.suffix == ".md":
            files.append(File.generated(config, name, content=relink(path.read_text(encoding="utf-8"), path, name)))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for name, text in {"api.md": api_page(), "commands.md": commands_page(), "recipes.md": recipes_page()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/ to files outside of docs/."""
    path = DOCS / page.file.src_uri
    return relink(markdown, path, page.file.src_uri) if path.is_file() else markdown


@cache
def site_files() -> dict[Path, str]:
    """Return {file outside of docs/: its place on the site} for `PAGES` and all files that pages link to."""
    found, pages = dict(PAGES), [*PAGES, *(path for path in DOCS.glob("*.md") if path.name != "moved.md")]
    for page in pages:  # it grows
        for match in LINK.finditer(page.read_text(encoding="utf-8")):
            path = linked(match, page)
            if path and path.is_file() and not path.is_relative_to(DOCS) and path not in found:
                found[path] = path.relative_to(ROOT).as_posix()
                pages += [path] * (path.suffix == ".md")
    return found


def linked(match: re.Match[str], page: Path) -> Path | None:
    """Return the file or folder of the repository to which a link of a page leads; None for other links."""
    path = (page.parent / (target := match[3].partition("#")[0])).resolve()
    return path if target and not re.match(r"\w+:", target) and path.is_relative_to(ROOT) else None


def relink(text: str, page: Path, place: str) -> str:
    """Rewrite the relative links of the file `page`, which is at `place` on the site; links to folders become text."""

    def link(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if (path := linked(match, page)) is None:
            return match[0]
        name = str(path.relative_to(DOCS)) if path.is_relative_to(DOCS) else site_files().get(path)
        if name is None:
            plain = str(path.relative_to(ROOT))
            return f"`{plain}`" if label in (plain, target) else f"{label} (`{plain}`)"
        _, sign, anchor = target.partition("#")
        return f"{mark}[{label}]({os.path.relpath(name, os.path.dirname(place))}{sign}{anchor})"

    return LINK.sub(link, text)


def api_page() -> str:
    """Return a page with the docstring of every public name."""
    import modular_star_encoder as package

    lines = ["# API", "", "Every name is imported from `modular_star_encoder`.", ""]
    for name in package.__all__:
        module = f"modular_star_encoder.{package._MODULE_OF[name]}"
        if module.endswith(".modeling"):
            kind = "configuration" if name.endswith("Config") else "modeling"
            module = f"modeling.{kind}_modular_star_encoder"
        # Of a class, also the methods whose arguments are explained.
        kept = [key for key, value in vars(getattr(package, name)).items() if explained(key, value)]
        options = ["    options:", f"      members: {json.dumps(kept)}", "      heading_level: 3"] if kept else []
        lines += [f"## {name}", "", f"::: {module}.{name}", *options, ""]
    return "\n".join(lines)


def explained(name: str, value: Any) -> bool:
    """Return whether a member of a class is a public method whose docstring explains its arguments."""
    function = getattr(value, "__func__", value)  # of a class method
    return inspect.isfunction(function) and not name.startswith("_") and "Args:" in (function.__doc__ or "")


def commands_page() -> str:
    """Return a page with the help of every command."""
    from modular_star_encoder.cli.main import all_commands, build_parser

    os.environ["COLUMNS"] = "92"
    lines = [
        "# Commands",
        "",
        "The keys of recipes, which some commands also list, are in [Recipe keys](recipes.md).",
        "",
    ]
    for command in all_commands(build_parser()):
        text = argparse.ArgumentParser.format_help(command).rstrip()
        lines += [f"## {command.prog}", "", "``` { .text .help }", text, "```", ""]
    return "\n".join(lines)


def recipes_page() -> str:
    """Return a page with tables of the keys of all recipes. A key that means the same in several is listed once."""
    from modular_star_encoder.synthconl.build import DatasetRecipe
    from modular_star_encoder.training.ablation import recipe_reference
    from modular_star_encoder.utils.settings import format_reference

    texts = {f"mose {name}": recipe_reference(name) for name in ("pretrain", "finetune", "ablate")}
    texts["mose dataset build"] = f"settings:\n{format_reference(DatasetRecipe)}"
    places: dict[tuple[str, str], list[str]] = {}  # (key, meaning) → titles of the texts that have it
    notes: list[str] = []
    title = ""
    for command, text in texts.items():
        for line in text.splitlines():
            if key := re.match(r"  (\S+)\s+(.*)", line):
                places.setdefault((key[1], key[2]), []).append(title)
            elif line.endswith(":"):
                title = command + line.removesuffix(":").removeprefix("settings")
            elif line and line not in notes:
                notes.append(line)
    tasks = tuple(f"mose finetune with task: {task}" for task in ("retrieval", "classification"))
    shared = {("mose pretrain", *tasks): "mose pretrain and mose finetune", tasks: "mose finetune with either task"}
    tables: dict[str, list[str]] = {title: [] for title in shared.values()}
    for (name, meaning), titles in places.items():
        meaning = meaning.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        for title in [shared[tuple(titles)]] if tuple(titles) in shared else titles:
            tables.setdefault(title, []).append(f"| `{name}` | {meaning} |")
    lines = ["# Recipe keys", "", "A recipe is a YAML file. `KEY=VALUE` after a command changes a key.", ""]
    for title, rows in tables.items():
        lines += [f"## {title}", "", *notes, "", "| key | type, default, meaning |", "|---|---|", *rows, ""]
        notes = []  # they are about training, and shown once
    return "\n".join(lines)


def draw(out: Path) -> None:
    """Draw quality against parameters: the exits of mose-code, BM25, and two models that others trained."""
    from matplotlib import pyplot

    figures = json.loads((ROOT / "benchmarks/results/mose_code.json").read_text(encoding="utf-8"))["figures"]
    times = figures["milliseconds per text"]
    pyplot.rcParams |= {"svg.hashsalt": "quality", "font.size": 10}
    picture, axes = pyplot.subplots(figsize=(6, 4))
    quality = {one: figures[f"{one} → {one}"]["mean"][0] for one in PARAMETERS}
    axes.plot(
        list(PARAMETERS.values()), list(quality.values()), "o-", color="tab:blue", label="mose-code, one checkpoint"
    )
    for one, millions in PARAMETERS.items():
        time = times[f"exit {one}"]["value"] / times["exit 0"]["value"]
        # Exits 4 and 6 are near each other: the label of the deepest is beside its point, the others are below.
        place = {"textcoords": "offset points", "xytext": (7, -3 if one == max(PARAMETERS) else -15)}
        axes.annotate(f"exit {one} ({time:.0f} ×)", (millions, quality[one]), **place)
    for name, (millions, value) in OTHERS.items():
        axes.plot(millions, value, "s", color="tab:gray")
        axes.annotate(name, (millions, value), textcoords="offset points", xytext=(-6, -15), ha="center")
    axes.axhline(figures["BM25"]["mean"][0], color="tab:orange", linestyle="--", label="BM25 (no model)")
    axes.set(xlabel="million parameters (in brackets: time per text, exit 0 = 1 ×)", ylabel="MRR × 100", xlim=(4, 38))
    axes.set_title("Description → function, CodeSearchNet: Ruby, JavaScript, Go", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08))
    picture.tight_layout()
    picture.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    draw(DOCS / "images/quality.svg")
