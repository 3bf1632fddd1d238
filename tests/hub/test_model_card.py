import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modular_star_encoder.hub import publishing
from modular_star_encoder.hub.manifest import folder_manifest
from modular_star_encoder.hub.model_card import check_card, write_card
from modular_star_encoder.hub.publishing import write_folder_card
from modular_star_encoder.hub.staging import stage_repositories, without_paths
from modular_star_encoder.inference.checkpoints import note_parent, slice_checkpoint
from modular_star_encoder.inference.exit_profile import ExitProfile
from modular_star_encoder.modeling import ModularStarEncoderConfig
from tests.errors import raises
from tests.hub.repositories import finetuned_entry, manifest, write_finetuned
from tests.tiny import change_json, tiny_model


@pytest.fixture(scope="module")
def staged(plan, tmp_path_factory):
    staged = stage_repositories(plan, tmp_path_factory.mktemp("staged"))
    return {one.settings.key: one for one in staged}


def card(one):
    return (one.folder / "README.md").read_text(encoding="utf-8")


def table(text):
    lines = text.partition("## Exits")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {name: dict(zip(cells[0][1:], values, strict=True)) for name, *values in cells[2:]}


def test_the_table_holds_what_was_measured_of_each_exit(staged):
    rows = table(card(staged["tiny"]))
    sizes = {f"exit {k}": f"{tiny_model().slice(k).num_parameters():,}" for k in (1, 2, 4)}
    assert rows["parameters"] == {**sizes, "BM25": ""}
    assert rows["GFLOPs per batch"]["exit 2"] == f"{32 * 1e6 / 1e9:.3g}"
    assert rows["latency, median, ms"] == {"exit 1": "1.23", "exit 2": "2.46", "exit 4": "4.92", "BM25": ""}
    assert rows["peak memory, MB"]["exit 4"] == "104"
    exits = {"exit 1": "10.0 (8.0–12.0)", "exit 2": "20.0 (18.0–22.0)", "exit 4": "40.0 (38.0–42.0)"}
    assert rows["CoSQA: MRR × 100"] == exits | {"BM25": "50.0 (48.0–52.0)"}
    assert "other" not in card(staged["tiny"]).partition("## Exits")[2]


def test_a_slice_has_the_figures_of_its_exits_alone(staged):
    rows = table(card(staged["tiny-2"]))
    assert rows["CoSQA: MRR × 100"] == {"exit 2": "20.0 (18.0–22.0)", "BM25": "50.0 (48.0–52.0)"}
    assert list(table(card(staged["tiny@exit-2"]))["parameters"]) == ["exit 1", "exit 2", "BM25"]
    head = tiny_model().projection_heads["1"]
    with_both = tiny_model().slice(2).num_parameters()
    assert rows["parameters"]["exit 2"] == f"{with_both - sum(p.numel() for p in head.parameters()):,}"
    profile = ExitProfile.load(staged["tiny-2"].folder / "exit_profile.json")
    assert list(profile.exits) == [2]
    assert profile.measurement(2, (1, 32)).latency_ms_p50 == 2.46
    assert "measured with the uncut model" in card(staged["tiny-2"])


def test_without_measurements_there_is_no_figure(staged):
    text = card(staged["tiny-pretrained"])
    assert list(table(text)) == ["parameters"]
    assert "Nothing was measured of this model" in text
    assert not [word for word in ("latency", "MRR", "BM25", "model-index", "![") if word in text]


def test_the_metadata_validates_and_comes_back(staged):
    for one in staged.values():
        check_card(one.folder / "README.md")
    data = ModelCard.load(staged["tiny"].folder / "README.md").data
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results == {"MRR at exit 1": 10.0, "MRR at exit 2": 20.0, "MRR at exit 4": 40.0}
    assert (data.license, data.pipeline_tag) == ("apache-2.0", "sentence-similarity")
    assert (data.base_model, data.datasets) == ("me/tiny-pretrained", ["some/data"])
    sliced = ModelCard.load(staged["tiny-2"].folder / "README.md").data
    assert sliced.base_model == "me/tiny"
    assert [result.metric_name for result in sliced.eval_results] == ["MRR at exit 2"]
    # A branch has no other repository as its base.
    assert ModelCard.load(staged["tiny@exit-2"].folder / "README.md").data.base_model is None


def test_a_card_without_a_licence_has_neither_its_line_nor_its_section(sources, staged, tmp_path):
    plan = manifest([{"name": "tiny", "checkpoint": str(sources["finetuned"])}], license=None)
    (one,) = stage_repositories(plan, tmp_path / "staged")
    check_card(one.folder / "README.md")
    assert "licen" not in card(one).lower()
    assert "## Licence\n\napache-2.0.\n" in card(staged["tiny"])


