"""Drop near-duplicates of Parquet files on a Slurm cluster whose nodes share the folders (extra `datatrove`).

    python examples/slurm/deduplicate.py rows deduplicated --columns code --id-column id --partition all

Each stage is a job array that waits for the stage before it. Run the script again after a failure: what is done stays.
"""

import argparse
from pathlib import Path

from datatrove.executor import SlurmPipelineExecutor

from modular_star_encoder.synthconl.near_duplicate_job import datatrove_steps, prepare_job


def main() -> None:
    """Submit the stages and return at once; `squeue` shows them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of Parquet files")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--columns", nargs="+", default=["func1_CSN", "func2"], help="columns to compare")
    parser.add_argument("--id-column", help="column of ids; the smallest id of a cluster stays")
    parser.add_argument("--partition", required=True, help="Slurm partition")
    parser.add_argument("--time", default="4:00:00", help="limit of each task (4:00:00)")
    parser.add_argument(
        "--compare-tasks", type=int, default=16, help="tasks that compare texts, fixed once a job began (16)"
    )
    arguments = parser.parse_args()
    source, out = arguments.source.resolve(), arguments.out.resolve()
    job = prepare_job(source, out, columns=arguments.columns, id_column=arguments.id_column)
    executor = None
    for name, step, tasks in datatrove_steps(job, arguments.compare_tasks):
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
