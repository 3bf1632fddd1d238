from concurrent.futures import ThreadPoolExecutor
from threading import Event, Semaphore

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from modular_star_encoder.data.finetuning_rows import RetrievalTexts
from modular_star_encoder.data.pairs import RetrievalExample, Snippet
from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.inference.checkpoints import load_checkpoint, save_retrieval_checkpoint
from modular_star_encoder.inference.encode import encode_exits, tokenize
from tests.errors import raises
from tests.tiny import EXIT_LAYERS, PROJECTION_SIZE, run, save_tiny_checkpoint, tiny_model

TEXTS = ["return x", "def add(first, second):\n    return first + second", "", "x", "return first + second - third"]


def encode(model, tokenizer, texts, **options):
    return encode_exits(model, tokenizer, texts, progress=False, **options)


class Spy(torch.nn.Module):
    """Passes calls on to a model and notes the shapes of their inputs."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.shapes = model, model.config, []

    def forward(self, input_ids, **inputs):
        self.shapes.append(tuple(input_ids.shape))
        self.was_training, self.had_gradients = self.inner.training, torch.is_grad_enabled()
        return self.inner(input_ids, **inputs)


def test_every_exit_equals_the_model_called_with_one_text(model, tokenizer):
    embeddings = encode(model, tokenizer, TEXTS, tokens_per_batch=60)
    assert tuple(embeddings) == EXIT_LAYERS
    for exit_layer, stack in embeddings.items():
        assert stack.shape == (len(TEXTS), PROJECTION_SIZE)
        assert stack.dtype == np.float32
        for text, embedding in zip(TEXTS, stack, strict=True):
            inputs = {name: tokenizer(text, return_tensors="pt")[name] for name in ("input_ids", "attention_mask")}
            alone = run(model, **inputs, exit_layer=exit_layer).sentence_embedding
            assert np.allclose(alone[0].numpy(), embedding, atol=1e-5)
    assert not np.allclose(embeddings[1], embeddings[4], atol=0.1)


def test_threads_may_share_a_model_and_its_tokenizer(model, tokenizer, tmp_path):
    model.eval()
    stock = SentenceTransformer(str(save_retrieval_checkpoint(model, tokenizer, tmp_path / "model")))
    texts = [[*TEXTS[number % 3 :], "x = 1\n" * (1 + number % 7)] for number in range(32)]
    with ThreadPoolExecutor(8) as pool:
        ours = pool.map(lambda some: encode(model, tokenizer, some, max_length=12)[4], texts)
        theirs = pool.map(lambda some: stock.encode(some, exit_layer=1 + len(some) % 2), texts)
        for some, one, other in zip(texts, ours, theirs, strict=True):
            assert np.allclose(one, encode(model, tokenizer, some, max_length=12)[4], atol=1e-6)
            assert np.allclose(other, stock.encode(some, exit_layer=1 + len(some) % 2), atol=1e-6)


def test_the_last_of_several_threads_restores_the_mode(model, tokenizer):
    class Waits(Spy):
        def forward(self, input_ids, **inputs):
            entered.release()
            assert may_leave[len(input_ids)].wait(60)
            return super().forward(input_ids, **inputs)

    entered, may_leave, spy = Semaphore(0), {1: Event(), 2: Event()}, Waits(model.train()).train()
    with ThreadPoolExecutor(2) as pool:
        calls = []
        for texts in (["x"], ["x", "y"]):
            calls.append(pool.submit(encode, spy, tokenizer, texts))
            assert entered.acquire(timeout=60)
        modes = []
        for count, call in enumerate(calls, 1):
            may_leave[count].set()
            call.result()
            modes.append(spy.training)
    assert modes == [False, True]


def test_batches_keep_to_the_token_budget_and_a_long_text_goes_alone(model, tokenizer):
    texts = ["return " * n for n in range(1, 30)] + ["first, second " * 15]
    spy = Spy(model)
    encode(spy, tokenizer, texts, tokens_per_batch=64)
    assert sum(rows for rows, _ in spy.shapes) == len(texts)
    assert all(rows == 1 or rows * length <= 64 for rows, length in spy.shapes)
    assert max(length for _, length in spy.shapes) > 64
    assert len(spy.shapes) < len(texts)


def test_equal_texts_also_of_a_generator_get_equal_embeddings_to_the_last_bit(model, tokenizer):
    spy = Spy(model)
    embeddings = encode(spy, tokenizer, (text for text in ("return x", "x", "return x")))[4]
    assert np.array_equal(embeddings[0], embeddings[2])
    assert not np.array_equal(embeddings[0], embeddings[1])
    assert spy.shapes[0][0] == 2


def test_long_texts_are_cut_to_max_length_and_by_default_to_what_the_model_reads(model, tokenizer):
    for options, expected in (({"max_length": 10}, 10), ({}, model.config.max_position_embeddings)):
        spy = Spy(model)
        encode(spy, tokenizer, ["first, second " * 200], **options)
        assert spy.shapes == [(1, expected)]


def test_the_requested_exits_are_given_in_ascending_order_and_no_texts_give_empty_arrays(model, tokenizer):
    assert tuple(encode(model, tokenizer, TEXTS, exit_layers=[2, 1])) == (1, 2)
    embeddings = encode(model, tokenizer, [])
    assert [(k, stack.shape) for k, stack in embeddings.items()] == [(k, (0, PROJECTION_SIZE)) for k in EXIT_LAYERS]


def test_texts_and_exits_that_cannot_be_encoded_are_an_error(model, tokenizer):
    with raises("encode.texts", "a list of strings", "return x"):
        encode(model, tokenizer, "return x")
    with raises("encode.texts.not_unicode", "1 of the texts", r"'a\ud800b'"):
        encode(model, tokenizer, ["whole \U0001f600", "a\ud800b"])
    with pytest.raises(ValueError, match="exit_layer 3 is not an exit of this model; its exits are 1, 2, 4"):
        encode(model, tokenizer, TEXTS, exit_layers=[3])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("texts", (None, 5, [None], [1], [b"a"], b"a", {"a": 1}, {"a"}, ["a", ["b"]])),
        ("exit_layers", (2,)),
        ("max_length", (0, -1, "9", 2.5, True)),
        ("tokens_per_batch", (0, "9")),
        ("prompt", (None, 5)),
        ("tokenizer", (None, "mose-code")),
        ("model", (None, "mose-code")),
    ],
)
def test_an_argument_of_a_wrong_type_or_below_1_is_named(model, tokenizer, name, values):
    for value in values:
        arguments = {"model": model, "tokenizer": tokenizer, "texts": ["a"], name: value}
        with raises(f"encode.{name}", f"{name} must be"):
            encode(**arguments)


def test_the_model_runs_in_evaluation_mode_and_is_left_as_it_was(model, tokenizer):
    spy = Spy(model).train()
    encode(spy, tokenizer, TEXTS)
    assert len(spy.shapes) == 1  # one pass gives all exits
    assert not spy.was_training
    assert not spy.had_gradients
    assert spy.inner.training
    assert torch.is_grad_enabled()


def test_dtype_computes_in_lower_precision_and_still_returns_float32(model, tokenizer):
    full, half = encode(model, tokenizer, TEXTS)[4], encode(model, tokenizer, TEXTS, dtype=torch.bfloat16)[4]
    assert half.dtype == np.float32
    assert not np.array_equal(full, half)
    assert np.allclose(full, half, atol=0.1)


def test_progress_is_shown_unless_it_is_switched_off(model, tokenizer, capsys):
    for progress in (False, True):
        encode_exits(model, tokenizer, TEXTS, progress=progress)
        assert ("encoding" in capsys.readouterr().err) == progress


SHORT_AND_LONG = ["x", "def f(a, b):\n    return a + b\n" * 3]


def tokens_through_the_layers(model, tokenizer, texts=SHORT_AND_LONG):
    """How many tokens an MLP sees of these texts; other threads see no changed setting meanwhile."""
    seen = []

    def see(module, inputs, output):
        seen.append(output[..., 0].numel())
        assert model.config.unpad_inputs is False

    hook = model.model.layers[0].mlp.register_forward_hook(see)
    encode(model, tokenizer, texts)
    hook.remove()
    return sum(seen)


def test_much_padding_is_skipped_and_little_is_computed(model, tokenizer):
    lengths = [len(ids) for ids in tokenizer(SHORT_AND_LONG)["input_ids"]]
    assert lengths[1] > 2 * lengths[0]
    assert tokens_through_the_layers(model, tokenizer) == sum(lengths)
    alike = ["x = 1\n" * 12, "x = 1\n" * 11]
    assert tokens_through_the_layers(model, tokenizer, alike) == 2 * len(tokenizer(alike[0])["input_ids"])
    legacy = tiny_model(pooling="legacy").eval()  # it may read padding
    assert tokens_through_the_layers(legacy, tokenizer) == 2 * max(lengths)


@pytest.mark.parametrize("instructions", [False, True])
def test_a_special_token_spelled_in_a_text_is_text_in_training_search_and_evaluation(instructions, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model", instruction_prompts=instructions)
    own, tokenizer = load_checkpoint(folder, device="cpu")
    code = 'def pad():\n    return "<pad>", "<mask>", "<cls>", "<sep>"\n'
    examples = [RetrievalExample("About <sep>", (Snippet("python", code),))]
    rows = RetrievalTexts(examples, tokenizer, max_code_tokens=128, prompts=instructions, progress=False)
    trained = [rows.tokens(0, None).tolist(), rows.tokens(0, 0).tolist()]
    prompts = text_prompt(instructions=instructions), code_prompt("python", instructions=instructions)
    for prompt, text, ids in zip(prompts, ("About <sep>", code), trained, strict=True):
        assert tokenize(tokenizer, [prompt + text], 128, False) == [ids]  # as evaluation, search and ONNX do
        assert tokenize(tokenizer, [text], 128, False, prompt=prompt) == [ids]
        assert tokenize(tokenizer, [prompt + text], len(ids) - 2, False) == [[*ids[:-3], ids[-1]]]
        for length in (1, 2, 3):  # a prompt alone may have more tokens
            cut = tokenize(tokenizer, [text], length, False, prompt=prompt)
            assert cut == [[*ids[: length - 1], ids[-1]] if length > 1 else ids[:1]]
    if not instructions:  # stock libraries read prompt and text as one
        assert tokenizer(code)["input_ids"] == trained[1]
        stock = SentenceTransformer(str(folder), device="cpu")
        assert np.allclose(stock.encode([code]), encode_exits(own, tokenizer, [code], progress=False)[4], atol=1e-6)
