"""Published repositories load as they are, or are refused by name."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification

from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderForSequenceClassification,
    ModularStarEncoderModel,
    ModularStarEncoderPreTrainedModel,
)
from modular_star_encoder.modeling.published_checkpoints import published_names
from modular_star_encoder.training.recipes import hub_config_folder
from tests.tiny import tiny_batch, tiny_model

EXITS = [1, 2, 4]


def published_config(config, **changes):
    """A config.json with the keys of the published ones, their oddities included."""
    return {
        "architectures": ["ModularStarEncoder"],
        "attention_dropout": 0.1,
        "auto_map": {
            "AutoConfig": "config.ModularStarEncoderConfig",
            "AutoModel": "modularStarEncoder.ModularStarEncoder",
        },
        "bos_token_id": 0,
        "conditional_size": [config.exit_embedding_size],
        "embedding_dropout": 0.1,
        "eos_token_id": 0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": [config.hidden_size],
        "initializer_range": 0.018042,
        "intermediate_size": config.intermediate_size,
        "keys_to_ignore_at_inference": "past_key_values",
        "layer_matryoshka_loss": True,
        "layer_norm_eps": 1e-05,
        "matryoshka_layers": EXITS,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_type": "default",
        "model_type": "ModularStarEncoder",
        "norm_epsilon": 1e-05,
        "norm_type": "layer_norm",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": 4,
        "num_key_value_heads": config.num_key_value_heads,
        "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813,
        "sliding_window": None,
        "torch_dtype": "float32",
        "transformers_version": "4.39.3",
        "use_bias": True,
        "use_cache": False,
        "vocab_size": config.vocab_size,
    } | changes


def write_published(folder, model, *, respell=(), edit=None, config=None):
    """Write `model` in the published layout: `respell` replaces parts of names, `edit` changes the tensors."""
    names = published_names(model)
    tensors = {names[name]: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    for old, new in respell:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    if edit:
        edit(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(published_config(model.config, **(config or {}))))
    return folder


def full_model(model_class=ModularStarEncoderForRetrieval):
    return tiny_model(model_class, exit_layers=EXITS, projection_size=32, output_all_exits=True).eval()


def cut_model(exit_layer):
    """The first layers with one head, as the published slices are."""
    full = full_model()
    config = full.config.cut(exit_layer)
    config.exit_layers = [exit_layer]
    model = ModularStarEncoderForRetrieval(config).eval()
    model.load_state_dict(full.state_dict(), strict=False)
    return full, model


def embed(model, **kwargs):
    with torch.inference_mode():
        return model(**tiny_batch(), **kwargs)


def test_a_published_fine_tuned_checkpoint_gives_every_exit(tmp_path):
    ours = full_model()
    loaded = AutoModel.from_pretrained(write_published(tmp_path, ours))
    assert type(loaded) is ModularStarEncoderForRetrieval
    assert loaded.config.exit_layers == EXITS
    embeddings = embed(loaded).projected_pooled_normalized
    assert isinstance(embeddings, list)
    assert all(torch.equal(*pair) for pair in zip(embeddings, embed(ours).exit_embeddings, strict=True))


@pytest.mark.parametrize("exit_layer", EXITS)
def test_a_published_checkpoint_loads_at_an_exit(tmp_path, exit_layer):
    ours = full_model()
    loaded = AutoModel.from_pretrained(write_published(tmp_path, ours), exit_layer=exit_layer)
    assert loaded.config.num_hidden_layers == exit_layer
    assert torch.equal(embed(loaded).sentence_embedding, embed(ours, exit_layer=exit_layer).sentence_embedding)


@pytest.mark.parametrize("depth_in_config", [1, 2, 4])
@pytest.mark.parametrize("head_index", [0, 1])
def test_a_published_slice_with_one_head_equals_its_exit_of_the_full_model(tmp_path, depth_in_config, head_index):
    exit_layer = 2
    full, cut = cut_model(exit_layer)
    folder = write_published(
        tmp_path,
        cut,
        respell=[("projection_heads.0.", f"projection_heads.{head_index}.")],
        config={"num_hidden_layers": depth_in_config},
    )
    loaded = AutoModel.from_pretrained(folder)
    embedding = embed(loaded).projected_pooled_normalized
    assert torch.equal(embedding, embed(full, exit_layer=exit_layer).sentence_embedding)
    assert loaded.config.exit_layers == [2]
    assert loaded.config.exit_weight(2) == 2 / 4
    with pytest.raises(ValueError, match="its exits are 2"):
        embed(loaded, exit_layer=1)


@pytest.mark.parametrize(("exit_norm", "normed"), [(None, False), ("all", True)])
def test_a_slice_that_kept_the_final_norm_applies_it_only_when_told(tmp_path, exit_norm, normed):
    full, cut = cut_model(2)

    def keep_norm(tensors):
        for name in ("weight", "bias"):
            tensors[f"starEncoder2.norm.{name}"] = full.state_dict()[f"model.norm.{name}"].clone() + 1

    folder = write_published(tmp_path, cut, edit=keep_norm)
    loaded = AutoModel.from_pretrained(folder, **({"exit_norm": exit_norm} if exit_norm else {}))
    assert torch.equal(embed(loaded).sentence_embedding, embed(cut).sentence_embedding) is not normed


@pytest.mark.parametrize(
    "respell",
    [
        [],
        [("cls.", "head.")],
        [("LayerNorm", "layer_norm")],
        [("predictions.bias", "predictions.decoder.bias")],
        [("pooler.dense", "cls.pooler.dense")],
        [("starEncoder2.", "starEncoder2.module.")],
    ],
)
def test_a_published_pre_trained_checkpoint_loads_in_every_spelling(tmp_path, respell):
    ours = full_model(ModularStarEncoderForPreTraining)
    folder = write_published(tmp_path, ours, respell=respell)
    loaded = AutoModelForPreTraining.from_pretrained(folder)
    assert type(loaded) is ModularStarEncoderForPreTraining
    outputs, expected = embed(loaded), embed(ours)
    assert torch.equal(outputs.prediction_logits, expected.logits)
    assert torch.equal(outputs.seq_relationship_logits, expected.icc_logits[-1])
    trunk = AutoModel.from_pretrained(folder)
    assert type(trunk) is ModularStarEncoderModel
    assert torch.equal(embed(trunk).last_hidden_state, expected.exit_hidden_states[-1])


def test_a_table_that_lacks_the_last_exit_gives_it_zeros(tmp_path):
    ours = full_model(ModularStarEncoderForPreTraining)
    with torch.no_grad():
        ours.heads.exit_embedding.weight[-1] = 0
    folder = write_published(tmp_path, ours, edit=cut_rows("cls.conditional_embeddings.weight"))
    loaded = AutoModelForPreTraining.from_pretrained(folder)
    assert loaded.heads.exit_embedding.weight.shape == (2, 4)
    assert torch.equal(embed(loaded, exit_layers=EXITS).icc_logits, embed(ours, exit_layers=EXITS).icc_logits)
    loaded.save_pretrained(tmp_path / "ours")
    again = AutoModelForPreTraining.from_pretrained(tmp_path / "ours")
    assert torch.equal(embed(again).logits, embed(ours).logits)


def test_the_first_upload_without_a_vocabulary_bias_has_a_bias_of_zero(tmp_path):
    ours = full_model(ModularStarEncoderForPreTraining)
    with torch.no_grad():
        ours.heads.decoder.bias.zero_()
    folder = write_published(tmp_path, ours, edit=lambda tensors: tensors.pop("cls.predictions.bias"))
    assert torch.equal(embed(AutoModelForPreTraining.from_pretrained(folder)).logits, embed(ours).logits)


def test_a_class_that_is_called_itself_is_the_one_that_comes(tmp_path):
    ours = full_model()
    trunk = ModularStarEncoderModel.from_pretrained(write_published(tmp_path, ours), exit_layer=2)
    assert type(trunk) is ModularStarEncoderModel
    assert torch.equal(embed(trunk).last_hidden_state, embed(ours, exit_layer=2).exit_hidden_states[-1])


@pytest.mark.parametrize("model_class", [ModularStarEncoderForRetrieval, ModularStarEncoderForPreTraining])
def test_the_base_class_loads_whatever_the_file_holds(tmp_path, model_class):
    folder = write_published(tmp_path, full_model(model_class))
    assert type(ModularStarEncoderPreTrainedModel.from_pretrained(folder, exit_layer=2)) is model_class


def test_a_pre_trained_checkpoint_takes_a_new_head(tmp_path):
    folder = write_published(tmp_path, full_model(ModularStarEncoderForPreTraining))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert embed(model).logits.shape == (3, 3)


def test_what_is_loaded_and_saved_again_has_our_layout(tmp_path):
    model = AutoModel.from_pretrained(write_published(tmp_path / "published", full_model()))
    model.save_pretrained(tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(embed(again).exit_embeddings, embed(model).exit_embeddings)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert not {"matryoshka_layers", "conditional_size", "layer_norm_eps"} & set(written)


def test_arguments_reach_the_configuration_of_a_published_checkpoint(tmp_path):
    folder = write_published(tmp_path, full_model())
    classifier = ModularStarEncoderForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert classifier.classifier.out_features == 3
    model = AutoModel.from_pretrained(folder, output_all_exits=False, pooling="cls", dtype=torch.float16)
    assert isinstance(embed(model).projected_pooled_normalized, torch.Tensor)
    assert (model.config.pooling, model.dtype) == ("lasttoken", torch.float16)


def drop(name):
    return lambda tensors: tensors.pop(name)


def cut_rows(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def add(name):
    return lambda tensors: tensors.update({name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("starEncoder2.layers.1.mlp.c_fc.bias"), r"model\.layers\.1\.mlp\.c_fc\.bias .* is missing"),
        (drop("starEncoder2.projection_heads.1.0.weight"), r"projection_heads\.2\.dense\.weight .* is missing"),
        (cut_rows("starEncoder2.embed_tokens.weight"), r"embed_tokens\.weight has shape \[299, 32\] instead of"),
        (add("starEncoder2.layers.0.extra"), r"starEncoder2\.layers\.0\.extra is unexpected"),
        (add("starEncoder2.layers.4.extra"), "has 5 layers"),
        (add("starEncoder2.projection_heads.3.0.bias"), "has 4 projection heads"),
    ],
)
def test_a_gap_in_a_published_file_is_an_error_that_names_it(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(write_published(tmp_path, full_model(), edit=edit))


@pytest.mark.parametrize("model_class", [ModularStarEncoderModel, ModularStarEncoderForRetrieval])
@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (drop("model.layers.1.mlp.c_fc.bias"), "missing"),
        (add("model.layers.0.extra"), "unexpected"),
        (cut_rows("model.layers.1.mlp.c_fc.bias"), "size"),
    ],
)
def test_our_own_checkpoints_never_load_with_a_random_trunk(tmp_path, model_class, edit, problem):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=problem):
        model_class.from_pretrained(tmp_path)


def safetensors_size(tensors):
    """Bytes of a safetensors file with these tensors (names → shape, all bfloat16), and the number of tensors.

    Layout (github.com/huggingface/safetensors, "Format"): 8 bytes, a JSON header padded to a multiple of 8, data.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        start, end = end, end + 2 * tensors[name].numel()
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + end, len(tensors)


