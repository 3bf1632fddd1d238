import os
import shutil
from itertools import pairwise
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.utils import filter_repo_objects

from modular_star_encoder.data.pairs import RetrievalExample, Snippet
from modular_star_encoder.synthconl import publishing
from modular_star_encoder.synthconl.publishing import CodeCounts, dataset_card, dataset_statistics, push_dataset
from modular_star_encoder.utils.reports import cell
from tests.errors import raises
from tests.synthconl.samples import CARD

FILES = {"README.md", "statistics.json", "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"}


@pytest.fixture
def hub(monkeypatch):
    """An `HfApi` that checks the names of its arguments."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = "https://hub.example/datasets/owner/name"
    api.dataset_info.return_value.private = True
    monkeypatch.setattr(publishing, "HfApi", lambda: api)
    return api


def test_a_dry_run_lists_the_files_and_sends_nothing(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(publishing, "HfApi", None)
    upload = push_dataset(finished, "owner/name")
    assert {name for name, _ in upload.files} == FILES
    assert all(size == (finished / "dataset" / name).stat().st_size for name, size in upload.files)
    assert str(upload).splitlines()[-1].startswith("nothing was uploaded to owner/name: a dry run; --upload")
    assert upload == push_dataset(finished / "dataset", "owner/name")
    with raises("synthconl.push.no_dataset", tmp_path):
        push_dataset(tmp_path, "owner/name")
    with raises("hub.repository_id", "'name'"):
        push_dataset(finished, "name")


def test_an_upload_sends_these_files_alone_to_a_private_repository(finished, hub):
    upload = push_dataset(finished, "owner/name", upload=True)
    hub.create_repo.assert_called_once_with("owner/name", repo_type="dataset", private=True, exist_ok=True)
    options = hub.upload_folder.call_args.kwargs
    assert (options["repo_id"], options["repo_type"]) == ("owner/name", "dataset")
    assert options["folder_path"] == finished / "dataset"
    assert set(options["allow_patterns"]) == FILES
    assert str(upload).endswith("\nuploaded to the private repository https://hub.example/datasets/owner/name")
    hub.dataset_info.return_value.private = False  # of a repository that existed before
    assert "\nuploaded to the public repository https://" in str(push_dataset(finished, "owner/name", upload=True))


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("upload", [False, True])
def test_a_link_out_of_the_folder_is_refused_before_anything_is_listed_or_sent(finished, hub, tmp_path, name, upload):
    folder, secret = shutil.copytree(finished / "dataset", tmp_path / "out"), tmp_path / "secret"
    shutil.move(folder / name, secret)
    (folder / name).symlink_to(secret)
    with raises("synthconl.push.file", folder / name):
        push_dataset(folder, "owner/name", upload=upload)
    shutil.rmtree(folder / "data")
    (folder / "data").symlink_to(finished / "dataset" / "data")
    with raises("synthconl.push.file"):
        push_dataset(folder, "owner/name", upload=upload)
    assert hub.method_calls == []


@pytest.mark.parametrize(
    ("make", "key"), [(os.mkdir, "push.file"), (os.mkfifo, "push.file"), (Path.touch, "shards.unreadable")]
)
def test_only_parquet_files_in_data_are_uploaded(finished, hub, tmp_path, make, key):
    folder = shutil.copytree(finished / "dataset", tmp_path / "out")
    make(folder / "data" / "train-9.parquet")
    with raises(f"synthconl.{key}", "train-9.parquet"):
        push_dataset(folder, "owner/name", upload=True)
    assert hub.method_calls == []


def test_a_name_with_wildcards_uploads_no_other_file(finished, hub, tmp_path):
    folder = shutil.copytree(finished / "dataset", tmp_path / "out")
    (folder / "data" / "train-00000-of-00001.parquet").rename(folder / "data" / "*.parquet")
    push_dataset(folder, "owner/name", upload=True)
    patterns = hub.upload_folder.call_args.kwargs["allow_patterns"]
    names = ["data/*.parquet", "data/b/c.parquet"]
    assert list(filter_repo_objects(names, allow_patterns=patterns)) == names[:1]


def test_the_card_has_the_metadata_of_the_hub(finished):
    data = DatasetCard.load(finished / "dataset" / "README.md").data.to_dict()
    assert data["license"] == "other"
    assert (data["license_name"], data["license_link"]) == ("as-in-the-repositories", CARD["license_link"])
    assert data["size_categories"] == ["n<1K"]
    assert "text-retrieval" in data["task_categories"]
    (config,) = data["configs"]
    assert [one["split"] for one in config["data_files"]] == ["train", "validation"]
    sizes = {999: "n<1K", 1000: "1K<n<10K", 10**6: "1M<n<10M", 5 * 10**6: "1M<n<10M", 10**7: "10M<n<100M"}
    assert {rows: publishing.size_category(rows) for rows in sizes} == sizes


def test_values_of_others_bring_no_html_and_no_control_characters_into_a_card():
    assert cell("<img src=x> |\n# Heading \x1b[31m\u202e 1 & 2") == "&lt;img src=x> \\| # Heading �[31m� 1 & 2"


def test_the_card_says_how_the_dataset_was_made(finished):
    card = (finished / "dataset" / "README.md").read_text()
    texts = [
        "# Mine | ours",
        "Functions of six repositories.",
        "Of 35 answers,",
        "at least 0.7",
        '| body | {"seed": 7} |',
    ]
    for text in [*texts, "| revision | a1b2c3 |", "| reason |", "| tokens written | 175 |", "| rensa | "]:
        assert text in card
    lines = [line for line in card.splitlines() if line.startswith("|")]
    for before, line in pairwise(lines):
        if line.startswith("|---"):
            assert before.count("|") == line.count("|")
    assert "{{" not in card.partition("The prompt:")[0]
    assert "\n\n\n" not in card


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "translated once, greedily, to a language drawn uniformly from the others."),
        ({"options": {"body": {"temperature": 0.7}}}, "translated once, to"),
        ({"targets": ["cpp", "go"]}, "drawn uniformly from Go, C++, without its own."),
    ],
)
def test_the_card_says_greedily_and_all_languages_only_where_that_is_so_and_has_no_empty_table(
    finished, card_arguments, changes, sentence
):
    settings, reports = card_arguments["settings"], card_arguments["reports"]
    settings = settings | {"translations": settings["translations"] | changes}
    reports = reports | {"triplets": reports["triplets"] | {"rejected": {}}}
    card = dataset_card(**card_arguments | {"settings": settings, "reports": reports})
    assert sentence in card
    assert "| reason |" not in card
    assert "\n\n\n" not in card


def test_samples_and_average_lengths_are_those_of_each_language_and_side():
    statistics = dataset_statistics(
        [
            RetrievalExample("12345", (Snippet("python", "ab"), Snippet("cpp", "abcd"))),
            RetrievalExample("123", (Snippet("python", "abcd"), Snippet("go", "ab"))),
            RetrievalExample("1", (Snippet("go", "é" * 9), Snippet("cpp", "abcdef"))),
        ]
    )
    assert statistics.rows == 3
    assert statistics.original == {"python": CodeCounts(2, 3.0), "go": CodeCounts(1, 9.0)}
    assert statistics.synthetic == {"cpp": CodeCounts(2, 5.0), "go": CodeCounts(1, 2.0)}
    assert statistics.average_description_characters == 3.0
    assert statistics.to_markdown().splitlines()[2:] == [
        "| Python | 2 | 3 | 0 | 0 |",
        "| Go | 1 | 9 | 1 | 2 |",
        "| C++ | 0 | 0 | 2 | 5 |",
        "| all | 3 | 5 | 3 | 4 |",
    ]
    assert dataset_statistics([]).to_markdown().splitlines()[2:] == ["| all | 0 | 0 | 0 | 0 |"]