def test_parent_and_slices_name_each_other_with_revisions(plan, staged):
    weights = re.findall(r"\| (\d) \| \[([^]]+)\]\((\S+)\) \| `(\w{64})` \|", card(staged["tiny"]))
    slices = [*((k, f"me/tiny-{k}") for k in "124"), ("2", "me/tiny, branch exit-2")]
    assert [(k, name) for k, name, *_ in weights] == slices
    assert weights[-1][2].endswith("/me/tiny/tree/exit-2")
    write_card(staged["tiny-2"], plan, revision := "1" * 40)
    link = f"(https://huggingface.co/me/tiny/tree/{revision}) at exit 2, revision `{revision}`"
    assert link in card(staged["tiny-2"])
    write_card(staged["tiny-2"], plan)
    assert "revision `" not in card(staged["tiny-2"])


def test_a_slice_of_a_slice_names_its_parents_depth_and_no_exit_that_the_parent_lacks(sources, tmp_path):
    entries = [
        {"name": "tiny", "checkpoint": str(sources["finetuned"])},
        {"name": "tiny-2", "slice_of": "tiny", "exit_layer": 2},
        {"name": "tiny-1", "slice_of": "tiny-2", "exit_layer": 1},
    ]
    last = stage_repositories(manifest(entries), tmp_path / "staged")[-1]
    assert "The first 1 of 2 layers of [me/tiny-2]" in card(last)
    entries[2]["exit_layer"] = 4
    with raises("hub.staging.exit_layer", "tiny-1", "4", "tiny-2", "1, 2"):
        stage_repositories(manifest(entries), tmp_path / "again")


def test_a_folder_that_mose_slice_wrote_names_its_parent_and_exit_in_its_card(sources, staged, tmp_path):
    sliced = slice_checkpoint(sources["finetuned"], 2, tmp_path / "slice")
    (one,) = stage_repositories(manifest([{"name": "tiny-2", "checkpoint": str(sliced)}]), tmp_path / "staged")
    assert f"Cut from {sources['finetuned'].name} at exit 2 of 1, 2, 4: " in card(one)
    assert "Cut from" not in card(staged["tiny"])


