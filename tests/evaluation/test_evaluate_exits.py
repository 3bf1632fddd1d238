import numpy as np
import pytest
import torch

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.evaluation.run import evaluate_exits
from modular_star_encoder.inference.encode import encode_exits
from tests.evaluation.samples import code_rows, reciprocal_ranks

LANGUAGES = {"file": "python", "socket": "python", "user": "ruby", "header": "ruby"}
ROWS = code_rows(("add", "remove", "find", "print"), LANGUAGES)


@pytest.fixture
def report(model, tokenizer):
    return evaluate_exits(model, tokenizer, ROWS, size=8, untrained=True, progress=False)


def by_exit(report, retriever):
    return {one.exit_layer: one.estimates for one in report.results if one.retriever == retriever}


def test_each_exit_is_scored_with_the_published_prompts(model, tokenizer, report):
    queries = encode_exits(model, tokenizer, [text_prompt() + row[0] for row in ROWS], progress=False)
    codes = encode_exits(model, tokenizer, [code_prompt(row[2]) + row[1] for row in ROWS], progress=False)
    found = by_exit(report, "model")
    assert list(found) == [1, 2, 4]
    for exit_layer, estimates in found.items():
        expected = reciprocal_ranks(queries[exit_layer], codes[exit_layer], size=8)
        mrr = estimates["mrr"]
        assert mrr.value == pytest.approx(expected.mean(), abs=1e-9)
        assert estimates["recall@1"].value == np.mean(expected == 1)
        assert mrr.low <= mrr.value <= mrr.high
    assert {(len(one.values), one.candidates) for one in report.results} == {(16, 8)}
    assert by_exit(report, "BM25")[None]["mrr"].value == 1  # a description shares two words with its own code only


def test_the_untrained_model_follows_the_seed_and_neither_the_weights_nor_the_callers_random_state(
    model, tokenizer, report
):
    assert list(by_exit(report, "model, untrained")) == [1, 2, 4]
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    after = evaluate_exits(model, tokenizer, ROWS, size=8, untrained=True, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert by_exit(after, "model, untrained") == by_exit(report, "model, untrained")
    assert after.quality()[4] == pytest.approx(1 / 8)  # everything ties


def test_only_the_requested_exits_are_evaluated(model, tokenizer):
    report = evaluate_exits(model, tokenizer, ROWS, exit_layers=(2,), progress=False)
    assert [(one.retriever, one.exit_layer) for one in report.results] == [("model", 2), ("BM25", None)]
    with pytest.raises(ValueError, match="its exits are 1, 2, 4"):
        evaluate_exits(model, tokenizer, ROWS, exit_layers=(3,), progress=False)
