import numpy as np
import pytest

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.inference import encode as encode_module
from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.search.embedder import Embedder
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.ranking import Cascade
from tests.search.conftest import build, embedded, stored_rows, write_code

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
    """Two ways to have deep embeddings: from text, and from the index."""
    folder = tmp_path_factory.mktemp("indexes")
    options = {"text": {"exit_layer": 1}, "stored": {"exit_layers": (1, 4)}}
    return {name: build(code_folder, folder / name, checkpoint, **chosen) for name, chosen in options.items()}


def similarities(index, checkpoint, exit_layer):
    """text → similarity to the question: of the vectors in the index, or of new ones for another exit."""
    rows = stored_rows(index.store.location)
    model, tokenizer = load_checkpoint(checkpoint)
    texts = [text_prompt() + QUESTION, *(code_prompt("python") + embedded(row) for row in rows)]
    question, *vectors = encode_exits(model, tokenizer, texts, exit_layers=(exit_layer,), progress=False)[exit_layer]
    scores = [np.dot(row.get(f"vector_{exit_layer}", one), question) for row, one in zip(rows, vectors, strict=True)]
    return dict(zip([row["text"] for row in rows], scores, strict=True))


@pytest.mark.parametrize("way", ["text", "stored"])
def test_the_best_of_the_shallow_exit_are_ranked_by_the_deep_one(indexes, checkpoint, way):
    shallow, deep = (similarities(indexes[way], checkpoint, exit_layer) for exit_layer in (1, 4))
    candidates = sorted(shallow, key=lambda text: -shallow[text])[:6]
    (answer,) = indexes[way].search([QUESTION], top_k=8, method="vector", cascade=Cascade(4, candidates=6))
    expected = sorted(candidates, key=lambda text: -deep[text])
    assert [hit.text for hit in answer.hits[:6]] == expected
    assert expected != candidates
    assert [hit.score for hit in answer.hits[:6]] == pytest.approx([deep[text] for text in expected], abs=1e-5)
    assert [hit.text for hit in answer.hits[6:]] == sorted(shallow, key=lambda text: -shallow[text])[6:8]
    assert (answer.reranked, [hit.exit_layer for hit in answer.hits]) == (True, [4] * 6 + [1] * 2)


@pytest.mark.parametrize(("way", "passes"), [("text", [[1, 4], [4]]), ("stored", [[1, 4]])])
def test_the_question_is_embedded_once_and_only_candidates_go_deeper(indexes, monkeypatch, way, passes):
    encoded, encode = [], encode_module.encode_exits

    def spy(model, tokenizer, texts, *, exit_layers, **options):
        encoded.append((len(texts), list(exit_layers)))
        return encode(model, tokenizer, texts, exit_layers=exit_layers, **options)

    monkeypatch.setattr(encode_module, "encode_exits", spy)
    index = CodeIndex.open(indexes[way].store.location)
    index.search([QUESTION], method="vector", cascade=Cascade(4, candidates=6))
    assert encoded == [(1 if exits == [1, 4] else 6, exits) for exits in passes]
    index.search([QUESTION], method="vector", cascade=Cascade(4, candidates=6))
    assert encoded[len(passes) :] == [(1, [1, 4])]


def test_the_deep_exit_runs_only_below_the_margin(indexes):
    index = indexes["text"]
    (plain,) = index.search([QUESTION], method="vector")
    (sure,) = index.search([QUESTION], method="vector", cascade=Cascade(4, 6, margin=plain.margin))
    assert (sure.reranked, sure.hits) == (False, plain.hits)
    (unsure,) = index.search([QUESTION], method="vector", cascade=Cascade(4, 6, margin=plain.margin + 1e-4))
    assert unsure.reranked
    assert sure.margin == unsure.margin == pytest.approx(plain.margin)


def test_the_rules_use_deep_similarities_of_the_best(indexes, checkpoint):
    shallow = indexes["stored"].search([QUESTION], top_k=18, exit_layer=1)[0]
    deep = {way: indexes[way].search([QUESTION], top_k=18, cascade=Cascade(4, 6))[0] for way in ("text", "stored")}
    assert [hit.name for hit in deep["text"].hits] == [hit.name for hit in deep["stored"].hits]
    assert sorted(hit.exit_layer for hit in deep["text"].hits) == [1] * 12 + [4] * 6
    assert {hit.name for hit in deep["text"].hits if hit.exit_layer == 4} == {hit.name for hit in shallow.hits[:6]}
    assert [hit.name for hit in deep["text"].hits] != [hit.name for hit in shallow.hits]


def test_one_row_has_no_margin_and_nothing_to_rank_again(tmp_path, checkpoint):
    write_code(tmp_path / "code", {"a.py": "def f():\n    return 1\n"})
    index = build(tmp_path / "code", tmp_path / "index", checkpoint, exit_layer=1)
    for method in ("vector", "hybrid"):
        (answer,) = index.search(["f"], method=method, cascade=Cascade(4))
        assert (len(answer.hits), answer.margin, answer.reranked) == (1, None, False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cascade": Cascade(3)}, "3"),
        ({"cascade": Cascade(1)}, "Exit 1 cannot re-rank hits of exit 1"),
        ({"cascade": Cascade(4), "exit_layer": 2}, "built at exit 1, not 2"),
    ],
)
def test_a_cascade_of_unsuitable_exits_is_refused(indexes, options, named):
    with pytest.raises(ValueError, match=named):
        indexes["text"].search([QUESTION], **options)


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("texts", [64, 65])
def test_only_many_texts_are_embedded_in_bfloat16_where_it_is_faster(checkpoint, monkeypatch, faster, texts):
    monkeypatch.setattr(encode_module, "bf16_is_faster", lambda device: faster)
    questions = [f"put item {i} on top" for i in range(texts)]
    found = Embedder(checkpoint).questions(questions, (1, 4), 8)[4]
    exact = encode_exits(*load_checkpoint(checkpoint), [text_prompt() + one for one in questions], progress=False)[4]
    exact = exact[:, :8] / np.linalg.norm(exact[:, :8], axis=1, keepdims=True)
    assert (np.abs(found - exact).max() > 1e-5) == (faster and texts > 64)
    np.testing.assert_allclose(found, exact, atol=0.05)