def test_a_model_made_from_one_on_the_hub_names_that_as_its_base_model(sources, staged, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = ModularStarEncoderConfig.from_pretrained(copy := shutil.copytree(sources["finetuned"], tmp_path / "copy"))
    note_parent(config, "some/model")
    for origin, shown in (("some/model", "some/model"), ("me/tiny-2", None)):  # None: a model is not its own base
        config.parent_repository = origin
        config.save_pretrained(copy)
        sliced = slice_checkpoint(copy, 2, tmp_path / f"slice-{shown}")
        plan = manifest([{"name": "tiny-2", "checkpoint": str(sliced)}])
        (one,) = stage_repositories(plan, tmp_path / f"staged-{shown}")
        assert ModelCard.load(one.folder / "README.md").data.base_model == shown
        assert (f"Made from [{shown}](https://huggingface.co/{shown})." in card(one)) == bool(shown)
    config.parent_repository = "../odd"
    config.save_pretrained(copy)
    plan = manifest([{"name": "tiny", "checkpoint": str(slice_checkpoint(copy, 2, tmp_path / "slice"))}])
    with raises("hub.repository_id", "'../odd'"):
        stage_repositories(plan, tmp_path / "odd")


def test_snippets_hold_the_prompts_of_the_checkpoint(sources, tmp_path):
    copy = shutil.copytree(sources["finetuned"], tmp_path / "model")
    prompts = {"query": 'find "🔍": ', "document_python": "code: "}
    change_json(copy, "config_sentence_transformers.json", prompts=prompts)
    (one,) = stage_repositories(manifest([{"name": "tiny", "checkpoint": str(copy)}]), tmp_path / "staged")
    query = re.search(r"^query = (.*)$", card(one), re.MULTILINE)[1]
    assert ast.literal_eval(query) == 'find "🔍": sum of two numbers'
    assert "`query`, `document_python`." in card(one)


def test_training_is_described_from_the_log_without_places_of_this_machine(staged):
    text = card(staged["tiny-pretrained"])
    for line in ("| steps | 150 |", "| repositories held out | 2 |", "corpus: (a local path)\nseed: 0"):
        assert line in text
    assert "/home/me" not in text
    paths = "~/x /x ./x pairs=/home/me/x file:///home/me/x pairs:/home/me/x.csv [/home/me/a] ~me/x"
    hidden = dict.fromkeys(paths.split(), "(a local path)")
    kept = ("bigcode/data", 1, "a/b at exit 1/2", "https://host/v1", "the query / the code", "a ~5 b")
    assert without_paths([*hidden, *kept]) == [*hidden.values(), *kept]


def test_the_figure_shows_quality_against_latency(staged):
    assert "(quality_by_latency.png)" in card(staged["tiny"])
    assert (staged["tiny"].folder / "quality_by_latency.png").read_bytes().startswith(b"\x89PNG")
    # One exit makes no curve.
    assert not (staged["tiny-2"].folder / "quality_by_latency.png").exists()
    (staged["tiny@exit-2"].folder / "quality_by_latency.png").rename(staged["tiny"].folder / "moved.png")
    with raises("hub.card.figure", "quality_by_latency.png"):
        check_card(staged["tiny@exit-2"].folder / "README.md")


def test_the_card_shows_the_results_in_the_training_log_if_they_are_of_these_weights(tmp_path):
    folder = write_finetuned(tmp_path / "model")
    entry = finetuned_entry(folder, evaluation=[])
    results = json.loads((tmp_path / "report.json").read_text())
    results["tables"][0]["reference"] = "the same exit (before training)"
    recipe = {"model": "mose-code", "batch_size": 8, "max_text_tokens": 48, "max_code_tokens": 128}
    for checksum, shown in ((results["checkpoint_checksum"], True), ("of a copy in 16 bits", False)):
        log = {"retrieval": results | {"checkpoint_checksum": checksum}, "recipe": recipe}
        (folder / "training_log.json").write_text(json.dumps(log))
        (one,) = stage_repositories(manifest([entry]), tmp_path / checksum)
        text = card(one)
        assert ("| CoSQA: MRR × 100 | 10.0 " in text) == shown
        assert ("| CoSQA: change from the same exit (before training) | +10.0 p 0.5 |" in text) == shown
        assert "| started from | mose-code |" in text
        assert "| tokens at which held-out texts were cut | 128 |" in text


def test_texts_of_a_stranger_s_checkpoint_stay_texts_in_the_card(sources, tmp_path):
    copy = shutil.copytree(sources["finetuned"], tmp_path / "model")
    odd = "`.\n\n# Pwned\n\n<img src=x>\n```\n\n# Pwned\n\n`"
    change_json(copy, parent_model=odd)
    (copy / "exit_profile.json").unlink()
    change_json(copy, "config_sentence_transformers.json", prompts={"query": "", "document_python": "", odd: ""})
    (copy / "training_log.json").write_text(json.dumps({"recipe": {"note": odd}}))
    text = write_folder_card(folder_manifest(str(copy), "me/x", license="mit"))
    outside = text.replace(text.partition("```yaml")[2].partition("\n```")[0], "")
    assert outside.count("# Pwned") == 4  # in one line each of the parent and the prompts
    assert not re.search("^# Pwned|<img", outside, re.MULTILINE)


def test_the_card_is_replaced_whole_and_no_link_is_followed(plan, staged, tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "README.md").symlink_to("mine")

    def half(source, target):
        Path(target).write_text("half")
        raise OSError("full")

    monkeypatch.setattr(publishing, "stage_repositories", lambda *_: [staged["tiny"]])
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", half)
        with pytest.raises(OSError, match="full"):
            write_folder_card(plan, tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
    assert write_folder_card(plan, tmp_path) == (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "mine").read_text() == "mine"


SECTION = """![a](https://x.org/a.svg) ![b](data:image/png;base64,AAAA) ![c](README.md "title") `![d](e.png)`
```
![f](g.png)
```
"""


def test_a_section_may_show_images_of_the_web_and_code_and_must_be_text(sources, tmp_path):
    file = tmp_path / "section.md"
    plan = manifest([finetuned_entry(sources["finetuned"], sections={"More": str(file)})])
    file.write_text(SECTION)
    check_card(stage_repositories(plan, tmp_path / "staged")[0].folder / "README.md")
    file.write_text("![f](g.png)")
    with raises("hub.card.figure", "g.png"):
        check_card(stage_repositories(plan, tmp_path / "again")[0].folder / "README.md")
    file.write_bytes(b"\xff")
    with raises("hub.staging.section", file):
        stage_repositories(plan, tmp_path / "third")


def test_figures_of_other_weights_are_refused(tmp_path):
    folder = write_finetuned(tmp_path / "model")
    change_json(tmp_path, "report.json", checkpoint_checksum="other")
    with raises("evaluation.report.other_weights", "other"):
        stage_repositories(manifest([finetuned_entry(folder)]), tmp_path / "staged")
    change_json(folder, "exit_profile.json", checkpoint="other")
    with raises("hub.staging.profile", folder):
        stage_repositories(manifest([finetuned_entry(folder, evaluation=[])]), tmp_path / "again")
