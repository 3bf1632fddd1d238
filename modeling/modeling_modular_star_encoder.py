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
"""ModularStarEncoder: a bidirectional StarCoder2 encoder with exits (arXiv 2503.03008).

A forward pass runs the layers up to the deepest requested exit, and returns the states of every requested exit. All
exits share the heads for masked language modelling, in-context classification and sequence classification. These heads
read a small learned vector of the exit together with its states. Retrieval has one projection head for each exit.

Letters in shapes: B batch size, T tokens, H hidden size, E requested exits, D projection size, V vocabulary size.

Hub repositories of these models contain this file and the configuration file, which need only torch and transformers.
"""

import copy
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_modular_star_encoder import LOGIT_SCALE_BOUNDS, ModularStarEncoderConfig, as_int

# Number of logits that the pre-training loss computes at once: 2**22 float32 are 16 MiB. But a chunk has at least 160
# tokens, because for each chunk the loss also reads and writes a gradient as large as the vocabulary's weights.
LOGITS_PER_CHUNK = 2**22
TOKENS_PER_CHUNK = 160

# Arguments that `save_pretrained` only passes to `push_to_hub`.
PUSH_ARGUMENTS = ("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description", "tags")

# Unpadded attention runs on groups of texts; the shortest has at least this fraction of the tokens of the longest.
SHORTEST_IN_GROUP = 0.8


@dataclass
class ModularStarEncoderModelOutput(ModelOutput):
    """Output of the trunk (`ModularStarEncoderModel`) for B rows of T tokens and E requested exits; H is hidden_size.

    Args:
        last_hidden_state: (B, T, H), states of the deepest requested exit.
        exit_hidden_states: tuple of E tensors (B, T, H), states of the requested exits, shallowest first.
        residual_states: tuple of E tensors (B, T, H), states of the requested exits before the final norm. A later pass
            can resume from them (see `start_layer`). `None` without `output_residual_states=True`.
        hidden_states: tuple of (B, T, H): the token embeddings, then the output of each executed layer. The last tensor
            equals `last_hidden_state`. Empty if only exit 0 is requested.
        attentions: tuple of (B, heads, T, T), the attention weights of each executed layer.
    """

    last_hidden_state: torch.Tensor | None = None
    exit_hidden_states: tuple[torch.Tensor, ...] | None = None
    residual_states: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ModularStarEncoderForPreTrainingOutput(ModelOutput):
    """Output of the pre-training model for B rows of T tokens at E requested exits, shallowest first; V is vocab_size.

    MLM is masked language modelling, ICC in-context classification.

    Args:
        loss: scalar, the sum over exits of `config.exit_weight` × (MLM loss + ICC loss); `None` without labels.
        logits: (B, T, V), scores of every vocabulary entry at the deepest requested exit. `None` if `labels` are given,
            because logits are then computed only at masked positions, for the loss.
        icc_logits: (E, B, 2), where class 1 means that both snippets come from the same repository.
        mlm_losses, mlm_accuracies: (E,), means over masked tokens; `None` without `labels`.
        icc_losses, icc_accuracies: (E,), means over the batch; `None` without `icc_labels`.
        exit_hidden_states, hidden_states, attentions: outputs of the trunk (see `ModularStarEncoderModelOutput`).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    icc_logits: torch.Tensor | None = None
    mlm_losses: torch.Tensor | None = None
    mlm_accuracies: torch.Tensor | None = None
    icc_losses: torch.Tensor | None = None
    icc_accuracies: torch.Tensor | None = None
    exit_hidden_states: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def prediction_logits(self) -> torch.Tensor | None:
        """Return `logits`; the published model calls them `prediction_logits`."""
        return self.logits

    @property
    def seq_relationship_logits(self) -> torch.Tensor:
        """Return `icc_logits` (B, 2) of the deepest exit; the published model calls them `seq_relationship_logits`."""
        return self.icc_logits[-1]


@dataclass
class ModularStarEncoderForRetrievalOutput(ModelOutput):
    """Output of the retrieval model for B texts of T tokens at E requested exits; D is `config.projection_size`.

    Args:
        last_hidden_state: (B, T, D), states of the deepest requested exit after its projection head. With token
            weights, each state is multiplied by its token's weight and divided by the mean weight of the text, so that
            the plain mean of the multiplied states is the weighted mean of the states.
        sentence_embedding: (B, D), normalised embeddings at the deepest requested exit.
        exit_embeddings: (E, B, D), normalised embeddings at every requested exit, shallowest first.
        logit_scale: (1,) float32, the learned multiplier of similarities; `None` if the model has none.
        exit_hidden_states, residual_states, hidden_states, attentions: see `ModularStarEncoderModelOutput`.
    """

    last_hidden_state: torch.Tensor | None = None
    sentence_embedding: torch.Tensor | None = None
    exit_embeddings: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    exit_hidden_states: tuple[torch.Tensor, ...] | None = None
    residual_states: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def projected_pooled_normalized(self) -> list[torch.Tensor] | torch.Tensor:
        """Return the embeddings in the form of the published model: (B, D) for one exit, else a list of (B, D)."""
        return list(self.exit_embeddings) if len(self.exit_embeddings) > 1 else self.exit_embeddings[0]

    @property
    def raw_hidden_states(self) -> tuple[torch.Tensor, ...] | None:
        """Return `hidden_states`; the published models call them `raw_hidden_states`."""
        return self.hidden_states


@dataclass
class ModularStarEncoderForSequenceClassificationOutput(ModelOutput):
    """Output of the sequence classifier for B texts at E requested exits; `num_labels` is a field of the config.

    Args:
        loss: scalar, the sum over requested exits of `config.exit_weight` × the exit's loss; `None` without `labels`.
        logits: (B, num_labels), logits of the deepest requested exit.
        exit_logits: (E, B, num_labels), logits of every requested exit, shallowest first.
        hidden_states, attentions: outputs of the trunk (see `ModularStarEncoderModelOutput`).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return (-b, a) for the two halves (a, b) of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys (B, heads, T, head_dim), rotated by angles with cosine `cos` and sine `sin`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention's outputs (B, T, heads, head_dim) and weights (B, heads, T, T); the softmax is in float32."""
    groups: Any = module.num_key_value_groups
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


