import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.search import cascade as margins
from modular_star_encoder.search import embedder
from modular_star_encoder.search.cascade import fit_margin, fitted_margin
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.ranking import Cascade
from tests.errors import raises
from tests.search.samples import build, stored_rows, write_code

QUESTION = "put an item on top"


@pytest.fixture(scope="module")
def code_folder(tmp_path_factory):
    verbs = ("push", "pop", "peek", "clear", "count", "find")
    source = "".join(
        f'def {verb}_{noun}(items, value):\n    """{verb.title()} the {noun} of a list."""\n'
        f"    {noun} = items.{verb}(value)\n    return {noun}, {len(verb) * len(noun)}\n\n\n"
        for verb in verbs
        for noun in ("head", "tail", "middle")
    )
    return write_code(tmp_path_factory.mktemp("cascade") / "code", {"lists.py": source})


@pytest.fixture(scope="module")
def indexes(code_folder, checkpoint, tmp_path_factory):
    """Three ways to have deep embeddings: from text, from states that were kept, from the index."""
    folder = tmp_path_factory.mktemp("indexes")
    options = {
        "text": {"exit_layer": 1},
        "states": {"exit_layer": 1, "states": True},
        "stored": {"exit_layers": (1, 4)},
    }
    return {name: build(code_folder, folder / name, checkpoint, **chosen) for name, chosen in options.items()}


def similarities(index, checkpoint, exit_layer):
    """text → similarity to the question, without the index."""
    rows = stored_rows(index.store.location)
    model, tokenizer = load_checkpoint(checkpoint)
    texts = [text_prompt() + QUESTION, *(code_prompt("python") + row["text"] for row in rows)]
    vectors = encode_exits(model, tokenizer, texts, exit_layers=(exit_layer,), progress=False)[exit_layer]
    return dict(zip([row["text"] for row in rows], vectors[1:] @ vectors[0], strict=True))


@pytest.mark.parametrize("way", ["text", "states", "stored"])
def test_the_best_of_the_shallow_exit_are_ranked_by_the_deep_one(indexes, checkpoint, way):
    shallow, deep = (similarities(indexes[way], checkpoint, exit_layer) for exit_layer in (1, 4))
    candidates = sorted(shallow, key=lambda text: -shallow[text])[:6]
    (answer,) = indexes[way].search([QUESTION], top_k=8, cascade=Cascade(4, candidates=6))
    expected = sorted(candidates, key=lambda text: -deep[text])
    assert [hit.text for hit in answer.hits[:6]] == expected
    assert expected != candidates
    assert [hit.score for hit in answer.hits[:6]] == pytest.approx([deep[text] for text in expected], abs=1e-5)
    assert [hit.text for hit in answer.hits[6:]] == sorted(shallow, key=lambda text: -shallow[text])[6:8]
    assert answer.reranked
    assert [hit.exit_layer for hit in answer.hits] == [4] * 6 + [1] * 2


@pytest.mark.parametrize(("way", "passes"), [("text", [[1, 4], [4]]), ("states", [[1, 4]]), ("stored", [[1, 4]])])
def test_the_question_is_embedded_once_and_only_candidates_go_deeper(indexes, monkeypatch, way, passes):
    encoded, resumed = [], []
    encode, resume = embedder.encode_exits, embedder.resume_states
    monkeypatch.setattr(
        embedder, "encode_exits", lambda *a, **o: encoded.append((len(a[2]), list(o["exit_layers"]))) or encode(*a, **o)
    )
    monkeypatch.setattr(
        embedder,
        "resume_states",
        lambda model, states, *a: resumed.append((len(states), *a)) or resume(model, states, *a),
    )
    index = CodeIndex.open(indexes[way].store.location)
    index.search([QUESTION], cascade=Cascade(4, candidates=6))
    assert encoded == [(1 if exits == [1, 4] else 6, exits) for exits in passes]
    assert resumed == ([(6, 1, 4)] if way == "states" else [])
    index.search([QUESTION], cascade=Cascade(4, candidates=6))
    assert encoded[len(passes) :] == [(1, [1, 4])]
    assert len(resumed) == (way == "states")


