import doctest
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import modular_star_encoder
from modular_star_encoder.modeling import configuration_modular_star_encoder, modeling_modular_star_encoder
from tests.processes import python

ROOT = Path(__file__).parent.parent
NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a connection was attempted")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""
# Without accelerate and datasets, which transformers and sentence-transformers may import themselves.
EXTRAS = ("bm25s", "evaluate", "gradio", "pydantic", "pygments", "tree_sitter")


def test_every_folder_of_the_package_is_listed_in_pyproject():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    below_src = {".".join(path.parent.relative_to(ROOT / "src").parts) for path in (ROOT / "src").rglob("__init__.py")}
    mapped = {f"modular_star_encoder.{name}" for name in ("modeling", "hub_configs", "model_cards")}
    assert set(listed) == below_src | mapped
    assert len(below_src) > 5


@pytest.mark.slow
def test_architecture_lists_the_modules_that_exist():
    listing = (ROOT / "ARCHITECTURE.md").read_text().partition("    hub_configs/")[0]
    folders, listed = {}, set()
    for indent, name in re.findall(r"^( {4,})([\w/.]+?(?:/|\.py))(?= |$)", listing, re.MULTILINE):
        parent = folders.get(len(indent) - 4, Path())
        folders[len(indent)] = parent / name
        listed |= {parent / name} if name.endswith(".py") else set()
    paths = [*(ROOT / "src").rglob("*.py"), *(ROOT / "modeling").rglob("*.py")]
    with_code = {path.relative_to(ROOT) for path in paths if path.name != "__init__.py" or "def " in path.read_text()}
    assert with_code <= listed
    assert all((ROOT / path).is_file() for path in listed)


def test_wheel_and_source_distribution_hold_model_code_weights_recipes_cards_and_types(tmp_path):
    # A copy, because building leaves a `build` folder, from which a later wheel would take stale files.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "runs"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    sdist = "import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", sdist, tmp_path], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    for expected in (
        "modeling/modeling_modular_star_encoder.py",
        "hub_configs/small/config.json",
        "hub_configs/small/recipe.yaml",
        "hub_configs/mose-code/README.md",  # names the licence, which slices and fine-tuned models keep
        "hub_configs/mose-code/model.safetensors",
        "hub_configs/mose-code/1_Pooling/config.json",
        "model_cards/model.md.jinja",
        "data/languages/languages.toml",
        "data/languages/queries/python.scm",
        "demo/page.css",
        "hub/subprocess_check.py",
        "py.typed",
    ):
        assert f"modular_star_encoder/{expected}" in names
        assert {expected, f"src/modular_star_encoder/{expected}"} & sources, expected


def test_importing_the_package_opens_no_connection_and_loads_neither_torch_nor_transformers():
    result = python(
        "-c",
        f"""{NO_NETWORK}
import modular_star_encoder
print(modular_star_encoder.__version__, {{'torch', 'transformers'}} & set(sys.modules))
""",
    )
    assert result.stdout.strip() == f"{version('modular-star-encoder')} set()", result.stderr


@pytest.mark.parametrize("name", modular_star_encoder.__all__)
def test_an_exported_name_is_documented_with_an_example(name):
    documentation = inspect.getdoc(getattr(modular_star_encoder, name)) or ""
    assert len(documentation.splitlines()) >= 5
    assert "Example" in documentation or "```" in documentation


@pytest.mark.parametrize("module", [configuration_modular_star_encoder, modeling_modular_star_encoder])
def test_the_examples_of_the_model_classes_run(module):
    result = doctest.testmod(module)
    assert result.attempted >= 3
    assert result.failed == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        modular_star_encoder.no_such_name  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "import modular_star_encoder; from transformers import AutoModelForCausalLM, AutoConfig",
        "import modular_star_encoder; from transformers import PreTrainedModel, AutoConfig",
        "from transformers import AutoConfig; import modular_star_encoder",
        "import torch, transformers; import modular_star_encoder; from transformers import AutoConfig",
    ],
)
def test_the_auto_classes_know_our_model_in_any_order_of_imports(order):
    result = python("-c", f"{order}\nprint(AutoConfig.for_model('ModularStarEncoder').exit_layers)")
    assert result.stdout.strip() == "[4, 9, 18, 27, 36]", result.stderr


@pytest.mark.slow
def test_embedding_needs_none_of_the_extras_and_no_network_and_a_missing_one_is_named(checkpoint):
    program = """
from importlib.abc import MetaPathFinder
class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import modular_star_encoder
from transformers import AutoModel
from sentence_transformers import SentenceTransformer
for name in ("load_at_budget", "encode_exits", "slice_checkpoint", "select_exit"):
    getattr(modular_star_encoder, name)
assert AutoModel.from_pretrained(sys.argv[1], exit_layer=2).config.num_hidden_layers == 2
print(SentenceTransformer(sys.argv[1], trust_remote_code=True).encode(["a"], exit_layer=2).shape)
modular_star_encoder.CodeIndex
"""
    result = python("-c", NO_NETWORK + program.replace("EXTRAS", repr(EXTRAS)), checkpoint)
    assert result.stdout.strip() == "(1, 16)", result.stderr
    assert "modular-star-encoder[search]" in result.stderr
