"""The scripts to copy: their documented commands are understood, and wrong input is one line."""

import runpy
import shlex
from pathlib import Path

import pytest

from modular_star_encoder.training import find_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, monkeypatch, raised=None):
    """The exit status of the documented command, its recipe missing; or of one that raises in place of reading it."""
    path = EXAMPLES / f"{name}.py"
    line = next(line for line in path.read_text().splitlines() if line.startswith("    python examples/"))
    _, script, recipe, *others = shlex.split(line)
    assert script == f"examples/{name}.py"
    assert find_recipe(recipe, name).is_file()
    main = runpy.run_path(str(path))["main"]
    if raised is not None:

        def load(*arguments):
            raise raised

        monkeypatch.setitem(main.__globals__, {"finetune": "load_finetuning"}.get(name, "load_recipe"), load)
    monkeypatch.setattr("sys.argv", [script, "nowhere.yaml", *others])
    return main()


@pytest.mark.parametrize("name", ["finetune", "pretrain"])
def test_the_documented_command_is_understood_and_a_missing_package_is_reported_in_one_line(name, monkeypatch, capsys):
    assert run(name, monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"{name}: error: Recipe nowhere.yaml not found.")
    assert run(name, monkeypatch, ImportError("lora needs\npeft: pip install it.")) == 2
    assert capsys.readouterr().err == f"{name}: error: lora needs peft: pip install it.\n"