def test_the_deep_exit_runs_only_below_the_margin(indexes):
    index = indexes["text"]
    (plain,) = index.search([QUESTION])
    (sure,) = index.search([QUESTION], cascade=Cascade(4, 6, margin=plain.margin))
    assert not sure.reranked
    assert sure.hits == plain.hits
    (unsure,) = index.search([QUESTION], cascade=Cascade(4, 6, margin=plain.margin + 1e-4))
    assert unsure.reranked
    assert sure.margin == unsure.margin == pytest.approx(plain.margin)


def test_a_margin_is_fitted_on_the_index_s_own_descriptions(indexes):
    index, cascade = indexes["text"], Cascade(4, 6)
    fitted = fit_margin(index, cascade, progress=False)
    assert fitted.queries == 18
    rows = {row["description"]: row["text"] for row in stored_rows(index.store.location)}

    def quality(margin):
        answers = index.search(list(rows), top_k=6, cascade=replace(cascade, margin=margin))
        ranks = [[hit.text for hit in answer.hits] for answer in answers]
        found = [
            1 / (1 + rank.index(text)) if text in rank else 0 for rank, text in zip(ranks, rows.values(), strict=True)
        ]
        return np.mean(found), np.mean([answer.reranked for answer in answers])

    assert quality(fitted.margin) == pytest.approx((fitted.quality, fitted.share))
    assert quality(0.0) == pytest.approx((fitted.shallow_quality, 0))
    assert quality(None) == pytest.approx((fitted.deep_quality, 1))


def test_a_fitted_margin_is_kept_beside_the_index(indexes, monkeypatch):
    index, cascade = indexes["stored"], Cascade(4, 6)
    first = fitted_margin(index, cascade, progress=False)
    monkeypatch.setattr(margins, "fit_margin", lambda *_, **__: pytest.fail("fitted twice"))
    assert fitted_margin(index, cascade) == first
    file = index.store.folder / "margins.json"
    assert list(json.loads(file.read_text()).values()) == [first.to_dict()]
    file.write_text('{"a": 1}')
    with raises("search.margin.damaged", file):
        fitted_margin(index, cascade)
    file.unlink()


def test_a_margin_is_fitted_anew_for_an_index_built_anew(code_folder, checkpoint, tmp_path):
    code = shutil.copytree(code_folder, tmp_path / "code")
    options = {"location": tmp_path / "index", "checkpoint": checkpoint, "exit_layer": 1}
    assert fitted_margin(build(code, **options), Cascade(4, 6), progress=False).queries == 18
    write_code(code, {"lists.py": 'def first(items):\n    """The first of a list."""\n    return items[0]\n'})
    assert fitted_margin(build(code, **options, rebuild=True), Cascade(4, 6), progress=False).queries == 1


def test_a_margin_needs_descriptions(tmp_path, checkpoint):
    write_code(tmp_path / "code", {"a.py": "def f():\n    return 1\n"})
    index = build(tmp_path / "code", tmp_path / "index", checkpoint, exit_layer=1)
    with raises("search.margin.descriptions"):
        fit_margin(index, Cascade(4), progress=False)
    (answer,) = index.search(["f"], cascade=Cascade(4))
    assert (len(answer.hits), answer.margin, answer.reranked) == (1, None, False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cascade": Cascade(3)}, "3"),
        ({"cascade": Cascade(1)}, "Exit 1 cannot re-rank exit 1"),
        ({"cascade": Cascade(4), "exit_layer": 2}, "built at exit 1, not 2"),
    ],
)
def test_a_cascade_of_unsuitable_exits_is_refused(indexes, options, named):
    with pytest.raises(ValueError, match=named):
        indexes["text"].search([QUESTION], **options)
