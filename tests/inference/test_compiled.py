import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.exc import BackendCompilerFailed

from modular_star_encoder.inference import encode
from modular_star_encoder.inference.encode import _in_chunks, compile_for_inference
from tests.errors import raises
from tests.tiny import tiny_batch, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "TOKENS_PER_CHUNK", 8)
        yield


@pytest.fixture(scope="module")
def pair(small_chunks):
    model = tiny_model(exit_layers=(1, 2), num_hidden_layers=2).bfloat16().eval()
    return model, compile_for_inference(model, progress=False)


@torch.inference_mode()
def embeddings(model, batch, **options):
    return model(**batch, exit_layers=(1, 2), **options).exit_embeddings.float()


@pytest.mark.parametrize("lengths", [(12, 7, 3), (2,), (1,), (5, 5, 5, 5, 5, 5, 5)])
@pytest.mark.parametrize("unpad", [False, True])
def test_a_compiled_model_gives_the_same_embeddings_up_to_rounding(pair, lengths, unpad):
    model, compiled = pair
    batch = tiny_batch(lengths=lengths)
    compiled.config.unpad_inputs = unpad
    # bfloat16 has 8 bits: neighbours of numbers up to 1 are up to 2**-8 apart.
    torch.testing.assert_close(embeddings(compiled, batch), embeddings(model, batch), atol=2**-6, rtol=0)


def test_compiled_code_runs_for_inference_alone_in_parts_of_equal_length():
    parts = []
    forward = _in_chunks(lambda states: states + 1, lambda part: parts.append(len(part)) or part + 2)
    states = torch.zeros(2, 9, 3)
    assert torch.equal(forward(states), states + 1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(forward(states), states + 1)
    assert not parts
    with torch.inference_mode():
        assert torch.equal(forward(states), states + 2)
        assert torch.equal(forward(states[:1, :1]), states[:1, :1] + 1)
    assert parts == [6, 6, 6]


def test_the_model_given_stays_as_it_is_and_both_share_and_save_the_same_tensors(pair, tmp_path):
    model, compiled = pair
    compiled(**tiny_batch()).sentence_embedding.float().sum().backward()  # outside inference mode, it still learns
    assert compiled.model.layers[0].mlp.c_fc.weight.grad.any()
    compiled.zero_grad()
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert compiled.model.layers[0].mlp.c_fc.weight is model.model.layers[0].mlp.c_fc.weight
    compiled.save_pretrained(tmp_path)
    saved, own = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in own)


def test_other_devices_and_a_failing_compiler_are_one_sentence(monkeypatch):
    with raises("compile.device", "meta"):
        compile_for_inference(tiny_model().to("meta"))

    def fail(states):
        raise BackendCompilerFailed(fail, RuntimeError("no compiler\nand much more"), None)

    monkeypatch.setattr(torch, "compile", lambda forward, **options: fail)
    with raises("compile.failed", "no compiler"):
        compile_for_inference(tiny_model(), progress=False)
