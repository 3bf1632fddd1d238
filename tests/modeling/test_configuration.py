"""The configuration: what it refuses, what it reads of the published ones."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modular_star_encoder.modeling import ModularStarEncoderConfig
from tests.tiny import tiny_config, tiny_model


def test_the_defaults_are_the_papers_model():
    config = ModularStarEncoderConfig()
    assert config.exit_layers == [4, 9, 18, 27, 36]
    assert [config.exit_weight(exit_layer) for exit_layer in config.exit_layers] == [4 / 36, 0.25, 0.5, 0.75, 1.0]
    assert config.head_dim == 64
    assert config.rope_parameters["rope_theta"] == 999999.4420358813


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"exit_layers": (-1, 4)}, "between 0 and num_hidden_layers=4, the last of them 4"),
        ({"exit_layers": (1, 5)}, "between 0 and num_hidden_layers=4"),
        ({"exit_layers": (2, 1, 4)}, "ascending"),
        ({"exit_layers": (1, 1, 4)}, "ascending"),
        ({"exit_layers": (1, 2)}, "the last of them 4"),
        ({"exit_layers": ()}, "ascending"),
        ({"exit_layer": 3}, "its exits are 1, 2, 4"),
        ({"exit_norm": "some"}, "must be one of last, all, none"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5}, "must be an even multiple of num_attention_heads 5"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0 must be at least 1"),
        ({"projection_size": 0}, "projection_size 0 must be at least 1"),
        ({"vocab_size": -1}, "vocab_size -1 must be at least 1"),
        ({"pooling": "max"}, "must be one of mean, lasttoken"),
        ({"hidden_size": "32"}, "expected int"),
        ({"parent_exit_layers": (2, 4)}, "among parent_exit_layers"),
    ],
)
def test_a_contradiction_is_refused_at_construction(changes, sentence):
    with pytest.raises(StrictDataclassError, match=sentence):
        tiny_config(**changes)


@pytest.mark.parametrize("name", ["hidden_act", "projection_act"])
def test_an_unknown_activation_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"{name} 'leaky' must be one of .*leaky_relu"):
        tiny_model(**{name: "leaky"})


def test_published_keys_are_read_and_not_written():
    config = tiny_config(exit_layers=None, matryoshka_layers=[2, 4], conditional_size=7, layer_norm_eps=1e-3)
    assert (config.exit_layers, config.exit_embedding_size, config.norm_epsilon) == ([2, 4], 7, 1e-3)
    written = config.to_dict()
    assert not {"matryoshka_layers", "conditional_size", "layer_norm_eps"} & set(written)


def test_a_configuration_survives_saving(tmp_path):
    config = tiny_config(exit_norm="all")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is ModularStarEncoderConfig
    assert again.to_json_string() == config.to_json_string()
    assert (again.exit_norm, again.exit_layers) == ("all", [1, 2, 4])
