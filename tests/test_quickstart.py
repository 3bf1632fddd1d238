"""The quickstart as a user runs it, on a small folder of repositories."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "quickstart.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Repositories of small documented functions, each with its own vocabulary."""
    folder = tmp_path_factory.mktemp("repositories")
    for repository in range(8):
        path = folder / f"repository{repository}" / "module.py"
        path.parent.mkdir(parents=True)
        path.write_text(
            "\n\n".join(
                f"def compute_{repository}_{number}(value, factor):\n"
                f'    """Multiply the value number {number} of kind {repository} by a factor."""\n'
                f"    result = value * factor + {number}\n"
                f"    kind_{repository} = [result, {number}]\n"
                f"    return kind_{repository}\n"
                for number in range(30)
            )
        )
    (folder / "repository0" / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    return folder


SMALL = ("max_steps=6", "batch_size=8", "logging_steps=2", "save_steps=2", "eval_fraction=0.2", "learning_rate=1e-3")


def command(*arguments):
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, **options)


def test_it_goes_the_whole_way_and_says_what_it_gained(repositories, tmp_path):
    out = tmp_path / "out"
    arguments = ("--data", repositories, "--out", out, "--question", "multiply by a factor", *SMALL)
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "results.json").read_text())
    assert report["slice"]["identical"] is True
    rows = [(row["retriever"], row["exit_layer"]) for row in report["retrieval"]["tables"][0]["rows"]]
    assert rows == [*((name, k) for name in ("fine-tuned", "shipped") for k in (0, 1, 2, 4, 6)), ("BM25", None)]
    assert report["functions"]["test"] > 0
    assert "exit 0: " in result.stdout
    assert re.search(r"Exit 6 (beats|does not beat) BM25: [\d.]+ against [\d.]+", result.stdout)
    assert "skipped 1: not UTF-8" in result.stdout
    (hit, *_) = report["search"][0]["hits"]
    assert f"{hit['path']}:{hit['line']}" in result.stdout
    assert Path(hit["path"]).read_text().splitlines()[hit["line"] - 1].startswith("def compute_")
    # Once more: everything is there, nothing is trained again.
    weights = (out / "finetuned" / "model" / "model.safetensors").read_bytes()
    assert run(*arguments).returncode == 0
    assert (out / "finetuned" / "model" / "model.safetensors").read_bytes() == weights


def test_ctrl_c_stops_cleanly_and_the_next_run_ends_in_the_same_weights(repositories, tmp_path):
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    options = ("--data", repositories, "--question", "multiply", *SMALL)
    assert run(*options, "--out", straight).returncode == 0
    process = subprocess.Popen(
        command(*options, "--out", interrupted),
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 240
    while not list(interrupted.glob("*/*/checkpoint-2/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "start it again to continue" in stderr
    assert "Traceback" not in stderr
    assert not (interrupted / "finetuned" / "model").exists()
    assert run(*options, "--out", interrupted).returncode == 0
    weights = [(one / "finetuned" / "model" / "model.safetensors").read_bytes() for one in (straight, interrupted)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--slice-exit-layer", "3"], "exit_layer 3 is not an exit of this model; its exits are 0, 1, 2, 4, 6."),
        (["--data", "{empty}"], "no Python"),
        (["--recipe", "{empty}/missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2_and_writes_nothing(tmp_path, arguments, sentence):
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    result = run(*(argument.format(empty=empty) for argument in arguments), "--out", out)
    (line,) = result.stderr.strip().splitlines()
    assert (result.returncode, out.exists()) == (2, False)
    assert line.startswith("quickstart: error: ")
    assert sentence.lower() in line.lower()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path, repositories):
    (tmp_path / "mine.txt").write_text("mine")
    result = run("--data", repositories, "--out", tmp_path, "--restart")
    assert result.returncode == 2
    assert "holds no quickstart run" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
