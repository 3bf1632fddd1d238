# Copyright 2026 The modular-star-encoder authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of ModularStarEncoder, a bidirectional StarCoder2 encoder with exits at several depths."""

import copy
import inspect
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict, validated_field
from transformers.utils.versions import require_version

# Checked first, because with older versions the imports below fail with messages that do not say why.
require_version("transformers>=5.17", "To use ModularStarEncoder, run: pip install -U transformers")

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

# Key in the published config.json files (huggingface.co/modularStarEncoder) → our key; only ours are written.
PUBLISHED_ALIASES = {
    "matryoshka_layers": "exit_layers",
    "conditional_size": "exit_embedding_size",
    "layer_norm_eps": "norm_epsilon",
}
# Keys of the published config.json files that are ignored; the last is also the name of an attribute of our class.
PUBLISHED_WITHOUT_EFFECT = (
    *("layer_matryoshka_loss", "norm_type", "mlp_type", "sliding_window", "use_cache", "keys_to_ignore_at_inference"),
)

# Lowest and highest value of a learned logit scale; the highest is CLIP's (arXiv 2103.00020, section 2.5).
LOGIT_SCALE_BOUNDS = (1.0, 100.0)

MOST_LABELS = 1 << 16

# Default exits as fractions of the number of layers: the paper's exits 4, 9, 18, 27 and 36 of 36 layers.
DEFAULT_EXIT_SHARES = (1 / 9, 1 / 4, 1 / 2, 3 / 4, 1)


def number(lowest: float, highest: float, *, default: Any) -> Any:
    """Return a dataclass field for None or a number from `lowest` to `highest`; larger numbers may fill the memory."""

    def check(value: float | None) -> None:
        if value is not None and not lowest <= value <= highest:
            raise ValueError(f"Value must be from {lowest} to {highest}, got {value}")

    return validated_field(check, default=default)


def as_int(number: Any) -> Any:
    """Return an integer of Python or numpy as `int`; return any other value, such as a bool, unchanged."""
    return int(number) if isinstance(number, Integral) and not isinstance(number, bool) else number


