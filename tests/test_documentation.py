import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import modular_star_encoder.cli.main as cli
from modular_star_encoder.training import find_recipe
from tests.processes import python

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
NEEDS_THE_HUB = "published_checkpoints.md"
QUICK = ("--batch-sizes", "1", "--lengths", "16", "--rounds", "1")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def accept_every_input(monkeypatch):
    """Let options name checkpoints, files and folders that do not exist here."""
    monkeypatch.setattr("modular_star_encoder.cli.check_checkpoint", Mock())
    monkeypatch.setattr("modular_star_encoder.cli.is_repository", Mock(return_value=False))
    for check in ("exists", "isfile"):
        monkeypatch.setattr(f"os.path.{check}", Mock(return_value=True))


def python_of(page):
    return "\n".join(code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == "python")


def command_lines(page):
    text = page.read_text(encoding="utf-8")
    indented = "\n".join(re.findall(r"^ {4,}(\S.*)$", FENCE.sub("", text), re.MULTILINE))
    shell = indented + "\n".join(code for kind, code in FENCE.findall(text) if kind == "bash")
    return re.findall(r"^(?:mose|make|python) .*$", shell, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("page", [one for one in PAGES if python_of(one) and one.name != NEEDS_THE_HUB], ids=str)
def test_the_python_of_a_page_runs(page, tmp_path):
    profiles = [line for line in command_lines(page) if "--out exit_profile.json" in line]  # which the Python reads
    commands = [("-m", "modular_star_encoder", *shlex.split(line)[1:], *QUICK) for line in profiles]
    for words in (*commands, ("-c", python_of(page))):
        done = python(*words, cwd=tmp_path, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [one for one in PAGES if command_lines(one)], ids=str)
def test_the_command_lines_of_a_page_are_accepted_and_name_files_and_recipes_that_exist(page, monkeypatch):
    accept_every_input(monkeypatch)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in command_lines(page):
        program, *words = shlex.split(line, comments=True)
        for path in re.findall(r"(?:hub_configs|examples|benchmarks)/[\w./-]+\.\w+", line):
            assert (ROOT / path).is_file(), line
        if program == "make":
            assert words[0] in targets, line
        elif program == "mose":
            arguments = cli.parse(words)
            if hasattr(arguments, "recipe"):
                command = "dataset build" if words[0] == "dataset" else words[0]
                assert find_recipe(arguments.recipe, command).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_links_of_a_page_lead_to_files_that_exist(page):
    for target in re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        assert (page.parent / target).exists(), target


def test_every_row_of_the_tables_of_recipe_keys_has_the_cells_of_its_header():
    page = runpy.run_path(str(ROOT / "docs/build.py"))["recipes_page"]()
    tables = [block.splitlines() for block in re.split("\n\n+", page.strip()) if re.search(r"^\|", block, re.MULTILINE)]
    for head, line, *rows in tables:
        assert line == "|---|---|"
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in (head, *rows)} == {3}
    assert "| `translation.options` | Mapping[str, Any], default {}; " in page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_command_has_an_example_which_it_accepts_and_its_help_names_no_file_of_a_clone(monkeypatch):
    accept_every_input(monkeypatch)
    assert {command.prog for command in cli.all_commands(cli.build_parser())} == cli.EXAMPLES.keys()
    for example in "\n".join(cli.EXAMPLES.values()).splitlines():
        arguments = cli.parse(shlex.split(example)[1:])
        if "mose recipes copy" in example:
            assert find_recipe(arguments.name).is_file()
    for command in cli.all_commands(cli.build_parser()):
        text = argparse.ArgumentParser.format_help(command)
        assert not re.search("hub_configs/|examples/|benchmarks/", text), command.prog


def test_the_help_of_a_training_command_ends_with_keys_and_needs_no_extra(monkeypatch):
    (command,) = (one for one in cli.all_commands(cli.build_parser()) if one.prog == "mose finetune")
    assert all(key in command.format_help() for key in ("objective.mini_batch_tokens  ", "pairs_per_device  "))
    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.delitem(sys.modules, "modular_star_encoder.training.ablation", raising=False)
    monkeypatch.delitem(sys.modules, "modular_star_encoder.training.recipes", raising=False)
    monkeypatch.delitem(sys.modules, "modular_star_encoder.utils.settings", raising=False)
    assert "modular-star-encoder[train]" in command.format_help()


@pytest.mark.parametrize(("name", "load"), [("finetune", "load_finetuning"), ("pretrain", "load_recipe")])
def test_the_documented_command_is_understood_and_a_missing_package_is_one_line(name, load, monkeypatch, capsys):
    path = ROOT / "examples" / f"{name}.py"
    line = next(line for line in path.read_text().splitlines() if line.startswith("    python examples/"))
    _, script, recipe, *others = shlex.split(line)
    assert script == f"examples/{name}.py"
    assert find_recipe(recipe, name).is_file()
    main = runpy.run_path(str(path))["main"]
    monkeypatch.setattr("sys.argv", [script, "nowhere.yaml", *others])
    assert main() == 2
    assert capsys.readouterr().err.startswith(f"{name}: error: Recipe nowhere.yaml not found.")
    monkeypatch.setitem(main.__globals__, load, Mock(side_effect=ImportError("lora needs\npeft: pip install it.")))
    assert main() == 2
    assert capsys.readouterr().err == f"{name}: error: lora needs peft: pip install it.\n"
