"""Generates pages of the documentation site: home, API, commands, recipe keys, benchmarks and changes.

`make docs` runs this file as a hook of MkDocs (mkdocs.yml). `python docs/build.py` draws docs/images/quality.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {ROOT / "README.md": "index.md", ROOT / "benchmarks/README.md": "benchmarks.md"}
PAGES |= {ROOT / "CHANGELOG.md": "changelog.md"}
PICTURES = sorted((ROOT / "benchmarks/results").glob("*.png"))

# Millions of parameters (model cards), and the MRR of models that others trained (examples/mose_code/README.md).
PARAMETERS = {0: 6.46, 1: 8.08, 2: 9.71, 4: 12.81, 6: 15.92}
OTHERS = {"all-MiniLM-L6-v2": (22.7, 72.1), "bge-small-en-v1.5": (33.4, 82.4)}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the pictures of benchmarks, to the files of the site."""
    from mkdocs.structure.files import File

    pages = {name: relink(path.read_text(encoding="utf-8"), path.parent) for path, name in PAGES.items()}
    pages |= {"api.md": api_page(), "commands.md": commands_page(), "recipes.md": recipes_page()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for picture in PICTURES:
        files.append(File.generated(config, f"files/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/ to files outside of docs/."""
    return relink(markdown, DOCS) if (DOCS / page.file.src_uri).is_file() else markdown


def relink(text: str, folder: Path) -> str:
    """Rewrite relative links of a Markdown file in `folder`: to pages and pictures of the site, else a plain path."""

    def link(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve()
        if re.match(r"\w+:", target) or not path or not file.is_relative_to(ROOT):
            return match[0]
        name = PAGES.get(file) or (f"files/{file.name}" if file in PICTURES else None)
        if file.is_relative_to(DOCS):
            name = str(file.relative_to(DOCS))
        if name is None:
            plain = str(file.relative_to(ROOT))
            return f"`{plain}`" if label in (plain, path) else f"{label} (`{plain}`)"
        return f"{mark}[{label}]({name}{f'#{anchor}' if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def api_page() -> str:
    """Return a page with the docstring of every public name."""
    import modular_star_encoder as package

    lines = ["# API", "", "Every name is imported from `modular_star_encoder`.", ""]
    for name in package.__all__:
        module = f"modular_star_encoder.{package._MODULE_OF[name]}"
        if module.endswith(".modeling"):
            kind = "configuration" if name.endswith("Config") else "modeling"
            module = f"modeling.{kind}_modular_star_encoder"
        lines += [f"## {name}", "", f"::: {module}.{name}", ""]
    return "\n".join(lines)


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
        lines += [f"## {command.prog}", "", "```text", argparse.ArgumentParser.format_help(command).rstrip(), "```", ""]
    return "\n".join(lines)


def recipes_page() -> str:
    """Return a page with tables of the keys of all recipes."""
    from modular_star_encoder.synthconl.build import DatasetRecipe
    from modular_star_encoder.training.ablation import recipe_reference
    from modular_star_encoder.utils.settings import format_reference

    texts = {f"mose {name}": recipe_reference(name) for name in ("pretrain", "finetune", "ablate")}
    texts["mose dataset build"] = f"settings:\n{format_reference(DatasetRecipe)}"
    lines = ["# Recipe keys", "", "A recipe is a YAML file. `KEY=VALUE` after a command changes a key.", ""]
    for command, text in texts.items():
        lines += [f"## {command}", ""]
        for line in text.splitlines():
            if key := re.match(r"  (\S+)\s+(.*)", line):
                meaning = key[2].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
                lines.append(f"| `{key[1]}` | {meaning} |")
            elif line.endswith(":"):
                lines += ["", f"**{line.removesuffix(':')}**", "", "| key | type, default, meaning |", "|---|---|"]
            elif line:
                lines += ["", line]
        lines.append("")
    return "\n".join(lines)


def draw(out: Path) -> None:
    """Draw quality against parameters: the exits of mose-code, BM25, and two models that others trained."""
    from matplotlib import pyplot

    figures = json.loads((ROOT / "benchmarks/results/mose_code.json").read_text(encoding="utf-8"))["figures"]
    times = figures["milliseconds per text"]
    pyplot.rcParams |= {"svg.hashsalt": "quality", "font.size": 10}
    picture, axes = pyplot.subplots(figsize=(7.5, 4))
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