@strict
class ModularStarEncoderConfig(PreTrainedConfig):
    r"""
    Shape, exits and heads of a ModularStarEncoder. The defaults are the paper's one-billion-parameter model
    (arXiv 2503.03008).

    Args:
        vocab_size (`int`, defaults to 49156): Number of entries of the token embedding.
        hidden_size (`int`, defaults to 1024): Width of the hidden states.
        intermediate_size (`int`, defaults to 12288): Width inside the MLP.
        num_hidden_layers (`int`, defaults to 36): Number of layers of this model. A slice has fewer layers than
            its parent, the model that it was cut from; a slice at exit 0 has 0 layers.
        num_attention_heads (`int`, defaults to 16): Number of query heads.
        num_key_value_heads (`int`, defaults to 4): Number of key and value heads, a divisor of `num_attention_heads`.
        hidden_act (`str`, defaults to `"gelu_pytorch_tanh"`): Activation of the MLP.
        max_position_embeddings (`int`, defaults to 2048): Longest input, in tokens.
        initializer_range (`float`, defaults to 0.018042): Standard deviation of the initial weights.
        norm_epsilon (`float`, defaults to 1e-5): Epsilon of the layer norms.
        use_bias (`bool`, defaults to `True`): Whether the linear layers of attention and MLP have biases.
        is_causal (`bool`, defaults to `False`): Whether a token attends only to itself and earlier tokens.
        attention_dropout, residual_dropout, embedding_dropout (`float`, default to 0.1): Dropout rates.
        rope_parameters (`dict`, *optional*): Rotary embedding, as in transformers; its default base (`rope_theta`) is
            999999.4420358813.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Ids of special tokens.
        exit_layers (`Sequence[int]`, *optional*): The trained exits, ascending. Exit k is the output after k layers;
            exit 0 is the token embeddings. The last exit must equal `num_hidden_layers`. By default, exits are after
            1/9, 1/4, 1/2, 3/4 and all of the layers, like the paper's exits 4, 9, 18, 27 and 36 of 36 layers.
        exit_layer (`int`, *optional*): Deepest exit of a model that is constructed from this configuration. Deeper
            layers are left out. The model's `config` is a copy for the remaining layers, with `exit_layer=None`.
        exit_norm (`str`, defaults to `"last"`): Exits that apply the final layer norm to their states. `"last"`: only
            the exit after the last layer, as in the published models. `"all"`: every exit. `"none"`: no exit, as in a
            slice of a `"last"` model, because a slice lacks the last layer.
        exit_embedding_size (`int`, defaults to 4): Size of a vector that is learned for each exit. The heads that all
            exits share get the vector of the exit as an additional input.
        exit_embedding_rows (`int`, *optional*): Number of exits that have a learned vector: the first ones of
            `parent_exit_layers`. Other exits have a vector of zeros. By default, every exit has a learned vector.
        projection_size (`int`, *optional*): Size of the retrieval embedding; by default `hidden_size`.
        projection_head (`str`, defaults to `"mlp"`): Shape of the projection heads: `"mlp"`, two linear layers with an
            activation between; or `"linear"`, one linear layer.
        projection_act (`str`, defaults to `"leaky_relu"`): Activation inside the `"mlp"` heads.
        projection_order (`str`, defaults to `"project_then_pool"`): `"project_then_pool"` projects every token and
            pools the results; `"pool_then_project"` pools the tokens and projects the result. The embeddings differ
            with `"mlp"` heads. With `"linear"` heads and mean pooling they are equal; `"pool_then_project"` is faster.
        pooling (`str`, defaults to `"mean"`): How the tokens of a text become one vector: `"mean"` of the real tokens;
            `"lasttoken"`, the last real token; or `"legacy"`, the token at index `attention_mask.sum() - 1` of the row,
            as in a predecessor of the published models. With padding on the left, this token is not the last real one.
        token_weights (`bool`, defaults to `False`): Whether mean pooling weights the tokens: each vocabulary entry has
            a learned weight; negative weights count as 0. Needs `pooling="mean"`.
        embedding_normalization (`str`, defaults to `"l2"`): `"l2"` divides every embedding by its norm. `"clip"`
            divides only embeddings with a norm above 1, as in a predecessor of the published models.
        logit_scale_init_value (`float`, *optional*): Initial value, from 1 to 100, of a learned multiplier of
            similarities. Contrastive training updates this multiplier, and it is saved with the retrieval model. By
            default, the model has no multiplier, and training uses the fixed `logit_scale` of its settings.
        pooler_position (`str`, defaults to `"last"`): Token whose state classifiers read: the `"last"` real token
            (`<cls>`) or the `"first"`.
        output_all_exits (`bool`, *optional*): Whether `forward` returns every exit if the call names no exit; if False,
            it returns only the deepest. The default is True for published checkpoints and False for all others.
        classifier_dropout (`float`, defaults to 0.1): Dropout before the sequence classifier.
        instruction_prompts (`bool`, defaults to `True`): Whether the prompts of fine-tuning had the published
            instructions. Evaluation and search read this key to use the same prompts; the model does not read it.
        unpad_inputs (`bool`, defaults to `False`): Whether layers skip padding tokens. Attention then runs on groups of
            texts of similar length. Outputs keep the padded shape, with zeros at padding. Has no effect at exit 0, or
            with `output_hidden_states` or `output_attentions`. Does not work with `torch.compile(fullgraph=True)`,
            because the model then reads the lengths of the texts on the CPU.
        parent_exit_layers (`Sequence[int]`, *optional*): Exits of the parent, the model that this model was cut from.
            The index of an exit in this list is its row in the exit embedding. By default `exit_layers`.
        parent_num_hidden_layers (`int`, *optional*): Number of layers of the parent. The loss of exit k has the
            weight k / `parent_num_hidden_layers` (see `exit_weight`). By default `num_hidden_layers`.

    Raises:
        StrictDataclassError: a field has the wrong type, or fields contradict each other. The message says what is
            allowed.

    Example:
        >>> config = ModularStarEncoderConfig(num_hidden_layers=12, exit_layers=[2, 6, 12])
        >>> config.cut(6).exit_layers, config.cut(6).num_hidden_layers
        ([2, 6], 6)
        >>> config.exit_weight(6)  # weight of this exit's loss: 6 of 12 layers
        0.5
    """

    model_type = "ModularStarEncoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("exit_hidden_states", "residual_states", "exit_embeddings", "logit_scale", "exit_logits", "icc_logits"),
        *("mlm_losses", "mlm_accuracies", "icc_losses", "icc_accuracies"),
    ]
    # Tensor-parallel plan of StarCoder2 (transformers, configuration_starcoder2.py), which has the same layers.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.c_fc": "colwise",
        "layers.*.mlp.c_proj": "rowwise",
    }

    vocab_size: int = number(1, 1 << 24, default=49156)
    hidden_size: int = number(1, 1 << 16, default=1024)
    intermediate_size: int = number(1, 1 << 20, default=12288)
    num_hidden_layers: int = number(0, 1024, default=36)
    num_attention_heads: int = number(1, 1 << 12, default=16)
    num_key_value_heads: int = number(1, 1 << 12, default=4)
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = number(1, 1 << 24, default=2048)
    initializer_range: float = 0.018042
    norm_epsilon: float = 1e-5
    use_bias: bool = True
    is_causal: bool = False
    attention_dropout: float | int = number(0, 1, default=0.1)
    residual_dropout: float | int = number(0, 1, default=0.1)
    embedding_dropout: float | int = number(0, 1, default=0.1)
    rope_parameters: RopeParameters | dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    tie_word_embeddings: bool = False
    exit_layers: list[int] | tuple[int, ...] | None = None
    exit_layer: int | None = None
    exit_norm: Literal["last", "all", "none"] = "last"
    exit_embedding_size: int = number(0, 1 << 16, default=4)
    exit_embedding_rows: int | None = number(0, 1024, default=None)
    projection_size: int | None = number(1, 1 << 16, default=None)
    projection_head: Literal["mlp", "linear"] = "mlp"
    projection_act: str = "leaky_relu"
    projection_order: Literal["project_then_pool", "pool_then_project"] = "project_then_pool"
    pooling: Literal["mean", "lasttoken", "legacy"] = "mean"
    token_weights: bool = False
    embedding_normalization: Literal["l2", "clip"] = "l2"
    logit_scale_init_value: float | int | None = number(*LOGIT_SCALE_BOUNDS, default=None)
    pooler_position: Literal["last", "first"] = "last"
    output_all_exits: bool | None = None
    classifier_dropout: float | int = number(0, 1, default=0.1)
    instruction_prompts: bool = True
    unpad_inputs: bool = False
    parent_exit_layers: list[int] | tuple[int, ...] | None = None
    parent_num_hidden_layers: int | None = number(0, 1024, default=None)

    default_theta = 999999.4420358813

    def __post_init__(self, **kwargs: Any) -> None:
        published_exits = list(kwargs.get("matryoshka_layers") or ())
        for published, ours in PUBLISHED_ALIASES.items():
            if published in kwargs:
                setattr(self, ours, kwargs.pop(published))
        # A published slice lists all exits of the model that it was cut from.
        if published_exits and self.num_hidden_layers < published_exits[-1]:
            self.parent_exit_layers, self.parent_num_hidden_layers = published_exits, published_exits[-1]
            self.exit_layers = [exit for exit in published_exits if exit <= self.num_hidden_layers]
            if self.exit_norm == "last":
                self.exit_norm = "none"
        for key in PUBLISHED_WITHOUT_EFFECT:
            kwargs.pop(key, None)
        if self.exit_layers is None:
            depth = self.num_hidden_layers
            self.exit_layers = sorted({min(depth, max(1, round(s * depth))) for s in DEFAULT_EXIT_SHARES})
        if self.projection_size is None:
            self.projection_size = self.hidden_size
        if self.parent_exit_layers is None:
            self.parent_exit_layers = list(self.exit_layers)
        if self.exit_embedding_rows is None:
            self.exit_embedding_rows = len(self.parent_exit_layers)
        if self.parent_num_hidden_layers is None:
            self.parent_num_hidden_layers = self.num_hidden_layers
        if not self.architectures:
            self.architectures = ["ModularStarEncoderModel"]
        if (labels := kwargs.get("num_labels")) is not None and not 0 <= labels <= MOST_LABELS:
            raise ValueError(f"num_labels={labels} must be from 0 to {MOST_LABELS}.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from the content of a config.json; `[x]` counts as `x` where one value is expected.

        Keys that choose a file of weights or an attention implementation are ignored, because the chosen file may be
        pickled, and the chosen implementation may compile code.
        """
        lists = {"architectures", "exit_layers", "matryoshka_layers", "parent_exit_layers", "eos_token_id"}

        def unwrap(key: str, value: Any) -> Any:
            if isinstance(value, list | tuple) and len(value) == 1 and (key not in lists or isinstance(value[0], list)):
                return value[0]
            return value

        for key in config_dict:
            own = inspect.getattr_static(cls, key, None)
            read_only = key == "sub_configs" or (isinstance(own, property) and own.fset is None)
            if read_only or callable(getattr(cls, key, None)):
                raise ValueError(f"{key} is the name of a method, not of a setting: remove it from config.json.")
        ignored = {"transformers_weights", "attn_implementation", "_attn_implementation"}
        known = {key: unwrap(key, value) for key, value in config_dict.items() if key not in ignored}
        exit_layer = kwargs.pop("exit_layer", known.get("exit_layer"))
        found = super().from_dict(known, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        # Checked here, because the error of a field that transformers sets has several lines.
        config.exit_layer = None if exit_layer is None else config.check_exit(exit_layer)
        return found

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def validate_exits(self) -> None:
        exits, depth, parents = list(self.exit_layers), self.num_hidden_layers, self.parent_exit_layers
        ascending = exits == sorted(set(exits)) and exits[:1] >= [0] and exits[-1] == depth
        if not ascending or not set(exits) <= set(parents):
            raise ValueError(
                f"exit_layers={exits} must be ascending integers, not negative. The last must equal num_hidden_layers="
                f"{depth}, and all must be among parent_exit_layers={parents}."
            )
        if self.exit_layer is not None:
            self.check_exit(self.exit_layer)

    def validate_pooling(self) -> None:
        if (self.unpad_inputs and self.pooling == "legacy") or (self.token_weights and self.pooling != "mean"):
            raise ValueError(
                f"pooling={self.pooling!r} does not fit the other settings: token_weights=True needs 'mean', and "
                "unpad_inputs=True does not work with 'legacy'."
            )

    def validate_heads(self) -> None:
        heads = self.num_attention_heads
        if self.hidden_size % heads or self.head_dim % 2 or heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be num_attention_heads={heads} times an even number, and "
                f"num_attention_heads must be a multiple of num_key_value_heads={self.num_key_value_heads}."
            )

    def check_exit(self, exit_layer: int) -> int:
        """Return `exit_layer` as an `int`; raise ValueError if it is not an exit of this model.

        Integers of numpy are accepted; `True`, `2.0` and `"2"` are not.
        """
        number = as_int(exit_layer)
        if type(number) is not int or number not in self.exit_layers:
            kind = "" if type(number) is int else f" of type {type(number).__name__}"
            exits = ", ".join(map(str, self.exit_layers))
            raise ValueError(f"exit_layer {exit_layer!r}{kind} is not an exit of this model; its exits are {exits}.")
        return number

    def resolve_exits(self, exit_layer: int | None = None, exit_layers: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the requested exits, ascending.

        If no exit is requested, return the deepest exit, or every exit if `output_all_exits` is True.

        Raises:
            ValueError: both arguments are given, `exit_layers` is empty or not a list, or the model lacks an exit.
        """
        is_list = isinstance(exit_layers, Collection) and len(exit_layers) > 0
        if exit_layers is not None and (exit_layer is not None or not is_list):
            raise ValueError(
                f"Give either exit_layer, or exit_layers with at least one exit, not {exit_layer=} and {exit_layers=}."
            )
        if exit_layers is None:
            default = self.exit_layers if self.output_all_exits else (self.num_hidden_layers,)
            exit_layers = default if exit_layer is None else (exit_layer,)
        return tuple(sorted({self.check_exit(exit_layer) for exit_layer in exit_layers}))

    def exit_index(self, exit_layer: int) -> int:
        """Return the row number of an exit in the exit embedding: the index of the exit in `parent_exit_layers`."""
        return list(self.parent_exit_layers).index(self.check_exit(exit_layer))

    def exit_weight(self, exit_layer: int) -> float:
        """Return the weight of an exit's loss: `exit_layer` / `parent_num_hidden_layers`, such as 4/36.

        Exit 0 has the weight of exit 1, because a weight of 0 would leave its head untrained.
        """
        return max(1, self.check_exit(exit_layer)) / max(1, self.parent_num_hidden_layers)

    def has_norm_at(self, exit_layer: int) -> bool:
        """Return whether an exit applies the final layer norm to its states."""
        return self.exit_norm == "all" or (self.exit_norm == "last" and exit_layer == self.num_hidden_layers)

    def cut(self, exit_layer: int) -> "ModularStarEncoderConfig":
        """Return the configuration of the model that is left if layers deeper than `exit_layer` are cut off."""
        exit_layer = self.check_exit(exit_layer)
        config = copy.deepcopy(self)
        config.exit_layer = None
        if exit_layer < self.num_hidden_layers:
            config.exit_norm = "all" if self.exit_norm == "all" else "none"
            config.exit_layers = [exit for exit in self.exit_layers if exit <= exit_layer]
            config.num_hidden_layers = exit_layer
        return config


__all__ = ["ModularStarEncoderConfig"]
