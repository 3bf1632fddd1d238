"""Small random repositories laid out as the published ones are, with remote code that runs by itself.

No published file is copied: names, keys, shapes and behaviour follow what is documented publicly about
huggingface.co/modularStarEncoder, and whatever is not documented is a keyword of `write_stand_in`.
"""

import importlib
import json
import sys
import types
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.prompts import CODE_INSTRUCTION, LANGUAGES, TEXT_INSTRUCTION

REMOTE_CODE = Path(__file__).parent / "remote_code"
END_OF_TEXT = "<|endoftext|>"
SEP, CLS, MASK = "<SEP>", "<CLS>", "<MASK>"

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "matryoshka_layers": [1, 2, 3, 5, 6]}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "conditional_size": 4}

# What the remote code does and how it names its tensors; the values are the likeliest reading of the published ones.
VARIANT = {
    "heads": "cls",  # or "head": the prefix of the pre-training heads
    "transform_norm": "LayerNorm",  # or "layer_norm"
    "vocabulary_bias": "predictions.bias",  # or "predictions.decoder.bias"; None: the upload without one
    "pooler_in_heads": False,  # True: "cls.pooler.dense" in place of "pooler.dense"
    "module_prefix": True,  # "starEncoder2.module.projection_heads" or, with False, "starEncoder2.projection_heads"
    "head_activation": "leaky_relu",
    "final_norm": "idle",  # of a cut repository; also "applied", "absent". At full depth always "applied"
    "norm_at_every_exit": False,
    "is_causal": False,
    "pooler_position": "last",  # or "first"
    "pooling": "mean",  # or "lasttoken", "legacy"
    "projection_order": "project_then_pool",  # or "pool_then_project"
    "embedding_normalization": "l2",  # or "clip"
}


def write_stand_in(
    folder, kind, *, seed=0, dtype=torch.bfloat16, cut_head_index=0, depth=None, listed=("conditional_size",), **options
):
    """Write a repository and return its folder.

    Args:
        kind: "pretrained", "finetuned", or "finetuned-<k>", the first k layers with one head. With the same seed, the
            tensors that a cut repository shares with the full one are equal to its own.
        cut_head_index: number that a cut repository gives to its only head.
        depth: `num_hidden_layers` of the configuration; by default the full depth, in a cut repository too.
        listed: keys of config.json that are written as a list of one value.
        options: keys of `SHAPE` and `VARIANT`.
    """
    assert set(options) <= {*SHAPE, *VARIANT}, options
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPE | {key: value for key, value in options.items() if key in SHAPE}
    variant = describe_variant(kind, shape, cut_head_index, options)
    tokenizer = write_tokenizer(folder, shape["max_position_embeddings"])
    variant["sep_token_id"] = tokenizer.sep_token_id
    shape["vocab_size"] = len(tokenizer) + 1  # the last row of the published embedding has no token either
    for source in sorted(REMOTE_CODE.glob("*.py")):
        text = source.read_text(encoding="utf-8").replace("\nVARIANT = {}\n", f"\nVARIANT = {variant!r}\n")
        (folder / source.name).write_text(text, encoding="utf-8")
    tensors = {name: _random(name, size, variant, seed, dtype) for name, size in tensor_shapes(shape, variant).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, shape | ({"num_hidden_layers": depth} if depth else {}), dtype, listed)
    return folder


def describe_variant(kind, shape=SHAPE, cut_head_index=0, options=None):
    """`VARIANT` with the changes in `options`, and the exits and heads of a repository of this kind."""
    variant = VARIANT | {key: value for key, value in (options or {}).items() if key in VARIANT}
    exits = list(shape["matryoshka_layers"])
    name, _, cut_at = kind.partition("-")
    variant |= {"kind": name, "exit_layers": exits, "head_indices": list(range(len(exits)))}
    if cut_at:
        variant |= {"kind": "cut", "exit_layers": [int(cut_at)], "head_indices": [cut_head_index]}
    if variant["exit_layers"][-1] == exits[-1]:
        variant["final_norm"] = "applied"
    return variant


def own_code(folder):
    """The repository's model class, imported from its own files into this process, past the Auto classes.

    With our package installed they would give our class, whatever `trust_remote_code` says.
    """
    name = f"stand_in_{zlib.crc32(str(Path(folder).resolve()).encode()):x}"
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.modularStarEncoder").ModularStarEncoder


