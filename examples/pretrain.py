"""Pre-train a multi-exit encoder on repositories with the steps of `mose pretrain`. Copy and change this script.

    python examples/pretrain.py small --out runs/small corpus.folder=~/checkouts
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/pretrain.py RECIPE --out FOLDER

An interrupted run continues when the same command is started again.
"""

import argparse
import sys

from modular_star_encoder.cli.main import keep_few_compiled_operations
from modular_star_encoder.training.pretraining import pretrain
from modular_star_encoder.training.recipes import PretrainingRecipe, load_recipe


def main() -> int:
    """Pre-train and print the metrics; return the exit code: 0 on success, 2 after wrong input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file or a packaged recipe, such as small")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that differ from the recipe")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the run")
    arguments = parser.parse_intermixed_args()  # settings may also follow --out
    keep_few_compiled_operations()
    try:
        log = pretrain(load_recipe(PretrainingRecipe, arguments.recipe, arguments.overrides), arguments.out)
    except KeyboardInterrupt:
        print("\npretrain: interrupted; start it again to continue from the last checkpoint.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"pretrain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, value in sorted(log["evaluation"].items()):
        print(f"{name:32} {value:.3f}")
    print(f"unigram entropy {log['unigram_entropy']:.3f} nats; model in {arguments.out}/model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