def published_tensors(model):
    names = published_names(model)
    return {names[name]: tensor for name, tensor in model.state_dict().items()}


def paper_model(name, model_class, exit_layer=None):
    config = ModularStarEncoderConfig.from_pretrained(hub_config_folder(name))
    if exit_layer:
        config = config.cut(exit_layer)
        config.exit_layers = [exit_layer]
    with torch.device("meta"):
        return model_class(config)


def test_the_size_computed_here_is_that_of_a_real_file(tmp_path):
    model = full_model(ModularStarEncoderForPreTraining).to(torch.bfloat16)
    folder = write_published(tmp_path, model)
    size, count = safetensors_size(published_tensors(model))
    assert size == (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert count == len(header) - 1


def test_the_pre_trained_model_has_the_bytes_and_tensors_of_the_published_file():
    tensors = published_tensors(paper_model("pretrained", ModularStarEncoderForPreTraining))
    assert safetensors_size(tensors) == (2_208_252_348, 590)
    del tensors["cls.predictions.bias"]
    assert safetensors_size(tensors) == (2_208_153_948, 589)


@pytest.mark.parametrize(
    ("exit_layer", "listed"), [(36, "2.12 GB"), (27, "1.61 GB"), (18, "1.11 GB"), (4, "327 MB"), (9, None)]
)
def test_the_fine_tuned_models_have_the_sizes_listed(exit_layer, listed):
    cut = exit_layer if exit_layer < 36 else None
    model = paper_model("finetuned", ModularStarEncoderForRetrieval, cut)
    size, _ = safetensors_size(published_tensors(model))
    if listed:
        unit, digits = (1e9, 2) if listed.endswith("GB") else (1e6, 0)
        assert round(size / unit, digits) == float(listed.split()[0])
    assert size == pytest.approx(
        {36: 2_123_859_344, 27: 1_606_516_448, 18: 1_105_969_000, 9: 605_421_792, 4: 327_340_112}[exit_layer], abs=5000
    )