@dataclass
class DocumentGroup:
    """G texts of similar length from a flat batch (all texts in one row), padded to L tokens for attention.

    Args:
        tokens: (G, L), the index of each token in the flat batch; at padding, the index of the text's first token.
        real: (G, L) bool, False at padding; `None` if the group has no padding.
        mask: attention mask in the form that the attention implementation expects.
    """

    tokens: torch.Tensor
    real: torch.Tensor | None
    mask: Any = None

    def to(self, device: torch.device) -> "DocumentGroup":
        return DocumentGroup(*(None if one is None else one.to(device) for one in (self.tokens, self.real, self.mask)))

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """Return the group's states, padded to (G, heads, L, head_dim), from the flat batch (N, heads, head_dim)."""
        # `index_select` copies whole rows. Indexing with a tensor takes three times as long, its gradient four times.
        return states.index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape).transpose(1, 2)


@dataclass
class DocumentGroups:
    """The texts of a flat batch (N tokens in one row), grouped by length.

    Args:
        groups: the groups, longest texts first.
        places: (N,), the index of each token of the flat batch in the concatenated padded tokens of all groups.
    """

    groups: list[DocumentGroup]
    places: torch.Tensor

    @classmethod
    def of_similar_length(cls, lengths: list[int], device: torch.device) -> "DocumentGroups":
        """Return groups of texts with `lengths` tokens. The caller sets the `mask` of each group."""
        starts = torch.tensor([0, *lengths]).cumsum(0)
        members: list[list[int]] = []
        for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
            if not members or lengths[document] < SHORTEST_IN_GROUP * lengths[members[-1][0]]:
                members.append([])
            members[-1].append(document)
        groups, padded = [], []
        for group in members:
            offsets = torch.arange(lengths[group[0]])
            real = offsets < torch.tensor([lengths[document] for document in group])[:, None]
            tokens = starts[group][:, None] + offsets * real
            padded.append((tokens, real))
            groups.append(DocumentGroup(tokens.to(device), None if bool(real.all()) else real.to(device)))
        all_tokens, all_real = (torch.cat([part.flatten() for part in parts]) for parts in zip(*padded, strict=True))
        places = torch.empty(int(starts[-1]), dtype=torch.long)
        places[all_tokens[all_real]] = all_real.nonzero().squeeze(-1)
        return cls(groups, places.to(device))

    def to(self, device: torch.device) -> "DocumentGroups":
        """Return a copy on `device`. accelerate calls this method if the model is on several devices."""
        return DocumentGroups([group.to(device) for group in self.groups], self.places.to(device))

    def attend(self, attention: Callable, *query_key_value: torch.Tensor) -> torch.Tensor:
        """Apply `attention` within each text to queries, keys, values (1, heads, N, head_dim); return its outputs."""
        flat = [states[0].transpose(0, 1) for states in query_key_value]
        outputs = [
            attention(*(group.padded(states) for states in flat), group.mask)[0].flatten(0, 1) for group in self.groups
        ]
        return torch.cat(outputs).index_select(0, self.places).unsqueeze(0)


