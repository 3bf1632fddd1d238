"""How long importing the package takes, and `mose --help`: each run is a fresh Python process.

    python benchmarks/import_time.py

Bytecode and files are in the system's cache after the first, unmeasured round. The yardstick of the import is the part
of transformers that any model needs; that of the command is an interpreter that does nothing.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

from ratios import figure, median_of, ratio, take_turns
from report import write_rows

PROGRAMS = {
    "package": ("-c", "import modular_star_encoder"),
    "transformers": ("-c", "from transformers import AutoModel, PreTrainedModel"),
    "mose --help": ("-m", "modular_star_encoder.cli.main", "--help"),
    "nothing": ("-c", "pass"),
}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--name", default="import_time", help="of the results (default: %(default)s)")
    arguments = parser.parse_args()
    seconds = take_turns({name: runner(program) for name, program in PROGRAMS.items()}, arguments.rounds)
    waits = [help_ - nothing for help_, nothing in zip(seconds["mose --help"], seconds["nothing"], strict=True)]
    name = "import of the package / from transformers import AutoModel, PreTrainedModel"
    rows = [
        figure(name, ratio(seconds, "package", "transformers"), most=1.1),
        figure("mose --help, beyond python -c pass", median_of(waits), most=0.5, unit="s"),
    ]
    write_rows(arguments.name, rows)


def runner(program: tuple[str, ...]) -> Callable[[], None]:
    """Run Python with these arguments, in its own process, to its end."""

    def run() -> None:
        subprocess.run([sys.executable, *program], check=True, stdout=subprocess.DEVNULL)

    return run


if __name__ == "__main__":
    main()
