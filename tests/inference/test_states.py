import numpy as np
import pytest

from modular_star_encoder.inference.encode import encode_exits, encode_states, resume_states
from tests.tiny import tiny_model

TEXTS = ["def add(first, second):\n    return first + second", "x", "return second " * 9, ""]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("unpad", [False, True])
def test_a_resumed_pass_gives_the_embeddings_of_a_straight_one(tokenizer, side, unpad, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    model = tiny_model(unpad_inputs=unpad)
    straight = encode_exits(model, tokenizer, TEXTS, progress=False)
    embeddings, states = encode_states(model, tokenizer, TEXTS, (1, 2))
    assert list(embeddings) == [1, 2]
    for exit_layer, values in embeddings.items():
        np.testing.assert_allclose(values, straight[exit_layer], atol=1e-5)
    assert [len(one) for one in states] == [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    for deep in (2, 4):
        np.testing.assert_allclose(resume_states(model, states, 1, deep), straight[deep], atol=1e-5)
    assert np.abs(straight[4] - straight[1]).max() > 0.1
