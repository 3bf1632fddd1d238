"""Drop near-duplicates of Parquet files on a Slurm cluster whose nodes share the folders (needs datatrove).

    python examples/slurm/deduplicate.py rows deduplicated --columns code --id-column id --partition all

The fingerprints are an array of tasks; one task that waits for them compares and writes. Run the script again after a
failure: what is done stays.
"""

import argparse
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep


class Deduplicate(PipelineStep):
    """A share of the fingerprints, or all the rest."""

    name = "near-duplicates"

    def __init__(self, source: Path, out: Path, shared: bool, **options: Any) -> None:
        super().__init__()
        self.source, self.out, self.shared, self.options = source, out, shared, options

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Called by datatrove in each task."""
        # datatrove stores this class without the names that this file imports.
        from modular_star_encoder.synthconl.near_duplicate_job import drop_near_duplicates

        share = (rank, world_size) if self.shared else None
        drop_near_duplicates(self.source, self.out, share=share, progress=False, **self.options)
        yield from data or ()


def main() -> None:
    """Submit both stages and return at once; `squeue` shows them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of Parquet files")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--columns", nargs="+", default=["func1_CSN", "func2"], help="columns to compare")
    parser.add_argument("--id-column", help="column of ids; the smallest id of a cluster stays")
    parser.add_argument("--partition", required=True, help="Slurm partition")
    parser.add_argument("--time", default="4:00:00", help="limit of each task (4:00:00)")
    parser.add_argument("--tasks", type=int, default=16, help="tasks that compute fingerprints (16)")
    arguments = parser.parse_args()
    source, out = arguments.source.resolve(), arguments.out.resolve()
    executor = None
    for name, tasks in (("fingerprints", arguments.tasks), ("rest", 1)):
        shared = name == "fingerprints"
        step = Deduplicate(source, out, shared, columns=arguments.columns, id_column=arguments.id_column)
        executor = SlurmPipelineExecutor(
            [step],
            tasks=tasks,
            time=arguments.time,
            partition=arguments.partition,
            job_name=f"dedup-{name}",
            depends=executor,
            logging_dir=str(out.parent / f"{out.name}-logs" / name),
            mail_type="NONE",
            qos="",
        )
    executor.run()


if __name__ == "__main__":
    main()
