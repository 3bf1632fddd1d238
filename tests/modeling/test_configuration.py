import pytest
from huggingface_hub.errors import StrictDataclassError

from modular_star_encoder.modeling import ModularStarEncoderConfig
from tests.tiny import tiny_config, tiny_model


def test_the_defaults_are_the_papers_model():
    config = ModularStarEncoderConfig()
    assert config.exit_layers == [4, 9, 18, 27, 36]
    assert ModularStarEncoderConfig(num_hidden_layers=0).exit_layers == [0]
    assert ModularStarEncoderConfig.from_dict({"architectures": []}).architectures == ["ModularStarEncoderModel"]
    assert [config.exit_weight(exit_layer) for exit_layer in config.exit_layers] == [4 / 36, 0.25, 0.5, 0.75, 1.0]
    assert (config.head_dim, config.projection_head, config.token_weights) == (64, "mlp", False)
    assert config.rope_parameters["rope_theta"] == 999999.4420358813


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        *(
            ({"exit_layers": exits}, "exit_layers=.* num_hidden_layers=4")
            for exits in ((-1, 4), (1, 5), (2, 1, 4), (0, 0, 4), (1, 2), ())
        ),
        ({"exit_layer": 3}, "its exits are 1, 2, 4"),
        ({"exit_norm": "some"}, r"'exit_norm'.*\n.*'last', 'all', 'none'"),
        ({"projection_head": "none"}, r"'projection_head'.*\n.*'mlp', 'linear'"),
        ({"pooling": "max"}, r"'pooling'.*\n.*'mean', 'lasttoken'"),
        ({"token_weights": True, "pooling": "lasttoken"}, "'lasttoken' .* token_weights=True needs 'mean'"),
        ({"unpad_inputs": True, "pooling": "legacy"}, "'legacy' .* unpad_inputs"),
        ({"logit_scale_init_value": 0.5}, r"'logit_scale_init_value'.*\n.*from 1.0 to 100.0, got 0.5"),
        ({"residual_dropout": 1.5}, r"'residual_dropout'.*\n.*from 0 to 1, got 1.5"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 times"),
        ({"projection_size": 0}, r"'projection_size'.*\n.*from 1 to 65536, got 0"),
        ({"vocab_size": -1}, r"'vocab_size'.*\n.*from 1 to 16777216, got -1"),
        ({"hidden_size": "32"}, "expected int"),
        ({"vocab_size": 10**18}, "from 1 to 16777216"),
        ({"parent_exit_layers": (2, 4)}, r"among parent_exit_layers=\(2, 4\)"),
        ({"num_labels": 10**18}, r"num_labels=10{18} must be from 0 to 65536"),
        ({"hidden_act": "leaky"}, "hidden_act='leaky' must be one of .*leaky_relu"),
        ({"projection_act": "leaky"}, "projection_act='leaky' must be one of .*leaky_relu"),
    ],
)
def test_a_contradiction_is_refused_at_construction(changes, sentence):
    with pytest.raises((StrictDataclassError, ValueError), match=sentence):
        tiny_model(**changes)
    for name in ("check_exit", "sub_configs"):
        with pytest.raises(ValueError, match=f"{name} is the name of a"):
            ModularStarEncoderConfig.from_dict({name: 1})


def test_published_keys_are_read_and_not_written():
    config = tiny_config(exit_layers=None, matryoshka_layers=[2, 4], conditional_size=7, layer_norm_eps=1e-3)
    assert (config.exit_layers, config.exit_embedding_size, config.norm_epsilon) == ([2, 4], 7, 1e-3)
    written = config.to_dict()
    assert not {"matryoshka_layers", "conditional_size", "layer_norm_eps"} & set(written)
