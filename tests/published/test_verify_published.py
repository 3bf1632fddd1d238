"""The comparison of a published repository's own code with ours, and that ours agrees with the stand-ins' code."""

import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.processes import python
from tests.published.stand_in import own_code, write_stand_in

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "verify_published.py"
spec = importlib.util.spec_from_file_location("verify_published", SCRIPT)
script = sys.modules["verify_published"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

SETTINGS = {"dtype": "float32", "device": "cpu", "attention": "sdpa", "exit_layer": None}


def answers(**changes):
    """Two prompts, two exits; `changes` replace arrays by key, with `/` written as `__`."""
    generator = np.random.default_rng(0)
    result = {f"ids/{prompt}": np.arange(prompt + 3) for prompt in range(2)}
    for way, name, prompt in itertools.product(("padded", "alone"), ("exit 1", "exit 2"), range(2)):
        result[f"{way}/{name}/{prompt}"] = generator.normal(size=8).astype(np.float32)
    return result | {key.replace("__", "/").replace("_", " "): value for key, value in changes.items()}


def disagreeing(theirs, ours, tolerance=1e-4):
    return [(c.way, c.name, c.prompt) for c in script.compare(theirs, ours) if not c.within(tolerance)]


def test_equal_answers_agree_and_a_changed_one_is_named():
    theirs = answers()
    assert disagreeing(theirs, answers()) == []
    changed = theirs["padded/exit 2/1"].copy()
    changed[3] += 1e-3
    assert disagreeing(theirs, answers(padded__exit_2__1=changed)) == [("padded", "exit 2", 1)]
    assert disagreeing(theirs, answers(padded__exit_2__1=changed), tolerance=1e-2) == []
    for scale, expected in ((1000.0, 1e-5), (0.1, 1e-2)):  # relative to large outputs
        first = np.full(4, scale, dtype=np.float32)
        (comparison,) = script.compare({"alone/x/0": first}, {"alone/x/0": first + 0.01})
        assert comparison.difference == pytest.approx(expected, rel=0.05)
    with pytest.raises(ValueError, match="prompt 2 has different token ids"):
        script.compare(theirs, answers(ids__1=np.arange(9)))


@pytest.mark.parametrize("wrong", [np.full(8, np.nan), np.ones(7), None])
def test_an_output_that_is_no_number_or_of_another_shape_or_missing_never_agrees(wrong):
    changed = {key: value for key, value in answers(alone__exit_1__0=wrong).items() if value is not None}
    for pair in ((answers(), changed), (changed, answers())):
        assert disagreeing(*pair, tolerance=1e9) == [("alone", "exit 1", 0)]


def trials_with(explanation):
    """Trials in which our answers are theirs exactly when the options are those of the explanation."""

    def run(options):
        if options.get("exit_norm") == "none":
            raise ValueError("no such norm")
        wrong = answers(alone__exit_1__0=np.zeros(8, dtype=np.float32))
        return answers() if options == explanation else wrong

    current = {"pooling": "mean", "projection_act": "leaky_relu", "exit_norm": "last"}
    return script.try_alternatives(run, answers(), current, 1e-4)


def test_the_one_option_that_explains_a_disagreement_is_found_without_trying_pairs_or_none_is_reported():
    trials = trials_with({"projection_act": "tanh"})
    assert trials[0].options == {"projection_act": "tanh"}
    assert trials[0].difference == 0 < trials[1].difference
    assert trials[0].agreeing == 8 > trials[1].agreeing
    assert all(len(trial.options) == 1 for trial in trials)
    assert {"exit_norm": "none"} not in [trial.options for trial in trials]
    text = script.format_trials(trials, 1e-4)
    assert "projection_act=tanh" in text
    assert "pooling" not in text
    assert script.format_trials(trials_with(None), 1e-4).startswith("No option or pair of options explains it")


# ---- Our loading against the stand-ins' own code, both in this process


def both(folder, exit_layer=None, **options):
    """Answers of the repository's own code and of ours."""
    finetuned = script.has_projection_heads(folder)
    tokenizer = script.load_tokenizer(folder)
    prompts = script.published_prompts(tokenizer, instructions=finetuned)
    model = own_code(folder).from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    exits = script.published_exits(folder)
    theirs = script.answer(tokenizer, prompts, lambda batch: script.named_outputs(model(**batch), exits, exit_layer))
    settings = SETTINGS | {"exit_layer": exit_layer}
    return theirs, script.our_answers(folder, prompts, settings, options, finetuned=finetuned)


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("pretrained", {}),
        ("pretrained", {"heads": "head", "listed": ()}),
        ("pretrained", {"transform_norm": "layer_norm", "vocabulary_bias": "predictions.decoder.bias"}),
        ("pretrained", {"vocabulary_bias": None, "pooler_in_heads": True}),
        ("finetuned", {}),
        ("finetuned", {"module_prefix": False, "dtype": torch.float32}),
        ("finetuned-1", {}),
        ("finetuned-3", {"final_norm": "absent"}),
        ("finetuned-3", {"cut_head_index": 2, "depth": 3}),
        ("finetuned-6", {}),
    ],
    ids=str,
)
def test_our_loading_agrees_with_the_repositorys_own_code(tmp_path, kind, variant):
    theirs, ours = both(write_stand_in(tmp_path / "repository", kind, **variant))
    assert disagreeing(theirs, ours, tolerance=1e-5) == []


