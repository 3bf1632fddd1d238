"""The 1B configuration on one GPU in bfloat16: is it right, how fast does it encode, how fast does it train?

    python benchmarks/device.py correctness --out correctness.json       # or encode, or training; --toy: tiny, on a CPU

    correctness  every attention backend that is here, with padding, without padding and packed, against float32; slices
                 against the exits of their parent, bit for bit
    encode       tokens per second of every exit, as it is and compiled, beside Starcoder2Model and a ModernBertModel of
                 equal size, and the share of the fastest matrix product in the same run
    training     one pre-training step (five exits), and one contrastive step with the gradient cache at two batch
                 sizes: tokens per second, share of the fastest matrix product, peak memory

Rows are appended to the file as they are measured, so that a run that is cut short keeps what it has. Weights are
random, tokens are random, and time does not depend on either.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from models import modernbert_config, random_model, starcoder2_config
from torch import nn
from transformers import ModernBertModel, Starcoder2Model
from transformers.utils import is_flash_attn_2_available

from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
)
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings

TOY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "exit_layers": [1, 2, 4],
    "projection_size": 64,
}
NO_DROPOUT = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)
SHARE_MASKED = 0.15


class Rows:
    """Rows of one part in a JSON file, written again after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []

    def add(self, name: str, **values: Any) -> None:
        """Append a row, print it, and write the file."""
        self.rows.append({"name": name, **values})
        print(json.dumps(self.rows[-1], ensure_ascii=False))
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {**versions, "device": torch.cuda.get_device_name() if on_gpu() else "cpu"}
        self.path.write_text(
            json.dumps({"machine": machine, "rows": self.rows}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def main() -> None:
    """Parse and run one part."""
    parts = {"correctness": correctness, "encode": encode, "training": training}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to rehearse on a CPU")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    parts[arguments.part](Rows(arguments.out), arguments.toy)


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def paper_config(toy: bool, **changes: Any) -> ModularStarEncoderConfig:
    """The published fine-tuned configuration, without dropout; tiny for a rehearsal."""
    folder = Path(__file__).parent.parent / "hub_configs" / "finetuned"
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values |= (TOY if toy else {}) | NO_DROPOUT | {"architectures": None, "pad_token_id": 0} | changes
    return ModularStarEncoderConfig(**{name: value for name, value in values.items() if name != "model_type"})


def new_model(model_class: type, config: Any, dtype: torch.dtype) -> nn.Module:
    """Random weights, made where they are used."""
    with device():
        return random_model(model_class, config, dtype)


def seconds_of(run: Callable[[], Any], rounds: int = 5, warm_up: int = 2) -> float:
    """Median seconds of one call, the device's work included."""
    times = []
    for done in range(-warm_up, rounds):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        if done >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def matmul_peak(toy: bool) -> float:
    """FLOP/s of torch's fastest bfloat16 matrix product of three sizes, on random data."""
    best = 0.0
    for size in (256,) if toy else (4096, 8192, 16384):
        left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
        best = max(best, 2 * size**3 / seconds_of(lambda left=left, right=right: left @ right))
    return best


def layer_flops(config: ModularStarEncoderConfig, layers: int, length: int) -> float:
    """Floating-point operations of a forward pass for each token (2 · weights of matrices + 4 · T·H of attention)."""
    hidden, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    return layers * (4 * hidden * (hidden + keys + config.intermediate_size) + 4 * length * hidden)


def mixed_batch(config: ModularStarEncoderConfig, rows: int, longest: int) -> dict[str, torch.Tensor]:
    """Random token ids (rows, longest) with padding on the left, a third of the tokens in the mean."""
    lengths = torch.linspace(longest, longest // 8, rows).long()
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    ids = torch.randint(4, config.vocab_size, (rows, longest)) * mask
    return {"input_ids": ids.to(device()), "attention_mask": mask.to(device())}


def packed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same texts one after the other in one row."""
    real = batch["attention_mask"].bool()
    ends = batch["attention_mask"].sum(1).cumsum(0)
    bounds = torch.cat([ends.new_zeros(1), ends]).int()
    return {"input_ids": batch["input_ids"][real][None], "cu_seq_lens_q": bounds}


# -- correctness --------------------------------------------------------------------------------------------------


def correctness(rows: Rows, toy: bool) -> None:
    """Embeddings of every backend and form of input against float32 with the mathematical attention."""
    config = paper_config(toy)
    model = new_model(ModularStarEncoderForRetrieval, config, torch.float32)
    batch = mixed_batch(config, 8, 64 if toy else 512)
    exits = tuple(config.exit_layers)
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        exact = model(**batch, exit_layers=exits).exit_embeddings.float()
        model = model.to(torch.bfloat16)
        for name, embed in embeddings_of(model, batch, exits):
            try:
                found = embed().float()
            except Exception as error:
                rows.add(f"correctness: {name}", error=f"{type(error).__name__}: {error}"[:300])
                continue
            cosine = nn.functional.cosine_similarity(found, exact, dim=-1)
            by_exit = [round(float(1 - value), 6) for value in cosine.amin(dim=1)]
            rows.add(f"correctness: {name}", largest_cosine_distance_to_float32=by_exit)
        model.set_attn_implementation("sdpa")
        model.config.unpad_inputs = False
        # `slice` copies the weights of the layers that are kept.
        whole = model(**batch, exit_layers=exits).exit_embeddings
        for number, exit_layer in enumerate(exits):
            part = model.slice(exit_layer)(**batch).sentence_embedding
            rows.add(f"slice at exit {exit_layer} equals the exit bit for bit", equal=torch.equal(part, whole[number]))


def embeddings_of(
    model: Any, batch: dict[str, torch.Tensor], exits: tuple[int, ...]
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Every attention backend with each form of the same texts; flex attention compiles for minutes on a CPU."""
    backends = ["eager", "sdpa", *(["flex_attention"] if on_gpu() else [])]
    backends += ["flash_attention_2"] if is_flash_attn_2_available() else []
    for backend in backends:
        for form in ("padded", "unpadded", "packed"):

            def embed(backend: str = backend, form: str = form) -> torch.Tensor:
                model.set_attn_implementation(backend)
                model.config.unpad_inputs = form == "unpadded"
                inputs = packed(batch) if form == "packed" else batch
                return model(**inputs, exit_layers=exits).exit_embeddings

            yield f"{backend}, {form}", embed


# -- encode -------------------------------------------------------------------------------------------------------


def encode(rows: Rows, toy: bool) -> None:
    """Tokens per second at every exit and of other models of equal size."""
    config = paper_config(toy)
    peak = matmul_peak(toy)
    rows.add("matrix product, bfloat16", tflops=round(peak / 1e12, 1))
    shapes = [(2, 32)] if toy else [(128, 128), (64, 512), (16, 2048), (1, 128)]
    model = new_model(ModularStarEncoderForRetrieval, config, torch.bfloat16)
    models = {
        "Starcoder2Model (causal)": new_model(Starcoder2Model, starcoder2_config(config), torch.bfloat16),
        "ModernBertModel of equal size": new_model(ModernBertModel, modernbert_config(config), torch.bfloat16),
    }
    last = config.num_hidden_layers

    def measure(name: str, layers: int, batch: int, length: int, run: Callable[[torch.Tensor], Any]) -> None:
        ids = torch.randint(4, config.vocab_size, (batch, length), device=device())
        with torch.inference_mode():
            seconds = seconds_of(lambda: run(ids))
        rows.add(
            f"encode {batch} × {length}: {name}",
            milliseconds=round(1000 * seconds, 2),
            tokens_per_second=round(batch * length / seconds),
            share_of_matrix_product=round(batch * length * layer_flops(config, layers, length) / seconds / peak, 3),
        )

    for batch, length in shapes:
        for k in config.exit_layers:
            measure(f"exit {k}", k, batch, length, lambda ids, k=k: model(input_ids=ids, exit_layer=k))
        for name, other in models.items():
            measure(name, last, batch, length, lambda ids, other=other: other(input_ids=ids))
    # Last, because compiling takes most of a minute: the rows before are written by then.
    compiled = torch.compile(model, dynamic=False)
    batch, length = shapes[min(1, len(shapes) - 1)]
    measure(f"exit {last}, compiled", last, batch, length, lambda ids: compiled(input_ids=ids, exit_layer=last))


# -- training -----------------------------------------------------------------------------------------------------


def training(rows: Rows, toy: bool) -> None:
    """Steps of pre-training and of contrastive fine-tuning, AdamW's update included in the first."""
    peak = matmul_peak(toy)
    rows.add("matrix product, bfloat16", tflops=round(peak / 1e12, 1))
    pretraining_step(rows, toy, peak)
    if on_gpu():
        torch.cuda.empty_cache()
    for batch_size in (4, 8) if toy else (256, 2048):
        contrastive_step(rows, toy, peak, batch_size)


def pretraining_step(rows: Rows, toy: bool, peak: float) -> None:
    """Masked tokens and in-context classification at every exit; float32 weights under autocast."""
    config = paper_config(toy)
    model = new_model(ModularStarEncoderForPreTraining, config, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu())
    batch, length = (2, 32) if toy else (16, 1024)
    ids = torch.randint(4, config.vocab_size, (batch, length), device=device())
    masked = torch.rand(ids.shape, device=device()) < SHARE_MASKED
    inputs = {"input_ids": ids, "labels": ids.masked_fill(~masked, -100)}
    inputs["icc_labels"] = torch.arange(batch, device=device()) % 2

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device().type, dtype=torch.bfloat16):
            loss = model(**inputs, exit_layers=tuple(config.exit_layers)).loss
        loss.backward()
        optimizer.step()

    reset_peak()
    seconds = seconds_of(step, rounds=5)
    heads = len(config.exit_layers) * SHARE_MASKED * 2 * config.hidden_size * config.vocab_size
    flops = 3 * batch * length * (layer_flops(config, config.num_hidden_layers, length) + heads)
    rows.add(
        f"pre-training step, {batch} × {length}, {len(config.exit_layers)} exits",
        seconds=round(seconds, 3),
        tokens_per_second=round(batch * length / seconds),
        share_of_matrix_product=round(flops / seconds / peak, 3),
        peak_gib=peak_gib(),
    )


def contrastive_step(rows: Rows, toy: bool, peak: float, batch_size: int) -> None:
    """Forward and backward pass of all exits with the gradient cache; each text passes forward twice."""
    config = paper_config(toy, unpad_inputs=True)
    model = new_model(ModularStarEncoderForRetrieval, config, torch.float32).train()
    if is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    settings = ContrastiveSettings(logit_scale=10.0, mini_batch_tokens=128 if toy else 8192)
    objective = ContrastiveObjective(settings)
    exits = tuple(config.exit_layers)
    sides = {"query": 16, "document": 32} if toy else {"query": 64, "document": 256}
    batch = {side: mixed_batch(config, batch_size, longest) for side, longest in sides.items()}
    tokens = sum(int(side["attention_mask"].sum()) for side in batch.values())

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device().type, dtype=torch.bfloat16):
            loss = objective(model, batch, exits).losses.sum()
        loss.backward()

    reset_peak()
    seconds = seconds_of(step, rounds=2, warm_up=1)
    flops = 4 * tokens * layer_flops(config, config.num_hidden_layers, tokens // (2 * batch_size))
    rows.add(
        f"contrastive step, {batch_size} pairs, {len(exits)} exits, gradient cache",
        seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds),
        share_of_matrix_product=round(flops / seconds / peak, 3),
        peak_gib=peak_gib(),
    )


def reset_peak() -> None:
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """GiB that PyTorch held on the GPU at the most, weights included; None on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu() else None


if __name__ == "__main__":
    main()
