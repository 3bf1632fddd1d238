"""The paper's pre-training on 8 and 64 GPUs, computed without one: memory, steps, and days at the speed of one H200.

    python benchmarks/scale_out.py                 # on the meta device, under a process group that sends nothing
    python benchmarks/scale_out.py --ranks 128

`fully_shard` (FSDP2) splits each layer and the rest of the model, so the sizes of weights, gradients and moments are
those of real shards. Activations are estimated for a step that keeps them all, as the step measured on one H200 did
(`device_h200.json`). Days assume that each GPU trains at that speed: communication costs nothing, so they are a lower
bound.
"""

import argparse
import json

import torch
from report import COMMITTED, write
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.training.pretraining import model_config
from modular_star_encoder.training.recipes import PretrainingRecipe, load_recipe
from modular_star_encoder.utils.reports import markdown_table

RECIPE = "hub_configs/pretrained/recipe.yaml"
GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2


def main() -> int:
    """Shard, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="numbers of GPUs (default: 8 64)")
    arguments = parser.parse_args()
    measured = json.loads((COMMITTED / "device_h200.json").read_text())
    step = next(row for row in measured["rows"] if row["name"].startswith("pre-training step"))
    figures = [size_of_run(ranks, step["tokens_per_second"]) for ranks in arguments.ranks]
    table = "\n".join(markdown_table([list(figures[0]), *([str(one) for one in row.values()] for row in figures)]))
    print(table)
    print(f"\n{write('scale_out', {'step_of_one_gpu': step, 'rows': figures}, table)}")
    return 0


def size_of_run(ranks: int, tokens_per_second: float) -> dict[str, float]:
    """The shards of the first of `ranks` GPUs, and what follows from them."""
    recipe = load_recipe(PretrainingRecipe, RECIPE, [f"tokens_per_step={tokens_per_step(ranks)}"])
    config = model_config(recipe)
    init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        with torch.device("meta"):
            model = ModularStarEncoderForPreTraining(config)
        whole = sum(parameter.numel() for parameter in model.parameters())
        layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        shard = sum(parameter.to_local().numel() for parameter in model.parameters())
    finally:
        destroy_process_group()
    tokens = recipe.rows_per_device * recipe.max_tokens
    outside = whole - layer * config.num_hidden_layers
    state = shard * 4 * FLOAT32  # weights, gradients, two moments
    gathered = (2 * layer + outside) * BFLOAT16  # this layer, the next one, and what is not a layer
    per_token = (
        16 * config.hidden_size + 2 * config.intermediate_size
    )  # numbers that a layer keeps, as in `runs.preflight`
    kept = config.num_hidden_layers * tokens * per_token * BFLOAT16
    logits = int(tokens * recipe.mlm_probability) * config.vocab_size * FLOAT32  # one exit at a time
    return {
        "GPUs": ranks,
        "parameters of the shard (million)": round(shard / 1e6, 1),
        "weights, gradients, moments (GiB)": round(state / GIB, 2),
        "gathered layers (GiB)": round(gathered / GIB, 2),
        "activations and logits (GiB)": round((kept + logits) / GIB, 2),
        "in all (GiB)": round((state + gathered + kept + logits) / GIB, 1),
        "tokens per step": recipe.tokens_per_step,
        "accumulated batches": recipe.batches(ranks)["gradient_accumulation_steps"],
        "steps": recipe.max_steps,
        "days": round(recipe.tokens_per_step * recipe.max_steps / ranks / tokens_per_second / 86400, 1),
    }


def tokens_per_step(ranks: int) -> int:
    """The multiple of what `ranks` GPUs compute at once that is nearest to the recipe's tokens per step."""
    recipe = load_recipe(PretrainingRecipe, RECIPE, [])
    at_once = ranks * recipe.rows_per_device * recipe.max_tokens
    return round(recipe.tokens_per_step / at_once) * at_once


if __name__ == "__main__":
    raise SystemExit(main())
