import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError

import modular_star_encoder.cli.main as cli
from modular_star_encoder.cli.evaluate import BENCHMARK_NAMES
from modular_star_encoder.evaluation.benchmarks import ALL, BENCHMARKS
from modular_star_encoder.inference import PROFILE_NAME
from modular_star_encoder.training import hub_config_folder
from tests.cli.test_dataset_commands import write_recipe as write_dataset_recipe
from tests.evaluation.benchmarks.published import code_folder
from tests.processes import python
from tests.training.retrieval_runs import finetuning_settings, write_checkpoint, write_recipe, write_triplets


def test_help_and_version_do_not_import_torch():
    program = """import sys, modular_star_encoder.cli.main as cli
for option in ("--help", "--version"):
    try:
        cli.main([option])
    except SystemExit:
        print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])"""
    output = python("-c", program).stdout
    assert [line for line in output.splitlines() if line.startswith("[")] == ["[]"] * 2
    assert output.startswith("usage: mose ")
    assert f"mose {metadata.version('modular-star-encoder')}\n" in output


def test_doctor_prints_versions_devices_folders_and_the_missing_packages_of_an_extra(mose, monkeypatch, tmp_path):
    def distribution(name):
        if name == "gradio":
            raise metadata.PackageNotFoundError(name)
        return metadata.distribution(name)

    monkeypatch.setattr(cli, "distribution", distribution)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    index = tmp_path / "modular-star-encoder" / "search" / "abc"
    index.mkdir(parents=True)
    settings = {"folder": "../../../../code", "exit_layers": [0, 2], "checkpoint": "/models/mine", "languages": ["go"]}
    (index / "index.json").write_text(json.dumps({"settings": settings}))
    status, out, _ = mose("doctor")
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert (status, lines["torch"].split()[1]) == (0, metadata.version("torch"))
    assert ("core" in lines["cpu"], "hub_configs/mose-code" in lines["mose-code"]) == (True, True)
    folder = tmp_path.parent / "code"
    assert lines["abc"].split(None, 1)[1] == f"{folder} (0 MB); exit 0, 2 of /models/mine, languages: 1"
    assert all("gradio" in lines[extra] for extra in ("demo", "all"))
    assert ("[demo]" in lines["demo"], "gradio" in lines["search"]) == (True, False)


def test_evaluate_prints_the_table_of_all_exits_and_languages_and_writes_the_same_figures(mose, checkpoint, tmp_path):
    file = tmp_path / "results.json"
    code_folder(tmp_path)
    (tmp_path / "b.go").write_text("package b\n\n// Find looks for a name.\nfunc Find() int {\n\treturn 1\n}\n")
    (tmp_path / "c.h").write_text("/* Shows the name of a file. */\nint show(void)\n{ return 1;\n}\n")
    status, out, _ = mose("evaluate", checkpoint, "--data", tmp_path, "--json", file)
    assert status == 0
    results = json.loads(file.read_text())
    (table,) = results["tables"]
    assert [row["exit_layer"] for row in table["rows"]] == [1, 2, 4, None]
    assert "6 candidates each" in out
    line = next(line for line in out.splitlines() if "exit 2" in line)
    assert f"{100 * table['rows'][1]['mean']['value']:.1f}" in line
    assert "only 6 documented functions" in out