@pytest.mark.parametrize("exit_layer", [1, 3, 6])
def test_our_model_cut_at_an_exit_agrees_with_their_full_one_there(finetuned, exit_layer):
    theirs, ours = both(finetuned, exit_layer=exit_layer)
    assert {key.split("/")[1] for key in theirs if "exit" in key} == {f"exit {exit_layer}"}
    assert disagreeing(theirs, ours, tolerance=1e-5) == []


def test_the_ancestors_pooling_agrees_wherever_the_place_it_reads_holds_a_real_token(tmp_path):
    # In a padded batch it may read the state of a padding token, which has no meaning and is not reproduced.
    folder = write_stand_in(tmp_path / "repository", "finetuned", pooling="legacy")
    theirs, ours = both(folder, pooling="legacy")
    lengths = [len(theirs[f"ids/{prompt}"]) for prompt in range(6)]
    on_padding = {prompt for prompt, length in enumerate(lengths) if length - 1 < max(lengths) - length}
    assert 0 < len(on_padding) < 5
    wrong = disagreeing(theirs, ours, tolerance=1e-5)
    assert {(way, prompt) for way, _, prompt in wrong} == {("padded", prompt) for prompt in on_padding}


@pytest.mark.parametrize(
    ("kind", "variant", "renamed"),
    [
        ("finetuned", {"head_activation": "tanh"}, {"projection_act": "tanh"}),
        ("finetuned", {"pooling": "lasttoken"}, {}),
        ("finetuned", {"projection_order": "pool_then_project"}, {}),
        ("finetuned", {"embedding_normalization": "clip"}, {}),
        ("finetuned", {"norm_at_every_exit": True}, {"exit_norm": "all"}),
        ("finetuned", {"is_causal": True}, {}),
        ("finetuned-3", {"final_norm": "applied"}, {"exit_norm": "all"}),
        ("pretrained", {"is_causal": True}, {}),
        ("pretrained", {"pooler_position": "first"}, {}),
    ],
    ids=str,
)
def test_every_undecided_behaviour_has_an_option_that_agrees_with_it_where_the_default_does_not(
    tmp_path, kind, variant, renamed
):
    folder, options = write_stand_in(tmp_path / "repository", kind, **variant), renamed or variant
    assert set(options) <= {*script.FINETUNED_OPTIONS, *script.PRETRAINED_OPTIONS}
    assert disagreeing(*both(folder), tolerance=1e-3)
    assert disagreeing(*both(folder, **options), tolerance=1e-5) == []


# ---- The script as it is used


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    return write_stand_in(tmp_path_factory.mktemp("published") / "finetuned", "finetuned")


def test_a_repository_that_agrees_gives_a_table_of_every_exit_and_exit_code_0(finetuned):
    result = python(SCRIPT, finetuned)
    assert result.returncode == 0, result.stderr
    assert "All 60 outputs agree within 0.0001." in result.stdout
    for column in ("exit 1 ", "exit 2 ", "exit 3 ", "exit 5 ", "exit 6\n"):
        assert result.stdout.count(column) == 2
    assert "padded against alone" in result.stdout
    assert "running the repository's own code in a separate process" in result.stderr


def test_a_repository_that_disagrees_gives_exit_code_1_and_the_option_that_would_explain_it(tmp_path, capsys):
    folder = write_stand_in(tmp_path / "repository", "finetuned-3", final_norm="applied", pooling="lasttoken")
    assert script.main([str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "12 of 12 outputs differ by more than 0.0001" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("  ") and "largest difference" in line]
    assert line.startswith("  pooling=lasttoken, exit_norm=all ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [("raise RuntimeError('made for something older')", "something older"), ("import modular_star_encoder",) * 2],
)
def test_the_repositorys_code_must_run_without_this_package(tmp_path, capsys, line, reason):
    folder = write_stand_in(tmp_path / "repository", "finetuned-3")
    with (folder / "modularStarEncoder.py").open("a") as code:
        code.write(f"\n{line}\n")
    assert script.main([str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("verify_published: error: ")
    assert reason.removeprefix("import ") in error
    assert "--remote-python" in error


@pytest.mark.parametrize(
    ("name", "content", "arguments", "sentence"),
    [
        ("notes.txt", "", ["--revision", "main"], "--revision is for repositories on the Hub"),
        ("notes.txt", "", ["--exit-layer", "4"], "4 is not an exit of this model; its exits are 1, 2, 3, 5, 6."),
        ("model.safetensors", "no", [], "model.safetensors is damaged"),
        ("config.json", "{", [], "config.json is not JSON"),
        ("config.json", '{"auto_map": {}}', [], "its config.json has no matryoshka_layers"),
        ("config.json", '{"matryoshka_layers": [1]}', [], "its config.json has no auto_map"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, name, content, arguments, sentence):
    folder = write_stand_in(tmp_path / "repository", "finetuned-3")
    (folder / name).write_text(content)
    assert script.main([str(folder), *arguments]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("verify_published: error: ")
    assert sentence in error


def test_a_missing_folder_and_an_unreachable_hub_are_told_apart(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, sentence in (
        ("./nowhere/at/all", "There is no checkpoint folder ./nowhere/at/all"),
        ("nobody/nothing", "nobody/nothing is not a local folder, and the Hub can't be reached."),
    ):
        assert script.main([name]) == 2
        assert sentence in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _verbosity():
    """The script quietens transformers for its own process; here it must not stay so."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.utils.logging.enable_progress_bar()
