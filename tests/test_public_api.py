"""The names that the package exports: each imports lazily, is documented, and needs no extra that it does not use."""

import inspect
import subprocess
import sys

import pytest

import modular_star_encoder

EXTRAS = ("accelerate", "bm25s", "datasets", "evaluate", "gradio", "lancedb", "pydantic", "pygments", "tree_sitter")


def run(program, *arguments):
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    result = run("import sys, modular_star_encoder; print({'torch', 'transformers'} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize("name", modular_star_encoder.__all__)
def test_an_exported_name_is_documented_with_an_example(name):
    exported = getattr(modular_star_encoder, name)
    documentation = inspect.getdoc(exported) or ""
    assert len(documentation.splitlines()) >= 5
    assert "Example" in documentation or "```" in documentation


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
def test_the_auto_classes_know_our_model_in_whatever_order_things_are_imported(order):
    result = run(f"{order}\nprint(AutoConfig.for_model('ModularStarEncoder').exit_layers)")
    assert result.stdout.strip() == "[4, 9, 18, 27, 36]", result.stderr


BLOCKED = """
import sys
from importlib.abc import MetaPathFinder
class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extras!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.slow
def test_embedding_needs_none_of_the_extras(tmp_path):
    from tests.tiny import save_tiny_checkpoint

    program = """
import modular_star_encoder
from transformers import AutoModel
from sentence_transformers import SentenceTransformer
model = modular_star_encoder.load_at_budget
for name in ("encode_exits", "slice_checkpoint", "select_exit"):
    getattr(modular_star_encoder, name)
assert AutoModel.from_pretrained(sys.argv[1], exit_layer=2).config.num_hidden_layers == 2
print(SentenceTransformer(sys.argv[1], trust_remote_code=True).encode(["a"], exit_layer=2).shape)
"""
    # transformers and sentence-transformers may look for some of them; what they need is theirs to say.
    ours = tuple(name for name in EXTRAS if name not in ("accelerate", "datasets"))
    checkpoint = save_tiny_checkpoint(tmp_path / "model")
    result = run(BLOCKED.format(extras=ours) + program, str(checkpoint))
    assert result.stdout.strip() == "(1, 16)", result.stderr


@pytest.mark.slow
def test_a_missing_extra_is_named():
    result = run(BLOCKED.format(extras=("tree_sitter",)) + "import modular_star_encoder as m; m.CodeIndex")
    assert "modular-star-encoder[search]" in result.stderr


def test_the_examples_of_the_model_classes_run():
    import doctest

    from modular_star_encoder.modeling import configuration_modular_star_encoder, modeling_modular_star_encoder

    for module in (configuration_modular_star_encoder, modeling_modular_star_encoder):
        result = doctest.testmod(module)
        assert result.attempted >= 3
        assert result.failed == 0
