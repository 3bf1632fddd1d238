"""The package as installed: every room is listed, and importing it touches no network."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import modular_star_encoder

ROOT = Path(__file__).parent.parent


def test_every_folder_of_the_package_is_listed_in_pyproject():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    below_src = {".".join(path.parent.relative_to(ROOT / "src").parts) for path in (ROOT / "src").rglob("__init__.py")}
    mapped = {f"modular_star_encoder.{name}" for name in ("modeling", "hub_configs", "model_cards")}
    assert set(listed) == below_src | mapped
    assert len(below_src) > 5


@pytest.mark.slow
def test_importing_opens_no_connection():
    program = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("a connection was attempted")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import modular_star_encoder, modular_star_encoder.search.index, modular_star_encoder.inference.checkpoints
print(modular_star_encoder.__version__)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == modular_star_encoder.__version__


@pytest.mark.slow
def test_a_wheel_holds_model_code_configurations_and_types(tmp_path):
    # A copy, for building leaves a `build` folder behind, from which a later wheel would take stale files.
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for expected in (
        "modeling/modeling_modular_star_encoder.py",
        "modeling/configuration_modular_star_encoder.py",
        "hub_configs/quickstart/config.json",
        "hub_configs/quickstart/recipe.yaml",
        "demo/page.css",
        "hub/subprocess_check.py",
        "py.typed",
    ):
        assert f"modular_star_encoder/{expected}" in names
