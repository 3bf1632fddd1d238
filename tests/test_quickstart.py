import json
import re
from pathlib import Path

import pytest

from tests.processes import python
from tests.synthconl.samples import write_corpus

SCRIPT = Path(__file__).parent.parent / "examples" / "quickstart.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("repositories"), repositories=8, functions=30)
    (folder / "repository0" / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    return folder


SMALL = ("max_steps=6", "batch_size=8", "logging_steps=2", "save_steps=2", "eval_fraction=0.2", "learning_rate=1e-3")


def test_it_goes_the_whole_way_and_says_what_it_gained(repositories, tmp_path):
    out = tmp_path / "out"
    arguments = ("--data", repositories, "--out", out, "--question", "multiply by a factor", *SMALL)
    result = python(SCRIPT, *arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "results.json").read_text())
    assert report["slice"]["identical"] is True
    assert report["finetuning"]["data"]["held_out"] > 0
    assert "exit 0: " in result.stdout
    assert re.search(r"Exit 6 (beats|does not beat) BM25: [\d.]+ against [\d.]+", result.stdout)
    assert "skipped 1: not UTF-8" in result.stdout
    (hit, *_) = report["search"][0]["hits"]
    assert f"{hit['path']}:{hit['line']}" in result.stdout
    assert Path(hit["path"]).read_text().splitlines()[hit["line"] - 1].startswith("def ")
    # Once more: everything is there, nothing is trained again.
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert python(SCRIPT, *arguments).returncode == 0
    assert (out / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--slice-exit-layer", "3"], "exit_layer 3 is not an exit of this model; its exits are 0, 1, 2, 4, 6."),
        (["--data", "{empty}"], "no Python"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2_and_writes_nothing(tmp_path, arguments, sentence):
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    result = python(SCRIPT, *(argument.format(empty=empty) for argument in arguments), "--out", out)
    (line,) = result.stderr.strip().splitlines()
    assert (result.returncode, out.exists()) == (2, False)
    assert line.startswith("quickstart: error: ")
    assert sentence.lower() in line.lower()
