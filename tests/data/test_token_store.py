import dataclasses
import json
import os
import pickle
import pkgutil
import signal

import numpy as np
import pytest
import torch

from modular_star_encoder.data import token_store
from modular_star_encoder.data.in_context import InContextPairs
from modular_star_encoder.data.sources import SourceFile
from modular_star_encoder.data.token_store import TokenStore, build_token_store
from modular_star_encoder.data.tokenizer import encode_content, train_tokenizer
from tests.data.samples import corpus_of, repository_texts, small_tokenizer
from tests.errors import raises
from tests.processes import ended_by_sigkill, start_process


def source_files(repositories=6, texts=5):
    """The last repository comes back at the end, as in a corpus that is sorted by nothing."""
    files = [
        SourceFile(name, f"{i}.py", ("python", "rust")[i % 2], text)
        for name, texts in repository_texts(repositories, texts).items()
        for i, text in enumerate(texts)
    ]
    special = SourceFile("a\nname", "special.py", "python", "<sep> and <cls> and é\n" * 9)
    return [*files[:7], special, SourceFile("repo1", "empty.py", "c", ""), *files[7:], files[0]]


@pytest.fixture(autouse=True, scope="module")
def commits_of_four_files():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(token_store, "_FILES_PER_COMMIT", 4)
        yield


def build(folder, tokenizer, files=None):
    files = source_files() if files is None else files
    return build_token_store(files, tokenizer, folder, progress=False)


def content(folder):
    """Every byte that counts."""
    state = json.loads((folder / "state.json").read_text())
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.name != "state.json"}, state


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("whole")
    build(folder, tokenizer)
    return content(folder)


def test_a_store_holds_every_text_with_its_repository_and_language(tmp_path, tokenizer):
    files = source_files()
    store = build(tmp_path / "store", tokenizer, iter(files))
    expected = encode_content(tokenizer, [file.text for file in files], progress=False)
    assert len(store) == len(store.rows) == len(files)
    assert isinstance(store.rows[0].base.base, np.memmap)
    for i, file in enumerate(files):
        assert store.rows[i].tolist() == expected[i].tolist()
        assert store.repository_names[store.repository_of[i]] == file.repository
        assert store.language_names[store.language_of[i]] == file.language
    assert set(store.repositories) == {file.repository for file in files}


@pytest.mark.slow
def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(2**16)])
    store = build(tmp_path, tokenizer, [SourceFile("r", "f", "python", "word65535 word1")])
    assert store.rows[0].dtype == np.uint32
    assert store.rows[0].max() > 2**16 - 1


def build_until(folder, tokenizer, after):
    """Build; Ctrl-C ends the reading of the files at file number `after`."""

    def dying():
        for i, file in enumerate(source_files()):
            if i == after:
                raise KeyboardInterrupt
            yield file

    with pytest.raises(KeyboardInterrupt):
        build(folder, tokenizer, dying())


def build_and_die(folder, tokenizer, moment, count):
    """Build in a process that kills itself at the `count`-th call of something that building calls."""
    owner, name = pkgutil.resolve_name(moment.rpartition(".")[0]), moment.rpartition(".")[2]
    original, calls = getattr(owner, name), []

    def dies(*args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dies)
    token_store._FILES_PER_COMMIT = 4
    build(folder, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    "moment",
    ["os.replace", "os.fsync", f"{token_store.__name__}._Writer.append", f"{token_store.__name__}._digest"],
    ids=lambda moment: moment.rpartition(".")[2],
)
def test_a_killed_build_resumes_to_the_same_store(tmp_path, tokenizer, whole, moment, count):
    """Killed with SIGKILL: before a state takes its place, between files, with rows written and not counted."""
    assert ended_by_sigkill(start_process(build_and_die, tmp_path, tokenizer, moment, count))
    with raises("data.token_store.missing"):
        TokenStore(tmp_path)
    build(tmp_path, tokenizer)
    assert content(tmp_path) == whole


@pytest.mark.parametrize("after", [0, 3, 4, 9, 31])
def test_an_interrupted_build_resumes_to_the_same_store_without_half_written_rows(tmp_path, tokenizer, whole, after):
    build_until(tmp_path, tokenizer, after)
    for name in whole[0]:
        with (tmp_path / name).open("ab") as output:
            output.write(b"half a row")
    build(tmp_path, tokenizer)
    assert content(tmp_path) == whole


