import json
import runpy
import sys
from pathlib import Path

import pytest

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.inference import encoders
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.inference.encoders import ExitEncoder
from tests.errors import raises
from tests.evaluation.benchmarks.published import code_folder
from tests.evaluation.samples import code_rows, reciprocal_ranks
from tests.tiny import tiny_model, tiny_tokenizer

mteb = pytest.importorskip("mteb", reason="needs the extra mteb")

from mteb.abstasks import AbsTaskRetrieval  # noqa: E402
from mteb.results import TaskResult  # noqa: E402
from mteb.types import PromptType  # noqa: E402

from modular_star_encoder.evaluation.mteb_exits import MtebExitEncoder, local_task, run_mteb  # noqa: E402

ROWS = code_rows(("add", "cut", "see"), dict.fromkeys(("file", "name", "user"), "python"))


@pytest.fixture
def passes(monkeypatch):
    """The exits of every pass over texts, in order."""
    exits = []

    def counted(*arguments, **options):
        exits.append(options["exit_layers"])
        return encode_exits(*arguments, **options)

    monkeypatch.setattr(encoders, "encode_exits", counted)
    return exits


def task(rows=ROWS):
    return local_task(rows, "LocalTask")


def expected_mrr(exit_layer):
    queries, documents = (
        encode_exits(tiny_model(), tiny_tokenizer(), [row[side] for row in ROWS], prompt=prompt, progress=False)
        for side, prompt in enumerate((text_prompt(), code_prompt()))
    )
    values = reciprocal_ranks(queries[exit_layer], documents[exit_layer], size=None)
    return pytest.approx(values.mean(), abs=1e-4)  # mteb rounds


def test_mteb_runs_its_retrieval_task_at_two_exits_and_reads_the_results_back(checkpoint, tmp_path, passes):
    local = task()
    assert isinstance(local, AbsTaskRetrieval)
    scores = run_mteb(str(checkpoint), local, (1, 4), tmp_path, progress=False)
    assert passes == [(1, 4)] * 2  # queries and documents, both exits at once
    assert scores == {k: {"LocalTask": expected_mrr(k)} for k in (1, 4)}
    assert scores[1] != scores[4]
    revision = checkpoint_checksum(checkpoint)
    for exit_layer in (1, 4):
        folder = tmp_path / "results" / f"local__model-exit-{exit_layer}" / revision
        result = TaskResult.from_disk(folder / "LocalTask.json")
        result.validate_and_filter_scores(local)
        assert result.get_score() == pytest.approx(scores[exit_layer]["LocalTask"], abs=1e-6)  # files hold six digits
        meta = json.loads((folder / "model_meta.json").read_text())
        assert (meta["name"], meta["embed_dim"]) == (f"local/model-exit-{exit_layer}", 16)
        assert meta["n_parameters"] == tiny_model(exit_layer=exit_layer).num_parameters()
        assert str(checkpoint) not in (folder / "model_meta.json").read_text()
    loaded = mteb.ResultCache(tmp_path).load_results(tasks=[local])
    assert [[result.task_name for result in one.task_results] for one in loaded.model_results] == [["LocalTask"]] * 2


def test_results_of_the_same_weights_and_data_are_kept(checkpoint, tmp_path, passes, monkeypatch):
    def run(rows, exit_layers, **options):
        """Return the scores, how often mteb evaluated, and the exits of each pass over texts."""
        passes.clear()
        local, evaluated = task(rows), []
        evaluate = type(local).evaluate
        monkeypatch.setattr(type(local), "evaluate", lambda *a, **k: evaluated.append(1) or evaluate(*a, **k))
        scores = run_mteb(str(checkpoint), local, exit_layers, tmp_path, progress=False, **options)
        return scores, len(evaluated), list(passes)

    first, *effort = run(ROWS, (1, 4))
    assert effort == [2, [(1, 4)] * 2]
    again, *effort = run(ROWS, (1, 4))
    assert effort == [0, []]
    assert again == {k: {"LocalTask": pytest.approx(first[k]["LocalTask"], abs=1e-6)} for k in (1, 4)}
    assert run(ROWS, (2, 4))[1:] == (1, [(2,)] * 2)
    assert run(ROWS, (1, 2, 4), overwrite=True)[1:] == (3, [])  # texts have their embeddings
    assert run(ROWS[1:], (1, 4))[1:] == (2, [])


