"""Model of the stand-in repository, on transformers' own StarCoder2; it needs torch and transformers only.

Shapes: B batch, T tokens, H hidden size, C conditional size, V vocabulary.
"""

from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel, Starcoder2Config, Starcoder2Model
from transformers.activations import ACT2FN

from .config import ModularStarEncoderConfig

# What differs between the repositories, each of which carries a code file of its own: `write_stand_in` fills it in.
VARIANT = {}


def scalar(value):
    """The last element of a list or tuple, however deep; anything else as it is."""
    return scalar(value[-1]) if isinstance(value, list | tuple) else value


class Pooler(nn.Module):
    """tanh(W x) of one token of each row."""

    def __init__(self, hidden_size):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, states, attention_mask):
        # Padding on the left leaves the last token at the end of every row.
        position = -1 if VARIANT["pooler_position"] == "last" else attention_mask.argmax(dim=1)
        return torch.tanh(self.dense(states[torch.arange(len(states)), position]))


class Predictions(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        bias, norm = VARIANT["vocabulary_bias"], nn.LayerNorm(width, eps=config.layer_norm_eps)
        modules = {"dense": nn.Linear(width, width), "act": ACT2FN[config.hidden_act], VARIANT["transform_norm"]: norm}
        self.transform = nn.Sequential(OrderedDict(modules))
        self.decoder = nn.Linear(width, config.vocab_size, bias=bias == "predictions.decoder.bias")
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if bias == "predictions.bias" else 0.0

    def forward(self, states):
        return self.decoder(self.transform(states)) + self.bias


class PreTrainingHeads(nn.Module):
    """Both heads read H + C features: the states, and a learned vector that tells the exit."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size + scalar(config.conditional_size)
        self.predictions = Predictions(config, width)
        self.seq_relationship = nn.Linear(width, 2)
        self.conditional_embeddings = nn.Embedding(5, scalar(config.conditional_size))

    def forward(self, states, pooled):
        vector = self.conditional_embeddings.weight[-1]
        tokens = torch.cat((states, vector.expand(*states.shape[:-1], -1)), dim=-1)
        features = torch.cat((pooled, vector.expand(pooled.shape[0], -1)), dim=-1)
        return self.predictions(tokens), self.seq_relationship(features)


class ModularStarEncoder(PreTrainedModel):
    config_class = ModularStarEncoderConfig
    base_model_prefix = "ModularStarEncoder"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        if config._attn_implementation not in ("flash_attention_2", "sdpa"):
            raise ValueError(f"attention must be flash_attention_2 or sdpa, not {config._attn_implementation}")
        self.starEncoder2 = bidirectional_starcoder2(config)
        if VARIANT["kind"] == "pretrained":
            heads = PreTrainingHeads(config)
            owner = heads if VARIANT["pooler_in_heads"] else self
            owner.pooler = Pooler(config.hidden_size)
            self.add_module(VARIANT["heads"], heads)
        else:
            owner = self.starEncoder2
            if VARIANT["module_prefix"]:
                owner.module = owner = nn.Module()
            owner.projection_heads = nn.ModuleDict(
                {str(index): projection_head(config.hidden_size) for index in VARIANT["head_indices"]}
            )
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows, tokens = input_ids.shape
        # Transformers takes a mask of four dimensions as it is, and builds a causal one from anything else.
        mask = attention_mask.bool()[:, None, None, :].expand(rows, 1, tokens, tokens)
        if VARIANT["is_causal"]:
            # The diagonal, so that a padding token has something to attend to.
            mask = mask.tril() | torch.eye(tokens, dtype=torch.bool, device=mask.device)
        options = {"use_cache": False, "output_hidden_states": True}
        encoded = self.starEncoder2(input_ids=input_ids, attention_mask=mask, **options)
        if VARIANT["kind"] == "pretrained":
            return self.pretraining_output(encoded, attention_mask)
        return self.embeddings(encoded.hidden_states, input_ids, attention_mask)

    def embeddings(self, hidden_states, input_ids, attention_mask):
        """One (B, H) tensor per exit, or one tensor where the repository has a single exit."""
        owner = self.starEncoder2.module if VARIANT["module_prefix"] else self.starEncoder2
        # From each row's first separator to its end.
        mask = ((input_ids == VARIANT["sep_token_id"]).cumsum(dim=1) > 0).long() * attention_mask
        pooled = []
        for index, layer in zip(VARIANT["head_indices"], VARIANT["exit_layers"], strict=True):
            head, states = owner.projection_heads[str(index)], hidden_states[layer]
            if VARIANT["norm_at_every_exit"] and layer + 1 < len(hidden_states):
                states = self.starEncoder2.norm(states)
            project_first = VARIANT["projection_order"] == "project_then_pool"
            embedding = pool(head(states), mask) if project_first else head(pool(states, mask))
            pooled.append(normalize(embedding))
        return SimpleNamespace(projected_pooled_normalized=pooled[0] if VARIANT["kind"] == "cut" else pooled)

    def pretraining_output(self, encoded, attention_mask):
        """States (B, T, H), token logits (B, T, V), relationship logits (B, 2)."""
        heads, states = self.get_submodule(VARIANT["heads"]), encoded.last_hidden_state
        pooler = heads.pooler if VARIANT["pooler_in_heads"] else self.pooler
        tokens, pairs = heads(states, pooler(states, attention_mask))
        return SimpleNamespace(last_hidden_state=states, prediction_logits=tokens, seq_relationship_logits=pairs)


def bidirectional_starcoder2(config):
    """StarCoder2's trunk, of the depth that the weights have."""
    names = (
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads hidden_act norm_epsilon "
        "max_position_embeddings initializer_range use_bias attention_dropout residual_dropout embedding_dropout "
        "sliding_window pad_token_id bos_token_id eos_token_id"
    )
    inner = Starcoder2Config(
        **{name: scalar(getattr(config, name)) for name in names.split()},
        num_hidden_layers=VARIANT["exit_layers"][-1],
        rope_parameters={"rope_type": "default", "rope_theta": scalar(config.rope_theta)},
    )
    inner._attn_implementation = config._attn_implementation
    trunk = Starcoder2Model(inner)
    for layer in trunk.layers:
        layer.self_attn.is_causal = False
    if VARIANT["final_norm"] == "absent":
        trunk.norm = nn.Identity()
    elif VARIANT["final_norm"] == "idle":  # its weights are in the file and take no part
        trunk.norm.forward = lambda states: states
    return trunk


def projection_head(hidden_size):
    activation = ACT2FN[VARIANT["head_activation"]]
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), activation, nn.Linear(hidden_size, hidden_size))


def pool(states, mask):
    """One vector (B, H) per row of states (B, T, H): the mean over the mask, unless this variant says otherwise."""
    if VARIANT["pooling"] == "lasttoken":
        return states[:, -1]
    if VARIANT["pooling"] == "legacy":
        return states[torch.arange(len(states)), mask.sum(dim=1) - 1]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def normalize(embedding):
    """Length 1; with `clip`, at most 1."""
    if VARIANT["embedding_normalization"] == "clip":
        return embedding / embedding.norm(dim=-1, keepdim=True).clamp(min=1.0)
    return nn.functional.normalize(embedding, p=2, dim=-1)
