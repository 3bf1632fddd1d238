"""The student: StarCoder2-style bidirectional trunk with exits from 0 layers on, functional (a dict of parameters).

Names are those of the project's ModularStarEncoderForRetrieval, plus `model.token_weights.weight` (V, 1) and exit 0, with
`projection_heads.{exit}.dense` as the only layer of a head. While training, `token_weights` holds logarithms.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LOG_WEIGHTS = "model.token_weights.weight"
TABLE = "model.embed_tokens.weight"


@dataclass
class Shape:
    vocab: int = 16384
    hidden: int = 384
    heads: int = 6
    kv_heads: int = 2
    inter: int = 1408
    layers: int = 6
    exits: tuple = (0, 1, 2, 4, 6)
    out: int = 384
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self):
        return self.hidden // self.heads


def grow_layers(shape, generator=None, std=None):
    """Layers that write nothing: output projections zero, the rest normal."""
    std = std or shape.hidden**-0.5
    kv = shape.kv_heads * shape.head_dim
    p = {}
    for i in range(shape.layers):
        base = f"model.layers.{i}"
        for name, (o, n), zero in (
            ("self_attn.q_proj", (shape.hidden, shape.hidden), False),
            ("self_attn.k_proj", (kv, shape.hidden), False),
            ("self_attn.v_proj", (kv, shape.hidden), False),
            ("self_attn.o_proj", (shape.hidden, shape.hidden), True),
            ("mlp.c_fc", (shape.inter, shape.hidden), False),
            ("mlp.c_proj", (shape.hidden, shape.inter), True),
        ):
            weight = torch.zeros(o, n) if zero else torch.randn(o, n, generator=generator) * std
            p[f"{base}.{name}.weight"], p[f"{base}.{name}.bias"] = weight, torch.zeros(o)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            p[f"{base}.{norm}.weight"] = torch.ones(shape.hidden)
            p[f"{base}.{norm}.bias"] = torch.zeros(shape.hidden)
    return p


def rope(length, shape, device, dtype):
    powers = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] / shape.theta**powers
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def cast(params, dtype):
    """Matrices and biases of linear layers in the compute type; norms, table, token weights and heads stay float32."""
    return {
        n: p.to(dtype) if (".self_attn." in n or ".mlp." in n) and p.dtype != dtype else p for n, p in params.items()
    }


def block(p, base, x, mask, cos, sin, shape, dtype):
    b, t, _ = x.shape
    h = F.layer_norm(
        x, (shape.hidden,), p[f"{base}.input_layernorm.weight"], p[f"{base}.input_layernorm.bias"], shape.eps
    ).to(dtype)

    def lin(name, value):
        return F.linear(value, p[f"{base}.{name}.weight"], p[f"{base}.{name}.bias"])

    q = lin("self_attn.q_proj", h).view(b, t, shape.heads, shape.head_dim).transpose(1, 2)
    k = lin("self_attn.k_proj", h).view(b, t, shape.kv_heads, shape.head_dim).transpose(1, 2)
    v = lin("self_attn.v_proj", h).view(b, t, shape.kv_heads, shape.head_dim).transpose(1, 2)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    groups = shape.heads // shape.kv_heads
    if groups > 1:
        k, v = (
            s[:, :, None].expand(b, shape.kv_heads, groups, t, shape.head_dim).reshape(b, shape.heads, t, shape.head_dim)
            for s in (k, v)
        )
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + lin("self_attn.o_proj", a.transpose(1, 2).reshape(b, t, shape.hidden))
    h = F.layer_norm(
        x, (shape.hidden,), p[f"{base}.post_attention_layernorm.weight"], p[f"{base}.post_attention_layernorm.bias"], shape.eps
    ).to(dtype)
    return x + lin("mlp.c_proj", F.gelu(lin("mlp.c_fc", h), approximate="tanh"))


def states(p, x, mask, shape, exits, dtype):
    """{exit: states (B, T, H) float32} from embedded tokens; `p` already `cast`."""
    out = {0: x} if 0 in exits else {}
    deepest = max(exits)
    if deepest:
        b, t, _ = x.shape
        cos, sin = rope(t, shape, x.device, dtype)
        attn_mask = mask[:, None, None, :].expand(b, 1, t, t)
        for i in range(deepest):
            x = block(p, f"model.layers.{i}", x, attn_mask, cos, sin, shape, dtype)
            if i + 1 in exits:
                out[i + 1] = x
    return out


def pool(p, hidden, ids, mask):
    """Mean of tokens, weighted by the learned weight of each."""
    w = torch.where(mask, F.embedding(ids, p[LOG_WEIGHTS]).squeeze(-1).exp(), 0.0)
    w = w / w.sum(1, keepdim=True).clamp(min=1e-9)
    return torch.bmm(w[:, None].to(hidden.dtype), hidden).squeeze(1)


def head(p, pooled, exit):
    # A matrix product of float32 states: small, for pooling comes first.
    return F.linear(pooled, p[f"projection_heads.{exit}.dense.weight"], p[f"projection_heads.{exit}.dense.bias"])


def embed(p, ids, mask, shape, exits, dtype, drop=0.0, pooled_only=False):
    """{exit: embeddings (B, out) float32, unit norm} of ids (B, T) long with mask (B, T) bool."""
    if drop:
        kept = mask & (torch.rand(ids.shape, device=ids.device) >= drop)
        mask = torch.where(kept.any(1, keepdim=True), kept, mask)
    x = F.embedding(ids, p[TABLE])
    out = {e: pool(p, h, ids, mask) for e, h in states(p, x, mask, shape, exits, dtype).items()}
    return out if pooled_only else {e: F.normalize(head(p, h, e), dim=1) for e, h in out.items()}


def config_json(shape, extra):
    return {
        "model_type": "ModularStarEncoder",
        "architectures": ["ModularStarEncoderForRetrieval"],
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inter,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 2048,
        "norm_epsilon": shape.eps,
        "use_bias": True,
        "is_causal": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "exit_layers": list(shape.exits),
        "exit_norm": "none",
        "projection_size": shape.out,
        "projection_head": "linear",
        "token_weights": True,
        "pooling": "mean",
        "projection_order": "pool_then_project",
        "embedding_normalization": "l2",
        "instruction_prompts": False,
        "dtype": "float16",
        **extra,
    }


def parameter_count(shape):
    n = sum(t.numel() for t in grow_layers(shape).values())
    return n + shape.vocab * (shape.hidden + 1) + len(shape.exits) * (shape.hidden + 1) * shape.out


if __name__ == "__main__":
    print(parameter_count(Shape()), 2 * parameter_count(Shape()) / 1e6, "MB float16")
