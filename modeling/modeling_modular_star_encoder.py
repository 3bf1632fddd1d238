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

A forward pass runs the layers up to the deepest exit asked for and no further, and returns the states of every exit
asked for. Heads that are shared between exits (masked language modelling, in-context classification, sequence
classification) are told the exit by a small learned vector concatenated to their features; retrieval has one projection
head per exit.

Shapes: B batch, T tokens, H hidden size, E exits asked for, D projection size, V vocabulary.

This file and `configuration_modular_star_encoder.py` travel inside every repository; they need torch and transformers.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_modular_star_encoder import ModularStarEncoderConfig

# Logits computed at once by the masked language modelling loss: 2**24 float32 are 64 MiB, whatever the vocabulary.
LOGITS_PER_CHUNK = 2**24


@dataclass
class ModularStarEncoderModelOutput(ModelOutput):
    """Output of the trunk.

    Args:
        last_hidden_state: (B, T, H), states of the deepest exit asked for.
        exit_hidden_states: tuple of E tensors (B, T, H), shallowest exit first.
        residual_states: the same before the final norm, from which a later pass can resume (`start_layer`); only with
            `output_residual_states=True`.
        hidden_states: embeddings and the output of each executed layer, (B, T, H); the last equals `last_hidden_state`.
        attentions: attention weights of each executed layer, (B, heads, T, T).
    """

    last_hidden_state: torch.FloatTensor | None = None
    exit_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    residual_states: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ModularStarEncoderForPreTrainingOutput(ModelOutput):
    """Output of pre-training; per-exit tensors have the shallowest exit first.

    Args:
        loss: scalar, the sum over exits of i/36 (MLM + ICC); i/36 is layers executed over the depth of the full model.
        logits: (B, T, V), tokens predicted at the deepest exit asked for; `None` when `labels` are given, for then they
            are computed at masked positions only and reduced to losses at once.
        icc_logits: (E, B, 2), class 1 means "from the same repository".
        mlm_losses, mlm_accuracies: (E,), mean over masked tokens; `None` without `labels`.
        icc_losses, icc_accuracies: (E,), mean over the batch; `None` without `icc_labels`.
        exit_hidden_states, hidden_states, attentions: as in the trunk's output.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    icc_logits: torch.FloatTensor | None = None
    mlm_losses: torch.FloatTensor | None = None
    mlm_accuracies: torch.FloatTensor | None = None
    icc_losses: torch.FloatTensor | None = None
    icc_accuracies: torch.FloatTensor | None = None
    exit_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ModularStarEncoderForRetrievalOutput(ModelOutput):
    """Output of the retrieval model.

    Args:
        last_hidden_state: (B, T, D), tokens projected by the head of the deepest exit asked for.
        sentence_embedding: (B, D), of the deepest exit asked for, L2-normalised.
        exit_embeddings: (E, B, D), of every exit asked for, shallowest first, L2-normalised.
        exit_hidden_states, residual_states, hidden_states, attentions: as in the trunk's output.
    """

    last_hidden_state: torch.FloatTensor | None = None
    sentence_embedding: torch.FloatTensor | None = None
    exit_embeddings: torch.FloatTensor | None = None
    exit_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    residual_states: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ModularStarEncoderForSequenceClassificationOutput(ModelOutput):
    """Output of sequence classification.

    Args:
        loss: scalar, the i/36-weighted sum over the exits asked for; `None` without `labels`.
        logits: (B, num_labels), of the deepest exit asked for.
        exit_logits: (E, B, num_labels), shallowest exit first.
        hidden_states, attentions: as in the trunk's output.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    exit_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turn the two halves of the last dimension (a, b) into (-b, a)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys (B, heads, T, head_dim) by their positions' angles, cos and sin (B, T, head_dim)."""
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
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: softmax in float32; returns (B, T, heads, head_dim) and the weights (B, heads, T, T)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ModularStarEncoderRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary position embedding."""

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

    @staticmethod
    def compute_default_rope_parameters(
        config: ModularStarEncoderConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies base^(-2i/d), i = 0 … d/2 - 1 (RoFormer, arXiv 2104.09864), and a scaling of 1."""
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
    """Grouped-query attention in which every token sees every other one."""

    def __init__(self, config: ModularStarEncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.residual_dropout = config.residual_dropout
        self.is_causal = False
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
        **kwargs: Unpack[TransformersKwargs],
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
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = self.o_proj(output.reshape(*shape, -1).contiguous())
        return nn.functional.dropout(output, p=self.residual_dropout, training=self.training), weights


class ModularStarEncoderMLP(nn.Module):
    """StarCoder2's MLP: one wide layer with GELU, not gated."""

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
    """One StarCoder2 block, pre-norm."""

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
        **kwargs: Unpack[TransformersKwargs],
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
    """What all models here share: cutting at `config.exit_layer`, and checkpoints that carry their own code."""

    config: ModularStarEncoderConfig
    config_class = ModularStarEncoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["ModularStarEncoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar = {
        "hidden_states": ModularStarEncoderLayer,
        "attentions": ModularStarEncoderAttention,
    }

    def __init__(self, config: ModularStarEncoderConfig, *inputs: Any, **kwargs: Any) -> None:
        # Values given to `from_pretrained` are set on the configuration after its own validation.
        config.validate()
        full = config
        if full.exit_layer is not None:
            config = full.cut(full.exit_layer)
        super().__init__(config, *inputs, **kwargs)
        if full.exit_layer is not None:
            self._keys_to_ignore_on_load_unexpected = _cut_away(full, config)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: `save_pretrained` writes the code and a full `auto_map` itself.

        The default mechanism lists only the class that is saved, and finds no file for wrapped or user-defined classes.
        """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write weights (safetensors), configuration and both files of model code to `save_directory`.

        Files are written aside and moved into place, so that an interrupted save leaves the previous checkpoint whole,
        and saving over the files that this model was loaded from (and still maps into memory) is safe.

        Args:
            save_directory: folder, created if missing.
            is_main_process: whether this process may write. Where several processes share a model (FSDP2), each must
                call; the first one writes, whole tensors.
            push_to_hub: also upload the model; `repo_id`, `commit_message` and the like are passed on.
            save_original_format: as in transformers, but off by default.
            **kwargs: passed to `PreTrainedModel.save_pretrained`.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "create_pr") if key in kwargs}
        self.config.auto_map = _auto_map(type(self))
        if kwargs.get("state_dict") is None:
            kwargs["state_dict"] = _whole_tensors(self)
        if not self.should_save_on_this_rank(is_main_process):
            super().save_pretrained(
                save_directory, is_main_process=False, save_original_format=save_original_format, **kwargs
            )
            return
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as staging:
            super().save_pretrained(staging, save_original_format=save_original_format, **kwargs)
            for module in (Path(__file__), Path(__file__).with_name("configuration_modular_star_encoder.py")):
                shutil.copyfile(module, Path(staging) / module.name)
            _move_checkpoint(Path(staging), target)
        if push_to_hub:
            self.push_to_hub(hub_kwargs.pop("repo_id", target.name), token=kwargs.get("token"), **hub_kwargs)


def _cut_away(full: ModularStarEncoderConfig, kept: ModularStarEncoderConfig) -> set[str]:
    """Patterns of the tensors that a checkpoint of `full` holds and a model of `kept` does not read."""
    patterns = set()
    layers = "|".join(str(index) for index in range(kept.num_hidden_layers, full.num_hidden_layers))
    exits = "|".join(str(exit) for exit in full.exit_layers if exit not in kept.exit_layers)
    if layers:
        patterns |= {rf"(^|\.)layers\.({layers})\.", rf"(^|\.)projection_heads\.({exits})\."}
    if kept.exit_norm == "none":
        patterns.add(r"(^|\.)norm\.(weight|bias)$")
    return patterns


def _auto_map(model_class: type[ModularStarEncoderPreTrainedModel]) -> dict[str, str]:
    """The full `auto_map`: `AutoModel` names the retrieval model where one is saved, otherwise the trunk."""
    module = "modeling_modular_star_encoder"
    retrieval = issubclass(model_class, ModularStarEncoderForRetrieval)
    return {
        "AutoConfig": "configuration_modular_star_encoder.ModularStarEncoderConfig",
        "AutoModel": f"{module}.{'ModularStarEncoderForRetrieval' if retrieval else 'ModularStarEncoderModel'}",
        "AutoModelForPreTraining": f"{module}.ModularStarEncoderForPreTraining",
        "AutoModelForMaskedLM": f"{module}.ModularStarEncoderForPreTraining",
        "AutoModelForSequenceClassification": f"{module}.ModularStarEncoderForSequenceClassification",
    }


def _whole_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """The full tensors of a model that `fully_shard` has split, in the first process; `None` for any other model.

    Transformers gathers only those that it has split itself, at load.
    """
    split_at_load = getattr(model.config, "distributed_config", None) is not None
    if split_at_load or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    if not any(isinstance(tensor, DTensor) for tensor in model.state_dict().values()):
        return None
    # Here, for it takes most of a second to import.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _move_checkpoint(source: Path, target: Path) -> None:
    """Move every file of `source` into `target` by rename, then remove weights there that these replace."""
    weights = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    names = {path.name for path in source.iterdir()}
    for name in sorted(names):
        os.replace(source / name, target / name)
    # An adapter has its base's weights beside it, and does not replace them.
    if any(weights.fullmatch(name) for name in names):
        for stale in [path for path in target.iterdir() if weights.fullmatch(path.name) and path.name not in names]:
            stale.unlink()


class ModularStarEncoderModel(ModularStarEncoderPreTrainedModel):
    """The trunk: token embedding, layers, exits."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config)
        config = self.config
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([ModularStarEncoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = None
        # CODEPATH: a slice of a published model below its top has no final norm; the published models have one.
        if config.exit_norm != "none":
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.rotary_emb = ModularStarEncoderRotaryEmbedding(config)
        self.embedding_dropout = config.embedding_dropout
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        start_layer: int = 0,
        output_residual_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ModularStarEncoderModelOutput:
        r"""Run the layers up to the deepest exit asked for.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 for real tokens and 0 for padding on either side; or a prepared 4D mask.
            position_ids: (B, T); by default each row counts its real tokens from 0.
            inputs_embeds: (B, T, H) in place of `input_ids`; with `start_layer`, the `residual_states` to resume from.
            exit_layer: the one exit to run to; by default the deepest.
            exit_layers: several exits to return from one pass.
            start_layer: number of layers already executed on `inputs_embeds`. A resumed pass equals a straight one bit
                for bit.
            output_residual_states: also return each exit's states before the final norm.

        Raises:
            ValueError: an exit that this model does not have (the message lists those it has), an exit not above
                `start_layer`, or not exactly one of `input_ids` and `inputs_embeds`.
        """
        exits = self.config.resolve_exits(exit_layer, exit_layers)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if start_layer and (inputs_embeds is None or not 0 < start_layer < exits[0]):
            raise ValueError(f"start_layer {start_layer} needs inputs_embeds, and exits deeper than it; got {exits}.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = _positions(attention_mask, inputs_embeds)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        hidden_states = inputs_embeds
        if start_layer == 0:
            hidden_states = nn.functional.dropout(hidden_states, p=self.embedding_dropout, training=self.training)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)

        residual_states, exit_states = [], []
        for index in range(start_layer, exits[-1]):
            hidden_states = self.layers[index](
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **kwargs,
            )
            if index + 1 in exits:
                residual_states.append(hidden_states)
                # CODEPATH: the published models norm their last layer alone; with exit_norm="all", every exit.
                exit_states.append(self.norm(hidden_states) if self.config.has_norm_at(index + 1) else hidden_states)
        return ModularStarEncoderModelOutput(
            last_hidden_state=exit_states[-1],
            exit_hidden_states=tuple(exit_states),
            residual_states=tuple(residual_states) if output_residual_states else None,
        )


def _positions(attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.LongTensor:
    """Positions (B, T) that count the real tokens of each row, so that padding on either side changes nothing."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)


def _last_token(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The states (B, H) of each row's last real token, which is the template's `<cls>`."""
    if attention_mask is None:
        return states[:, -1]
    places = torch.arange(states.shape[1], device=states.device)
    last = (attention_mask * places).argmax(dim=-1)
    return states[torch.arange(states.shape[0], device=states.device), last]


def _mean_of_tokens(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean (B, D) of each row's real tokens, in the operations of sentence-transformers' `Pooling`."""
    if attention_mask is None:
        attention_mask = torch.ones(states.shape[:-1], dtype=torch.long, device=states.device)
    mask = attention_mask.unsqueeze(-1).to(states.dtype)
    dtype = torch.float32 if states.dtype in (torch.float16, torch.bfloat16) else states.dtype
    total = (states * mask).sum(dim=1, dtype=dtype)
    return (total / mask.sum(dim=1, dtype=dtype).clamp(min=1e-9)).to(states.dtype)


class ModularStarEncoderExitConditionedPooler(nn.Module):
    """Pooled features (B, H + exit embedding) for classifiers: tanh(W `<cls>` state), then the exit's vector."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None, exit_vector: torch.Tensor
    ) -> torch.Tensor:
        pooled = torch.tanh(self.dense(_last_token(states, attention_mask)))
        return torch.cat((pooled, exit_vector.expand(pooled.shape[0], -1)), dim=-1)


class ModularStarEncoderPreTrainingHeads(nn.Module):
    """Masked language modelling and in-context classification, shared by all exits and told the exit."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size + config.exit_embedding_size
        self.exit_embedding = nn.Embedding(len(config.parent_exit_layers), config.exit_embedding_size)
        self.transform = nn.Linear(width, width)
        self.act = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.decoder = nn.Linear(width, config.vocab_size)
        self.pooler = ModularStarEncoderExitConditionedPooler(config)
        self.icc_classifier = nn.Linear(width, 2)

    def exit_vector(self, exit_index: int) -> torch.Tensor:
        """The learned vector of one exit."""
        return self.exit_embedding(torch.tensor(exit_index, device=self.exit_embedding.weight.device))

    def token_features(self, states: torch.Tensor, exit_index: int) -> torch.Tensor:
        """Features (…, H + exit embedding) that the decoder turns into logits."""
        vector = self.exit_vector(exit_index).expand(*states.shape[:-1], -1)
        return self.layer_norm(self.act(self.transform(torch.cat((states, vector), dim=-1))))

    def masked_lm(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy and accuracy over N tokens: features (N, H + exit embedding), labels (N,).

        Logits exist for one chunk at a time, in the backward pass too: memory does not grow with N × V.
        """
        rows = max(1, LOGITS_PER_CHUNK // self.decoder.out_features)
        total, correct = features.new_zeros((), dtype=torch.float32), features.new_zeros((), dtype=torch.float32)
        for chunk, chunk_labels in zip(features.split(rows), labels.split(rows), strict=True):
            loss, hits = checkpoint(self._masked_lm_chunk, chunk, chunk_labels, use_reentrant=False)
            total, correct = total + loss, correct + hits
        return total / max(1, len(labels)), correct / max(1, len(labels))

    def _masked_lm_chunk(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.decoder(features).float()
        with torch.no_grad():
            correct = (logits.argmax(dim=-1) == labels).sum().float()
        return nn.functional.cross_entropy(logits, labels, reduction="sum"), correct


class ModularStarEncoderForPreTraining(ModularStarEncoderPreTrainedModel):
    """Masked language modelling and in-context classification at every exit (paper, section on pre-training)."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config)
        self.model = ModularStarEncoderModel(self.config)
        self.heads = ModularStarEncoderPreTrainingHeads(self.config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The vocabulary projection."""
        return self.heads.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the vocabulary projection."""
        self.heads.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        icc_labels: torch.LongTensor | None = None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ModularStarEncoderForPreTrainingOutput:
        r"""Predict masked tokens and whether two snippets share a repository.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in the trunk.
            labels: (B, T), the original token at masked positions and -100 elsewhere.
            icc_labels: (B,), 1 where both snippets come from the same repository, otherwise 0.
            exit_layer, exit_layers: as in the trunk; by default all exits when there are labels, otherwise the deepest.
        """
        supervised = labels is not None or icc_labels is not None
        if supervised and exit_layer is None and exit_layers is None:
            exit_layers = self.config.exit_layers
        exits = self.config.resolve_exits(exit_layer, exit_layers)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            exit_layers=exits,
            **kwargs,
        )
        rows = [self.config.exit_index(exit_layer) for exit_layer in exits]
        pooled = [
            self.heads.pooler(states, attention_mask, self.heads.exit_vector(row))
            for row, states in zip(rows, outputs.exit_hidden_states, strict=True)
        ]
        result = ModularStarEncoderForPreTrainingOutput(
            icc_logits=torch.stack([self.heads.icc_classifier(features) for features in pooled]),
            exit_hidden_states=outputs.exit_hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if labels is None:
            result.logits = self.heads.decoder(self.heads.token_features(outputs.last_hidden_state, rows[-1]))
        else:
            masked = (labels.flatten() != -100).nonzero().squeeze(-1)
            losses, accuracies = zip(
                *(
                    self.heads.masked_lm(
                        self.heads.token_features(states.flatten(0, 1)[masked], row), labels.flatten()[masked]
                    )
                    for row, states in zip(rows, outputs.exit_hidden_states, strict=True)
                ),
                strict=True,
            )
            result.mlm_losses, result.mlm_accuracies = torch.stack(losses), torch.stack(accuracies)
        if icc_labels is not None:
            logits = result.icc_logits.float()
            targets = icc_labels.expand(len(exits), -1)
            result.icc_losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(
                dim=1
            )
            result.icc_accuracies = (logits.argmax(dim=-1) == targets).float().mean(dim=1)
        if supervised:
            losses = sum(part for part in (result.mlm_losses, result.icc_losses) if part is not None)
            weights = [self.config.exit_weight(exit_layer) for exit_layer in exits]
            result.loss = (losses * torch.tensor(weights, device=losses.device)).sum()
        return result


class ModularStarEncoderProjectionHead(nn.Module):
    """Two linear layers with an activation between, applied to every token."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.projection_size)
        self.act = ACT2FN[config.projection_act]
        self.out_proj = nn.Linear(config.projection_size, config.projection_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.act(self.dense(states)))


class ModularStarEncoderForRetrieval(ModularStarEncoderPreTrainedModel):
    """Normalised embeddings of text and code, with one projection head per exit."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config)
        self.model = ModularStarEncoderModel(self.config)
        self.projection_heads = nn.ModuleDict(
            {str(exit_layer): ModularStarEncoderProjectionHead(self.config) for exit_layer in self.config.exit_layers}
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ModularStarEncoderForRetrievalOutput:
        r"""Embed a batch at one exit or at several from one pass.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, exit_layer, exit_layers: as in the trunk.
        """
        exits = self.config.resolve_exits(exit_layer, exit_layers)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            exit_layers=exits,
            **kwargs,
        )
        # CODEPATH: models trained here pool the mean; the published ones do not say theirs, so `cls` can be set.
        pool = _mean_of_tokens if self.config.pooling == "mean" else _last_token
        embeddings, tokens = [], None
        for exit_layer, states in zip(exits, outputs.exit_hidden_states, strict=True):
            tokens = self.projection_heads[str(exit_layer)](states)
            embeddings.append(nn.functional.normalize(pool(tokens, attention_mask), p=2, dim=1))
        return ModularStarEncoderForRetrievalOutput(
            last_hidden_state=tokens,
            sentence_embedding=embeddings[-1],
            exit_embeddings=torch.stack(embeddings),
            exit_hidden_states=outputs.exit_hidden_states,
            residual_states=outputs.residual_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ModularStarEncoderForSequenceClassification(ModularStarEncoderPreTrainedModel):
    """Classify a text or a pair `<sep>a<sep>b<cls>` at any exit, from the state of the final `<cls>`."""

    def __init__(self, config: ModularStarEncoderConfig) -> None:
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels
        self.model = ModularStarEncoderModel(config)
        self.exit_embedding = nn.Embedding(len(config.parent_exit_layers), config.exit_embedding_size)
        self.pooler = ModularStarEncoderExitConditionedPooler(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size + config.exit_embedding_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ModularStarEncoderForSequenceClassificationOutput:
        r"""Classify a batch at one exit or at several from one pass.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, exit_layer, exit_layers: as in the trunk.
            labels: (B,) class indices, (B,) float targets when `num_labels` is 1, or (B, num_labels) for several
                labels at once (`config.problem_type` as everywhere in transformers).
        """
        exits = self.config.resolve_exits(exit_layer, exit_layers)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            exit_layers=exits,
            **kwargs,
        )
        rows = torch.tensor([self.config.exit_index(e) for e in exits], device=outputs.last_hidden_state.device)
        exit_logits = torch.stack(
            [
                self.classifier(self.dropout(self.pooler(states, attention_mask, vector)))
                for states, vector in zip(outputs.exit_hidden_states, self.exit_embedding(rows), strict=True)
            ]
        )
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
    "ModularStarEncoderForPreTraining",
    "ModularStarEncoderForRetrieval",
    "ModularStarEncoderForSequenceClassification",
    "ModularStarEncoderModel",
    "ModularStarEncoderPreTrainedModel",
]
