"""Fine-tune a multi-exit encoder for retrieval or clone detection, with the steps of `mose finetune`, to copy.

    python examples/finetune.py small --out runs/retrieval data.functions.folder=~/checkouts
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/finetune.py RECIPE --out FOLDER

An interrupted run continues when the same command is started again.
"""

import argparse
import sys

from modular_star_encoder.cli.main import keep_few_compiled_operations
from modular_star_encoder.training.finetuning import load_finetuning


def main() -> int:
    """Fine-tune and print the metrics; return the exit code: 0 on success, 2 after wrong input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file or a packaged recipe, such as small")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that differ from the recipe")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the run")
    arguments = parser.parse_intermixed_args()  # settings may also follow --out
    keep_few_compiled_operations()
    try:
        recipe, finetune = load_finetuning(arguments.recipe, arguments.overrides)
        log = finetune(recipe, arguments.out)
    except KeyboardInterrupt:
        print("\nfinetune: interrupted; start it again to continue from the last checkpoint.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"finetune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, value in sorted(log["evaluation"].items()):
        print(f"{name:40} {value:.3f}")
    print(f"model in {arguments.out}/model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