def test_slice_writes_a_checkpoint_that_search_reads(mose, checkpoint, code, tmp_path):
    out = str(tmp_path / "slice")
    assert mose("slice", checkpoint, "--exit-layer", "2", out)[:2] == (0, f"{out}\n")
    _, full, _ = mose("search", "add", "--folder", code, "--model", checkpoint, "--exit-layer", "2")
    _, sliced, _ = mose("search", "add", "--folder", code, "--model", out)
    assert "(exit 2)" in full
    assert sliced == full


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("slice CHECKPOINT --exit-layer 3 out", "its exits are 1, 2, 4"),
        ("slice trained --exit-layer 2 out", "Give the folder trained/model."),
        ("publish trained --repository me/model", "Give the folder trained/model."),
        ("publish CHECKPOINT --repository me/model --license apache2", "such as apache-2.0"),
        ("slice CHECKPOINT --exit-layer 2 no_weights", "already exists"),
        ("search add --folder FOLDER --model ./no-such-folder", "There is no checkpoint folder"),
        ("search ' ' --folder FOLDER --model CHECKPOINT", "blank"),
        ("evaluate CHECKPOINT --data . --json no-such-folder/results.json", "does not exist"),
        ("evaluate CHECKPOINT --data ./no-such-folder", "does not exist"),
        ("evaluate CHECKPOINT --data FOLDER --json results.json", "functions that pass the filters, found 0"),
        ("finetune missing.yaml --out run", "small/finetune"),
        ("finetune mose-cod --out run", "did you mean mose-code?"),
        ("pretrain mose-code --out run", "run it with `mose finetune`"),
        ("finetune mose-code --out run data.pairs=FOLDER", 'set "data.functions={folder: '),
        ("finetune mose-code --out run data.pair=p.csv", "data: unknown setting pair; did you mean pairs?"),
        (f"recipes show {'x' * 5000}", "xxx"),
        ("finetune mose-code data.pairs=README.csv --out run", "similar: README.md"),
        ("publish ./no-such-folder --repository me/model", "./no-such-folder does not exist"),
        ("publish MANIFEST --repository me/model", "is a manifest"),
        ("dataset build recipe.yaml --out out", "'no/such/folder' does not exist"),
        ("dataset build recipe.yaml --out out translation.backend=gpt", "gpt"),
        ("dataset build recipe.yaml --out out translation.options.api_key_variable=MOSE_NO_KEY", "MOSE_NO_KEY"),
        ("dataset stats out.parquet", "cannot be read"),
        ("dataset push out.parquet owner/name", "no finished dataset"),
        ("index FOLDER --model CHECKPOINT --exit-layers all --latency-ms 9", "not both"),
        ("index FOLDER/nowhere --model CHECKPOINT", "is not a folder"),
        ("index ~nobody-here/code", "is not a folder"),
        ("search x --index ~nobody-here/code", "There is no index in"),
        ("finetune mose-code --out run data.pairs=~nobody-here/p.csv", "~nobody-here/p.csv"),
        ("index linked", "linked/.mose is not an index"),
        ("search x --index INDEX --exit-layer 1 --memory-mb 9", "not both"),
        ("search x --index INDEX --margin 0.1", "need --rerank-exit-layer"),
        ("search x --index INDEX --rerank-exit-layer 4 --margin nan", "nan"),
        ("related FOLDER/nowhere.py:3", "is not a file"),
        ("search 'a question' nowhere", "There is no folder 'nowhere'"),
        ("search 'a question' ./nowhere", "There is no folder './nowhere'. Write: mose search"),
        ("search question empti", "There is no folder 'empti'. Did you mean 'empty'?"),
        ("search /tmp", "A question is missing before the folder '/tmp'"),
        ("search without quotes", "put quotes around the question. Write: mose search"),
        ("search 'a question' FOLDER FOLDER", "are folders, and one command searches one folder. Write:"),
        ("search FOLDER 'a question'", 'must come after the question. Write: mose search "QUESTION"'),
        ("search x README.md", "is a file, and only a folder can be searched"),
        ("search x --index INDEX --path nope/**", "fits the path pattern 'nope/**'. The index has files such as"),
        ("search x --index INDEX --languages java", "fits the languages java. The index has files such as"),
        ("search x --folder FOLDER --model CHECKPOINT --languages java,php", "no java or php code. It has other code"),
        ("search x --folder FOLDER --model CHECKPOINT --rerank-exit-layer 3", "its exits are 1, 2, 4"),
        ("search x --index FOLDER", "it contains other files"),
        ("profile owner/name", "owner/name"),
        ("profile CHECKPOINT --dtype int8", "must be one of float32, bfloat16, float16"),
        ("profile CHECKPOINT --device tpu", "'tpu'"),
        ("profile CHECKPOINT --lengths 129", "at most 128 tokens, not 129"),
        ("profile CHECKPOINT --batch-sizes 0", "only numbers above 0"),
        ("profile CHECKPOINT --out no-such-folder/profile.json", "no-such-folder"),
        ("profile CHECKPOINT --quality csn=no-such-file", "There is no exit profile"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(mose, checkpoint, shared_index, tmp_path, monkeypatch, words, message):
    places = {"INDEX": shared_index.store.location, "FOLDER": shared_index.folder, "CHECKPOINT": checkpoint}
    places["MANIFEST"] = hub_config_folder("small") / "publish.yaml"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("no_weights", "empty", "trained/model", "linked"):
        (tmp_path / name).mkdir(parents=True)
        if name != "empty":
            shutil.copy(Path(checkpoint, "config.json"), tmp_path / name)
    (tmp_path / "linked" / ".mose").symlink_to("nothing")
    (tmp_path / "README.md").touch()
    code_folder(tmp_path)
    write_dataset_recipe(tmp_path, "http://127.0.0.1:1/v1")
    before = sorted(tmp_path.rglob("*"))
    for name, place in places.items():
        words = words.replace(name, str(place))
    status, out, err = mose(*shlex.split(words))
    assert (status, out) == (2, "")
    line = err.splitlines()[-1]
    assert (line.startswith("mose: error: "), message in line, len(line) < 2000) == (True, True, True)
    assert "Traceback" not in err
    assert (sorted(tmp_path.rglob("*")), (checkpoint / PROFILE_NAME).exists()) == (before, False)


def test_card_says_which_licence_it_took_or_that_there_is_none(mose, checkpoint, tmp_path):
    (folder := tmp_path / "model").symlink_to(checkpoint)
    _, card, errors = mose("card", folder, "--repository", "me/model")
    assert "license:" not in card
    assert "mose: note: the card names no licence; --upload needs --license NAME" in errors
    _, card, errors = mose("card", "mose-code", "--repository", "me/model")
    note = "mose: note: license: apache-2.0, from the card in mose-code or, without one, from its parent model's; add"
    assert ("\nlicense: apache-2.0\n" in card, note in errors) == (True, True)


def test_an_upload_without_a_hub_or_a_token_fails_before_anything_heavy(mose, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "modular_star_encoder.hub.publishing", None)  # its import would fail
    words = ("publish", str(checkpoint), "--repository", "me/model", "--upload")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in mose(*words)[2]
    monkeypatch.setattr("modular_star_encoder.utils.http.check_hub", lambda: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in mose(*words)[2]


def test_a_wrong_column_of_pairs_is_reported_before_anything_heavy(mose, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modular_star_encoder.training.finetuning", None)  # its import would fail
    (tmp_path / "pairs.csv").write_text("a,b\n1,2\n")
    words = ("finetune", "mose-code", "--out", tmp_path / "run", f"data.pairs={tmp_path / 'pairs.csv'}")
    for columns, message in (((), "Its columns are a, b."), (("data.columns.query=prose",), "no column prose")):
        status, _, errors = mose(*words, *columns)
        assert (status, message in errors) == (2, True)


def test_few_compiled_operations_are_kept_unless_the_user_says_how_many(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "")  # so that it is put back
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "5")
    assert cli.main(["evaluate", "./no-such-model", "--data", "./no-such-folder"]) == 2
    assert [os.environ[f"{name}_CAPACITY"] for name in ("LRU_CACHE", "ONEDNN_PRIMITIVE_CACHE")] == ["64", "5"]


@pytest.mark.parametrize(
    ("error", "status", "named"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ImportError("Install the extra."), 2, "error: Install the extra."),
        (ModuleNotFoundError(name="mteb"), 2, "modular-star-encoder[mteb]"),
        (ValueError("named \x1b[2J\u202e"), 2, "named �[2J�"),
        (MemoryError(), 2, "memory"),
        (RuntimeError("[…] DefaultCPUAllocator: can't allocate memory: you tried …"), 2, "Not enough memory: "),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "Not enough memory: "),
        (SafetensorError("No space left on device"), 2, "No space left"),
        (ModuleNotFoundError(name="modular_star_encoder.no_such_module"), None, ""),
        (ImportError("cannot import name", name="mteb"), None, ""),
        (TypeError("a mistake of ours"), None, ""),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_bug_keeps_its_traceback(mose, monkeypatch, error, status, named):
    monkeypatch.setattr("modular_star_encoder.cli.publish.run_slice", Mock(side_effect=error))
    command = ("slice", "mose-code", "--exit-layer", "4", "out")
    if status is None:
        with pytest.raises(type(error)):
            mose(*command)
    else:
        found, out, err = mose(*command)
        assert (found, out, err.count("\n"), named in err) == (status, "", 1, True)


def test_names_of_the_hub_do_not_control_the_terminal(mose, monkeypatch, checkpoint):
    from modular_star_encoder.hub.publishing import Change, Publication

    odd = Publication("me/x", "main", (Change("-", "\x1b]0;a\x07\n\u202e.txt", 1),), "\x1b[31m\n")
    for one in (odd, dataclasses.replace(odd, changes=())):
        monkeypatch.setattr("modular_star_encoder.hub.publishing.publish", lambda *_, one=one, **__: [one])
        status, out, _ = mose("publish", str(checkpoint), "--repository", "me/x", "--license", "mit")
        assert (status, out.count("\n")) == (0, 2 + len(one.changes))
        assert out.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("words", "continues"),
    [
        ("finetune mose-code --out run", True),
        ("dataset dedup . --out run", True),
        ("evaluate mose-code --data . --out run", True),
        ("evaluate mose-code --data .", False),
        ("recipes list", False),
    ],
)
def test_after_ctrl_c_a_command_that_continues_says_so(mose, monkeypatch, words, continues):
    monkeypatch.setattr(cli, "check_folders", Mock(side_effect=KeyboardInterrupt))
    assert ("run the same command again" in mose(*words.split())[2]) is continues


def test_a_missing_module_that_two_extras_bring_names_the_extra_of_the_command(mose, monkeypatch):
    def fail(arguments):
        raise ModuleNotFoundError(name="pyarrow")

    for room, command in (("train", "finetune small --out out"), ("dataset", "dataset stats rows.jsonl")):
        fail.__module__ = f"modular_star_encoder.cli.{room}"
        monkeypatch.setattr(cli, "parse", lambda argv: Mock(run=fail))
        assert f"modular-star-encoder[{room}]" in mose(*command.split())[2]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("serch x", "did you mean search?"),
        ("dataset dedpu", "did you mean dedup?"),
        ("evaluate mose-code --data . --exit-layers 4,", "must be a list of numbers"),
        ("evaluate mose-code --data hub --benchmark cosqa,advtext", "'advtext'"),
        ("pretrain recipe.yaml --out run --seed=1", "--seed=1"),
        ("finetune mose-code --out run pairs.csv", "write data.pairs=pairs.csv"),
        ("finetune mose-code --out run --data pairs.csv", "--data (settings are KEY=VALUE, such as data.pairs="),
        ("dataset build recipe.yaml --out out --outt=x", "did you mean --out?"),
        ("dataset stats rows.jsonl a=b", "a=b"),
        ("dataset dedup . --out out --against file", "SOURCE:COLUMN"),
        ("search x --index a --folder b", "not allowed with"),
        ("related add.go", "'add.go' must be of the form FILE:LINE"),
        (f"related add.go:{'9' * 5000}", "…' must be of the form FILE:LINE"),
        ("search x . --top-k 0", "argument --top-k: '0' must be"),
        (f"search x . --top-k {'9' * 5000}", "…' must be"),
        ("search x . --latency-ms nan", "argument --latency-ms: 'nan' must be"),
        ("search x . --rerank-exit-layer 4 --candidates 1", "argument --candidates: '1' must be"),
        ("search x --\x1b[31m", "--�[31m"),
        ("doctor \x1b[31m", " �[31m"),
    ],
)
def test_wrong_usage_has_status_2_and_names_what_is_wrong(words, named, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(words.split())
    assert error.value.code == 2
    assert named in capsys.readouterr().err


def test_the_names_of_benchmarks_in_the_help_are_those_that_there_are():
    assert (*BENCHMARKS, ALL) == BENCHMARK_NAMES


def test_finetune_trains_what_the_recipe_says(mose, tmp_path):
    settings = finetuning_settings(write_checkpoint(tmp_path / "checkpoint"), write_triplets(tmp_path))
    recipe = str(write_recipe(tmp_path / "recipe.yaml", settings))
    status, out, err = mose("finetune", recipe, "max_steps=1", "--out", tmp_path / "run", "seed=1")
    assert status == 0
    run = tmp_path / "run"
    assert all(str(run / "model") in line for line in out.splitlines()[-3:])  # the result, and two ways to use it
    assert (run / "report.md").read_text() in out
    for label in ("losses on held-out rows after step 1:", "embedding 28 texts, before training:"):
        assert label in err
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 1


@pytest.mark.parametrize(("entropy", "is_poor"), [(3.6, True), (4.0, False)])
def test_pretrain_ends_with_held_out_quality_and_the_next_command(mose, tmp_path, monkeypatch, entropy, is_poor):
    metrics = {"mlm_loss": 2.5, "icc_accuracy": 0.75}
    evaluation = {f"eval_{name}_exit_{k}": value + k for k in (1, 2) for name, value in metrics.items()}
    log = {"steps": 6, "evaluation": evaluation, "unigram_entropy": entropy, "identifier_overlap": {"accuracy": 0.6}}
    monkeypatch.setattr("modular_star_encoder.training.pretraining.pretrain", lambda recipe, out: log)
    status, out, _ = mose("pretrain", "mini", "--out", tmp_path / "a run", f"corpus.folder={tmp_path}")
    assert status == 0
    table = [line.replace(" ", "") for line in out.splitlines() if line.startswith("|")]
    assert table[2:4] == ["|1|3.500|33.1|175.0|", "|2|4.500|90.0|275.0|"]
    assert table[4].startswith(f"|guess|{entropy:.3f}|")
    assert table[5] == "|guessbycommonidentifiers|||60.0|"
    assert ("No exit's MLM loss is much better" in out, f"The model is in {tmp_path}/a run/model, " in out) == (
        is_poor,
        True,
    )
    command = ["mose", "finetune", "small", "--out", f"{tmp_path}/a run-retrieval", f"model={tmp_path}/a run/model"]
    assert [shlex.split(line) for line in out.splitlines()[-2:]] == [
        [*command, f"data.functions.folder={tmp_path}"],
        [*command, "data.pairs=pairs.csv"],
    ]


def test_a_terminal_of_few_characters_and_a_closed_output_get_a_plain_answer():
    program = "from modular_star_encoder.cli.main import main; main(['profile', 'no-\\u2192'])"
    answer = python("-c", program, PYTHONIOENCODING="ascii")
    assert answer.stderr.startswith("mose: error: There is no checkpoint folder no-?")
    script = "import sys; sys.stdout = None; from modular_star_encoder.cli.main import main; sys.exit(main(['doctor']))"
    assert "Traceback" not in python("-c", script).stderr


# A shell may start us with SIGINT ignored.
START = """import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
DURING_IMPORTS = """
class Finder:
    def find_spec(name, *_):
        name == "modular_star_encoder.cli" and os.kill(os.getpid(), NUMBER)
sys.meta_path.insert(0, Finder)
from modular_star_encoder.__main__ import main
main()"""
AT_THE_END = """
from modular_star_encoder.__main__ import main
atexit.register(os.kill, os.getpid(), NUMBER)
sys.argv[1:] = ["recipes", "list"]
sys.exit(main())"""
DURING_CLEAN_UP = """
from modular_star_encoder.__main__ import main
from modular_star_encoder.cli import main as cli
def run(arguments):
    try:
        os.kill(os.getpid(), NUMBER)
    finally:
        for other in (signal.SIGINT, signal.SIGTERM) * 3:
            os.kill(os.getpid(), other)
        print("cleaned up", file=sys.stderr)
cli.parse = lambda argv: __import__("argparse").Namespace(run=run)
sys.exit(main())"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("script", "status", "errors"),
    [(DURING_IMPORTS, None, ""), (AT_THE_END, None, ""), (DURING_CLEAN_UP, 130, "cleaned up\nmose: interrupted\n")],
)
def test_a_signal_leaves_no_traceback_and_further_ones_stop_no_clean_up(script, status, errors, number):
    process = python("-c", START + script.replace("NUMBER", str(int(number))))
    assert (process.returncode, process.stderr) == (-number if status is None else status, errors)