class ModularStarEncoderRotaryEmbedding(nn.Module):
    """Computes cosines and sines (B, T, head_dim) of the rotary position embedding for positions (B, T)."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "ModularStarEncoderRotaryEmbedding":
        """Move or convert the module, but keep its frequencies in float32, for exact angles in bfloat16 models."""
        exact = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    @staticmethod
    def compute_default_rope_parameters(
        config: ModularStarEncoderConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Return d/2 frequencies rope_theta^(-2i/d), i < d/2, and the scaling 1.0; d is head_dim (arXiv 2104.09864)."""
        powers = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** powers), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class ModularStarEncoderAttention(nn.Module):
    """Grouped-query attention: a token attends to all tokens, or if `config.is_causal` to itself and earlier tokens."""

    def __init__(self, config: ModularStarEncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.residual_dropout = config.residual_dropout
        self.is_causal = config.is_causal
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.use_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        document_groups: DocumentGroups | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden_states.shape[:-1]
        head_shape = (*shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        attend = partial(attention, self, dropout=dropout, scaling=self.scaling, **kwargs)
        if document_groups is None:
            output, weights = attend(query, key, value, attention_mask)
        else:
            output, weights = document_groups.attend(attend, query, key, value), None
        output = self.o_proj(output.reshape(*shape, -1).contiguous())
        return nn.functional.dropout(output, p=self.residual_dropout, training=self.training), weights


class ModularStarEncoderMLP(nn.Module):
    """StarCoder2's MLP: two linear layers with an activation between them, without a gate."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)
        self.act = ACT2FN[config.hidden_act]
        self.residual_dropout = config.residual_dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.c_proj(self.act(self.c_fc(hidden_states)))
        return nn.functional.dropout(hidden_states, p=self.residual_dropout, training=self.training)


class ModularStarEncoderLayer(GradientCheckpointingLayer):
    """One StarCoder2 layer: a layer norm and attention, then a layer norm and an MLP, both with residual connection."""

    def __init__(self, config: ModularStarEncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ModularStarEncoderAttention(config, layer_idx)
        self.mlp = ModularStarEncoderMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ModularStarEncoderPreTrainedModel(PreTrainedModel):
    """Base class of our models: it cuts a model at `config.exit_layer`, and saves checkpoints with the model code."""

    config: ModularStarEncoderConfig
    config_class = ModularStarEncoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["ModularStarEncoderLayer"]  # type: ignore[misc]
    # Our losses are means over a batch; False makes `Trainer` divide them by the number of accumulated batches.
    accepts_loss_kwargs = False
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar = {  # type: ignore[misc]
        "hidden_states": ModularStarEncoderLayer,
        "attentions": ModularStarEncoderAttention,
    }

    # Functions like `read_published_layout`. `from_pretrained` calls each with its class, path and keyword arguments.
    # For a checkpoint with other tensor names, the function returns a class and arguments that can load the checkpoint.
    _layout_readers: ClassVar[list[Callable]] = []

    def __init__(self, config: ModularStarEncoderConfig, *inputs: Any, **kwargs: Any) -> None:
        # Validated again, because `from_pretrained` sets its arguments on a configuration that is already validated.
        config.validate()
        for name in ("hidden_act", "projection_act"):
            if getattr(config, name) not in ACT2FN:
                raise ValueError(f"{name}={getattr(config, name)!r} must be one of {', '.join(ACT2FN)}.")
        # CODEPATH: any checkpoint can be cut at an exit when it is loaded; by default it stays whole.
        kept = config if config.exit_layer is None else config.cut(config.exit_layer)
        super().__init__(kept, *inputs, **kwargs)
        foreign = set(type(self)._keys_to_ignore_on_load_unexpected or ())
        self._keys_to_ignore_on_load_unexpected = foreign | _cut_away(config, kept)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ModularStarEncoderTokenWeights):
            init.ones_(module.weight)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does; `exit_layer=k` loads the layers up to exit k.

        Heads that are missing from the checkpoint are initialised at random, with a warning.

        Raises:
            ValueError: the checkpoint lacks tensors of the trunk, or has unknown tensors; the message names them. With
                `state_dict`, or with `output_loading_info=True`, which returns the names, names are not checked.
            RuntimeError: tensors have other shapes than the model's, and `ignore_mismatched_sizes` is False.
        """
        if kwargs.get("exit_layer") is not None and isinstance(kwargs.get("config"), PreTrainedConfig):
            kwargs["config"] = copy.deepcopy(kwargs["config"])
            kwargs["config"].exit_layer = as_int(kwargs.pop("exit_layer"))
        want_loading_info = kwargs.pop("output_loading_info", False)
        check = not want_loading_info and kwargs.get("state_dict") is None
        model_class = cls
        for reader in cls._layout_readers:
            model_class, kwargs = reader(model_class, pretrained_model_name_or_path, kwargs)
        load: Any = super(ModularStarEncoderPreTrainedModel, model_class).from_pretrained
        model, info = load(pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs)
        if check:
            _check_trunk(info, pretrained_model_name_or_path)
        return (model, info) if want_loading_info else model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the token embedding as transformers does. If the model has token weights, new tokens get weight 1."""
        embeddings: Any = super().resize_token_embeddings(*args, **kwargs)
        trunk: Any = getattr(self, "model", self)
        if trunk.token_weights is not None:
            old, size = trunk.token_weights.weight, embeddings.num_embeddings
            kept = old.detach()[:size]
            new = torch.cat((kept, kept.new_ones(size - len(kept), 1)))
            trunk.token_weights.num_embeddings = size
            trunk.token_weights.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        return embeddings

    def slice(self, exit_layer: int) -> "ModularStarEncoderPreTrainedModel":
        """Return a model of the first `exit_layer` layers and their exits. It shares its parameters with this model.

        At equal exits, both models have equal outputs, bit for bit. For separate parameters, use `copy.deepcopy`.
        Raises ValueError if this model lacks the exit (the message lists the exits), or has an adapter.
        """
        with torch.device("meta"):
            model = type(self)(self.config.cut(exit_layer))
        parameters, names = self.state_dict(keep_vars=True), list(model.state_dict())
        if not set(names) <= set(parameters):
            raise ValueError("A model with an adapter can't be sliced; merge the adapter first.")
        model.load_state_dict({name: parameters[name] for name in names}, assign=True)
        # The rotary frequencies are not in the state dict.
        getattr(model, "model", model).rotary_emb = copy.deepcopy(getattr(self, "model", self).rotary_emb)
        return model.train(self.training)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing, because `save_pretrained` writes the model code and an `auto_map` of all classes.

        The method of transformers would list only the saved class, and fails for wrapped or user-defined classes.
        """

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write weights (safetensors), configuration and the two files of model code to `save_directory`.

        Files are written to a temporary folder and moved into place at the end. If a save is interrupted, the previous
        checkpoint remains; only a kill during the final moves can leave files of both checkpoints. `save_directory` may
        be the folder that this model was loaded from.

        Args:
            save_directory: folder, created if missing.
            is_main_process: whether this process may write. If several processes share a model (FSDP2), all of them
                must call this method, and the first one writes whole tensors.
            push_to_hub: also upload the model; `repo_id`, `private` and similar arguments go to `push_to_hub`.
            save_original_format: passed to `PreTrainedModel.save_pretrained`, but False by default.
            **kwargs: passed to `PreTrainedModel.save_pretrained`.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in PUSH_ARGUMENTS if key in kwargs}
        self.config.auto_map = _auto_map(type(self))
        if kwargs.get("state_dict") is None:
            kwargs["state_dict"] = _whole_tensors(self)
        kwargs["save_original_format"] = save_original_format
        if not self.should_save_on_this_rank(is_main_process):
            super().save_pretrained(save_directory, is_main_process=False, **kwargs)
            return
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as staging:
            super().save_pretrained(staging, **kwargs)
            for module in (Path(__file__), Path(__file__).with_name("configuration_modular_star_encoder.py")):
                shutil.copyfile(module, Path(staging) / module.name)
            for weights in Path(staging).glob("*.safetensors"):  # safetensors writes files that only their owner reads
                shutil.copymode(Path(staging, Path(__file__).name), weights)
            _move_checkpoint(Path(staging), target)
        if push_to_hub:
            hub_kwargs |= {key: kwargs[key] for key in ("token", "max_shard_size") if key in kwargs}
            self.push_to_hub(hub_kwargs.pop("repo_id", target.name), **hub_kwargs)


def _check_trunk(info: dict[str, Any], source: str | os.PathLike | None) -> None:
    trunk = re.compile(r"^(model\.)?(embed_tokens|layers|norm)\.")
    for problem, place in (("missing", "from"), ("unexpected", "in")):
        names = sorted(filter(trunk.match, info[f"{problem}_keys"]))
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(
                f"{len(names)} tensors of the trunk (embedding, layers, norm) are {problem} {place} {source}: {listed}."
                " Give a config.json that fits the weights."
            )


def _cut_away(full: ModularStarEncoderConfig, kept: ModularStarEncoderConfig) -> set[str]:
    """Return regular expressions for names of tensors that a model of config `full` has and a model of `kept` lacks."""
    patterns = set()
    layers = "|".join(str(index) for index in range(kept.num_hidden_layers, full.num_hidden_layers))
    exits = "|".join(str(exit) for exit in full.exit_layers if exit not in kept.exit_layers)
    if layers:
        patterns |= {rf"(^|\.)layers\.({layers})\.", rf"(^|\.)projection_heads\.({exits})\."}
    if kept.exit_norm == "none":
        patterns.add(r"(^|\.)norm\.(weight|bias)$")
    return patterns


def _auto_map(model_class: type[ModularStarEncoderPreTrainedModel]) -> dict[str, str]:
    """Return config.json's `auto_map`: `AutoModel` loads a retrieval model if `model_class` is one, else the trunk."""
    module = "modeling_modular_star_encoder"
    retrieval = issubclass(model_class, ModularStarEncoderForRetrieval)
    return {
        "AutoConfig": "configuration_modular_star_encoder.ModularStarEncoderConfig",
        "AutoModel": f"{module}.{'ModularStarEncoderForRetrieval' if retrieval else 'ModularStarEncoderModel'}",
        "AutoModelForPreTraining": f"{module}.ModularStarEncoderForPreTraining",
        "AutoModelForMaskedLM": f"{module}.ModularStarEncoderForMaskedLM",
        "AutoModelForSequenceClassification": f"{module}.ModularStarEncoderForSequenceClassification",
    }


def _whole_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Return {name: whole tensor}, gathered in the first process, if `fully_shard` has split the model; else `None`."""
    # With a `distributed_config`, transformers has split the tensors when it loaded them, and also gathers them.
    if getattr(model.config, "distributed_config", None) is not None or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    if not any(isinstance(tensor, DTensor) for tensor in model.state_dict().values()):
        return None
    # This import takes most of a second.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return tensors


def _move_checkpoint(source: Path, target: Path) -> None:
    weights = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    names = {path.name for path in source.iterdir()}
    for name in sorted(names):
        os.replace(source / name, target / name)
    # A save without weight files, such as an adapter's, must not delete the weights in the folder.
    if any(map(weights.fullmatch, names)):
        for stale in {path.name for path in target.iterdir() if weights.fullmatch(path.name)} - names:
            (target / stale).unlink()


class ModularStarEncoderModel(ModularStarEncoderPreTrainedModel):
    """The trunk of all our models: token embedding, layers and exits, without heads.

    A forward pass runs the layers up to the deepest requested exit and returns the states of every requested exit.

    Example:
        >>> config = ModularStarEncoderConfig(hidden_size=32, num_hidden_layers=4, exit_layers=[1, 2, 4])
        >>> output = ModularStarEncoderModel(config)(torch.tensor([[5, 6, 7]]), exit_layers=(1, 2))
        >>> [states.shape for states in output.exit_hidden_states]  # exits 1 and 2; layers 3 and 4 are not run
        [torch.Size([1, 3, 32]), torch.Size([1, 3, 32])]
    """

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config)
        config = self.config
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([ModularStarEncoderLayer(config, i) for i in range(config.num_hidden_layers)])
        # CODEPATH: the published models have a final norm; a slice without their last layer has none.
        normed = config.exit_norm != "none"
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon) if normed else None
        self.rotary_emb = ModularStarEncoderRotaryEmbedding(config)
        # CODEPATH: the published models pool a plain mean; for `mose-code`, the retrieval model weights it by these.
        weighted = config.token_weights
        self.token_weights = ModularStarEncoderTokenWeights(config.vocab_size, 1) if weighted else None
        self.embedding_dropout = config.embedding_dropout
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        start_layer: int = 0,
        output_residual_states: bool = False,
        **kwargs: Any,
    ) -> tuple | ModularStarEncoderModelOutput:
        r"""Run the layers up to the deepest requested exit.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 for real tokens and 0 for padding on either side; or a 4D mask for the attention
                implementation.
            position_ids: (B, T), or (1, T) for all rows; by default, the real tokens of each row are numbered from 0.
                Without `attention_mask`, a row may hold several texts (packing): wherever its positions start again, a
                new text begins. Tokens of different texts do not attend to each other.
            inputs_embeds: token embeddings (B, T, H) in place of `input_ids`; with `start_layer`, the
                `residual_states` to resume from.
            exit_layer: the exit to return; by default the deepest, or every exit with `config.output_all_exits`.
            exit_layers: several exits to return from one pass, in place of `exit_layer`.
            start_layer: number of layers already executed on `inputs_embeds`. The outputs equal those of an
                uninterrupted pass bit for bit.
            output_residual_states: also return each exit's states before the final norm.
            **kwargs: `cu_seq_lens_q`, (number of texts + 1,) int32, divides a flat batch (1, N) into texts: text i has
                the tokens `cu_seq_lens_q[i]` to `cu_seq_lens_q[i + 1] - 1`. It works with every attention backend.
                `unpad_inputs` replaces the setting of the configuration; it has no effect with pooling "legacy", which
                reads padding. Other keys are those of transformers, such as `output_hidden_states`.

        Raises:
            ValueError: this model lacks an exit (the message lists its exits); an exit is not above `start_layer`; not
                exactly one of `input_ids` and `inputs_embeds` is given; the batch or its mask has a wrong shape; on a
                CPU, a token id is out of range; or `cu_seq_lens_q` is given for several rows.
        """
        exits = self.config.resolve_exits(exit_layer, exit_layers)
        given, fault = inputs_embeds if input_ids is None else input_ids, ""
        if (input_ids is None) == (inputs_embeds is None):
            fault = "Give exactly one of input_ids and inputs_embeds."
        elif start_layer and (inputs_embeds is None or not 0 < start_layer < exits[0]):
            fault = f"start_layer={start_layer} needs inputs_embeds and exits above {start_layer}, not {exits}."
        elif given.dim() != (3 if input_ids is None else 2):
            found = tuple(given.shape)
            fault = f"Give input_ids of shape (B, T) or inputs_embeds of shape (B, T, H), not {found}."
        elif attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape != given.shape[:2]:
            found, shape = tuple(attention_mask.shape), tuple(given.shape[:2])
            fault = f"attention_mask must have the shape of the batch, {shape}, not {found}."
        if fault:
            raise ValueError(fault)
        if inputs_embeds is None:
            try:
                inputs_embeds = self.embed_tokens(input_ids)
            except IndexError as error:
                most = self.embed_tokens.num_embeddings - 1
                raise ValueError(f"input_ids must be from 0 to {most} ({error}).") from error
        mask = restore = position_embeddings = None
        # CODEPATH: exit 0 runs no layer, so it skips packing, masks and angles, which would take most of its time.
        if exits[-1] > 0:
            inputs_embeds, position_ids, mask, restore = self._pack_inputs(
                inputs_embeds, attention_mask, position_ids, kwargs
            )
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        if start_layer == 0:
            hidden_states = nn.functional.dropout(hidden_states, p=self.embedding_dropout, training=self.training)
            if self.training and self.token_weights is not None and input_ids is not None:
                # Only the retrieval model reads these weights; this empty sum gives them a zero gradient, for DDP.
                hidden_states = hidden_states + self.token_weights(input_ids[:, :0]).sum().to(hidden_states)

        residual_states, exit_states = [], []
        for executed in range(start_layer, exits[-1] + 1):
            # An empty batch has no token, nor has one of empty texts without special tokens.
            if executed > start_layer and hidden_states.shape[0] > 0 and hidden_states.shape[1] > 0:
                hidden_states = self.layers[executed - 1](
                    hidden_states,
                    attention_mask=mask,
                    position_embeddings=position_embeddings,
                    position_ids=position_ids,
                    **kwargs,
                )
            if executed in exits:
                residual_states.append(hidden_states)
                # CODEPATH: the published models apply the norm only after their last layer; "all", at every exit.
                exit_states.append(self.norm(hidden_states) if self.config.has_norm_at(executed) else hidden_states)
        if restore is not None:
            residual_states, exit_states = list(map(restore, residual_states)), list(map(restore, exit_states))
        return ModularStarEncoderModelOutput(
            last_hidden_state=exit_states[-1],
            exit_hidden_states=tuple(exit_states),
            residual_states=tuple(residual_states) if output_residual_states else None,
        )

    def _pack_inputs(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, Any, Callable[[torch.Tensor], torch.Tensor] | None]:
        """Arrange a batch for the layers: padded, (B, T, H), or flat, (1, N, H): the N real tokens of all texts.

        Returns states, positions, the mask for attention, and a function that restores the shape of the batch (None if
        the shape has not changed). For a flat batch, adds arguments to `kwargs` that keep attention within texts.
        """
        if position_ids is not None:
            position_ids = position_ids.expand(states.shape[:2])
        bounds = _document_bounds(states, attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
        # Recorded outputs of layers would lack the padding, so the batch stays padded if outputs are recorded.
        outputs = ("output_hidden_states", "output_attentions")
        recorded = any(kwargs.get(name) or getattr(self.config, name, False) for name in outputs)
        restore = None
        padded = attention_mask is not None and attention_mask.dim() == 2
        # CODEPATH: computing padding is simpler and compiles; leaving it out is faster on batches of mixed lengths.
        unpad = kwargs.pop("unpad_inputs", self.config.unpad_inputs) and self.config.pooling != "legacy"
        if unpad and bounds is None and padded and not recorded and attention_mask.any():
            if position_ids is not None:
                position_ids = position_ids[attention_mask.bool()].unsqueeze(0)
            states, bounds, restore = _unpad(states, attention_mask)
        elif bounds is not None and states.shape[0] > 1:
            if kwargs.get("cu_seq_lens_q") is not None:
                rows = states.shape[0]
                raise ValueError(f"cu_seq_lens_q needs a flat batch of shape (1, N), but the batch has {rows} rows.")
            if recorded:
                bounds = None
            else:
                states, _, restore = _unpad(states, torch.ones_like(position_ids))
                position_ids = position_ids.reshape(1, -1)
        if bounds is None:
            mask = self._attention_mask(states, attention_mask, position_ids)
            if position_ids is None and padded:  # count only real tokens, so that padding on the left changes nothing
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            elif position_ids is None:
                position_ids = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
            return states, position_ids, mask, restore
        lengths, documents, cu_seq_lens, max_length = bounds.diff(), None, None, None
        if is_flash_attention_requested(self.config):
            cu_seq_lens = bounds.to(torch.int32)
            max_length = kwargs.get("max_length_q") or int(lengths.max())
        else:
            documents = DocumentGroups.of_similar_length(lengths.tolist(), bounds.device)
            for group in documents.groups:
                # Masks need only the shape, dtype and device of the states.
                group.mask = self._attention_mask(states[0, :1].expand(*group.tokens.shape, -1), group.real)
        kwargs |= {"document_groups": documents, "cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        kwargs |= {"max_length_q": max_length, "max_length_k": max_length}
        if position_ids is None:  # count from 0 in each text
            starts = bounds[:-1].repeat_interleave(lengths)
            position_ids = (torch.arange(starts.shape[0], device=bounds.device) - starts).unsqueeze(0)
        return states, position_ids, None, restore

    def _attention_mask(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None = None
    ) -> Any:
        """Return a mask for attention, which hides padding, or separates packed texts of a row by their positions."""
        apart = None
        if attention_mask is None and position_ids is not None:
            documents = find_packed_sequence_indices(position_ids)
            apart = None if documents is None else packed_sequence_mask_function(documents)
        # CODEPATH: by default all tokens see each other. It is not known whether the published model's SDPA is causal.
        if self.config.is_causal:
            return create_causal_mask(self.config, states, attention_mask, None, and_mask_function=apart)
        return create_bidirectional_mask(self.config, states, attention_mask, and_mask_function=apart)


def _document_bounds(
    states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the start of each text in the flat batch, then the number of tokens; `None` if each row is one text."""
    if cu_seq_lens is not None:
        return cu_seq_lens.long()
    if attention_mask is not None or position_ids is None:
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    documents = find_packed_sequence_indices(position_ids.expand(states.shape[:2]))
    if documents is None:
        return None
    first_of_row = torch.arange(documents.shape[0], device=documents.device)[:, None] * documents.shape[1]
    lengths = (documents + first_of_row).flatten().unique_consecutive(return_counts=True)[1]
    return nn.functional.pad(lengths.cumsum(0), (1, 0))


def _unpad(
    states: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the N real tokens in one row (1, N, H), the texts' bounds, and a function that restores the padding.

    The bounds (texts + 1,) are the index of each text's first token, then N. The function takes states (1, N, size).
    """
    shape = states.shape
    places = attention_mask.flatten().nonzero().squeeze(-1)
    lengths = attention_mask.long().sum(dim=-1)
    bounds = nn.functional.pad(lengths[lengths > 0].cumsum(0), (1, 0))

    def restore(flat: torch.Tensor) -> torch.Tensor:
        padded = flat.new_zeros(shape[0] * shape[1], flat.shape[-1])
        return padded.index_copy(0, places.to(flat.device), flat[0]).view(*shape[:2], -1)

    return states.flatten(0, 1).index_select(0, places).unsqueeze(0), bounds, restore


def _rows(
    states: torch.Tensor, attention_mask: torch.Tensor | None, bounds: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return packed texts as padded rows, and a mask of the rows; if `bounds` is None, return the inputs unchanged."""
    if bounds is None:
        if attention_mask is not None and attention_mask.dim() != 2:
            shape = tuple(attention_mask.shape)
            raise ValueError(f"A model with heads needs an attention_mask of shape (rows, tokens), not {shape}.")
        return states, attention_mask
    lengths = bounds.diff()
    offsets = torch.arange(int(lengths.max()), device=bounds.device)
    mask = offsets < lengths[:, None]
    tokens = (bounds[:-1, None] + offsets * mask).to(states.device)
    return states.flatten(0, 1).index_select(0, tokens.flatten()).unflatten(0, tokens.shape), mask.long()


def _pool(states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Return one vector (H,) per row: the mean of the row's real tokens, or one token (see `config.pooling`)."""
    batch, length = states.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones(batch, length, dtype=torch.long)
    attention_mask = attention_mask.to(states.device)
    # CODEPATH: models trained here pool the mean; the published ones do not say how they pool, so it is an option.
    if pooling == "mean":  # with the operations of sentence-transformers' `Pooling`, for equal results
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        dtype = torch.float32 if states.dtype in (torch.float16, torch.bfloat16) else states.dtype
        total = (states * mask).sum(dim=1, dtype=dtype)
        return (total / mask.sum(dim=1, dtype=dtype).clamp(min=1e-9)).to(states.dtype)
    rows, places = torch.arange(batch, device=states.device), torch.arange(length, device=states.device)
    # CODEPATH: `legacy` pools as the model that preceded the published ones did.
    if pooling == "legacy":
        return states[rows, attention_mask.long().sum(dim=-1) - 1]
    order = places.flip(0) if pooling == "first" else places
    return states[rows, (attention_mask * (order + 1)).argmax(dim=-1)]


class ModularStarEncoderTokenWeights(nn.Embedding):
    """Learned weights (V, 1) of tokens in the mean of a text, initially 1; `forward` returns 0 for negative weights."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return ClampWithInwardGradient.apply(super().forward(input_ids), 0.0, math.inf)


class ModularStarEncoderExitEmbedding(nn.Embedding):
    """The learned vector of each exit; zeros if an exit has no vector, as the last exit in some published files."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config.exit_embedding_rows, config.exit_embedding_size)

    def forward(self, exit_index: int) -> torch.Tensor:  # type: ignore[override]
        if exit_index >= self.num_embeddings:
            return self.weight.new_zeros(self.embedding_dim)
        return self.weight[exit_index]


class ModularStarEncoderExitConditionedPooler(nn.Module):
    """Makes a classifier's input (B, H + exit_embedding_size): tanh(linear(a token's state)) and the exit's vector."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.position = config.pooler_position

    def forward(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None, exit_vector: torch.Tensor
    ) -> torch.Tensor:
        pooled = torch.tanh(self.dense(_pool(states, attention_mask, self.position)))
        return torch.cat((pooled, exit_vector.to(pooled.device).expand(pooled.shape[0], -1)), dim=-1)


class ModularStarEncoderMaskedLMHeads(nn.Module):
    """Head for masked language modelling; the learned vector of the exit is an additional input."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size + config.exit_embedding_size
        self.exit_embedding = ModularStarEncoderExitEmbedding(config)
        self.transform = nn.Linear(width, width)
        self.act = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.decoder = nn.Linear(width, config.vocab_size)

    def token_features(self, states: torch.Tensor, exit_index: int) -> torch.Tensor:
        """Return the input (…, H + exit_embedding_size) of the decoder for the states (…, H) of an exit."""
        vector = self.exit_embedding(exit_index).expand(*states.shape[:-1], -1)
        return self.layer_norm(self.act(self.transform(torch.cat((states.to(vector.device), vector), dim=-1))))


class ModularStarEncoderPreTrainingHeads(ModularStarEncoderMaskedLMHeads):
    """Heads for masked language modelling and in-context classification, with the exit's learned vector as an input."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config)
        self.pooler = ModularStarEncoderExitConditionedPooler(config)
        self.icc_classifier = nn.Linear(config.hidden_size + config.exit_embedding_size, 2)

    def masked_lm(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean cross-entropy (E,) and accuracy (E,) of N masked tokens at E exits; both are 0 if N is 0.

        `features` are (E, N, H + exit_embedding_size), `labels` (N,). Logits are computed for one chunk of tokens at a
        time, and again in the backward pass, so that memory does not grow with E × N × V.
        """
        exits, tokens = features.shape[:2]
        chunk = max(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // self.decoder.out_features)
        parts = zip(features.flatten(0, 1).split(chunk), labels.repeat(exits).split(chunk), strict=True)
        of_parts = [checkpoint(self._losses_and_hits, *part, use_reentrant=False) for part in parts]
        losses, hits = (torch.cat(values).view(exits, tokens) for values in zip(*of_parts, strict=True))
        return losses.sum(dim=1) / max(1, tokens), hits.sum(dim=1) / max(1, tokens)

    def _losses_and_hits(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = features.device.type
        autocast: Any = nullcontext()
        # With autocast's cache, the gradients of the chunks would be added up in 16 bits.
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            autocast = torch.autocast(device, cache_enabled=False)
        with autocast:
            logits = self.decoder(features).float()
        labels = labels.to(logits.device)
        return nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1) == labels


class ModularStarEncoderVocabularyModel(ModularStarEncoderPreTrainedModel):
    """Base class of the models for pre-training and masked language modelling: a trunk, and heads (`heads_class`)."""

    heads_class: type[ModularStarEncoderMaskedLMHeads]

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config)
        self.model = ModularStarEncoderModel(self.config)
        self.heads = self.heads_class(self.config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.heads.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.heads.decoder = new_embeddings


class ModularStarEncoderForPreTraining(ModularStarEncoderVocabularyModel):
    """Model for masked language modelling and in-context classification at every exit (arXiv 2503.03008, pre-training).

    Example:
        >>> config = ModularStarEncoderConfig(hidden_size=32, num_hidden_layers=2, exit_layers=[1, 2])
        >>> ids, labels = torch.tensor([[5, 6, 7]]), torch.tensor([[-100, 9, -100]])  # the second token was 9
        >>> output = ModularStarEncoderForPreTraining(config)(ids, labels=labels, icc_labels=torch.tensor([1]))
        >>> output.loss.shape, output.mlm_losses.shape  # the weighted sum, and one loss for each exit
        (torch.Size([]), torch.Size([2]))
    """

    heads_class = ModularStarEncoderPreTrainingHeads
    heads: ModularStarEncoderPreTrainingHeads

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        icc_labels: torch.Tensor | None = None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple | ModularStarEncoderForPreTrainingOutput:
        r"""Predict masked tokens, and whether the two snippets of a row come from one repository.

        If only `labels` or only `icc_labels` is given, the head for the other labels gets gradients of zero, so that
        DDP needs no `find_unused_parameters`.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: the batch, see `ModularStarEncoderModel.forward`.
            labels: (B, T), the original token at masked positions and -100 elsewhere.
            icc_labels: (B,), 1 where both snippets come from the same repository, otherwise 0.
            exit_layer, exit_layers: by default every exit if labels are given, else see `config.resolve_exits`.
        """
        supervised = labels is not None or icc_labels is not None
        if supervised and exit_layer is None and exit_layers is None:
            exit_layers = self.config.exit_layers
        exits = self.config.resolve_exits(exit_layer, exit_layers)
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, exit_layers=exits, return_dict=True, **kwargs
        )
        rows = [self.config.exit_index(exit_layer) for exit_layer in exits]
        states_of_rows = list(zip(outputs.exit_hidden_states, rows, strict=True))
        bounds = _document_bounds(outputs.last_hidden_state, attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
        pooled = [
            self.heads.pooler(*_rows(states, attention_mask, bounds), self.heads.exit_embedding(row))
            for states, row in states_of_rows
        ]
        icc_logits = torch.stack([self.heads.icc_classifier(features) for features in pooled])
        found: dict[str, torch.Tensor] = {}
        if labels is None:
            found["logits"] = self.heads.decoder(self.heads.token_features(outputs.last_hidden_state, rows[-1]))
        else:
            masked = (labels.flatten() != -100).nonzero().squeeze(-1)
            features = [
                self.heads.token_features(states.flatten(0, 1)[masked.to(states.device)], row)
                for states, row in states_of_rows
            ]
            of_exits = self.heads.masked_lm(torch.stack(features), labels.flatten()[masked])
            found["mlm_losses"], found["mlm_accuracies"] = of_exits
        if icc_labels is not None:
            classes = icc_logits.float().transpose(1, 2)
            targets = icc_labels.to(classes.device).expand(len(exits), -1)
            found["icc_losses"] = nn.functional.cross_entropy(classes, targets, reduction="none").mean(dim=1)
            found["icc_accuracies"] = (classes.argmax(dim=1) == targets).float().mean(dim=1)
        if supervised:
            idle = icc_logits if icc_labels is None else found.get("logits", icc_logits)
            terms = [found[name] for name in ("mlm_losses", "icc_losses") if name in found]
            losses = torch.stack([term.to(terms[0].device) for term in terms]).sum(dim=0)
            weights = [self.config.exit_weight(exit_layer) for exit_layer in exits]
            found["loss"] = (losses * torch.tensor(weights, device=losses.device)).sum() + idle[:0].sum().to(losses)
        return ModularStarEncoderForPreTrainingOutput(
            icc_logits=icc_logits,
            exit_hidden_states=outputs.exit_hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **found,
        )


class ModularStarEncoderForMaskedLM(ModularStarEncoderVocabularyModel):
    """Model for masked language modelling at one exit, with the loss and logits that transformers' scripts expect.

    If this model is loaded from a pre-training checkpoint, the heads for in-context classification are left out. The
    model computes the logits of all tokens; to train all exits together in less memory, use
    `ModularStarEncoderForPreTraining`.

    Example:
        >>> config = ModularStarEncoderConfig(hidden_size=32, num_hidden_layers=2, exit_layers=[1, 2])
        >>> ids, labels = torch.tensor([[5, 6, 7]]), torch.tensor([[-100, 9, -100]])  # the second token was 9
        >>> output = ModularStarEncoderForMaskedLM(config)(ids, labels=labels, exit_layer=1)
        >>> output.loss.shape, output.logits.shape
        (torch.Size([]), torch.Size([1, 3, 49156]))
    """

    heads_class = ModularStarEncoderMaskedLMHeads
    accepts_loss_kwargs = True
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^heads\.(pooler|icc_classifier)\."]  # type: ignore[misc]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        exit_layer: int | None = None,
        **kwargs: Any,
    ) -> tuple | MaskedLMOutput:
        r"""Predict masked tokens at one exit.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: the batch, see `ModularStarEncoderModel.forward`.
            labels: (B, T), the original token at masked positions and -100 elsewhere. The loss is the mean
                cross-entropy over masked tokens; with `num_items_in_batch`, it is the sum, divided by this number.
            exit_layer: the exit that predicts; by default the deepest.
        """
        exit_layer = self.config.check_exit(self.config.num_hidden_layers if exit_layer is None else exit_layer)
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, exit_layer, return_dict=True, **kwargs
        )
        row = self.config.exit_index(exit_layer)
        logits = self.heads.decoder(self.heads.token_features(outputs.last_hidden_state, row))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ModularStarEncoderProjectionHead(nn.Module):
    """Two linear layers with an activation between them, or one linear layer (see `config.projection_head`)."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.projection_size)
        self.out_proj = None
        # CODEPATH: the published heads have two layers; `mose-code` has one linear layer, which commutes with the mean
        # of tokens, so that it projects one vector per text.
        if config.projection_head == "mlp":
            self.act = ACT2FN[config.projection_act]
            self.out_proj = nn.Linear(config.projection_size, config.projection_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = self.dense(states)
        return states if self.out_proj is None else self.out_proj(self.act(states))


class ClampWithInwardGradient(torch.autograd.Function):
    """Clamp a parameter to bounds. Beyond a bound, a gradient that would push the parameter further out becomes zero.

    Other gradients pass and can move the parameter back. With `torch.clamp`, all gradients beyond a bound become zero.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, lowest: float, highest: float) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = (lowest, highest)
        return value.clamp(lowest, highest)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (value,), (lowest, highest) = ctx.saved_tensors, ctx.bounds
        outwards = ((value >= highest) & (gradient < 0)) | ((value <= lowest) & (gradient > 0))
        return gradient.masked_fill(outwards, 0.0), None, None


class ModularStarEncoderLogitScale(nn.Module):
    """A learned multiplier of similarities, stored as its logarithm; `forward` returns the multiplier, (1,) float32.

    The multiplier is a module, so it works with DDP, FSDP2, checkpoints and peft (`modules_to_save=["logit_scale"]`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self) -> torch.Tensor:
        lowest, highest = (math.log(bound) for bound in LOGIT_SCALE_BOUNDS)
        return ClampWithInwardGradient.apply(self.log_scale.float(), lowest, highest).exp()


class ModularStarEncoderForRetrieval(ModularStarEncoderPreTrainedModel):
    """Model for normalised embeddings of text and code: a trunk and one projection head per exit (arXiv 2503.03008).

    Example:
        >>> config = ModularStarEncoderConfig(
        ...     hidden_size=32, num_hidden_layers=4, exit_layers=[1, 2, 4], projection_size=16
        ... )
        >>> model = ModularStarEncoderForRetrieval(config)
        >>> model(torch.tensor([[5, 6, 7]]), exit_layer=2).sentence_embedding.shape
        torch.Size([1, 16])
        >>> model(torch.tensor([[5, 6, 7]]), exit_layers=(1, 4)).exit_embeddings.shape
        torch.Size([2, 1, 16])
    """

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config)
        self.model = ModularStarEncoderModel(self.config)
        self.projection_heads = nn.ModuleDict(
            {str(exit_layer): ModularStarEncoderProjectionHead(self.config) for exit_layer in self.config.exit_layers}
        )
        self._returns_hidden_states = self.config.output_hidden_states
        # CODEPATH: the paper's logit scale is fixed; a learned one is saved with the model.
        self.logit_scale = None if self.config.logit_scale_init_value is None else ModularStarEncoderLogitScale()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ModularStarEncoderLogitScale):
            init.constant_(module.log_scale, math.log(self.config.logit_scale_init_value))

    def _token_scales(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, bounds: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return each token's weight divided by the mean weight of its text, (B, T, 1) float32; `None` without weights.

        The plain mean of states times these numbers is the weighted mean of the states. Padding gets 0, and so does
        each token of a text that has only weights of 0.
        """
        if self.model.token_weights is None:
            return None
        if input_ids is None:
            raise ValueError("This model weights tokens by their ids; pass input_ids instead of inputs_embeds.")
        weights, mask = _rows(self.model.token_weights(input_ids).float(), attention_mask, bounds)
        tokens: Any = weights.shape[1]
        if mask is not None:
            real = mask.unsqueeze(-1).float()
            weights, tokens = weights * real, real.sum(dim=1, keepdim=True)
        scales = weights * (tokens / weights.sum(dim=1, keepdim=True).clamp(min=1e-9))
        return scales if bounds is None else scales[mask.bool()].view(*input_ids.shape, 1)

    def _normalize(self, embeddings: torch.Tensor) -> torch.Tensor:
        # CODEPATH: `clip` normalises as the model that preceded the published ones did.
        if self.config.embedding_normalization == "clip":
            return embeddings / embeddings.norm(p=2, dim=1, keepdim=True).clamp(min=1.0)
        # In float32, because in float16 the epsilon is 0, and the zero embedding of an empty text would become NaN.
        return nn.functional.normalize(embeddings.float(), p=2, dim=1).to(embeddings.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple | ModularStarEncoderForRetrievalOutput:
        r"""Embed a batch at one or several exits in one pass.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, exit_layer, exit_layers: see
                `ModularStarEncoderModel.forward`; `inputs_embeds` does not work with `config.token_weights`.

        Raises:
            RuntimeError: the model is in training mode, and `config.output_hidden_states` was set after construction.
                AdaptiveLayerLoss and Matryoshka2dLoss of sentence-transformers set this option, but would not train the
                heads of shallower exits.
        """
        if self.training and self.config.output_hidden_states and not self._returns_hidden_states:
            raise RuntimeError(
                "config.output_hidden_states was set on a loaded model, as AdaptiveLayerLoss and Matryoshka2dLoss do. "
                "These losses do not train the heads of shallower exits: use "
                "modular_star_encoder.MultiExitContrastiveLoss. To get hidden states, pass output_hidden_states=True "
                "to the call or to from_pretrained."
            )
        exits = self.config.resolve_exits(exit_layer, exit_layers)
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, exit_layers=exits, return_dict=True, **kwargs
        )
        bounds = _document_bounds(outputs.last_hidden_state, attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
        scales = self._token_scales(input_ids, attention_mask, bounds)

        def scaled(states: torch.Tensor) -> torch.Tensor:
            return states if scales is None else states * scales.to(states.device)

        embeddings, tokens = [], None
        for exit_layer, states in zip(exits, outputs.exit_hidden_states, strict=True):
            head = self.projection_heads[str(exit_layer)]
            # CODEPATH: the published models probably project tokens, then pool; their predecessor pools, then projects.
            if self.config.projection_order == "project_then_pool":
                tokens = head(states)
                pooled = _pool(*_rows(scaled(tokens), attention_mask, bounds), self.config.pooling).to(tokens.dtype)
            else:
                pooled = _pool(*_rows(scaled(states), attention_mask, bounds), self.config.pooling)
                pooled = head(pooled.to(states.dtype))
                if scales is not None:
                    # The embedding of an empty text is zeros, not the head's bias.
                    pooled = pooled * _rows(scales, attention_mask, bounds)[0].any(dim=1).to(pooled.device)
            embeddings.append(self._normalize(pooled))
        if tokens is None:
            tokens = head(states)
        return ModularStarEncoderForRetrievalOutput(
            last_hidden_state=scaled(tokens).to(tokens.dtype),
            sentence_embedding=embeddings[-1],
            exit_embeddings=torch.stack([one.to(embeddings[-1].device) for one in embeddings]),
            logit_scale=None if self.logit_scale is None else self.logit_scale(),
            exit_hidden_states=outputs.exit_hidden_states,
            residual_states=outputs.residual_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ModularStarEncoderForSequenceClassification(ModularStarEncoderPreTrainedModel):
    """Model that classifies a text, or a pair `<sep>a<sep>b<cls>`, from the state of the final `<cls>` at any exit.

    Example:
        >>> config = ModularStarEncoderConfig(hidden_size=32, num_hidden_layers=2, exit_layers=[1, 2], num_labels=3)
        >>> model = ModularStarEncoderForSequenceClassification(config)
        >>> model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([2])).logits.shape
        torch.Size([1, 3])
    """

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels
        self.model = ModularStarEncoderModel(config)
        self.exit_embedding = ModularStarEncoderExitEmbedding(config)
        self.pooler = ModularStarEncoderExitConditionedPooler(config)
        self.classifier_dropout = config.classifier_dropout
        self.classifier = nn.Linear(config.hidden_size + config.exit_embedding_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple | ModularStarEncoderForSequenceClassificationOutput:
        r"""Classify a batch at one or several exits in one pass; return logits and, with `labels`, a loss.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, exit_layer, exit_layers: see
                `ModularStarEncoderModel.forward`.
            labels: (B,) class indices; or (B,) float targets if `num_labels` is 1; or (B, num_labels) float, 0 or 1, if
                a text can have several labels. transformers chooses the loss (`config.problem_type`).
        """
        exits = self.config.resolve_exits(exit_layer, exit_layers)
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, exit_layers=exits, return_dict=True, **kwargs
        )
        bounds = _document_bounds(outputs.last_hidden_state, attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
        logits = []
        for exit_layer, states in zip(exits, outputs.exit_hidden_states, strict=True):
            vector = self.exit_embedding(self.config.exit_index(exit_layer))
            features = self.pooler(*_rows(states, attention_mask, bounds), vector)
            features = nn.functional.dropout(features, p=self.classifier_dropout, training=self.training)
            logits.append(self.classifier(features))
        exit_logits = torch.stack(logits)
        loss = None
        if labels is not None:
            loss = sum(
                self.config.exit_weight(exit_layer)
                * self.loss_function(pooled_logits=logits, logits=logits, labels=labels, config=self.config)
                for exit_layer, logits in zip(exits, exit_logits, strict=True)
            )
        return ModularStarEncoderForSequenceClassificationOutput(
            loss=loss,
            logits=exit_logits[-1],
            exit_logits=exit_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "ModularStarEncoderForMaskedLM",
    "ModularStarEncoderForPreTraining",
    "ModularStarEncoderForRetrieval",
    "ModularStarEncoderForSequenceClassification",
    "ModularStarEncoderModel",
    "ModularStarEncoderPreTrainedModel",
]