def test_what_is_stored_is_not_tokenized_again(tmp_path, tokenizer, monkeypatch):
    build_until(tmp_path, tokenizer, 9)
    tokenized = []
    writer, original = token_store._Writer, token_store._Writer.append
    monkeypatch.setattr(writer, "append", lambda self, files: tokenized.extend(files) or original(self, files))
    build(tmp_path, tokenizer)
    assert tokenized == source_files()[8:]
    assert len(build(tmp_path, tokenizer, iter(lambda: 1 / 0, None))) == len(source_files())  # no file is read


def test_another_tokenizer_is_refused_and_the_same_saved_and_loaded_is_accepted(tmp_path, tokenizer):
    build_until(tmp_path / "store", tokenizer, 9)
    other = train_tokenizer(["other words altogether"], 300, progress=False)
    with raises("data.token_store.other_tokenizer"):
        build(tmp_path / "store", other)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = type(tokenizer).from_pretrained(tmp_path / "tokenizer")
    loaded("used with truncation", truncation=True, max_length=4, padding="max_length")
    store = build(tmp_path / "store", loaded)
    InContextPairs(store, tokenizer, length=1, max_tokens=96, seed=0)
    with raises("data.token_store.other_tokenizer"):
        build(tmp_path / "store", other)
    with raises("data.in_context.other_tokenizer"):
        InContextPairs(store, other, length=1, max_tokens=96, seed=0)


def test_resuming_with_other_files_is_refused(tmp_path, tokenizer):
    build_until(tmp_path, tokenizer, 9)
    first, *rest = source_files()
    changed = [[dataclasses.replace(first, **{name: "changed"}), *rest] for name in ("text", "repository")]
    for files in (rest, [first, *rest[:2]], *changed):
        with raises("data.token_store.other_files"):
            build(tmp_path, tokenizer, files)
    build(tmp_path, tokenizer)


def test_folders_without_a_whole_store_are_refused_and_a_store_of_nothing_opens(tmp_path, tokenizer):
    with raises("data.token_store.missing"):
        TokenStore(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("mine")
    with raises("data.token_store.other_content"):
        build(tmp_path, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    build(tmp_path / "cut", tokenizer)
    os.truncate(tmp_path / "cut" / "tokens.bin", 100)
    with raises("data.token_store.damaged"):
        TokenStore(tmp_path / "cut")
    assert len(build(tmp_path / "empty", tokenizer, [])) == 0


@pytest.mark.slow
def test_a_dataset_sent_to_another_process_opens_the_store_there(tmp_path, tokenizer):
    big = [dataclasses.replace(file, text=file.text * 200) for file in source_files()]
    pairs = InContextPairs(build(tmp_path, tokenizer, big), tokenizer, length=9, max_tokens=96, seed=0)
    sent = pickle.dumps(pairs)
    assert len(sent) < (tmp_path / "tokens.bin").stat().st_size / 10
    for one, other in zip(pickle.loads(sent), pairs, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_split_shares_no_repository_and_loses_no_text(tmp_path, tokenizer):
    store = build(tmp_path, tokenizer, source_files(repositories=20))
    left, held_out = store.split(0.3, seed=0)
    assert len(held_out.repositories) == 6
    assert set(left.repositories) | set(held_out.repositories) == set(store.repositories)
    assert not set(left.repositories) & set(held_out.repositories)
    assert sorted([*left.row_numbers, *held_out.row_numbers]) == list(range(len(store)))
    for part in (left, held_out):
        pairs = InContextPairs(part, tokenizer, length=100, max_tokens=96, seed=0)
        assert set(pairs.repositories) <= set(part.repositories)
        expected = sum(np.bincount(part.rows[i], minlength=len(tokenizer)) for i in part.row_numbers)
        assert pairs.token_counts().tolist() == expected.tolist()


def test_a_split_leaves_and_holds_out_two_repositories_if_it_can(tokenizer):
    for repositories, least in ((9, 2), (4, 2), (2, 1)):
        corpus = corpus_of(source_files(repositories=repositories), tokenizer)
        assert len(corpus.split(0.01, seed=0)[1].repositories) == least
        assert len(corpus.split(0.99, seed=0)[0].repositories) == least
    with raises("data.split.too_few_repositories", 1):
        corpus.split(0.01, seed=0)[1].split(0.5, seed=0)
