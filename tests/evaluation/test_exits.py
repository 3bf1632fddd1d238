import json

import numpy as np
import pytest
import torch

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.evaluation.exits import RetrievalRow, evaluate_exits, format_table
from modular_star_encoder.evaluation.scores import cosine_scores
from modular_star_encoder.evaluation.tasks import distractor_batches
from modular_star_encoder.inference.encode import encode_exits
from tests.evaluation import brute_force

ROWS = [
    RetrievalRow(f"{verb} the {noun}", f"def {verb}_{noun}():\n    return {noun}", language)
    for verb in ("add", "remove", "find", "print")
    for noun, language in (("file", "python"), ("socket", "python"), ("user", "ruby"), ("header", "ruby"))
]


@pytest.fixture
def results(model, tokenizer):
    return evaluate_exits(model, tokenizer, ROWS, size=8, untrained=True, progress=False)


def test_each_exit_is_scored_with_the_published_prompts(model, tokenizer, results):
    queries = encode_exits(model, tokenizer, [text_prompt() + row.description for row in ROWS], progress=False)
    codes = encode_exits(model, tokenizer, [code_prompt(row.language) + row.code for row in ROWS], progress=False)
    assert list(results.exits) == [1, 2, 4]
    for exit_layer, scores in results.exits.items():
        reciprocal = []
        for batch in distractor_batches(16, size=8):
            matrix = cosine_scores(queries[exit_layer][batch], codes[exit_layer][batch])
            reciprocal += [
                brute_force.reciprocal_rank(row, gains) for row, gains in zip(matrix, np.eye(8), strict=True)
            ]
        assert scores.mrr == pytest.approx(np.mean(reciprocal), abs=1e-9)
        assert scores.recall_at_1 == np.mean(np.array(reciprocal) == 1)
        assert scores.interval[0] <= scores.mrr <= scores.interval[1]
        assert (scores.queries, scores.distractors) == (16, 7)


def test_bm25_is_measured_on_the_same_batches(results):
    assert results.bm25.mrr == 1  # every description shares two words with its own code only
    assert (results.bm25.queries, results.bm25.distractors) == (16, 7)


def test_untrained_covers_the_same_exits_and_only_on_request(model, tokenizer, results):
    assert list(results.untrained) == [1, 2, 4]
    assert evaluate_exits(model, tokenizer, ROWS, size=8, progress=False).untrained == {}


def test_untrained_does_not_see_the_trained_weights(model, tokenizer, results):
    for parameter in model.parameters():
        parameter.data.zero_()
    after = evaluate_exits(model, tokenizer, ROWS, size=8, untrained=True, progress=False)
    assert after.untrained == results.untrained
    assert after.exits[4].mrr == pytest.approx(1 / 8)  # everything ties


def test_only_the_exits_asked_for_are_measured(model, tokenizer):
    results = evaluate_exits(model, tokenizer, ROWS, exit_layers=(2,), progress=False)
    assert list(results.exits) == [2]
    with pytest.raises(ValueError, match="its exits are 1, 2, 4"):
        evaluate_exits(model, tokenizer, ROWS, exit_layers=(3,), progress=False)


def test_results_survive_json(results):
    data = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert data["exits"]["4"]["mrr"] == results.exits[4].mrr
    assert data["exits"]["4"]["interval"] == list(results.exits[4].interval)
    assert set(data) == {"exits", "bm25", "untrained"}


def test_the_table_has_a_row_for_each_system_and_states_the_protocol(results):
    lines = format_table(results).splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:9]]
    assert names == ["BM25", *(f"untrained, exit {k}" for k in (1, 2, 4)), *(f"exit {k}" for k in (1, 2, 4))]
    assert len({len(line) for line in lines[:9]}) == 1
    assert f"{100 * results.exits[4].mrr:.1f}" in lines[8]
    assert lines[-1] == "16 queries, 7 distractors each, ties count against the system."


def test_untrained_weights_follow_the_seed_and_not_the_callers_random_state(model, tokenizer, results):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = evaluate_exits(model, tokenizer, ROWS, size=8, untrained=True, progress=False)
    assert again.untrained == results.untrained
    assert torch.equal(before, torch.get_rng_state())