def test_a_recipe_is_shown_without_control_characters(mose, tmp_path):
    (tmp_path / "a.yaml").write_text("a: \x1b]0;title\x07\nb: 1\n")
    assert mose("recipes", "show", tmp_path / "a.yaml")[:2] == (0, "a: �]0;title�\nb: 1\n")


def test_a_deleted_current_folder_is_reported(mose, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    status, _, errors = mose("recipes", "list")
    assert (status, errors.count("\n")) == (2, 1)
    assert "current folder no longer exists" in errors


def test_a_variable_of_the_environment_that_is_no_number_is_named(mose, monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "a'b")
    monkeypatch.setattr("modular_star_encoder.cli.main.parse", lambda _: float(os.environ["TQDM_MININTERVAL"]))
    status, _, errors = mose("doctor")
    assert status == 2
    assert "TQDM_MININTERVAL=a'b" in errors


def test_an_address_of_the_hub_that_huggingface_hub_can_not_read_is_named():
    answer = python("-m", "modular_star_encoder", "doctor", HF_ENDPOINT="http://[")
    is_read_later = answer.returncode == 0  # by the oldest huggingface_hub, which imports with it
    assert is_read_later or (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert is_read_later is not ("HF_ENDPOINT=http://[" in answer.stderr)


@pytest.mark.parametrize("address", ["http://[", "http://localhost:99999", "localhost:1", "ftp://localhost"])
def test_an_address_of_the_hub_that_is_none_is_named(address):
    words = ("-m", "modular_star_encoder", "search", "x", "--model", "owner/no-such-model")
    answer = python(*words, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert (answer.returncode, "HF_ENDPOINT is not an address" in answer.stderr) == (2, True)


@pytest.mark.parametrize("out", ["dangling", "loop", "file/out"])
@pytest.mark.parametrize(
    "words",
    [
        "index FOLDER --out OUT",
        "evaluate mose-code --data FOLDER --out OUT",
        "profile mose-code --out OUT",
        "slice mose-code --exit-layer 2 OUT",
        "grow mose-code OUT --exit-layers 0 1",
        "card mose-code --repository me/model --out OUT",
        "publish mose-code --repository me/model --license mit --out OUT",
        "export mose-code --format static --out OUT",
        "pretrain small --out OUT corpus.folder=FOLDER",
        "finetune mose-code --out OUT data.pairs=pairs.csv",
        "ablate small --out OUT",
        "dataset build recipe.yaml --out OUT",
        "dataset dedup FOLDER --columns code --out OUT",
        "dataset corpus fetch FOLDER/file --out OUT",
        "dataset corpus build FOLDER/file --packages FOLDER --out OUT",
        "dataset corpus check FOLDER/file --against FOLDER --drop OUT",
    ],
)
def test_a_place_that_cannot_be_written_is_reported_at_the_start(mose, tmp_path, monkeypatch, words, out):
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for room in ("inference.checkpoints", "training", "synthconl"):
        monkeypatch.setitem(sys.modules, f"modular_star_encoder.{room}", None)  # nothing else is begun
    status, _, errors = mose(*words.replace("FOLDER", str(tmp_path)).replace("OUT", str(tmp_path / out)).split())
    assert (status, errors.count("\n")) == (2, 1)
    assert f"{tmp_path / out} can't be written" in errors
