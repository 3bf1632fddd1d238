"""The stand-in repositories behave as is documented of the published ones, by their own code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.prompts import CODE_INSTRUCTION, TEXT_INSTRUCTION
from tests.published.stand_in import SHAPE, own_code, published_text, write_stand_in

pytestmark = pytest.mark.slow

EXITS = SHAPE["matryoshka_layers"]
HIDDEN = SHAPE["hidden_size"]
KINDS = ("pretrained", "finetuned", "finetuned-3")

PUBLISHED_KEYS = """
architectures attention_dropout auto_map bos_token_id conditional_size embedding_dropout eos_token_id hidden_act
hidden_size initializer_range intermediate_size keys_to_ignore_at_inference layer_matryoshka_loss layer_norm_eps
matryoshka_layers max_position_embeddings mlp_type model_type norm_epsilon norm_type num_attention_heads
num_hidden_layers num_key_value_heads residual_dropout rope_theta sliding_window torch_dtype transformers_version
use_bias use_cache vocab_size
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return {kind: write_stand_in(folder / kind, kind) for kind in KINDS}


def load(folder):
    return own_code(folder).from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def tokenize(folder, *texts):
    """A batch of these texts, by default of three prompts."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = texts or (
        published_text(tokenizer, "def add(a, b): return a + b", CODE_INSTRUCTION.format(language="python")),
        published_text(tokenizer, "Add two numbers", TEXT_INSTRUCTION),
        published_text(tokenizer, "x"),
    )
    return tokenizer(list(texts), padding=True, return_tensors="pt")


@torch.inference_mode()
def run(model, batch):
    return model(batch["input_ids"], batch["attention_mask"])


CLEAN_PROCESS = """
import json, sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "modular_star_encoder":
            raise ModuleNotFoundError(fullname)

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModel, AutoTokenizer

results = []
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    text = f"{tokenizer.sep_token}x{tokenizer.cls_token}"
    output = model(**tokenizer([text, text + text], padding=True, return_tensors="pt"))
    results.append({
        "module": type(model).__module__.partition(".")[0],
        "padding": [tokenizer.padding_side, tokenizer.pad_token_id],
        "ids": tokenizer(text).input_ids,
        "fields": list(output.keys()),
    })
print(json.dumps(results))
"""


def test_the_auto_classes_run_the_repositorys_own_code_where_our_package_does_not_exist(repositories, tmp_path):
    process = subprocess.run(
        [sys.executable, "-P", "-c", CLEAN_PROCESS, *map(str, repositories.values())],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    embeddings = ["projected_pooled_normalized", "raw_hidden_states"]
    states = ["last_hidden_state", "hidden_states", "prediction_logits", "seq_relationship_logits"]
    for result, fields in zip(json.loads(process.stdout), (states, embeddings, embeddings), strict=True):
        assert (result["module"], result["fields"]) == ("transformers_modules", fields)
        assert result["padding"] == ["left", 0]
        # Special tokens in a text count as such.
        assert len(result["ids"]) == 3
        assert result["ids"][2] == result["ids"][0] + 1


def test_the_configuration_has_the_published_keys_and_oddities(repositories, tmp_path):
    for folder in repositories.values():
        config = json.loads((folder / "config.json").read_text())
        assert set(config) == set(PUBLISHED_KEYS.split())
        assert config["architectures"] == ["ModularStarEncoder"]
        assert config["keys_to_ignore_at_inference"] == "past_key_values"
        assert config["matryoshka_layers"] == EXITS
        assert config["conditional_size"] == [4]
    cut = write_stand_in(tmp_path / "cut", "finetuned-3", depth=3, listed=())
    config = json.loads((cut / "config.json").read_text())
    assert (config["num_hidden_layers"], config["conditional_size"]) == (3, 4)
