"""The pipelines of transformers serve our models."""

import pytest
import torch
from transformers import pipeline

from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderForSequenceClassification,
    ModularStarEncoderModel,
)
from tests.tiny import PROJECTION_SIZE, tiny_model

TEXT = "def add(first, second):\n    return first"


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Write a checkpoint of a class with a tokenizer; give its folder and the model."""

    def save(model_class, **changes):
        model = tiny_model(model_class, **changes).eval()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path), model

    return save


def serve(task, folder):
    return pipeline(task, model=folder, tokenizer=folder, device="cpu")


def test_fill_mask_names_the_most_likely_tokens_at_the_mask(saved, tokenizer):
    folder, model = saved(ModularStarEncoderForPreTraining)
    text = f"def add(first, {tokenizer.mask_token}):"
    answers = serve("fill-mask", folder)(text, top_k=3)
    batch = tokenizer(text, return_tensors="pt")
    place = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
    with torch.inference_mode():
        expected = model(**batch).logits[0, place].softmax(-1).topk(3)
    assert [answer["token"] for answer in answers] == expected.indices.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(expected.values.tolist())


@pytest.mark.parametrize(
    ("model_class", "size"), [(ModularStarEncoderModel, 32), (ModularStarEncoderForRetrieval, PROJECTION_SIZE)]
)
def test_feature_extraction_gives_the_last_hidden_state(saved, tokenizer, model_class, size):
    folder, model = saved(model_class)
    features = serve("feature-extraction", folder)(TEXT, return_tensors=True)
    batch = tokenizer(TEXT, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**batch).last_hidden_state
    assert features.shape == (1, batch["input_ids"].shape[1], size)
    torch.testing.assert_close(features, expected)


def test_text_classification_gives_every_label_its_probability_for_a_pair(saved, tokenizer):
    names = {0: "different", 1: "clone", 2: "unsure"}
    folder, model = saved(ModularStarEncoderForSequenceClassification, id2label=names)
    answers = serve("text-classification", folder)({"text": TEXT, "text_pair": "x = 1"}, top_k=None)
    with torch.inference_mode():
        expected = model(**tokenizer(TEXT, "x = 1", return_tensors="pt")).logits[0].softmax(-1)
    scores = {answer["label"]: answer["score"] for answer in answers}
    assert scores == pytest.approx({name: expected[index].item() for index, name in names.items()})
