"""Configuration of the stand-in repository: what travels with its weights, and needs transformers only."""

from transformers import PretrainedConfig


class ModularStarEncoderConfig(PretrainedConfig):
    """Every key as it is in config.json."""

    model_type = "ModularStarEncoder"

    def __init__(self, pad_token_id=0, conditional_size=4, layer_matryoshka_loss=True, **kwargs):
        # One-element tuples, as a stray comma makes them: readers of the published repositories meet them.
        self.conditional_size = (conditional_size,)
        self.layer_matryoshka_loss = (layer_matryoshka_loss,)
        super().__init__(pad_token_id=pad_token_id, **kwargs)
