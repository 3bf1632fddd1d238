"""Configuration of the stand-in repository: what travels with its weights, and needs transformers only."""

from transformers import PretrainedConfig

DEFAULTS = {
    "vocab_size": 49156,
    "hidden_size": 1024,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "conditional_size": 4,
    "matryoshka_layers": (4, 9, 18, 27, 36),
    "layer_matryoshka_loss": True,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 2048,
    "initializer_range": 0.018042,
    "norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_type": "layer_norm",
    "mlp_type": "default",
    "use_bias": True,
    "rope_theta": 999999.4420358813,
    "sliding_window": None,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
    "use_cache": False,
}


class ModularStarEncoderConfig(PretrainedConfig):
    """The published keys with the published defaults."""

    model_type = "ModularStarEncoder"

    def __init__(self, pad_token_id=0, bos_token_id=0, eos_token_id=0, **kwargs):
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        # One-element tuples, as a stray comma makes them: readers of the published repositories meet them.
        self.conditional_size = (self.conditional_size,)
        self.layer_matryoshka_loss = (self.layer_matryoshka_loss,)
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