def test_the_data_of_a_task_are_loaded_once_for_all_exits_and_then_dropped(checkpoint, tmp_path):
    class Loaded(type(task())):
        loads = 0

        def load_data(self, **_):
            self.loads += 1
            self.dataset, self.data_loaded = task().dataset, True

    local = Loaded()
    run_mteb(str(checkpoint), local, (1, 4), tmp_path, progress=False)
    assert (local.loads, local.data_loaded) == (1, False)


def test_rows_that_would_be_wrong_answers_to_each_other_are_dropped():
    local = task([*ROWS, (ROWS[0][0], "other code", "python"), ("other text", ROWS[1][1], "python")])
    data = local.dataset["default"]["test"]
    assert (data["queries"]["text"], data["corpus"]["text"]) == ([row[0] for row in ROWS], [row[1] for row in ROWS])
    with raises("evaluation.candidates.too_few", 1):
        task([ROWS[0], ROWS[0]])


def encoder_of(model, tokenizer, prompts=None):
    return MtebExitEncoder(EmbeddingRetriever(ExitEncoder(model, tokenizer, "m")), 4, (1, 4), None, prompts)


@pytest.mark.parametrize(
    ("task", "subset", "query", "document"),
    [
        ("CodeSearchNetRetrieval", "go", text_prompt(), code_prompt("go")),
        ("COIRCodeSearchNetRetrieval", "go", code_prompt("go"), text_prompt()),
        ("CodeSearchNetCCRetrieval", "php", code_prompt("php"), code_prompt("php")),
        ("CodeTransOceanContest", "default", code_prompt("python"), code_prompt("c++")),
        ("CosQA", "default", text_prompt(), code_prompt("python")),
        ("CodeEditSearchRetrieval", "swift", text_prompt(), code_prompt()),
        ("StackOverflowQA", "default", text_prompt(), code_prompt()),
    ],
)
def test_a_side_of_a_task_is_prompted_as_what_it_is(model, tokenizer, task, subset, query, document):
    metadata = mteb.get_task(task).metadata
    encoder = encoder_of(model, tokenizer)
    assert encoder._prompt(metadata, subset, PromptType.query) == query
    assert encoder._prompt(metadata, subset, PromptType.document) == document
    assert encoder._prompt(metadata, subset, None) == ""
    plain = encoder_of(tiny_model(instruction_prompts=False), tokenizer)
    assert plain._prompt(metadata, subset, PromptType.document) == ""
    given = encoder_of(model, tokenizer, {"document": "D: ", f"{task}-query": "Q: ", "query": "other"})
    assert given._prompt(metadata, subset, PromptType.query) == "Q: "
    assert given._prompt(metadata, subset, PromptType.document) == "D: "


@pytest.mark.slow
def test_mistakes_are_reported_before_anything_is_run(checkpoint, tmp_path):
    with raises("mteb.task.unknown", "'CosQB'", "Did you mean: 'CosQA'"):
        run_mteb(str(checkpoint), ["CosQA", "CosQB"], out=tmp_path / "out")
    with raises("mteb.task.missing"):
        run_mteb(str(checkpoint), [], out=tmp_path / "out")
    with pytest.raises(ValueError, match="its exits are 1, 2, 4"):
        run_mteb(str(checkpoint), task(), (3,), tmp_path / "out")
    with raises("mteb.model_name", "mine"):
        run_mteb(str(checkpoint), task(), model_name="mine", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_example_runs_mteb_on_the_functions_of_a_folder(checkpoint, tmp_path, monkeypatch, capsys):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "mteb_exits.py"))
    code = tmp_path / "code"
    code_folder(code)
    out = tmp_path / "out"
    arguments = ["mteb_exits.py", str(checkpoint), "--data", str(code), "--exit-layers", "1,4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert example["main"]() == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [words[:3] for words in printed[:2]] == [["exit", k, "FunctionsOfAFolder"] for k in ("1", "4")]
    files = sorted(out.glob("results/*/*/FunctionsOfAFolder.json"))
    scores = [100 * TaskResult.from_disk(file).get_score() for file in files]
    assert [float(words[3]) for words in printed[:2]] == pytest.approx(scores, abs=0.01)
    monkeypatch.setattr(sys, "argv", [*arguments[:3], str(tmp_path / "missing")])
    assert example["main"]() == 2