def write_tokenizer(folder, max_length):
    """Byte-level BPE that pads on the left with <|endoftext|>, id 0; three tokens are added behind the vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    texts = [TEXT_INSTRUCTION, *(CODE_INSTRUCTION.format(language=language) for language in LANGUAGES)]
    options = {"vocab_size": 320, "special_tokens": [END_OF_TEXT], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    backend.train_from_iterator(texts * 2, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in (SEP, CLS, MASK)])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    names |= {"sep_token": SEP, "cls_token": CLS, "mask_token": MASK, "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **names)
    tokenizer.save_pretrained(folder)
    # The published repositories have the files of older tokenizers too.
    added = {token: tokenizer.convert_tokens_to_ids(token) for token in (SEP, CLS, MASK)}
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    for name, content in (("added_tokens", added), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    backend.model.save(str(folder))  # vocab.json and merges.txt
    return tokenizer


def write_config(folder, shape, dtype, listed):
    """config.json with the published keys, and no others."""
    names = {"AutoConfig": "config.ModularStarEncoderConfig", "AutoModel": "modularStarEncoder.ModularStarEncoder"}
    config = {"architectures": ["ModularStarEncoder"], "auto_map": names, "model_type": "ModularStarEncoder"}
    config |= {"torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.39.3"}
    config |= {"rope_theta": 999999.4420358813}
    config |= {"hidden_act": "gelu_pytorch_tanh", "mlp_type": "default", "norm_type": "layer_norm", "use_bias": True}
    config |= dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), 0.1)
    config |= dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    config |= {"layer_norm_eps": 1e-05, "norm_epsilon": 1e-05, "initializer_range": 0.018042}
    config |= {"layer_matryoshka_loss": True, "keys_to_ignore_at_inference": "past_key_values"}
    config |= {"sliding_window": None, "use_cache": False, **shape}
    config |= {key: [config[key]] for key in listed}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def tensor_shapes(shape, variant):
    """Published names → shapes of every tensor of a repository."""
    hidden, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    grouped = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (hidden, hidden))
    layer |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (grouped, hidden))
    layer |= {"mlp.c_fc": (inner, hidden), "mlp.c_proj": (hidden, inner)}
    layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    depth = variant["exit_layers"][-1]
    weights = {f"starEncoder2.layers.{index}.{name}": size for index in range(depth) for name, size in layer.items()}
    if variant["final_norm"] != "absent":
        weights["starEncoder2.norm"] = (hidden,)
    shapes = {"starEncoder2.embed_tokens.weight": (vocabulary, hidden)}
    if variant["kind"] == "pretrained":
        heads, width = variant["heads"], hidden + shape["conditional_size"]
        weights |= {
            f"{heads}.predictions.transform.dense": (width, width),
            f"{heads}.predictions.transform.{variant['transform_norm']}": (width,),
            f"{heads}.seq_relationship": (2, width),
            f"{heads}.pooler.dense" if variant["pooler_in_heads"] else "pooler.dense": (hidden, hidden),
        }
        shapes[f"{heads}.predictions.decoder.weight"] = (vocabulary, width)
        shapes[f"{heads}.conditional_embeddings.weight"] = (5, shape["conditional_size"])
        if variant["vocabulary_bias"]:
            shapes[f"{heads}.{variant['vocabulary_bias']}"] = (vocabulary,)
    else:
        owner = "starEncoder2.module" if variant["module_prefix"] else "starEncoder2"
        places = [f"{owner}.projection_heads.{index}.{place}" for index in variant["head_indices"] for place in (0, 2)]
        weights |= dict.fromkeys(places, (hidden, hidden))
    for name, size in weights.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return shapes


def _random(name, size, variant, seed, dtype):
    """Values large enough that every tensor changes the outputs; by name, so that repositories share them."""
    scale = 0.2
    if ".projection_heads." in name:
        # By exit, not by number: the head of a cut repository is the full model's. Some embeddings are shorter than 1
        # before normalisation, others longer.
        index, place = name.split(".projection_heads.")[1].split(".", 1)
        name = f"head of exit {variant['exit_layers'][variant['head_indices'].index(int(index))]} {place}"
        scale /= 3
    values = torch.randn(size, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))) * scale
    is_norm_weight = len(size) == 1 and name.endswith(".weight")
    return (values + 1 if is_norm_weight else values).to(dtype)
